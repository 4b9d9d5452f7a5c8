"""From data to a run: choose the faces, train, keep the best checkpoints as members, fit the decision."""

import importlib.metadata
import os
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import lightning as L
import numpy as np
from rich.console import Console

from emoexport.errors import BadData, UsageError
from emoexport.files import move_directory, refuse_foreign, unfinished_directory, write_text, writing
from emoexport.labels import EMOTIONS
from emoexport.train.audit import clean_rows
from emoexport.train.balance import balanced_directory, make_balanced, read_balanced
from emoexport.train.checkpoint import RUN_FILE, DataRecord, RunRecord, save_member
from emoexport.train.config import RunConfig
from emoexport.train.curves import draw_training
from emoexport.train.dataset import DataSet, Faces, is_synthetic
from emoexport.train.decision_fit import fit_rules
from emoexport.train.fitting import Machines, fit, remove_leftovers
from emoexport.train.pretrained import find_start
from emoexport.train.unfinished import REQUEST_FILE, begin
from emoexport.views import views_named

__all__ = ["Training", "check_request", "train_ensemble", "training_faces"]


class Training(NamedTuple):
    """The faces of a run."""

    train: Faces
    validation: Faces
    validation_from: str


def training_faces(data: DataSet, config: RunConfig) -> Training:
    """Choose the faces to train and to validate on.

    Where the data has no split `validation`, a share of `train` is set aside, drawn by the seed, evenly from
    every emotion. No other split is touched.

    Raises:
        UsageError: if the data has no split `train`.
        BadData: if an emotion has no face left to train or to validate on.
    """
    settings = config.training
    masks = clean_rows(data) if settings.clean_rows_only else {}

    def chosen(name: str) -> Faces:
        faces = data.split(name)
        return faces.take(masks[name]) if masks else faces

    train = chosen("train")
    if "validation" in data.splits:
        return _complete(Training(train, chosen("validation"), "validation"))
    rng = np.random.default_rng(settings.seed)
    aside = np.zeros(len(train), dtype=bool)
    for label in np.unique(train.labels):
        rows = rng.permutation(np.flatnonzero(train.labels == label))
        aside[rows[: max(1, round(len(rows) * settings.validation))]] = True
    return _complete(Training(train.take(~aside), train.take(aside), f"{settings.validation:.0%} of train"))


def _complete(chosen: Training) -> Training:
    for name, faces in (("train", chosen.train), ("validate", chosen.validation)):
        missing = np.setdiff1d(np.arange(len(EMOTIONS)), faces.labels)
        if len(missing):
            raise BadData(
                f"no face of '{EMOTIONS[missing[0]]}' is left to {name} on, of {len(faces)} after copies, "
                "contradictions and blanks are left out.",
                hint="add faces of it, or set clean_rows_only = false in [training]",
            )
    return chosen


def check_request(
    config: RunConfig, out: Path, *, force: bool = False, resume: bool = False, machines: Machines | None = None
) -> None:
    """Refuse at once what would only fail after data was read or members were trained.

    Raises:
        UsageError: if `out` holds a run and not `force`; if a training of it is unfinished and neither `force` nor
            `resume`, or `resume` and none is; if there are fewer epochs than members; if a view is unknown.
        MissingRuntime, BadCheckpoint: if the weights to begin with are not there and cannot be had.
        Busy: if another command is writing it.
    """
    views_named(config.views)
    settings = config.training
    if settings.epochs < settings.members:
        raise UsageError(
            f"{settings.epochs} epochs cannot give {settings.members} checkpoints.",
            hint=f"--epochs {settings.members} or more, or --members {settings.epochs}",
        )
    if not (machines or Machines()).is_first_process:
        return  # the first process has answered for all, and what it made since is no obstacle
    with writing(out):
        unfinished = _tidied(out)
    if resume and not unfinished.is_dir():
        raise UsageError(f"there is no unfinished training of {out} to go on with.", hint="leave --resume out")
    if not resume and not force and unfinished.is_dir():
        raise UsageError(
            f"a training of {out} was begun and not finished; it is kept in {unfinished}.",
            hint="--resume goes on with it, --force begins anew",
        )
    if (out / RUN_FILE).exists() and not force and not resume:
        raise UsageError(f"{out} holds a run already.", hint="--force replaces it, or name another --out")
    refuse_foreign(out, marker=RUN_FILE)
    if not resume:
        find_start(config)


def train_ensemble(
    config: RunConfig,
    data: DataSet,
    out: Path,
    *,
    label_order: str,
    console: Console,
    force: bool = False,
    resume: bool = False,
    machines: Machines | None = None,
    balanced_set: Path | None = None,
) -> RunRecord | None:
    """Train one network, keep its best checkpoints as members and fit the decision of their vote.

    Until it is complete a run is kept beside `out`, in `unfinished_directory(out)`.

    Args:
        config: what to train, and how.
        data: faces of the configured size and channels.
        out: the run's directory; it appears when the run is complete.
        label_order: recorded, so that later commands read the data alike.
        console: where progress is shown.
        force: replace a run that stands there, and forget an unfinished one.
        resume: go on with an unfinished one, from the last epoch that ended.
        machines: the devices to train on; one, if None.
        balanced_set: where the balanced training set is or shall be, if it is wanted; None for the usual place.

    Returns:
        The record of the run; None in processes other than the first, which only helped.

    Raises:
        UsageError: as `check_request`, or if an unfinished run was begun with other settings or faces.
        BadData: if an emotion has no face left to train or to validate on.
        MissingRuntime: if memory does not suffice for the smallest batch.
        Busy: if another command is writing it.
        DiskFull: if there is no room for it; the epochs that ended are kept.
    """
    machines = machines or Machines()
    with writing(out) if machines.is_first_process else nullcontext():
        check_request(config, out, force=force, resume=resume, machines=machines)
        L.seed_everything(config.training.seed, verbose=False)
        faces = training_faces(data, config)
        record = _data_record(config, data, faces, out, label_order)
        unfinished = unfinished_directory(out)
        if machines.is_first_process:
            begin(unfinished, config, record, force=force)
        train = faces.train
        if config.training.balance:
            balance, seed = config.training.balance, config.training.seed
            directory = balanced_set or balanced_directory(data.source, train, balance, seed=seed)
            train = _balanced(train, config, directory, console, machines)
        fitted = fit(config, train, faces.validation, unfinished, machines, console)
        if not machines.is_first_process:
            return None
        names = [
            save_member(
                unfinished / "members",
                str(rank),
                weights,
                model=config.model,
                epoch=candidate.epoch,
                weights_of=candidate.weights,
                accuracy=round(candidate.accuracy, 6),
            )
            for rank, (candidate, weights) in enumerate(fitted.members(), start=1)
        ]
        run = RunRecord(
            config=config,
            data=record,
            members=tuple(f"members/{name}" for name in names),
            batch_size=fitted.batch_size,
            accumulate=fitted.accumulate,
            seconds=round(fitted.seconds, 1),
            versions={name: importlib.metadata.version(name) for name in ("torch", "timm", "lightning")},
        )
        write_text(unfinished / RUN_FILE, run.to_json())
        rules = fit_rules(unfinished, config, faces.validation, console)
        write_text(unfinished / "decision.json", rules.to_json())
        draw_training(unfinished, config, fitted.standing)
        move_directory(unfinished, out, marker=RUN_FILE)
        remove_leftovers(out)  # only now: until it was moved, a resumed training would have needed them
        return run


def _tidied(out: Path) -> Path:
    """Where an unfinished run is, after what trainings left that were killed while they ended was removed."""
    unfinished = unfinished_directory(out)
    if (out / RUN_FILE).is_file() and (out / REQUEST_FILE).is_file():
        remove_leftovers(out)
    if not (unfinished / REQUEST_FILE).is_file():  # not yet begun, or the run that was replaced, or parts of one
        shutil.rmtree(unfinished, ignore_errors=True)
    return unfinished


def _balanced(faces: Faces, config: RunConfig, directory: Path, console: Console, machines: Machines) -> Faces:
    """The balanced training set, made by the first process and read by all."""
    settings = config.training
    if machines.is_first_process:
        make_balanced(faces, settings.balance, directory, seed=settings.seed, console=console)
    return read_balanced(directory)[0]


def _data_record(config: RunConfig, data: DataSet, faces: Training, out: Path, label_order: str) -> DataRecord:
    return DataRecord(
        source=_relative(data.source, out),
        label_order=label_order,
        seed=config.training.seed,
        splits={name: len(split) for name, split in data.splits.items()},
        skipped=len(data.skipped),
        outside=data.outside,
        train_faces=len(faces.train),
        train_sha256=faces.train.sha256(),
        validation_faces=len(faces.validation),
        validation_sha256=faces.validation.sha256(),
        validation_from=faces.validation_from,
    )


def _relative(source: str, out: Path) -> str:
    """A path that holds as long as run and data move together."""
    if is_synthetic(source):
        return source
    return os.path.relpath(Path(source).resolve(), out.resolve())
