"""How far a predicted vote is from another label, and how risky it is to decide by it.

A prediction is a weighted mean of some passes, perhaps with offsets to its logarithms. What it says of the full vote is
the surer the wider its margin.
"""

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from scipy.special import expit

from emoexport.config import Record
from emoexport.decision import Decision

__all__ = ["RiskModel", "decision_margin", "with_offsets"]

FloatArray = NDArray[np.floating]


class RiskModel(Record):
    """How probable it is that the full vote decides otherwise: logistic in the logarithm of the margin."""

    intercept: float = Field(allow_inf_nan=False)
    slope: float = Field(le=0, allow_inf_nan=False)
    """0 or less: a wider margin is never riskier."""
    floor: float = Field(default=1e-3, gt=0)
    """Added to the margin, so that one of 0 has a logarithm."""

    def risk(self, margin: FloatArray) -> NDArray[np.float64]:
        """Of margins in [0, 1], risks in [0, 1] of the same shape."""
        found: NDArray[np.float64] = expit(self.intercept + self.slope * np.log(margin + self.floor))
        return found


def with_offsets(probabilities: NDArray[np.float64], offsets: tuple[float, ...]) -> NDArray[np.float64]:
    """Probabilities `(N, L)` after offsets to their logarithms; rows sum to 1."""
    if not offsets:
        return probabilities
    shifted = probabilities * np.exp(np.array(offsets) - max(offsets))
    scaled: NDArray[np.float64] = shifted / np.maximum(shifted.sum(axis=1, keepdims=True), np.finfo(float).tiny)
    return scaled


def decision_margin(probabilities: FloatArray, decision: Decision) -> NDArray[np.float64]:
    """How far a vote is from one with another label.

    Without rules, the lead of the most probable emotion over the next. With them, the least distance of calibrated
    probabilities to where a rule turns: the thresholds of the label and of those more probable (of all, where none
    reaches its own), and the margin of the pair.

    Args:
        probabilities: the vote, `(N, L)`.
        decision: the rules.

    Returns:
        float64 `(N,)` in [0, 1].
    """
    calibrated = decision.calibrate(probabilities).astype(np.float64)
    rows = np.arange(len(calibrated))
    label = decision.decide(probabilities).label
    own = calibrated[rows, label]
    others = np.array(calibrated)
    others[rows, label] = -1.0
    second = others.argmax(axis=1)
    lead = own - others[rows, second]
    margin = np.abs(lead)
    for leader, runner_up, ahead in ((label, second, lead), (second, label, -lead)):
        pair = decision.margin_array[leader, runner_up].astype(np.float64)
        margin = np.minimum(margin, np.where(np.isfinite(pair), np.abs(ahead - pair), np.inf))
    thresholds = decision.threshold_array.astype(np.float64)
    if (thresholds > 0).any():
        nobody = ~(calibrated >= thresholds).any(axis=1, keepdims=True)
        counts = (thresholds > 0) & ((calibrated >= own[:, None]) | nobody)
        distance = np.where(counts, np.abs(calibrated - thresholds), np.inf)
        margin = np.minimum(margin, distance.min(axis=1))
    clipped: NDArray[np.float64] = np.clip(margin, 0.0, 1.0)
    return clipped
