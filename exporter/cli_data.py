"""The commands that look at data and prepare it: `emoexport data ...`."""

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from emoexport.cli_options import LabelOrder, SkipBad, console_of, print_table, read_faces
from emoexport.labels import LABEL_ORDERS

__all__ = ["data_commands"]

data_commands = typer.Typer(help="Look at labelled faces, and prepare them.", no_args_is_help=True)


@data_commands.command()
def audit(
    data: Annotated[str, typer.Argument(help="Labelled faces, as train takes them.")],
    out: Annotated[
        Path | None, typer.Option(help="A directory for audit.json and audit.md; nothing is written if none.")
    ] = None,
    near: Annotated[
        bool, typer.Option("--near/--no-near", help="Look for near duplicates: a minute for 30,000 faces.")
    ] = True,
    run: Annotated[
        Path | None, typer.Option(help="A run whose accuracy is shared out by what stands in its training split.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Which split to judge it on; test or public_test if none.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Let it vote with its first view only.")] = False,
    size: Annotated[
        int | None, typer.Option(min=16, help="Read faces at this height and width; 48, or that of the run, if none.")
    ] = None,
    label_order: Annotated[
        str | None, typer.Option(help=f"What numbered labels mean: {', '.join(LABEL_ORDERS)}.")
    ] = None,
    skip_bad: SkipBad = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit code 1 if there are leaks, contradicting labels or blank pictures.")
    ] = False,
) -> None:
    """Count copies, leaks, contradictions, blanks and near duplicates of a data set.

    Example: [bold]emoexport data audit fer2013.csv --out reports/fer2013[/bold]
    """
    from emoexport.audit_tables import audit_sections  # noqa: PLC0415
    from emoexport.errors import CheckFailed  # noqa: PLC0415
    from emoexport.inspection import audit as audit_of  # noqa: PLC0415

    console = console_of()
    console.print(f"reading {data} ...")
    report = audit_of(
        data,
        size=size,
        near=near,
        run=run,
        split=split,
        quick=quick,
        out=out,
        label_order=label_order,
        skip_bad=skip_bad,
        console=console,
    )
    for section in audit_sections(report):
        print_table(console, section.title, section.table())
        if section.note:
            console.print(section.note)
    if out is not None:
        console.print(f"reports: {out / 'audit.md'}, {out / 'audit.json'}")
    failures = report.audit.failures()
    if strict and failures:
        raise CheckFailed(
            f"{report.data} has {'; '.join(failures)}; needed are none.",
            hint="training leaves such rows out; --out DIR lists them by number",
        )


@data_commands.command()
def balance(
    data: Annotated[str, typer.Argument(help="Labelled faces, as train takes them.")],
    per_class: Annotated[
        int | None, typer.Option(min=1, help="Faces of every emotion; the preset's, or 8,000 if it balances none.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The set's directory; balanced/<data>-<hash> if none.")] = None,
    preset: Annotated[str, typer.Option(help="The preset to train with.")] = "tiny",
    config: Annotated[Path | None, typer.Option(help="A TOML file of your own instead of a preset.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, max=2**32 - 1, help="Of everything random.")] = None,
    label_order: LabelOrder = "fer2013",
    skip_bad: SkipBad = False,
) -> None:
    """Write a set with equally many training faces of every emotion; what is there already is reused.

    It is made of the faces that `train` with the same preset and seed trains on, none of those it validates on.

    Example: [bold]emoexport data balance fer2013.csv --per-class 8000 --preset guide[/bold]
    """
    from emoexport.train.balance import balanced_directory, make_balanced  # noqa: PLC0415
    from emoexport.train.config import load_config  # noqa: PLC0415
    from emoexport.train.ensemble import training_faces  # noqa: PLC0415

    console = console_of()
    settings = load_config(preset, file=config, seed=seed)
    count = per_class or settings.training.balance or 8000
    read = read_faces(console, data, settings, label_order=label_order, skip_bad=skip_bad)
    faces = training_faces(read, settings).train
    usual = balanced_directory(read.source, faces, count, seed=settings.training.seed)
    out = out or usual
    record = make_balanced(faces, count, out, seed=settings.training.seed, console=console)
    print_table(console, f"{len(faces):,} training faces, balanced to {count:,} of every emotion", _table(record))
    train = f"emoexport train --data {data} " + (f"--config {config}" if config else f"--preset {preset}")
    train += f" --seed {seed}" if seed is not None else ""
    train += f" --label-order {label_order}" if label_order != "fer2013" else ""
    train += " --skip-bad" if skip_bad else ""
    train += f" --balance {count}" if settings.training.balance != count else ""
    train += f" --balanced-set {out}" if out != usual else ""
    console.print(f"balanced set: {out}\nnext: {train}")


@data_commands.command()
def draw(
    out: Annotated[Path, typer.Argument(help="A new directory, or one that this command wrote.")],
    faces: Annotated[int, typer.Option(min=1, max=100_000, help="How many.")] = 14,
    size: Annotated[int, typer.Option(min=16, max=1024, help="Height and width in pixels.")] = 96,
    seed: Annotated[int, typer.Option(min=0, help="Other seeds draw other faces.")] = 0,
) -> None:
    """Draw faces as pictures to try commands on: of nobody, each with the emotion that it shows in its name.

    Example: [bold]emoexport data draw photos/[/bold]
    """
    from PIL import Image  # noqa: PLC0415

    from emoexport.files import new_directory, write_text  # noqa: PLC0415
    from emoexport.labels import EMOTIONS  # noqa: PLC0415
    from emoexport.train.synthetic import synthetic_faces  # noqa: PLC0415

    console = console_of()
    with new_directory(out, marker="drawn.txt") as folder:
        write_text(folder / "drawn.txt", f"emoexport data draw, seed {seed}: faces of nobody\n")
        for number, (face, label) in enumerate(zip(*synthetic_faces(faces, size=size, seed=seed), strict=True)):
            Image.fromarray(face[..., 0]).save(folder / f"{number:05}-{EMOTIONS[label]}.png")
    console.print(f"{out}: {faces:,} drawn faces")
    console.print(f"next: emoexport predict {shlex.quote(str(out))}")


def _table(record: Any) -> Any:
    from rich import box  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("emotion")
    for name in ("had", "copied", "augmented", "dropped"):
        table.add_column(name, justify="right")
    for emotion, part in record.emotions.items():
        table.add_row(emotion, *(f"{number:,}" for number in (part.had, part.copied, part.augmented, part.dropped)))
    return table
