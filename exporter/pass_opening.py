"""The single passes of a bundle: their graphs written, opened the way that is faster here, their calls measured."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from emoexport.bundle import Bundle
from emoexport.cascade_stages import Calls
from emoexport.engines import BACKENDS, Backend
from emoexport.engines.tensorrt_build import BuilderSettings, build_engine
from emoexport.engines.timing import interleave
from emoexport.errors import UsageError
from emoexport.opening import open_members
from emoexport.pass_engine import PassEngine
from emoexport.pass_graph import write_pass_graphs
from emoexport.plan_costs import SECONDS
from emoexport.progress import progress_bar
from emoexport.views import views_named

__all__ = ["open_passes"]

_LITTLE = 2.0
"""Passes that a call may cost beside those in it, before a runtime is opened for a few sizes."""
_PREPARED_SIZES = (1, 4, 16, 64)
"""These: each takes memory for the weights of all members."""
_MANY = 64
"""Passes in a large call, in which what it costs besides is little."""
_ROUNDS = 8
"""Of calls of each member, to tell what they cost."""


def open_passes(
    bundle: Bundle,
    folder: Path,
    engine: str,
    precision: str,
    *,
    threads: int | None = None,
    cache: Path | None = None,
    console: Console,
) -> tuple[PassEngine, list[Path]]:
    """Write the graphs of a bundle's single passes, one a member, and open them the way that is faster here.

    A runtime that loses time where a call has another size than the one before is opened for a few sizes, unless this
    is little beside what is computed: each size takes memory. A compiler builds an engine of each graph first.

    Args:
        bundle: with members as branches, and all passes.
        folder: that gets the graphs.
        engine: a backend that opens graphs, or builds engines of them.
        precision: of the graph.
        threads: how many the runtime may use.
        cache: where a runtime that can keeps what it compiles.
        console: where progress is shown.

    Returns:
        The engine, and the files that it was opened from.

    Raises:
        UsageError: if the engine takes no graphs, passes are left out, or members are stacked.
    """
    manifest, backend = bundle.manifest, BACKENDS[engine]
    if backend.built_from == "fold":
        able = ", ".join(row.name for row in BACKENDS.values() if row.built_from != "fold")
        raise UsageError(
            f"{engine} takes no graphs; a cascade runs on those that do: {able}.", hint="--engine names one"
        )
    if manifest.choice.passes:
        raise UsageError(
            f"{bundle.path} leaves passes out; a cascade ends with all of them.",
            hint="name a bundle that was built without --pass",
        )
    console.print(f"writing graphs of single passes, {precision} ...")
    graphs = write_pass_graphs(
        bundle.graph(precision),
        folder,
        members=len(manifest.members),
        views=views_named([view.name for view in manifest.views]),
        labels=manifest.labels,
        face_shape=manifest.face_shape,
        max_batch=manifest.max_batch,
    )
    settings: dict[str, Any] = {"precision": precision, "face_shape": manifest.face_shape}
    usual = Calls().up_to(min(manifest.max_batch, _MANY) if backend.built_from else manifest.max_batch)
    files = (
        [_engine_of(backend, graph, usual, console, **settings) for graph in graphs] if backend.built_from else graphs
    )

    def opened(calls: Calls) -> PassEngine:
        members = open_members(files, backend, calls, threads=threads, cache=cache, **settings)
        passes = PassEngine(
            members, manifest.merged_weights, manifest.decision, face_shape=manifest.face_shape, calls=calls
        )
        passes.calls = _measured(passes, console)
        return passes

    passes = opened(usual)
    if backend.prepares_sizes and passes.calls.call_ms > _LITTLE * passes.calls.row_ms:
        del passes  # before the weights are loaded again
        passes = opened(usual.model_copy(update={"prepared": True, "sizes": _PREPARED_SIZES}).up_to(manifest.max_batch))
    return passes, files


def _engine_of(
    backend: Backend,
    graph: Path,
    calls: Calls,
    console: Console,
    *,
    precision: str,
    face_shape: tuple[int, int, int],
) -> Path:
    """An engine of a graph of passes, in the graph's place."""
    height, width, channels = face_shape
    most = calls.sizes[-1]
    console.print(f"building an engine of {graph.name} ...")
    engine = graph.with_suffix(".engine")
    build_engine(
        backend.name,
        graph,
        engine,
        precision=precision,
        face_shape=(height + 1, width, channels),
        settings=BuilderSettings(opt_batch=tuple(sorted({1, min(16, most), most})), max_batch=most),
        origin=graph,
    )
    for file in (graph, graph.with_name(f"{graph.name}.data")):
        file.unlink(missing_ok=True)
    return engine


def _measured(passes: PassEngine, console: Console) -> Calls:
    """Time calls of the members, each after one of another member and often of another size, as in a cascade."""
    sizes = [size for size in passes.calls.sizes if size <= _MANY]
    few, many = sizes[min(1, max(0, len(sizes) - 2))], sizes[-1]
    faces = np.random.default_rng(0).integers(0, 256, (many, *passes.face_shape), dtype=np.uint8)

    def turns(rows: int) -> Callable[[], object]:
        members = itertools.cycle(range(len(passes.members)))
        return lambda: passes.passes(faces[:rows], [(next(members), 0)])

    rounds = _ROUNDS * len(passes.members)
    with progress_bar(console, "timing calls of single members", rounds + 2) as advance:
        samples = interleave(
            {str(size): turns(size) for size in (few, many)}, rounds=rounds, seconds=SECONDS, progress=advance
        )
    return passes.calls.measured(few, float(np.median(samples[str(few)])), many, float(np.median(samples[str(many)])))
