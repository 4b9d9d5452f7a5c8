"""What a session answers about N faces."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["Outcome"]


class Outcome(NamedTuple):
    """What is decided about N faces."""

    probabilities: NDArray[np.float32]
    """The vote, calibrated, `(N, L)`, rows sum to 1."""
    label: NDArray[np.int64]
    """`(N,)`, an index into the labels."""
    confidence: NDArray[np.float32]
    """`(N,)`, the probability of the label."""

    def take(self, rows: NDArray[np.bool_] | slice) -> "Outcome":
        """The faces where a mask `(N,)` is True, or of a slice."""
        return Outcome(self.probabilities[rows], self.label[rows], self.confidence[rows])
