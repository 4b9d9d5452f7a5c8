"""Rows by column name as tables: for the terminal, as Markdown."""

from collections.abc import Sequence
from typing import Protocol

from rich import box
from rich.table import Table

__all__ = ["Row", "markdown_table", "percent", "terminal_table", "with_interval"]

Row = dict[str, str]


class _Estimate(Protocol):
    """A figure with its interval."""

    @property
    def value(self) -> float: ...
    @property
    def low(self) -> float: ...
    @property
    def high(self) -> float: ...


def with_interval(found: _Estimate, digits: int, *, sign: bool = False) -> str:
    """A figure with its interval, as `0.74 [0.70, 0.78]`; with a plus where it is above zero, if it has a sign."""
    value, low, high = (f"{one:{'+' if sign else ''}.{digits}f}" for one in (found.value, found.low, found.high))
    return f"{value} [{low}, {high}]"


def percent(share: _Estimate, digits: int) -> str:
    """A share in percent, with its interval."""
    value, low, high = (f"{100 * one:.{digits}f}" for one in (share.value, share.low, share.high))
    return f"{value} [{low}, {high}]"


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
