"""`emoexport plan`."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from emoexport.cli_options import (
    Engines,
    LabelledFaces,
    Precisions,
    RunOption,
    Split,
    Threads,
    console_of,
    open_bundle,
    print_table,
)
from emoexport.engines import require_known_device
from emoexport.errors import UsageError

__all__ = ["plan"]


def plan(
    source: Annotated[
        Path | None,
        typer.Argument(
            metavar="[BUNDLE]",
            help="A bundle, or a training run, which is built first; the newest under build/ if none.",
        ),
    ] = None,
    data: LabelledFaces = None,
    split: Split = None,
    max_drop: Annotated[
        float, typer.Option(min=0, help="Accuracy that may be lost against the full vote, in percentage points.")
    ] = 0.5,
    max_disagreement: Annotated[
        float | None, typer.Option(min=0, help="Labels that may differ from the full vote's, in percent.")
    ] = None,
    max_passes: Annotated[int | None, typer.Option(min=1, help="Passes that a face may take.")] = None,
    max_latency_ms: Annotated[float | None, typer.Option(help="Milliseconds that a call may take.")] = None,
    min_throughput: Annotated[float | None, typer.Option(help="Faces a second that must be reached.")] = None,
    engine: Engines = None,
    precision: Precisions = None,
    device: Annotated[str, typer.Option(help="What engines run on, if none is named: cpu or cuda.")] = "cpu",
    batch: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Faces in a call, repeatable: the best is chosen. 16 if none."),
    ] = None,
    soups: Annotated[bool, typer.Option(help="Try the mean of the members' weights.")] = True,
    exits: Annotated[bool, typer.Option(help="Try a cascade, in which faces leave early.")] = True,
    rounds: Annotated[int, typer.Option(min=2, help="Counted calls of each engine, at most.")] = 20,
    run: RunOption = None,
    threads: Threads = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--output", "--out", help="The plan's directory; plans/<bundle> if none.")
    ] = None,
) -> None:
    """Find the cheapest deployment that is shown to decide as well as the full vote, and how fast it is here.

    Passes, their soup and a cascade are chosen on the faces that the members were validated on; the winner is confirmed
    once on others. The exit code is 6 if these do not suffice to show it, and 1 if they show the contrary.
    emoexport build --plan builds passes; a cascade becomes part of the bundle.

    Example: [bold]emoexport plan build/fer2013 --data fer2013.csv --max-drop 0.5[/bold]
    """
    require_known_device(device)
    console = console_of()
    opened = _bundle_of(source, precision, data, console)
    from emoexport.plan import PLAN_FILE, Goals  # noqa: PLC0415
    from emoexport.plan_tables import plan_sentences, plan_tables  # noqa: PLC0415
    from emoexport.planning import Wishes, make_plan  # noqa: PLC0415
    from emoexport.verdict import EXIT_CODES  # noqa: PLC0415

    target = out or Path("plans") / opened.path.resolve().name
    found = make_plan(
        opened,
        target,
        Goals(
            max_drop_points=max_drop,
            max_disagreement_pct=max_disagreement,
            max_passes=max_passes,
            max_latency_ms=max_latency_ms,
            min_throughput=min_throughput,
        ),
        Wishes(
            data=data,
            split=split,
            run=run,
            engines=engine,
            device=device,
            precisions=precision,
            batches=tuple(dict.fromkeys(batch or [16])),
            rounds=rounds,
            threads=threads,
            soups=soups,
            exits=exits,
        ),
        console=console,
    )
    for title, table in plan_tables(found):
        print_table(console, title, table)
    for line in plan_sentences(found):
        console.print(line)
    console.print(f"plan: {target / PLAN_FILE}")
    if found.choice is not None and found.verdict == "certified":
        where = os.path.relpath(run or opened.run())
        console.print(f"next: emoexport build {where} --plan {target / PLAN_FILE}")
    if found.cascade is not None and found.verdict == "certified":
        use = f"--bundle {opened.path} --cascade {found.cascade.engine}"
        console.print(f"next: emoexport predict photos/ {use}")
    raise typer.Exit(EXIT_CODES[found.verdict])


def _bundle_of(source: Path | None, precisions: list[str] | None, data: str | None, console: Console) -> Any:
    """Open the bundle that is named, or the one of a run under `build/`, which is built if it is not there.

    Raises:
        UsageError: if another run's bundle stands in its place.
    """
    if source is None or not (source / "run.json").is_file():
        return open_bundle(source)
    built = Path("build") / source.resolve().name
    if (built / "manifest.json").is_file():
        opened = open_bundle(built)
        if opened.run() != source.resolve():
            raise UsageError(f"{built} is the bundle of another run than {source}.", hint=f"emoexport plan {built}")
        return opened
    from emoexport.calibration import Wish  # noqa: PLC0415
    from emoexport.pipeline import build  # noqa: PLC0415

    wanted = precisions or ["bf16", "int8"]
    return build(source, built, precisions=wanted, calibration=Wish(data=data), console=console)
