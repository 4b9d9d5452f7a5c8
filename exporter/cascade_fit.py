"""A cascade fitted on selection faces: the order of passes, what predicts the full vote, and the risk that it does not.

Nothing here may see the faces that certify the cascade. The members may have been trained on other faces only.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from emoexport.cascade import Cascade, Stage
from emoexport.decision import Decision
from emoexport.errors import BadInput, UsageError
from emoexport.margin import decision_margin, with_offsets
from emoexport.passes import inner_products, weighted_vote
from emoexport.settled import SUM_SLACK
from emoexport.vote_prediction import OFFSET_PENALTY, fit_offsets, fit_risk, order_passes, predicting_weights

__all__ = ["STAGE_SIZES", "fit_cascade"]

STAGE_SIZES = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 40)
"""Passes after each stage. Most faces leave early, so that is where stages are close to each other."""

FloatArray = NDArray[np.floating]


def fit_cascade(
    scores: FloatArray,
    labels: NDArray[np.int64] | None = None,
    *,
    weights: FloatArray | None = None,
    decision: Decision,
    rule: Literal["exact", "agreement", "accuracy"] = "agreement",
    sizes: Sequence[int] = STAGE_SIZES,
    offsets: bool = False,
    offset_penalty: float = OFFSET_PENALTY,
) -> Cascade:
    """Fit stages on selection faces.

    Args:
        scores: of the selection faces, `(N, K, V, L)`, as in a score cube.
        labels: true labels, `(N,)` int64; needed for offsets only.
        weights: of the full vote, `(K, V)`, 0 or more; None for equal ones. They are normalised to sum to 1.
        decision: what decides about the full vote.
        rule: by which faces are to leave.
        sizes: how many passes a face has taken after each stage but the last, which completes the full vote. Those
            that are not below the number of passes of the full vote are left out. The rule `exact` takes no notice:
            it has a stage after each pass from the first on at which a face could be settled.
        offsets: whether predictions get offsets fitted to the true labels; only for the rule `accuracy`, since they
            mend what the full vote gets wrong, and `agreement` is with the full vote. They fade with the weight of
            the passes that remain.
        offset_penalty: how strongly offsets are drawn to 0.

    Returns:
        The cascade. By `exact` it is ready; otherwise it has no threshold yet: `certify` finds it.

    Raises:
        BadInput: if scores are no probabilities or of another shape, or labels are not as many or no labels.
        UsageError: if weights, sizes or offsets make no sense.
    """
    scores = _checked_scores(scores, decision)
    full = _normalised(weights, scores.shape[1:3])
    if offsets and rule != "accuracy":
        raise UsageError(f"offsets are fitted to true labels; the rule '{rule}' is about the full vote's.")
    if offsets:
        _check_labels(labels, len(scores), scores.shape[-1])
    if rule == "exact":
        return _exact_cascade(full, decision)
    if not sizes or min(sizes) < 1 or sorted(set(sizes)) != list(sizes):
        raise UsageError(
            f"found stages of {', '.join(map(str, sizes)) or 'no'} passes; needed are rising numbers from 1."
        )
    cuts = [size for size in sizes if size < np.count_nonzero(full)]
    gram = inner_products(scores)
    order = order_passes(gram, full.ravel(), max(cuts, default=0))
    truth = labels if offsets else None
    vote = weighted_vote(scores, full)
    full_shift = () if truth is None else fit_offsets(vote, truth, penalty=offset_penalty)
    flat = scores.reshape(len(scores), full.size, -1)
    stages = []
    for before, size in zip([0, *cuts], cuts, strict=False):
        share = predicting_weights(gram, full.ravel(), order[:size])
        predicted = share @ flat[:, order[:size]].astype(np.float64)
        # The full vote has no offsets: they fade with the weight that remains, so that no stage breaks with the last.
        remaining = 1 - float(full.ravel()[order[:size]].sum())
        shift = () if truth is None else fit_offsets(predicted, truth, penalty=offset_penalty)
        shift = tuple(remaining * one for one in shift)
        predicted = with_offsets(predicted, shift)
        aim = decision.decide(with_offsets(vote, tuple(remaining * one for one in full_shift))).label
        stages.append(
            Stage(
                passes=_pairs(order[before:size], full.shape),
                weights=tuple(share.tolist()),
                offsets=shift,
                risk=fit_risk(decision_margin(predicted, decision), decision.decide(predicted).label != aim),
            )
        )
    return Cascade(weights=_table(full), decision=decision, rule=rule, stages=(*stages, _last(full, order)))


def _exact_cascade(full: NDArray[np.float64], decision: Decision) -> Cascade:
    """The heaviest passes first, and a stage after each at which a face could be settled."""
    order = [int(one) for one in np.argsort(-full.ravel(), kind="stable") if full.ravel()[one] > 0]
    # A lead cannot be safe before half of the weight has spoken; only thresholds can bar the others earlier.
    half = 0 if decision.thresholds else int(np.searchsorted(np.cumsum(full.ravel()[order]), 0.5))
    first = min(half, len(order) - 1)
    stages = []
    for start, stop in zip([0, *range(first + 1, len(order) - 1)], range(first + 1, len(order)), strict=False):
        stages.append(
            Stage(
                passes=_pairs(order[start:stop], full.shape),
                weights=tuple((full.ravel()[order[:stop]] / full.ravel()[order[:stop]].sum()).tolist()),
            )
        )
    done = len(order) - 1 if stages else 0
    return Cascade(
        weights=_table(full),
        decision=decision,
        rule="exact",
        threshold=0.0,
        stages=(*stages, _last(full, order[:done])),
    )


def _last(full: NDArray[np.float64], before: Sequence[int]) -> Stage:
    """The stage that completes the full vote."""
    rest = [int(one) for one in np.flatnonzero(full.ravel()) if one not in set(before)]
    return Stage(passes=_pairs(rest, full.shape), weights=tuple(full.ravel()[[*before, *rest]].tolist()))


def _pairs(passes: Sequence[int], shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    return tuple(divmod(int(one), shape[1]) for one in passes)


def _table(full: NDArray[np.float64]) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row) for row in full.tolist())


def _checked_scores(scores: FloatArray, decision: Decision) -> FloatArray:
    scores = np.asarray(scores)
    if scores.ndim != 4 or len(scores) == 0 or scores.shape[-1] != len(decision.labels):
        raise BadInput(
            f"found scores of the shape {scores.shape}; needed is (faces, members, views, {len(decision.labels)}), "
            "with 1 face or more."
        )
    low, high = scores.min(), scores.max()
    if not (low >= 0 and high <= 1 + SUM_SLACK):
        raise BadInput(f"found scores from {low:g} to {high:g}; needed are probabilities.")
    return scores


def _check_labels(labels: NDArray[np.int64] | None, faces: int, emotions: int) -> None:
    found = np.zeros(0, dtype=np.int64) if labels is None else np.asarray(labels)
    if found.shape != (faces,) or not ((found >= 0) & (found < emotions)).all():
        raise BadInput(
            f"found {found.size} labels from {found.min(initial=0)} to {found.max(initial=0)}; offsets need one for "
            f"each of {faces} faces, from 0 to {emotions - 1}."
        )


def _normalised(weights: FloatArray | None, shape: tuple[int, ...]) -> NDArray[np.float64]:
    given = np.ones(shape) if weights is None else np.asarray(weights, dtype=np.float64)
    if given.shape != shape or not np.isfinite(given).all() or (given < 0).any() or given.sum() == 0:
        raise UsageError(
            f"found weights of the shape {given.shape}; needed are finite ones of the shape {shape}, 0 or more, "
            "not all of them 0."
        )
    normalised: NDArray[np.float64] = given / given.sum()
    return normalised
