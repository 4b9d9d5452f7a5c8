"""Lightning at work: from a network and faces to the best checkpoints, through kills and full memories."""

import contextlib
import logging
import os
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.memory import garbage_collection_cuda, is_oom_error
from rich.console import Console
from safetensors.torch import load_file

from emoexport.errors import MissingRuntime, UsageError
from emoexport.train.batches import FaceBatches
from emoexport.train.callbacks import BestCheckpoints, EpochLines, History
from emoexport.train.config import RunConfig
from emoexport.train.dataset import Faces
from emoexport.train.emotenet import ConvNeXtEmoteNet
from emoexport.train.lightning_module import MemberTraining
from emoexport.train.pretrained import load_start
from emoexport.train.standing import Candidate
from emoexport.train.unfinished import REQUEST_FILE

__all__ = ["Fitted", "Machines", "fit", "remove_leftovers"]

_SMALLEST_BATCH = 2  # one face alone has no batch statistics


@dataclass(frozen=True, kw_only=True)
class Machines:
    """What to train on; the words are Lightning's."""

    devices: int = 1
    """A node."""
    nodes: int = 1
    strategy: str = "auto"

    @property
    def is_first_process(self) -> bool:
        """Whether this is the process that writes and speaks for all."""
        node = os.environ.get("NODE_RANK") or os.environ.get("GROUP_RANK") or "0"
        return getattr(rank_zero_only, "rank", 0) == 0 and int(node) == 0

    @property
    def processes(self) -> int:
        """How many take part."""
        return self.devices * self.nodes


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """What a training left."""

    directory: Path
    config: RunConfig
    standing: tuple[Candidate, ...]
    """Best first."""
    batch_size: int
    """Of the last attempt: smaller than asked for where memory did not suffice."""
    accumulate: int
    seconds: float
    """That the epochs took, those before a kill too."""

    def members(self) -> Iterator[tuple[Candidate, ConvNeXtEmoteNet]]:
        """The best, each as a network in evaluation mode."""
        for candidate in self.standing:
            network = ConvNeXtEmoteNet(self.config.model)
            network.load_state_dict(load_file(_candidates(self.directory) / candidate.file))
            yield candidate, network.eval()


def remove_leftovers(directory: Path) -> None:
    """Remove what only a resumed training would need."""
    for left in (_candidates(directory), _last(directory).parent):
        shutil.rmtree(left, ignore_errors=True)
    (directory / REQUEST_FILE).unlink(missing_ok=True)


def fit(
    config: RunConfig, train: Faces, validation: Faces, directory: Path, machines: Machines, console: Console
) -> Fitted:
    """Train, or go on training from the last epoch that ended.

    Where memory does not suffice the batch is halved and accumulation doubled, so that a step still sees as many
    faces.

    Args:
        config: what to train, and how.
        train: the faces to train on.
        validation: the faces that choose the checkpoints.
        directory: of the unfinished run.
        machines: the devices.
        console: where the log goes.

    Raises:
        MissingRuntime: if memory does not suffice for the smallest batch.
        UsageError: if Lightning does not know the strategy, or cannot have so many devices.
    """
    batch_size, accumulate = config.training.batch_size, config.training.accumulate
    while True:
        batches = FaceBatches(
            train,
            validation,
            batch_size=batch_size,
            soft_labels=config.training.soft_labels,
            seed=config.training.seed,
        )
        try:
            best, history = _fit_once(config, batches, accumulate, directory, machines, console)
        except RuntimeError as err:
            if not (is_oom_error(err) or isinstance(err, torch.OutOfMemoryError)):
                raise
            if machines.processes > 1 or batch_size // 2 < _SMALLEST_BATCH:
                raise MissingRuntime(
                    f"the memory does not suffice for batches of {batch_size} faces of {config.model.image_size} px "
                    f"with {config.model.backbone}.",
                    hint="a smaller --batch-size, model.image_size or model.backbone",
                ) from err
        else:
            return Fitted(
                directory=directory,
                config=config,
                standing=tuple(best.standing),
                batch_size=batch_size,
                accumulate=accumulate,
                seconds=history.seconds,
            )
        batch_size, accumulate = batch_size // 2, accumulate * 2
        console.print(f"out of memory: going on with batches of {batch_size}, {accumulate} of them a step")
        garbage_collection_cuda()


def _fit_once(
    config: RunConfig, batches: FaceBatches, accumulate: int, directory: Path, machines: Machines, console: Console
) -> tuple[BestCheckpoints, History]:
    settings = config.training
    last = _last(directory)
    L.seed_everything(settings.seed, verbose=False)
    network = ConvNeXtEmoteNet(config.model)
    resumes = last.is_file()
    if not resumes and (settings.pretrained or settings.init_from):
        console.print(load_start(network, config))
    best = BestCheckpoints(_candidates(directory), settings.members)
    history = History(directory)
    keeper = ModelCheckpoint(
        last.parent, filename=last.stem, enable_version_counter=False, save_on_train_epoch_end=True
    )
    shown = console.is_terminal and machines.is_first_process
    callbacks: list[Callback] = [best, history, EpochLines(console, settings), keeper]
    if shown:
        callbacks.append(RichProgressBar(leave=False))
    with _quiet_lightning():
        try:
            trainer = L.Trainer(
                max_epochs=settings.epochs,
                devices=machines.devices,
                num_nodes=machines.nodes,
                strategy=machines.strategy,
                precision=_precision(settings.precision),
                accumulate_grad_batches=accumulate,
                callbacks=callbacks,
                logger=TensorBoardLogger(directory, name="tensorboard", version=""),
                log_every_n_steps=1_000_000,  # every figure is one of an epoch
                enable_progress_bar=shown,
                enable_model_summary=False,
                num_sanity_val_steps=0,
                use_distributed_sampler=False,
            )
        except (MisconfigurationException, ValueError) as err:
            raise UsageError(
                f"Lightning cannot train on {machines.devices} devices of {machines.nodes} nodes with the strategy "
                f"'{machines.strategy}': {str(err).splitlines()[0]}"
            ) from err
        try:
            trainer.fit(MemberTraining(config, network), batches, ckpt_path=last if resumes else None)
        except SystemExit as err:  # what Lightning makes of Ctrl-C
            console.print("the epochs that ended are kept: the same command with --resume goes on")
            raise KeyboardInterrupt from err
    if machines.is_first_process:
        best.remove_losers()
    return best, history


def _candidates(directory: Path) -> Path:
    return directory / "candidates"


def _last(directory: Path) -> Path:
    """The checkpoint that holds everything a resumed training needs; Lightning writes it whole or not at all."""
    return directory / "checkpoints" / "last.ckpt"


def _precision(wanted: str) -> Any:
    if wanted == "auto":
        if torch.cuda.is_available():
            wanted = "bf16" if torch.cuda.is_bf16_supported() else "fp32"
        else:
            wanted = "bf16" if torch.cpu.get_capabilities().get("avx512_bf16") else "fp32"
    return {"bf16": "bf16-mixed", "fp32": "32-true"}[wanted]


@contextlib.contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Leave out what does not concern us: faces are tensors in memory, and every figure is one of an epoch."""
    for noisy in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        for message in (
            ".*does not have many workers.*",
            ".*smaller than the logging interval.*",
            ".*isinstance.treespec.*",
            ".*lr_scheduler.step.*",
            ".*exists and is not empty.*",
            ".*sync_dist.*",
            ".*in eval mode at the start of training.*",
        ):
            warnings.filterwarnings("ignore", message=message)
        yield
