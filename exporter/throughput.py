"""Throughput: how fast every engine of a bundle is, and how many times the reference."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import numpy as np
from pydantic import Field

from emoexport.config import Record
from emoexport.engines.base import Engine
from emoexport.engines.timing import Latency, Ratio, interleave, latency_of, ratio_of
from emoexport.precision import PRECISIONS

__all__ = ["EngineSpeed", "Planned", "SpeedReport", "measure"]


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
    samples_ms: tuple[float, ...]


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
    notes: tuple[str, ...] = ()
    """What a reader of the figures must know."""
    machine: dict[str, str]


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
) -> list[EngineSpeed]:
    """Time engines and the reference in turn, at each batch size.

    Args:
        engines: what is measured.
        reference: what they are compared with; it is measured too.
        batches: numbers of faces in a call.
        rounds: counted calls of each engine at each batch size.
        passes_a_face: how many a graph computes.
        gflop_a_face: 10^9 operations of these; None where not known.
        peaks: by type of number, 10^12 operations a second of a large matrix product.
        progress: called with 1 after every round.
    """
    results = []
    for batch in batches:
        everyone = [engine for engine in (reference, *engines) if batch <= engine.max_batch]
        # How long an engine takes does not depend on what a face shows.
        faces = np.random.default_rng(0).integers(0, 256, (batch, *reference.face_shape), dtype=np.uint8)
        calls: Mapping[str, Callable[[], object]] = {
            engine.name: functools.partial(engine.run, faces) for engine in everyone
        }
        samples = interleave(calls, rounds=rounds, warmup=3, progress=progress)
        for engine in everyone:
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
                    split_ms=engine.split(faces),
                    samples_ms=tuple(round(float(value), 4) for value in times),
                )
            )
    return results


def _share(faces_a_second: float, gflop_a_face: float | None, peak_tops: float | None) -> float | None:
    """What part of a peak, in 10^12 operations a second, so many faces are."""
    if gflop_a_face is None or peak_tops is None:
        return None
    return round(faces_a_second * gflop_a_face / 1000 / peak_tops, 4)
