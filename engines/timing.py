"""Times of several functions, taken in turn, so that whatever slows the machine slows them all."""

import time
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray
from scipy.stats import bootstrap

from emoexport.config import Record

__all__ = [
    "LEAST_ROUNDS",
    "UNSTABLE_PCT",
    "Latency",
    "Ratio",
    "Samples",
    "interleave",
    "latency_of",
    "ratio_of",
    "rounds_within",
]

Samples = NDArray[np.float64]
"""Times of one function, in milliseconds, `(rounds,)`."""

UNSTABLE_PCT = 2.5
"""Standard deviation over mean from which on times are called unstable, in percent. Source: trtexec's warning."""

LEAST_ROUNDS = 5
"""Counted where time is short: the fewest whose extremes hold the median with more than 90 % (1 - 2 / 2^5)."""


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
    seconds: float | None = None,
    progress: Callable[[int], object] = lambda _: None,
) -> dict[str, Samples]:
    """Time functions, each once a round, in another order every round: none is always the one after the slowest.

    Args:
        calls: name to function.
        rounds: counted rounds.
        warmup: rounds before them that do not count.
        seconds: that counted rounds may take, as the last warm-up went: fewer are made, but at least `LEAST_ROUNDS`.
            None for all of them, however long they take.
        progress: called with 1 after every round.

    Returns:
        Name to times in milliseconds, float64 `(rounds,)`.

    Source: randomised complete blocks (Fisher 1935); the orders are the same in every run.
    """
    rng, names = np.random.default_rng(0), list(calls)

    def one_round() -> dict[str, float]:
        times = {}
        for index in rng.permutation(len(names)):
            start = time.perf_counter_ns()
            calls[names[index]]()
            times[names[index]] = (time.perf_counter_ns() - start) / 1e6
        progress(1)
        return times

    once = 0.0
    for _ in range(warmup):
        once = sum(one_round().values()) / 1000
    if seconds is not None and once:
        rounds = rounds_within(seconds, once=once, least=LEAST_ROUNDS, most=rounds)
    counted = [one_round() for _ in range(rounds)]
    return {name: np.array([times[name] for times in counted]) for name in calls}


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
