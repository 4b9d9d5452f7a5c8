"""`score`: where millions of faces are planned, given to workers, and counted."""

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from emoexport.bundle import Bundle
from emoexport.cascade_record import is_cascade
from emoexport.cluster import Division, Work, call_there, connect, divide, score_on
from emoexport.engines import BACKENDS
from emoexport.errors import BadBundle
from emoexport.precision import PRECISIONS
from emoexport.progress import progress_bar
from emoexport.runtime import load
from emoexport.score_record import SUMMARY_FILE, ScoreRecord, ScoreSummary, begin, read_record, split_finished
from emoexport.shard_scoring import answer_columns
from emoexport.shards import Columns, Plan, Shard, plan_shards
from emoexport.storage import Storage

__all__ = ["Wish", "score_all"]


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What is asked for; None is for what is best here, as `load` and `divide` have it."""

    data: str
    out: str
    bundle: Path
    engine: str | None = None
    precision: str | None = None
    cascade: str | None = None
    batch: int | None = None
    part: int = 4096
    """Faces in a part."""
    force: bool = False
    """Whether another scoring that is in `out` may be removed."""
    columns: Columns = field(default_factory=Columns)
    workers: int | None = None
    threads: int | None = None
    address: str | None = None
    cache: Path | None = None


class _Opened(NamedTuple):
    """What a session says of itself."""

    bundle_digest: str
    engine: str
    device: str
    batch: int
    why: str
    notes: tuple[str, ...]


def score_all(wish: Wish, console: Console) -> ScoreSummary:
    """Score all faces that have no answer yet, each exactly once, and count the answers.

    Every shard of the plan becomes one part, of a name that is the same every time and which appears whole. So a shard
    that is scored again, as its worker died or was thought to have, ends as the same one part; and what has a part is
    not scored again.

    Args:
        wish: what is asked for.
        console: where it says what it does.

    Raises:
        UsageError: if the command makes no sense, or something else was begun in the folder.
        BadInput: if bundle, Parquet files or parts cannot be used.
        MissingRuntime: if Ray, the cluster or every engine is missing.
        Busy: if another command is writing into the folder, of those on a disk.
        DiskFull: if there is no room for a part.
    """
    bundle, out = Bundle.open(wish.bundle), Storage(wish.out)
    columns = answer_columns(bundle.manifest.labels)
    plan = plan_shards(wish.data, size=wish.part, columns=wish.columns, taken=columns, out=wish.out)
    with ExitStack() as stack:
        stack.enter_context(out.writing())
        settings = _settings(wish, read_record(out), bundle.manifest.digest)
        if wish.address:
            console.print(f"connecting to Ray at {wish.address} ...")
        machines = stack.enter_context(connect(wish.address)) if wish.address else []
        opened = _look_on(machines, str(bundle.path.resolve()), settings)
        if opened.bundle_digest != bundle.manifest.digest:
            raise BadBundle(f"{wish.bundle} was replaced since it was opened.", hint="the same command again")
        for text, style in ((f"{wish.bundle}, {opened.why}", ""), *((note, "yellow") for note in opened.notes)):
            console.print(text, style=style)
        record = begin(out, _record(wish, bundle, plan, opened), force=wish.force)
        left, before = split_finished(out, plan)
        summary = ScoreSummary(total=before, faces_before=before.faces)
        if left:
            out.remove(SUMMARY_FILE)
            machines = machines or stack.enter_context(connect(None, (wish.workers or 1) * (wish.threads or 1)))
            division = divide(machines, workers=wish.workers, threads=wish.threads, on_gpu=opened.device == "cuda")
            work = Work(
                bundle=str(bundle.path.resolve()),
                settings={**_by_name(opened.engine), "batch": opened.batch, "cache": settings["cache"]},
                source=plan.source,
                out=out,
                record=record,
            )
            summary = _score(division, left, work, summary, console)
        if left or out.kind_of(SUMMARY_FILE) != "file":
            out.write(SUMMARY_FILE, summary.to_json().encode())
    return summary


def _score(
    division: Division, shards: Sequence[Shard], work: Work, before: ScoreSummary, console: Console
) -> ScoreSummary:
    """Score what is left, behind a bar."""
    total, replaced, begun = before.total, set[str](), time.monotonic()
    many = f"{division.workers} worker{'s' * (division.workers > 1)}"
    title = f"scoring faces with {many} of {division.threads} thread{'s' * (division.threads > 1)}"
    with progress_bar(console, title, sum(shard.faces for shard in shards)) as done:
        for tally, worker in score_on(division, shards, work):
            total += tally
            replaced |= {worker} - {""}
            done(tally.faces)
    seconds = time.monotonic() - begun
    return ScoreSummary(total=total, faces_before=before.faces_before, seconds=seconds, workers_replaced=len(replaced))


def _settings(wish: Wish, begun: ScoreRecord | None, digest: str) -> dict[str, Any]:
    """Of `load`: as asked; where nothing is, the engine that a scoring with the same bundle began with."""
    asked = {"engine": wish.engine, "precision": wish.precision, "cascade": wish.cascade}
    if begun and begun.bundle_digest == digest and not any(asked.values()):
        asked = _by_name(begun.engine)
    cache = str(wish.cache.resolve()) if wish.cache else None
    return {**asked, "batch": wish.batch, "threads": wish.threads, "cache": cache}


def _by_name(engine: str) -> dict[str, str | None]:
    """How `load` is asked for an engine of this name."""
    if is_cascade(engine):
        return {"engine": None, "precision": None, "cascade": engine}
    ((backend, precision),) = [(b, p) for b in BACKENDS for p in PRECISIONS if engine == f"{b}-{p}"]
    return {"engine": backend, "precision": precision, "cascade": None}


def _look_on(machines: Sequence[Mapping[str, float]], bundle: str, settings: Mapping[str, Any]) -> _Opened:
    """Look at the engine on this machine, or on one of a cluster, one with a GPU if there is any."""
    if not machines:
        return _look(bundle, settings)
    found: _Opened = call_there(_look, bundle, settings, gpus=int(any(one.get("GPU") for one in machines)))
    return found


def _look(bundle: str, settings: Mapping[str, Any]) -> _Opened:
    """Open the engine, and say what it is."""
    with load(bundle, **settings) as session:
        return _Opened(
            session.manifest.digest, session.engine, session.device, session.batch, session.why, session.notes
        )


def _record(wish: Wish, bundle: Bundle, plan: Plan, opened: _Opened) -> ScoreRecord:
    return ScoreRecord(
        data=wish.data,
        input_digest=plan.digest,
        bundle=str(wish.bundle),
        bundle_digest=bundle.manifest.digest,
        engine=opened.engine,
        labels=tuple(bundle.manifest.labels),
        columns=plan.source.columns,
        faces=plan.faces,
        shards=len(plan.shards),
        faces_a_part=wish.part,
    )
