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

    def is_of(self, faces: int, labels: int) -> bool:
        """Whether this can be said of so many faces and emotions: of their shapes, finite, and rows that sum to 1.

        Rows of engines of few bits are within a few thousandths of it.
        """
        shapes = self.probabilities.shape, self.label.shape, self.confidence.shape
        if shapes != ((faces, labels), (faces,), (faces,)) or self.label.dtype.kind != "i":
            return False
        sums = np.abs(self.probabilities.sum(axis=1) - 1) < 0.05  # nothing that is not finite is less than anything
        known = (self.label >= 0) & (self.label < labels)
        return bool((sums & known & np.isfinite(self.confidence)).all() and (self.probabilities >= 0).all())

    def take(self, rows: NDArray[np.bool_] | slice) -> "Outcome":
        """The faces where a mask `(N,)` is True, or of a slice."""
        return Outcome(self.probabilities[rows], self.label[rows], self.confidence[rows])
