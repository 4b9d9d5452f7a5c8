"""The command that says what this machine can do."""

import itertools
import json
from collections.abc import Sequence
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from emoexport.engines.doctor import Row, examine

__all__ = ["doctor"]

_STYLES = {"ok": "green", "missing": "yellow", "too little": "yellow", "broken": "red"}


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")] = False,
) -> None:
    """Say what this machine can do, and what is missing with the command that adds it.

    Exit code 3 if no engine runs here.

    Example: [bold]emoexport doctor[/bold]
    """
    found = examine()
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=2, ensure_ascii=False))
        raise typer.Exit(found.exit_code)
    console = Console(highlight=False, markup=False)
    # To a file each row goes whole; a terminal wraps within the column.
    Console(markup=False, width=None if console.is_terminal else 1000).print(_table(found.rows))
    for sentence in found.summary:
        console.print(sentence, soft_wrap=not console.is_terminal)
    raise typer.Exit(found.exit_code)


def _table(rows: Sequence[Row]) -> Table:
    """What was found and, below it, what comes next; a heading for each part."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for part, group in itertools.groupby(rows, key=lambda row: row.part):
        table.add_row(Text(part, style="bold"))
        for row in group:
            status = Text(row.status, style=_STYLES.get(row.status, "dim"))
            table.add_row(f"  {row.name}", status, row.found)
            if row.next:
                table.add_row("", "", f"next: {row.next}")
        table.add_row()
    return table
