"""Calibration as `build` does it: on faces proven apart from those that judge, once as long as nothing changes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from emoexport.calib.observer import Observer
from emoexport.calib.ranges import activation_ranges, faces_to_run
from emoexport.calib.record import Calibration
from emoexport.calib.sampler import balanced_rows
from emoexport.calib.thresholds import method_named
from emoexport.errors import BadData, BadInput, UsageError
from emoexport.files import sha256_of_graph
from emoexport.labels import EMOTIONS
from emoexport.manifest import CalibrationEntry
from emoexport.progress import progress_bar
from emoexport.run_faces import data_name, data_of_run
from emoexport.train.audit import face_hashes
from emoexport.train.checkpoint import RunRecord
from emoexport.train.dataset import DataSet, Faces
from emoexport.train.ensemble import training_faces

__all__ = [
    "CALIBRATION_FILE",
    "CalibrationFaces",
    "Wish",
    "calibrate",
    "calibration_entry",
    "choose_faces",
    "faces_to_calibrate_on",
    "read_calibration",
]

CALIBRATION_FILE = "calibration.json"

HELD_OUT = 64
"""Faces to count clipped values on; fewer where fewer are calibrated on."""

FEW = 500
"""Below this many faces TensorRT's and ModelOpt's documentation expect ranges that miss what is rare."""


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What of calibration can be chosen."""

    faces: int = 512
    """How many, of the training split."""
    method: str = "min-max"
    """Of `thresholds.METHODS`."""
    data: str | None = None
    """Where they are, if not where the run read them."""
    file: Path | None = None
    """A `calibration.json` to use as it is."""
    random: bool = False
    """Calibrate on noise instead of faces."""

    def check(self) -> None:
        """Refuse what cannot be had.

        Raises:
            UsageError: if there is no such method, or two things are asked for that exclude each other.
        """
        method_named(self.method)
        if self.random and (self.data or self.file):
            raise UsageError(
                "--calib-random is given together with faces to calibrate on; needed is one of them.",
                hint="leave --calib-random out: real faces give better ranges",
            )


@dataclass(frozen=True, kw_only=True)
class CalibrationFaces:
    """The faces that a calibration was or is to be made on, and what is known of them."""

    images: NDArray[np.uint8]
    """`(N, H, W, C)`."""
    held_out: NDArray[np.uint8]
    """`(M, H, W, C)`, none of them in `images`."""
    source: str
    sha256: str
    """Of the training faces they were chosen from."""
    counts: dict[str, int]
    """By emotion."""
    disjoint_from: dict[str, int]
    """By split that judges, how many different pictures it has."""
    left_out: int
    """Training faces that one of these splits shows too."""
    validation: Faces | None = None
    """Those that the run was validated on; None where no faces were read."""
    random: bool = False


def faces_to_calibrate_on(run: Path, record: RunRecord, wish: Wish) -> CalibrationFaces | None:
    """Read and choose the faces that are wished for; None where a calibration that was made before is.

    Raises:
        BadData: if they cannot be read, or as `choose_faces`.
    """
    if wish.file is not None:
        return None
    if wish.random:
        return random_faces(record, wish.faces)
    return choose_faces(data_of_run(run, record, wish.data), record, wish.faces)


def calibration_entry(calibration: Calibration) -> CalibrationEntry:
    """What the manifest says of a calibration."""
    return CalibrationEntry(
        file=CALIBRATION_FILE,
        method=calibration.method,
        faces=len(calibration.face_hashes),
        data=calibration.data,
        split="none" if calibration.random else "train",
        random=calibration.random,
    )


def choose_faces(data: DataSet, record: RunRecord, count: int) -> CalibrationFaces:
    """Choose faces that the members were trained on, as many of each emotion as there are, and none that judges.

    Args:
        data: where the members' training faces are.
        record: of the run.
        count: how many.

    Raises:
        BadData: if these are not the faces of the run, an emotion has none, or there are fewer than emotions.
    """
    seed = record.config.training.seed
    chosen = training_faces(data, record.config)
    if chosen.train.sha256() != record.data.train_sha256:
        raise BadData(
            f"the training faces in {data.source} are not those that the members were trained on.",
            hint="--calib-data names where those are; or train again",
        )
    judging = {name: set(face_hashes(faces.images)) for name, faces in data.splits.items() if name != "train"}
    judging["validation"] = set(face_hashes(chosen.validation.images))
    hashes = np.array(face_hashes(chosen.train.images))
    seen = np.isin(hashes, list(set().union(*judging.values())))
    left = chosen.train.take(~seen)
    missing = [name for label, name in enumerate(EMOTIONS) if label not in left.labels]
    if missing:
        raise BadData(
            f"there is no face of '{missing[0]}' to calibrate on among {len(left):,} training faces that no other "
            "split shows; needed is one of each emotion.",
            hint="--calib-data names a data set with such faces",
        )
    rows = balanced_rows(left.labels, count, seed=seed)
    rest = np.setdiff1d(np.arange(len(left)), rows)
    aside = np.random.default_rng(seed).permutation(rest)[: min(HELD_OUT, count)]
    taken = left.take(rows)
    return CalibrationFaces(
        images=taken.images,
        held_out=left.images[aside],
        source=data_name(data.source),
        sha256=record.data.train_sha256,
        counts={name: int((taken.labels == label).sum()) for label, name in enumerate(EMOTIONS)},
        disjoint_from={name: len(known) for name, known in judging.items()},
        left_out=int(seen.sum()),
        validation=chosen.validation,
    )


def random_faces(record: RunRecord, count: int) -> CalibrationFaces:
    """Noise in the place of faces: it shows that a graph can be quantised, not how well."""
    model = record.config.model
    shape = (count + min(HELD_OUT, count), model.image_size, model.image_size, model.channels)
    noise = np.random.default_rng(record.config.training.seed).integers(0, 256, shape, dtype=np.uint8)
    return CalibrationFaces(
        images=noise[:count],
        held_out=noise[count:],
        source="random",
        sha256="",
        counts={},
        disjoint_from={},
        left_out=0,
        random=True,
    )


def calibrate(
    graph: Path,
    feeds: Sequence[str],
    faces: CalibrationFaces,
    *,
    method: str,
    earlier: Path | None = None,
    console: Console,
) -> Calibration:
    """Find the ranges of a graph's activations, or take those found earlier where nothing has changed since.

    Args:
        graph: the FP32 graph.
        feeds: the tensors that feed quantised layers.
        faces: to calibrate on.
        method: of `thresholds.METHODS`.
        earlier: a `calibration.json` that may be of this graph and these faces.
        console: where progress is shown.
    """
    hashes, held_out = tuple(face_hashes(faces.images)), tuple(face_hashes(faces.held_out))
    graph_sha256 = sha256_of_graph(graph)
    known = _read(earlier)
    if known is not None:
        same = {
            "the graph": known.graph_sha256 == graph_sha256,
            "the method": known.method == method,
            "the faces": (known.face_hashes, known.held_out_hashes) == (hashes, held_out),
            "the choice of layers": set(feeds) <= set(known.ranges),
        }
        changed = [what for what, is_same in same.items() if not is_same]
        if not changed:
            console.print("calibration: that of the bundle that stood there; nothing has changed")
            return known
        console.print(f"calibrating anew: {changed[0]} changed")
    if len(hashes) < FEW and not faces.random:
        console.print(f"{len(hashes)} faces to calibrate on; {FEW} or more are usual.", style="yellow")
    total = faces_to_run(len(hashes), len(held_out), method)
    title = "calibrating on random pictures" if faces.random else "calibrating on training faces"
    with progress_bar(console, title, total) as advance:
        ranges = activation_ranges(
            Observer(graph), faces.images, faces.held_out, feeds, method=method, progress=advance
        )
    return Calibration(
        method=method,
        data=faces.source,
        data_sha256=faces.sha256,
        random=faces.random,
        faces=faces.counts,
        face_hashes=hashes,
        held_out_hashes=held_out,
        disjoint_from=faces.disjoint_from,
        left_out=faces.left_out,
        graph_sha256=graph_sha256,
        extremes=ranges.extremes,
        ranges=ranges.kept,
        clipped=ranges.clipped,
    )


def _read(earlier: Path | None) -> Calibration | None:
    """A calibration that is there and can be read; what an older version wrote cannot."""
    if earlier is None or not earlier.is_file():
        return None
    try:
        return Calibration.parse_json(earlier)
    except BadInput:
        return None


def read_calibration(file: Path, graph: Path, record: RunRecord) -> Calibration:
    """Read a calibration that was made before, and hold it against what it is wanted for.

    Raises:
        BadInput: if it cannot be read, or is of another graph or other training faces.
    """
    known = Calibration.parse_json(file, error=BadInput)
    sources = [("fold", "graph", known.graph_sha256, sha256_of_graph(graph))]
    if not known.random:
        sources.append(("run", "training faces", known.data_sha256, record.data.train_sha256))
    for whole, part, found, needed in sources:
        if found != needed:
            raise BadInput(
                f"{file} is of another {whole}: its {part} have the SHA-256 {found[:16]}…; needed is {needed[:16]}….",
                hint="leave --calib-file out to calibrate anew",
            )
    return known
