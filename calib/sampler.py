"""Which faces to calibrate on."""

import numpy as np
from numpy.typing import NDArray

from emoexport.errors import BadData

__all__ = ["balanced_rows"]


def balanced_rows(labels: NDArray[np.int64], count: int, *, seed: int = 0) -> NDArray[np.int64]:
    """Choose rows so that every class has its equal share, as far as it has faces.

    Args:
        labels: `(N,)`.
        count: how many rows; a class with too few gives all it has, and the others make up for it.
        seed: seed of the choice.

    Returns:
        Sorted row numbers, `(min(count, N),)`.

    Raises:
        BadData: if `count` is smaller than the number of classes.
    """
    rng = np.random.default_rng(seed)
    classes = np.unique(labels)
    if count < len(classes):
        raise BadData(f"{count} calibration faces cannot hold all {len(classes)} classes.")
    # Deal the shuffled rows of all classes round by round, one of each class a round.
    rounds = np.empty(len(labels), dtype=np.int64)
    for label in classes:
        rows = rng.permutation(np.flatnonzero(labels == label))
        rounds[rows] = np.arange(len(rows))
    order = np.lexsort((rng.random(len(labels)), rounds))
    return np.sort(order[:count])
