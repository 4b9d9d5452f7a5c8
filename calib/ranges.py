"""From faces to the ranges that a quantised graph represents."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from emoexport.calib.observer import Observer
from emoexport.calib.record import Range
from emoexport.calib.thresholds import method_named

__all__ = ["Ranges", "activation_ranges"]


class Ranges(NamedTuple):
    """What was found of the tensors of a graph; each by name."""

    extremes: dict[str, Range]
    """Lowest and highest value, of all tensors of the members."""
    kept: dict[str, Range]
    """Of these what is to be represented, for the tensors that feed quantised layers."""
    clipped: dict[str, float]
    """Which share of their values on held-out faces lies beyond."""


def activation_ranges(
    observer: Observer,
    faces: NDArray[np.uint8],
    held_out: NDArray[np.uint8],
    feeds: Sequence[str],
    *,
    method: str = "min-max",
    progress: Callable[[int], object] = lambda _: None,
) -> Ranges:
    """Find the ranges of the activations of a graph, in one pass over the faces, or two where histograms are needed.

    Args:
        observer: of the FP32 graph.
        faces: uint8 `(N, H, W, C)`, to calibrate on.
        held_out: uint8 `(M, H, W, C)`, others, to count on what the ranges clip.
        feeds: the tensors that feed quantised layers.
        method: of `METHODS`.
        progress: called with the number of faces done; `faces_to_run` of them in all.

    Raises:
        UsageError: if there is no such method.
        BadData: if an activation is not finite.
    """
    cut = method_named(method)
    extremes = observer.extremes(faces, progress=progress)
    magnitude = {name: max(map(abs, extremes[name])) for name in feeds}
    limits = dict(magnitude)
    if cut is not None:
        used = {name: limit for name, limit in magnitude.items() if limit > 0}
        counts = observer.histograms(faces, used, progress=progress)
        limits |= {name: limit * cut(counts[name]) for name, limit in used.items()}
    kept = {name: (max(extremes[name][0], -limits[name]), min(extremes[name][1], limits[name])) for name in feeds}
    clipped = observer.clipped(held_out, limits, progress=progress) if feeds and len(held_out) else {}
    return Ranges(extremes, kept, clipped)


def faces_to_run(faces: int, held_out: int, method: str) -> int:
    """How many faces `activation_ranges` runs, those that it runs twice counted twice."""
    return faces * (1 if method_named(method) is None else 2) + held_out
