"""Reports as tables, for the terminal and as Markdown."""

from collections.abc import Sequence

from rich.table import Table

from emoexport.parity import EngineParity, ParityReport, Share
from emoexport.throughput import SpeedReport

__all__ = ["parity_markdown", "parity_table", "speed_markdown", "speed_table"]

_PARITY_COLUMNS = (
    "precision",
    "engine",
    "accuracy [95 %]",
    "agreement [95 %]",
    "max |Δp|",
    "mean |Δp|",
    "ms a face",
    "MB",
    "verdict",
)
_SPEED_COLUMNS = (
    "engine",
    "batch",
    "p50 ms",
    "p95 ms",
    "spread %",
    "ms a face",
    "faces/s",
    "passes/s",
    "times reference",
)


def parity_table(report: ParityReport, rows: str) -> Table:
    """The parity of every engine on one set of rows, for the terminal."""
    return _table(_PARITY_COLUMNS, _parity_rows(report, rows))


def parity_markdown(report: ParityReport) -> str:
    """The whole report as Markdown."""
    parts = [
        "# Parity with the PyTorch reference",
        f"Verdict: **{report.verdict}**. Data: {report.data}, split {report.split}, {report.faces:,} faces "
        f"(SHA-256 {report.data_sha256[:16]}…). Bundle {report.bundle_digest[:16]}…. {report.created}.",
    ]
    for rows in dict.fromkeys(result.rows for result in report.results):
        count = next(result.accuracy.n for result in report.results if result.rows == rows)
        parts += [f"## {rows} rows (n = {count:,})", _markdown(_PARITY_COLUMNS, _parity_rows(report, rows))]
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
    return _table(_SPEED_COLUMNS, _speed_rows(report))


def speed_markdown(report: SpeedReport) -> str:
    """The whole report as Markdown."""
    return (
        "\n\n".join(
            [
                "# Throughput",
                f"{report.passes_a_face} passes a face. Bundle {report.bundle_digest[:16]}…. {report.created}.",
                _markdown(_SPEED_COLUMNS, _speed_rows(report)),
                "End to end from uint8 faces in memory to labels. All engines in turn in one run; times reference: "
                "median of the ratios round by round, 95 % bootstrap interval.",
                _machine(report.machine),
            ]
        )
        + "\n"
    )


def _parity_rows(report: ParityReport, rows: str) -> list[list[str]]:
    results = [result for result in report.results if result.rows == rows]
    first = results[0]
    reference = [
        "fp32",
        "PyTorch reference",
        _percent(first.reference_accuracy),
        "",
        "",
        "",
        f"{report.latency['torch-fp32'].p50_ms / report.batch:.2f}",
        "",
        "",
    ]
    return [reference, *(_parity_row(report, result) for result in results)]


def _parity_row(report: ParityReport, result: EngineParity) -> list[str]:
    return [
        result.precision,
        result.engine.removesuffix(f"-{result.precision}"),
        _percent(result.accuracy),
        _percent(result.agreement),
        f"{result.max_difference:.1e}",
        f"{result.mean_difference:.1e}",
        f"{report.latency[result.engine].p50_ms / report.batch:.2f}",
        f"{report.size_bytes[result.precision] / 1e6:.1f}",
        "passed" if result.passed else "FAILED",
    ]


def _speed_rows(report: SpeedReport) -> list[list[str]]:
    return [
        [
            "PyTorch reference" if result.engine == "torch-fp32" else result.engine,
            str(result.batch),
            f"{result.latency_ms.p50_ms:.1f}",
            f"{result.latency_ms.p95_ms:.1f}",
            f"{result.latency_ms.spread_pct:.1f}",
            f"{result.ms_a_face:.2f}",
            f"{result.faces_a_second:.1f}",
            f"{result.passes_a_second:,.0f}",
            f"{result.times_reference.value:.2f} [{result.times_reference.low:.2f}, {result.times_reference.high:.2f}]",
        ]
        for result in report.results
    ]


def _percent(share: Share) -> str:
    return f"{100 * share.value:.2f} % [{100 * share.low:.2f}, {100 * share.high:.2f}]"


def _machine(machine: dict[str, str]) -> str:
    return "Machine: " + ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in machine.items()) + "."


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table()
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < 2 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
