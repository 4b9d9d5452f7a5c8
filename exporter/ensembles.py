"""Ensembles as a user names them, by model paths, and their evaluation on labelled faces."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import nn

from emoexport.clock import timestamp
from emoexport.decision import Decision
from emoexport.engines.machine import describe_machine
from emoexport.errors import BadCheckpoint, UsageError
from emoexport.evaluation import Comparison, EvaluatedMember, EvaluationReport, assess, compare, outcomes_of_steps
from emoexport.evaluation_tables import evaluation_markdown
from emoexport.files import write_bytes, write_text, writing
from emoexport.labels import EMOTIONS
from emoexport.outcome import Outcome
from emoexport.plots import evaluation_plots
from emoexport.progress import progress_bar
from emoexport.reference import Reference
from emoexport.run_faces import data_name, data_of_run, drawn_faces
from emoexport.train.checkpoint import (
    RUN_FILE,
    FittedDecision,
    MemberRecord,
    RunRecord,
    load_member,
    load_members,
    read_run,
    require_alike,
)
from emoexport.train.config import RunConfig
from emoexport.train.dataset import DataSet, Faces, load_data
from emoexport.train.ensemble import training_faces
from emoexport.views import views_named

__all__ = ["Ensemble", "evaluate", "open_ensemble"]


@dataclass(frozen=True, kw_only=True)
class Ensemble:
    """Members from one or several model paths, best on validation first."""

    files: tuple[Path, ...]
    """Their JSON files."""
    records: tuple[MemberRecord, ...]
    members: tuple[nn.Module, ...]
    """In evaluation mode."""
    runs: tuple[Path, ...]
    """The runs they are from; a member in no run has none."""
    homeless: bool
    """Whether there is a member in no run."""

    @property
    def sees(self) -> tuple[int, int]:
        """Size and channels of the faces."""
        return self.records[0].model.image_size, self.records[0].model.channels

    @property
    def name(self) -> str:
        """What reports call it: its runs or files, without the folders of the machine."""
        return " + ".join(path.resolve().name for path in self.runs or self.files)

    @property
    def home(self) -> Path:
        """Where reports go: the first run, or the directory of a member in no run."""
        return self.runs[0] if self.runs else self.files[0].parent

    def run_records(self) -> list[RunRecord]:
        """What the runs say of themselves."""
        return [read_run(run) for run in self.runs]

    def views(self) -> tuple[str, ...]:
        """Names of the views that vote.

        Raises:
            BadCheckpoint: if the runs vote over different views.
        """
        configs = [record.config for record in self.run_records()] or [RunConfig()]
        for run, config in zip(self.runs, configs, strict=False):
            if config.views != configs[0].views:
                raise BadCheckpoint(
                    f"the runs vote over different views: {self.runs[0]} over {len(configs[0].views)}, {run} over "
                    f"{len(config.views)}.",
                    hint="leave out --tta, or train both with the same views",
                )
        return configs[0].views

    def decision(self) -> Decision:
        """The rules of the one run.

        Raises:
            UsageError: if the members are not all from one run.
        """
        if len(self.runs) != 1 or self.homeless:
            raise UsageError(
                "post-processing needs rules that were fitted for this ensemble; its members are not all from one "
                f"run ({len(self.runs)} runs{' and members in none' if self.homeless else ''}).",
                hint="emoexport combine makes one run of them, with rules of its own; or leave out --post-process",
            )
        return FittedDecision.parse_json(self.runs[0] / "decision.json", error=BadCheckpoint).decision

    def data(self, source: str | None, *, label_order: str | None, skip_bad: bool) -> DataSet:
        """Read faces as the first run did.

        Raises:
            UsageError: if there is no run and no `source`.
            BadData: if they cannot be read.
        """
        if self.runs:
            record = read_run(self.runs[0])
            return data_of_run(self.runs[0], record, source, label_order=label_order, skip_bad=skip_bad)
        if source is None:
            raise UsageError(
                f"{self.files[0]} is in no training run, so there is no telling its data.",
                hint="--data names labelled faces",
            )
        model = self.records[0].model
        order = label_order or "fer2013"
        return load_data(source, size=model.image_size, channels=model.channels, label_order=order, skip_bad=skip_bad)


def open_ensemble(paths: Sequence[Path]) -> Ensemble:
    """Make one ensemble of all members that are named.

    Args:
        paths: each a training run, a member's JSON file, or its weights beside the JSON.

    Raises:
        BadCheckpoint: if a path is none of these, a member cannot be rebuilt or stands twice, or members do not fit
            together.
    """
    found = [member for path in paths for member in _members_at(path)]
    found.sort(key=lambda member: -member.record.validation_accuracy)
    files, records = [member.file for member in found], [member.record for member in found]
    for place, (file, record) in enumerate(zip(files, records, strict=True)):
        for other, known in zip(files[:place], records[:place], strict=True):
            if known.sha256 == record.sha256:
                raise BadCheckpoint(f"{other} and {file} are one member, named twice.", hint="name it once")
    require_alike(records, files)
    homes = [_run_of(path) for path in paths]
    return Ensemble(
        files=tuple(files),
        records=tuple(records),
        members=tuple(member.network for member in found),
        runs=tuple({run.resolve(): run for run in homes if run is not None}.values()),
        homeless=None in homes,
    )


@dataclass(frozen=True)
class _Found:
    file: Path
    record: MemberRecord
    network: nn.Module


def _members_at(path: Path) -> list[_Found]:
    if not path.exists():
        raise BadCheckpoint(
            f"there is no model at {path}.",
            hint="--model-path takes a training run, or a member's .json or .safetensors: runs/x/members/1.json",
        )
    if path.is_dir():
        files = [path / name for name in read_run(path).members]
        return [_Found(*found) for found in zip(files, *load_members(path), strict=True)]
    file = path.with_suffix(".json")
    if not file.is_file():
        raise BadCheckpoint(
            f"there is no {file.name} beside {path}; it says which network the weights are for.",
            hint="emoexport train writes members as a pair of files",
        )
    record, network = load_member(file)
    if path != file and record.weights != path.name:
        raise BadCheckpoint(f"{file} is for the weights '{record.weights}', not for {path.name}.")
    return [_Found(file, record, network)]


def _run_of(path: Path) -> Path | None:
    """The run that is at a model path, or that the member there is one of."""
    if path.is_dir():
        return path
    path = path if path.parent.name else path.absolute()  # the parent of "." is "." too
    run = path.parent.parent
    inside = (run / RUN_FILE).is_file() and f"{path.parent.name}/{path.stem}.json" in read_run(run).members
    return run if inside else None


def evaluate(
    ensemble: Ensemble,
    *,
    tta: bool,
    members: bool,
    post_process: bool,
    against: Ensemble | None = None,
    data: str | None = None,
    split: str | None = None,
    limit: int | None = None,
    label_order: str | None = None,
    skip_bad: bool = False,
    out: Path | None = None,
    threads: int | None = None,
    console: Console,
) -> tuple[EvaluationReport, Path]:
    """Measure an ensemble on labelled faces, and what each step of its vote gains; write the reports.

    Args:
        ensemble: the members.
        tta: whether all views of the run vote, or the untouched face alone.
        members: whether all members vote, or the best on validation alone.
        post_process: whether the run's rules decide, or the most probable emotion is decided.
        against: another ensemble, measured on the same faces in the same way and compared face by face.
        data: where the faces are; None for where the run read them.
        split: which split; None for the one meant for testing.
        limit: use this many faces only, drawn at random.
        label_order: what numbered labels mean; None for what they meant to the run.
        skip_bad: leave out faces that cannot be read.
        out: where the reports go; None for `reports/` of the first run.
        threads: how many PyTorch may use; None for its own choice.
        console: where progress is shown.

    Returns:
        The report, and the directory that it is in: `evaluation.json`, `evaluation.md` and plots.

    Raises:
        UsageError: if a split or an option makes no sense for an ensemble, or the two do not read the same faces.
        BadData: if the faces cannot be read.
        Busy: if another command is writing there.
    """
    out = out or ensemble.home / "reports"
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file; needed is a directory.", hint="name another --out")
    vote = _Vote.of(ensemble, tta=tta, members=members, post_process=post_process)
    other = _Vote.of(against, tta=tta, members=members, post_process=post_process) if against else None
    if threads:
        torch.set_num_threads(threads)
    dataset = ensemble.data(data, label_order=label_order, skip_bad=skip_bad)
    split = split or dataset.evaluation_split()
    faces, row_sets = drawn_faces(dataset, split, limit)
    seen_by_other = None
    if against and against.sees != ensemble.sees:
        seen_by_other, _ = drawn_faces(
            against.data(dataset.source, label_order=label_order, skip_bad=skip_bad), split, limit
        )
        _require_same(faces, seen_by_other, ensemble, against)
    for line in dataset.summary():
        console.print(line)
    outcomes = vote.outcomes(faces, console)
    comparison = None
    if against and other:
        others = other.outcomes(seen_by_other or faces, console)
        comparison = Comparison(
            name=against.name,
            members=other.described(),
            views=other.views,
            results=tuple(
                compare(_taken(outcomes, mask), _taken(others, mask), faces.labels[mask], labels=EMOTIONS, rows=rows)
                for rows, mask in row_sets.items()
            ),
        )
    report = EvaluationReport(
        created=timestamp(),
        data=data_name(dataset.source),
        split=split,
        data_sha256=faces.sha256(),
        skipped=len(dataset.skipped),
        members=vote.described(),
        views=vote.views,
        tta=tta,
        ensemble=members,
        post_process=post_process,
        notes=tuple(_notes(ensemble, dataset, split, vote.decision, full=tta and members)),
        labels=EMOTIONS,
        results=tuple(
            assess(_taken(outcomes, mask), faces.labels[mask], labels=EMOTIONS, rows=rows)
            for rows, mask in row_sets.items()
        ),
        against=comparison,
        machine=describe_machine(),
    )
    with writing(out):
        write_text(out / "evaluation.json", report.to_json())
        write_text(out / "evaluation.md", evaluation_markdown(report))
        for name, picture in evaluation_plots(report).items():
            write_bytes(out / name, picture)
    return report, out


@dataclass(frozen=True, kw_only=True)
class _Vote:
    """How an ensemble votes in an evaluation."""

    ensemble: Ensemble
    voters: int
    views: tuple[str, ...]
    decision: Decision | None
    tta: bool
    members: bool

    @classmethod
    def of(cls, ensemble: Ensemble, *, tta: bool, members: bool, post_process: bool) -> "_Vote":
        return cls(
            ensemble=ensemble,
            voters=len(ensemble.members) if members else 1,
            views=ensemble.views() if tta else ("identity",),
            decision=ensemble.decision() if post_process else None,
            tta=tta,
            members=members,
        )

    def described(self) -> tuple[EvaluatedMember, ...]:
        """Who votes."""
        return tuple(
            EvaluatedMember(
                file="/".join(file.absolute().parts[-3:]),  # run, members, file: no folders of the machine
                sha256=record.sha256,
                backbone=record.model.backbone,
                validation_accuracy=record.validation_accuracy,
            )
            for file, record in zip(self.ensemble.files[: self.voters], self.ensemble.records, strict=False)
        )

    def outcomes(self, faces: Faces, console: Console) -> dict[str, Outcome]:
        """What is decided after each step."""
        members = self.ensemble.members[: self.voters]
        # The single pass is of the untouched face, whether that votes or not.
        seen = ("identity", *(name for name in self.views if name != "identity"))
        reference = Reference(members=members, views=views_named(seen), decision=Decision(labels=EMOTIONS))
        with progress_bar(console, f"scoring faces, {len(members)} x {len(seen)} passes each", len(faces)) as advance:
            scores = reference.scores(faces.images, progress=advance)
        return outcomes_of_steps(
            scores,
            labels=EMOTIONS,
            tta=self.tta,
            ensemble=self.members,
            decision=self.decision,
            voting=slice(0 if "identity" in self.views else 1, None),
        )


def _taken(outcomes: Mapping[str, Outcome], mask: NDArray[np.bool_]) -> dict[str, Outcome]:
    return {name: outcome.take(mask) for name, outcome in outcomes.items()}


def _require_same(ours: Faces, theirs: Faces, ensemble: Ensemble, against: Ensemble) -> None:
    """Faces compared one by one must be the same ones, whatever size they are seen at."""
    if not np.array_equal(ours.labels, theirs.labels):
        raise UsageError(
            f"{ensemble.name} and {against.name} read other faces from the same data ({len(ours):,} and "
            f"{len(theirs):,}), or other labels.",
            hint="--label-order says what numbered labels mean, to both",
        )


def _notes(ensemble: Ensemble, dataset: DataSet, split: str, decision: Decision | None, *, full: bool) -> Iterator[str]:
    """What a reader of the figures must know."""
    if any(_was_seen(dataset, split, record) for record in ensemble.run_records()):
        yield f"The members were made with the split '{split}': its figures say nothing of new faces."
    if len(ensemble.runs) > 1:
        yield "Which member is the best single one was decided by the validation accuracy that each run measured."
    if decision is None:
        return
    if not full or len(ensemble.files) < len(read_run(ensemble.runs[0]).members):
        yield "The rules were fitted for the vote of all members and all views of the run, not for this one."
    if not decision.thresholds and not decision.pairs:
        yield "No threshold and no confusion pair was shown to help when the run's rules were fitted, so none is there."


def _was_seen(dataset: DataSet, split: str, record: RunRecord) -> bool:
    """Whether a run trained or chose its members on a split of this data."""
    if split not in ("train", "validation") or "train" not in dataset.splits:
        return False
    return training_faces(dataset, record.config).train.sha256() == record.data.train_sha256
