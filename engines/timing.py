"""Times of several functions, taken in turn, so that whatever slows the machine slows them all."""

import time
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray
from scipy.stats import bootstrap

from emoexport.config import Record

__all__ = ["UNSTABLE_PCT", "Latency", "Ratio", "interleave", "latency_of", "ratio_of", "rounds_within"]

Samples = NDArray[np.float64]


UNSTABLE_PCT = 2.5
"""Standard deviation over mean from which on times are called unstable, in percent. Source: trtexec's warning."""


class Latency(Record):
    """Times of one call, in milliseconds."""

    calls: int
    mean_ms: float
    p50_ms: float
    p90_ms: float
    p95_ms: float
    p99_ms: float
    min_ms: float
    max_ms: float
    spread_pct: float
    """Standard deviation over mean, in percent."""


class Ratio(Record):
    """How many times as fast, with a 95 % interval."""

    value: float
    low: float
    high: float


def interleave(
    calls: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warmup: int = 2,
    progress: Callable[[int], object] = lambda _: None,
) -> dict[str, Samples]:
    """Time functions, each once a round, in another order every round: none is always the one after the slowest.

    Args:
        calls: name to function.
        rounds: counted rounds.
        warmup: rounds before them that do not count.
        progress: called with 1 after every round.

    Returns:
        Name to times in milliseconds, float64 `(rounds,)`.

    Source: randomised complete blocks (Fisher 1935); the orders are the same in every run.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    rng, names = np.random.default_rng(0), list(calls)
    for number in range(warmup + rounds):
        for index in rng.permutation(len(names)):
            name = names[index]
            start = time.perf_counter_ns()
            calls[name]()
            elapsed = time.perf_counter_ns() - start
            if number >= warmup:
                samples[name].append(elapsed / 1e6)
        progress(1)
    return {name: np.array(times) for name, times in samples.items()}


def rounds_within(seconds: float, *, once: float, least: int, most: int) -> int:
    """How many rounds fit into a time in seconds, where one takes `once`; at least and at most so many."""
    return int(np.clip(seconds / once, least, most))


def latency_of(samples: Samples) -> Latency:
    """Summarise times in milliseconds, `(rounds,)`."""
    p50, p90, p95, p99 = np.percentile(samples, [50, 90, 95, 99])
    return Latency(
        calls=len(samples),
        mean_ms=_rounded(samples.mean()),
        p50_ms=_rounded(p50),
        p90_ms=_rounded(p90),
        p95_ms=_rounded(p95),
        p99_ms=_rounded(p99),
        min_ms=_rounded(samples.min()),
        max_ms=_rounded(samples.max()),
        spread_pct=_rounded(100 * samples.std() / samples.mean()),
    )


def ratio_of(slow: Samples, fast: Samples, *, seed: int = 0) -> Ratio:
    """How many times as fast `fast` is as `slow`: the median of the ratios round by round.

    Args:
        slow: times `(rounds,)` from the same interleaved run as `fast`.
        fast: times `(rounds,)`.
        seed: seed of the resampling.

    Source: percentile bootstrap over rounds (Efron 1979), as `scipy.stats.bootstrap`.
    """
    ratios = slow / fast
    if len(ratios) < 2 or np.ptp(ratios) == 0:
        value = _rounded(np.median(ratios))
        return Ratio(value=value, low=value, high=value)
    interval = bootstrap(
        (ratios,), np.median, method="percentile", n_resamples=2000, rng=np.random.default_rng(seed)
    ).confidence_interval
    return Ratio(value=_rounded(np.median(ratios)), low=_rounded(interval.low), high=_rounded(interval.high))


def _rounded(value: float | np.floating) -> float:
    return float(f"{float(value):.5g}")
