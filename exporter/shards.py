"""The faces to be scored, cut into shards. Of the same input the plan is the same every time, down to the names."""

import glob
import hashlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from emoexport.config import Record
from emoexport.errors import BadData, UsageError
from emoexport.pictures import BOXED, picture_endings
from emoexport.storage import Found, Storage

__all__ = ["FOOTERS", "Columns", "Plan", "Shard", "Source", "plan_shards"]

_PICTURES = ("image", "png")
"""Columns that are looked for if none is named, in this order."""
FOOTERS = 16
"""Of Parquet files, that are read at once."""


class Columns(Record):
    """Which columns of Parquet files are read."""

    image: str | None = None
    """Encoded pictures: bytes, or a struct with the field `bytes`. None for `image`, or else `png`."""
    id: str | None = None
    """What a face is called; None for its file and row."""
    keep: Mapping[str, str] = {}
    """Columns that are handed on, by name, and what they are called then."""


class Source(Record):
    """Where the pictures of shards are."""

    root: str
    """What their paths are below: a folder or a URI."""
    columns: Columns | None
    """Of Parquet files; None where each file is a picture."""


class Shard(Record):
    """Faces that are scored in one go, into a file of their own."""

    part: str
    """The name of that file, which tells what is in it."""
    files: tuple[str, ...]
    """Pictures, or one Parquet file."""
    faces: int
    first: int = 0
    """Of a Parquet file the row with the first face, counted from 0."""


class Plan(NamedTuple):
    """All of the work."""

    source: Source
    shards: list[Shard]
    digest: str
    """SHA-256 of the names, sizes and times of all files."""

    @property
    def faces(self) -> int:
        """How many there are."""
        return sum(shard.faces for shard in self.shards)


def plan_shards(data: str, *, size: int, columns: Columns, taken: Iterable[str] = (), out: str = "") -> Plan:
    """Find the faces and cut them into shards. No picture is opened, but the footers of Parquet files are read.

    Args:
        data: a folder of pictures or of Parquet files, with all below it; a file; a pattern of files on a disk. In an
            object store a folder or a file, by its URI.
        size: faces in a shard at most.
        columns: of Parquet files.
        taken: names of columns that the answer has, which none that is kept may have.
        out: where answers are written to, which may not be where faces are read from.

    Raises:
        UsageError: if there is nothing, pictures and Parquet are in one folder, or columns make no sense.
        BadData: if a Parquet file cannot be read or lacks the columns, or a folder cannot be listed.
    """
    storage, found, is_folder = _locate(data)
    if is_folder and out and f"{Storage(out).root}/".startswith(f"{storage.root.rstrip('/')}/"):
        raise UsageError(f"{out} lies in {data}, so it would be read the next time.", hint="name another --out")
    tables = [one for one in found if one.ending == ".parquet"]
    endings = picture_endings()
    pictures = [one for one in found if one.ending in endings and not one.path.endswith(BOXED)]
    if not tables and not pictures:
        raise UsageError(f"in {data} is no picture and no Parquet file.", hint="name another folder")
    if tables and pictures:
        raise UsageError(
            f"in {data} are {len(tables):,} Parquet files and {len(pictures):,} pictures; needed is one of the two.",
            hint=f"emoexport score '{data.rstrip('/')}/**/*.parquet'",
        )
    if pictures:
        if columns != Columns():
            raise UsageError(f"{data} has pictures, and columns are named.", hint="leave out --column, --id and --keep")
        return Plan(Source(root=storage.root, columns=None), _of_pictures(pictures, size), _digest(pictures))
    columns, rows = _read_footers(storage, tables, columns, taken)
    return Plan(Source(root=storage.root, columns=columns), _of_tables(tables, rows, size), _digest(tables))


def _locate(data: str) -> tuple[Storage, list[Found], bool]:
    """The files that are named, what they are below, and whether that is a folder which was named itself."""
    storage = Storage(data)
    kind = storage.kind_of()
    if kind == "folder":
        return storage, storage.files(), True
    if kind == "file":
        root, _, name = storage.root.rpartition("/")
        storage = Storage(root or "/")
        return storage, storage.look_at([name]), False
    names = [] if not storage.is_local else glob.glob(data, recursive=True)  # noqa: PTH207 (absolute ones too)
    files = sorted(os.path.abspath(name) for name in names if os.path.isfile(name))  # noqa: PTH100, PTH113
    if not files:
        raise UsageError(f"there is no file, folder or match for '{data}'.", hint="name what is there")
    root = os.path.abspath(os.path.dirname(re.split(r"[*?[]", data)[0]))  # noqa: PTH100, PTH120
    storage = Storage(root)
    return storage, sorted(storage.look_at([os.path.relpath(file, root) for file in files])), False


def _of_pictures(found: Sequence[Found], size: int) -> list[Shard]:
    shards = []
    for number, start in enumerate(range(0, len(found), size)):
        some = found[start : start + size]
        files = tuple(one.path for one in some)
        shards.append(Shard(part=_part(number, _digest(some)), files=files, faces=len(files)))
    return shards


def _of_tables(found: Sequence[Found], rows: Sequence[int], size: int) -> list[Shard]:
    cuts = [
        (one, start, min(size, count - start))
        for one, count in zip(found, rows, strict=True)
        for start in range(0, count, size)
    ]
    return [
        Shard(part=_part(number, _digest([one]) + f" {start} {faces}"), files=(one.path,), faces=faces, first=start)
        for number, (one, start, faces) in enumerate(cuts)
    ]


def _part(number: int, content: str) -> str:
    return f"part-{number:06d}-{hashlib.sha256(content.encode()).hexdigest()[:16]}.parquet"


def _digest(found: Iterable[Found]) -> str:
    digest = hashlib.sha256()
    for one in found:
        digest.update(f"{one.path}\0{one.size}\0{one.changed_ns}\n".encode())
    return digest.hexdigest()


def _read_footers(
    storage: Storage, found: Sequence[Found], columns: Columns, taken: Iterable[str]
) -> tuple[Columns, list[int]]:
    """The columns, all of them named, and the number of rows of each file."""

    def footer(one: Found) -> tuple[pa.Schema, int]:
        try:
            with pq.ParquetFile(storage.open(one.path)) as file:
                return file.schema_arrow, file.metadata.num_rows
        except (pa.ArrowException, OSError) as err:
            raise BadData(f"{storage.name(one.path)} cannot be read as Parquet: {err}.") from err

    with ThreadPoolExecutor(FOOTERS) as pool:
        footers = list(pool.map(footer, found))
    first = footers[0][0]
    image = columns.image or next((name for name in _PICTURES if name in first.names), _PICTURES[0])
    columns = Columns(image=image, id=columns.id, keep=columns.keep)
    for one, (schema, _) in zip(found, footers, strict=True):
        _require_columns(storage.name(one.path), schema, columns, first)
    _require_names(columns, set(taken))
    return columns, [rows for _, rows in footers]


def _require_columns(name: str, schema: pa.Schema, columns: Columns, first: pa.Schema) -> None:
    for column in filter(None, (columns.image, columns.id, *columns.keep)):
        if column not in schema.names:
            hint = "--column names that of the pictures" if column == columns.image else "name columns that are there"
            raise BadData(f"{name} has no column '{column}'; it has {', '.join(schema.names)}.", hint=hint)
    kind = schema.field(columns.image).type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)):
        raise BadData(
            f"{name}: the column '{columns.image}' has {kind}; needed are the bytes of encoded pictures.",
            hint="--column names another",
        )
    for column in columns.keep:
        if schema.field(column).type != first.field(column).type:
            found = f"{schema.field(column).type} here and {first.field(column).type} in the first file"
            raise BadData(f"{name}: the column '{column}' has {found}.", hint=f"leave out --keep {column}")


def _require_names(columns: Columns, taken: set[str]) -> None:
    for column, name in columns.keep.items():
        if name in taken:
            raise UsageError(f"the answer has a column '{name}' of its own.", hint=f"--keep {column}=given_{column}")
        taken.add(name)
