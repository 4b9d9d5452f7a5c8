import functools
import json
import time
from types import SimpleNamespace

import numpy as np
import pytest

from emoexport import benchmark
from emoexport.engines import timing
from emoexport.engines.timing import interleave, latency_of, ratio_of
from emoexport.errors import UsageError


def test_calls_are_taken_in_turn_in_changing_order_and_warm_up_does_not_count():
    order: list[str] = []
    calls = {name: functools.partial(order.append, name) for name in "abc"}
    samples = interleave(calls, rounds=9, warmup=1)
    rounds = ["".join(order[start : start + 3]) for start in range(0, 30, 3)]
    assert {"".join(sorted(one)) for one in rounds} == {"abc"}
    assert len(set(rounds)) > 2
    assert {name: len(times) for name, times in samples.items()} == {"a": 9, "b": 9, "c": 9}
    order.clear()
    interleave(calls, rounds=9, warmup=1)
    assert ["".join(order[start : start + 3]) for start in range(0, 30, 3)] == rounds


def test_times_are_milliseconds():
    samples = interleave({"nap": lambda: time.sleep(0.02)}, rounds=3)
    assert 20 <= latency_of(samples["nap"]).p50_ms < 60


@pytest.mark.parametrize(("milliseconds", "rounds"), [(10_000, 5), (1000, 6), (500, 12), (100, 20)])
def test_rounds_are_as_many_as_there_is_time_for(milliseconds, rounds, monkeypatch):
    now = iter(range(0, 10**18, milliseconds * 500_000))  # a call is two looks at the clock; a round two calls
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter_ns=lambda: next(now)))
    calls, done = dict.fromkeys("ab", lambda: None), []
    found = interleave(calls, rounds=20, warmup=3, seconds=6.0, progress=done.append)
    assert {name: len(times) for name, times in found.items()} == {"a": rounds, "b": rounds}
    assert found["a"][0] == milliseconds / 2
    assert len(done) == 3 + rounds
    few = interleave(calls, rounds=2, warmup=3, seconds=0.001)
    assert len(few["a"]) == 2, "what was asked for is the most"


def test_a_ratio_and_its_interval():
    rng = np.random.default_rng(0)
    drift = np.linspace(1, 3, 40)  # the machine slows down threefold; both feel it
    slow, fast = 40 * drift * rng.normal(1, 0.05, 40), 10 * drift * rng.normal(1, 0.05, 40)
    ratio = ratio_of(slow, fast)
    assert ratio.low < 4 < ratio.high
    assert ratio.high - ratio.low < 0.5
    assert ratio_of(slow, slow).value == 1


@pytest.mark.slow
def test_bench_measures_every_engine_and_the_reference(bundle, quiet, small_peak):
    report = benchmark.bench(bundle, batches=(1, 4), rounds=3, memory=False, console=quiet)
    names = {result.engine for result in report.results}
    assert "torch-fp32" in names
    assert len(report.results) == 2 * len(names)
    for result in report.results:
        assert len(result.samples_ms) == 3
        assert result.faces_a_second == pytest.approx(1000 / result.ms_a_face, rel=1e-2)
        assert result.passes_a_second == pytest.approx(32 * result.faces_a_second, rel=1e-2)
    saved = json.loads((bundle.path / "reports/bench.json").read_text())
    assert saved["passes_a_face"] == 32
    assert "torch" in saved["machine"]


def test_a_batch_that_the_bundle_does_not_take(bundle, quiet):
    with pytest.raises(UsageError, match="1 to 64"):
        benchmark.bench(bundle, batches=(1, 65), console=quiet)


@pytest.mark.parametrize(("rounds", "least"), [(5, 0.88), (10, 0.92), (20, 0.92)])
def test_intervals_of_ratios_cover(rounds, least):
    """On a machine that drifts, with calls that now and then take longer, as calls do: skewed times."""
    rng, covered = np.random.default_rng(4), 0
    for seed in range(300):
        drift = np.linspace(1, rng.uniform(1, 2), rounds)
        slow, fast = (mean * drift * (1 + rng.gamma(0.5, 0.05, rounds)) for mean in (30.0, 10.0))
        ratio = ratio_of(slow, fast, seed=seed)
        covered += ratio.low <= 3 <= ratio.high  # the median of a ratio of two alike times is 1
    assert covered / 300 >= least
