"""An evaluation as tables: whole as Markdown, in 80 columns for the terminal."""

from collections.abc import Iterator, Sequence

from rich.table import Table

from emoexport.evaluation import BINS, ComparedRows, EvaluatedMember, EvaluationReport, RowsResult
from emoexport.statistics import Estimate
from emoexport.table_format import markdown_table, percent, terminal_table, with_interval
from emoexport.tables import machine_line

__all__ = ["evaluation_markdown", "evaluation_tables"]

Row = dict[str, str]

_TEXTS = ("figure", "step", "emotion", "verdict", "true \\ decided")


def evaluation_tables(report: EvaluationReport) -> Iterator[tuple[str, Table]]:
    """Titles and tables for the terminal."""
    where = f"{report.data}, {report.split}"
    for title, rows in _tables(report, digits=1):
        yield f"{where}: {title}", terminal_table(list(rows[-1]), rows, texts=_TEXTS)


def evaluation_markdown(report: EvaluationReport) -> str:
    """The whole report as Markdown."""
    parts = [
        "# Evaluation",
        f"{report.setting}. Data: {report.data}, split {report.split}, {report.results[0].figures.faces:,} faces "
        f"(SHA-256 {report.data_sha256[:16]}…). {report.created}.",
        *report.notes,
    ]
    for title, rows in _tables(report, digits=2):
        parts += [f"## {title[0].upper()}{title[1:]}", markdown_table(rows)]
    parts += [
        "## Who voted",
        _member_table(report.members),
        f"Views: {', '.join(report.views)}.",
    ]
    if report.against is not None:
        parts += [
            f"## Compared with {report.against.name}",
            _member_table(report.against.members),
            f"Views: {', '.join(report.against.views)}.",
        ]
    parts += [
        "All intervals are 95 %, each by itself. Accuracy, recall, precision: Wilson. Gains of accuracy: Tango 1998, "
        "the score interval for paired proportions; mended and broken are the faces that only the later and only the "
        "earlier step gets right. All else: bootstrap over faces, the same draws for all steps. Calibration error: "
        f"confidence of the decided label, {BINS} bins of equal width; its interval begins at 0 where a calibrated "
        "model's faces would show as large an error. That interval is approximate: in simulations it held 84 to 98 %.",
        machine_line(report.machine),
    ]
    return "\n\n".join(parts) + "\n"


def _member_table(members: Sequence[EvaluatedMember]) -> str:
    return markdown_table(
        [
            {
                "member": member.file,
                "backbone": member.backbone,
                "validation accuracy %": f"{100 * member.validation_accuracy:.2f}",
                "SHA-256": f"{member.sha256[:16]}…",
            }
            for member in members
        ]
    )


def _tables(report: EvaluationReport, *, digits: int) -> Iterator[tuple[str, list[Row]]]:
    yield f"figures of {report.setting}", _figure_rows(report, digits)
    for result in report.results:
        rows = f"{result.rows} rows, n = {result.figures.faces:,}"
        if len(result.steps) > 1:
            yield f"accuracy gained by each step, {rows}", _gain_rows(result, digits)
            yield f"calibration after each step, {rows}", _calibration_rows(result, digits)
        yield f"emotions, {rows}", _class_rows(result, digits)
        yield f"confusion, {rows}", _confusion_rows(result, report)
    if report.against is not None:
        for compared in report.against.results:
            title = f"compared with {report.against.name}, {compared.rows} rows, n = {compared.faces:,}"
            yield title, _comparison_rows(compared, digits)


def _figure_rows(report: EvaluationReport, digits: int) -> list[Row]:
    names = {"accuracy %": "accuracy", "macro-F1 %": "macro_f1", "calibration error (ECE) %": "ece"}
    columns = {f"{result.rows} rows, n = {result.figures.faces:,}": result.figures for result in report.results}
    rows = [
        {
            "figure": f"{name} [95 %]",
            **{column: _percent(getattr(figures, field), digits) for column, figures in columns.items()},
        }
        for name, field in names.items()
    ]
    nll = {column: with_interval(figures.nll, 3) for column, figures in columns.items()}
    return [*rows, {"figure": "negative log likelihood [95 %]", **nll}]


def _gain_rows(result: RowsResult, digits: int) -> list[Row]:
    return [
        {
            "step": step.name,
            "accuracy %": f"{100 * step.accuracy.value:.{digits}f}",
            "points [95 %]": with_interval(step.gain.points, digits, sign=True) if step.gain else "",
            "mended": f"{step.gain.mended:,}" if step.gain else "",
            "broken": f"{step.gain.broken:,}" if step.gain else "",
            "verdict": step.gain.verdict if step.gain else "",
        }
        for step in result.steps
    ]


def _comparison_rows(result: ComparedRows, digits: int) -> list[Row]:
    return [
        {
            "step": step.name,
            "accuracy %": f"{100 * step.accuracy.value:.{digits}f}",
            "the other's %": f"{100 * step.other.value:.{digits}f}",
            "points [95 %]": with_interval(step.gain.points, digits, sign=True),
            "mended": f"{step.gain.mended:,}",
            "broken": f"{step.gain.broken:,}",
            "verdict": step.gain.verdict,
        }
        for step in result.steps
    ]


def _calibration_rows(result: RowsResult, digits: int) -> list[Row]:
    return [
        {
            "step": step.name,
            "ECE %": f"{100 * step.ece:.{digits}f}",
            "change [95 %]": with_interval(_times_hundred(step.gain.ece), digits, sign=True) if step.gain else "",
            "NLL": f"{step.nll:.3f}",
            "change of NLL [95 %]": with_interval(step.gain.nll, 3, sign=True) if step.gain else "",
        }
        for step in result.steps
    ]


def _class_rows(result: RowsResult, digits: int) -> list[Row]:
    return [
        {
            "emotion": row.label,
            "faces": f"{row.faces:,}",
            "recall % [95 %]": _percent(row.recall, digits),
            "precision % [95 %]": _percent(row.precision, digits),
        }
        for row in result.figures.classes
    ]


def _confusion_rows(result: RowsResult, report: EvaluationReport) -> list[Row]:
    return [
        {"true \\ decided": label, **{name: f"{n:,}" for name, n in zip(report.labels, counts, strict=True)}}
        for label, counts in zip(report.labels, result.figures.confusion, strict=True)
    ]


def _percent(estimate: Estimate | None, digits: int) -> str:
    return "none" if estimate is None else percent(estimate, digits)


def _times_hundred(estimate: Estimate) -> Estimate:
    return Estimate(value=100 * estimate.value, low=100 * estimate.low, high=100 * estimate.high)
