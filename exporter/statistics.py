"""Intervals on what was counted. The formulas are scipy's."""

from scipy.stats import binomtest

__all__ = ["exact_interval", "wilson_interval"]


def wilson_interval(count: int, total: int, *, level: float = 0.95) -> tuple[float, float]:
    """Two-sided interval on a share, such as an accuracy.

    Source: Wilson 1927, as `scipy.stats.binomtest(...).proportion_ci(method="wilson")`.
    """
    interval = binomtest(count, total).proportion_ci(confidence_level=level, method="wilson")
    return float(interval.low), float(interval.high)


def exact_interval(count: int, total: int, *, level: float = 0.95) -> tuple[float, float]:
    """Two-sided interval on a share near 0 or 1, such as an agreement; it never covers less than `level`.

    Source: Clopper and Pearson 1934, as `scipy.stats.binomtest(...).proportion_ci(method="exact")`.
    """
    interval = binomtest(count, total).proportion_ci(confidence_level=level, method="exact")
    return float(interval.low), float(interval.high)
