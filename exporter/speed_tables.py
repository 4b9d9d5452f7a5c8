"""What `bench` found as tables: whole as Markdown or CSV, in 80 columns for the terminal."""

import csv
import io
from collections.abc import Sequence

from rich.table import Table

from emoexport.precision import PRECISIONS
from emoexport.table_format import Row, markdown_table, terminal_table
from emoexport.tables import machine_line
from emoexport.throughput import Change, EngineSpeed, Planned, SpeedReport

__all__ = ["changes_table", "planned_table", "speed_csv", "speed_markdown", "speed_table"]

_SPEED_IN_TERMINAL = ("engine", "precision", "batch", "p50 ms", "p95 ms", "ms a face", "faces/s", "times reference")


def speed_table(report: SpeedReport) -> Table:
    """The speed of every engine, for the terminal."""
    return terminal_table(
        _SPEED_IN_TERMINAL, [_speed_row(result) for result in report.results], texts=("engine", "precision")
    )


def planned_table(planned: Sequence[Planned]) -> Table:
    """What a bench would time, for the terminal."""
    rows = [
        {"engine": one.name, "what it is": one.title, "": f"skipped: {one.problem}" if one.problem else "timed"}
        for one in planned
    ]
    return terminal_table(list(rows[0]), rows, texts=list(rows[0]))


def speed_csv(report: SpeedReport) -> str:
    """Every engine at every batch size as a line of comma-separated values, numbers as they were measured."""
    columns = ("engine", "batch", "p50_ms", "p90_ms", "p95_ms", "p99_ms", "mean_ms", "spread_pct", "faces_a_second")
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow([*columns, "times_reference", "low", "high"])
    for result in report.results:
        values = result.latency_ms.model_dump() | result.model_dump(include={"engine", "batch", "faces_a_second"})
        ratio = result.times_reference
        lines.writerow([*(values[column] for column in columns), ratio.value, ratio.low, ratio.high])
    return text.getvalue()


def changes_table(found: Sequence[Change]) -> Table:
    """What became slower or faster since an earlier report, for the terminal."""
    rows = [
        {
            "engine": one.engine,
            "batch": str(one.batch),
            "times reference before": f"{one.before.value:.2f} [{one.before.low:.2f}, {one.before.high:.2f}]",
            "now": f"{one.now.value:.2f} [{one.now.low:.2f}, {one.now.high:.2f}]",
            "": "slower" if one.is_slower else "faster" if one.is_faster else "",
        }
        for one in found
    ]
    return terminal_table(list(rows[0]), rows, texts=("engine", ""))


def speed_markdown(report: SpeedReport) -> str:
    """The whole report as Markdown."""
    parts = [
        "# Throughput",
        f"{report.passes_a_face} passes a face. Bundle {report.bundle_digest[:16]}…. {report.created}.",
        markdown_table([_speed_row(result) for result in report.results]),
        "End to end from uint8 faces in memory to labels. All engines in turn in one run; times reference: "
        "median of the ratios round by round, 95 % bootstrap interval.",
        *_peak_lines(report),
        *_uncaptured_lines(report),
        *report.notes,
        machine_line(report.machine),
    ]
    return "\n\n".join(parts) + "\n"


def _peak_lines(report: SpeedReport) -> list[str]:
    if not report.gemm_peak_tops:
        return []
    peaks = ", ".join(f"{number} {tops:,.3g}" for number, tops in report.gemm_peak_tops.items())
    return [
        f"A large matrix product by PyTorch reaches here, in 10^12 operations a second: {peaks}. Of peak: the share of "
        "it that all operations of the passes come to in the median time of a call."
    ]


def _uncaptured_lines(report: SpeedReport) -> list[str]:
    # As of the last batch size: an engine that cannot capture at one does not try at the next.
    reasons = {result.engine: result.uncaptured for result in report.results if result.uncaptured}
    return [f"{engine} replays no CUDA graphs of ours: {reason.rstrip('.')}." for engine, reason in reasons.items()]


def _speed_row(result: EngineSpeed) -> Row:
    precision = max((name for name in PRECISIONS if result.engine.endswith(f"-{name}")), key=len)
    engine = result.engine.removesuffix(f"-{precision}")
    ratio = result.times_reference
    return {
        "engine": "PyTorch" if engine == "torch" else engine,
        "precision": precision,
        "batch": str(result.batch),
        "p50 ms": f"{result.latency_ms.p50_ms:.1f}",
        "p95 ms": f"{result.latency_ms.p95_ms:.1f}",
        "spread %": f"{result.latency_ms.spread_pct:.1f}" + " unstable" * result.unstable,
        "ms a face": f"{result.ms_a_face:.2f}",
        "faces/s": f"{result.faces_a_second:.1f}",
        "passes/s": f"{result.passes_a_second:,.0f}",
        "times reference": f"{ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]",
        "of peak %": "" if result.share_of_peak is None else f"{100 * result.share_of_peak:.0f}",
        "there, on it, back ms": "" if result.split_ms is None else " ".join(f"{ms:.2f}" for ms in result.split_ms),
    }
