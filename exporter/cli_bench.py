"""`emoexport bench`."""

from pathlib import Path
from typing import Annotated

import typer

from emoexport.cli_options import (
    BundleDir,
    Cache,
    Engines,
    Precisions,
    RunOption,
    Threads,
    console_of,
    open_bundle,
    print_table,
)

__all__ = ["bench"]


def bench(
    bundle: BundleDir = None,
    device: Annotated[
        str, typer.Option(help="What the reference runs on, and engines if none is named: cpu, or cuda.")
    ] = "cpu",
    engine: Engines = None,
    precision: Precisions = None,
    rivals: Annotated[
        bool | None,
        typer.Option(
            help="Time others' ways too: views as one batch, autocast, torch.compile, plain exports. Usual with cuda."
        ),
    ] = None,
    run: RunOption = None,
    batch: Annotated[
        list[int] | None,
        typer.Option(help="Faces in a call, repeatable; if none, doubled from 1 until no engine gains 5 % from it."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=2, help="Counted calls of each engine at each batch size.")] = 20,
    seconds: Annotated[
        float,
        typer.Option(min=1, help="That these may take where no --batch is given; there are 5 of them all the same."),
    ] = 60,
    memory: Annotated[
        bool, typer.Option("--memory/--no-memory", help="Measure each engine's memory, in a process of its own.")
    ] = True,
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
    from emoexport.speed_tables import (  # noqa: PLC0415
        changes_table,
        engines_table,
        planned_table,
        speed_csv,
        speed_markdown,
        speed_table,
    )
    from emoexport.throughput import SpeedReport, changes, lost_engines, unlike  # noqa: PLC0415

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
        seconds=seconds,
        memory=memory,
        threads=threads,
        cache=cache,
        console=console,
    )
    path = opened.path
    if markdown or csv:
        typer.echo(speed_csv(report) if csv else speed_markdown(report), nl=False)
    else:
        print_table(console, f"{path}, {report.passes_a_face} passes a face", speed_table(report))
        print_table(console, "each at the batch size that suits it best", engines_table(report))
        for note in report.notes:
            console.print(note, style="yellow")
        reports = path / "reports"
        console.print(f"reports: {reports / 'bench.md'}, {reports / 'bench.json'}")
    found = changes(report, earlier) if earlier is not None else []
    for note in unlike(report, earlier) if earlier is not None else []:
        console_of(stderr=True).print(note, style="yellow")
    if found:
        print_table(console_of(stderr=markdown or csv), f"against {compare}", changes_table(found))
    if not (markdown or csv):
        typer.echo(report.model_dump_json())
    lost = [] if earlier is None else lost_engines(report, earlier)
    for name in lost:
        console_of(stderr=True).print(f"{name} was timed then, and is not now.", style="red")
    failed = [name for name in lost if any(what.startswith(f"{name} ") for what in report.failures)]
    raise typer.Exit(1 if failed or any(one.is_slower for one in found) else 0)
