"""Rows by column name as tables: for the terminal, as Markdown."""

from collections.abc import Sequence

from rich import box
from rich.table import Table

__all__ = ["Row", "markdown_table", "terminal_table"]

Row = dict[str, str]


def terminal_table(columns: Sequence[str], rows: Sequence[Row], *, texts: Sequence[str]) -> Table:
    """Rows by column name as a table; the columns `texts` stand to the left, numbers to the right."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for column in columns:
        table.add_column(column, justify="left" if column in texts else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(row.get(column, "") for column in columns))
    return table


def markdown_table(rows: Sequence[Row]) -> str:
    """Rows by column name as Markdown; the last row has all columns."""
    columns = list(rows[-1])  # the first row, the reference, has no differences
    lines = [columns, ["---"] * len(columns), *([row.get(column, "") for column in columns] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
