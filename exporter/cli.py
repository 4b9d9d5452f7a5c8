"""The command line. It loads torch, onnx and runtimes only inside the commands that need them."""

from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core
from rich.console import Console

from emoexport import __version__
from emoexport.cli_cube import cube
from emoexport.cli_data import data_commands
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
    newest,
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
# The recipe spells its options with underscores: --post_process, --model_path.
app.command(context_settings={"token_normalize_func": lambda word: word.replace("_", "-")})(evaluate)
app.command()(combine)
app.command()(cube)
app.command()(inspect)
app.command()(tune)
app.add_typer(data_commands, name="data")


@app.command()
def build(
    run: Annotated[Path | None, typer.Argument(help="The training run; the newest under runs/ if none.")] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--output", "--out", help="The bundle; build/<run> if none.")
    ] = None,
    member: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NUMBER[=WEIGHT]",
            help="A member to fold, numbered from 1, and its weight in the vote, 1 if none; repeatable. All if none.",
        ),
    ] = None,
    view: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME[=WEIGHT]", help="A view to fold, likewise. Those that the run votes with if none."),
    ] = None,
    fp16: Annotated[bool, typer.Option("--fp16", help="Add a graph whose members compute in FP16.")] = False,
    bf16: Annotated[bool, typer.Option("--bf16", help="Add a graph whose members compute in BF16.")] = False,
    int8: Annotated[bool, typer.Option("--int8", help="Add a graph whose members compute in INT8.")] = False,
    int8_fp16: Annotated[
        bool, typer.Option("--int8-fp16", help="Add one for GPUs, in INT8 with FP16 between the layers.")
    ] = False,
    fp8: Annotated[bool, typer.Option("--fp8", help="Add one for GPUs, in FP8 with FP16 between the layers.")] = False,
    calib_size: Annotated[int, typer.Option(min=7, help="Training faces to calibrate on.")] = 512,
    calib_method: Annotated[
        str, typer.Option(help="Which range of the activations 8 bits span: min-max, entropy or percentile.")
    ] = "min-max",
    calib_data: Annotated[
        str | None, typer.Option(help="Where the training faces are, if not where the run read them.")
    ] = None,
    calib_file: Annotated[
        Path | None, typer.Option(help="A calibration.json of the same fold, instead of faces.")
    ] = None,
    calib_random: Annotated[
        bool, typer.Option("--calib-random", help="Calibrate on noise; every report says so.")
    ] = False,
    keep_rejected: Annotated[
        bool,
        typer.Option("--keep-rejected", help="Keep 8-bit graphs that are not faster here, or not as often right."),
    ] = False,
    gate_faces: Annotated[int, typer.Option(min=1, help="Validation faces, at most, to judge that on.")] = 1000,
    tuning: Annotated[
        Path | None, typer.Option(help="A tuning.json that says which blocks stay in FP32; emoexport tune makes it.")
    ] = None,
    max_batch: Annotated[int, typer.Option(min=1, help="The largest number of faces in a call.")] = 256,
    layout: Annotated[
        str,
        typer.Option(
            help="How members of one architecture stand in the graph: branches, stacked, or auto: the faster here."
        ),
    ] = "branches",
    compiled: Annotated[
        bool,
        typer.Option(
            "--compile",
            help="Add what PyTorch's compiler makes of the fold for this machine, at FP32 and BF16; takes minutes.",
        ),
    ] = False,
) -> None:
    """Fold members, views, vote and decision into one graph, at FP32 and at the precisions asked for.

    Example: [bold]emoexport build runs/fer2013 -o build/fer2013 --fp16 --int8[/bold]
    """
    from emoexport.passes import Choice  # noqa: PLC0415

    choice = Choice.of_options(member or (), view or ())
    run = run or newest(Path("runs"), "run.json", "emoexport train")
    out = out or Path("build") / run.resolve().name
    asked = {"fp16": fp16, "bf16": bf16, "int8": int8, "int8-fp16": int8_fp16, "fp8": fp8}
    from emoexport.calibration import Wish  # noqa: PLC0415
    from emoexport.pipeline import build as build_bundle  # noqa: PLC0415

    console = console_of()
    bundle = build_bundle(
        run,
        out,
        choice=choice,
        precisions=[name for name, wanted in asked.items() if wanted],
        calibration=Wish(faces=calib_size, method=calib_method, data=calib_data, file=calib_file, random=calib_random),
        max_batch=max_batch,
        layout=layout,
        keep_rejected=keep_rejected,
        gate_faces=gate_faces,
        tuning=tuning,
        compiled=compiled,
        console=console,
    )
    chosen = bundle.manifest.layout
    console.print(f"layout: {chosen.name}, {chosen.reason}", highlight=False, soft_wrap=True)
    for name, found in bundle.manifest.gate.items():
        where = "" if found.verdict == "not judged" else " here"
        kept = "" if name in bundle.manifest.graphs else "; it is not kept, --keep-rejected would"
        console.print(
            f"{PRECISIONS[name].title} {found.verdict}{where}: {found.reason}{kept}", highlight=False, soft_wrap=True
        )
    sizes = bundle.sizes()
    for name, entry in bundle.manifest.opened.items():
        console.print(f"{out / entry.file}  {sizes[name] / 1e6:.1f} MB", highlight=False, soft_wrap=True)
    console.print(f"next: emoexport verify {out}", highlight=False, soft_wrap=True)


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
    engine: Engines = None,
    precision: Precisions = None,
    run: RunOption = None,
    batch: Annotated[list[int] | None, typer.Option(help="Faces in a call, repeatable; 1 and 16 if none.")] = None,
    rounds: Annotated[int, typer.Option(min=2, help="Counted calls of each engine at each batch size.")] = 20,
    threads: Threads = None,
    cache: Cache = None,
) -> None:
    """Time every engine against the PyTorch reference, all in turn; the last line printed is JSON.

    Example: [bold]emoexport bench build/fer2013 --batch 1 --batch 32[/bold]
    """
    opened = open_bundle(bundle)
    from emoexport import pipeline  # noqa: PLC0415
    from emoexport.tables import speed_table  # noqa: PLC0415

    console = console_of()
    report = pipeline.bench(
        opened,
        engines=engine,
        precisions=precision,
        run=run,
        batches=batch or (1, 16),
        rounds=rounds,
        threads=threads,
        cache=cache,
        console=console,
    )
    path = opened.path
    print_table(console, f"{path}, {report.passes_a_face} passes a face", speed_table(report))
    for note in report.notes:
        console.print(note, style="yellow", highlight=False, soft_wrap=True)
    console.print(f"reports: {path / 'reports' / 'bench.md'}, {path / 'reports' / 'bench.json'}", highlight=False)
    typer.echo(report.model_dump_json())


def main() -> None:
    """Run the command line."""
    app()
