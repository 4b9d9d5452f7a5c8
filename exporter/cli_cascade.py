"""`emoexport cascade`."""

from typing import Annotated

import typer

from emoexport.cli_options import (
    BundleDir,
    Cache,
    LabelledFaces,
    OnePrecision,
    RunOption,
    Split,
    Threads,
    console_of,
    open_bundle,
    print_table,
)
from emoexport.engines import BACKENDS

__all__ = ["cascade"]

_TAKING = [row.name for row in BACKENDS.values() if row.built_from != "fold"]


def cascade(
    bundle: BundleDir = None,
    data: LabelledFaces = None,
    split: Split = None,
    max_disagreement: Annotated[
        float | None,
        typer.Option(min=0, max=100, help="Labels that may differ from the full vote's, in percent; 1 if no goal."),
    ] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(min=0, max=100, help="Accuracy that may be lost against the full vote, in percentage points."),
    ] = None,
    exact: Annotated[
        bool,
        typer.Option(
            "--exact", help="Nothing may be lost: a face leaves when nothing that remains can turn its label."
        ),
    ] = False,
    delta: Annotated[
        float, typer.Option(min=0, max=0.5, help="How probable a certificate of what is not so may be.")
    ] = 0.05,
    offsets: Annotated[
        bool, typer.Option(help="With --max-drop, correct for emotions that are decided too often.")
    ] = True,
    engine: Annotated[
        str | None, typer.Option(help=f"A runtime: {', '.join(_TAKING)}. The best certified one if none.")
    ] = None,
    precision: OnePrecision = None,
    batch: Annotated[int, typer.Option(min=1, help="Faces in a call.")] = 16,
    rounds: Annotated[int, typer.Option(min=2, help="Counted calls, at most.")] = 100,
    run: RunOption = None,
    threads: Threads = None,
    cache: Cache = None,
) -> None:
    """Let faces leave early: few passes for all, more for those whose label is not clear, the full vote for the rest.

    Fitted on the faces that the members were validated on, certified on others against the reference, and timed against
    the whole fold. It becomes part of the bundle: emoexport predict --cascade uses it. The exit code is 6 if what is
    asked for is not shown.

    Example: [bold]emoexport cascade build/fer2013 --data fer2013.csv --max-disagreement 1[/bold]
    """
    opened = open_bundle(bundle)
    from emoexport.cascade_certificate import ASSUMPTION  # noqa: PLC0415
    from emoexport.cascade_claim import Claim  # noqa: PLC0415
    from emoexport.cascade_record import CASCADES  # noqa: PLC0415
    from emoexport.cascade_tables import stage_table  # noqa: PLC0415
    from emoexport.cascading import make_cascade  # noqa: PLC0415
    from emoexport.engine_choice import best_graph_engine  # noqa: PLC0415
    from emoexport.verdict import EXIT_CODES  # noqa: PLC0415

    claim = Claim.of_goals(max_disagreement, max_drop, exact=exact, delta=delta, offsets=offsets)
    backend, number = best_graph_engine(opened, engine=engine, precision=precision)
    console = console_of()
    found = make_cascade(
        opened,
        claim,
        engine=backend,
        precision=number,
        data=data,
        split=split,
        run=run,
        batch=batch,
        rounds=rounds,
        threads=threads,
        cache=cache,
        console=console,
    )
    print_table(console, found.shown_on, stage_table(found))
    for line in found.sentences:
        console.print(line)
    console.print(f"Assumed: {ASSUMPTION}", style="dim")
    console.print(f"verdict: {found.verdict}\ncascade: {opened.path / CASCADES / found.engine}")
    if found.verdict == "certified":
        console.print(f"next: emoexport predict photos/ --bundle {opened.path} --cascade {found.engine}")
    raise typer.Exit(EXIT_CODES[found.verdict])
