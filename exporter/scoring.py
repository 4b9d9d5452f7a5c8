"""A bundle's passes over a split of labelled faces, as a score cube."""

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from emoexport.bundle import Bundle, MemberEntry, ViewEntry
from emoexport.cube import Cube, CubeAccuracy, CubeRequest, compute_cube
from emoexport.engines import BACKENDS
from emoexport.engines.base import Engine
from emoexport.engines.torch_engine import TorchEngine
from emoexport.errors import EmoexportError, UsageError
from emoexport.opening import open_engines
from emoexport.progress import progress_bar
from emoexport.run_faces import data_name, data_of_run, describe_faces, drawn_faces, validation_faces
from emoexport.sessions import open_judge, open_reference, run_of
from emoexport.train.audit import face_hashes
from emoexport.train.dataset import Faces

__all__ = ["Scored", "apart", "choosing_data", "reference_engine", "score_split"]


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
    """Why they show nothing of how the members do on new faces; empty where they do."""


def score_split(
    bundle: Bundle,
    out: Path | None = None,
    *,
    engine: str | Engine = "torch",
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
    replace: bool = False,
    console: Console,
) -> Scored:
    """Compute the score cube of a bundle on a split, or go on with an unfinished one.

    Args:
        bundle: the bundle.
        out: the cube's directory; None for `cubes/<bundle>-<split>-<engine>-<precision>`.
        engine: a name of `BACKENDS`, or `torch` for the reference; or an engine of the bundle that is open.
        precision: which graph of the bundle the engine that is named runs.
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
        replace: the same, but only where it is of something else: for those that keep cubes to save time.
        console: where progress is shown.

    Raises:
        UsageError: if there is no such engine, precision or split, or at `out` is something else.
        MissingRuntime: if the engine is not installed.
        BadBundle: if the bundle has no graph of the precision.
        BadCheckpoint: if the run is not there or not the one that was folded.
        BadData: if the faces cannot be read.
        CheckFailed: if the engine answers no probabilities.
    """
    if isinstance(engine, str):
        _require_known(engine, precision)
    if bundle.manifest.choice.passes:
        raise UsageError(
            f"{bundle.path} leaves passes out; a cube holds those of all members on all views.",
            hint="name a bundle that was built without --pass",
        )
    where, record = run_of(bundle, run)
    opened = _open(bundle, engine, precision, threads, run) if isinstance(engine, str) else engine
    dataset = data_of_run(where, record, data, label_order=label_order, skip_bad=skip_bad)
    split = split or dataset.evaluation_split()
    if split == "validation" and split not in dataset.splits:
        validation = validation_faces(where, record, data)
        dataset = dataclasses.replace(dataset, splits={**dataset.splits, split: validation})
    faces, row_sets = drawn_faces(dataset, split, limit)
    unfit = describe_faces(dataset, split, record, console)
    request = _request(bundle, opened, faces, data=data_name(dataset.source), split=split)
    target = out or Path("cubes") / f"{bundle.path.resolve().name}-{split}-{opened.name}"

    def computed(*, anew: bool) -> Cube:
        with progress_bar(console, f"{opened.name}: every pass of every face", len(faces)) as advance:
            return compute_cube(
                opened.scores,
                faces.images,
                faces.labels,
                target,
                request,
                batch_size=min(batch, bundle.manifest.max_batch),
                progress=advance,
                note=lambda sentence: console.print(sentence, highlight=False, soft_wrap=True),
                force=anew,
            )

    try:
        cube = computed(anew=force)
    except UsageError:
        if not replace:
            raise
        console.print(f"{target} is of something else, and is computed anew.", highlight=False, soft_wrap=True)
        cube = computed(anew=True)
    decision = bundle.manifest.decision
    accuracies = tuple(cube.accuracy(decision, mask, rows=rows) for rows, mask in row_sets.items())
    return Scored(cube, accuracies, faces, row_sets.get("clean", row_sets["all"]), unfit)


def reference_engine() -> str:
    """What computes the passes of the FP32 reference: a runtime of the CPU that is here, or else PyTorch itself."""
    usable = [row.name for row in BACKENDS.values() if row.takes("fp32") and row.device == "cpu" and row.is_usable()]
    return usable[0] if usable else TorchEngine.backend


def choosing_data(bundle: Bundle, data: str | None, run: Path | None = None) -> str | None:
    """Where the faces are that the members were validated on: in some data, or else where the run read them.

    Args:
        bundle: the bundle.
        data: that may have them, or other faces only; None for where the run read its own.
        run: where the run is now, if it was moved.
    """
    if data is not None:
        where, record = run_of(bundle, run)
        with contextlib.suppress(EmoexportError):  # of whatever kind: these are not the faces
            validation_faces(where, record, data)
            return data
    return None


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


def _open(bundle: Bundle, engine: str, precision: str, threads: int | None, run: Path | None) -> Engine:
    if engine == TorchEngine.backend:
        return open_judge(bundle, open_reference(bundle, run)[0], threads)
    return open_engines(bundle, engines=[engine], precisions=[precision], threads=threads)[0]


def _request(bundle: Bundle, engine: Engine, faces: Faces, *, data: str, split: str) -> CubeRequest:
    labels = bundle.manifest.labels
    counts = np.bincount(faces.labels, minlength=len(labels))
    return CubeRequest(
        data=data,
        split=split,
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
