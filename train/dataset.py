"""Labelled faces from wherever they are: a folder tree, the FER-2013 CSV, Parquet, or drawn on the spot.

Faces are held in memory as uint8; FER-2013 takes 83 MB.
"""

import csv
import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from emoexport.errors import BadData, UsageError
from emoexport.images import decode_face, read_picture, resize_face
from emoexport.labels import EMOTIONS, order_of, to_label
from emoexport.train.synthetic import synthetic_faces

__all__ = ["DataSet", "Faces", "is_synthetic", "load_data"]

PICTURE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}

# The names that published copies use, and ours.
_SPLITS = {
    "training": "train",
    "testing": "test",
    "val": "validation",
    "valid": "validation",
    "publictest": "public_test",
    "privatetest": "private_test",
}

_MOST_VOTES = 1e9  # of one face; FER+ has ten

_SYNTHETIC_SHARES = {"train": 0.7, "validation": 0.15, "test": 0.15}


@dataclass(frozen=True, kw_only=True)
class Faces:
    """One split."""

    images: NDArray[np.uint8]
    """`(N, H, W, C)`."""
    labels: NDArray[np.int64]
    """`(N,)`, indices into `EMOTIONS`."""
    flagged: NDArray[np.bool_]
    """`(N,)`: rows that the data set itself marks as copies, leaks, contradictions or blanks."""
    votes: NDArray[np.float32] | None = None
    """`(N, L)`: the share of annotators for each emotion, rows sum to 1; NaN in rows without votes for any of them.
    None where the data has no votes."""

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: NDArray[Any]) -> "Faces":
        """The rows of a mask or of indices."""
        return Faces(
            images=self.images[rows],
            labels=self.labels[rows],
            flagged=self.flagged[rows],
            votes=None if self.votes is None else self.votes[rows],
        )

    def sha256(self) -> str:
        """A name for exactly these faces with these labels in this order."""
        digest = hashlib.sha256(str(self.images.shape).encode())
        digest.update(np.ascontiguousarray(self.images).data)
        digest.update(self.labels.astype("<i8").tobytes())
        return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """The splits of one source, by name."""

    source: str
    splits: dict[str, Faces]
    skipped: tuple[str, ...] = ()
    """What could not be read, a sentence each (only with `skip_bad`)."""
    outside: int = 0
    """Rows left out because their label is none of the seven emotions."""

    def split(self, name: str) -> Faces:
        """Look up a split.

        Raises:
            UsageError: if there is none of that name.
        """
        if name not in self.splits:
            raise UsageError(f"{self.source} has no split '{name}'.", hint=f"its splits are {', '.join(self.splits)}")
        return self.splits[name]

    def summary(self) -> list[str]:
        """What was read, and what was not, in lines for people."""
        lines = [f"  {name}: {len(faces):,} faces" for name, faces in self.splits.items()]
        if self.outside:
            lines.append(f"  {self.outside:,} rows left out: their label is none of the seven emotions")
        if self.skipped:
            lines.append(f"  {len(self.skipped):,} left out that cannot be read:")
            lines += [f"    {sentence}" for sentence in self.skipped[:10]]
            lines += [f"    and {len(self.skipped) - 10:,} more"] if len(self.skipped) > 10 else []
        return lines

    def evaluation_split(self) -> str:
        """The split to report on if none is named."""
        for name in ("test", "public_test", "validation", "private_test"):
            if name in self.splits:
                return name
        return next(iter(self.splits))


class _Row(NamedTuple):
    split: str
    label: str | int
    picture: object
    """Encoded bytes, the path of a file with such, or grey values as text."""
    name: str
    flagged: bool = False
    votes: Sequence[float] | None = None


def load_data(
    source: str,
    *,
    size: int,
    channels: int = 1,
    label_order: str = "fer2013",
    skip_bad: bool = False,
    seed: int = 0,
) -> DataSet:
    """Read labelled faces.

    Args:
        source: a folder tree `<split>/<emotion>/*.png|jpg`; a FER-2013 CSV; a Parquet file or a folder of them
            (columns `png` or `image`, and `label` or `emotion`; `split` if it has one); `synthetic` or
            `synthetic:N`.
        size: height and width of the faces in pixels; others are scaled.
        channels: 1 for grey, 3 for RGB; others are converted.
        label_order: what numbered labels mean, a key of `labels.LABEL_ORDERS`.
        skip_bad: leave out what cannot be read, and list it, instead of stopping there.
        seed: seed of the synthetic faces.

    Raises:
        BadData: if there is no such data, a face cannot be read, a label is unknown, or an emotion has no face.
        UsageError: if the source or an option makes no sense.
    """
    if is_synthetic(source):
        return _synthetic(source, size=size, channels=channels, seed=seed)
    path = Path(source)
    if not path.exists():
        raise BadData(
            f"there is no data at {source}.",
            hint="--data takes a folder tree, a FER-2013 CSV, a Parquet file or folder, or synthetic:5600",
        )
    data = _collect(_rows(path), source, size=size, channels=channels, label_order=label_order, skip_bad=skip_bad)
    for name, faces in data.splits.items():
        empty = np.setdiff1d(np.arange(len(EMOTIONS)), faces.labels)
        if len(empty):
            raise BadData(
                f"{source}: the split '{name}' has no face of '{EMOTIONS[empty[0]]}' among its {len(faces)}; "
                f"every emotion needs at least one.",
                hint="add faces of it, or leave the split out",
            )
    return data


def is_synthetic(source: str) -> bool:
    """Whether faces are drawn rather than read."""
    return source == "synthetic" or source.startswith("synthetic:")


def _synthetic(source: str, *, size: int, channels: int, seed: int) -> DataSet:
    text = source.partition(":")[2] or "5600"
    if not text.isdecimal() or int(text) < 140:
        raise UsageError(f"'{source}' needs a number of faces of at least 140, such as synthetic:5600.")
    splits = {}
    for index, (name, share) in enumerate(_SYNTHETIC_SHARES.items()):
        count = round(int(text) * share)
        images, labels = synthetic_faces(count, size=size, seed=seed * len(_SYNTHETIC_SHARES) + index)
        images = np.repeat(images, channels, axis=3)
        splits[name] = Faces(images=images, labels=labels, flagged=np.zeros(count, dtype=bool))
    return DataSet(source=source, splits=splits)


def _rows(path: Path) -> Iterator[_Row]:
    if path.is_file() and path.suffix.lower() == ".csv":
        return _csv_rows(path)
    if path.is_file() and path.suffix.lower() == ".parquet":
        return _parquet_rows([path])
    if path.is_dir():
        tables = sorted(path.glob("*.parquet"))
        return _parquet_rows(tables) if tables else _folder_rows(path)
    raise BadData(f"{path} is neither a folder nor a .csv or .parquet file.")


def _collect(
    rows: Iterable[_Row], source: str, *, size: int, channels: int, label_order: str, skip_bad: bool
) -> DataSet:
    images: dict[str, list[NDArray[np.uint8]]] = {}
    labels: dict[str, list[int]] = {}
    flagged: dict[str, list[bool]] = {}
    votes: dict[str, list[NDArray[np.float32]]] = {}
    skipped: list[str] = []
    outside = 0
    for row in rows:
        label = _label_of(row, label_order)
        if label is None:
            outside += 1
            continue
        try:
            face, shares = _face_of(row, size=size, channels=channels), _shares(row.votes)
        except BadData as err:
            if not skip_bad:
                raise BadData(f"{row.name}: {err}", hint="--skip-bad leaves out what cannot be read") from err
            skipped.append(f"{row.name}: {err}")
            continue
        images.setdefault(row.split, []).append(face)
        labels.setdefault(row.split, []).append(label)
        flagged.setdefault(row.split, []).append(row.flagged)
        votes.setdefault(row.split, []).append(shares)
    if not images:
        unread = f"; {len(skipped)} could not be read" if skipped else ""
        raise BadData(
            f"{source} holds no face with a label{unread}.",
            hint="a folder tree needs <split>/<emotion>/*.png, such as train/happy/1.png",
        )
    splits = {
        name: Faces(
            images=np.stack(images[name]),
            labels=np.array(labels[name], dtype=np.int64),
            flagged=np.array(flagged[name], dtype=bool),
            votes=None if np.isnan(votes[name]).all() else np.stack(votes[name]),
        )
        for name in images
    }
    return DataSet(source=source, splits=splits, skipped=tuple(skipped), outside=outside)


def _label_of(row: _Row, label_order: str) -> int | None:
    try:
        return to_label(row.label, order=label_order)
    except BadData as err:
        raise BadData(f"{row.name}: {err}", hint=err.hint) from err


def _shares(votes: Sequence[float] | None) -> NDArray[np.float32]:
    """Counts of FER+ votes in its own order to shares of the seven emotions; what is none of them is not counted."""
    counts = np.zeros(len(EMOTIONS))
    known = order_of("ferplus")
    is_table = isinstance(votes, list | None) and len(votes or ()) <= len(known)
    if not is_table or not all(isinstance(count, int | float) and 0 <= count <= _MOST_VOTES for count in votes or ()):
        raise BadData(f"found the votes {str(votes)[:80]}; needed are counts in FER+'s order, at most {len(known)}.")
    for name, count in zip(known, votes or (), strict=False):
        label = to_label(name)
        if label is not None:
            counts[label] = count
    with np.errstate(invalid="ignore"):
        shares: NDArray[np.float32] = (counts / counts.sum()).astype(np.float32)
    return shares


def _face_of(row: _Row, *, size: int, channels: int) -> NDArray[np.uint8]:
    picture = row.picture
    if isinstance(picture, Path):
        try:
            picture = read_picture(picture)
        except OSError as err:
            raise BadData(f"this file cannot be read ({err.strerror}).") from err
    if isinstance(picture, bytes):
        return decode_face(picture, size=size, channels=channels)
    if isinstance(picture, str):
        return resize_face(_pixels(picture), size=size, channels=channels)
    raise BadData(f"found a {type(picture).__name__}; needed are the bytes of a picture.")


def _split_name(name: str) -> str:
    whole = re.sub(r"-\d+-of-\d+$", "", name.strip().lower())  # the shards of a published Parquet set
    plain = whole.replace(" ", "_").replace("-", "_")
    return _SPLITS.get(plain, plain)


def _folder_rows(root: Path) -> Iterator[_Row]:
    for split in _folders(root):
        for emotion in _folders(split):
            for path in sorted(emotion.iterdir()):
                if path.suffix.lower() in PICTURE_SUFFIXES and not path.name.startswith("."):
                    yield _Row(_split_name(split.name), emotion.name, path, str(path))


def _folders(path: Path) -> list[Path]:
    return sorted(inner for inner in path.iterdir() if inner.is_dir() and not inner.name.startswith("."))


def _csv_rows(path: Path) -> Iterator[_Row]:
    csv.field_size_limit(2**27)  # a face of 1024 x 1024 pixels has 4 MB of text; Python's limit is 128 kB
    with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
        reader = csv.reader(file)
        try:
            header = [name.strip().lower() for name in next(reader, [])]
            missing = {"emotion", "pixels"} - set(header)
            if missing:
                raise BadData(
                    f"{path} has the columns {', '.join(header) or 'none'}; needed are emotion, pixels and, "
                    "if it holds several splits, Usage."
                )
            emotion, pixels = header.index("emotion"), header.index("pixels")
            usage = header.index("usage") if "usage" in header else None
            for cells in reader:
                if not cells:
                    continue
                name = f"{path} line {reader.line_num}"
                if len(cells) != len(header):
                    raise BadData(f"{name} has {len(cells)} cells; the header has {len(header)}.")
                split = cells[usage] if usage is not None else "train"
                yield _Row(_split_name(split), cells[emotion].strip(), cells[pixels], name)
        except csv.Error as err:
            raise BadData(f"{path} line {reader.line_num} cannot be read as CSV: {err}.") from err


def _pixels(text: str) -> NDArray[np.uint8]:
    """Grey values as text to a square face, uint8 `(side, side)`."""
    words = text.split()
    side = round(len(words) ** 0.5)
    if side * side != len(words) or side == 0:
        raise BadData(f"found {len(words)} grey values; needed is a square number of them.")
    try:
        values = np.array(words, dtype=np.int64)
    except (ValueError, OverflowError) as err:
        raise BadData(f"found grey values that are no whole numbers ({err}).") from err
    if values.min() < 0 or values.max() > 255:
        raise BadData(f"found grey values from {values.min()} to {values.max()}; needed are 0 to 255.")
    return values.astype(np.uint8).reshape(side, side)


def _parquet_rows(paths: list[Path]) -> Iterator[_Row]:
    for path in paths:
        try:
            yield from _parquet_file_rows(path)
        except BadData:
            raise
        except (pa.ArrowException, OSError, OverflowError, ValueError) as err:  # the last two of text and of dates
            raise BadData(f"{path} cannot be read as Parquet: {err}.") from err


def _parquet_file_rows(path: Path) -> Iterator[_Row]:
    table = pq.ParquetFile(path)
    names = set(table.schema_arrow.names)
    picture = next((name for name in ("png", "image") if name in names), None)
    label = next((name for name in ("label", "emotion") if name in names), None)
    if picture is None or label is None:
        raise BadData(f"{path} has the columns {', '.join(sorted(names))}; needed are png or image, and label.")
    marks = names & {"dup_first", "dup_label_conflict", "constant", "in_train_exact"}
    columns = [picture, label, *marks, *(names & {"split", "ferplus_votes"})]
    number = 0
    for batch in table.iter_batches(batch_size=1024, columns=columns):
        for cells in batch.to_pylist():
            number += 1
            data, value = cells[picture], cells[label]
            data = data.get("bytes") if isinstance(data, dict) else data
            value = int(value) if isinstance(value, float) and value.is_integer() else value
            split = str(cells.get("split") or path.stem)
            flagged = _is_flagged(cells, split)
            yield _Row(
                _split_name(split), value, data or b"", f"{path} row {number}", flagged, cells.get("ferplus_votes")
            )


def _is_flagged(cells: dict[str, Any], split: str) -> bool:
    """Whether the data set's own columns call this row a copy, a leak, a contradiction or a blank."""
    leaked = bool(cells.get("in_train_exact")) and _split_name(split) != "train"
    return leaked or not cells.get("dup_first", True) or bool(cells.get("dup_label_conflict") or cells.get("constant"))
