"""A page: one HTML file with its style sheet and drawings inside, which asks no network for anything."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from jinja2 import Environment, PackageLoader, StrictUndefined
from rich.table import Table

from emoexport.svg import Panel
from emoexport.table_format import Row

__all__ = ["Drawing", "Missing", "Page", "Section", "Sheet"]


@dataclass(frozen=True, kw_only=True)
class Missing:
    """What cannot be shown, in a sentence, and the command that makes it."""

    sentence: str
    command: str = ""


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A figure: panels that stand side by side where there is room, and below each other on a phone."""

    panels: Sequence[Panel]
    caption: str


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """A table."""

    title: str
    columns: Sequence[str]
    texts: frozenset[str]
    """The columns that are words; the others are numbers, and stand to the right."""
    rows: Sequence[Sequence[str]]
    folded: bool = False
    """Whether it opens only when its title is asked for."""

    @classmethod
    def of(cls, title: str, rows: Sequence[Row], *, texts: Sequence[str], folded: bool = False) -> "Sheet":
        """Rows by column name; the last row has all columns."""
        columns = list(rows[-1]) if rows else []
        cells = [[row.get(column, "") for column in columns] for row in rows]
        return cls(title=title, columns=columns, texts=frozenset(texts), rows=cells, folded=folded)

    @classmethod
    def of_terminal(cls, title: str, table: Table, *, folded: bool = False) -> "Sheet":
        """A table that was made for the terminal."""
        return cls(
            title=title,
            columns=[str(column.header) for column in table.columns],
            texts=frozenset(str(column.header) for column in table.columns if column.justify == "left"),
            rows=list(zip(*([str(cell) for cell in column.cells] for column in table.columns), strict=True)),
            folded=folded,
        )


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the page under a heading."""

    anchor: str
    title: str
    lines: Sequence[str] = ()
    """Sentences, a paragraph each."""
    missing: Sequence[Missing] = ()
    steps: Sequence[tuple[str, str]] = ()
    """What was made of what: names and what they are, each made of the one before."""
    parts: Sequence[Drawing | Sheet] = field(default=())

    def drawings(self) -> list[Drawing]:
        """Its figures, in order."""
        return [part for part in self.parts if isinstance(part, Drawing)]

    def sheets(self) -> list[Sheet]:
        """Its tables, in order."""
        return [part for part in self.parts if isinstance(part, Sheet)]


@dataclass(frozen=True, kw_only=True)
class Page:
    """What stands on the page."""

    title: str
    verdict: str
    mark: str
    """The verdict as one sign, beside the word."""
    lines: Sequence[str]
    sections: Sequence[Section]
    foot: Sequence[str]

    def html(self) -> str:
        """The whole file, with what is said in it escaped."""
        environment = Environment(
            loader=PackageLoader("emoexport"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            keep_trailing_newline=True,
        )
        return environment.get_template("report.html.j2").render(page=self)
