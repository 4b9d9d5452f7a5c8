"""A data set looked over, and what is wrong with it held against the accuracy of a run."""

import time
from pathlib import Path

from rich.console import Console

from emoexport.audit_tables import audit_markdown
from emoexport.clock import timestamp
from emoexport.errors import BadCheckpoint, UsageError
from emoexport.files import write_text, writing
from emoexport.leakage import AuditReport, RunAccuracy, judge_rows
from emoexport.progress import progress_bar
from emoexport.reference import Reference
from emoexport.run_faces import data_name, data_of_run
from emoexport.train.audit import RowFindings, audit_data, distinct_faces, require_enough
from emoexport.train.checkpoint import FittedDecision, load_members, read_run
from emoexport.train.dataset import DataSet, Faces, load_data
from emoexport.train.near_duplicates import THRESHOLD, near_duplicates
from emoexport.views import views_named

__all__ = ["audit"]

_SIZE = 48  # pixels; fine detail is compared at no more


def audit(
    source: str,
    *,
    size: int | None = None,
    near: bool = True,
    run: Path | None = None,
    split: str | None = None,
    quick: bool = False,
    out: Path | None = None,
    label_order: str | None = None,
    skip_bad: bool = False,
    console: Console,
) -> AuditReport:
    """Look over a data set, and write `audit.json` and `audit.md` if a directory is named.

    Args:
        source: where the faces are, as `train` takes them.
        size: height and width in pixels to read them at; None for 48, or for that of the run.
        near: also look for near duplicates.
        run: a run whose accuracy is shared out by what is found.
        split: which split the run is judged on; None for the one meant for testing.
        quick: the run votes with its first view only.
        out: the directory to write to; None to write nothing.
        label_order: what numbered labels mean; None for what they mean to the run, or `fer2013`.
        skip_bad: leave out faces that cannot be read.
        console: where progress is shown.

    Raises:
        BadData: if the faces cannot be read, or are too few to train and to validate on.
        BadCheckpoint: if the run cannot be rebuilt.
        UsageError: if a size is asked for that is not the run's, or there is no such split.
        Busy: if another command is writing where the reports go.
    """
    vote = _vote_of(run, quick=quick) if run else None  # first, since reading and searching take a while
    data = _read(source, size=size, run=run, label_order=label_order, skip_bad=skip_bad)
    split = split or data.evaluation_split()
    data.split(split)
    require_enough(data)
    for line in data.summary():
        console.print(line)
    started = time.monotonic()
    distinct = distinct_faces(data)
    pairs = None
    if near:
        with progress_bar(console, "comparing every picture with every other", len(distinct.images)) as advance:
            pairs = near_duplicates(distinct.images, progress=advance)
    found, findings = audit_data(data, distinct, pairs, threshold=THRESHOLD)
    seconds = time.monotonic() - started
    report = AuditReport(
        created=timestamp(),
        data=data_name(source),
        size=distinct.images.shape[1],
        channels=distinct.images.shape[3],
        audit=found,
        run=_judge(vote, run, data.split(split), findings[split], split=split, searched=near, console=console)
        if run and vote
        else None,
        seconds=round(seconds, 1),
    )
    if out is not None:
        with writing(out):
            write_text(out / "audit.json", report.to_json())
            write_text(out / "audit.md", audit_markdown(report))
    return report


def _read(source: str, *, size: int | None, run: Path | None, label_order: str | None, skip_bad: bool) -> DataSet:
    if run is None:
        return load_data(source, size=size or _SIZE, label_order=label_order or "fer2013", skip_bad=skip_bad)
    record = read_run(run)
    needed = record.config.model.image_size
    if size not in (None, needed):
        raise UsageError(f"--size is {size}; the members in {run} take faces of {needed}.", hint="leave --size out")
    return data_of_run(run, record, source, label_order=label_order, skip_bad=skip_bad)


def _vote_of(run: Path, *, quick: bool) -> Reference:
    _, members = load_members(run)
    names = read_run(run).config.views
    decision = FittedDecision.parse_json(run / "decision.json", error=BadCheckpoint).decision
    return Reference(members=members, views=views_named(list(names[:1] if quick else names)), decision=decision)


def _judge(
    vote: Reference,
    run: Path,
    faces: Faces,
    found: RowFindings,
    *,
    split: str,
    searched: bool,
    console: Console,
) -> RunAccuracy:
    """The accuracy of a run on one split, by what was found of its rows."""
    if split in ("train", "validation"):
        console.print(f"The split '{split}' made the members: its accuracy says nothing of new faces.", style="yellow")
    passes = len(vote.members) * len(vote.views)
    with progress_bar(console, f"the run's vote, {passes} passes a face", len(faces)) as advance:
        decided = vote.run(faces.images, progress=advance)
    return judge_rows(
        decided.label == faces.labels,
        found,
        run=run.resolve().name,
        split=split,
        views=tuple(view.name for view in vote.views),
        searched=searched,
    )
