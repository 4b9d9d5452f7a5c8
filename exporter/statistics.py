"""Intervals on what was counted or averaged over faces."""

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.stats import beta, binomtest, norm

from emoexport.config import Record

__all__ = [
    "Estimate",
    "Share",
    "basic_interval",
    "changed",
    "exact_bound",
    "exact_floor",
    "exact_interval",
    "mcnemar_p",
    "paired_bound",
    "paired_interval",
    "paired_p",
    "paired_points",
    "percentile_interval",
    "resampled_sums",
    "wilson_interval",
]

FloatArray = NDArray[np.floating]

# Bounds the memory of a bootstrap: 4 M counts of 8 bytes.
_COUNTS_AT_ONCE = 4_000_000


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


def exact_bound(count: float, total: float, *, level: float = 0.95) -> float:
    """Upper bound on a share near 0, such as that of labels that changed, one-sided.

    Source: Clopper and Pearson 1934, as quantiles of beta distributions, which take counts between whole ones too.
    """
    return float(beta.ppf(level, count + 1, total - count)) if count < total else 1.0


def exact_floor(count: float, total: float, *, level: float = 0.95) -> float:
    """Lower bound on the same, one-sided."""
    return 1 - exact_bound(total - count, total, level=level)


def mcnemar_p(mended: int, broken: int) -> float:
    """Two-sided p-value that of two ways on the same faces each is alone right equally often; 1 if neither ever is.

    Source: McNemar 1947, in its exact form, a binomial test of the faces that changed.
    """
    return float(binomtest(mended, mended + broken).pvalue) if mended + broken else 1.0


class Estimate(Record):
    """A figure with its 95 % interval."""

    value: float
    low: float
    high: float


class Share(Estimate):
    """A share of n faces, in [0, 1]."""

    n: int

    @classmethod
    def of(
        cls, hits: NDArray[np.bool_], interval: Callable[[int, int], tuple[float, float]] = wilson_interval
    ) -> "Share":
        """The share of True in `(N,)`, N at least 1."""
        count, total = int(hits.sum()), len(hits)
        low, high = interval(count, total)
        return cls(value=round(count / total, 6), low=round(low, 6), high=round(high, 6), n=total)


def paired_interval(mended: float, broken: float, total: float, *, level: float = 0.95) -> tuple[float, float]:
    """Two-sided interval on the difference of two accuracies on the same faces.

    All differences that a score test does not reject; it excludes 0 exactly where McNemar's test
    does in its asymptotic form. Like every
    approximate interval it covers now more, now less than `level`. Exact sums over 132 settings in which 1 to 30
    faces change, as a rule changes them: 96 % on average, at least 93 %. Those of Newcombe 1998 (method 10) and of
    Agresti and Min 2005 fall to 91 % and 86 % there, where all changes go one way.

    Args:
        mended: faces that only the second way gets right.
        broken: faces that only the first way gets right.
        total: all faces, those on which both agree included.
        level: confidence level.

    Returns:
        Bounds on accuracy of the second less that of the first, in [-1, 1].

    Source: Tango 1998, "Equivalence test and confidence interval for the difference in proportions for the
        paired-sample design", Statistics in Medicine 17:891-908.
    """
    z2 = float(norm.ppf((1 + level) / 2)) ** 2
    difference = (mended - broken) / total
    if mended + broken == 0:
        reach = z2 / (total + z2)
        return -reach, reach

    def excess(delta: float) -> float:
        """Squared score less its critical value; `share` is the likeliest share of broken faces at this delta."""
        linear = (2 * total - mended + broken) * delta - mended - broken
        constant = -broken * delta * (1 - delta)
        share = (np.sqrt(max(linear**2 - 8 * total * constant, 0.0)) - linear) / (4 * total)
        variance = total * (2 * share + delta * (1 - delta))
        return float((mended - broken - total * delta) ** 2 - z2 * variance)

    low = -1.0 if broken == total else brentq(excess, -1.0, difference)
    high = 1.0 if mended == total else brentq(excess, difference, 1.0)
    return float(low), float(high)


def paired_p(mended: ArrayLike, broken: ArrayLike, total: int, max_drop: float) -> FloatArray:
    """One-sided p-values that the second accuracy is lower than the first by more than `max_drop`.

    The score test that `paired_interval` inverts, and as approximate: the p-value is at most (1 - level) / 2 exactly
    where the lower bound of that interval is at least -`max_drop`.

    Args:
        mended: faces that only the second way gets right, counts of any shape.
        broken: faces that only the first way gets right, of the same shape.
        total: all faces, those on which both agree included.
        max_drop: in (0, 1).

    Returns:
        float64 of the same shape.

    Source: Tango 1998, as in `paired_interval`.
    """
    mended, broken = np.asarray(mended, dtype=np.float64), np.asarray(broken, dtype=np.float64)
    linear = -(2 * total - mended + broken) * max_drop - mended - broken
    constant = broken * max_drop * (1 + max_drop)
    share = (np.sqrt(np.maximum(linear**2 - 8 * total * constant, 0.0)) - linear) / (4 * total)
    variance = total * (2 * share - max_drop * (1 + max_drop))
    p_values: FloatArray = norm.sf((mended - broken + total * max_drop) / np.sqrt(variance))
    return p_values


def changed(before: NDArray[np.bool_], after: NDArray[np.bool_]) -> tuple[int, int]:
    """Of which faces are right `(N,)` before and after: how many were mended, and how many broken."""
    return int((after & ~before).sum()), int((before & ~after).sum())


def paired_points(mended: int, broken: int, total: int) -> Estimate:
    """The difference that `paired_interval` is of, in percentage points, with that interval at 95 %."""
    low, high = paired_interval(mended, broken, total)
    value = (mended - broken) / total
    return Estimate(value=round(100 * value, 4), low=round(100 * low, 4), high=round(100 * high, 4))


def paired_bound(mended: int, broken: int, total: int) -> float:
    """Lower bound on what `paired_interval` bounds on both sides, one-sided at 95 %."""
    return paired_interval(mended, broken, total, level=0.9)[0]


def resampled_sums(columns: FloatArray, *, resamples: int = 2000, seed: int = 0) -> NDArray[np.float64]:
    """Sums over faces drawn again with replacement: the bootstrap of anything that is a function of sums.

    What is to be compared pair by pair belongs side by side in one call: a resample draws the same faces for all.

    Args:
        columns: what each face adds, `(N, M)`.
        resamples: how often N of the N faces are drawn.
        seed: seed of the draws.

    Returns:
        float64 `(resamples, M)`.

    Source: Efron 1979.
    """
    rng = np.random.default_rng(seed)
    faces = len(columns)
    at_once = max(1, _COUNTS_AT_ONCE // faces)
    sums = []
    for start in range(0, resamples, at_once):
        rows = min(at_once, resamples - start)
        drawn = rng.integers(faces, size=(rows, faces)) + faces * np.arange(rows)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=rows * faces).reshape(rows, faces)
        sums.append(counts.astype(np.float64) @ columns)
    return np.concatenate(sums)


def percentile_interval(samples: FloatArray, *, level: float = 0.95) -> tuple[float, float]:
    """Two-sided bootstrap interval from resampled values `(B,)`.

    Source: Efron and Tibshirani 1993, chapter 13.
    """
    low, high = np.quantile(samples, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def basic_interval(value: float, samples: FloatArray, *, level: float = 0.95) -> tuple[float, float]:
    """Two-sided bootstrap interval that mirrors the resampled values `(B,)` at `value`.

    For a figure that resampling pushes to one side, such as a calibration error: mirrored, the push is undone.

    Source: Davison and Hinkley 1997, section 2.4, there the basic bootstrap interval.
    """
    low, high = percentile_interval(samples, level=level)
    return 2 * value - high, 2 * value - low
