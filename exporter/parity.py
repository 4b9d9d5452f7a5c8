"""Parity: an engine against the reference, face by face, on labelled faces."""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from emoexport.config import Record
from emoexport.engines.timing import Latency
from emoexport.evidence import Evidence, evidence_of
from emoexport.labels import EMOTIONS
from emoexport.outcome import Outcome
from emoexport.precision import Tolerance
from emoexport.statistics import Share, exact_interval

__all__ = ["EngineParity", "ParityReport", "compare"]


class EngineParity(Record):
    """One engine on one set of rows."""

    engine: str
    precision: str
    rows: str
    """`all`, or `clean`: no copies, leaks, contradictions or blanks."""
    accuracy: Share
    reference_accuracy: Share
    agreement: Share
    """Faces on which engine and reference decide the same."""
    engine_only_right: int
    reference_only_right: int
    evidence: Evidence | None = None
    """The comparison face by face; None in a report from before there was any."""
    max_difference: float
    """Of any probability of any face."""
    mean_difference: float
    tolerance: Tolerance
    verdict: Literal["passed", "failed"]
    failures: tuple[str, ...]
    """What is out of tolerance, a sentence each; empty for a pass."""


class ParityReport(Record):
    """`reports/parity.json`."""

    schema_version: Literal[1] = 1
    created: str
    bundle_digest: str
    data: str
    split: str
    data_sha256: str
    faces: int
    skipped: int
    """Faces of the data that could not be read, in all its splits."""
    results: tuple[EngineParity, ...]
    batch: int
    latency: dict[str, Latency]
    """Of a call with `batch` faces, interleaved, by engine; `torch-fp32` is the reference loop."""
    size_bytes: dict[str, int]
    """Of a graph, by precision; of a package, by engine."""
    notes: tuple[str, ...] = ()
    """What a reader of the figures must know."""
    machine: dict[str, str]
    verdict: Literal["passed", "failed"]


def compare(
    engine: Outcome,
    reference: Outcome,
    truth: NDArray[np.int64],
    *,
    name: str,
    precision: str,
    tolerance: Tolerance,
    labels: tuple[str, ...] = EMOTIONS,
    rows: str = "all",
) -> EngineParity:
    """Compare what an engine and the reference say about the same N faces.

    Args:
        engine: what the engine says.
        reference: what the reference says.
        truth: true labels, `(N,)`.
        name: of the engine.
        precision: of its graph.
        tolerance: of that precision.
        labels: the emotions, by index.
        rows: which rows these are.
    """
    difference = np.abs(engine.probabilities.astype(np.float64) - reference.probabilities)
    right, reference_right = engine.label == truth, reference.label == truth
    same = engine.label == reference.label
    largest = float(difference.max()) if np.isfinite(difference).all() else float("inf")
    mean = float(difference.mean()) if np.isfinite(difference).all() else float("inf")
    drop = float(reference_right.mean() - right.mean())
    failures = []
    if not largest <= tolerance.max_difference:
        failures.append(f"a probability differs by {largest:.2g}; at most {tolerance.max_difference:g}")
    if not mean <= tolerance.mean_difference:
        failures.append(f"probabilities differ by {mean:.2g} on average; at most {tolerance.mean_difference:g}")
    if same.mean() < tolerance.min_agreement:
        failures.append(f"{same.mean():.2%} of the labels agree; at least {tolerance.min_agreement:.1%}")
    if drop > tolerance.max_drop:
        failures.append(f"accuracy drops by {100 * drop:.2f} points; at most {100 * tolerance.max_drop:g}")
    evidence = evidence_of(engine, reference, truth, labels)
    return EngineParity(
        engine=name,
        precision=precision,
        rows=rows,
        accuracy=Share.of(right),
        reference_accuracy=Share.of(reference_right),
        agreement=Share.of(same, exact_interval),
        engine_only_right=evidence.engine_only_right,
        reference_only_right=evidence.reference_only_right,
        evidence=evidence,
        max_difference=largest,
        mean_difference=mean,
        tolerance=tolerance,
        verdict="failed" if failures else "passed",
        failures=tuple(failures),
    )
