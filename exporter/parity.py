"""Parity: engines against the reference, face by face, on labelled faces."""

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from emoexport.config import Record
from emoexport.engines.timing import Latency
from emoexport.evidence import Evidence, evidence_of
from emoexport.labels import EMOTIONS
from emoexport.metamorphic import RelationCheck
from emoexport.outcome import Outcome
from emoexport.precision import PRECISIONS, Tolerance
from emoexport.statistics import Share, exact_interval
from emoexport.verdict import Judgement, Limits, Verdict, joined, judge, worst_of

__all__ = ["EngineFacts", "EngineParity", "EngineReport", "ParityReport", "VerifyFacts", "compare", "conclude"]


class EngineParity(Judgement):
    """One engine on one set of rows, judged."""

    engine: str
    precision: str
    rows: str
    """`all`, or `clean`: no copies, leaks, contradictions or blanks."""
    accuracy: Share
    reference_accuracy: Share
    agreement: Share
    """Faces on which engine and reference decide the same."""
    evidence: Evidence
    """The comparison face by face."""
    max_difference: float
    """Of any probability of any face, or of its confidence where both decide the same."""
    mean_difference: float
    tolerance: Tolerance


class EngineFacts(Record):
    """What was found of an engine beside its answers."""

    engine: str
    precision: str
    file: str
    """That it was opened from, relative to the bundle."""
    sha256: str
    machine: dict[str, str]
    """The runtime and its version, and the processor or the GPU."""
    load_s: float
    layers: dict[str, int] = Field(default_factory=dict)
    """By type of number, how many layers the runtime computes in it; empty where it does not tell, as in the next."""
    multiplications: dict[str, int] = Field(default_factory=dict)
    """How many of these are convolutions, matrix products or attention."""
    time_share: dict[str, float] = Field(default_factory=dict)
    """By type of number, what part of the time of these."""
    in_graph: dict[str, int]
    """By type of number, how many of them the graph has."""
    relations: tuple[RelationCheck, ...] = ()
    batches: tuple[int, ...] = ()
    """Numbers of faces in a call at which the relations were checked; all faces were answered at the largest."""
    proof: Judgement
    """On its precision: whether the runtime computes in what was asked for."""
    failure: str = ""
    """What it raised instead of an answer; empty if it answered."""


class EngineReport(EngineFacts, Judgement):
    """An engine, judged by all that was found."""


class VerifyFacts(Record):
    """All that `verify` found but the answers: with these it can be judged again."""

    created: str
    bundle_digest: str
    data: str
    split: str
    data_sha256: str
    faces: int
    skipped: int
    """Faces of the data that could not be read, in all its splits."""
    labels: tuple[str, ...] = EMOTIONS
    unfit: str = ""
    """Why these faces can show nothing of new ones; empty if they can."""
    engines: tuple[EngineFacts, ...]
    batches: tuple[int, ...]
    """Numbers of faces in a call that were asked for; engines have those of them that they take."""
    batch: int
    """The number of faces in the calls that were timed."""
    latency: dict[str, Latency]
    """Of such a call, interleaved, by engine; `torch-fp32` is the reference loop."""
    size_bytes: dict[str, int]
    """Of a graph, by precision; of a package, by engine."""
    notes: tuple[str, ...] = ()
    """What a reader of the figures must know."""
    machine: dict[str, str]


class ParityReport(VerifyFacts):
    """`reports/parity.json`."""

    schema_version: Literal[2] = 2
    limits: Limits
    engines: tuple[EngineReport, ...]
    results: tuple[EngineParity, ...]
    """Of every engine on every set of rows."""
    verdict: Verdict
    """The worst of the engines that are judged."""


def compare(
    engine: Outcome,
    reference: Outcome,
    truth: NDArray[np.int64],
    *,
    name: str,
    precision: str,
    limits: Limits = Limits(),  # noqa: B008 (frozen)
    labels: tuple[str, ...] = EMOTIONS,
    rows: str = "all",
    index: NDArray[np.int64] | None = None,
) -> EngineParity:
    """Compare what an engine and the reference say about the same N faces.

    Args:
        engine: what the engine says.
        reference: what the reference says.
        truth: true labels, `(N,)`.
        name: of the engine.
        precision: of its graph.
        limits: how much worse it may be.
        labels: the emotions, by index.
        rows: which rows these are.
        index: what the faces are numbered by, `(N,)`; their order if None.
    """
    difference = np.abs(engine.probabilities.astype(np.float64) - reference.probabilities)
    same = engine.label == reference.label
    unsure = np.abs(engine.confidence.astype(np.float64) - reference.confidence)[same]
    finite = bool(np.isfinite(difference).all() and np.isfinite(engine.confidence).all())
    largest, mean = (
        float(value) if finite else float("inf")
        for value in (max(difference.max(), unsure.max(initial=0.0)), difference.mean())
    )
    tolerance = PRECISIONS[precision].tolerance
    evidence = evidence_of(engine, reference, truth, labels, index)
    found = joined([judge(evidence, limits), *_beyond(largest, mean, tolerance)])
    return EngineParity(
        **dict(found),
        engine=name,
        precision=precision,
        rows=rows,
        accuracy=Share.of(engine.label == truth),
        reference_accuracy=Share.of(reference.label == truth),
        agreement=Share.of(same, exact_interval),
        evidence=evidence,
        max_difference=largest,
        mean_difference=mean,
        tolerance=tolerance,
    )


def conclude(
    facts: VerifyFacts,
    answers: Mapping[str, Outcome],
    reference: Outcome,
    truth: NDArray[np.int64],
    rows: Mapping[str, NDArray[np.bool_]],
    limits: Limits,
) -> ParityReport:
    """Judge engines by their answers and by all else that was found.

    Args:
        facts: all else.
        answers: by engine, about N faces.
        reference: the reference's.
        truth: true labels, `(N,)`.
        rows: sets of rows, by name, each a mask `(N,)`.
        limits: how much worse than the reference an engine may be.
    """
    results = [
        compare(
            answers[engine.engine].take(mask),
            reference.take(mask),
            truth[mask],
            name=engine.engine,
            precision=engine.precision,
            limits=limits,
            labels=facts.labels,
            rows=name,
            index=np.flatnonzero(mask),
        )
        for engine in facts.engines
        if not engine.failure
        for name, mask in rows.items()
    ]
    engines = [
        _judged(engine, [result for result in results if result.engine == engine.engine], facts.unfit)
        for engine in facts.engines
    ]
    told = {name: getattr(facts, name) for name in VerifyFacts.model_fields if name != "engines"}
    return ParityReport(
        **told, limits=limits, engines=tuple(engines), results=tuple(results), verdict=worst_of(engines)
    )


def _judged(engine: EngineFacts, results: Sequence[EngineParity], unfit: str) -> EngineReport:
    """By its answers on every set of rows, the relations, and the types it computes in."""
    if engine.failure:
        reason = f"it does not answer: {engine.failure}"
        return EngineReport(**dict(engine), verdict="failed", reasons=(reason,))
    parts = [_of_rows(result) for result in results]
    broken = [check for check in engine.relations if not check.holds]
    reasons = tuple(
        f"its answers do not go together at batch {check.batch}, '{check.relation}': a probability differs by "
        f"{check.largest_difference:.2g}; at most {check.allowed:g}"
        for check in broken
    )
    parts += [Judgement(verdict="failed", reasons=reasons)] if broken else []
    if unfit:
        parts.append(Judgement(verdict="not enough evidence", reasons=(unfit,)))
    found = joined([*parts, engine.proof])
    if engine.proof.verdict == "not judged" and found.verdict != "failed":
        found = engine.proof
    return EngineReport(**dict(engine), **dict(found))


def _of_rows(result: EngineParity) -> Judgement:
    reasons = tuple(f"{result.rows} rows: {reason}" for reason in result.reasons)
    return Judgement(verdict=result.verdict, reasons=reasons, faces_needed=result.faces_needed)


def _beyond(largest: float, mean: float, tolerance: Tolerance) -> list[Judgement]:
    """What rounding to a precision does not explain."""
    reasons = []
    if not largest <= tolerance.max_difference:
        reasons.append(f"a probability differs by {largest:.2g}; at most {tolerance.max_difference:g}")
    if not mean <= tolerance.mean_difference:
        reasons.append(f"probabilities differ by {mean:.2g} on average; at most {tolerance.mean_difference:g}")
    return [Judgement(verdict="failed", reasons=tuple(reasons))] if reasons else []
