"""A new run of the best members of several: an ensemble is worth more when its members differ."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from emoexport.errors import BadCheckpoint, BadData, UsageError
from emoexport.files import new_directory, refuse_foreign
from emoexport.train.checkpoint import RUN_FILE, FittedDecision, MemberRecord, RunRecord, load_member, read_run
from emoexport.train.dataset import DataSet, is_synthetic
from emoexport.train.decision_fit import fit_rules
from emoexport.train.ensemble import Training, training_faces

__all__ = [
    "Candidate",
    "best_members",
    "combine_runs",
    "combined_record",
    "different_members",
    "faces_of_run",
    "relative_path",
    "runs_to_combine",
]


class Candidate(NamedTuple):
    """A member of one of the runs."""

    run: Path
    path: Path
    """Its JSON file."""
    record: MemberRecord


def runs_to_combine(runs: Sequence[Path], out: Path, *, least: int = 2, force: bool = False) -> list[RunRecord]:
    """Read what the runs say of themselves, and refuse at once what cannot become one run.

    Args:
        runs: their directories.
        out: the run to be made.
        least: how many runs are needed.
        force: whether a run that stands at `out` may be replaced.

    Raises:
        UsageError: if there are fewer runs, one is named twice, or `out` is taken.
        BadCheckpoint: if one is no run, or they differ in labels, size, channels, views or faces.
    """
    places = [run.resolve() for run in runs]
    if len(set(places)) < max(least, len(places)):
        raise UsageError(
            f"found {len(set(places))} different of {len(places)} runs; needed are {least} or more, each once.",
            hint="emoexport combine runs/a runs/b -o runs/ab",
        )
    if out.resolve() in places:
        raise UsageError(f"{out} is one of the runs to combine.", hint="name another output")
    if (out / RUN_FILE).exists() and not force:
        raise UsageError(f"{out} holds a run already.", hint="--force replaces it, or name another output")
    refuse_foreign(out, marker=RUN_FILE)
    records = [read_run(run) for run in runs]
    for run, record in zip(runs[1:], records[1:], strict=True):
        _require_same(runs[0], records[0], run, record)
    return records


_TRAIN_ALIKE = "train both with the same image_size and channels in [model]"
_DATA_ALIKE = (
    "train both on the same --data with the same --label-order and --seed, and the same validation and "
    "clean_rows_only in [training]"
)


def _require_same(first: Path, ours: RunRecord, other: Path, theirs: RunRecord) -> None:
    def properties(record: RunRecord) -> list[tuple[str, Any, str]]:
        model, data = record.config.model, record.data
        return [
            ("labels", ", ".join(model.labels), "train both for the same emotions"),
            ("image_size", model.image_size, _TRAIN_ALIKE),
            ("channels", model.channels, _TRAIN_ALIKE),
            ("views", ", ".join(record.config.views), "train both with the same views"),
            ("training faces", f"SHA-256 {data.train_sha256[:12]}…", _DATA_ALIKE),
            ("validation faces", f"SHA-256 {data.validation_sha256[:12]}…", _DATA_ALIKE),
        ]

    for (name, found, hint), (_, needed, _) in zip(properties(theirs), properties(ours), strict=True):
        if found != needed:
            raise BadCheckpoint(
                f"the runs do not fit together: {first} has the {name} {needed}, {other} has {found}.", hint=hint
            )


def best_members(runs: Sequence[Path], records: Sequence[RunRecord], count: int) -> list[Candidate]:
    """Choose members by validation accuracy, one of each run first where there is room for that.

    A member that stands in several runs counts once.

    Args:
        runs: their directories.
        records: what `runs_to_combine` read of them.
        count: how many members to choose.

    Returns:
        The chosen, best first.

    Raises:
        UsageError: if the runs have fewer members.
        BadCheckpoint: if a member's record cannot be read.
    """
    ranked = different_members(runs, records)
    if len(ranked) < count:
        raise UsageError(
            f"the runs have {len(ranked)} different members; needed are {count}.", hint=f"--members {len(ranked)}"
        )
    best_of_each = {one.run: one for one in reversed(ranked)}.values() if count >= len(runs) else ()
    chosen = [*best_of_each, *(one for one in ranked if one not in best_of_each)][:count]
    return sorted(chosen, key=_accuracy, reverse=True)


def different_members(runs: Sequence[Path], records: Sequence[RunRecord]) -> list[Candidate]:
    """All members, best first; one that stands in several runs is taken once.

    Raises:
        BadCheckpoint: if a member's record cannot be read.
    """
    found = [
        Candidate(run, run / name, MemberRecord.parse_json(run / name, error=BadCheckpoint))
        for run, record in zip(runs, records, strict=True)
        for name in record.members
    ]
    different = list({one.record.sha256: one for one in reversed(found)}.values())[::-1]
    return sorted(different, key=_accuracy, reverse=True)


def faces_of_run(run: Path, record: RunRecord, data: DataSet, *, train: bool = False) -> Training:
    """The faces that a run validated on, and those it was trained on.

    Args:
        run: its directory.
        record: its record.
        data: where the faces are to be.
        train: whether the training faces must be those of the run too.

    Raises:
        BadData: if they are others.
    """
    faces = training_faces(data, record.config)
    found = {"validation": faces.validation.sha256() == record.data.validation_sha256}
    if train:
        found["training"] = faces.train.sha256() == record.data.train_sha256
    for name, is_same in found.items():
        if not is_same:
            raise BadData(
                f"the {name} faces in {data.source} are not those of {run}.", hint="--data names where those are"
            )
    return faces


def _accuracy(candidate: Candidate) -> float:
    return candidate.record.validation_accuracy


def combine_runs(
    runs: Sequence[Path],
    data: DataSet,
    out: Path,
    *,
    members: int = 5,
    console: Console,
    force: bool = False,
) -> FittedDecision:
    """Make a run of the best members of several, and fit the decision of their vote anew.

    Members may differ in architecture. The settings are those of the first run.

    Args:
        runs: two or more directories that `train` or `combine` wrote.
        data: the data of the runs, read as the first one did.
        out: the new run's directory; it appears when the run is complete.
        members: how many to take.
        console: where progress is shown.
        force: replace a run that stands at `out`.

    Raises:
        UsageError: as `runs_to_combine`, or if there are fewer members than asked for.
        BadCheckpoint: if the runs do not fit together, or a member is damaged.
        BadData: if the validation faces in `data` are not those of the runs.
    """
    with new_directory(out, marker=RUN_FILE) as directory:
        records = runs_to_combine(runs, out, force=force)
        first = records[0]
        validation = faces_of_run(runs[0], first, data).validation
        chosen = best_members(runs, records, members)
        names = [_copy_member(one, directory / "members", rank) for rank, one in enumerate(chosen, start=1)]
        record = combined_record(records, [one.path for one in chosen], names, source=data.source, out=out)
        (directory / RUN_FILE).write_text(record.to_json(), encoding="utf-8")
        for name, one in zip(names, chosen, strict=True):
            console.print(
                f"member {Path(name).stem}: {one.path}, {one.record.model.backbone}, "
                f"validation accuracy {_accuracy(one):.3f}",
            )
        fitted = fit_rules(directory, record.config, validation, console)
        (directory / "decision.json").write_text(fitted.to_json(), encoding="utf-8")
    return fitted


def combined_record(
    records: Sequence[RunRecord], origins: Sequence[Path], names: Sequence[str], *, source: str, out: Path
) -> RunRecord:
    """What a run made of others says of itself: the settings of the first, with its own members.

    Args:
        records: those of the others.
        origins: the members' JSON files that went into it.
        names: its own members' JSON files, in `members/`.
        source: where the faces are.
        out: where the run will be.
    """
    first = records[0]
    training = first.config.training.model_copy(update={"members": len(names)})
    place = source if is_synthetic(source) else relative_path(out, Path(source))
    return first.model_copy(
        update={
            "config": first.config.model_copy(update={"training": training}),
            "data": first.data.model_copy(update={"source": place}),
            "members": tuple(f"members/{name}" for name in names),
            "seconds": round(sum(one.seconds for one in records), 1),
            "combined_from": tuple(relative_path(out, path) for path in origins),
        }
    )


def _copy_member(member: Candidate, directory: Path, rank: int) -> str:
    """Copy a member's two files under its new rank; return the name of the JSON file."""
    load_member(member.path)  # its hash, its shapes and its values, told by the name it has now
    directory.mkdir(exist_ok=True)
    weights = member.path.parent / member.record.weights
    copy = directory / f"{rank}{weights.suffix}"
    shutil.copyfile(weights, copy)
    record = member.record.model_copy(update={"weights": copy.name})
    (directory / f"{rank}.json").write_text(record.to_json(), encoding="utf-8")
    return f"{rank}.json"


def relative_path(out: Path, path: Path) -> str:
    """A path that holds as long as both move together."""
    return os.path.relpath(path.resolve(), out.resolve())
