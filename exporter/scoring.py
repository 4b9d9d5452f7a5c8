"""A bundle's passes over a split of labelled faces, as a score cube."""

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from emoexport.bundle import Bundle
from emoexport.cube import Cube, CubeAccuracy, CubeRequest, OtherCube, compute_cube
from emoexport.engines import BACKENDS
from emoexport.engines.base import Engine
from emoexport.engines.torch_engine import TorchEngine
from emoexport.errors import EmoexportError, UsageError
from emoexport.manifest import MemberEntry, ViewEntry
from emoexport.opening import open_engines
from emoexport.progress import progress_bar
from emoexport.run_faces import data_name, data_of_run, describe_faces, drawn_faces, validation_in
from emoexport.sessions import open_judge, open_reference, run_of
from emoexport.train.audit import face_hashes
from emoexport.train.checkpoint import RunRecord
from emoexport.train.dataset import DataSet, Faces

__all__ = [
    "Scored",
    "SplitFaces",
    "apart",
    "open_scorer",
    "read_choosing_faces",
    "read_split",
    "reference_engine",
    "score_faces",
    "score_split",
]

_VALIDATION = "validation"
"""The split with the faces that members were validated on."""


class SplitFaces(NamedTuple):
    """The faces of a split, as they were read."""

    faces: Faces
    row_sets: dict[str, NDArray[np.bool_]]
    """As `run_faces.drawn_faces` has them."""
    unfit: str
    """Why they show nothing of how the members do on new faces; empty where they do."""
    data: str
    """What the data is called."""
    split: str


class Scored(NamedTuple):
    """A cube, and how often its vote is right."""

    cube: Cube
    accuracies: tuple[CubeAccuracy, ...]
    """With the bundle's decision: on all rows, and on the clean ones where these are fewer."""
    faces: Faces
    """That were scored."""
    rows: NDArray[np.bool_]
    """Which rows are clean, `(N,)`; all where none are or all are."""
    unfit: str
    """As of `SplitFaces`."""

    @property
    def title(self) -> str:
        """All of the faces, as people name them."""
        return f"{self.cube.record.data}, {self.cube.record.split}, {self.cube.record.faces:,} faces"

    @property
    def clean_title(self) -> str:
        """The clean rows likewise."""
        return f"{self.cube.record.data}, {self.cube.record.split}, {int(self.rows.sum()):,} clean rows"


def score_split(
    bundle: Bundle,
    out: Path | None = None,
    *,
    engine: str = "torch",
    precision: str = "fp32",
    data: str | None = None,
    split: str | None = None,
    run: Path | None = None,
    limit: int | None = None,
    batch: int = 64,
    threads: int | None = None,
    label_order: str | None = None,
    skip_bad: bool = False,
    force: bool = False,
    console: Console,
) -> Scored:
    """Compute the score cube of a bundle on a split, or go on with an unfinished one.

    Args:
        bundle: the bundle.
        out: the cube's directory; None for `cubes/<bundle>-<split>-<engine>-<precision>`.
        engine: a name of `BACKENDS`, or `torch` for the reference.
        precision: which graph of the bundle the engine runs.
        data: where the faces are; None for where the run read them.
        split: which split; None for the one meant for testing. `validation` are the faces that the members were
            validated on, also where the run drew them from a training split.
        run: where the run is now, if it was moved.
        limit: use this many faces only, drawn at random.
        batch: faces in a call; what is done is recorded after each.
        threads: how many the runtime may use.
        label_order: what numbered labels mean; None for what they meant to the run.
        skip_bad: leave out faces that cannot be read.
        force: replace a cube that stands there, and forget an unfinished one.
        console: where progress is shown.

    Raises:
        UsageError: if there is no such engine, precision or split, or at `out` is something else.
        MissingRuntime: if the engine is not installed.
        BadBundle: if the bundle has no graph of the precision.
        BadCheckpoint: if the run is not there or not the one that was folded.
        BadData: if the faces cannot be read.
        CheckFailed: if the engine answers no probabilities.
    """
    _require_known(engine, precision)
    _require_all_passes(bundle)
    opened = open_scorer(bundle, engine, precision, threads=threads, run=run)
    limits: dict[str, Any] = {"limit": limit, "label_order": label_order, "skip_bad": skip_bad}
    read = read_split(bundle, data=data, split=split, run=run, **limits, console=console)
    return score_faces(bundle, opened, read, out, batch=batch, force=force, console=console)


def open_scorer(
    bundle: Bundle, engine: str, precision: str = "fp32", *, threads: int | None = None, run: Path | None = None
) -> Engine:
    """An engine of a bundle, or the reference itself where `torch` is named."""
    if engine == TorchEngine.backend:
        return open_judge(bundle, open_reference(bundle, run)[0], threads)
    return open_engines(bundle, engines=[engine], precisions=[precision], threads=threads)[0]


def read_split(
    bundle: Bundle,
    *,
    data: str | None,
    split: str | None,
    run: Path | None = None,
    limit: int | None = None,
    label_order: str | None = None,
    skip_bad: bool = False,
    console: Console,
) -> SplitFaces:
    """Read the faces of a split, and say what was read; the arguments are those of `score_split`."""
    where, record = run_of(bundle, run)
    dataset = data_of_run(where, record, data, label_order=label_order, skip_bad=skip_bad)
    split = split or dataset.evaluation_split()
    if split == _VALIDATION and split not in dataset.splits:
        dataset = _with_validation(dataset, validation_in(dataset, record))
    return _described(dataset, split, record, limit, console)


def read_choosing_faces(bundle: Bundle, *, data: str | None, run: Path | None, console: Console) -> SplitFaces:
    """Read the faces that the members were validated on: in some data if they are there, else where the run read them.

    Args:
        bundle: the bundle.
        data: that may have them, or other faces only; None for where the run read its own.
        run: where the run is now, if it was moved.
        console: where it is said what was read.

    Raises:
        BadData: if they are nowhere.
    """
    where, record = run_of(bundle, run)
    if data is not None:
        with contextlib.suppress(EmoexportError):  # of whatever kind: these are not the faces
            dataset = data_of_run(where, record, data)
            dataset = _with_validation(dataset, validation_in(dataset, record))
            return _described(dataset, _VALIDATION, record, None, console)
    dataset = data_of_run(where, record)
    dataset = _with_validation(dataset, validation_in(dataset, record))
    return _described(dataset, _VALIDATION, record, None, console)


def score_faces(
    bundle: Bundle,
    engine: Engine,
    read: SplitFaces,
    out: Path | None = None,
    *,
    batch: int = 64,
    force: bool = False,
    replace: bool = False,
    console: Console,
) -> Scored:
    """Compute the score cube of an engine on faces that were read, or go on with an unfinished one.

    Args:
        bundle: that the engine is of.
        engine: with scores of all passes.
        read: the faces.
        out: the cube's directory; None for `cubes/<bundle>-<split>-<engine>-<precision>`.
        batch: faces in a call; what is done is recorded after each.
        force: replace a cube that stands there, and forget an unfinished one.
        replace: the same, but only where it is of something else: for those that keep cubes to save time.
        console: where progress is shown.

    Raises:
        UsageError: if passes are left out, or at `out` is something else.
        CheckFailed: if the engine answers no probabilities.
    """
    _require_all_passes(bundle)
    faces = read.faces
    target = out or Path("cubes") / f"{bundle.path.resolve().name}-{read.split}-{engine.name}"

    def computed(*, anew: bool) -> Cube:
        with progress_bar(console, f"{engine.name}: every pass of every face", len(faces)) as advance:
            return compute_cube(
                engine.scores,
                faces.images,
                faces.labels,
                target,
                _request(bundle, engine, read),
                batch_size=min(batch, bundle.manifest.max_batch),
                progress=advance,
                note=console.print,
                force=anew,
            )

    try:
        cube = computed(anew=force)
    except OtherCube:
        if not replace:
            raise
        console.print(f"{target} is of something else, and is computed anew.")
        cube = computed(anew=True)
    decision = bundle.manifest.decision
    accuracies = tuple(cube.accuracy(decision, mask, rows=rows) for rows, mask in read.row_sets.items())
    return Scored(cube, accuracies, faces, read.row_sets.get("clean", read.row_sets["all"]), read.unfit)


def reference_engine() -> str:
    """What computes the passes of the FP32 reference: a runtime of the CPU that is here, or else PyTorch itself."""
    usable = [row.name for row in BACKENDS.values() if row.takes("fp32") and row.device == "cpu" and row.is_usable()]
    return usable[0] if usable else TorchEngine.backend


def apart(shown: Scored, fitting: Scored) -> Scored:
    """The same faces without those that chose or fitted something, to the pixel.

    Raises:
        UsageError: if none is left.
    """
    seen = set(face_hashes(fitting.faces.images))
    rows = shown.rows & np.array([name not in seen for name in face_hashes(shown.faces.images)])
    if not rows.any():
        raise UsageError(
            "the faces that are to show it are those that chose; needed are others, which had no part in it.",
            hint="--data, or --split, names others",
        )
    return shown._replace(rows=rows)


def _require_known(engine: str, precision: str) -> None:
    """Before members are loaded: a wrong name is told at once."""
    known = (TorchEngine.backend, *BACKENDS)
    if engine not in known:
        raise UsageError(f"'{engine}' is no engine; known are {', '.join(known)}.")
    if engine == TorchEngine.backend and precision != "fp32":
        raise UsageError(
            f"{engine} is the reference, which computes in fp32; found is {precision}.",
            hint="--engine names a runtime of graphs",
        )


def _require_all_passes(bundle: Bundle) -> None:
    if bundle.manifest.choice.passes:
        raise UsageError(
            f"{bundle.path} leaves passes out; a cube holds those of all members on all views.",
            hint="name a bundle that was built without --pass",
        )


def _with_validation(dataset: DataSet, faces: Faces) -> DataSet:
    return dataclasses.replace(dataset, splits={**dataset.splits, _VALIDATION: faces})


def _described(dataset: DataSet, split: str, record: RunRecord, limit: int | None, console: Console) -> SplitFaces:
    faces, row_sets = drawn_faces(dataset, split, limit)
    unfit = describe_faces(dataset, split, record, console)
    return SplitFaces(faces, row_sets, unfit, data_name(dataset.source), split)


def _request(bundle: Bundle, engine: Engine, read: SplitFaces) -> CubeRequest:
    faces = read.faces
    labels = bundle.manifest.labels
    counts = np.bincount(faces.labels, minlength=len(labels))
    return CubeRequest(
        data=read.data,
        split=read.split,
        faces=len(faces),
        data_sha256=faces.sha256(),
        label_counts={name: int(count) for name, count in zip(labels, counts, strict=True)},
        members=tuple(member.sha256 for member in bundle.manifest.members),
        views=tuple(view.name for view in bundle.manifest.views),
        member_weights=_other_than_1(bundle.manifest.members),
        view_weights=_other_than_1(bundle.manifest.views),
        labels=labels,
        engine=engine.backend,
        precision=engine.precision,
        bundle_digest=bundle.manifest.digest,
    )


def _other_than_1(entries: Sequence[MemberEntry | ViewEntry]) -> tuple[float, ...]:
    """Their weights; none where all are 1, as in a cube from before there were weights."""
    weights = tuple(entry.weight for entry in entries)
    return weights if set(weights) != {1.0} else ()
