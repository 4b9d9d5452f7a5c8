"""`emoexport plan`."""

from pathlib import Path
from typing import Annotated

import typer

from emoexport.cli_options import (
    BundleDir,
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

__all__ = ["plan"]


def plan(
    bundle: BundleDir = None,
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
    batch: Annotated[int, typer.Option(min=1, help="Faces in a call.")] = 16,
    rounds: Annotated[int, typer.Option(min=2, help="Counted calls of each engine, at most.")] = 20,
    run: RunOption = None,
    threads: Threads = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--output", "--out", help="The plan's directory; plans/<bundle> if none.")
    ] = None,
) -> None:
    """Find the fewest passes that are shown to decide as well as the full vote, and how fast they are here.

    They are chosen on the faces that the members were validated on and confirmed once on others; the exit code is 6 if
    these do not suffice to show it, and 1 if they show the contrary. emoexport build --plan builds it.

    Example: [bold]emoexport plan build/fer2013 --data fer2013.csv --max-drop 0.5[/bold]
    """
    opened = open_bundle(bundle)
    from emoexport.plan import PLAN_FILE, Goals  # noqa: PLC0415
    from emoexport.plan_tables import plan_sentences, plan_tables  # noqa: PLC0415
    from emoexport.planning import make_plan  # noqa: PLC0415
    from emoexport.verdict import EXIT_CODES  # noqa: PLC0415

    console = console_of()
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
        data=data,
        split=split,
        run=run,
        engines=engine,
        precisions=precision,
        batch=batch,
        rounds=rounds,
        threads=threads,
        console=console,
    )
    for title, table in plan_tables(found):
        print_table(console, title, table)
    for line in plan_sentences(found):
        console.print(line, highlight=False, soft_wrap=True)
    console.print(f"plan: {target / PLAN_FILE}", highlight=False, soft_wrap=True)
    if found.choice is not None:
        console.print(f"next: emoexport build --plan {target / PLAN_FILE}", highlight=False, soft_wrap=True)
    raise typer.Exit(EXIT_CODES[found.verdict])
