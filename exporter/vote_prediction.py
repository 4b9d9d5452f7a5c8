"""What predicts the full vote of few passes: which, with what weights and offsets, and the risk that it is wrong."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize, nnls

from emoexport.margin import RiskModel

__all__ = ["OFFSET_PENALTY", "fit_offsets", "fit_risk", "order_passes", "predicting_weights"]

OFFSET_PENALTY = 1e-2
"""On the squares of offsets, in nats a face: some thousands of faces then move them by what is there, not by chance."""

# Keeps passes that say nearly the same from being weighed against each other, as a share of a pass's square.
_RIDGE = 1e-6
# Holds the risk model where no label or every label differs.
_RISK_PENALTY = 0.01


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
    probabilities: NDArray[np.float64], truth: NDArray[np.int64], *, penalty: float = OFFSET_PENALTY
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
