"""Where to cut an activation off, so that the numbers that are left are represented well. One row a method."""

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray
from scipy.stats import entropy

from emoexport.errors import UsageError

__all__ = ["METHODS", "entropy_limit", "method_named", "percentile_limit"]

Cut = Callable[[NDArray[np.float64]], float]

_LEVELS = 128
"""Of int8, from 0 to 127."""

_PERCENT = 99.99


def percentile_limit(counts: NDArray[np.float64], *, percent: float = _PERCENT) -> float:
    """Cut off so that this many percent of the absolute values are kept.

    Args:
        counts: of absolute values, `(bins,)`, in bins of one width from 0.
        percent: more than 0, at most 100.

    Returns:
        The limit as a share of the last bin's end, above 0 and at most 1.
    """
    kept = np.cumsum(counts)
    return float(np.searchsorted(kept, kept[-1] * percent / 100) + 1) / len(counts)


def entropy_limit(counts: NDArray[np.float64], *, levels: int = _LEVELS, step: int = 16) -> float:
    """Cut off where the quantised values tell least wrongly how the values are spread.

    Every `step`-th limit is tried, and the one with the least Kullback-Leibler divergence is taken.

    Args:
        counts: of absolute values, `(bins,)`, in bins of one width from 0; more bins than levels.
        levels: that a quantised absolute value can have.
        step: bins between limits that are tried.

    Returns:
        The limit as a share of the last bin's end, above 0 and at most 1.

    Source: Migacz, "8-bit inference with TensorRT", GTC 2017.
    """
    counts = counts.copy()
    counts[0] = counts[1]  # zeros are exact in any case, and most numbers after a rectifier are zeros
    if not counts.any():
        return 1.0
    limits = range(levels, len(counts) + 1, step)
    divergences = [_divergence(counts, limit, levels) for limit in limits]
    return limits[int(np.argmin(divergences))] / len(counts)


def _divergence(counts: NDArray[np.float64], limit: int, levels: int) -> float:
    """Of the values up to a limit, all beyond it counted as it, from the same in `levels` steps."""
    kept = counts[:limit]
    true = kept.copy()
    true[-1] += counts[limit:].sum()
    edges = np.linspace(0, limit, levels + 1).astype(np.int64)
    filled = kept > 0
    sums, places = np.add.reduceat(kept, edges[:-1]), np.add.reduceat(filled.astype(np.int64), edges[:-1])
    coarse = np.repeat(sums / np.maximum(places, 1), np.diff(edges)) * filled
    little = 1e-6 * counts.sum() / limit  # or what one has and the other has not would be infinitely far
    return float(entropy(true + little, coarse + little))


METHODS: Mapping[str, Cut | None] = {
    "min-max": None,
    "entropy": entropy_limit,
    "percentile": percentile_limit,
}
"""By name, from a histogram of absolute values to the share of it that is kept; None keeps all."""


def method_named(name: str) -> Cut | None:
    """Look up a row of `METHODS`.

    Raises:
        UsageError: if there is no such method.
    """
    if name not in METHODS:
        raise UsageError(f"'{name}' is no calibration method; known are {', '.join(METHODS)}.")
    return METHODS[name]
