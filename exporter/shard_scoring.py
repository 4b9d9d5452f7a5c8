"""A shard scored: its pictures read and decoded beside the engine, what is decided written as one Parquet file."""

import io
import os
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from emoexport.config import Record
from emoexport.errors import BadData
from emoexport.images import decode_face
from emoexport.runtime import Session
from emoexport.shards import Columns, Shard, Source
from emoexport.storage import Storage

__all__ = ["Tally", "answer_columns", "read_tally", "score_shard", "tally_of", "write_part"]

_TALLY = b"emoexport.tally"
"""Under this key a part keeps its tally beside the schema."""
_NAMED = 20
"""Pictures that are named of those that cannot be read."""
_DECODERS = 4
"""Pictures that are read and decoded at once."""


class Tally(Record):
    """What was decided about some faces."""

    faces: int = 0
    labels: Mapping[str, int] = {}
    """How many have each label."""
    errors: int = 0
    """Faces without a label, as their picture could not be read."""
    examples: tuple[str, ...] = ()
    """The first of these, and why."""

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(
            faces=self.faces + other.faces,
            labels=Counter(self.labels) + Counter(other.labels),
            errors=self.errors + other.errors,
            examples=(*self.examples, *other.examples)[:_NAMED],
        )


def answer_columns(labels: Sequence[str]) -> dict[str, str]:
    """The columns of a part and the types that Arrow knows them by; those that are kept come after them."""
    numbers = dict.fromkeys(("confidence", *(f"p_{name}" for name in labels)), "float32")
    return {"id": "string", "label": "string", **numbers, "error": "string"}


def score_shard(session: Session, source: Source, shard: Shard) -> pa.Table:
    """Decide about the faces of a shard, in the order that they have there.

    Each picture is one face, taken as training takes it. Where one cannot be read there is no answer but the reason.

    Args:
        session: what decides, `session.batch` faces in a call.
        source: where the pictures are.
        shard: which.

    Returns:
        A row a face: the columns of `answer_columns`, and those that are kept.

    Raises:
        BadData: if a Parquet file cannot be read, or has other rows than the shard was planned from.
    """
    storage = Storage(source.root)
    pieces = (
        _pictures(shard, session.batch)
        if source.columns is None
        else _rows(storage, source.columns, shard, session.batch)
    )
    with ThreadPoolExecutor(_DECODERS) as pool:
        tables = [_judged(session, piece, faces) for piece, faces in _decoded(pool, storage, session, pieces)]
    table = pa.concat_tables(tables)
    if len(table) != shard.faces:
        raise BadData(
            f"{storage.name(shard.files[0])} has other rows than when the work was planned.",
            hint="the same command with --force begins anew",
        )
    return table


def tally_of(table: pa.Table) -> Tally:
    """Count what was decided."""
    labels = Counter(table["label"].to_pylist())
    errors = labels.pop(None, 0)
    failed = table.filter(table["error"].is_valid()).slice(0, _NAMED) if errors else table.slice(0, 0)
    examples = tuple(f"{row['id']}: {row['error']}" for row in failed.select(["id", "error"]).to_pylist())
    return Tally(faces=len(table), labels=labels, errors=errors, examples=examples)


def write_part(out: Storage, part: str, table: pa.Table, tally: Tally) -> None:
    """Write a part whole or not at all, with its tally."""
    described = table.replace_schema_metadata({_TALLY: tally.model_dump_json()})
    content = io.BytesIO()
    pq.write_table(described, content)
    out.write(part, content.getvalue())


def read_tally(out: Storage, part: str) -> Tally:
    """The tally that a part was written with.

    Raises:
        BadData: if it is no part.
    """
    try:
        with pq.ParquetFile(out.open(part)) as file:
            return Tally.model_validate_json((file.schema_arrow.metadata or {})[_TALLY])
    except (pa.ArrowException, OSError, KeyError, ValueError) as err:
        raise BadData(f"{out.name(part)} is no part that was written whole.", hint=f"remove {part}") from err


class _Piece(NamedTuple):
    """Faces for one call."""

    ids: pa.Array
    pictures: Sequence[bytes | str | None]
    """Encoded, or the path of a file with such; None where there is none."""
    kept: Sequence[tuple[pa.Field, pa.Array]] = ()


def _pictures(shard: Shard, size: int) -> Iterator[_Piece]:
    for start in range(0, len(shard.files), size):
        paths = shard.files[start : start + size]
        yield _Piece(pa.array(paths, pa.string()), paths)


def _rows(storage: Storage, columns: Columns, shard: Shard, size: int) -> Iterator[_Piece]:
    """The rows of a shard, of row groups that have some; what comes before them in their row group is passed over."""
    (path,), first, stop = shard.files, shard.first, shard.first + shard.faces
    wanted = list(dict.fromkeys(filter(None, (columns.image, columns.id, *columns.keep))))
    try:
        with pq.ParquetFile(storage.open(path), pre_buffer=False, buffer_size=2**20) as file:
            groups, at = _groups(file.metadata, first, stop)
            for batch in file.iter_batches(size, row_groups=groups, columns=wanted):
                low, high = max(first - at, 0), min(stop - at, len(batch))
                if low < high:
                    yield _piece(batch.slice(low, high - low), columns, path, at + low)
                at += len(batch)
    except (pa.ArrowException, OSError) as err:
        raise BadData(f"{storage.name(path)} cannot be read as Parquet: {err}.") from err


def _groups(metadata: Any, first: int, stop: int) -> tuple[list[int], int]:
    """The row groups that have rows from `first` up to `stop`, and the number of the first row in them."""
    ends = np.cumsum([metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)])
    starts = np.concatenate([[0], ends[:-1]])
    groups = np.flatnonzero((starts < stop) & (ends > first))
    return groups.tolist(), int(starts[groups[0]]) if len(groups) else 0


def _piece(batch: pa.RecordBatch, columns: Columns, path: str, first: int) -> _Piece:
    pictures = [one.get("bytes") if isinstance(one, dict) else one for one in batch[columns.image].to_pylist()]
    ids = (
        batch[columns.id].cast(pa.string())
        if columns.id
        else pa.array([f"{path}:{row}" for row in range(first, first + len(batch))], pa.string())
    )
    kept = [(batch.schema.field(name).with_name(other), batch[name]) for name, other in columns.keep.items()]
    return _Piece(ids, pictures, kept)


def _decoded(
    pool: Executor, storage: Storage, session: Session, pieces: Iterable[_Piece]
) -> Iterator[tuple[_Piece, list[NDArray[np.uint8] | str]]]:
    """Each piece with its faces, or why there is none; the next piece is decoded while this one is judged."""
    size, _, channels = session.face_shape

    def decode(picture: bytes | str | None) -> NDArray[np.uint8] | str:
        try:
            data = storage.read(picture) if isinstance(picture, str) else picture or b""
            return decode_face(data, size=size, channels=channels)
        except BadData as err:
            return str(err)
        except OSError as err:
            return f"it cannot be read: {os.strerror(err.errno) if err.errno else err}."

    waiting: deque[tuple[_Piece, Iterator[NDArray[np.uint8] | str]]] = deque()
    for piece in pieces:
        waiting.append((piece, pool.map(decode, piece.pictures)))
        if len(waiting) > 1:
            ready, faces = waiting.popleft()
            yield ready, list(faces)
    for ready, faces in waiting:
        yield ready, list(faces)


def _judged(session: Session, piece: _Piece, faces: Sequence[NDArray[np.uint8] | str]) -> pa.Table:
    good = [row for row, face in enumerate(faces) if not isinstance(face, str)]
    outcome = session.run(np.stack([faces[row] for row in good])) if good else None
    labels: list[str | None] = [None] * len(faces)
    numbers = np.full((len(faces), 1 + len(session.labels)), np.nan, dtype=np.float32)
    for row, label in zip(good, outcome.label if outcome else (), strict=True):
        labels[row] = session.labels[label]
    if outcome:
        numbers[good] = np.column_stack([outcome.confidence, outcome.probabilities])
    errors = [face if isinstance(face, str) else None for face in faces]
    columns = [piece.ids, labels, *(pa.array(column, from_pandas=True) for column in numbers.T), errors]
    kinds = answer_columns(session.labels)
    table = pa.table(
        dict(zip(kinds, columns, strict=True)), schema=pa.schema([(n, pa.type_for_alias(k)) for n, k in kinds.items()])
    )
    for field, column in piece.kept:
        table = table.append_column(field, column)
    return table
