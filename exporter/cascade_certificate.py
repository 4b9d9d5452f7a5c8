"""How early faces may leave a cascade, certified on faces that had no part in fitting it.

Many thresholds are tried on the same calibration faces. It would be wrong to put a confidence bound on each and take
the best that passes: every threshold is another chance to pass by luck, so the chance that one which is not good
enough passes grows far above delta. Learn-then-Test tells them in an order fixed beforehand, from few faces leaving
early to many, and stops at the first that does not pass. A threshold that is not good enough is then chosen only if
the first such in the order passes by luck, and that has a probability of at most delta, without any correction.

Source: Angelopoulos, Bates, Candès, Jordan and Lei 2021, "Learn then Test" (arXiv:2110.01052), fixed sequence testing.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from scipy.stats import binom

from emoexport.cascade import Cascade, Paths
from emoexport.config import Record
from emoexport.errors import BadInput, UsageError
from emoexport.statistics import Estimate, changed, exact_bound, paired_interval, paired_p, paired_points

__all__ = [
    "ASSUMPTION",
    "THRESHOLDS",
    "CascadeCertificate",
    "agreement_p",
    "certify",
    "fixed_sequence",
    "p_value",
    "passing",
]

THRESHOLDS = tuple(float(f"{value:.4g}") for value in np.geomspace(1e-3, 0.6, 160))
"""The thresholds that are tried, fixed once and for all, the smallest first."""

ASSUMPTION = (
    "The faces in use are exchangeable with the calibration faces: drawn like them, from the same cameras and people's "
    "emotions, and found and aligned the same way. The calibration faces had no part in training, fitting or choosing."
)


class CascadeCertificate(Record):
    """What is certified of a cascade, and what was seen on the calibration faces."""

    schema_version: Literal[1] = 1
    rule: Literal["agreement", "accuracy"]
    epsilon: float | None = None
    """Of `agreement`: the largest share of faces that may be decided otherwise than by the full vote."""
    max_drop: float | None = None
    """How much lower accuracy may be than the full vote's, as a share of the faces."""
    delta: float
    """How probable it is at most, over calibration sets, that this certificate says what is not so."""
    faces: int
    """n, that calibrated."""
    threshold: float | None
    """That is certified; None for none: every face gets the full vote."""
    thresholds: tuple[float, ...]
    """In the order in which they were to be tried."""
    passed: int
    """How many of them passed, one after the other, before the first that did not."""
    vote_holds: bool = True
    """Whether the last stage itself is shown to be within the limits; it is where its vote is the full vote meant."""
    passes_per_face: float
    """Mean over the calibration faces, as all that follows."""
    left: tuple[int, ...]
    """How many faces left at each stage."""
    disagreements: int
    """How many were decided otherwise than by the full vote."""
    disagreement_bound: float
    """Upper bound on the share of such faces, one-sided at 1 - delta, of this threshold taken by itself."""
    accuracy_points: Estimate | None = None
    """Accuracy less that of the full vote, in percentage points, with its two-sided interval at 95 %; None where no
    true labels were given."""
    accuracy_bound_points: float | None = None
    """Lower bound on it, one-sided at 1 - delta, of this threshold taken by itself."""
    assumption: str = ASSUMPTION
    data_sha256: dict[str, str] = Field(default_factory=dict)
    """Of what was read, by name."""

    @property
    def sentence(self) -> str:
        """What is certified, in words."""
        claims = []
        if self.epsilon is not None:
            claims.append(f"at most {100 * self.epsilon:g} % of faces are decided otherwise than by the full vote")
        if self.max_drop is not None:
            claims.append(f"accuracy is at most {100 * self.max_drop:g} points below that of the full vote")
        claim = " and ".join(claims)
        if not self.vote_holds:
            return (
                f"Nothing is certified: {self.faces:,} faces do not show that {claim} even where none leaves early; "
                f"{self.disagreements:,} labels of this engine's own vote differ. More faces would do, or wider limits."
            )
        if self.threshold is None:
            return (
                f"Nothing is certified: {self.faces:,} faces do not show that {claim} where any leave early, so every "
                f"face gets the full vote of {self.passes_per_face:g} passes."
            )
        return (
            f"With {self.passes_per_face:.2f} passes a face on average, {claim}; this holds for all but "
            f"{100 * self.delta:g} % of calibrations."
        )


def certify(
    cascade: Cascade,
    scores: NDArray[np.floating],
    labels: NDArray[np.int64] | None = None,
    *,
    vote: NDArray[np.int64] | None = None,
    epsilon: float | None = None,
    max_drop: float | None = None,
    delta: float = 0.05,
    thresholds: Sequence[float] = THRESHOLDS,
    most: int | None = None,
    data_sha256: Mapping[str, str] | None = None,
) -> tuple[Cascade, CascadeCertificate]:
    """Find the largest threshold that is certified.

    `epsilon` is tested by the exact binomial test, so delta holds for every n. `max_drop` is tested by the score
    test of Tango 1998, which is approximate: see `paired_interval` for how it covers. Where both are asked for, both
    must pass: that both are broken by luck is no more probable than that one is.

    Args:
        cascade: as fitted; its rule is `agreement` or `accuracy`.
        scores: of the calibration faces, `(N, K, V, L)`. None of them may have had a part in the fit, or in the
            choice of the thresholds.
        labels: true labels, `(N,)` int64; needed for `max_drop`.
        vote: labels of the full vote that is meant, `(N,)` int64: of the reference, where the scores are those of
            numbers with fewer bits. None for the full vote of the scores.
        epsilon: for the rule `agreement`, in (0, 1).
        max_drop: for the rule `accuracy`, in (0, 1); for `agreement`, if accuracy is to be shown too.
        delta: in (0, 0.5).
        thresholds: fixed before these faces were looked at, in rising order.
        most: take the threshold with this place among them, counted from 1, at most; 0 for none. None for all.
        data_sha256: of what was read, to be kept in the certificate.

    Returns:
        The cascade with the threshold, and the certificate.

    Raises:
        UsageError: if what is asked for does not fit the rule, or is out of range.
        BadInput: if scores or labels are of another shape, or there are none.
    """
    _require_sense(cascade, epsilon, max_drop, delta, thresholds)
    count = len(scores) if labels is None else len(labels)
    if not count == len(scores) > 0:
        raise BadInput(f"found {len(scores)} faces and {count} labels; needed is one for each of 1 or more.")
    if labels is None and max_drop is not None:
        raise UsageError("what accuracy may be lost is certified on true labels; none were given.")
    paths = cascade.paths(scores)
    full = paths.labels[-1] if vote is None else vote
    held = functools.partial(p_value, full=full, truth=labels, epsilon=epsilon, max_drop=max_drop)
    # Where the last stage is the vote that is meant, none is decided otherwise, and there is nothing to show.
    vote_holds = vote is None or held(paths.labels[-1]) <= delta
    passed = passing(paths, held, thresholds=thresholds, delta=delta) if vote_holds else 0
    passed = passed if most is None else min(passed, most)
    threshold = float(thresholds[passed - 1]) if passed else None
    stage = paths.leaving(threshold)
    label = paths.labels_at(stage)
    disagreements = int((label != full).sum())
    gained: dict[str, object] = {}
    if labels is not None:
        mended, broken = changed(full == labels, label == labels)
        bound = paired_interval(mended, broken, len(labels), level=1 - 2 * delta)[0]
        gained = {
            "accuracy_points": paired_points(mended, broken, len(labels)),
            "accuracy_bound_points": round(100 * bound, 4),
        }
    certificate = CascadeCertificate.model_validate(
        {
            "rule": cascade.rule,
            "epsilon": epsilon,
            "max_drop": max_drop,
            "delta": delta,
            "faces": len(full),
            "threshold": threshold,
            "thresholds": tuple(map(float, thresholds)),
            "passed": passed,
            "vote_holds": vote_holds,
            "passes_per_face": float(cascade.sizes[stage].mean()),
            "left": tuple(np.bincount(stage, minlength=len(cascade.stages)).tolist()),
            "disagreements": disagreements,
            "disagreement_bound": exact_bound(disagreements, len(full), level=1 - delta),
            "data_sha256": dict(data_sha256 or {}),
            **gained,
        }
    )
    return cascade.model_copy(update={"threshold": threshold}), certificate


def passing(
    paths: Paths, held: Callable[[NDArray[np.int64]], float], *, thresholds: Sequence[float], delta: float
) -> int:
    """How many thresholds pass one after the other, before the first that does not.

    Args:
        paths: of the calibration faces.
        held: the p-value of labels `(N,)`.
        thresholds: in the order in which they are tried.
        delta: the largest p-value that passes.
    """
    p_values = np.array([held(paths.labels_at(paths.leaving(threshold))) for threshold in thresholds])
    return int(fixed_sequence(p_values <= delta))


def fixed_sequence(rejected: NDArray[np.bool_]) -> NDArray[np.int64]:
    """How many hypotheses are rejected one after the other, before the first that is not.

    Args:
        rejected: `(..., G)`, in the order of testing.

    Returns:
        int64 `(...)`, 0 to G.
    """
    found: NDArray[np.int64] = np.logical_and.accumulate(rejected, axis=-1).sum(axis=-1)
    return found


def agreement_p(disagreements: NDArray[np.int64], faces: int, epsilon: float) -> NDArray[np.float64]:
    """Exact p-values that the share of disagreements is above `epsilon`, of counts of any shape among n faces.

    Source: the binomial test: how probable so few are where the share is `epsilon`.
    """
    found: NDArray[np.float64] = binom.cdf(disagreements, faces, epsilon)
    return found


def p_value(
    label: NDArray[np.int64],
    *,
    full: NDArray[np.int64],
    truth: NDArray[np.int64] | None = None,
    epsilon: float | None = None,
    max_drop: float | None = None,
) -> float:
    """How probable labels that go so well with the full vote's are, if they are not within the limits in truth.

    Args:
        label: `(N,)`.
        full: of the full vote, `(N,)`.
        truth: `(N,)`; needed for `max_drop`.
        epsilon: the largest share of labels that may differ; None for no limit, as in the next.
        max_drop: how much lower accuracy may be, as a share.

    Returns:
        The larger of the p-values of the limits: a test of both needs no correction.
    """
    found = [0.0]
    if epsilon is not None:
        found.append(float(agreement_p((label != full).sum(), len(full), epsilon)))
    if max_drop is not None:
        assert truth is not None
        mended, broken = changed(full == truth, label == truth)
        found.append(float(paired_p(mended, broken, len(full), max_drop)))
    return max(found)


def _require_sense(
    cascade: Cascade, epsilon: float | None, max_drop: float | None, delta: float, thresholds: Sequence[float]
) -> None:
    if cascade.rule == "exact":
        raise UsageError("the rule 'exact' needs no certificate: its labels are those of the full vote.")
    if cascade.rule == "agreement" and epsilon is None:
        raise UsageError("the rule 'agreement' is certified for epsilon; none was given.")
    if cascade.rule == "accuracy" and (max_drop is None or epsilon is not None):
        raise UsageError("the rule 'accuracy' is certified for max_drop, and for nothing else.")
    for limit in (epsilon, max_drop):
        if limit is not None and not 0 < limit < 1:
            raise UsageError(f"found the limit {limit:g}; needed is a share in (0, 1).")
    if not 0 < delta < 0.5:
        raise UsageError(f"found delta = {delta:g}; needed is a probability in (0, 0.5).")
    if not thresholds or list(thresholds) != sorted(set(thresholds)) or not 0 <= thresholds[0] <= thresholds[-1] <= 1:
        raise UsageError("thresholds must rise, within [0, 1], and be at least one.")
