"""Options that several commands take, and what commands print with."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from emoexport.engines import BACKENDS
from emoexport.errors import UsageError
from emoexport.labels import LABEL_ORDERS
from emoexport.precision import PRECISIONS

__all__ = [
    "BundleDir",
    "BundleOption",
    "Cache",
    "CascadeName",
    "DataOption",
    "Engines",
    "LabelOrder",
    "LabelledFaces",
    "Limit",
    "OneEngine",
    "OnePrecision",
    "OtherLabelOrder",
    "Precisions",
    "RunOption",
    "SkipBad",
    "Split",
    "Threads",
    "console_of",
    "newest",
    "newest_bundle",
    "open_bundle",
    "print_table",
    "read_faces",
]

DataOption = Annotated[
    str,
    typer.Option(
        help="A folder tree <split>/<emotion>/*.png, a FER-2013 CSV, a Parquet file or folder, or synthetic:N."
    ),
]
LabelOrder = Annotated[str, typer.Option(help=f"What numbered labels mean: {', '.join(LABEL_ORDERS)}.")]
# Of the commands that judge a run or a bundle on labelled faces.
LabelledFaces = Annotated[
    str | None, typer.Option(help="Labelled faces, as train takes them; those of the run if none.")
]
Split = Annotated[str | None, typer.Option(help="Which split; test or public_test if none.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Use this many faces, drawn at random.")]
OtherLabelOrder = Annotated[
    str | None, typer.Option(help="What numbered labels mean, if not what they meant to the run.")
]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave out pictures that cannot be read, and list them.")]

BundleDir = Annotated[Path | None, typer.Argument(help="The bundle; the newest under build/ if none.")]
BundleOption = Annotated[
    Path | None, typer.Option("-b", "--bundle", help="The bundle; the newest under build/ if none.")
]
# Of the commands that use one engine.
OneEngine = Annotated[
    str | None, typer.Option(help=f"A runtime: {', '.join(BACKENDS)}. The best certified one if none.")
]
OnePrecision = Annotated[
    str | None, typer.Option(help=f"Of the engine: {', '.join(PRECISIONS)}. The best certified one if none.")
]
CascadeName = Annotated[
    str | None,
    typer.Option(help="A cascade of the bundle, by its rule or its name; emoexport cascade makes one."),
]
RunOption = Annotated[Path | None, typer.Option("--run", help="Where the training run is now, if it was moved.")]
Threads = Annotated[
    int | None, typer.Option(min=1, help="Threads a runtime may use; it chooses itself if none is given.")
]
Cache = Annotated[
    Path | None, typer.Option("--cache", help="A folder where runtimes keep what they compile; nowhere if none.")
]

Engines = Annotated[
    list[str] | None,
    typer.Option("--engine", help=f"A runtime, repeatable: {', '.join(BACKENDS)}. All installed ones if none."),
]
Precisions = Annotated[
    list[str] | None,
    typer.Option("--precision", help=f"A precision, repeatable: {', '.join(PRECISIONS)}. All of the bundle if none."),
]


def console_of(*, stderr: bool = False) -> Console:
    """Where a command shows what it does, lines as they are: nothing in them is marked or broken.

    On standard error where standard output is for a result alone.
    """
    return Console(markup=False, highlight=False, soft_wrap=True, stderr=stderr)


def print_table(console: Console, title: str, table: Any) -> None:
    """Print a table whole: where the terminal is too narrow, or there is none, lines run over."""
    console.print(f"\n{title}")
    width = Console(width=1000).measure(table).maximum
    Console(markup=False, width=max(width, console.width), stderr=console.stderr).print(table)


def read_faces(console: Console, data: str, config: Any, *, label_order: str, skip_bad: bool) -> Any:
    """Read labelled faces as a training configuration wants them, and say what was read: a `DataSet`."""
    from emoexport.train.dataset import load_data  # noqa: PLC0415

    console.print(f"reading {data} ...")
    faces = load_data(
        data,
        size=config.model.image_size,
        channels=config.model.channels,
        label_order=label_order,
        skip_bad=skip_bad,
        seed=config.training.seed,
    )
    for line in faces.summary():
        console.print(line)
    return faces


def open_bundle(path: Path | None) -> Any:
    """Check and open the bundle that is named, or the newest: a `Bundle`."""
    from emoexport.bundle import Bundle  # noqa: PLC0415

    return Bundle.open(path or newest_bundle())


def newest_bundle() -> Path:
    """The directory of the newest bundle under `build/`.

    Raises:
        UsageError: if there is none.
    """
    return newest(Path("build"), "manifest.json", "emoexport build")


def newest(root: Path, marker: str, command: str) -> Path:
    """The directory under `root` whose `marker` was written last.

    Raises:
        UsageError: if there is none; `command` makes one.
    """
    found = sorted(root.glob(f"[!.]*/{marker}"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UsageError(f"nothing is named, and there is no {root}/*/{marker}.", hint=command)
    return found[-1].parent
