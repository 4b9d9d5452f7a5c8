"""Is a decision settled, whatever the passes that remain may say?

With A the weighted sum of the passes so far and r the weight of those that remain, the full vote is A + r q, with q
anywhere on the simplex. Every probability of it lies between two bounds, and so does every calibrated one. A decision
is settled where the rules give the same label all over these intervals.

The bounds are sound and not always tight: a face may be called open that is settled, never the other way round. All
of them are widened by `SLACK` and `SUM_SLACK`, so that neither ties nor the rounding of a vote can turn a label.
"""

import numpy as np
from numpy.typing import NDArray

from emoexport.decision import Decision

__all__ = ["OPEN", "SLACK", "SUM_SLACK", "settled"]

OPEN = -1
"""Stands where a label would, for a face that is not settled."""

SLACK = 1e-6
"""How far the vote of an engine may be from its exact sum, by rounding in float32."""
SUM_SLACK = 1e-3
"""How far from 1 the probabilities of a pass may sum, as a score cube allows."""

FloatArray = NDArray[np.float64]


def settled(sums: FloatArray, remaining: float, decision: Decision) -> NDArray[np.int64]:
    """The label that the full vote will have.

    Args:
        sums: weighted sums of the probabilities so far, float64 `(N, L)`, with the weights of the full vote.
        remaining: the weight of the passes that remain, in [0, 1].
        decision: what decides about the full vote.

    Returns:
        int64 `(N,)`; `OPEN` where the passes that remain may still turn it.
    """
    reach = remaining * (1 + SUM_SLACK) + SLACK
    floor = np.maximum(sums - SLACK, 0.0)
    # An order among probabilities that no reach can turn; calibration keeps it.
    beats = floor[:, :, None] - floor[:, None, :] > reach + SLACK
    itself = np.eye(floor.shape[1], dtype=bool)
    low, high = _bounds(floor, reach, 1 / decision.temperature)
    thresholds = decision.threshold_array.astype(np.float64)
    may = low >= thresholds + SLACK * (thresholds > 0)
    may_not = high < thresholds - SLACK

    # It leads if it may be decided and all others may not or are less probable; also if it is the most probable
    # and no other may be decided, whether it may or not.
    leads = (may & (may_not[:, None, :] | beats | itself).all(axis=2)) | (
        (may_not[:, None, :] | itself).all(axis=2) & (beats | itself).all(axis=2)
    )
    # The runner-up is the most probable of the others: whoever no other of them surely beats.
    beaten = np.stack(
        [np.delete(beats, leader, axis=1).any(axis=1) for leader in range(len(itself))], axis=1
    )  # (N, leader, runner-up)
    second = ~beaten & ~itself
    margins = decision.margin_array.astype(np.float64)
    least, most = low[:, :, None] - high[:, None, :], high[:, :, None] - low[:, None, :]
    keeps = least >= margins + SLACK
    yields = (most < margins - SLACK) & (second.sum(axis=2, keepdims=True) == 1)
    stays = leads & (~second | keeps).all(axis=2)
    label = np.where(stays.any(axis=1), stays.argmax(axis=1), OPEN)
    given = (leads[:, :, None] & second & yields).any(axis=1)
    return np.where(given.any(axis=1), given.argmax(axis=1), label).astype(np.int64)


def _bounds(floor: FloatArray, reach: float, power: float) -> tuple[FloatArray, FloatArray]:
    """Bounds on the calibrated probabilities, each `(N, L)`, where up to `reach` is added to those in `floor`.

    A calibrated probability is p_i**a / sum of p_j**a, with a = `power` = 1 / temperature. It is largest where all
    that is added goes to i, and smallest where i gets nothing and the sum over the others is largest: for a >= 1,
    a convex sum, that is where one of them gets everything; for a < 1, a concave one, it is at most what equal
    shares would give.
    """
    if power == 1:
        return floor, floor + reach
    labels = floor.shape[1]
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        logs, raised = np.log(floor), np.log(floor + reach)
        against = np.exp(power * (logs[:, None, :] - raised[:, :, None]))  # (N, i, j)
        others = ~np.eye(labels, dtype=bool)
        high = 1 / (1 + (against * others).sum(axis=2))
        if power > 1:
            kept = np.exp(power * (logs[:, None, :] - logs[:, :, None]))
            added = np.exp(power * (raised[:, None, :] - logs[:, :, None])) - kept
            odds = np.where(others, kept, 0.0).sum(axis=2) + np.where(others, added, 0.0).max(axis=2)
        else:
            equal = (floor.sum(axis=1, keepdims=True) - floor + reach) / (labels - 1)
            odds = (labels - 1) * np.exp(power * (np.log(equal) - logs))
        low = 1 / (1 + odds)
    # Where i may have nothing at all its odds are no numbers.
    return np.where((floor > 0) & np.isfinite(odds), low, 0.0), high
