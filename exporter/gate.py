"""Is a graph of 8 bits worth having on this machine? Only if it is faster, and not less often right."""

import functools
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from emoexport.bundle import GateEntry
from emoexport.engines import Backend, backends_named, open_engine
from emoexport.engines.base import Engine
from emoexport.engines.timing import Ratio, interleave, ratio_of
from emoexport.precision import PRECISIONS
from emoexport.progress import progress_bar
from emoexport.statistics import Estimate, paired_interval
from emoexport.train.dataset import Faces

__all__ = ["GATE_FACES", "judge_graphs"]

GATE_FACES = 1000
"""Validation faces to compare on, at most."""

_BATCH = 16
_ROUNDS = 20


def judge_graphs(
    graphs: Mapping[str, Path], validation: Faces, *, max_batch: int, console: Console
) -> dict[str, GateEntry]:
    """Hold every graph of 8 bits against the fastest engine of 16 or 32 on this machine.

    Args:
        graphs: by precision.
        validation: faces that neither trained nor calibrated, and are not those of the final judgement.
        max_batch: the largest number of faces in a call.
        console: where progress is shown.

    Returns:
        By precision what was found, of those of 8 bits.
    """
    small = [name for name in graphs if PRECISIONS[name].bits == 8]
    judged = [name for name in small if not PRECISIONS[name].for_gpus]
    found = {name: GateEntry(verdict="not judged", reason="it is meant for GPUs") for name in small}
    if not judged:
        return found
    faces = validation.take(np.random.default_rng(0).permutation(len(validation))[:GATE_FACES])
    batch = min(_BATCH, max_batch)
    some = np.resize(faces.images, (batch, *faces.images.shape[1:]))
    opening = functools.partial(_open, graphs, face_shape=faces.images.shape[1:], max_batch=max_batch)
    rival = _fastest(opening, [name for name in graphs if PRECISIONS[name].bits > 8], some)
    for name in judged:
        candidate = _fastest(opening, [name], some)
        if candidate is None or rival is None:
            found[name] = GateEntry(verdict="not judged", reason="no engine here runs it")
        else:
            found[name] = _compare(opening(*candidate), opening(*rival), faces, some, console)
    return found


def _open(
    graphs: Mapping[str, Path], backend: Backend, precision: str, *, face_shape: tuple[int, int, int], max_batch: int
) -> Engine:
    return open_engine(backend, graphs[precision], precision=precision, face_shape=face_shape, max_batch=max_batch)


def _fastest(
    opening: functools.partial[Engine], precisions: list[str], some: NDArray[np.uint8]
) -> tuple[Backend, str] | None:
    """The backend and precision of the engine that takes least time; one is open at a time, since they may be large."""
    times = {}
    for backend in backends_named(None):
        for precision in precisions:
            if backend.takes(precision):
                call = functools.partial(opening(backend, precision).run, some)
                times[backend, precision] = float(interleave({"": call}, rounds=3)[""].min())
    return min(times, key=times.__getitem__, default=None)


def _compare(candidate: Engine, rival: Engine, faces: Faces, some: NDArray[np.uint8], console: Console) -> GateEntry:
    title = f"{candidate.name} and {rival.name} in turn"
    with progress_bar(console, title, _ROUNDS + 2) as advance:
        calls = {engine.name: functools.partial(engine.run, some) for engine in (candidate, rival)}
        samples = interleave(calls, rounds=_ROUNDS, progress=advance)
    speed = ratio_of(samples[rival.name], samples[candidate.name])
    right = []
    for engine in (candidate, rival):
        with progress_bar(console, f"{engine.name} on validation faces", len(faces)) as advance:
            right.append(engine.run_all(faces.images, batch_size=len(some), progress=advance).label == faces.labels)
    mended, broken = int((right[0] & ~right[1]).sum()), int((right[1] & ~right[0]).sum())
    return _verdict(candidate, rival.name, speed, mended, broken, len(faces))


def _verdict(candidate: Engine, rival: str, speed: Ratio, mended: int, broken: int, faces: int) -> GateEntry:
    low, high = (100 * bound for bound in paired_interval(mended, broken, faces))
    worst = 100 * paired_interval(mended, broken, faces, level=0.9)[0]  # one-sided at 95 %
    allowed = 100 * PRECISIONS[candidate.precision].tolerance.max_drop
    gain = 100 * (mended - broken) / faces
    is_faster, is_right = speed.low > 1, worst >= -allowed
    times = f"{speed.value:.2f} times as fast as {rival} [{speed.low:.2f}, {speed.high:.2f}]"
    points = f"{gain:+.2f} points of accuracy on {faces:,} validation faces"
    figures = f"{candidate.name} is {times}, with {points}, no worse than {worst:+.2f}; {-allowed:+g} is allowed"
    return GateEntry(
        verdict="recommended" if is_faster and is_right else "not recommended",
        reason=figures,
        engine=candidate.name,
        rival=rival,
        times_as_fast=Estimate(value=speed.value, low=speed.low, high=speed.high),
        gain_points=Estimate(value=round(gain, 4), low=round(low, 4), high=round(high, 4)),
        bound_points=round(worst, 4),
        faces=faces,
    )
