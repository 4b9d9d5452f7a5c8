"""What `verify` found as tables: whole as Markdown, in 80 columns for the terminal."""

from rich.table import Table

from emoexport.evidence import Evidence
from emoexport.parity import EngineParity, ParityReport
from emoexport.table_format import Row, markdown_table, terminal_table
from emoexport.tables import machine_line, percent

__all__ = ["parity_markdown", "parity_table"]

_PARITY_IN_TERMINAL = ("precision", "engine", "accuracy % [95 %]", "agreement % [95 %]", "ms a face", "MB")


def parity_table(report: ParityReport, rows: str) -> Table:
    """The parity of every engine on one set of rows, for the terminal."""
    return terminal_table(_PARITY_IN_TERMINAL, _parity_rows(report, rows, digits=1), texts=("engine", "precision"))


def parity_markdown(report: ParityReport) -> str:
    """The whole report as Markdown."""
    parts = [
        "# Parity with the PyTorch reference",
        f"Verdict: **{report.verdict}**. Data: {report.data}, split {report.split}, {report.faces:,} faces "
        f"(SHA-256 {report.data_sha256[:16]}…). Bundle {report.bundle_digest[:16]}…. {report.created}.",
    ]
    for rows in dict.fromkeys(result.rows for result in report.results):
        count = next(result.accuracy.n for result in report.results if result.rows == rows)
        parts += [f"## {rows} rows (n = {count:,})", markdown_table(_parity_rows(report, rows, digits=2))]
        found = [(result.engine, result.evidence) for result in report.results if result.rows == rows]
        evidence = [_evidence_row(engine, one) for engine, one in found if one is not None]
        parts += ["Face by face against the reference:", markdown_table(evidence)] if evidence else []
    failures = [
        f"- {result.engine}, {result.rows} rows: {failure}." for result in report.results for failure in result.failures
    ]
    if failures:
        parts += ["## Out of tolerance", "\n".join(failures)]
    parts += [
        "Points and recall: accuracy and recall of the engine less those of the reference on the same faces, "
        "with Tango's intervals; no worse than, and at most: one-sided bounds at 95 %. KL in nats, from the "
        "reference's probabilities.",
        f"Accuracy: Wilson interval; agreement: Clopper-Pearson. Times: median of a call with {report.batch} faces, "
        "end to end, all engines in turn in one run.",
        *report.notes,
        machine_line(report.machine),
    ]
    return "\n\n".join(parts) + "\n"


def _parity_rows(report: ParityReport, rows: str, *, digits: int) -> list[Row]:
    results = [result for result in report.results if result.rows == rows]
    reference = {
        "precision": "fp32",
        "engine": "PyTorch",
        "accuracy % [95 %]": percent(results[0].reference_accuracy, digits),
        "ms a face": f"{report.latency['torch-fp32'].p50_ms / report.batch:.2f}",
        "verdict": "reference",
    }
    return [reference, *(_parity_row(report, result, digits) for result in results)]


def _parity_row(report: ParityReport, result: EngineParity, digits: int) -> Row:
    return {
        "precision": result.precision,
        "engine": result.engine.removesuffix(f"-{result.precision}"),
        "accuracy % [95 %]": percent(result.accuracy, digits),
        "agreement % [95 %]": percent(result.agreement, digits),
        "max Δp": f"{result.max_difference:.1e}",
        "mean Δp": f"{result.mean_difference:.1e}",
        "ms a face": f"{report.latency[result.engine].p50_ms / report.batch:.2f}",
        "MB": f"{_size(report, result) / 1e6:.1f}",
        "verdict": result.verdict,
    }


def _evidence_row(engine: str, found: Evidence) -> Row:
    gain = found.gain_points
    emotion, change = min(found.recall.items(), key=lambda item: item[1].points.value)
    recall = change.points
    return {
        "engine": engine,
        "only it right": str(found.engine_only_right),
        "only the reference": str(found.reference_only_right),
        "points [95 %]": f"{gain.value:+.2f} [{gain.low:+.2f}, {gain.high:+.2f}]",
        "no worse than": f"{found.bound_points:+.2f}",
        "McNemar p": f"{found.mcnemar_p:.2g}",
        "other labels": f"{found.disagreements}, at most {100 * found.disagreement_bound:.2f} %",
        "KL": f"{found.divergence_nats:.1e}",
        "ECE % (reference)": f"{100 * found.calibration_error:.2f} ({100 * found.reference_calibration_error:.2f})",
        "recall, largest loss [95 %]": f"{emotion} {recall.value:+.2f} [{recall.low:+.2f}, {recall.high:+.2f}]",
    }


def _size(report: ParityReport, result: EngineParity) -> int:
    """Bytes of what the engine is opened from: its package, or else the graph."""
    return next(report.size_bytes[name] for name in (result.engine, result.precision) if name in report.size_bytes)
