"""The command that says what a bundle holds."""

from typing import Annotated

import typer

from emoexport.cli_options import BundleDir, console_of, open_bundle, print_table

__all__ = ["inspect"]


def inspect(
    bundle: BundleDir = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")] = False,
) -> None:
    """Show what a bundle holds: members, views, cost of a face, precisions and operators of each graph.

    It is read from the bundle alone; the training run is not needed, nor is PyTorch loaded.

    Example: [bold]emoexport inspect build/fer2013[/bold]
    """
    opened = open_bundle(bundle)
    from emoexport.summary import summarize  # noqa: PLC0415
    from emoexport.summary_tables import summary_tables  # noqa: PLC0415

    summary = summarize(opened)
    if as_json:
        typer.echo(summary.to_json(), nl=False)
        return
    console = console_of()
    for title, table in summary_tables(summary):
        print_table(console, title, table)
