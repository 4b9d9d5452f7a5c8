"""The directory that `build` writes.

build/x/
  manifest.json        members, views, vote, decision, input and output, versions, SHA-256 of every file
  labels.txt
  sbom.cdx.json        what it was made of, in CycloneDX
  model.fp32.onnx      and a graph for each further precision; large weights beside it in .data
  calibration.json     ranges, method, hashes of the faces (where a precision needed them)
  tuning.json          which blocks stay in FP32, and the trials that chose them (where it was given)
  engines/*.pt2        the fold compiled for one kind of machine (where it was asked for)
  engines/*.engine     graphs compiled by TensorRT; not part of the manifest
  engines/*.passport.json  of every engine that was built or verified; not part of the manifest
  reports/             what verify and bench found; not part of the manifest
"""

import functools
import os
import shlex
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Concatenate, ParamSpec, TypeVar

from emoexport.clock import timestamp
from emoexport.config import Record
from emoexport.errors import BadBundle, BadInput
from emoexport.external_data import require_own_weights
from emoexport.files import changed_directory, lies_inside, sha256_of, write_text, writing
from emoexport.manifest import MANIFEST_FILE, FileEntry, Manifest
from emoexport.precision import PRECISIONS, precisions_named
from emoexport.temporaries import sweep_below

__all__ = ["Bundle", "check_files", "use_unchanged", "writes_bundle"]

_MOST_BYTES = 2**36
"""Of all files together; the largest bundles have a few thousand millions."""
_TRIES = 5
"""To open a bundle that is replaced meanwhile."""
_P = ParamSpec("_P")
_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A bundle whose files have been checked against its manifest."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: Path) -> "Bundle":
        """Read the manifest and check every file; of a bundle that is replaced meanwhile, the new one.

        Raises:
            BadBundle: if there is no bundle, or a file is missing, cut short, changed or outside of it, or a graph has
                its weights in a file that is not its own.
        """
        return use_unchanged(path, lambda opened: opened)

    @classmethod
    def _open(cls, path: Path) -> "Bundle":
        if not (path / MANIFEST_FILE).is_file():
            raise BadBundle(
                f"{path} is no bundle: there is no {MANIFEST_FILE} in it.",
                hint=_instead_of(path),
            )
        manifest = Manifest.parse_json(path / MANIFEST_FILE, inside=path, error=BadBundle)
        again = _command(path, manifest)
        if not os.path.isdir(_run_of(path, manifest)):  # noqa: PTH112 (it may lie where others may not look)
            again = "copy it anew from where it was built"
        if not manifest.is_intact():
            raise BadBundle(f"{path / MANIFEST_FILE} was changed after it was written.", hint=again)
        check_files(path, manifest.files, inside=path, hint=again)
        if unlisted := sorted(manifest.named - {*manifest.files}):
            raise BadBundle(f"{path}: the manifest lists no hash for {unlisted[0]}.", hint=again)
        for graph in manifest.graphs.values():
            require_own_weights(path / graph.file, listed=f"{graph.file}.data" in manifest.files)
        return cls(path=path, manifest=manifest)

    @property
    def is_current(self) -> bool:
        """Whether it still stands there, and was not replaced since it was opened."""
        return _digest_at(self.path) == self.manifest.digest

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Be the one command that writes into it, from here to the end of the block.

        Raises:
            Busy: if another command is writing it.
            BadBundle: if it was replaced since it was opened: what is known of it does not belong into the new one; or
                if there is a link in it that leads out: what is written there would be written elsewhere.
        """
        with writing(self.path):
            if not self.is_current:
                raise BadBundle(
                    f"{self.path} was replaced or removed since it was opened.", hint="the same command again"
                )
            self._refuse_ways_out()
            sweep_below(self.path)
            yield

    def _refuse_ways_out(self) -> None:
        for where, folders, files in os.walk(self.path):
            for path in (Path(where, name) for name in [*folders, *files]):
                if path.is_symlink() and not lies_inside(path, self.path):
                    raise BadBundle(
                        f"{path} leads out of the bundle, and something may be written there.", hint="remove this link"
                    )

    def graph(self, precision: str) -> Path:
        """The ONNX file of a precision.

        Raises:
            UsageError: if there is no such precision.
            BadBundle: if the bundle has none.
        """
        precisions_named([precision])
        if precision not in self.manifest.graphs:
            raise BadBundle(
                f"{self.path} has no {precision} graph; it has {', '.join(self.manifest.graphs)}.",
                hint=self.build_command(precision),
            )
        return self.path / self.manifest.graphs[precision].file

    def graph_sha256(self, precision: str) -> str:
        """What `files.sha256_of_graph` finds of a graph, from the manifest."""
        file, files = self.manifest.graphs[precision].file, self.manifest.files
        return "".join(files[name].sha256 for name in (file, f"{file}.data") if name in files)

    def size_of(self, precision: str) -> int:
        """Bytes of a precision's graph and its weights."""
        file = self.manifest.graphs[precision].file
        return sum(entry.bytes for name, entry in self.manifest.files.items() if name in {file, f"{file}.data"})

    def notes(self, engines: Collection[str]) -> tuple[str, ...]:
        """What a reader of any figure on this bundle must know, a sentence each.

        Args:
            engines: the precisions that some engine here was asked to run.
        """
        calibration = self.manifest.calibration
        noise = ["8-bit graphs were calibrated on random pictures: their figures tell nothing of real faces."]
        idle = [name for name in self.manifest.graphs if name not in engines]
        return (
            *(
                f"{PRECISIONS[name].title} is not recommended where this was built: {self.manifest.gate[name].reason}."
                for name in self.manifest.kept_rejected
            ),
            *(noise if calibration is not None and calibration.random else []),
            *([f"Not judged, no engine here runs it: {', '.join(idle)}."] if idle else []),
        )

    def sizes(self) -> dict[str, int]:
        """Bytes of each graph with its weights, by precision, and of each package, by name of the engine."""
        manifest = self.manifest
        packages = {name: manifest.files[entry.file].bytes for name, entry in manifest.engines.items()}
        return {precision: self.size_of(precision) for precision in manifest.graphs} | packages

    def build_command(self, *precisions: str, tuning: Path | None = None) -> str:
        """The command that makes this bundle again, with further precisions, and by another tuning."""
        return _command(self.path, self.manifest, *precisions, tuning=tuning)

    def write_report(
        self, name: str, report: Record, markdown: str, *, write: Callable[[Path], object] | None = None
    ) -> None:
        """Write `reports/<name>.json` and `.md` at once, and what goes with them.

        Args:
            name: of the report.
            report: for programs.
            markdown: for people.
            write: called with the folder to write more into it.

        Raises:
            Busy, BadBundle: as `writing`.
            DiskFull: if there is no room for it.
        """
        with self.writing(), changed_directory(self.path / "reports") as reports:
            write_text(reports / f"{name}.json", report.to_json())
            write_text(reports / f"{name}.md", markdown)
            if write is not None:
                write(reports)

    @property
    def built(self) -> str:
        """When it was written, UTC, ISO 8601."""
        return self.manifest.created or timestamp((self.path / MANIFEST_FILE).stat().st_mtime)

    def run(self) -> Path:
        """The training run that the bundle was built from."""
        return _run_of(self.path, self.manifest)


def check_files(folder: Path, files: Mapping[str, FileEntry], *, inside: Path, hint: str) -> None:
    """Hold files against their record.

    Args:
        folder: where they are.
        files: what they were, by path in the folder.
        inside: the bundle, which none may lead out of.
        hint: what comes next where one is another.

    Raises:
        BadBundle: if one is missing, cut short, changed, or outside of the bundle, or they are said to have more bytes
            together than a bundle can have: then nothing is read, as a hole of a disk's size would take hours.
    """
    total = sum(file.bytes for file in files.values())
    if total > _MOST_BYTES:
        raise BadBundle(f"{folder} would have {total:,} bytes; the limit is {_MOST_BYTES:,}.", hint=hint)
    for name, entry in files.items():
        file = folder / name
        is_plain = "\\" not in name and ".." not in PurePosixPath(name).parts
        try:
            if not is_plain or not lies_inside(file, inside) or file.is_symlink():
                raise BadBundle(f"{folder} lists '{name}', which lies outside the bundle.", hint=hint)
            if not file.is_file():
                raise BadBundle(f"{file} is missing.", hint=hint)
            size = file.stat().st_size
            if size != entry.bytes:
                raise BadBundle(f"{file} has {size:,} bytes; its record says {entry.bytes:,}.", hint=hint)
            if sha256_of(file) != entry.sha256:
                raise BadBundle(f"{file} was changed after it was written: its SHA-256 is another.", hint=hint)
        except OSError as err:  # its name may be too long, even
            raise BadBundle(f"{file} cannot be read: {err.strerror}.", hint=hint) from err


def writes_bundle(function: Callable[Concatenate[Bundle, _P], _T]) -> Callable[Concatenate[Bundle, _P], _T]:
    """Let a function that takes a bundle first be the one that writes into it, as long as it runs.

    Raises:
        Busy, BadBundle: as `Bundle.writing`.
    """

    @functools.wraps(function)
    def alone(bundle: Bundle, /, *args: _P.args, **settings: _P.kwargs) -> _T:
        with bundle.writing():
            return function(bundle, *args, **settings)

    return alone


def use_unchanged(path: Path, use: Callable[[Bundle], _T]) -> _T:
    """Open a bundle and do something with its files that takes a moment; again if it was replaced in that moment.

    Raises:
        BadBundle: if it is replaced again and again.
        Exception: as opening it or `use` does, of a bundle that stayed the same.
    """
    for _ in range(_TRIES):
        before = _digest_at(path)
        try:
            found = use(Bundle._open(path))  # its manifest may be a newer one than that before: then it is read again
        except Exception:
            if _digest_at(path) == before:
                raise
        else:
            if _digest_at(path) == before:
                return found
            del found  # before another is opened
    raise BadBundle(f"{path} was replaced {_TRIES} times while it was opened.", hint="wait until that has ended")


def _digest_at(bundle: Path) -> str:
    """That of the manifest there; nothing if there is none that can be read."""
    try:
        return Manifest.parse_json(bundle / MANIFEST_FILE, inside=bundle).digest
    except BadInput:
        return ""


def _run_of(bundle: Path, manifest: Manifest) -> Path:
    return Path(os.path.realpath(bundle / manifest.run))  # links in a circle are no error here


def _instead_of(path: Path) -> str:
    """What whoever took this for a bundle may have wanted."""
    if (path / "run.json").is_file():
        return f"emoexport build {shlex.quote(str(path))}"
    there = sorted(Path("build").glob(f"*/{MANIFEST_FILE}"))
    return f"name one that is there, as {there[0].parent}" if there else "emoexport build runs/x -o build/x"


def _command(bundle: Path, manifest: Manifest, *precisions: str, tuning: Path | None = None) -> str:
    asked = dict.fromkeys([*manifest.graphs, *manifest.gate, *precisions])
    flags = [f"--{precision}" for precision in asked if precision != "fp32"]
    if manifest.kept_rejected:
        flags.append("--keep-rejected")
    if manifest.max_batch != 256:
        flags += ["--max-batch", str(manifest.max_batch)]
    if tuning is None and manifest.tuning is not None:
        tuning = bundle / manifest.tuning
    if tuning is not None:
        flags += ["--tuning", str(tuning)]
    if manifest.layout.name != "branches":
        flags += ["--layout", manifest.layout.name]
    if manifest.calibration is not None:
        flags += manifest.calibration.options()
    if manifest.engines:
        flags += ["--engine", "inductor"]
    command = ["emoexport", "build", os.path.relpath(_run_of(bundle, manifest)), "-o", str(bundle)]
    chosen = [word for option in manifest.choice.options() for word in option.split(" ", 1)]
    return shlex.join([*command, *chosen, *flags])
