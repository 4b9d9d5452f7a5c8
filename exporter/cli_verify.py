"""`emoexport verify`."""

from typing import Annotated

import typer

from emoexport.cli_options import (
    BundleDir,
    Cache,
    Engines,
    LabelledFaces,
    Limit,
    OtherLabelOrder,
    Precisions,
    RunOption,
    SkipBad,
    Split,
    Threads,
    console_of,
    open_bundle,
    print_table,
)

__all__ = ["verify"]


def verify(
    bundle: BundleDir = None,
    data: LabelledFaces = None,
    split: Split = None,
    engine: Engines = None,
    precision: Precisions = None,
    run: RunOption = None,
    limit: Limit = None,
    batch: Annotated[int, typer.Option(min=1, help="Faces in a call.")] = 16,
    rounds: Annotated[int, typer.Option(min=1, help="Counted calls for the times.")] = 10,
    threads: Threads = None,
    cache: Cache = None,
    label_order: OtherLabelOrder = None,
    skip_bad: SkipBad = False,
) -> None:
    """Compare every engine with the PyTorch reference on labelled faces; exit code 1 if one differs too much.

    Example: [bold]emoexport verify build/fer2013 --data fer2013.csv --split public_test[/bold]
    """
    opened = open_bundle(bundle)  # before torch is loaded: a wrong path is told at once
    from emoexport import pipeline  # noqa: PLC0415
    from emoexport.parity_tables import parity_table  # noqa: PLC0415

    console = console_of()
    report = pipeline.verify(
        opened,
        data=data,
        split=split,
        engines=engine,
        precisions=precision,
        run=run,
        limit=limit,
        batch=batch,
        rounds=rounds,
        threads=threads,
        cache=cache,
        label_order=label_order,
        skip_bad=skip_bad,
        console=console,
    )
    for rows in dict.fromkeys(result.rows for result in report.results):
        count = next(result.accuracy.n for result in report.results if result.rows == rows)
        title = f"{report.data}, {report.split}, {rows} rows, n = {count:,}"
        print_table(console, title, parity_table(report, rows))
    for result in report.results:
        for failure in result.failures:
            console.print(f"{result.engine}, {result.rows} rows: {failure}", style="red", highlight=False)
    for note in report.notes:
        console.print(note, style="yellow", highlight=False, soft_wrap=True)
    path = opened.path
    console.print(
        f"verdict: {report.verdict}\nbundle: {path}\nreports: {path / 'reports' / 'parity.md'}, "
        f"{path / 'reports' / 'parity.json'}",
        highlight=False,
        soft_wrap=True,
    )
    raise typer.Exit(0 if report.verdict == "passed" else 1)
