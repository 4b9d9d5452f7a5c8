"""Engines and the reference against the clock, at one batch size after the other."""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from emoexport.engines.base import Engine
from emoexport.engines.others import OtherProcesses
from emoexport.engines.timing import LEAST_ROUNDS, Samples, interleave, latency_of, ratio_of
from emoexport.precision import PRECISIONS
from emoexport.throughput import EngineSpeed, best_of

__all__ = ["Cost", "Measured", "first_line", "measure"]

_Answer = TypeVar("_Answer")

_GROWTH = 1.05
"""Times as many faces a second as at any smaller batch: less is no growth."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a face costs, which turns times into other figures."""

    passes_a_face: int
    """How many a graph computes."""
    gflop_a_face: float | None = None
    """10^9 operations of these; None where not known."""
    peaks: Mapping[str, float] = field(default_factory=dict)
    """By type of number, 10^12 operations a second of a large matrix product."""


class Measured(NamedTuple):
    """What `measure` found."""

    results: list[EngineSpeed]
    failures: dict[str, str]
    """Of engines that failed, by name and batch size, the first line of why."""
    stopped: str
    """Why no larger batch was timed, a sentence; empty where all that were given are."""


def measure(
    engines: Sequence[Engine],
    *,
    reference: Engine,
    batches: Sequence[int],
    rounds: int,
    seconds: float | None = None,
    growing: bool = False,
    cost: Cost,
    progress: Callable[[int], object] = lambda _: None,
) -> Measured:
    """Time engines and the reference in turn, at each batch size from the smallest on.

    An engine that fails costs only itself: it is not called again, at this batch size or a larger one. The reference
    must not fail.

    Args:
        engines: what is measured.
        reference: what they are compared with; it is measured too.
        batches: numbers of faces in a call.
        rounds: counted calls of each engine at each batch size, at most.
        seconds: that these may take, all engines together, at a batch size, as `interleave` has it.
        growing: whether to end where no engine gains from a larger batch any more, or where the next batch size, which
            is taken for twice this one, would take longer than `seconds`.
        cost: of a face.
        progress: called with 1 after every round.

    Source: Triton Model Navigator's profiling doubles batches until throughput grows by less than 5 %.
    """
    results: list[EngineSpeed] = []
    failures: dict[str, str] = {}
    failed: dict[str, str] = {}
    for batch in sorted(batches):
        everyone = [
            engine for engine in (reference, *engines) if batch <= engine.max_batch and engine.name not in failed
        ]
        # How long an engine takes does not depend on what a face shows.
        faces = np.random.default_rng(0).integers(0, 256, (batch, *reference.face_shape), dtype=np.uint8)
        calls = {engine.name: _Call(_guarded(failed, engine, faces)) for engine in everyone}
        calls[reference.name] = _Call(functools.partial(reference.run, faces))
        others = OtherProcesses()
        samples = interleave(calls, rounds=rounds, warmup=3, seconds=seconds, progress=progress)
        busy = others.cores()
        samples = {name: times for name, times in samples.items() if name not in failed}
        splits = _splits([engine for engine in everyone if engine.name in samples], faces, failed)
        rows = [
            _speed(
                engine,
                batch,
                samples[engine.name],
                cost=cost,
                times_reference=ratio_of(samples[reference.name], samples[engine.name]),
                split_ms=splits.get(engine.name),
                cores=calls[engine.name].cores(samples[engine.name]),
                others_cores=busy,
            )
            for engine in everyone
            if engine.name in samples
        ]
        failures |= {
            f"{engine.name} at batch {batch}": failed[engine.name] for engine in everyone if engine.name in failed
        }
        stopped = _why_stop(results, rows, seconds) if growing else ""
        results += rows
        if stopped:
            return Measured(results, failures, stopped)
    return Measured(results, failures, "")


class _Call:
    """A call that notes how much processor time each took, in all threads of this process."""

    def __init__(self, call: Callable[[], object]) -> None:
        self._call = call
        self._spent_ms: list[float] = []

    def __call__(self) -> None:
        start = time.process_time_ns()
        self._call()
        self._spent_ms.append((time.process_time_ns() - start) / 1e6)

    def cores(self, times: Samples) -> float:
        """How many cores the last calls kept busy, which took so many milliseconds each: the median."""
        return round(float(np.median(self._spent_ms[-len(times) :] / times)), 2)


def _guarded(failed: dict[str, str], engine: Engine, faces: NDArray[np.uint8]) -> Callable[[], object]:
    return functools.partial(_unless_failed, failed, engine.name, functools.partial(engine.run, faces))


def _splits(
    engines: Sequence[Engine], faces: NDArray[np.uint8], failed: dict[str, str]
) -> dict[str, tuple[float, float, float]]:
    """What each engine says of the parts of a call, by name: medians of `LEAST_ROUNDS` calls, all in turn."""
    found: dict[str, list[tuple[float, float, float]]] = {}
    for _ in range(LEAST_ROUNDS):
        for engine in engines:
            parts = _unless_failed(failed, engine.name, functools.partial(engine.split, faces))
            if parts is not None:
                found.setdefault(engine.name, []).append(parts)
    medians = {name: np.median(parts, axis=0).round(4).tolist() for name, parts in found.items() if name not in failed}
    return {name: (before, within, after) for name, (before, within, after) in medians.items()}


def _speed(
    engine: Engine,
    batch: int,
    times: Samples,
    *,
    cost: Cost,
    **found: Any,
) -> EngineSpeed:
    """The row of an engine: its times in milliseconds, what they come to, and what else was found."""
    faces_a_second = 1000 * batch / float(np.median(times))
    return EngineSpeed(
        engine=engine.name,
        batch=batch,
        latency_ms=latency_of(times),
        ms_a_face=round(float(np.median(times)) / batch, 4),
        faces_a_second=round(faces_a_second, 2),
        passes_a_second=round(faces_a_second * cost.passes_a_face, 1),
        share_of_peak=_share(faces_a_second, cost.gflop_a_face, cost.peaks.get(PRECISIONS[engine.precision].number)),
        uncaptured=getattr(engine, "uncaptured", None),
        samples_ms=tuple(round(float(value), 4) for value in times),
        **found,
    )


def _why_stop(before: Sequence[EngineSpeed], rows: Sequence[EngineSpeed], seconds: float | None) -> str:
    """Why a larger batch than that of `rows` is not worth timing; empty if it is."""
    best = {row.engine: row.faces_a_second for row in best_of(before)}
    batch = rows[0].batch
    if not any(row.faces_a_second > _GROWTH * best.get(row.engine, 0.0) for row in rows):
        return (
            f"Batches were doubled up to {batch}, where no engine was {100 * (_GROWTH - 1):.0f} % faster than before."
        )
    twice = 2 * LEAST_ROUNDS * sum(row.latency_ms.p50_ms for row in rows) / 1000
    if seconds is not None and twice > seconds:
        return (
            f"Batches were doubled up to {batch}: {LEAST_ROUNDS} rounds at {2 * batch} would have taken {twice:.0f} s, "
            f"and may take {seconds:g}."
        )
    return ""


def _unless_failed(failed: dict[str, str], name: str, work: Callable[[], _Answer]) -> _Answer | None:
    """Do the work of an engine, unless it has failed before; if it does now, note the first line of why.

    Not the first call alone goes through it: what is captured as a CUDA graph is so in the second or the third.
    """
    if name in failed:
        return None
    try:
        return work()
    except Exception as err:  # of any runtime, on the one machine there may be: the others are wanted all the same
        failed[name] = first_line(err)
    torch.cuda.empty_cache()  # what a failed call held of the device is free once its exception is gone
    return None


def first_line(err: Exception) -> str:
    """What is wrong, without the rest of what a runtime says."""
    return str(err).strip().partition("\n")[0] or type(err).__name__


def _share(faces_a_second: float, gflop_a_face: float | None, peak_tops: float | None) -> float | None:
    """What part of a peak, in 10^12 operations a second, so many faces are."""
    if gflop_a_face is None or peak_tops is None:
        return None
    return round(faces_a_second * gflop_a_face / 1000 / peak_tops, 4)
