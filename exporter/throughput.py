"""Throughput: how fast every engine of a bundle is, and how many times the reference."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, TypeVar

import numpy as np
import torch
from pydantic import Field

from emoexport.config import Record
from emoexport.engines.base import Engine
from emoexport.engines.timing import UNSTABLE_PCT, Latency, Ratio, interleave, latency_of, ratio_of
from emoexport.precision import PRECISIONS

__all__ = ["Change", "EngineSpeed", "Planned", "SpeedReport", "changes", "measure"]

_Answer = TypeVar("_Answer")

_REFERENCE = "torch-fp32"
"""What the loop of `TorchEngine` is called."""


@dataclass(frozen=True, kw_only=True)
class Planned:
    """Something that a bench times, or would."""

    name: str
    title: str
    problem: str = ""
    """Why it is skipped; empty if it is not."""


class EngineSpeed(Record):
    """One engine at one batch size."""

    engine: str
    batch: int
    latency_ms: Latency
    """Of a call, end to end from uint8 faces in memory to outcomes."""
    ms_a_face: float
    """Median."""
    faces_a_second: float
    passes_a_second: float
    times_reference: Ratio
    share_of_peak: float | None = None
    """Of the operations a second that a large matrix product reaches here at this precision; None where not known."""
    split_ms: tuple[float, float, float] | None = None
    """Of one call to the device, on it, and back; None where the engine cannot tell."""
    uncaptured: str | None = None
    """Why calls are not replayed as CUDA graphs; empty where they are, None of engines that have none to replay."""
    samples_ms: tuple[float, ...]

    @property
    def unstable(self) -> bool:
        """Whether the calls vary so much that their median says little."""
        return self.latency_ms.spread_pct > UNSTABLE_PCT


class SpeedReport(Record):
    """`reports/bench.json`."""

    schema_version: Literal[1] = 1
    created: str
    bundle_digest: str
    passes_a_face: int
    results: tuple[EngineSpeed, ...]
    gemm_peak_tops: dict[str, float] = Field(default_factory=dict)
    """By type of number, 10^12 operations a second of a large matrix product here."""
    size_bytes: dict[str, int]
    """Of a graph, by precision; of a package, by engine."""
    load_s: dict[str, float] = Field(default_factory=dict)
    """Seconds that each engine took to open."""
    failures: dict[str, str] = Field(default_factory=dict)
    """By engine and batch size that it failed at, the first line of why; it was not called from there on."""
    notes: tuple[str, ...] = ()
    """What a reader of the figures must know."""
    machine: dict[str, str]


class Change(Record):
    """An engine at a batch size, now and in an earlier report."""

    engine: str
    batch: int
    before: Ratio
    now: Ratio
    """Times the reference, each in its own run."""

    @property
    def is_slower(self) -> bool:
        """Whether the intervals lie apart, and now lower."""
        return self.now.high < self.before.low

    @property
    def is_faster(self) -> bool:
        """The other way round."""
        return self.now.low > self.before.high


def changes(now: SpeedReport, before: SpeedReport) -> list[Change]:
    """Hold a report against an earlier one, by the ratio to the reference of each run: machines have slow days.

    Engines and batch sizes that only one of them has are left out.
    """
    earlier = {(result.engine, result.batch): result.times_reference for result in before.results}
    return [
        Change(engine=result.engine, batch=result.batch, before=earlier[key], now=result.times_reference)
        for result in now.results
        if (key := (result.engine, result.batch)) in earlier and result.engine != _REFERENCE
    ]


def measure(
    engines: Sequence[Engine],
    *,
    reference: Engine,
    batches: Sequence[int],
    rounds: int,
    passes_a_face: int,
    gflop_a_face: float | None = None,
    peaks: Mapping[str, float] = MappingProxyType({}),
    progress: Callable[[int], object] = lambda _: None,
) -> tuple[list[EngineSpeed], dict[str, str]]:
    """Time engines and the reference in turn, at each batch size from the smallest on.

    An engine that fails costs only itself: it is not called again, at this batch size or a larger one. The reference
    must not fail.

    Args:
        engines: what is measured.
        reference: what they are compared with; it is measured too.
        batches: numbers of faces in a call.
        rounds: counted calls of each engine at each batch size.
        passes_a_face: how many a graph computes.
        gflop_a_face: 10^9 operations of these; None where not known.
        peaks: by type of number, 10^12 operations a second of a large matrix product.
        progress: called with 1 after every round.

    Returns:
        The times, and of engines that failed, by name and batch size, the first line of why.
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
        calls: dict[str, Callable[[], object]] = {
            engine.name: functools.partial(_unless_failed, failed, engine.name, functools.partial(engine.run, faces))
            for engine in everyone
        }
        calls[reference.name] = functools.partial(reference.run, faces)
        samples = interleave(calls, rounds=rounds, warmup=3, progress=progress)
        for engine in everyone:
            if engine.name in failed:
                continue
            times = samples[engine.name]
            faces_a_second = 1000 * batch / float(np.median(times))
            results.append(
                EngineSpeed(
                    engine=engine.name,
                    batch=batch,
                    latency_ms=latency_of(times),
                    ms_a_face=round(float(np.median(times)) / batch, 4),
                    faces_a_second=round(faces_a_second, 2),
                    passes_a_second=round(faces_a_second * passes_a_face, 1),
                    times_reference=ratio_of(samples[reference.name], times),
                    share_of_peak=_share(faces_a_second, gflop_a_face, peaks.get(PRECISIONS[engine.precision].number)),
                    split_ms=_unless_failed(failed, engine.name, functools.partial(engine.split, faces)),
                    uncaptured=getattr(engine, "uncaptured", None),
                    samples_ms=tuple(round(float(value), 4) for value in times),
                )
            )
        failures |= {
            f"{engine.name} at batch {batch}": failed[engine.name] for engine in everyone if engine.name in failed
        }
    return results, failures


def _unless_failed(failed: dict[str, str], name: str, work: Callable[[], _Answer]) -> _Answer | None:
    """Do the work of an engine, unless it has failed before; if it does now, note the first line of why.

    Not the first call alone goes through it: what is captured as a CUDA graph is so in the second or the third.
    """
    if name in failed:
        return None
    try:
        return work()
    except Exception as err:  # of any runtime, on the one machine there may be: the others are wanted all the same
        failed[name] = str(err).strip().partition("\n")[0] or type(err).__name__
    torch.cuda.empty_cache()  # what a failed call held of the device is free once its exception is gone
    return None


def _share(faces_a_second: float, gflop_a_face: float | None, peak_tops: float | None) -> float | None:
    """What part of a peak, in 10^12 operations a second, so many faces are."""
    if gflop_a_face is None or peak_tops is None:
        return None
    return round(faces_a_second * gflop_a_face / 1000 / peak_tops, 4)
