"""Is a graph of 8 bits worth having on this machine? Only if it is faster, and not less often right."""

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from emoexport.engines import Backend, backends_named, open_engine
from emoexport.engines.base import Engine
from emoexport.engines.timing import Ratio, interleave, ratio_of, rounds_within
from emoexport.errors import MissingRuntime
from emoexport.manifest import GateEntry
from emoexport.precision import PRECISIONS
from emoexport.progress import progress_bar
from emoexport.statistics import Estimate, changed, paired_bound, paired_points
from emoexport.train.dataset import Faces

__all__ = ["GATE_FACES", "fastest", "judge_graphs"]

GATE_FACES = 1000
"""Validation faces to compare on, at most."""

_BATCH = 16
_SLOW = 2.0
"""Seconds a face from which on faces are timed one by one: sixteen would take minutes."""
_SECONDS = 120.0
"""How long two engines are timed in turn, within 3 to 20 rounds."""


def judge_graphs(
    graphs: Mapping[str, Path], validation: Faces, *, max_batch: int, count: int = GATE_FACES, console: Console
) -> dict[str, GateEntry]:
    """Hold every graph of 8 bits against the fastest engine of 16 or 32 on this machine.

    Args:
        graphs: by precision.
        validation: faces that neither trained nor calibrated, and are not those of the final judgement.
        max_batch: the largest number of faces in a call.
        count: how many of the faces to compare accuracies on, drawn at random.
        console: where progress is shown.

    Returns:
        By precision what was found, of those of 8 bits.
    """
    small = [name for name in graphs if PRECISIONS[name].bits == 8]
    judged = [name for name in small if not PRECISIONS[name].for_gpus]
    found = {name: GateEntry(verdict="not judged", reason="it is meant for GPUs") for name in small}
    if not judged:
        return found
    faces = validation.take(np.random.default_rng(0).permutation(len(validation))[:count])
    opening = functools.partial(_open, graphs, face_shape=faces.images.shape[1:], max_batch=max_batch)
    some = _faces_to_time_on(opening, faces.images, max_batch)
    rival = fastest(opening, [name for name in graphs if PRECISIONS[name].bits > 8], some)
    for name in judged:
        candidate = fastest(opening, [name], some)
        if candidate is None or rival is None:
            found[name] = GateEntry(verdict="not judged", reason="no engine here runs it")
        else:
            found[name] = _compare(opening(*candidate), opening(*rival), faces, some, console)
    return found


def _faces_to_time_on(
    opening: Callable[[Backend, str], Engine], images: NDArray[np.uint8], max_batch: int
) -> NDArray[np.uint8]:
    """As many as in a usual call, or one where that is slow."""
    backend = next((row for row in backends_named(None) if row.takes("fp32")), None)
    one = images[:1]
    if backend is not None:
        once = interleave({"": functools.partial(opening(backend, "fp32").run, one)}, rounds=1, warmup=1)[""]
        if once[0] > 1000 * _SLOW:
            return one
    return np.resize(images, (min(_BATCH, max_batch), *images.shape[1:]))


def _open(
    graphs: Mapping[str, Path], backend: Backend, precision: str, *, face_shape: tuple[int, int, int], max_batch: int
) -> Engine:
    return open_engine(backend, graphs[precision], precision=precision, face_shape=face_shape, max_batch=max_batch)


def fastest(
    opening: Callable[[Backend, str], Engine], precisions: Sequence[str], some: NDArray[np.uint8]
) -> tuple[Backend, str] | None:
    """Find the engine of this machine that takes least time.

    Args:
        opening: opens an engine of a backend and a precision. One is open at a time, since they may be large.
        precisions: of its graph.
        some: faces to time it on, uint8 `(N, H, W, C)`.

    Returns:
        Its backend and precision; None if no engine here takes any of them.
    """
    times = {}
    for backend in backends_named(None):
        for precision in precisions:
            if backend.takes(precision):
                with contextlib.suppress(MissingRuntime):  # installed, and lacking something after all
                    times[backend, precision] = _least_time(opening(backend, precision), some)
    return min(times, key=times.__getitem__, default=None)


def _least_time(engine: Engine, some: NDArray[np.uint8]) -> float:
    """Of a few calls after the first, in milliseconds."""
    calls = {"": functools.partial(engine.run, some)}
    first = float(interleave(calls, rounds=1, warmup=1)[""][0])
    more = rounds_within(_SLOW, once=first / 1000, least=1, most=5)
    return min(first, float(interleave(calls, rounds=more, warmup=0)[""].min()))


def _compare(candidate: Engine, rival: Engine, faces: Faces, some: NDArray[np.uint8], console: Console) -> GateEntry:
    calls = {engine.name: functools.partial(engine.run, some) for engine in (candidate, rival)}
    once = sum(float(times[0]) for times in interleave(calls, rounds=1, warmup=1).values()) / 1000
    rounds = rounds_within(_SECONDS, once=once, least=3, most=20)
    with progress_bar(console, f"{candidate.name} and {rival.name} in turn", rounds) as advance:
        samples = interleave(calls, rounds=rounds, warmup=0, progress=advance)
    speed = ratio_of(samples[rival.name], samples[candidate.name])
    right = []
    for engine in (candidate, rival):
        with progress_bar(console, f"{engine.name} on validation faces", len(faces)) as advance:
            right.append(engine.run_all(faces.images, batch_size=len(some), progress=advance).label == faces.labels)
    mended, broken = changed(right[1], right[0])
    return _verdict(candidate, rival.name, speed, mended, broken, len(faces))


def _verdict(candidate: Engine, rival: str, speed: Ratio, mended: int, broken: int, faces: int) -> GateEntry:
    worst = 100 * paired_bound(mended, broken, faces)
    allowed = 100 * PRECISIONS[candidate.precision].tolerance.max_drop
    gain = paired_points(mended, broken, faces)
    is_faster, is_right = speed.low > 1, worst >= -allowed
    times = f"{speed.value:.2f} times as fast as {rival} [{speed.low:.2f}, {speed.high:.2f}]"
    points = f"{gain.value:+.2f} points of accuracy on {faces:,} validation faces"
    figures = f"{candidate.name} is {times}, with {points}, no worse than {worst:+.2f}; {-allowed:+g} is allowed"
    return GateEntry(
        verdict="recommended" if is_faster and is_right else "not recommended",
        reason=figures,
        engine=candidate.name,
        rival=rival,
        times_as_fast=Estimate(value=speed.value, low=speed.low, high=speed.high),
        gain_points=gain,
        bound_points=round(worst, 4),
        faces=faces,
    )
