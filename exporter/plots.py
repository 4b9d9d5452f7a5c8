"""An evaluation as plots: confusion, recall of each emotion, calibration, gains of the steps.

Blue and vermilion of Okabe and Ito, and one-hued maps: all are told apart without seeing red from green.
"""

import io
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from emoexport.evaluation import BINS, EvaluationReport, Figures, RowsResult
from emoexport.statistics import Estimate

__all__ = [
    "BLUE",
    "GREY",
    "VERMILION",
    "draw_confusion",
    "draw_reliability",
    "evaluation_plots",
    "plain_axes",
    "png",
]

BLUE, VERMILION, GREY = "#0072B2", "#D55E00", "#666666"
_COLOURS = {"all": BLUE, "clean": VERMILION}


def evaluation_plots(report: EvaluationReport) -> dict[str, bytes]:
    """Draw an evaluation.

    Returns:
        PNG files by name. The gains are left out where no step was added.
    """
    plots = {
        "confusion.png": _confusion_plot(report),
        "recall.png": _recall_plot(report),
        "reliability.png": _reliability_plot(report),
    }
    if len(report.results[0].steps) > 1:
        plots["gains.png"] = _gains_plot(report)
    return {name: png(figure) for name, figure in plots.items()}


def png(figure: Figure) -> bytes:
    """The figure as a file."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120)
    return file.getvalue()


def _titled(figure: Figure, title: str, report: EvaluationReport) -> None:
    figure.suptitle(f"{title}\n{report.data}, {report.split}; {report.setting}", fontsize=12)


def _rows_and_n(result: RowsResult) -> str:
    return f"{result.rows} rows, n = {result.figures.faces:,}"


def plain_axes(axes: Axes) -> None:
    """Leave the frame open above and to the right."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)


def _confusion_plot(report: EvaluationReport) -> Figure:
    panels = len(report.results)
    figure = Figure(figsize=(6.4 * panels, 6.4), layout="constrained")
    for axes, result in zip(figure.subplots(1, panels, squeeze=False)[0], report.results, strict=True):
        draw_confusion(axes, np.array(result.figures.confusion), report.labels)
        axes.set_title(_rows_and_n(result), fontsize=11)
    _titled(figure, "Confusion: faces, coloured by their share of the row", report)
    return figure


def draw_confusion(axes: Axes, counts: np.ndarray, labels: Sequence[str]) -> None:
    """Faces by true and decided label, coloured by their share of the row.

    Args:
        axes: where.
        counts: `(L, L)`, row the true label, column the decided one.
        labels: the names of the L labels.
    """
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    for (row, column), count in np.ndenumerate(counts):
        share = shares[row, column]
        axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor=BLUE, alpha=share, linewidth=0))
        colour = "white" if share > 0.6 else "black"
        axes.text(column, row, f"{count:,}", ha="center", va="center", color=colour, fontsize=11)
    places = np.arange(len(labels))
    axes.set_xlim(-0.5, len(labels) - 0.5)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_aspect("equal")
    axes.set_xticks(places, labels, rotation=45, ha="right", rotation_mode="anchor", fontsize=11)
    axes.set_yticks(places, labels, fontsize=11)
    axes.set_xlabel("decided", fontsize=11)
    axes.set_ylabel("true", fontsize=11)


def _recall_plot(report: EvaluationReport) -> Figure:
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for result, shift in zip(report.results, _shifts(len(report.results)), strict=True):
        shown = [(row, entry.recall) for row, entry in enumerate(result.figures.classes) if entry.recall is not None]
        _intervals(axes, [row + shift for row, _ in shown], [recall for _, recall in shown], result, scale=100)
    counts = zip(*([f"{entry.faces:,}" for entry in result.figures.classes] for result in report.results), strict=True)
    names = [f"{label} ({', '.join(faces)})" for label, faces in zip(report.labels, counts, strict=True)]
    axes.set_yticks(range(len(names)), names, fontsize=11)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(0, 100)
    axes.set_xlabel("recall % with 95 % interval", fontsize=11)
    axes.grid(axis="x", color="#dddddd")
    plain_axes(axes)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=11)
    _titled(figure, "Recall of each emotion (faces in brackets)", report)
    return figure


def _shifts(count: int) -> list[float]:
    """Where the results of one row stand beside each other."""
    return [0.0] if count == 1 else [-0.13, 0.13]


def _intervals(
    axes: Axes, heights: Sequence[float], estimates: Sequence[Estimate], result: RowsResult, *, scale: float
) -> None:
    values = scale * np.array([[estimate.value, estimate.low, estimate.high] for estimate in estimates]).T
    axes.errorbar(
        values[0],
        heights,
        xerr=[values[0] - values[1], values[2] - values[0]],
        fmt="o" if result.rows == "all" else "s",
        color=_COLOURS[result.rows],
        markersize=6,
        capsize=3,
        label=_rows_and_n(result),
    )


def _reliability_plot(report: EvaluationReport) -> Figure:
    panels = len(report.results)
    figure = Figure(figsize=(5.2 * panels, 6.4), layout="constrained")
    grid = figure.subplots(2, panels, squeeze=False, sharex=True, height_ratios=[4, 1])
    for (above, below), result in zip(grid.T, report.results, strict=True):
        draw_reliability(above, below, result.figures, _COLOURS[result.rows])
        above.set_title(_rows_and_n(result), fontsize=11)
    _titled(figure, f"Reliability in {BINS} bins", report)
    return figure


def draw_reliability(above: Axes, below: Axes, figures: Figures, colour: str) -> None:
    """Accuracy over confidence above, with the calibration error; how many faces each bin holds below."""
    bins = figures.calibration
    confidence = np.array([entry.confidence for entry in bins])
    value, low, high = np.array([(b.accuracy.value, b.accuracy.low, b.accuracy.high) for b in bins]).T
    above.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle="--", label="calibrated")
    above.errorbar(
        confidence, value, yerr=[value - low, high - value], fmt="o", color=colour, capsize=3, label="found, 95 %"
    )
    ece = figures.ece
    above.text(
        0.97,
        0.04,
        f"ECE {100 * ece.value:.1f} % [{100 * ece.low:.1f}, {100 * ece.high:.1f}]",
        ha="right",
        transform=above.transAxes,
        fontsize=11,
    )
    above.set_xlim(0, 1)
    above.set_ylim(0, 1.02)
    above.set_ylabel("share that is right", fontsize=11)
    above.legend(loc="upper left", frameon=False, fontsize=10)
    centres = (np.floor(np.minimum(confidence, 1 - 1e-9) * BINS) + 0.5) / BINS
    below.bar(centres, [entry.faces for entry in bins], width=0.9 / BINS, color=colour, alpha=0.6)
    below.set_xlabel("confidence", fontsize=11)
    below.set_ylabel("faces", fontsize=11)
    for axes in (above, below):
        plain_axes(axes)


def _gains_plot(report: EvaluationReport) -> Figure:
    names = [step.name for step in report.results[0].steps if step.gain]
    figure = Figure(figsize=(9, 2.2 + 0.75 * len(names)), layout="constrained")
    axes = figure.subplots()
    axes.axvline(0, color=GREY, linewidth=1)
    for result, shift in zip(report.results, _shifts(len(report.results)), strict=True):
        gains = [step.gain for step in result.steps if step.gain]
        _intervals(axes, [row + shift for row in range(len(gains))], [gain.points for gain in gains], result, scale=1)
        for row, gain in enumerate(gains):
            axes.annotate(
                f"{gain.verdict}: {gain.mended:,} mended, {gain.broken:,} broken",
                (1.01, row + shift),
                xycoords=("axes fraction", "data"),
                va="center",
                color=_COLOURS[result.rows],
                fontsize=10,
                annotation_clip=False,
            )
    axes.set_yticks(range(len(names)), names, fontsize=11)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlabel("points of accuracy against the step before, with 95 % interval", fontsize=11)
    axes.grid(axis="x", color="#dddddd")
    plain_axes(axes)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=11)
    _titled(figure, "Gain of each step", report)
    return figure
