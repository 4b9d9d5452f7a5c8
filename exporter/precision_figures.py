"""In which numbers a bundle computes, drawn for the page: what graphs ask for, what engines do, what blocks cost."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.patches import Patch

from emoexport.calib.tuning import Tuning
from emoexport.parity import ParityReport
from emoexport.summary import BundleSummary
from emoexport.svg import NUMBER_COLOURS, Panel, Row, draw, legend_below, list_rows
from emoexport.tuning_tables import draw_costs, draw_gains

__all__ = ["graph_panel", "layers_panel", "sensitivity_panels", "time_panel"]

Counts = Mapping[str, float]


def graph_panel(summary: BundleSummary) -> Panel:
    """By graph, how many convolutions and matrix products are in which type of number."""
    return _histogram(
        {precision: graph.layers_by_number() for precision, graph in summary.graphs.items()},
        name="in-graphs",
        title="Asked for: layers of the graphs",
        text="By graph, how many of its convolutions and matrix products are in which type of number.",
    )


def layers_panel(report: ParityReport) -> Panel:
    """By engine, how many layers the runtime computes in which type of number."""
    return _histogram(
        {engine.engine: engine.layers for engine in report.engines},
        name="layers",
        title="Computed: all layers of the engines",
        text="By engine, how many of its layers are computed in which type of number.",
    )


def time_panel(report: ParityReport) -> Panel:
    """By engine, what part of the time of its multiplications each type of number takes."""
    return _histogram(
        {engine.engine: {name: 100 * part for name, part in engine.time_share.items()} for engine in report.engines},
        name="time",
        title="Computed: time of the multiplications",
        text="By engine, what part of the time of its multiplications is in which type of number.",
        unit=" %",
    )


def sensitivity_panels(tuning: Tuning) -> list[Panel]:
    """What each block costs alone in few bits, and what time it gains."""
    height = 130 + 18 * len(tuning.blocks)
    blocks = f"{len(tuning.blocks)} blocks"

    def costs(axes: Axes) -> None:
        draw_costs(axes, tuning)
        legend_below(axes)

    def gains(axes: Axes) -> None:
        draw_gains(axes, tuning)
        legend_below(axes)

    return [
        draw(
            costs,
            name="costs",
            title="Cost",
            height=height,
            text=f"By block, of {blocks}, the divergence of the vote where it alone is in few bits.",
        ),
        draw(
            gains,
            name="gains",
            title="Gain",
            height=height,
            text=f"By block, of {blocks}, the time that few bits gain, with its 95 % interval.",
        ),
    ]


def _histogram(counted: Mapping[str, Counts], *, name: str, title: str, text: str, unit: str = "") -> Panel:
    """A bar for each thing, divided by type of number, with the numbers in words."""
    told = {thing: _told(counts, unit) for thing, counts in counted.items()}

    def drawing(axes: Axes) -> None:
        list_rows(axes, [Row(name=thing, said=words) for thing, words in told.items()])
        for height, counts in enumerate(counted.values()):
            _bar(axes, height, counts)
        axes.set_xlim(0, 100)
        axes.set_xlabel("%")
        shown = dict.fromkeys(_kind(number) for counts in counted.values() for number in _ordered(counts))
        handles = [Patch(color=NUMBER_COLOURS[kind], label=kind) for kind in shown]
        legend_below(axes, handles)

    return draw(
        drawing,
        name=name,
        title=title,
        height=95 + 34 * len(counted),
        text=text + " " + " ".join(f"{thing}: {words}." for thing, words in told.items()),
    )


def _bar(axes: Axes, height: int, counts: Counts) -> None:
    total, left = sum(counts.values()) or 1.0, 0.0
    for number in _ordered(counts):
        width = 100 * counts[number] / total
        axes.barh(
            height + 0.05, width, left=left, height=0.36, color=NUMBER_COLOURS[_kind(number)], edgecolor="#ffffff"
        )
        left += width


def _ordered(counts: Counts) -> Sequence[str]:
    return sorted((number for number, count in counts.items() if count), key=lambda number: -counts[number])


def _kind(number: str) -> str:
    return number if number in NUMBER_COLOURS else "other"


def _told(counts: Counts, unit: str) -> str:
    return ", ".join(f"{number} {counts[number]:,.0f}{unit}" for number in _ordered(counts)) or "not told"
