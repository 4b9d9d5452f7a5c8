"""The commands that make and judge an ensemble."""

from pathlib import Path
from typing import Annotated

import typer

from emoexport.cli_options import DataOption, LabelOrder, SkipBad, console_of

__all__ = ["train"]


def train(
    data: DataOption = "synthetic:5600",
    out: Annotated[Path | None, typer.Option(help="The run's directory; runs/<data>-<preset> if none.")] = None,
    preset: Annotated[
        str, typer.Option(help="tiny: minutes, for trying. cpu: FER-2013 from scratch in under an hour.")
    ] = "tiny",
    config: Annotated[Path | None, typer.Option(help="A TOML file of your own instead of a preset.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Instead of the preset's.")] = None,
    members: Annotated[int | None, typer.Option(min=1, help="How many checkpoints become members.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=2, help="Instead of the preset's.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, max=2**32 - 1, help="Of everything random.")] = None,
    label_order: LabelOrder = "fer2013",
    skip_bad: SkipBad = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a run that stands there.")] = False,
) -> None:
    """Train a network and keep its best checkpoints as the members of an ensemble.

    Example: [bold]emoexport train --data fer2013.csv --preset cpu --out runs/fer2013[/bold]
    """
    from emoexport.train.config import load_config  # noqa: PLC0415
    from emoexport.train.dataset import load_data  # noqa: PLC0415
    from emoexport.train.ensemble import check_request, train_ensemble  # noqa: PLC0415

    console = console_of()
    settings = load_config(preset, file=config, epochs=epochs, members=members, batch_size=batch_size, seed=seed)
    plain = data.partition(":")[0]
    out = out or Path("runs") / f"{Path(plain).stem or 'data'}-{config.stem if config else preset}"
    check_request(settings, out, force=force)
    console.print(f"reading {data} ...", highlight=False)
    faces = load_data(
        data,
        size=settings.model.image_size,
        channels=settings.model.channels,
        label_order=label_order,
        skip_bad=skip_bad,
        seed=settings.training.seed,
    )
    for line in faces.summary():
        console.print(line, highlight=False, soft_wrap=True)
    train_ensemble(settings, faces, out, label_order=label_order, console=console, force=force)
    console.print(f"run: {out}\nnext: emoexport build {out} --fp16 --int8", highlight=False, soft_wrap=True)
