"""`emoexport verify`."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

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
from emoexport.errors import UsageError

__all__ = ["verify"]


def verify(
    bundle: BundleDir = None,
    data: LabelledFaces = None,
    split: Split = None,
    engine: Engines = None,
    precision: Precisions = None,
    max_drop: Annotated[
        float, typer.Option(min=0, max=100, help="Points of accuracy that an engine may lose, as shown at 95 %.")
    ] = 0.5,
    max_disagreement: Annotated[
        float, typer.Option(min=0, max=100, help="Percent of faces that it may decide otherwise, as shown at 95 %.")
    ] = 1.0,
    answers: Annotated[
        Path | None,
        typer.Option(
            "--from", help="Judge the answers that an earlier verify saved (reports/answers.npz); run nothing."
        ),
    ] = None,
    run: RunOption = None,
    limit: Limit = None,
    batch: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Faces in a call, repeatable; rows are checked at each. 1 and 16 if none."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Counted calls for the times.")] = 10,
    threads: Threads = None,
    cache: Cache = None,
    label_order: OtherLabelOrder = None,
    skip_bad: SkipBad = False,
) -> None:
    """Certify that engines decide like the PyTorch reference, on labelled faces.

    Exit code 0 if all are certified, 1 if one failed, 6 if there is not enough evidence.

    Example: [bold]emoexport verify build/fer2013 --data fer2013.csv --split public_test[/bold]
    """
    if answers is not None:
        choices = {"--data": data, "--split": split, "--engine": engine, "--precision": precision, "--limit": limit}
        _refuse_beside_from({**choices, "--batch": batch, "--run": run})
    opened: Any = None if answers is not None and bundle is None else open_bundle(bundle)
    from emoexport import certification  # noqa: PLC0415  (before torch is loaded a wrong path is told)
    from emoexport.verdict import EXIT_CODES, Limits  # noqa: PLC0415

    console = console_of()
    limits = Limits(max_drop_points=max_drop, max_disagreement_pct=max_disagreement)
    if answers is not None:
        report = certification.judge_again(answers, limits, opened)
    else:
        report = certification.verify(
            opened,
            data=data,
            split=split,
            engines=engine,
            precisions=precision,
            run=run,
            limit=limit,
            limits=limits,
            batches=batch,
            rounds=rounds,
            threads=threads,
            cache=cache,
            label_order=label_order,
            skip_bad=skip_bad,
            console=console,
        )
    _show(console, report)
    where = "" if opened is None else f"\nbundle: {opened.path}\nreports: {opened.path / 'reports' / 'parity.md'}"
    console.print(f"verdict: {report.verdict}{where}")
    raise typer.Exit(EXIT_CODES[report.verdict])


def _refuse_beside_from(choices: dict[str, Any]) -> None:
    for name, value in choices.items():
        if value is not None:
            raise UsageError(f"{name} chooses what is run; --from runs nothing.", hint="leave one of the two out")


def _show(console: Console, report: Any) -> None:
    """A `ParityReport`: a table for each set of rows, and a line for whatever is not certified."""
    from emoexport.parity_tables import parity_table, reasons_of  # noqa: PLC0415

    for rows in dict.fromkeys(result.rows for result in report.results):
        count = next(result.accuracy.n for result in report.results if result.rows == rows)
        title = f"{report.data}, {report.split}, {rows} rows, n = {count:,}"
        print_table(console, title, parity_table(report, rows))
    for (verdict, reason), names in reasons_of(report).items():
        style = "red" if verdict == "failed" else "yellow"
        console.print(f"{', '.join(names)}: {verdict}. {reason}.", style=style)
    for note in report.notes:
        console.print(note, style="yellow")
