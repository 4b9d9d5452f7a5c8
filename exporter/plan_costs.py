"""What calls of engines take by the number of passes: a line through one pass and the full vote, for each batch."""

import itertools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from emoexport.engines.base import Engine
from emoexport.engines.timing import Samples, interleave, latency_of, ratio_of
from emoexport.plan import Goals, Timing

__all__ = ["SECONDS", "Costs", "Setting", "call_samples", "is_fast_enough", "timing_of"]

SECONDS = 60.0
"""That the calls of one comparison may take, all together; there are at least five of each."""


class Setting(NamedTuple):
    """An engine, and the faces in its calls."""

    engine: str
    batch: int


class Costs(NamedTuple):
    """Milliseconds of a call without any pass, and for each pass, by engine and batch."""

    lines: Mapping[Setting, tuple[float, float]]

    @classmethod
    def of(cls, samples: Mapping[tuple[Setting, str], Samples], all_passes: int, few: int) -> "Costs":
        """Lines through the medians of calls `full` and `one`, of all passes and of few."""
        lines = {}
        for setting in dict.fromkeys(setting for setting, _ in samples):
            most, least = (float(np.median(samples[setting, which])) for which in ("full", "one"))
            slope = max(most - least, 0.0) / max(all_passes - few, 1)
            lines[setting] = (least - slope * few, slope)
        return cls(lines)

    def milliseconds(self, setting: Setting, passes: float) -> float:
        """Of a call."""
        start, slope = self.lines[setting]
        return start + slope * passes

    def fastest(self, passes: float, goals: Goals) -> Setting | None:
        """What takes least a face and reaches the goals of speed; None if nothing does."""
        able = [setting for setting in self.lines if self._reaches(setting, passes, goals)]
        return min(able, key=lambda setting: self.milliseconds(setting, passes) / setting.batch, default=None)

    def why_slow(self, passes: int, goals: Goals) -> str:
        """Why no engine reaches the goals of speed with so many passes; empty if one does."""
        if self.fastest(passes, goals) is not None:
            return ""
        best = min(self.lines, key=lambda setting: self.milliseconds(setting, passes) / setting.batch)
        call = self.milliseconds(best, passes)
        asked = [f"{goals.max_latency_ms:g} ms"] if goals.max_latency_ms is not None else []
        asked += [f"{goals.min_throughput:g} faces a second"] if goals.min_throughput is not None else []
        return (
            f"{best.engine} would take {call:.3g} ms for {best.batch} faces, {1000 * best.batch / call:.3g} a second; "
            f"asked for are {' and '.join(asked)}"
        )

    def _reaches(self, setting: Setting, passes: float, goals: Goals) -> bool:
        call = self.milliseconds(setting, passes)
        return is_fast_enough(call, call, setting.batch, goals)


def is_fast_enough(slow_ms: float, mean_ms: float, batch: int, goals: Goals) -> bool:
    """Whether calls reach the goals of speed: slow ones that of latency, those on average that of throughput."""
    latency, throughput = goals.max_latency_ms, goals.min_throughput
    return (latency is None or slow_ms <= latency) and (throughput is None or 1000 * batch / mean_ms >= throughput)


def call_samples(
    engines: Mapping[tuple[Setting, str], Engine],
    faces: NDArray[np.uint8],
    *,
    rounds: int,
    progress: Callable[[int], object],
) -> dict[tuple[Setting, str], Samples]:
    """Time calls of engines, all in turn, other faces at every call, in an order that is always the same.

    They are drawn at random, as what a cascade takes depends on them, and data sets are often sorted by emotion.

    Args:
        engines: by setting, whose batch the calls have, and what the engine is there.
        faces: uint8 `(N, H, W, C)`, which are used again where they do not suffice.
        rounds: counted calls of each, at most.
        progress: called with 1 after every round.
    """
    drawn = faces[np.random.default_rng(0).permutation(len(faces))]

    def turns(engine: Engine, batch: int) -> Callable[[], object]:
        whole = np.resize(drawn, (max(batch, len(faces) // batch * batch), *faces.shape[1:]))
        given = itertools.cycle(np.split(whole, len(whole) // batch))
        return lambda: engine.run(next(given))

    names = {f"{setting.engine} {setting.batch} {which}": (setting, which) for setting, which in engines}
    calls = {name: turns(engines[key], key[0].batch) for name, key in names.items()}
    found = interleave(calls, rounds=rounds, seconds=SECONDS, progress=progress)
    return {names[name]: samples for name, samples in found.items()}


def timing_of(name: str, passes: float, batch: int, samples: Samples, full: Samples) -> Timing:
    """Calls of an engine, and of its full vote in the same rounds."""
    latency = latency_of(samples)
    return Timing(
        engine=name,
        passes=passes,
        batch=batch,
        latency_ms=latency.p50_ms,
        slow_ms=latency.p99_ms,
        ms_a_face=float(f"{latency.mean_ms / batch:.5g}"),
        times_full=ratio_of(full, samples),
    )
