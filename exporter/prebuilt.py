"""Engines that a runtime builds ahead of time from the graphs of a bundle; each has a passport beside it."""

import contextlib
import dataclasses
import functools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from emoexport.bundle import Bundle, writes_bundle
from emoexport.engines import BACKENDS, Backend, open_engine
from emoexport.engines.passport import Passport, passport_of
from emoexport.engines.tensorrt_build import BuilderSettings, build_engine, is_weakly_typed, require_builder
from emoexport.engines.tensorrt_engine import TensorRtEngine
from emoexport.errors import CheckFailed, UsageError, WrongMachine
from emoexport.files import changed_directory
from emoexport.opset17 import to_opset_17
from emoexport.precision import PRECISIONS
from emoexport.progress import status_line

__all__ = ["build_engines", "require_buildable"]


def require_buildable(names: Sequence[str], settings: BuilderSettings) -> list[Backend]:
    """Look up backends that build engines of graphs, before anything slow is done.

    Raises:
        UsageError: if one builds none, or the settings are not for it.
        MissingRuntime: if it is not installed, or builds only where there is a GPU and there is none.
    """
    rows = []
    for name in names:
        if name not in BACKENDS or BACKENDS[name].built_from != "graph":
            known = ", ".join(row.name for row in BACKENDS.values() if row.built_from)
            raise UsageError(f"'{name}' is no engine that is built; known are {known}.")
        settings.check(name)
        require_builder(name)
        rows.append(BACKENDS[name])
    return rows


@writes_bundle
def build_engines(
    bundle: Bundle,
    backends: Sequence[Backend],
    precisions: Sequence[str],
    settings: BuilderSettings,
    *,
    console: Console,
) -> dict[str, Passport]:
    """Build engines of a bundle's graphs into it, as `engines/<backend>-<precision>.engine`.

    Args:
        bundle: the bundle.
        backends: rows of `BACKENDS` that build engines of graphs.
        precisions: of the graphs; all that a backend takes if none is named.
        settings: of the builders.
        console: where progress is shown.

    Returns:
        Passports, by name of the engine.

    Raises:
        UsageError: if a backend takes no graph of a precision, or more faces in a call than the bundle.
        BadBundle: if the bundle has no graph of a precision.
        CheckFailed: if a runtime refuses a graph, or the engine is not of the precision.
    """
    if settings.max_batch > bundle.manifest.max_batch:
        raise UsageError(
            f"found --max-batch {settings.max_batch}; {bundle.path} takes up to {bundle.manifest.max_batch} faces.",
            hint=f"--max-batch {bundle.manifest.max_batch}",
        )
    wanted = [
        (backend, precision, _origin_of(bundle, backend, precision))
        for backend in backends
        for precision in _precisions_for(bundle, backend, precisions)
    ]
    found = {}
    for backend, precision, origin in wanted:
        name = f"{backend.name}-{precision}"
        with changed_directory(bundle.path / "engines") as folder:
            engine = folder / f"{name}.engine"
            for old in (engine, passport_of(engine)):
                old.unlink(missing_ok=True)
            with _graph_for(backend, origin) as graph, status_line(console, f"building {name} ...") as show:
                found[name] = build_engine(
                    backend.name,
                    graph,
                    engine,
                    precision=precision,
                    face_shape=bundle.manifest.face_shape,
                    settings=settings,
                    origin=origin,
                    progress=functools.partial(_show, show),
                )
            if backend.is_usable():
                found[name] = _proven(bundle, backend, engine, found[name], console)
    return found


def _show(show: Callable[[str], None], phase: str, done: int, steps: int) -> None:
    show(f"{phase.lower()}, {done} of {steps}")


def _origin_of(bundle: Bundle, backend: Backend, precision: str) -> Path:
    """The graph of a bundle that a runtime's engine at a precision is made from."""
    if _is_weakly_typed(backend):  # types are flags there
        return bundle.graph("int8" if "int8" in precision else "fp32")
    return bundle.graph(precision)


@contextlib.contextmanager
def _graph_for(backend: Backend, origin: Path) -> Iterator[Path]:
    """The same as the runtime's parser takes it."""
    if not _is_weakly_typed(backend):
        yield origin
        return
    with tempfile.TemporaryDirectory() as folder:
        graph = Path(folder) / origin.name
        to_opset_17(origin, graph)
        yield graph


def _is_weakly_typed(backend: Backend) -> bool:
    return is_weakly_typed(require_builder(backend.name)[0])


def _precisions_for(bundle: Bundle, backend: Backend, asked: Sequence[str]) -> list[str]:
    """Precisions that a backend builds engines of: those asked for, or all that it takes and the bundle has."""
    for name in asked:
        if name not in backend.precisions:
            raise UsageError(f"{backend.title} takes no {name} graph; it takes {', '.join(backend.precisions)}.")
    return list(asked) or [name for name in bundle.manifest.graphs if name in backend.precisions]


def _proven(bundle: Bundle, backend: Backend, engine: Path, passport: Passport, console: Console) -> Passport:
    """Read from the engine which types its layers compute in, and refuse one that is not of the precision.

    One for another card, and one whose time cannot be told apart by layers, stays as it is, and that is said.
    """
    row, manifest = PRECISIONS[passport.precision], bundle.manifest
    faces = np.zeros((passport.profiles[0][1], *manifest.face_shape), np.uint8)
    limits: dict[str, Any] = {"face_shape": manifest.face_shape, "max_batch": manifest.max_batch}
    try:
        session = open_engine(backend, engine, precision=passport.precision, **limits)
    except WrongMachine as err:
        console.print(f"{err} It is not run here.", style="yellow")
        return passport
    assert isinstance(session, TensorRtEngine)
    with contextlib.closing(session):
        executed = session.executed(faces)
    by_time = executed.time_share
    share = by_time.get(row.number, 0.0)
    if not by_time:
        said = f"{engine.name}: its time could not be told apart by layers."
        console.print(said, style="yellow")
    elif share < row.min_share:
        raise CheckFailed(
            f"{engine.name} is no {row.title} engine: {share:.0%} of the members' time is in {row.number}, needed are "
            f"{row.min_share:.0%}; found are {', '.join(f'{each} {part:.0%}' for each, part in by_time.items())}.",
            hint="another precision, or another version of the runtime",
        )
    proven = dataclasses.replace(passport, engine=executed.layers, time_share=by_time)
    proven.write(engine)
    return proven
