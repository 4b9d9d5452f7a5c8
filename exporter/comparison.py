"""Something cheaper against the full vote, face by face."""

import numpy as np
from numpy.typing import NDArray

from emoexport.config import Record
from emoexport.statistics import Estimate, changed, exact_bound, exact_interval, paired_bound, paired_points

__all__ = ["Comparison"]


class Comparison(Record):
    """Labels of something cheaper, few passes or a cascade, against those of the full vote on the same N faces."""

    faces: int
    accuracy: float
    """Of the cheaper, in [0, 1]."""
    only_right: int
    """Faces that only the cheaper gets right, and in the next only the full vote."""
    only_wrong: int
    disagreements: int
    """Labels that differ."""
    gain_points: Estimate
    """Accuracy less that of the full vote, paired 95 % interval."""
    bound_points: float
    """Its lower bound, one-sided at 95 %."""
    disagreement_pct: Estimate
    """The same as a share, exact 95 % interval."""
    disagreement_bound_pct: float
    """Upper, one-sided at 95 %."""

    @classmethod
    def of(cls, few: NDArray[np.int64], full: NDArray[np.int64], truth: NDArray[np.int64]) -> "Comparison":
        """Compare labels `(N,)`."""
        faces, differ = len(truth), int((few != full).sum())
        mended, broken = changed(full == truth, few == truth)
        low, high = exact_interval(differ, faces)
        return cls(
            faces=faces,
            accuracy=round(float((few == truth).mean()), 6),
            only_right=mended,
            only_wrong=broken,
            disagreements=differ,
            gain_points=paired_points(mended, broken, faces),
            bound_points=round(100 * paired_bound(mended, broken, faces), 4),
            disagreement_pct=Estimate(
                value=round(100 * differ / faces, 4), low=round(100 * low, 4), high=round(100 * high, 4)
            ),
            disagreement_bound_pct=round(100 * exact_bound(differ, faces), 4),
        )
