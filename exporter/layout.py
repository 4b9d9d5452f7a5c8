"""Which way the members stand in the graph: the one asked for, or the one that is faster here."""

import functools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

from emoexport.engines import Backend, backends_named, open_engine
from emoexport.engines.timing import interleave, ratio_of, rounds_within
from emoexport.errors import MissingRuntime, UsageError
from emoexport.fold import LAYOUTS, Branches, Fold
from emoexport.manifest import LayoutEntry
from emoexport.member_graph import MemberGraph
from emoexport.onnx_graph import export_fold
from emoexport.stacked import Stacked, one_architecture

__all__ = ["export_in_layout", "require_layout"]

_AUTO = "auto"

_SECONDS = 20.0
"""How long the layouts are timed, all calls together."""


def require_layout(layout: str) -> None:
    """Refuse what is no layout.

    Raises:
        UsageError: naming those there are.
    """
    if layout not in {*LAYOUTS, _AUTO}:
        raise UsageError(f"'{layout}' is no layout; known are {', '.join(LAYOUTS)} and {_AUTO}.")


def export_in_layout(
    members: Sequence[MemberGraph],
    fold: Callable[[Branches | Stacked], Fold],
    path: Path,
    *,
    layout: str,
    face_shape: tuple[int, int, int],
    max_batch: int,
    console: Console,
) -> LayoutEntry:
    """Export a fold in one of `LAYOUTS`.

    Args:
        members: traced networks, pictures to logits. They are used up.
        fold: what makes the fold of the members, once they are one module.
        path: the ONNX file to write.
        layout: a name in `LAYOUTS`, or `auto`: both are exported, and timed on this machine in turn.
        face_shape: `(H, W, C)` of the uint8 faces.
        max_batch: the largest number of faces in a call.
        console: where progress is shown.

    Returns:
        The layout, and why it was taken.

    Raises:
        UsageError: if there is no such layout, or the members cannot stand in it.
        MissingRuntime: if the layouts are to be timed and no runtime is installed.
    """
    require_layout(layout)
    export = functools.partial(export_fold, face_shape=face_shape, max_batch=max_batch)
    if layout == _AUTO and not one_architecture(members):
        export(fold(LAYOUTS["branches"](members)), path)
        return LayoutEntry(name="branches", reason="the members differ in architecture")
    if layout != _AUTO:
        export(fold(LAYOUTS[layout](members)), path)
        return LayoutEntry(name=layout, reason="asked for")
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        graphs = {
            name: Path(scratch) / name / path.name for name in LAYOUTS
        }  # one name: graphs name their weights' file
        for name, graph in graphs.items():
            graph.parent.mkdir()
            export(fold(LAYOUTS[name](members)), graph)
        chosen = _faster(graphs, face_shape=face_shape, max_batch=max_batch, console=console)
        for file in graphs[chosen.name].parent.iterdir():
            file.rename(path.parent / file.name)
    return chosen


def _faster(
    graphs: dict[str, Path], *, face_shape: tuple[int, int, int], max_batch: int, console: Console
) -> LayoutEntry:
    """Time one face a call in every layout; branches unless stacked is faster beyond the interval."""
    backend = _backend()
    console.print(f"timing {' and '.join(graphs)} with {backend.title} ...")
    face = np.random.default_rng(0).integers(0, 256, (1, *face_shape), dtype=np.uint8)
    engines = {
        name: open_engine(backend, graph, precision="fp32", face_shape=face_shape, max_batch=max_batch)
        for name, graph in graphs.items()
    }
    calls = {name: functools.partial(engine.run, face) for name, engine in engines.items()}
    once = sum(float(times[0]) for times in interleave(calls, rounds=1, warmup=1).values()) / 1000
    rounds = rounds_within(_SECONDS, once=once, least=3, most=20)
    samples = interleave(calls, rounds=rounds, warmup=0)
    ratio = ratio_of(samples["branches"], samples["stacked"])
    return LayoutEntry(
        name="stacked" if ratio.low > 1 else "branches",
        reason=f"stacked is {ratio.value:.3g} times as fast as branches, 95 % interval {ratio.low:.3g} to "
        f"{ratio.high:.3g}: {backend.title}, FP32, one face a call, {rounds} rounds in turn",
        median_ms={name: round(float(np.median(times)), 4) for name, times in samples.items()},
    )


def _backend() -> Backend:
    installed = [backend for backend in backends_named(None) if backend.takes("fp32")]
    if not installed:
        raise MissingRuntime("no runtime is installed to time the layouts with.", hint="pip install onnxruntime-gpu")
    return installed[0]
