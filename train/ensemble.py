"""From data to a run: train, keep the best checkpoints as members, fit the decision."""

import importlib.metadata
import logging
import os
import shutil
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import CSVLogger
from rich.console import Console
from torch.utils.data import DataLoader, TensorDataset

from emoexport.decision import Decision, fit_decision
from emoexport.errors import BadData, UsageError
from emoexport.files import new_directory, refuse_foreign
from emoexport.labels import EMOTIONS
from emoexport.progress import progress_bar
from emoexport.reference import Reference
from emoexport.train.audit import clean_rows
from emoexport.train.checkpoint import (
    RUN_FILE,
    DataRecord,
    FittedDecision,
    RunRecord,
    load_members,
    save_member,
)
from emoexport.train.config import RunConfig
from emoexport.train.dataset import DataSet, Faces, is_synthetic
from emoexport.train.lightning_module import MemberTraining
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


def check_request(config: RunConfig, out: Path, *, force: bool) -> None:
    """Refuse at once what would only fail after data was read or members were trained.

    Raises:
        UsageError: if `out` holds a run and not `force`, there are fewer epochs than members, or a view is unknown.
    """
    views_named(config.views)
    settings = config.training
    if settings.epochs < settings.members:
        raise UsageError(
            f"{settings.epochs} epochs cannot give {settings.members} checkpoints.",
            hint=f"--epochs {settings.members} or more, or --members {settings.epochs}",
        )
    if (out / RUN_FILE).exists() and not force:
        raise UsageError(f"{out} holds a run already.", hint="--force replaces it, or name another --out")
    refuse_foreign(out, marker=RUN_FILE)


def train_ensemble(
    config: RunConfig, data: DataSet, out: Path, *, label_order: str, console: Console, force: bool = False
) -> RunRecord:
    """Train one network, keep its best checkpoints as members and fit the decision of their vote.

    Args:
        config: what to train, and how.
        data: faces of the configured size and channels.
        out: the run's directory; it appears when the run is complete.
        label_order: recorded, so that later commands read the data alike.
        console: where progress is shown.
        force: replace a run that stands there.

    Raises:
        UsageError: as `check_request`.
        BadData: if an emotion has no face left to train or to validate on.
    """
    settings = config.training
    check_request(config, out, force=force)
    L.seed_everything(settings.seed, verbose=False)
    faces = training_faces(data, config)
    started = time.monotonic()
    with new_directory(out, marker=RUN_FILE) as directory:
        names = _fit(config, faces, directory, console)
        record = RunRecord(
            config=config,
            data=DataRecord(
                source=_relative(data.source, out),
                label_order=label_order,
                seed=settings.seed,
                splits={name: len(split) for name, split in data.splits.items()},
                skipped=len(data.skipped),
                outside=data.outside,
                train_faces=len(faces.train),
                train_sha256=faces.train.sha256(),
                validation_faces=len(faces.validation),
                validation_sha256=faces.validation.sha256(),
                validation_from=faces.validation_from,
            ),
            members=tuple(f"members/{name}" for name in names),
            seconds=round(time.monotonic() - started, 1),
            versions={name: importlib.metadata.version(name) for name in ("torch", "timm", "lightning")},
        )
        (directory / RUN_FILE).write_text(record.to_json(), encoding="utf-8")
        fitted = _fit_decision(directory, config, faces.validation, console)
        (directory / "decision.json").write_text(fitted.to_json(), encoding="utf-8")
    return record


def _relative(source: str, out: Path) -> str:
    """A path that holds as long as run and data move together."""
    if is_synthetic(source):
        return source
    return os.path.relpath(Path(source).resolve(), out.resolve())


def _fit(config: RunConfig, faces: Training, directory: Path, console: Console) -> list[str]:
    """Train, and write the best checkpoints as members; return the names of their JSON files, best first."""
    settings = config.training
    keeper = ModelCheckpoint(
        directory / "checkpoints",
        monitor="validation_accuracy",
        mode="max",
        save_top_k=settings.members,
        save_weights_only=True,
        filename="{epoch}",
    )
    callbacks: list[Callback] = [keeper, EpochLines(console)]
    if console.is_terminal:
        callbacks.append(RichProgressBar(leave=False))
    for noisy in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        # Faces are tensors in memory: worker processes would only cost, and small sets log seldom.
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*smaller than the logging interval.*")
        warnings.filterwarnings("ignore", message=".*isinstance.treespec.*")
        warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*")
        trainer = L.Trainer(
            max_epochs=settings.epochs,
            devices=1,
            precision=_precision(settings.precision),
            callbacks=callbacks,
            logger=CSVLogger(directory, name="", version=""),
            enable_progress_bar=console.is_terminal,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        try:
            trainer.fit(
                MemberTraining(config),
                _loader(faces.train, settings.batch_size, shuffle=True),
                _loader(faces.validation, 4 * settings.batch_size, shuffle=False),
            )
        except SystemExit as err:  # what Lightning makes of Ctrl-C
            raise KeyboardInterrupt from err
    (directory / "hparams.yaml").unlink(missing_ok=True)
    best = sorted(keeper.best_k_models.items(), key=lambda item: float(item[1]), reverse=True)
    names = []
    for rank, (path, accuracy) in enumerate(best, start=1):
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        module = MemberTraining(config)
        module.load_state_dict(checkpoint["state_dict"])
        names.append(
            save_member(
                directory / "members",
                str(rank),
                module.network,
                model=config.model,
                epoch=int(checkpoint["epoch"]) + 1,
                accuracy=round(float(accuracy), 6),
            )
        )
    shutil.rmtree(directory / "checkpoints")
    return names


def _precision(wanted: str) -> Any:
    if wanted == "auto":
        if torch.cuda.is_available():
            wanted = "bf16" if torch.cuda.is_bf16_supported() else "fp32"
        else:
            wanted = "bf16" if torch.cpu.get_capabilities().get("avx512_bf16") else "fp32"
    return {"bf16": "bf16-mixed", "fp32": "32-true"}[wanted]


def _loader(faces: Faces, batch_size: int, *, shuffle: bool) -> DataLoader[Any]:
    pictures = torch.from_numpy(faces.images).permute(0, 3, 1, 2).contiguous()
    pairs = TensorDataset(pictures, torch.from_numpy(faces.labels))
    drop_last = shuffle and len(pairs) > batch_size
    return DataLoader(pairs, batch_size=batch_size, shuffle=shuffle, drop_last=drop_last)


class EpochLines(Callback):
    """One line an epoch, which also a log file can hold."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.started = 0.0

    def on_train_epoch_start(self, *_: Any) -> None:
        """Start the clock."""
        self.started = time.monotonic()

    def on_train_epoch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Print the line; validation has run by now."""
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self.console.print(
            f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"
            f"  train loss {metrics['train_loss']:.3f}"
            f"  validation accuracy {metrics['validation_accuracy']:.3f}"
            f"  {time.monotonic() - self.started:.0f} s",
            highlight=False,
        )


def _fit_decision(run: Path, config: RunConfig, faces: Faces, console: Console) -> FittedDecision:
    _, members = load_members(run)
    plain = Decision(labels=config.model.labels)
    reference = Reference(members=members, views=views_named(config.views), decision=plain)
    with progress_bar(console, "scoring the validation faces", len(faces)) as advance:
        scores = reference.scores(faces.images, progress=advance)
    vote = scores.mean(axis=(1, 2))
    decision, candidates = fit_decision(vote, faces.labels, labels=config.model.labels, seed=config.training.seed)
    right = {
        "one member, one view": scores[:, 0, 0].argmax(axis=1),
        "one member, all views": scores[:, 0].mean(axis=1).argmax(axis=1),
        "all members, one view": scores[:, :, 0].mean(axis=1).argmax(axis=1),
        "the full vote": vote.argmax(axis=1),
        "the full vote with its rules": decision.decide(vote).label,
    }
    accuracy = {name: round(float(np.mean(label == faces.labels)), 6) for name, label in right.items()}
    for name, value in accuracy.items():
        console.print(f"validation accuracy of {name}: {value:.3f}", highlight=False)
    return FittedDecision(decision=decision, validation_accuracy=accuracy, candidates=tuple(candidates))
