"""What a cascade is to be certified for, and the fit of one for that."""

import dataclasses
import functools
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from emoexport.cascade import Cascade, Paths
from emoexport.cascade_certificate import THRESHOLDS, p_value, passing
from emoexport.cascade_fit import fit_cascade
from emoexport.cascade_stages import Calls, choose_stages, with_stages
from emoexport.cube import Cube
from emoexport.decision import Decision
from emoexport.errors import UsageError

__all__ = ["Claim", "Fitted", "fitted"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Claim:
    """What a cascade is to be certified for."""

    rule: Literal["exact", "agreement", "accuracy"] = "agreement"
    epsilon: float | None = None
    """The share of labels that may differ, in (0, 1), by the rule `agreement`."""
    max_drop: float | None = None
    """The share of faces by which accuracy may be lower, in (0, 1), by `accuracy`; by `agreement` if asked for."""
    delta: float = 0.05
    """How probable a certificate of what is not so may be."""
    offsets: bool = True
    """By `accuracy`, whether predictions are corrected for emotions that are decided too often."""

    def __post_init__(self) -> None:
        """Refuse what no faces can show, before anything slow is done.

        Raises:
            UsageError: if a limit or delta is out of range.
        """
        for limit in (self.epsilon, self.max_drop):
            if limit is not None and not 0 < limit < 1:
                raise UsageError(
                    f"found a limit of {100 * limit:g}; a cascade is certified for more than 0 and less than 100.",
                    hint="--exact loses nothing" if limit <= 0 else "--max-disagreement 1",
                )
        if not 0 < self.delta < 0.5:
            raise UsageError(f"found --delta {self.delta:g}; needed is a probability in (0, 0.5).", hint="--delta 0.05")

    @classmethod
    def of_goals(
        cls,
        max_disagreement_pct: float | None,
        max_drop_points: float | None,
        *,
        exact: bool = False,
        delta: float = 0.05,
        offsets: bool = True,
    ) -> "Claim":
        """What certifies these goals: 1 % of other labels if there is none.

        Raises:
            UsageError: if they exclude each other, or are out of range.
        """
        if exact and (max_disagreement_pct, max_drop_points) != (None, None):
            raise UsageError("--exact loses nothing; found another goal beside it.", hint="leave one of them out")
        if exact:
            return cls(rule="exact")
        drop = None if max_drop_points is None else max_drop_points / 100
        if max_disagreement_pct is None and drop is not None:
            return cls(rule="accuracy", max_drop=drop, delta=delta, offsets=offsets)
        epsilon = (1.0 if max_disagreement_pct is None else max_disagreement_pct) / 100
        return cls(rule="agreement", epsilon=epsilon, max_drop=drop, delta=delta)


class Fitted(NamedTuple):
    """What a fit comes to."""

    cascade: Cascade
    labels: NDArray[np.int64]
    """Of the faces that fit, `(N,)`, each half judged by a fit on the other half."""


def fitted(
    cube: Cube, claim: Claim, *, weights: NDArray[np.float64], decision: Decision, calls: Calls, batch: int
) -> Fitted:
    """A cascade fitted on all faces of a cube, with the stages that pay for themselves in calls of so many faces.

    Each half of the faces is judged by a fit on the other half; by that the stages are chosen, and a threshold that is
    to be expected: `certify` finds the one that holds.

    Args:
        cube: of the faces that fit.
        claim: what is to be certified.
        weights: of the full vote, `(K, V)`.
        decision: what decides about it.
        calls: what passes take.
        batch: faces in a call.

    Returns:
        The cascade, and the labels with which these faces leave it, `(N,)`.
    """
    fit = functools.partial(
        fit_cascade,
        weights=weights,
        decision=decision,
        rule=claim.rule,
        offsets=claim.offsets and claim.rule == "accuracy",
    )
    order = np.random.default_rng(0).permutation(len(cube.labels))
    halves = np.array_split(order, 2)
    found = [
        fit(cube.scores[fitting], cube.labels[fitting]).paths(cube.scores[judged])
        for fitting, judged in (halves, halves[::-1])
    ]
    drawn = np.concatenate(halves[::-1])  # at random, as faces come; data sets are often sorted by emotion
    paths = Paths(*(np.concatenate(parts, axis=1) for parts in zip(*found, strict=True)))

    def threshold(some: Paths) -> float | None:
        if claim.rule == "exact":
            return 0.0
        held = functools.partial(
            p_value, full=some.labels[-1], truth=cube.labels[drawn], epsilon=claim.epsilon, max_drop=claim.max_drop
        )
        passed = passing(some, held, thresholds=THRESHOLDS, delta=claim.delta)
        return THRESHOLDS[passed - 1] if passed else None

    whole = fit(cube.scores, cube.labels)
    kept = choose_stages(whole, paths, threshold, calls, batch)
    some = Paths(paths.labels[kept], paths.risks[kept])
    expected = threshold(some)
    cascade = with_stages(whole, kept).model_copy(update={"threshold": expected})
    labels = np.empty_like(cube.labels)
    labels[drawn] = some.labels_at(some.leaving(expected))
    return Fitted(cascade, labels)
