"""The directory that `build` writes, and the manifest that says what is in it.

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
from typing import Annotated, Any, Concatenate, Literal, ParamSpec, Self, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from emoexport.clock import timestamp
from emoexport.config import Record, SealedRecord
from emoexport.decision import Decision
from emoexport.errors import BadBundle, BadInput
from emoexport.external_data import require_own_weights
from emoexport.files import changed_directory, lies_inside, sha256_of, write_text, writing
from emoexport.passes import Choice, Weight, pass_weights
from emoexport.precision import PRECISIONS, precisions_named
from emoexport.statistics import Estimate
from emoexport.temporaries import sweep_below

__all__ = [
    "MANIFEST_FILE",
    "Bundle",
    "CalibrationEntry",
    "FileEntry",
    "GateEntry",
    "GraphEntry",
    "LayoutEntry",
    "Manifest",
    "MemberEntry",
    "PackageEntry",
    "ProvenanceEntry",
    "ViewEntry",
    "refuse_absurd_size",
    "use_unchanged",
    "writes_bundle",
]

MANIFEST_FILE = "manifest.json"
_MOST_BYTES = 2**36
"""Of all files together; the largest bundles have a few thousand millions."""


class MemberEntry(Record):
    """A member that was folded."""

    sha256: str
    """Of its weights."""
    backbone: str
    epoch: int
    validation_accuracy: float
    parameters: int | None = Field(default=None, ge=0)
    """How many; None in a manifest from before they were counted, as in the next field."""
    gflop_a_pass: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """10^9 floating-point operations on one picture, as `flops.gflop_a_pass` counts them."""
    weight: Weight = 1.0
    """In the vote, beside those of the other members."""


class ViewEntry(Record):
    """A view that was folded."""

    name: str
    function: str
    parameters: dict[str, float]
    mirrored: bool
    weight: Weight = 1.0
    """In the vote, beside those of the other views."""
    same_as: str | None = None
    """The earlier view that shows the same picture: its passes are computed, and their scores given to both."""


class LayoutEntry(Record):
    """How the members stand in the graphs."""

    name: str
    """Of `fold.LAYOUTS`: `branches`, one subgraph a member; `stacked`, each operator once for all members."""
    reason: str
    """Why: it was asked for, or what was measured."""
    median_ms: dict[str, float] | None = None
    """By layout, of a call with one face; None where nothing was measured."""


class GraphEntry(Record):
    """A graph of the bundle."""

    file: str
    opset: int
    operators: dict[str, int]
    kept: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """By reason, the nodes of members that its conversion left in FP32, or unquantised."""


class PackageEntry(Record):
    """The fold compiled ahead of time, and the machine that it needs."""

    file: str
    backend: str
    """Of `engines.BACKENDS`."""
    precision: str
    torch: str
    """The version that compiled it, which alone loads it."""
    instruction_sets: tuple[str, ...]
    """Of the processor, as `engines.machine.instruction_sets` names them."""
    seconds: float
    """How long it took."""


class FileEntry(Record):
    """A file of the bundle."""

    sha256: str
    bytes: int = Field(ge=0)


class CalibrationEntry(Record):
    """Where the ranges of the activations are from."""

    file: str
    method: str
    faces: int
    data: str
    split: str
    random: bool = False
    """Whether it is noise, not faces."""

    def options(self) -> list[str]:
        """The options of `build` that calibrate like this, as far as they are not the usual ones."""
        method = [] if self.method == "min-max" else ["--calib-method", self.method]
        size = [] if self.faces == 512 else ["--calib-size", str(self.faces)]
        return [*method, *size, *(["--calib-random"] if self.random else [])]


class GateEntry(Record):
    """Whether a graph of 8 bits is worth having on the machine that built it."""

    verdict: Literal["recommended", "not recommended", "not judged"]
    reason: str
    engine: str | None = None
    """The fastest of its graph."""
    rival: str | None = None
    """The fastest of a graph of 16 or 32 bits."""
    times_as_fast: Estimate | None = None
    """As the rival, in turn, 95 % interval."""
    gain_points: Estimate | None = None
    """Accuracy of the engine less that of the rival on the same faces, paired 95 % interval."""
    bound_points: float | None = None
    """Its lower bound, one-sided at 95 %."""
    faces: int | None = None


_Side = Annotated[int, Field(ge=1, le=4096)]


class ProvenanceEntry(Record):
    """What made a bundle, and what it was made of besides what the manifest says already."""

    source_sha256: str
    """Of emoexport's own files: one that was edited is another package under the same version."""
    python: str
    platform: str
    processor: str
    materials: dict[str, str]
    """By path, relative to the run, SHA-256 of what was read besides the members' weights."""
    sbom: str
    """The file with the bill of materials, in CycloneDX 1.6: members, faces, and packages with what they need."""


class Manifest(SealedRecord):
    """`manifest.json`."""

    schema_version: Literal[1] = 1
    created: str | None = None
    """UTC, ISO 8601, in a manifest of before the same inputs gave the same bytes."""
    face_shape: tuple[_Side, _Side, Literal[1, 3]]
    """`(H, W, C)` of the uint8 faces."""
    max_batch: int = Field(ge=1, le=2**16)
    labels: tuple[str, ...]
    run: str = Field(pattern=r"^[^\x00]*$")
    """The training run, relative to the bundle where that is possible: the reference is rebuilt from it."""
    members: tuple[MemberEntry, ...] = Field(min_length=1)
    views: tuple[ViewEntry, ...] = Field(min_length=1)
    choice: Choice = Choice()
    """What of the run was asked for."""
    vote: Literal["prob-mean"] = "prob-mean"
    decision: Decision
    layout: LayoutEntry = LayoutEntry(name="branches", reason="the only layout there was")
    rewrites: dict[str, int] | None = None
    """By name in `rewrites.REWRITES`, how many nodes each took out of all members together; None in a manifest from
    before there were any."""
    graphs: dict[str, GraphEntry]
    """By precision."""
    gate: dict[str, GateEntry] = Field(default_factory=dict)
    """By precision of 8 bits; those that are not recommended have no graph unless it was asked to be kept."""
    engines: dict[str, PackageEntry] = Field(default_factory=dict)
    """What was compiled ahead of time, by name of the engine."""
    calibration: CalibrationEntry | None = None
    tuning: str | None = None
    """The file with the trials by which a graph of 8 bits leaves blocks in FP32; None where it leaves none."""
    data: dict[str, Any]
    """What the run says of its faces."""
    versions: dict[str, str]
    provenance: ProvenanceEntry | None = None
    """None in a manifest from before it was recorded."""
    files: dict[str, FileEntry]
    """Every file but the manifest, the reports, and engines with a passport."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.labels != self.decision.labels:
            raise ValueError("the labels are not those of the decision")
        if unknown := {*self.graphs, *self.gate} - {*PRECISIONS}:
            raise ValueError(f"{min(unknown)!r} is no precision; known are {', '.join(PRECISIONS)}")
        names = [view.name for view in self.views]
        if any(view.same_as not in (None, *names[:number]) for number, view in enumerate(self.views)):
            raise ValueError("a view is the same as one that does not come before it")
        if self.choice.passes:
            chosen = self.choice.among(max(self.choice.numbers), ())
            if (len(chosen.members), len(chosen.views)) != (len(self.members), len(self.views)):
                raise ValueError("the passes that are chosen are not of these members and views")
        return self

    @property
    def opened(self) -> dict[str, GraphEntry | PackageEntry]:
        """What engines are opened from: the graphs, by precision, and the packages, by name of the engine."""
        return {**self.graphs, **self.engines}

    @property
    def kept_rejected(self) -> list[str]:
        """The precisions that are not recommended and have a graph all the same."""
        return [name for name in self.graphs if name in self.gate and self.gate[name].verdict == "not recommended"]

    @property
    def weights(self) -> NDArray[np.float64] | None:
        """Of every pass in the vote, `(K, V)`, sum 1, and 0 for passes left out; None for equal ones of all."""
        if self.choice.passes:  # in their order members and views were folded
            return self.choice.among(max(self.choice.numbers), ()).weights()
        return pass_weights([member.weight for member in self.members], [view.weight for view in self.views])

    @property
    def merged_weights(self) -> NDArray[np.float64]:
        """Of every pass that is computed, in the vote, `(K, V)`, sum 1.

        Those of a view that shows what an earlier one does have 0, and the earlier one has their weight too.
        """
        shape = len(self.members), len(self.views)
        voting = np.full(shape, 1 / np.prod(shape)) if self.weights is None else self.weights
        place = {view.name: number for number, view in enumerate(self.views)}
        found = np.zeros(shape)
        for number, view in enumerate(self.views):
            found[:, place[view.same_as or view.name]] += voting[:, number]
        return found

    @property
    def computed(self) -> NDArray[np.bool_]:
        """Which passes are computed, `(K, V)`: not those left out, nor those of a view that shows what another does."""
        return self.merged_weights > 0

    @property
    def gflop_a_face(self) -> float | None:
        """10^9 floating-point operations of all passes that are computed; None where they were not counted."""
        counted = [member.gflop_a_pass for member in self.members if member.gflop_a_pass is not None]
        if len(counted) < len(self.members):
            return None
        return float(self.computed.sum(axis=1) @ counted)

    @property
    def passes_a_face(self) -> int:
        """How many are computed."""
        return int(self.computed.sum())


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
        if not _run_of(path, manifest).is_dir():
            again = "copy it anew from where it was built"
        if not manifest.is_intact():
            raise BadBundle(f"{path / MANIFEST_FILE} was changed after it was written.", hint=again)
        refuse_absurd_size(path, manifest.files, hint=again)
        for name, file in manifest.files.items():
            _check_file(path, name, file, hint=again)
        for named in [*(entry.file for entry in manifest.opened.values()), manifest.tuning]:
            if named is not None and named not in manifest.files:
                raise BadBundle(f"{path}: the manifest lists no hash for {named}.", hint=again)
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
            BadBundle: if it was replaced since it was opened: what is known of it does not belong into the new one.
        """
        with writing(self.path):
            if not self.is_current:
                raise BadBundle(
                    f"{self.path} was replaced or removed since it was opened.", hint="the same command again"
                )
            sweep_below(self.path)
            yield

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


def refuse_absurd_size(folder: Path, files: Mapping[str, FileEntry], *, hint: str) -> None:
    """Before every byte is read, so that a hole of a disk's size is not.

    Raises:
        BadBundle: if files are said to have more bytes together than a bundle can have.
    """
    total = sum(file.bytes for file in files.values())
    if total > _MOST_BYTES:
        raise BadBundle(f"{folder} would have {total:,} bytes; the limit is {_MOST_BYTES:,}.", hint=hint)


_P = ParamSpec("_P")
_T = TypeVar("_T")


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


_TRIES = 5
"""To open a bundle that is replaced meanwhile."""


def _digest_at(bundle: Path) -> str:
    """That of the manifest there; nothing if there is none that can be read."""
    try:
        return Manifest.parse_json(bundle / MANIFEST_FILE, inside=bundle).digest
    except BadInput:
        return ""


def _run_of(bundle: Path, manifest: Manifest) -> Path:
    return (bundle.resolve() / manifest.run).resolve()


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


def _check_file(bundle: Path, name: str, entry: FileEntry, *, hint: str) -> None:
    file = bundle / name
    is_plain = "\\" not in name and ".." not in PurePosixPath(name).parts
    try:
        if not is_plain or not lies_inside(file, bundle) or file.is_symlink():
            raise BadBundle(f"{bundle}: the manifest names '{name}', which lies outside the bundle.", hint=hint)
        if not file.is_file():
            raise BadBundle(f"{file} is missing.", hint=hint)
        size = file.stat().st_size
        if size != entry.bytes:
            raise BadBundle(f"{file} has {size:,} bytes; the manifest says {entry.bytes:,}.", hint=hint)
        if sha256_of(file) != entry.sha256:
            raise BadBundle(f"{file} was changed after it was written: its SHA-256 is another.", hint=hint)
    except OSError as err:  # its name may be too long, even
        raise BadBundle(f"{file} cannot be read: {err.strerror}.", hint=hint) from err
