"""Reports as tables: whole as Markdown, in 80 columns for the terminal."""

from collections.abc import Sequence

from rich import box
from rich.table import Table

from emoexport.parity import EngineParity, ParityReport, Share
from emoexport.throughput import EngineSpeed, SpeedReport

__all__ = ["parity_markdown", "parity_table", "speed_markdown", "speed_table"]

Row = dict[str, str]

_PARITY_IN_TERMINAL = ("precision", "engine", "accuracy % [95 %]", "agreement % [95 %]", "ms a face", "MB")
_SPEED_IN_TERMINAL = ("engine", "precision", "batch", "p50 ms", "p95 ms", "ms a face", "faces/s", "times reference")


def parity_table(report: ParityReport, rows: str) -> Table:
    """The parity of every engine on one set of rows, for the terminal."""
    return _table(_PARITY_IN_TERMINAL, _parity_rows(report, rows, digits=1))


def parity_markdown(report: ParityReport) -> str:
    """The whole report as Markdown."""
    parts = [
        "# Parity with the PyTorch reference",
        f"Verdict: **{report.verdict}**. Data: {report.data}, split {report.split}, {report.faces:,} faces "
        f"(SHA-256 {report.data_sha256[:16]}…). Bundle {report.bundle_digest[:16]}…. {report.created}.",
    ]
    for rows in dict.fromkeys(result.rows for result in report.results):
        count = next(result.accuracy.n for result in report.results if result.rows == rows)
        parts += [f"## {rows} rows (n = {count:,})", _markdown(_parity_rows(report, rows, digits=2))]
    failures = [
        f"- {result.engine}, {result.rows} rows: {failure}." for result in report.results for failure in result.failures
    ]
    if failures:
        parts += ["## Out of tolerance", "\n".join(failures)]
    parts += [
        f"Accuracy: Wilson interval; agreement: Clopper-Pearson. Times: median of a call with {report.batch} faces, "
        "end to end, all engines in turn in one run.",
        _machine(report.machine),
    ]
    return "\n\n".join(parts) + "\n"


def speed_table(report: SpeedReport) -> Table:
    """The speed of every engine, for the terminal."""
    return _table(_SPEED_IN_TERMINAL, [_speed_row(result) for result in report.results])


def speed_markdown(report: SpeedReport) -> str:
    """The whole report as Markdown."""
    parts = [
        "# Throughput",
        f"{report.passes_a_face} passes a face. Bundle {report.bundle_digest[:16]}…. {report.created}.",
        _markdown([_speed_row(result) for result in report.results]),
        "End to end from uint8 faces in memory to labels. All engines in turn in one run; times reference: "
        "median of the ratios round by round, 95 % bootstrap interval.",
        _machine(report.machine),
    ]
    return "\n\n".join(parts) + "\n"


def _parity_rows(report: ParityReport, rows: str, *, digits: int) -> list[Row]:
    results = [result for result in report.results if result.rows == rows]
    reference = {
        "precision": "fp32",
        "engine": "PyTorch",
        "accuracy % [95 %]": _percent(results[0].reference_accuracy, digits),
        "ms a face": f"{report.latency['torch-fp32'].p50_ms / report.batch:.2f}",
        "verdict": "reference",
    }
    return [reference, *(_parity_row(report, result, digits) for result in results)]


def _parity_row(report: ParityReport, result: EngineParity, digits: int) -> Row:
    return {
        "precision": result.precision,
        "engine": result.engine.removesuffix(f"-{result.precision}"),
        "accuracy % [95 %]": _percent(result.accuracy, digits),
        "agreement % [95 %]": _percent(result.agreement, digits),
        "max Δp": f"{result.max_difference:.1e}",
        "mean Δp": f"{result.mean_difference:.1e}",
        "ms a face": f"{report.latency[result.engine].p50_ms / report.batch:.2f}",
        "MB": f"{report.size_bytes[result.precision] / 1e6:.1f}",
        "verdict": result.verdict,
    }


def _speed_row(result: EngineSpeed) -> Row:
    engine, _, precision = result.engine.rpartition("-")
    ratio = result.times_reference
    return {
        "engine": "PyTorch" if engine == "torch" else engine,
        "precision": precision,
        "batch": str(result.batch),
        "p50 ms": f"{result.latency_ms.p50_ms:.1f}",
        "p95 ms": f"{result.latency_ms.p95_ms:.1f}",
        "spread %": f"{result.latency_ms.spread_pct:.1f}",
        "ms a face": f"{result.ms_a_face:.2f}",
        "faces/s": f"{result.faces_a_second:.1f}",
        "passes/s": f"{result.passes_a_second:,.0f}",
        "times reference": f"{ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]",
    }


def _percent(share: Share, digits: int) -> str:
    return f"{100 * share.value:.{digits}f} [{100 * share.low:.{digits}f}, {100 * share.high:.{digits}f}]"


def _machine(machine: dict[str, str]) -> str:
    return "Machine: " + ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in machine.items()) + "."


def _table(columns: Sequence[str], rows: Sequence[Row]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for column in columns:
        table.add_column(column, justify="left" if column in ("engine", "precision") else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(row.get(column, "") for column in columns))
    return table


def _markdown(rows: Sequence[Row]) -> str:
    columns = list(rows[-1])  # the first row, the reference, has no differences
    lines = [columns, ["---"] * len(columns), *([row.get(column, "") for column in columns] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
