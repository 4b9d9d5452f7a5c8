"""What happens beside the training of a network: lines in the log, the history, the best checkpoints.

All of it is kept in the checkpoint that a resumed training begins from, and each file is written before that
checkpoint and removed only after it, so that a kill at any moment leaves nothing that a resumed run could miss.
"""

import csv
import io
import time
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from safetensors.torch import save_file

from emoexport.errors import BadData
from emoexport.files import read_text, write_text
from emoexport.train.config import TrainingConfig
from emoexport.train.lightning_module import MemberTraining, metric_name
from emoexport.train.standing import Candidate, podium

__all__ = ["BestCheckpoints", "EpochLines", "History", "read_history"]


class BestCheckpoints(Callback):
    """Keep the best weights of distinct epochs as files: of the network, of its EMA, and one SWA model."""

    def __init__(self, directory: Path, count: int) -> None:
        self.directory = directory
        self.count = count
        self.standing: list[Candidate] = []

    def on_train_epoch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Remove the files of those who lost their place: the checkpoint that still knew them is replaced by now."""
        if trainer.is_global_zero:
            self.remove_losers()

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Let this epoch's weights compete; validation has run by now."""
        assert isinstance(module, MemberTraining)
        weights = module.ready_weights()
        epoch = trainer.current_epoch + 1
        entered = [
            Candidate(epoch=epoch, weights=name, accuracy=float(trainer.callback_metrics[metric_name(name)]))
            for name in weights
        ]
        self.standing = podium([*self.standing, *entered], self.count)
        if not trainer.is_global_zero:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        for candidate in entered:
            if candidate in self.standing:
                state = {key: value.contiguous() for key, value in weights[candidate.weights].state_dict().items()}
                save_file(state, self.directory / candidate.file)

    def remove_losers(self) -> None:
        """Leave only the files of those who hold a place."""
        kept = {candidate.file for candidate in self.standing}
        for path in self.directory.glob("*.safetensors"):
            if path.name not in kept:
                path.unlink()

    def state_dict(self) -> dict[str, Any]:
        """The standing, for the checkpoint."""
        return {"standing": [candidate._asdict() for candidate in self.standing]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The standing, from the checkpoint."""
        self.standing = [Candidate(**fields) for fields in state_dict["standing"]]


class History(Callback):
    """The figures of every epoch, as `metrics.csv`: whole after every epoch, each epoch once, also after a kill."""

    FILE = "metrics.csv"

    def __init__(self, directory: Path) -> None:
        self.path = directory / self.FILE
        self.epochs: list[dict[str, float]] = []
        self.seconds = 0.0
        """That the epochs took, before a kill and after."""
        self.started = 0.0

    def on_train_epoch_start(self, *_: Any) -> None:
        """Start the clock."""
        self.started = time.monotonic()

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Add a row, and write the file."""
        self.seconds += time.monotonic() - self.started
        figures = {name: round(float(value), 6) for name, value in trainer.callback_metrics.items()}
        assert isinstance(module, MemberTraining)
        row = {"epoch": trainer.current_epoch + 1, "phase": module.phase + 1, **figures}
        self.epochs.append(row)
        if trainer.is_global_zero:
            names = list(dict.fromkeys(name for epoch in self.epochs for name in epoch))
            text = io.StringIO()
            writer = csv.DictWriter(text, names, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.epochs)
            write_text(self.path, text.getvalue())

    def state_dict(self) -> dict[str, Any]:
        """The rows, for the checkpoint."""
        return {"epochs": self.epochs, "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The rows, from the checkpoint."""
        self.epochs = list(state_dict["epochs"])
        self.seconds = float(state_dict["seconds"])


def read_history(path: Path) -> list[dict[str, float]]:
    """The rows of a `metrics.csv`, without the cells that are empty.

    Raises:
        BadData: if there is none, or it has anything but numbers.
    """
    text = io.StringIO(read_text(path, error=BadData), newline="")
    try:
        return [{name: float(cell) for name, cell in row.items() if cell} for row in csv.DictReader(text)]
    except (csv.Error, ValueError, TypeError) as err:
        raise BadData(f"{path} holds no numbers: {err}.") from err


class EpochLines(Callback):
    """A line for each epoch and one for each change of course, which also a log file can hold."""

    def __init__(self, console: Console, settings: TrainingConfig) -> None:
        self.console = console
        self.settings = settings
        self.started = 0.0
        self.announced_phase: int | None = None

    def on_train_epoch_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Start the clock; say what begins with this epoch."""
        self.started = time.monotonic()
        assert isinstance(module, MemberTraining)
        settings, epoch = self.settings, trainer.current_epoch + 1
        if self.announced_phase != module.phase and len(settings.phases) > 1:
            strength = settings.phases[module.phase] * settings.augmentation
            self._say(f"phase {module.phase + 1} of {len(settings.phases)}: augmentation at strength {strength:.2f}")
        self.announced_phase = module.phase
        if epoch == settings.distill_from:
            self._say("self-distillation begins: the network also learns from its averaged weights")
        if epoch == settings.swa_from:
            self._say("stochastic weight averaging begins")

    def on_train_epoch_end(self, trainer: L.Trainer, _: L.LightningModule) -> None:
        """Print the line; validation has run by now."""
        figures = {name: float(value) for name, value in trainer.callback_metrics.items()}
        averages = ", ".join(
            f"{name} {figures[metric]:.3f}"
            for name, metric in (("ema", metric_name("ema")), ("swa", metric_name("swa")))
            if metric in figures
        )
        self._say(
            f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"
            f"  train loss {figures['train_loss']:.3f} accuracy {figures['train_accuracy']:.3f}"
            f"  validation loss {figures['validation_loss']:.3f} accuracy {figures['validation_accuracy']:.3f}"
            + (f" ({averages})" if averages else "")
            + f"  {time.monotonic() - self.started:.0f} s"
        )

    def _say(self, line: str) -> None:
        self.console.print(line)
