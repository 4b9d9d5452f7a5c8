"""`training.png`: the curves of a training, its phases, and the checkpoints that became members."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from emoexport.train.callbacks import History, read_history
from emoexport.train.config import RunConfig, TrainingConfig
from emoexport.train.lightning_module import metric_name
from emoexport.train.standing import Candidate, WeightsName

__all__ = ["draw_accuracy", "draw_losses", "draw_training"]

# Okabe and Ito's colours, which also the colour-blind tell apart.
_COLOURS: dict[str, str] = {"network": "#0072B2", "ema": "#E69F00", "swa": "#009E73", "train": "#999999"}
_NAMES: dict[WeightsName, str] = {"network": "network", "ema": "EMA", "swa": "SWA"}


def draw_training(run: Path, config: RunConfig, members: Sequence[Candidate]) -> Path:
    """Draw `metrics.csv` of a run as `training.png` beside it.

    Args:
        run: the run's directory.
        config: says where phases, averaging and distillation begin.
        members: the checkpoints that became members.

    Returns:
        The path of the picture.
    """
    epochs = read_history(run / History.FILE)
    figure = Figure(figsize=(10, 7.5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    draw_accuracy(above, epochs, config.training, members)
    draw_losses(below, epochs, config.training)
    above.set_xlabel("")
    above.legend(loc="lower right", fontsize="small")
    below.legend(loc="upper right", fontsize="small")
    figure.suptitle(f"Training of {config.model.backbone}: {len(epochs)} epochs")
    path = run / "training.png"
    figure.savefig(path, dpi=110)
    return path


def draw_accuracy(
    axes: Axes, epochs: Sequence[Mapping[str, float]], settings: TrainingConfig, members: Sequence[Candidate]
) -> None:
    """Accuracy by epoch, in training and of each kind of weights, and what became a member.

    Args:
        axes: where.
        epochs: as `read_history` reads them.
        settings: say where phases, averaging and distillation begin.
        members: the checkpoints that became members.
    """
    numbers = [row["epoch"] for row in epochs]
    axes.plot(
        numbers, [100 * row["train_accuracy"] for row in epochs], color=_COLOURS["train"], label="training, augmented"
    )
    for weights, name in _NAMES.items():
        rows = [row for row in epochs if metric_name(weights) in row]
        if rows:
            values = [100 * row[metric_name(weights)] for row in rows]
            axes.plot([row["epoch"] for row in rows], values, color=_COLOURS[weights], label=f"validation, {name}")
    for member in members:
        axes.plot(member.epoch, 100 * member.accuracy, "o", color=_COLOURS[member.weights], markeredgecolor="black")
    axes.plot([], [], "o", color="white", markeredgecolor="black", label="became a member")
    axes.set_xlabel("epoch")
    axes.set_ylabel("accuracy, %")
    _mark_course(axes, settings, named=True)


def draw_losses(axes: Axes, epochs: Sequence[Mapping[str, float]], settings: TrainingConfig) -> None:
    """Loss by epoch, in training and on validation faces; else as `draw_accuracy`."""
    numbers = [row["epoch"] for row in epochs]
    axes.plot(numbers, [row["train_loss"] for row in epochs], color=_COLOURS["train"], label="training")
    axes.plot(numbers, [row["validation_loss"] for row in epochs], color=_COLOURS["network"], label="validation")
    axes.set_xlabel("epoch")
    axes.set_ylabel("loss")
    _mark_course(axes, settings, named=False)


def _mark_course(axes: Axes, settings: TrainingConfig, *, named: bool) -> None:
    """Shade the phases; draw a line where averaging and distillation begin."""
    axes.grid(alpha=0.3)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    count = len(settings.phases)
    strongest = max(settings.phases) or 1.0
    for index, strength in enumerate(settings.phases if count > 1 else ()):
        first, last = (0.5 + -(-part * settings.epochs // count) for part in (index, index + 1))
        axes.axvspan(first, last, color="#CC79A7", alpha=0.05 + 0.2 * strength / strongest, linewidth=0)
        if named:
            text = f"phase {index + 1}\n{strength:g}"
            axes.text((first + last) / 2, 0.98, text, transform=axes.get_xaxis_transform(), ha="center", va="top")
    for epoch, name in ((settings.swa_from, "SWA"), (settings.distill_from, "self-distillation")):
        if 0 < epoch <= settings.epochs:
            axes.axvline(epoch - 0.5, color="black", linestyle=":", linewidth=1)
            if named:
                height = 0.02 if name == "SWA" else 0.08
                axes.text(epoch - 0.4, height, name, transform=axes.get_xaxis_transform(), fontsize="small")
