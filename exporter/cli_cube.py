"""The command that computes a score cube."""

from pathlib import Path
from typing import Annotated

import typer

from emoexport.cli_options import (
    BundleDir,
    LabelledFaces,
    Limit,
    OtherLabelOrder,
    RunOption,
    SkipBad,
    Split,
    Threads,
    console_of,
    open_bundle,
    print_table,
)
from emoexport.engines import BACKENDS
from emoexport.precision import PRECISIONS

__all__ = ["cube"]


def cube(
    bundle: BundleDir = None,
    data: LabelledFaces = None,
    split: Split = None,
    engine: Annotated[
        str, typer.Option(help=f"What computes it: torch, the reference, or a runtime: {', '.join(BACKENDS)}.")
    ] = "torch",
    precision: Annotated[str, typer.Option(help=f"Of the runtime's graph: {', '.join(PRECISIONS)}.")] = "fp32",
    run: RunOption = None,
    limit: Limit = None,
    batch: Annotated[int, typer.Option(min=1, help="Faces in a call.")] = 64,
    threads: Threads = None,
    label_order: OtherLabelOrder = None,
    skip_bad: SkipBad = False,
    out: Annotated[
        Path | None,
        typer.Option("-o", "--output", "--out", help="The cube; cubes/<bundle>-<split>-<engine>-<precision> if none."),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace a cube that stands there, and forget an unfinished one.")
    ] = False,
) -> None:
    """Keep the probabilities of every pass of every face: votes, subsets and weights are then arithmetic on them.

    What was cut off goes on with the same command.

    Example: [bold]emoexport cube build/fer2013 --data fer2013.csv --split public_test -o cubes/public-test[/bold]
    """
    opened = open_bundle(bundle)
    from emoexport.scoring import score_split  # noqa: PLC0415
    from emoexport.tables import cube_table  # noqa: PLC0415

    console = console_of()
    found, accuracies, *_ = score_split(
        opened,
        out,
        engine=engine,
        precision=precision,
        data=data,
        split=split,
        run=run,
        limit=limit,
        batch=batch,
        threads=threads,
        label_order=label_order,
        skip_bad=skip_bad,
        force=force,
        console=console,
    )
    record = found.record
    title = f"{record.data}, {record.split}, {record.engine} at {record.precision}"
    print_table(console, title, cube_table(accuracies))
    console.print(
        "The best pass was chosen on the faces that it is measured on here, which flatters it.\n"
        f"cube: {found.path}\n"
        f"shape: {' x '.join(f'{size:,}' for size in record.shape)} (faces, members, views, emotions), float32, "
        f"{found.scores.nbytes / 1e6:.1f} MB\n"
        f"digest: {record.digest}",
    )
