"""The commands that make and judge an ensemble."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from emoexport.cli_options import (
    DataOption,
    LabelledFaces,
    LabelOrder,
    Limit,
    OtherLabelOrder,
    SkipBad,
    Split,
    console_of,
    newest,
    print_table,
    read_faces,
)
from emoexport.train.standing import SoupMethod

__all__ = ["combine", "evaluate", "train"]


def train(
    data: DataOption = "synthetic:5600",
    out: Annotated[Path | None, typer.Option(help="The run's directory; runs/<data>-<preset> if none.")] = None,
    preset: Annotated[
        str,
        typer.Option(
            help="tiny: minutes, for trying. cpu: FER-2013 from scratch in an hour. guide: ConvNeXt-Large, for GPUs."
        ),
    ] = "tiny",
    config: Annotated[Path | None, typer.Option(help="A TOML file of your own instead of a preset.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="One setting, such as training.ema_decay=0.99 or model.attention=[]; repeatable."),
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Instead of the preset's.")] = None,
    members: Annotated[int | None, typer.Option(min=1, help="How many checkpoints become members.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=2, help="Faces in a batch of one device.")] = None,
    balance: Annotated[
        int | None, typer.Option(min=0, help="Faces per emotion in the balanced training set; 0 for none.")
    ] = None,
    balanced_set: Annotated[
        Path | None, typer.Option(help="Where that set is or shall be; balanced/<data>-<hash> if none.")
    ] = None,
    pretrained: Annotated[
        bool | None, typer.Option("--pretrained/--no-pretrained", help="Begin with timm's weights of the backbone.")
    ] = None,
    init_from: Annotated[
        Path | None, typer.Option(help="Begin with these local weights: timm's for the backbone, or a member's.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, max=2**32 - 1, help="Of everything random.")] = None,
    devices: Annotated[int, typer.Option(min=1, help="Devices to train on, a node.")] = 1,
    nodes: Annotated[int, typer.Option(min=1, help="Machines to train on; they share the run's directory.")] = 1,
    strategy: Annotated[
        str, typer.Option(help="How devices share the work, in Lightning's words: ddp, fsdp.")
    ] = "auto",
    label_order: LabelOrder = "fer2013",
    skip_bad: SkipBad = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a training that was cut off.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a run that stands there.")] = False,
) -> None:
    """Train a network and keep its best checkpoints as the members of an ensemble.

    Example: [bold]emoexport train --data fer2013.csv --preset cpu --out runs/fer2013[/bold]
    """
    from emoexport.train.config import load_config  # noqa: PLC0415
    from emoexport.train.ensemble import check_request, train_ensemble  # noqa: PLC0415
    from emoexport.train.fitting import Machines  # noqa: PLC0415

    chosen = load_config(
        preset,
        file=config,
        settings=settings or (),
        epochs=epochs,
        members=members,
        batch_size=batch_size,
        balance=balance,
        pretrained=False if init_from and pretrained is None else pretrained,
        init_from=str(init_from) if init_from else None,
        seed=seed,
    )
    machines = Machines(devices=devices, nodes=nodes, strategy=strategy)
    console = console_of() if machines.is_first_process else Console(quiet=True)
    plain = data.partition(":")[0]
    out = out or Path("runs") / f"{Path(plain).stem or 'data'}-{config.stem if config else preset}"
    check_request(chosen, out, force=force, resume=resume, machines=machines)
    faces = read_faces(console, data, chosen, label_order=label_order, skip_bad=skip_bad)
    train_ensemble(
        chosen,
        faces,
        out,
        label_order=label_order,
        console=console,
        force=force,
        resume=resume,
        machines=machines,
        balanced_set=balanced_set,
    )
    if not machines.is_first_process:
        return
    _show_decision(console, out)
    console.print(
        f"run: {out}\ncurves: {out / 'training.png'}\nnext: emoexport build {out} --fp16 --int8",
    )


def combine(
    runs: Annotated[
        list[Path], typer.Argument(help="Two or more training runs on the same faces; one is enough for a soup.")
    ],
    out: Annotated[Path, typer.Option("-o", "--output", "--out", help="The new run's directory.")],
    members: Annotated[
        int | None, typer.Option(min=1, help="How many members to take, best first; 5 if none, all for a soup.")
    ] = None,
    soup: Annotated[
        SoupMethod | None,
        typer.Option(help="Average the members' weights into one: all, greedily on validation faces, or the better."),
    ] = None,
    data: Annotated[str | None, typer.Option(help="Where the faces are, if not where the first run read them.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a run that stands there.")] = False,
) -> None:
    """Make one run of the best members of several, of any architectures, and fit its decision anew.

    At least one member of each run is taken where there is room for that. With --soup the new run has one member,
    the average of weights, which costs the passes of one: good where the members share a start, such as the
    checkpoints of one training, and of one architecture.

    Example: [bold]emoexport combine runs/convnext runs/vit -o runs/both[/bold]
    """
    from emoexport.run_faces import data_of_run  # noqa: PLC0415
    from emoexport.train.combine import best_members, combine_runs, runs_to_combine  # noqa: PLC0415
    from emoexport.train.soup_run import make_soup, soup_ingredients  # noqa: PLC0415

    console = console_of()
    records = runs_to_combine(runs, out, least=1 if soup else 2, force=force)
    # Before data is read: what cannot be combined is told at once.
    if soup:
        soup_ingredients(runs, records, members)
    else:
        best_members(runs, records, members or 5)
    console.print("reading the faces ...")
    faces = data_of_run(runs[0], records[0], data)
    if soup:
        make_soup(runs, faces, out, method=soup, members=members, console=console, force=force)
    else:
        combine_runs(runs, faces, out, members=members or 5, console=console, force=force)
    _show_decision(console, out)
    console.print(f"run: {out}\nnext: emoexport build {out} --fp16 --int8")


def evaluate(
    model_path: Annotated[
        list[Path] | None,
        typer.Option(help="A run, or a member's .json or .safetensors, repeatable; the newest run if none."),
    ] = None,
    tta: Annotated[bool, typer.Option("--tta", help="Let all views of the run vote, not the face alone.")] = False,
    ensemble: Annotated[bool, typer.Option("--ensemble", help="Let all members vote, not the best alone.")] = False,
    post_process: Annotated[
        bool, typer.Option("--post-process", help="Decide by the run's thresholds and confusion pairs.")
    ] = False,
    against: Annotated[
        list[Path] | None, typer.Option(help="Compare with this model path, face by face, repeatable as the other.")
    ] = None,
    data: LabelledFaces = None,
    split: Split = None,
    limit: Limit = None,
    label_order: OtherLabelOrder = None,
    skip_bad: SkipBad = False,
    out: Annotated[Path | None, typer.Option(help="Where the reports go; reports/ of the first run if none.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads PyTorch may use.")] = None,
) -> None:
    """Measure an ensemble on labelled faces, and what each step of its vote gains.

    Example: [bold]emoexport evaluate --tta --ensemble --post-process --model-path runs/fer2013[/bold]
    """
    paths = model_path or [newest(Path("runs"), "run.json", "emoexport train")]
    from emoexport import ensembles  # noqa: PLC0415
    from emoexport.evaluation_tables import evaluation_tables  # noqa: PLC0415

    console = console_of()
    report, where = ensembles.evaluate(
        ensembles.open_ensemble(paths),
        tta=tta,
        members=ensemble,
        post_process=post_process,
        against=ensembles.open_ensemble(against) if against else None,
        data=data,
        split=split,
        limit=limit,
        label_order=label_order,
        skip_bad=skip_bad,
        out=out,
        threads=threads,
        console=console,
    )
    for title, table in evaluation_tables(report):
        print_table(console, title, table)
    for note in report.notes:
        console.print(f"note: {note}", style="yellow")
    console.print(f"reports: {where / 'evaluation.md'}, {where / 'evaluation.json'}")


def _show_decision(console: Console, run: Path) -> None:
    """What temperature and rules gain on held-out validation faces."""
    from emoexport.errors import BadCheckpoint  # noqa: PLC0415
    from emoexport.tables import rules_table, temperature_sentence  # noqa: PLC0415
    from emoexport.train.checkpoint import FittedDecision  # noqa: PLC0415

    fitted = FittedDecision.parse_json(run / "decision.json", error=BadCheckpoint)
    if fitted.temperature:
        console.print(temperature_sentence(fitted.temperature))
    print_table(console, "gains on held-out validation faces, in points of accuracy", rules_table(fitted))
