"""What `verify` found, drawn for the page: intervals against the limits, recall, confusion, reliability."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes

from emoexport.evaluation import BINS, Figures, assess
from emoexport.evidence import Evidence
from emoexport.outcome import Outcome
from emoexport.parity import EngineParity, ParityReport
from emoexport.plots import draw_confusion, draw_reliability
from emoexport.saved_answers import SavedAnswers
from emoexport.statistics import Estimate
from emoexport.svg import Panel, Row, draw, draw_pair, list_rows, number_colour
from emoexport.table_format import with_interval

__all__ = [
    "MARKS",
    "Answered",
    "accuracy_panel",
    "answered_by",
    "confusion_panel",
    "disagreement_panel",
    "recall_panel",
    "reliability_panel",
    "that_differ_most",
]

_INK, _LIMIT, _ROW = "#000000", "#d55e00", 34
MARKS: Mapping[str, str] = {"certified": "✓", "failed": "✗", "not enough evidence": "?", "not judged": "-"}
"""By verdict, which is told in words beside it."""


@dataclass(frozen=True, kw_only=True)
class Answered:
    """What one engine, or the reference, says of the faces, in figures."""

    name: str
    colour: str
    figures: Figures


def that_differ_most(report: ParityReport, rows: str, count: int = 3) -> list[EngineParity]:
    """Of each precision the engine that decides most often otherwise than the reference; of these the first few."""
    found = [result for result in report.results if result.rows == rows]
    found.sort(key=lambda result: (-result.evidence.disagreements, -result.max_difference, result.engine))
    first: dict[str, EngineParity] = {}
    for result in found:
        first.setdefault(result.precision, result)
    return list(first.values())[:count]


def answered_by(saved: SavedAnswers, names: Sequence[str], rows: str) -> list[Answered]:
    """The reference and engines on a set of rows; without those whose probabilities are no numbers."""
    mask = saved.rows[rows]
    said: dict[str, tuple[str, Outcome]] = {"reference": (_INK, saved.reference)}
    precisions = {engine.engine: engine.precision for engine in saved.facts.engines}
    said |= {name: (number_colour(precisions[name]), saved.answers[name]) for name in names}
    return [
        Answered(name=name, colour=colour, figures=_figures(outcome.take(mask), saved, mask))
        for name, (colour, outcome) in said.items()
        if np.isfinite(outcome.probabilities).all() and np.isfinite(outcome.confidence).all()
    ]


def _figures(outcome: Outcome, saved: SavedAnswers, mask: np.ndarray) -> Figures:
    return assess({"": outcome}, saved.truth[mask], labels=saved.facts.labels).figures


def accuracy_panel(report: ParityReport, rows: str) -> Panel:
    """Change of accuracy of every engine with its paired interval, its one-sided bound, and the limit."""
    results = [result for result in report.results if result.rows == rows]
    limit = -report.limits.max_drop_points

    def drawing(axes: Axes) -> None:
        list_rows(axes, _verdicts(report, results))
        for height, result in enumerate(results):
            found = result.evidence
            _interval(axes, height, found.gain_points, number_colour(result.precision))
            axes.plot([found.bound_points] * 2, [height - 0.18, height + 0.18], color=_INK, linewidth=2)
        axes.axvline(0, color="#666666", linewidth=1)
        _limit(axes, limit)
        axes.set_xlabel("accuracy, points against the reference")
        _widen(axes, [limit, 0.0])

    return draw(
        drawing,
        name=f"accuracy-{rows}",
        title=f"Change of accuracy; dashed: limit {limit:g}",
        height=_height(results),
        text=f"Change of accuracy in points with its 95 % interval and one-sided bound; the limit is {limit:g}. "
        + " ".join(f"{result.engine}: {_signed(result.evidence)}." for result in results),
    )


def disagreement_panel(report: ParityReport, rows: str) -> Panel:
    """Labels that every engine changes, with the upper bound on them, and the limit."""
    results = [result for result in report.results if result.rows == rows]
    limit = report.limits.max_disagreement_pct

    def drawing(axes: Axes) -> None:
        list_rows(axes, [Row(name=result.engine, said=_changed(result.evidence)) for result in results])
        for height, result in enumerate(results):
            found, colour = result.evidence, number_colour(result.precision)
            share, most = 100 * found.disagreements / found.faces, 100 * found.disagreement_bound
            axes.plot([share, most], [height, height], color=colour, linewidth=2)
            axes.plot(share, height, "o", color=colour, markersize=6)
            axes.plot([most] * 2, [height - 0.18, height + 0.18], color=_INK, linewidth=2)
        _limit(axes, limit)
        axes.set_xlabel("faces with another label, %")
        _widen(axes, [0.0, limit])

    return draw(
        drawing,
        name=f"labels-{rows}",
        title=f"Changed labels; dashed: limit {limit:g} %",
        height=_height(results),
        text=f"Share of labels that differ, with its one-sided 95 % upper bound; the limit is {limit:g} %. "
        + " ".join(f"{result.engine}: {_changed(result.evidence)}." for result in results),
    )


def recall_panel(result: EngineParity) -> Panel:
    """Change of recall of each emotion, with its paired interval."""
    recall = result.evidence.recall

    def drawing(axes: Axes) -> None:
        rows = [
            Row(name=f"{name}, n = {change.faces:,}", said=with_interval(change.points, 2, sign=True))
            for name, change in recall.items()
        ]
        list_rows(axes, rows)
        for height, change in enumerate(recall.values()):
            _interval(axes, height, change.points, number_colour(result.precision))
        axes.axvline(0, color="#666666", linewidth=1)
        axes.set_xlabel("recall, points against the reference")
        _widen(axes, [0.0])

    return draw(
        drawing,
        name=f"recall-{result.rows}-{result.engine}",
        title=result.engine,
        height=60 + _ROW * len(recall),
        text=f"Change of recall by {result.engine}, in points. "
        + " ".join(f"{name}: {with_interval(change.points, 2, sign=True)}." for name, change in recall.items()),
    )


def confusion_panel(answered: Answered, labels: Sequence[str]) -> Panel:
    """How many faces of each emotion it calls what."""
    counts = np.array(answered.figures.confusion)
    right, faces = int(counts.trace()), answered.figures.faces

    def drawing(axes: Axes) -> None:
        draw_confusion(axes, counts, labels)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)

    return draw(
        drawing,
        name=f"confusion-{answered.name}",
        title=answered.name,
        height=375,
        text=f"Confusion matrix of {answered.name}: {right:,} of {faces:,} faces are on the diagonal. "
        + " ".join(f"{label}: {', '.join(map(str, row))}." for label, row in zip(labels, counts.tolist(), strict=True)),
    )


def reliability_panel(answered: Answered) -> Panel:
    """How often it is right at each confidence, and how many faces have that."""
    figures = answered.figures
    ece = figures.ece

    def drawing(above: Axes, below: Axes) -> None:
        draw_reliability(above, below, figures, answered.colour)

    return draw_pair(
        drawing,
        name=f"reliability-{answered.name}",
        title=answered.name,
        height=390,
        text=f"Reliability of {answered.name} in {BINS} bins of confidence; calibration error {100 * ece.value:.1f} %. "
        + " ".join(
            f"Confidence {100 * one.confidence:.0f} %: {100 * one.accuracy.value:.0f} % of {one.faces:,} right."
            for one in figures.calibration
        ),
    )


def _verdicts(report: ParityReport, results: Sequence[EngineParity]) -> list[Row]:
    verdicts = {engine.engine: engine.verdict for engine in report.engines}
    return [
        Row(name=result.engine, said=f"{MARKS[verdicts[result.engine]]} {verdicts[result.engine]}")
        for result in results
    ]


def _interval(axes: Axes, height: float, estimate: Estimate, colour: str) -> None:
    axes.plot([estimate.low, estimate.high], [height, height], color=colour, linewidth=2)
    axes.plot(estimate.value, height, "o", color=colour, markersize=6)


def _limit(axes: Axes, value: float) -> None:
    axes.axvline(value, color=_LIMIT, linewidth=1.5, linestyle="--")


def _widen(axes: Axes, shown: Sequence[float]) -> None:
    """Let the horizontal axis have these values too, and some room beside them."""
    low, high = axes.dataLim.intervalx
    low, high = min([low, *shown]), max([high, *shown])
    room = 0.06 * (high - low or 1.0)
    axes.set_xlim(low - room, high + room)


def _height(results: Sequence[EngineParity]) -> float:
    return 75 + _ROW * len(results)


def _signed(evidence: Evidence) -> str:
    return f"{with_interval(evidence.gain_points, 2, sign=True)}, no worse than {evidence.bound_points:+.2f}"


def _changed(evidence: Evidence) -> str:
    return f"{evidence.disagreements:,} of {evidence.faces:,}, at most {100 * evidence.disagreement_bound:.2f} %"
