"""The command that scores millions of faces, on many cores or many machines."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from emoexport.cli_options import (
    BundleOption,
    Cache,
    CascadeName,
    OneEngine,
    OnePrecision,
    console_of,
    newest_bundle,
)
from emoexport.errors import UsageError

if TYPE_CHECKING:
    from emoexport.score_record import ScoreSummary

__all__ = ["score"]

_COLUMNS = "Parquet"
_WORK = "Workers"


def score(
    data: Annotated[
        str,
        typer.Argument(help="A folder of pictures or of Parquet files, a file, a pattern in quotes, or s3://bucket/x."),
    ],
    out: Annotated[str, typer.Option("-o", "--output", "--out", help="A folder for the parts, or s3://bucket/x.")],
    bundle: BundleOption = None,
    engine: OneEngine = None,
    precision: OnePrecision = None,
    cascade: CascadeName = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Faces in a call of the engine; as its certificate has it if none.")
    ] = None,
    part: Annotated[int, typer.Option(min=1, help="Faces in a part, which is what is lost by a kill.")] = 4096,
    force: Annotated[
        bool, typer.Option("--force", help="Remove what is there of another input, bundle or engine, and begin anew.")
    ] = False,
    column: Annotated[
        str | None,
        typer.Option(help="The column of encoded pictures; image or png if none.", rich_help_panel=_COLUMNS),
    ] = None,
    identity: Annotated[
        str | None,
        typer.Option("--id", help="A column that names each face; file and row if none.", rich_help_panel=_COLUMNS),
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[=AS]", help="A column to hand on, repeatable, and another name.", rich_help_panel=_COLUMNS
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1, help="Engines at work; one a GPU, or one every four cores, if none.", rich_help_panel=_WORK
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="Of each worker; the cores divided by the workers if none.", rich_help_panel=_WORK),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(help="Of a Ray cluster, such as auto; a Ray on this machine if none.", rich_help_panel=_WORK),
    ] = None,
    cache: Cache = None,
) -> None:
    """Tell the emotion of millions of faces, on many cores or machines: pictures or Parquet in, Parquet out.

    Each picture is one aligned face. What cannot be read has a row that says why; the exit code is 4 then. After a stop
    or a kill the same command goes on, and no face is scored twice.

    Example: [bold]emoexport score faces/ --out preds/[/bold]
    """
    columns = {"image": column, "id": identity, "keep": _keep(keep or ())}
    from emoexport.cluster import import_ray  # noqa: PLC0415
    from emoexport.mass_scoring import Wish, score_all  # noqa: PLC0415
    from emoexport.shards import Columns  # noqa: PLC0415

    import_ray()  # says that it is missing before anything slow
    console = console_of(stderr=True)
    wish = Wish(
        data=data,
        out=out,
        bundle=bundle or newest_bundle(),
        engine=engine,
        precision=precision,
        cascade=cascade,
        batch=batch,
        part=part,
        force=force,
        columns=Columns.parse(columns, source="the command line", error=UsageError),
        workers=workers,
        threads=threads,
        address=address,
        cache=cache,
    )
    try:
        summary = score_all(wish, console)
    except KeyboardInterrupt:
        console.print(f"Parts that are done stay in {out}; the same command goes on.")
        raise
    _tell(console, summary, out)
    raise typer.Exit(4 if summary.total.errors else 0)


def _keep(words: Sequence[str]) -> dict[str, str]:
    """`NAME` and `NAME=AS` as names and what they become."""
    pairs = [word.partition("=") for word in words]
    return {name: other or name for name, _, other in pairs}


def _tell(console: Console, summary: "ScoreSummary", out: str) -> None:
    """The last lines."""
    total, now = summary.total, summary.total.faces - summary.faces_before
    for example in total.examples:
        console.print(example, style="red")
    if total.errors:
        console.print(
            f"{total.errors:,} of {total.faces:,} pictures could not be read; the column error says why.", style="red"
        )
    counts = ", ".join(f"{count:,} {name}" for name, count in sorted(total.labels.items(), key=lambda one: -one[1]))
    console.print(f"{total.faces - total.errors:,} faces: {counts}")
    if now:
        rate = now / summary.seconds
        console.print(f"{now:,} pictures in {summary.seconds:,.0f} s, {rate:,.0f} a second; {total.faces:,} in all.")
    if summary.workers_replaced:
        console.print(f"Workers that died and were replaced: {summary.workers_replaced}.", style="yellow")
    console.print(f"written: {out}")
