"""The engines of a bundle, opened where they run: nothing here needs torch or onnx."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console

from emoexport.bundle import Bundle
from emoexport.cascade_record import CASCADE_FILE, CASCADES, CascadeRecord, is_cascade
from emoexport.cascade_stages import Calls
from emoexport.engines import BACKENDS, Backend, backends_named, open_engine
from emoexport.engines.base import Engine
from emoexport.engines.certificate import Certificate, read_certificate
from emoexport.engines.cuda import require_device
from emoexport.engines.machine import describe_processor, instruction_sets, kernel_driver, versions_of
from emoexport.engines.passport import Passport, passport_of, passports_in, rebuild_command
from emoexport.errors import BadBundle, EmoexportError, MissingRuntime, WrongMachine
from emoexport.files import sha256_of
from emoexport.manifest import PackageEntry
from emoexport.pass_engine import CascadeEngine
from emoexport.precision import PRECISIONS

__all__ = [
    "can_open",
    "certificate_here",
    "certificate_notes",
    "file_for",
    "graphs_of",
    "noted",
    "open_cascade",
    "open_engines",
    "open_members",
    "origin_of",
    "sizes_of",
    "where_it_runs",
]


def open_engines(
    bundle: Bundle,
    *,
    engines: list[str] | None = None,
    device: str | None = None,
    precisions: list[str] | None = None,
    threads: int | None = None,
    cache: Path | None = None,
    profiled: bool = False,
    note: Callable[[str], object] = lambda _: None,
) -> list[Engine]:
    """Open every graph of a bundle with every runtime, and what was compiled for this machine.

    Args:
        bundle: the bundle.
        engines: names of backends; None for all that are usable here.
        device: if none is named, only those that run on it, `cpu` or `cuda`; None for both.
        precisions: None for all of the bundle.
        threads: how many each runtime may use.
        cache: where runtimes that can keep what they compile.
        profiled: whether they are to tell what they execute.
        note: told why an engine that nobody named is left out: its runtime lacks something after all, or it was built
            for another machine.

    Raises:
        MissingRuntime: if no runtime is usable, or one that was named lacks something.
        BadBundle: if the bundle has nothing of a precision or for an engine asked for.
        WrongMachine: if an engine that was named was built for another machine.
    """
    limits: dict[str, Any] = {"face_shape": bundle.manifest.face_shape, "max_batch": bundle.manifest.max_batch}
    limits |= {"threads": threads, "cache": cache, "profiled": profiled}
    opened: list[Engine] = []
    has_file: set[str] = set()
    backends = [row for row in backends_named(engines) if engines or device in (None, row.device)]
    for precision in _precisions_of(bundle, precisions):
        for backend in backends:
            try:
                file = file_for(bundle, backend, precision)
                if file is None:
                    continue
                has_file.add(backend.name)
                opened.append(open_engine(backend, file, precision=precision, **limits))
            except (MissingRuntime, WrongMachine) as err:
                if engines:
                    raise
                note(f"{backend.name}-{precision} is left out: {err}")
    if not opened and not engines:
        raise MissingRuntime("no engine of this bundle runs here.", hint="emoexport doctor")
    for name in engines or ():
        if name not in has_file:
            backend = BACKENDS[name]
            asked = f"{' or '.join(precisions)} " if precisions else ""
            raise BadBundle(
                f"{bundle.path} has no {asked}{'engine' if backend.built_from else 'graph'} for {name}, which takes "
                f"{', '.join(backend.precisions)}.",
                hint=_command_for(bundle, backend),
            )
    for name in precisions or ():
        if name not in {engine.precision for engine in opened}:
            raise MissingRuntime(
                f"{name} is asked for, and no engine that was opened is of it; those that take it are "
                f"{', '.join(row.name for row in BACKENDS.values() if name in row.precisions)}.",
                hint="emoexport doctor",
            )
    return opened


def open_cascade(
    bundle: Bundle, record: CascadeRecord, *, threads: int | None = None, cache: Path | None = None
) -> CascadeEngine:
    """Open a cascade of a bundle.

    Args:
        bundle: the bundle.
        record: as `cascade_record.read_cascade` read and checked it.
        threads: how many its runtime may use.
        cache: where a runtime that can keeps what it compiles.

    Raises:
        MissingRuntime: if its runtime is not installed, or lacks something.
        WrongMachine: if it was built for another machine.
    """
    (backend,) = backends_named([record.backend])
    face_shape = bundle.manifest.face_shape
    members = open_members(
        [bundle.path / CASCADES / record.engine / file for file in record.graphs],
        backend,
        record.calls,
        precision=record.precision,
        face_shape=face_shape,
        threads=threads,
        cache=cache,
    )
    return CascadeEngine(members, record.cascade, face_shape=face_shape, calls=record.calls)


def open_members(
    graphs: Sequence[Path],
    backend: Backend,
    calls: Calls,
    *,
    precision: str,
    face_shape: tuple[int, int, int],
    threads: int | None = None,
    cache: Path | None = None,
) -> list[Engine]:
    """Open the graphs of single passes, one a member, as `pass_graph.write_pass_graphs` wrote them.

    Args:
        graphs: the files.
        backend: that opens graphs.
        calls: the numbers of passes that they are called with.
        precision: of the graphs.
        face_shape: `(H, W, C)` of the faces, without the row that a graph of passes has more.
        threads: how many the runtime may use.
        cache: where a runtime that can keeps what it compiles.
    """
    height, width, channels = face_shape
    settings: dict[str, Any] = {"precision": precision, "max_batch": calls.sizes[-1], "threads": threads}
    settings |= {"cache": cache, "sizes": calls.sizes if calls.prepared else ()}
    return [open_engine(backend, graph, face_shape=(height + 1, width, channels), **settings) for graph in graphs]


def can_open(bundle: Bundle, backend: Backend, precision: str) -> str:
    """Why a backend opens nothing of a bundle at a precision; empty if it can. Nothing is loaded."""
    if not backend.is_installed():
        return f"not installed (pip install {backend.requirement})"
    try:
        file = file_for(bundle, backend, precision)
    except EmoexportError as err:
        return str(err).rstrip(".")
    return "" if file else f"the bundle has no {'engine' if backend.built_from else 'graph'} of it"


def sizes_of(bundle: Bundle) -> dict[str, int]:
    """Bytes of each graph with its weights, by precision, and of what was built of them, by name of the engine."""
    return bundle.sizes() | {name: passport.bytes for name, passport in passports_in(bundle.path).items()}


class Named(Protocol):
    """An engine, or the name of one."""

    @property
    def backend(self) -> str: ...
    @property
    def precision(self) -> str: ...
    @property
    def name(self) -> str: ...


def origin_of(bundle: Bundle, engine: Named) -> tuple[str, str]:
    """What an engine of a bundle was opened from: the file, relative to the bundle, and its SHA-256.

    That of a graph is followed by that of its weights, where they stand beside it. That of a cascade is of its record,
    which has those of its graphs.
    """
    if is_cascade(engine.name):
        file = f"{CASCADES}/{engine.name}/{CASCADE_FILE}"
        return file, sha256_of(bundle.path / file)
    backend, manifest = BACKENDS[engine.backend], bundle.manifest
    if not backend.built_from:
        return manifest.graphs[engine.precision].file, bundle.graph_sha256(engine.precision)
    if backend.built_from == "fold":
        file = manifest.engines[engine.name].file
        return file, manifest.files[file].sha256
    file = f"engines/{engine.name}.engine"
    return file, Passport.read(bundle.path / file).sha256


def where_it_runs(engine: Engine) -> dict[str, str]:
    """The runtime of an engine with its version, and the processor, or the GPU and its driver."""
    runtime = " ".join(filter(None, [getattr(engine, "runtime", ""), getattr(engine, "version", "")]))
    if BACKENDS[engine.backend].device == "cpu":
        return {"runtime": runtime, "processor": describe_processor()}
    versions = versions_of("tensorrt", "tensorrt-cu12", "tensorrt-cu13", "tensorrt-rtx-cu13")
    driver = kernel_driver()
    return {
        "runtime": runtime,
        "gpu": require_device().name,
        **({"kernel_driver": driver} if driver else {}),
        **versions,
    }


def certificate_here(bundle: Bundle, engine: Engine) -> tuple[Certificate | None, str]:
    """The certificate of an engine, None if there is none; and why it says nothing of it here, empty if it does."""
    found = read_certificate(bundle.path, engine.name)
    stale = found.stale_because(origin_of(bundle, engine)[1], where_it_runs(engine)) if found else ""
    return found, stale


def certificate_notes(bundle: Bundle, opened: Sequence[Engine], batches: Sequence[int]) -> list[str]:
    """What a user of these engines must know of their certificates, a sentence each; none where all is certified.

    Args:
        bundle: the bundle.
        opened: engines of it.
        batches: the numbers of faces in a call that they are to be used with.
    """
    missing, stale, others, untried = [], [], [], []
    cascades: list[str] = []
    wanted: set[int] = set()
    for engine in opened:
        found, why = certificate_here(bundle, engine)
        if is_cascade(engine.name):
            cascades += _cascade_note(bundle, engine, found, why, batches)
        elif found is None:
            missing.append(engine.name)
        elif why:
            stale.append(f"{engine.name} ({why})")
        elif found.verdict != "certified":
            others.append(f"{engine.name} ({found.verdict})")
        elif batches_left := found.lacks([batch for batch in batches if batch <= engine.max_batch]):
            untried.append(f"{engine.name} ({', '.join(map(str, batches_left))})")
            wanted |= {*found.batches, *batches_left}
    again = f"Next: emoexport verify {bundle.path}"
    at = "".join(f" --batch {batch}" for batch in sorted(wanted))
    return cascades + [
        f"{title}: {', '.join(names)}. {hint}"
        for title, names, hint in (
            ("No certificate", missing, again),
            ("Their certificates are stale", stale, again),
            ("Not certified", others, f"Why: {bundle.path / 'reports' / 'parity.md'}"),
            ("Certified, but not for these batches", untried, again + at),
        )
        if names
    ]


def _cascade_note(
    bundle: Bundle, engine: Engine, found: Certificate | None, stale: str, batches: Sequence[int]
) -> list[str]:
    """What a user of a cascade must know of its certificate; nothing if all is certified."""
    again = f"Next: emoexport cascade {bundle.path} --engine {engine.backend} --precision {engine.precision}"
    if found is None:
        return [f"No certificate: {engine.name}. {again}"]
    if stale:
        return [f"The certificate of {engine.name} is stale: {stale}. {again}"]
    if found.verdict != "certified":
        return [f"Not certified: {engine.name}: {'; '.join(found.reasons)}."]
    if left := found.lacks(batches):
        tried = ", ".join(map(str, found.batches))
        return [f"{engine.name} was certified in calls of {tried} faces; here are {', '.join(map(str, left))}."]
    return []


def graphs_of(opened: Sequence[Engine]) -> set[str]:
    """The precisions of the graphs among what was opened."""
    return {engine.precision for engine in opened if BACKENDS[engine.backend].built_from != "fold"}


def noted(console: Console) -> Callable[[str], None]:
    """What shows a reader what `open_engines` left out."""
    return lambda sentence: console.print(sentence, style="yellow")


def file_for(bundle: Bundle, backend: Backend, precision: str) -> Path | None:
    """What a backend opens at a precision; None if it takes no such graph or the bundle has none for it."""
    manifest = bundle.manifest
    if backend.built_from == "graph":
        return _built_engine(bundle, backend, precision)
    if not backend.built_from:
        return bundle.graph(precision) if backend.takes(precision) and precision in manifest.graphs else None
    entry = manifest.engines.get(f"{backend.name}-{precision}")
    if entry is None:
        return None
    _require_this_machine(bundle, entry)
    return bundle.path / entry.file


def _built_engine(bundle: Bundle, backend: Backend, precision: str) -> Path | None:
    """The engine of a bundle that a backend built at a precision; None if there is none.

    Raises:
        BadBundle: if it has no passport, or was built from another graph than the bundle has.
    """
    engine = bundle.path / "engines" / f"{backend.name}-{precision}.engine"
    if not engine.exists() and not passport_of(engine).exists():
        return None
    hint = rebuild_command(engine, backend.name, precision)
    passport = Passport.read(engine, hint=hint)
    graphs = {entry.file: bundle.graph_sha256(name) for name, entry in bundle.manifest.graphs.items()}
    if graphs.get(passport.graph) != passport.graph_sha256:
        raise BadBundle(f"{engine} was built from another graph than {bundle.path} has.", hint=hint)
    return engine


def _require_this_machine(bundle: Bundle, entry: PackageEntry) -> None:
    """Before a package is loaded: machine code for another processor ends the process without a word.

    Raises:
        WrongMachine: if the processor lacks instructions, or PyTorch has another version.
    """
    lacking = [name for name in entry.instruction_sets if name not in instruction_sets()]
    version = versions_of("torch").get("torch", "none")
    found = ""
    if lacking:
        found = f"this processor lacks {', '.join(lacking)}"
    elif version != entry.torch:
        found = f"PyTorch here is {version}; needed is {entry.torch}"
    if found:
        raise WrongMachine(
            f"{bundle.path / entry.file} was compiled for another machine: {found}.",
            hint=f"{bundle.build_command()}; or name other engines with --engine",
        )


def _precisions_of(bundle: Bundle, asked: list[str] | None) -> list[str]:
    """Those asked for, or all that the bundle has, in the order of the table."""
    manifest = bundle.manifest
    packages, passports = manifest.engines.values(), passports_in(bundle.path).values()
    found = {*manifest.graphs, *(entry.precision for entry in packages), *(each.precision for each in passports)}
    for name in asked or ():
        if name not in found:
            bundle.graph(name)  # raises
    return asked or [name for name in PRECISIONS if name in found]


def _command_for(bundle: Bundle, backend: Backend) -> str:
    """The command that gives a bundle what a backend opens."""
    if backend.built_from == "graph":
        return f"emoexport build {bundle.path} --engine {backend.name}"
    return bundle.build_command() + " --engine inductor" * (
        backend.built_from == "fold" and not bundle.manifest.engines
    )
