"""`score.json`: what was asked of a scoring, so that it goes on only as it began."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import reduce

from emoexport.config import Record
from emoexport.errors import BadInput, UsageError
from emoexport.shard_scoring import Tally, read_tally
from emoexport.shards import FOOTERS, Columns, Plan, Shard
from emoexport.storage import Storage

__all__ = [
    "RECORD_FILE",
    "SUMMARY_FILE",
    "ScoreRecord",
    "ScoreSummary",
    "begin",
    "read_record",
    "require_begun",
    "split_finished",
]

RECORD_FILE = "score.json"
SUMMARY_FILE = "summary.json"


class ScoreRecord(Record):
    """What was asked. Parts are there for this alone; another command begins anew or is refused."""

    data: str
    """As it was named."""
    input_digest: str
    bundle: str
    bundle_digest: str
    engine: str
    labels: tuple[str, ...]
    columns: Columns | None
    faces: int
    shards: int
    faces_a_part: int


class ScoreSummary(Record):
    """What came of it, written when all is done."""

    total: Tally
    faces_before: int
    """Of these, what earlier runs did."""
    seconds: float = 0.0
    """Of the last run."""
    workers_replaced: int = 0
    """In that run, as they died."""


_MUST_AGREE: Mapping[str, str] = {
    "bundle_digest": "another bundle",
    "engine": "another engine",
    "input_digest": "another input, or the input was changed",
    "columns": "other columns",
    "faces_a_part": "parts of another size",
}


def read_record(out: Storage) -> ScoreRecord | None:
    """The record of what was begun there; None if nothing was.

    Raises:
        UsageError: if other files are there.
        BadInput: if it is no such record.
    """
    if out.kind_of(RECORD_FILE) != "file":
        if any(out.files()):
            raise UsageError(
                f"{out.root} holds other files (there is no {RECORD_FILE} in it).",
                hint="name an empty or a new folder",
            )
        return None
    try:
        return ScoreRecord.model_validate_json(out.read(RECORD_FILE))
    except ValueError as err:
        raise BadInput(f"{out.name(RECORD_FILE)} is no record of a scoring.", hint="name another --out") from err


def begin(out: Storage, asked: ScoreRecord, *, force: bool) -> ScoreRecord:
    """Go on with what was begun in a folder, or begin there.

    Args:
        out: the folder.
        asked: what is asked now.
        force: remove what is of another scoring.

    Returns:
        The record that is there now.

    Raises:
        UsageError: as `read_record`, and if something else was begun there.
    """
    found = read_record(out)
    other = found and next(
        (text for field, text in _MUST_AGREE.items() if getattr(found, field) != getattr(asked, field)), None
    )
    if found and other:
        if not force:
            raise UsageError(
                f"{out.root} has scores of {other}: {_was(found)}.", hint="--force removes them; or name another --out"
            )
        last = RECORD_FILE  # while it is there, this is still ours
        for name in sorted((one.path for one in out.files()), key=lambda name: name == last):
            if name in (RECORD_FILE, SUMMARY_FILE) or name.startswith("part-"):
                out.remove(name)
    out.sweep()
    if found and not other:
        return found
    out.write(RECORD_FILE, asked.to_json().encode())
    return asked


def require_begun(out: Storage, record: ScoreRecord) -> None:
    """Before a part is put there: a worker may outlive its command by moments, and another have begun anew.

    Raises:
        UsageError: if something else was begun in the folder since.
    """
    if read_record(out) != record:
        raise UsageError(f"another scoring was begun in {out.root}.", hint="name another --out")


def split_finished(out: Storage, plan: Plan) -> tuple[list[Shard], Tally]:
    """The shards of a plan that have no part yet, and what the parts say that are there."""
    names = {one.path for one in out.files()}
    with ThreadPoolExecutor(FOOTERS) as pool:
        tallies = pool.map(lambda shard: read_tally(out, shard.part), [one for one in plan.shards if one.part in names])
        total = reduce(Tally.__add__, tallies, Tally())
    return [one for one in plan.shards if one.part not in names], total


def _was(found: ScoreRecord) -> str:
    return f"{found.faces:,} faces of {found.data} by {found.engine} of {found.bundle}"
