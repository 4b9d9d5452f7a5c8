"""Figures for a page: SVG with text as text, colours as variables of its style sheet, the same bytes every time."""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import matplotlib as mpl
from markupsafe import Markup, escape
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from emoexport.precision import PRECISIONS

__all__ = [
    "NUMBER_COLOURS",
    "WIDTH",
    "Panel",
    "Row",
    "draw",
    "draw_pair",
    "legend_below",
    "list_rows",
    "number_colour",
    "scale_by_ratio",
]

WIDTH = 360
"""Of a panel, in units of its own in which text is 11 high: a phone shows it whole, and still to be read."""

VARIABLES: Mapping[str, str] = MappingProxyType(
    {
        "#0072b2": "blue",
        "#d55e00": "vermilion",
        "#e69f00": "orange",
        "#009e73": "green",
        "#cc79a7": "purple",
        "#56b4e9": "sky",
        "#666666": "muted",
        "#999999": "grey",
        "#dddddd": "grid",
        "#000000": "ink",
        "#ffffff": "paper",
    }
)
"""The colours that are drawn with, those of Okabe and Ito and greys, and what the page's style sheet calls them."""

NUMBER_COLOURS: Mapping[str, str] = MappingProxyType(
    {"fp32": "#0072b2", "fp16": "#e69f00", "bf16": "#009e73", "int8": "#d55e00", "fp8": "#cc79a7", "other": "#999999"}
)
"""By type of number."""

_STYLE: Mapping[Any, Any] = MappingProxyType(
    {
        "axes.facecolor": "none",
        "figure.facecolor": "none",
        "font.size": 11,
        "grid.color": "#999999",
        "legend.frameon": False,
        "legend.fontsize": 10,
        "savefig.facecolor": "none",
        "svg.fonttype": "none",
        "text.parse_math": False,  # a name may hold a dollar sign
    }
)


@dataclass(frozen=True, kw_only=True)
class Panel:
    """A drawing that is a part of a figure."""

    svg: Markup
    """An `<svg>` element, as wide as what it is put into."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """What stands above something in a list of drawings: its name to the left, what is said of it to the right."""

    name: str
    said: str = ""


def draw(drawing: Callable[[Axes], None], *, name: str, text: str, height: float, title: str = "") -> Panel:
    """Draw on one pair of axes.

    Args:
        drawing: what draws.
        name: of the panel, which no other on the page has.
        text: what it shows, for those who do not see it.
        height: in units of which a panel is `WIDTH` wide.
        title: above it.
    """

    def fill(figure: Figure) -> None:
        axes = figure.subplots()
        drawing(axes)
        _name(axes, title)

    return _panel(fill, name=name, text=text, height=height)


def draw_pair(drawing: Callable[[Axes, Axes], None], *, name: str, text: str, height: float, title: str = "") -> Panel:
    """Draw on two pairs of axes with one horizontal axis, the lower a quarter as high as the upper; else as `draw`."""

    def fill(figure: Figure) -> None:
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
        drawing(above, below)
        _name(above, title)

    return _panel(fill, name=name, text=text, height=height)


def legend_below(axes: Axes, handles: Sequence[Artist] = (), *, columns: int = 4) -> None:
    """A legend below the axis and in nobody's way: of these, or of all that was drawn with a label."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    shown = list(handles) or axes.get_legend_handles_labels()[0]
    figure.legend(handles=shown, loc="outside lower center", ncols=columns, handlelength=2, columnspacing=1.2)


def list_rows(axes: Axes, rows: Sequence[Row]) -> None:
    """Make place for one drawing below each other at the heights 0, 1, ..., each under a line of text."""
    across = axes.get_yaxis_transform()
    ground = {"facecolor": "#ffffff", "edgecolor": "none", "pad": 1}
    for height, row in enumerate(rows):
        place: dict[str, Any] = {"transform": across, "va": "center", "fontsize": 10.5, "bbox": ground, "zorder": 4}
        axes.text(0, height - 0.42, row.name, ha="left", **place)
        if row.said:
            axes.text(1, height - 0.42, row.said, ha="right", color="#666666", **place)
    axes.set_ylim(len(rows) - 0.6, -0.75)
    axes.set_yticks([])
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_axisbelow(True)
    axes.grid(axis="x", color="#dddddd", linewidth=0.8)


def number_colour(precision: str) -> str:
    """The colour of a precision: that of the numbers which its dense layers multiply."""
    return NUMBER_COLOURS[PRECISIONS[precision].number]


def scale_by_ratio(axes: Axes, axis: Axis, low: float, high: float) -> None:
    """A logarithmic axis with plain numbers, as many of each decade as there is room for."""
    is_x = axis is axes.xaxis
    (axes.set_xscale if is_x else axes.set_yscale)("log")
    (axes.set_xlim if is_x else axes.set_ylim)(low / 1.15, high * 1.15)
    axis.set_major_locator(LogLocator(base=10, subs=_steps(high / low)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.4g}"))
    axis.set_minor_locator(NullLocator())


def _steps(ratio: float) -> tuple[float, ...]:
    """Which parts of a decade have a label, on an axis from one number to so many times that."""
    if ratio > 300:
        return (1.0,)
    return (1.0, 2.0, 5.0) if ratio > 4 else (1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0)


def _name(axes: Axes, title: str) -> None:
    if title:
        axes.set_title(title, loc="left", fontsize=11.5, pad=8)


def _panel(fill: Callable[[Figure], None], *, name: str, text: str, height: float) -> Panel:
    file = io.StringIO()
    with mpl.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(WIDTH / 72, height / 72), layout="constrained")
        fill(figure)
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return Panel(svg=Markup(_inlined(file.getvalue(), name, text)))  # noqa: S704 (matplotlib escapes what it writes)


def _inlined(svg: str, name: str, text: str) -> str:
    """An SVG file as an element of a page that has others beside it."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", body, flags=re.DOTALL)
    body = re.sub(r"<!--.*?-->", "", body, flags=re.DOTALL)
    box = re.search(r'viewBox="[^"]*"', body)
    assert box is not None
    opened = f'<svg {box[0]} role="img" aria-label="{escape(text)}">'
    body = re.sub(r"^<svg[^>]*>", lambda _: opened, body, count=1, flags=re.DOTALL)
    used = set(re.findall(r'(?:href="|url\()#([\w-]+)', body))
    body = re.sub(r' id="([\w.-]+)"', lambda found: f' id="{name}-{found[1]}"' if found[1] in used else "", body)
    body = re.sub(r'(href="|url\()#([\w-]+)', lambda found: f"{found[1]}#{name}-{found[2]}", body)
    body = re.sub(r"font-family:[^;\"]*;? ?", "", body)
    body = re.sub(r"#[0-9a-f]{6}\b", lambda found: f"var(--{VARIABLES[found[0]]})", body)
    return re.sub(r"\n\s*", "\n", body).strip()
