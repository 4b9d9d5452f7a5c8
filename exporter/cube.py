"""The score cube: the probabilities of every pass over a split, computed once and kept on disk.

cubes/x/
  cube.json      members, views, engine, data, the SHA-256 of the two arrays, and a digest of all that
  scores.npy     float32 `(N, K, V, L)`, read through a memory map
  labels.npy     int64 `(N,)`

Until it is complete a cube is kept beside its place, hidden, with `progress.json`, which says what was asked for and
how many faces are done.
"""

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from emoexport.clock import timestamp
from emoexport.config import Record, SealedRecord
from emoexport.decision import Decision
from emoexport.errors import BadBundle, BadInput, CheckFailed, UsageError
from emoexport.files import (
    move_directory,
    new_file,
    refuse_foreign,
    sha256_of,
    unfinished_directory,
    write_text,
    writing,
)
from emoexport.passes import Weight, faces_at_once, pass_weights, weighted_vote
from emoexport.statistics import Share

__all__ = ["CUBE_FILE", "Cube", "CubeAccuracy", "CubeRecord", "CubeRequest", "OtherCube", "compute_cube"]

CUBE_FILE = "cube.json"
_SCORES_FILE = "scores.npy"
_LABELS_FILE = "labels.npy"
_PROGRESS_FILE = "progress.json"

# How far from 1 the probabilities of a pass may sum: float16 rounds a softmax by less.
_SLACK = 1e-3

# How these are spelled is no difference where the faces are the same.
_NAMES_OF_DATA = {"data", "split"}


class OtherCube(UsageError):
    """Where a cube is to be, one of something else stands or was begun."""


class CubeRequest(Record):
    """What a cube is asked to hold: two with the same request hold the same scores."""

    data: str
    """Its name, without the folders of a machine."""
    split: str
    faces: int
    """N."""
    data_sha256: str
    """Of exactly these faces with these labels in this order."""
    label_counts: dict[str, int]
    members: tuple[str, ...]
    """SHA-256 of the weights of each, in the order of axis K."""
    views: tuple[str, ...]
    """Names, in the order of axis V."""
    member_weights: tuple[Weight, ...] = ()
    """Of each member in the bundle's vote; none where all weigh 1, as in the next field."""
    view_weights: tuple[Weight, ...] = ()
    labels: tuple[str, ...]
    """Names, in the order of axis L."""
    engine: str
    """A runtime, or `torch` for the reference."""
    precision: str
    bundle_digest: str

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """`(N, K, V, L)`."""
        return self.faces, len(self.members), len(self.views), len(self.labels)


class CubeRecord(SealedRecord, CubeRequest):
    """`cube.json`."""

    schema_version: Literal[1] = 1
    created: str
    """UTC, ISO 8601."""
    scores_sha256: str
    """Of the file `scores.npy`."""
    labels_sha256: str
    """Of the file `labels.npy`."""


class _Progress(Record):
    """`progress.json` of an unfinished cube."""

    schema_version: Literal[1] = 1
    request: CubeRequest
    rows: int
    """How many faces are done; what stands in the rows after them means nothing."""


class CubeAccuracy(Record):
    """How often the vote of a cube, and the best of its passes alone, are right on some of its faces."""

    rows: str
    """`all`, or `clean`: no copies, leaks, contradictions or blanks."""
    vote: Share
    """All passes, weighted as in the bundle, and the decision."""
    best_pass: Share
    """The most probable emotion of the pass that is right most often on these very faces, which flatters it."""
    member: int
    """Of that pass, an index into axis K."""
    view: str


@dataclass(frozen=True, kw_only=True)
class Cube:
    """A cube whose files have been checked against its record."""

    path: Path
    record: CubeRecord
    scores: np.memmap[Any, np.dtype[np.float32]]
    """`(N, K, V, L)`, read-only: the probabilities of each pass sum to 1."""
    labels: NDArray[np.int64]
    """`(N,)`, read-only, indices into `record.labels`."""

    @classmethod
    def open(cls, path: Path) -> "Cube":
        """Read the record and check both arrays.

        Raises:
            BadBundle: if there is no cube, or a file is missing, cut short, changed, or of another shape.
        """
        if not (path / CUBE_FILE).is_file():
            raise BadBundle(
                f"{path} is no score cube: there is no {CUBE_FILE} in it.",
                hint="emoexport cube build/x -o cubes/x",
            )
        record = CubeRecord.parse_json(path / CUBE_FILE, error=BadBundle)
        again = f"emoexport cube build/x -o {path} --force"
        if not record.is_intact():
            raise BadBundle(f"{path / CUBE_FILE} was changed after it was written.", hint=again)
        scores = _array(path / _SCORES_FILE, np.float32, record.shape, sha256=record.scores_sha256, hint=again)
        labels = _array(path / _LABELS_FILE, np.int64, record.shape[:1], sha256=record.labels_sha256, hint=again)
        return cls(path=path, record=record, scores=scores, labels=labels)

    @property
    def weights(self) -> NDArray[np.float64]:
        """Of each pass in the bundle's vote, float64 `(K, V)`, sum 1."""
        return self._shares(None, None, None)

    def vote(
        self,
        members: Sequence[int] | None = None,
        views: Sequence[int] | None = None,
        weights: NDArray[np.floating] | None = None,
    ) -> NDArray[np.float64]:
        """The weighted mean of the probabilities of the chosen passes.

        Args:
            members: indices into axis K; None for all. One that is named twice counts once.
            views: indices into axis V; None for all. Likewise.
            weights: `(K, V)`, 0 or more, of all passes of the cube whichever are chosen; None for those of the
                bundle. Those of the chosen passes are normalised to sum to 1.

        Returns:
            float64 `(N, L)`, rows sum to 1 as exactly as those of the passes do.

        Raises:
            UsageError: if a pass is chosen that is not there, or weights are negative, not finite, of another shape,
                or 0 for all that is chosen.
        """
        return weighted_vote(self.scores, self._shares(members, views, weights))

    def pass_labels(self) -> NDArray[np.int8]:
        """The most probable emotion of every pass, `(N, K, V)`; ties go to the emotion that comes first."""
        found = np.empty(self.record.shape[:3], dtype=np.int8)
        for rows in faces_at_once(len(self.scores), self.scores[0].size):
            found[rows] = self.scores[rows].argmax(axis=-1)
        return found

    def accuracy(self, decision: Decision, mask: NDArray[np.bool_], *, rows: str = "all") -> CubeAccuracy:
        """Judge the vote of all passes, and the best of them alone.

        Args:
            decision: what decides about the vote.
            mask: the faces to judge on, `(N,)`, at least one of them.
            rows: what they are called.
        """
        truth = self.labels[mask]
        right = self.pass_labels()[mask] == truth[:, None, None]
        member, view = np.unravel_index(right.sum(axis=0).argmax(), right.shape[1:])
        return CubeAccuracy(
            rows=rows,
            vote=Share.of(decision.decide(self.vote()[mask]).label == truth),
            best_pass=Share.of(right[:, member, view]),
            member=int(member),
            view=self.record.views[view],
        )

    def _shares(
        self,
        members: Sequence[int] | None,
        views: Sequence[int] | None,
        weights: NDArray[np.floating] | None,
    ) -> NDArray[np.float64]:
        """Of each pass in the vote, float64 `(K, V)`, 0 for those that are not chosen."""
        shape = self.record.shape[1:3]
        if weights is None:
            record = self.record
            weights = pass_weights(record.member_weights or [1.0] * shape[0], record.view_weights or [1.0] * shape[1])
        given = np.ones(shape) if weights is None else np.asarray(weights, dtype=np.float64)
        if given.shape != shape or not np.isfinite(given).all() or (given < 0).any():
            raise UsageError(
                f"found weights of the shape {given.shape} from {given.min(initial=np.inf):g} to "
                f"{given.max(initial=-np.inf):g}; needed are finite ones of the shape {shape}, 0 or more."
            )
        grid = np.ix_(_indices("member", members, shape[0]), _indices("view", views, shape[1]))
        shares = np.zeros(shape)
        shares[grid] = given[grid]
        if shares.sum() == 0:
            raise UsageError("no pass is chosen, or all that are have the weight 0; needed is at least one.")
        normalised: NDArray[np.float64] = shares / shares.sum()
        return normalised


def compute_cube(
    score: Callable[[NDArray[np.uint8]], NDArray[np.float32]],
    faces: NDArray[np.uint8],
    labels: NDArray[np.int64],
    out: Path,
    request: CubeRequest,
    *,
    batch_size: int = 64,
    progress: Callable[[int], object] = lambda _: None,
    note: Callable[[str], object] = lambda _: None,
    force: bool = False,
) -> Cube:
    """Compute a cube batch by batch; what was computed before a kill is not computed again.

    Args:
        score: uint8 `(n, H, W, C)` to the probabilities of every pass, float32 `(n, K, V, L)`.
        faces: uint8 `(N, H, W, C)`.
        labels: true labels, int64 `(N,)`.
        out: the cube's directory; it appears when the cube is complete. One with the same request that stands there
            is opened and not computed again.
        request: what the scores are of.
        batch_size: faces in a call of `score`.
        progress: called with the number of faces done: first those that were done before, then each batch.
        note: called with a sentence where earlier work is taken up.
        force: replace a cube that stands there, and forget an unfinished one.

    Raises:
        BadInput: if faces and labels are not as many as the request says.
        UsageError: if `out` holds something else, or a cube, finished or not, with another request; the first
            difference is named.
        BadBundle: if the cube that stands there, or the unfinished one, is damaged.
        CheckFailed: if what `score` answers is of another shape or no probabilities; the batches before are kept.
        Busy: if another command is computing it.
        DiskFull: if there is no room for it.
    """
    if not len(faces) == len(labels) == request.faces > 0:
        raise BadInput(
            f"found {len(faces)} faces and {len(labels)} labels; the request says {request.faces}, 1 or more."
        )
    refuse_foreign(out, marker=CUBE_FILE)
    with writing(out):
        if (out / CUBE_FILE).is_file() and not force:
            standing = Cube.open(out)
            _refuse_other(standing.record, request, f"the cube in {out} was computed with", "name another --output")
            note(f"{out} holds this cube already; nothing is computed.")
            return standing
        directory = unfinished_directory(out)
        done = _begin(directory, request, force=force)
        if done:
            note(f"going on after {done:,} of {request.faces:,} faces, which are kept in {directory}")
        progress(done)
        scores = np.load(directory / _SCORES_FILE, mmap_mode="r+")
        for start in range(done, request.faces, batch_size):
            batch = faces[start : start + batch_size]
            found = score(batch)
            _require_probabilities(found, request, rows=range(start, start + len(batch)))
            scores[start : start + len(batch)] = found
            scores.flush()  # before the rows are counted: a count must never be ahead of what is on disk
            _write_progress(directory, request, start + len(batch))
            progress(len(batch))
        del scores
        _finish(directory, labels, request, out)
        return Cube.open(out)


def _begin(directory: Path, request: CubeRequest, *, force: bool) -> int:
    """Make the directory of an unfinished cube, or see that the one there was begun with the same request.

    Returns:
        How many faces are done.
    """
    if (directory / CUBE_FILE).is_file() and not (directory / _PROGRESS_FILE).is_file():
        shutil.rmtree(directory)  # what a cube replaced whose command was killed in that moment
    refuse_foreign(directory, marker=_PROGRESS_FILE)  # another command may be keeping its unfinished work there
    if force:
        shutil.rmtree(directory, ignore_errors=True)
    rows = 0
    if (directory / _PROGRESS_FILE).is_file():
        begun = _Progress.parse_json(directory / _PROGRESS_FILE, error=BadBundle)
        _refuse_other(begun.request, request, f"the cube in {directory} was begun with", "ask for the same again")
        rows = begun.rows
    if rows:
        _array(directory / _SCORES_FILE, np.float32, request.shape, hint="--force begins anew")
        return rows
    _write_progress(directory, request, 0)
    _reserve(directory / _SCORES_FILE, request.shape)
    return 0


def _write_progress(directory: Path, request: CubeRequest, rows: int) -> None:
    write_text(directory / _PROGRESS_FILE, _Progress(request=request, rows=rows).to_json())


def _reserve(path: Path, shape: tuple[int, ...]) -> None:
    """Make an empty array of its final size. A full disk is an error now; in a mapped write it would be a crash."""
    np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
    if not hasattr(os, "posix_fallocate"):  # macOS
        return
    with path.open("r+b") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        except OSError as err:  # it names no file
            raise OSError(err.errno, err.strerror, str(path)) from err


def _finish(directory: Path, labels: NDArray[np.int64], request: CubeRequest, out: Path) -> None:
    with new_file(directory / _LABELS_FILE) as file:
        np.save(file, labels.astype(np.int64, copy=False))
    record = CubeRecord(
        **request.model_dump(),
        created=timestamp(),
        scores_sha256=sha256_of(directory / _SCORES_FILE),
        labels_sha256=sha256_of(directory / _LABELS_FILE),
    )
    write_text(directory / CUBE_FILE, record.sealed().to_json())
    move_directory(directory, out, marker=CUBE_FILE)
    (out / _PROGRESS_FILE).unlink()  # only now: until it was moved, a repeated command would have needed it


def _refuse_other(begun: CubeRequest, now: CubeRequest, found: str, instead: str) -> None:
    """Raise OtherCube with the first difference, if there is one."""
    for name in CubeRequest.model_fields:
        old, new = getattr(begun, name), getattr(now, name)
        if old == new or (name in _NAMES_OF_DATA and begun.data_sha256 == now.data_sha256):
            continue
        what, was, is_now = _difference(name, old, new)
        raise OtherCube(f"{found} {what} = {was}; this call has {is_now}.", hint=f"{instead}, or --force begins anew")


def _difference(name: str, old: Any, new: Any) -> tuple[str, object, object]:
    """Of two lists their lengths, or the first place where they differ."""
    if not isinstance(old, tuple):
        return name, old, new
    if len(old) != len(new):
        return f"number of {name}", len(old), len(new)
    place = next(place for place, value in enumerate(old) if value != new[place])
    return f"{name}[{place}]", old[place], new[place]


def _require_probabilities(found: NDArray[np.float32], request: CubeRequest, rows: range) -> None:
    needed = (len(rows), *request.shape[1:])
    engine = f"{request.engine} at {request.precision}"
    if found.shape != needed or found.dtype != np.float32:
        raise CheckFailed(
            f"{engine} answered {found.dtype} scores of the shape {found.shape}; "
            f"needed are float32 ones of the shape {needed}.",
            hint="build the bundle again",
        )
    with np.errstate(invalid="ignore"):  # infinities that cancel are found all the same
        good = (found >= 0).all(axis=-1) & (np.abs(found.sum(axis=-1, dtype=np.float64) - 1) <= _SLACK)
    if not good.all():
        face, member, view = np.argwhere(~good)[0]
        worst = ", ".join(f"{value:.4g}" for value in found[face, member, view])
        raise CheckFailed(
            f"{engine}: the scores of face {rows[face] + 1:,}, member {member + 1}, view "
            f"{request.views[view]} are {worst}; needed are probabilities that sum to 1.",
            hint="emoexport verify compares this engine with the reference",
        )


def _array(path: Path, dtype: type[np.generic], shape: tuple[int, ...], *, sha256: str | None = None, hint: str) -> Any:
    """Map an array read-only.

    Raises:
        BadBundle: if it is missing, no array, of another type or shape, or its SHA-256 is another.
    """
    if not path.is_file():
        raise BadBundle(f"{path} is missing.", hint=hint)
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as err:
        raise BadBundle(f"{path} cannot be read as an array: {err}.", hint=hint) from err
    found, needed = (f"{array.dtype} {array.shape}", f"{np.dtype(dtype)} {shape}")
    if found != needed:
        raise BadBundle(f"{path} holds {found}; needed is {needed}.", hint=hint)
    if sha256 is not None and sha256_of(path) != sha256:
        raise BadBundle(f"{path} was changed after it was written: its SHA-256 is another.", hint=hint)
    return array


def _indices(axis: str, chosen: Sequence[int] | None, count: int) -> NDArray[np.int64]:
    found = np.array(range(count) if chosen is None else chosen, dtype=np.int64)
    outside = found[(found < 0) | (found >= count)]
    if len(outside):
        raise UsageError(f"there is no {axis} {outside[0]}; there are {count}, counted from 0.")
    return found
