"""A cascade fitted on selection faces: the order of passes, what predicts the full vote, and the risk that it does not.

Nothing here may see the faces that certify the cascade. The members may have been trained on other faces only.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize, nnls

from emoexport.cascade import Cascade, RiskModel, Stage, decision_margin, with_offsets
from emoexport.decision import Decision
from emoexport.errors import BadInput, UsageError

__all__ = ["STAGE_SIZES", "fit_cascade", "fit_offsets", "fit_risk", "order_passes", "predicting_weights"]

STAGE_SIZES = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 40)
"""Passes after each stage. Most faces leave early, so that is where stages are close to each other."""

FloatArray = NDArray[np.floating]

# Keeps passes that say nearly the same from being weighed against each other, as a share of a pass's square.
_RIDGE = 1e-6
# Holds the risk model where no label or every label differs.
_RISK_PENALTY = 0.01
_OFFSET_PENALTY = 1e-2
_SCORES_AT_ONCE = 4_000_000


def fit_cascade(
    scores: FloatArray,
    labels: NDArray[np.int64] | None = None,
    *,
    weights: FloatArray | None = None,
    decision: Decision,
    rule: Literal["exact", "agreement", "accuracy"] = "agreement",
    sizes: Sequence[int] = STAGE_SIZES,
    offsets: bool = False,
    offset_penalty: float = _OFFSET_PENALTY,
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
            mend what the full vote gets wrong, and `agreement` is with the full vote.
        offset_penalty: how strongly offsets are drawn to 0.

    Returns:
        The cascade. By `exact` it is ready; otherwise it has no threshold yet: `certify` finds it.

    Raises:
        BadInput: if scores or labels are of another shape, or not finite.
        UsageError: if weights, sizes or offsets make no sense.
    """
    scores = _checked_scores(scores, decision)
    full = _normalised(weights, scores.shape[1:3])
    if offsets and rule != "accuracy":
        raise UsageError(f"offsets are fitted to true labels; the rule '{rule}' is about the full vote's.")
    if offsets and (labels is None or len(labels) != len(scores)):
        raise BadInput(
            f"found {0 if labels is None else len(labels)} labels; offsets need one for each of {len(scores)} faces."
        )
    voting = np.argwhere(full > 0)
    if rule == "exact":
        return _exact_cascade(full, decision)
    if not sizes or any(size < 1 for size in sizes) or sorted(set(sizes)) != list(sizes):
        raise UsageError(
            f"found stages of {', '.join(map(str, sizes)) or 'no'} passes; needed are rising numbers from 1."
        )
    cuts = [size for size in sizes if size < len(voting)]
    gram = _gram(scores)
    order = order_passes(gram, full.ravel(), max(cuts, default=0))
    target = _weighted(scores, full)
    truth = labels if offsets else None
    reference = target if truth is None else with_offsets(target, fit_offsets(target, truth, penalty=offset_penalty))
    aim = decision.decide(reference).label
    stages = []
    flat = scores.reshape(len(scores), -1, scores.shape[-1])
    for before, size in zip([0, *cuts], cuts, strict=False):
        chosen = order[:size]
        share = predicting_weights(gram, full.ravel(), chosen)
        predicted = share @ flat[:, chosen].astype(np.float64)
        shift = () if truth is None else fit_offsets(predicted, truth, penalty=offset_penalty)
        predicted = with_offsets(predicted, shift)
        differs = decision.decide(predicted).label != aim
        stages.append(
            Stage(
                passes=_pairs(chosen[before:], full.shape),
                weights=tuple(share.tolist()),
                offsets=shift,
                risk=fit_risk(decision_margin(predicted, decision), differs),
            )
        )
    return Cascade(
        weights=_table(full), decision=decision, rule=rule, stages=(*stages, _last(full, order[: max(cuts, default=0)]))
    )


def order_passes(gram: NDArray[np.float64], weights: NDArray[np.float64], count: int) -> list[int]:
    """Choose passes one by one, each the one with which those chosen predict the full vote best, by least squares.

    Args:
        gram: inner products of the passes' probabilities over faces and emotions, float64 `(P, P)`.
        weights: of the full vote, `(P,)`; a pass of weight 0 is not chosen.
        count: how many to choose.

    Returns:
        Indices of passes, the best first.

    Source: orthogonal least squares, Chen, Billings and Luo 1989; each step is one sweep of the inner products.
    """
    left = gram + _RIDGE * np.trace(gram) / len(gram) * np.eye(len(gram))
    toward = gram @ weights
    chosen: list[int] = []
    for _ in range(count):
        gain = np.where(weights > 0, toward**2 / np.maximum(np.diag(left), np.finfo(float).tiny), -1.0)
        gain[chosen] = -1.0
        best = int(gain.argmax())
        chosen.append(best)
        column = left[:, best].copy()
        toward = toward - column * toward[best] / column[best]
        left = left - np.outer(column, column) / column[best]
    return chosen


def predicting_weights(
    gram: NDArray[np.float64], weights: NDArray[np.float64], chosen: Sequence[int]
) -> NDArray[np.float64]:
    """Weights of the chosen passes that predict the full vote best, by least squares; 0 or more, with the sum 1.

    Args:
        gram: as in `order_passes`.
        weights: of the full vote, `(P,)`.
        chosen: indices of passes.

    Returns:
        float64 `(chosen,)`.

    Source: Lawson and Hanson 1974, as `scipy.optimize.nnls`, on a square root of the inner products.
    """
    some = gram[np.ix_(chosen, chosen)]
    root = np.linalg.cholesky(some + _RIDGE * np.trace(gram) / len(gram) * np.eye(len(some)))
    found, _ = nnls(root.T, np.linalg.solve(root, (gram @ weights)[list(chosen)]))
    normalised: NDArray[np.float64] = found / found.sum()
    return normalised


def fit_offsets(
    probabilities: NDArray[np.float64], truth: NDArray[np.int64], *, penalty: float = _OFFSET_PENALTY
) -> tuple[float, ...]:
    """Offsets to the logarithms of probabilities under which the true labels are likeliest.

    A slope common to all emotions is fitted beside them, and they are divided by it: it tells how sure predictions
    are, and leaves alone which emotion is the most probable.

    Args:
        probabilities: `(N, L)`.
        truth: true labels, `(N,)`.
        penalty: on the squares of the offsets, in nats a face.

    Source: vector scaling, Guo et al. 2017 (arXiv:1706.04599).
    """
    logs = np.log(probabilities + 1e-4)
    hot = np.eye(logs.shape[1])[truth]

    def loss(found: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        slope, offsets = np.exp(found[0]), found[1:]
        logits = slope * logs + offsets
        logits = logits - logits.max(axis=1, keepdims=True)
        sums = np.exp(logits).sum(axis=1, keepdims=True)
        error = (np.exp(logits) / sums - hot) / len(logs)
        value = -((logits - np.log(sums)) * hot).sum() / len(logs) + penalty * offsets @ offsets
        return float(value), np.r_[slope * (error * logs).sum(), error.sum(axis=0) + 2 * penalty * offsets]

    found = minimize(loss, np.zeros(logs.shape[1] + 1), jac=True, method="L-BFGS-B").x
    return tuple((found[1:] / np.exp(found[0])).tolist())


def fit_risk(margin: NDArray[np.float64], differs: NDArray[np.bool_]) -> RiskModel:
    """Fit how the risk that the full vote decides otherwise falls with the margin.

    Args:
        margin: of each face, `(N,)` in [0, 1], as `decision_margin` finds it.
        differs: whether its label is not that of the full vote, `(N,)`.

    Source: logistic regression by maximum likelihood, with a small penalty.
    """
    floor = RiskModel(intercept=0.0, slope=0.0).floor
    logs = np.log(margin + floor)
    target = differs.astype(np.float64)

    def loss(found: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        logits = found[0] + found[1] * logs
        error = 0.5 * (1 + np.tanh(logits / 2)) - target
        value = (np.logaddexp(0, logits) - target * logits).sum() + _RISK_PENALTY * found @ found
        return float(value), np.array([error.sum(), error @ logs]) + 2 * _RISK_PENALTY * found

    found = minimize(loss, np.array([0.0, -1.0]), jac=True, method="L-BFGS-B", bounds=[(None, None), (None, 0.0)]).x
    return RiskModel(intercept=float(found[0]), slope=float(found[1]), floor=floor)


def _exact_cascade(full: NDArray[np.float64], decision: Decision) -> Cascade:
    """The heaviest passes first; no face is settled before the passes so far weigh as much as those that remain."""
    order = [int(one) for one in np.argsort(-full.ravel(), kind="stable") if full.ravel()[one] > 0]
    summed = np.cumsum(full.ravel()[order])
    first = min(int(np.searchsorted(summed, 0.5)), len(order) - 1)
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


def _chunks(scores: FloatArray) -> range:
    return range(0, len(scores), max(1, _SCORES_AT_ONCE // int(np.prod(scores.shape[1:]))))


def _weighted(scores: FloatArray, full: NDArray[np.float64]) -> NDArray[np.float64]:
    chosen = np.flatnonzero(full)
    flat = scores.reshape(len(scores), full.size, -1)
    steps = _chunks(scores)
    return np.concatenate(
        [full.ravel()[chosen] @ flat[at : at + steps.step][:, chosen].astype(np.float64) for at in steps]
    )


def _gram(scores: FloatArray) -> NDArray[np.float64]:
    count = scores.shape[1] * scores.shape[2]
    total = np.zeros((count, count))
    steps = _chunks(scores)
    for at in steps:
        some = scores[at : at + steps.step].reshape(-1, count, scores.shape[-1]).astype(np.float64)
        columns = some.transpose(1, 0, 2).reshape(count, -1)
        total += columns @ columns.T
    return total


def _checked_scores(scores: FloatArray, decision: Decision) -> FloatArray:
    scores = np.asarray(scores)
    if scores.ndim != 4 or len(scores) == 0 or scores.shape[-1] != len(decision.labels):
        raise BadInput(
            f"found scores of the shape {scores.shape}; needed is (faces, members, views, {len(decision.labels)}), "
            "with 1 face or more."
        )
    if not np.isfinite(scores).all():
        raise BadInput("found scores that are not finite; needed are probabilities.")
    return scores


def _normalised(weights: FloatArray | None, shape: tuple[int, ...]) -> NDArray[np.float64]:
    given = np.ones(shape) if weights is None else np.asarray(weights, dtype=np.float64)
    if given.shape != shape or not np.isfinite(given).all() or (given < 0).any() or given.sum() == 0:
        raise UsageError(
            f"found weights of the shape {given.shape}; needed are finite ones of the shape {shape}, 0 or more, "
            "not all of them 0."
        )
    normalised: NDArray[np.float64] = given / given.sum()
    return normalised
