"""The command line. It loads torch, onnx and runtimes only inside the commands that need them."""

from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core
from rich.console import Console

from emoexport import __version__
from emoexport.cli_build import build
from emoexport.cli_cube import cube
from emoexport.cli_data import data_commands
from emoexport.cli_doctor import doctor
from emoexport.cli_inspect import inspect
from emoexport.cli_options import (
    BundleDir,
    Cache,
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
from emoexport.cli_training import combine, evaluate, train
from emoexport.cli_tune import tune
from emoexport.engines import BACKENDS
from emoexport.errors import EmoexportError
from emoexport.precision import PRECISIONS

__all__ = ["app", "main"]

MAP = """\
[bold]emoexport[/bold]: facial-emotion ensembles from the lab to production.

  1. emoexport train  --data D --out runs/x          five members from labelled faces
  2. emoexport evaluate --tta --ensemble --post-process --model-path runs/x
                                                     what does each step of the vote gain?
  3. emoexport build  runs/x -o build/x --fp16 --int8  one graph from raw faces to a label
  4. emoexport verify build/x --data D               does it decide like the PyTorch reference?
  5. emoexport bench  build/x                        how fast is it?

Try it on drawn faces: emoexport train && emoexport build --fp16 --int8 && emoexport verify
What can this machine do? emoexport doctor
Each command takes --help."""


class _Commands(typer.core.TyperGroup):
    """Errors become one sentence, the next command and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        errors = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)
        try:
            return super().invoke(ctx)
        except EmoexportError as err:
            errors.print(f"error: {err}", style="red")
            if err.hint:
                errors.print(f"next: {err.hint}")
            raise typer.Exit(err.exit_code) from err
        except OSError as err:
            errors.print(f"error: {err.filename or 'a file'}: {err.strerror or err}", style="red")
            raise typer.Exit(4) from err
        except KeyboardInterrupt as err:
            errors.print("stopped; nothing was left half-written.")
            raise typer.Exit(130) from err


app = typer.Typer(
    name="emoexport",
    cls=_Commands,
    help="Facial-emotion ensembles from the lab to production.",
    rich_markup_mode="rich",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Engines = Annotated[
    list[str] | None,
    typer.Option("--engine", help=f"A runtime, repeatable: {', '.join(BACKENDS)}. All installed ones if none."),
]
Precisions = Annotated[
    list[str] | None,
    typer.Option("--precision", help=f"A precision, repeatable: {', '.join(PRECISIONS)}. All of the bundle if none."),
]


@app.callback(invoke_without_command=True)
def _map(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        typer.echo(f"emoexport {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        Console(highlight=False, soft_wrap=True).print(MAP)


app.command()(train)
app.command()(build)
# The recipe spells its options with underscores: --post_process, --model_path.
app.command(context_settings={"token_normalize_func": lambda word: word.replace("_", "-")})(evaluate)
app.command()(combine)
app.command()(cube)
app.command()(doctor)
app.command()(inspect)
app.command()(tune)
app.add_typer(data_commands, name="data")


@app.command()
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
    from emoexport.tables import parity_table  # noqa: PLC0415

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


@app.command()
def bench(
    bundle: BundleDir = None,
    device: Annotated[
        str, typer.Option(help="What the reference runs on, and engines if none is named: cpu, or cuda.")
    ] = "cpu",
    engine: Engines = None,
    precision: Precisions = None,
    rivals: Annotated[
        bool | None,
        typer.Option(help="Time PyTorch's own ways too: batched views, autocast, torch.compile. Usual with cuda."),
    ] = None,
    run: RunOption = None,
    batch: Annotated[
        list[int] | None,
        typer.Option(help="Faces in a call, repeatable; 1 and 16 if none, with cuda 1 to 64, doubled."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=2, help="Counted calls of each engine at each batch size.")] = 20,
    threads: Threads = None,
    cache: Cache = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be timed, and what skipped and why; time nothing.")
    ] = False,
    compare: Annotated[
        Path | None,
        typer.Option(help="An earlier bench.json; exit code 1 if an engine is slower beyond both intervals."),
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the report as Markdown.")] = False,
    csv: Annotated[bool, typer.Option("--csv", help="Print a line of comma-separated values for each row.")] = False,
) -> None:
    """Time every engine against the PyTorch reference, all in turn; the last line printed is JSON, or as --csv says.

    Example: [bold]emoexport bench build/fer2013 --batch 1 --batch 32[/bold]
    """
    opened = open_bundle(bundle)
    from emoexport import benchmark  # noqa: PLC0415
    from emoexport.tables import (  # noqa: PLC0415
        changes_table,
        planned_table,
        speed_csv,
        speed_markdown,
        speed_table,
    )
    from emoexport.throughput import SpeedReport, changes  # noqa: PLC0415

    console = console_of(stderr=markdown or csv)
    earlier = None if compare is None else SpeedReport.parse_json(compare)
    if dry_run:
        planned = benchmark.plan_bench(opened, device=device, engines=engine, precisions=precision, rivals=rivals)
        print_table(console, f"{opened.path}, on {device}", planned_table(planned))
        return
    report = benchmark.bench(
        opened,
        device=device,
        engines=engine,
        precisions=precision,
        rivals=rivals,
        run=run,
        batches=batch,
        rounds=rounds,
        threads=threads,
        cache=cache,
        console=console,
    )
    path = opened.path
    if markdown or csv:
        typer.echo(speed_csv(report) if csv else speed_markdown(report), nl=False)
    else:
        print_table(console, f"{path}, {report.passes_a_face} passes a face", speed_table(report))
        for note in report.notes:
            console.print(note, style="yellow", highlight=False, soft_wrap=True)
        reports = path / "reports"
        console.print(f"reports: {reports / 'bench.md'}, {reports / 'bench.json'}", highlight=False, soft_wrap=True)
    found = changes(report, earlier) if earlier is not None else []
    if found:
        print_table(console_of(stderr=markdown or csv), f"against {compare}", changes_table(found))
    if not (markdown or csv):
        typer.echo(report.model_dump_json())
    raise typer.Exit(1 if any(one.is_slower for one in found) else 0)


def main() -> None:
    """Run the command line."""
    app()
