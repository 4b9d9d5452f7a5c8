"""What `bench` found as tables: whole as Markdown or CSV, in 80 columns for the terminal."""

import csv
import io
from collections.abc import Sequence

from rich.table import Table

from emoexport.engines.memory_probe import Memory
from emoexport.precision import precision_of, size_of
from emoexport.table_format import Row, markdown_table, terminal_table, with_interval
from emoexport.tables import machine_line
from emoexport.throughput import Change, EngineSpeed, Planned, SpeedReport, best_of

__all__ = ["changes_table", "engines_table", "planned_table", "speed_csv", "speed_markdown", "speed_table"]

_SPEED_IN_TERMINAL = ("engine", "batch", "p50 ms", "p95 ms", "compute", "faces/s", "times reference")


def speed_table(report: SpeedReport) -> Table:
    """The speed of every engine, for the terminal: `~` marks what is unstable."""
    rows = [
        _speed_row(result)
        | {
            "engine": result.engine,
            "p50 ms": f"{result.latency_ms.p50_ms:.1f}" + "~" * result.unstable,
            "compute": _number(result.compute_ms, 1),
        }
        for result in report.results
    ]
    return terminal_table(_SPEED_IN_TERMINAL, rows, texts=("engine",))


def engines_table(report: SpeedReport) -> Table:
    """What every engine is at its best, and what it takes, for the terminal."""
    rows = _engine_rows(report)
    return terminal_table(list(rows[0]), rows, texts=("engine",))


def planned_table(planned: Sequence[Planned]) -> Table:
    """What a bench would time, for the terminal."""
    rows = [
        {"engine": one.name, "what it is": one.title, "": f"skipped: {one.problem}" if one.problem else "timed"}
        for one in planned
    ]
    return terminal_table(list(rows[0]), rows, texts=list(rows[0]))


def speed_csv(report: SpeedReport) -> str:
    """Every engine at every batch size as a line of comma-separated values, numbers as they were measured."""
    rows = [_values(result, report) for result in report.results]
    text = io.StringIO()
    lines = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    lines.writeheader()
    lines.writerows(rows)
    return text.getvalue()


def _values(result: EngineSpeed, report: SpeedReport) -> dict[str, object]:
    """A line of it; what is not known is empty."""
    ratio, memory = result.times_reference, report.memory.get(result.engine)
    before, compute, after = result.split_ms or (None, None, None)
    return {
        "engine": result.engine,
        "batch": result.batch,
        **result.latency_ms.model_dump(exclude={"calls", "min_ms", "max_ms"}),
        "faces_a_second": result.faces_a_second,
        "times_reference": ratio.value,
        "low": ratio.low,
        "high": ratio.high,
        "calls": result.latency_ms.calls,
        "passes_a_second": result.passes_a_second,
        "before_ms": before,
        "compute_ms": compute,
        "after_ms": after,
        "share_of_peak": result.share_of_peak,
        "cores": result.cores,
        "others_cores": result.others_cores,
        "unstable": int(result.unstable),
        "load_s": report.load_s.get(result.engine),
        "size_bytes": _size(report, result.engine),
        "baseline_bytes": memory and memory.baseline_bytes,
        "peak_bytes": memory and memory.peak_bytes,
        "device_bytes": memory and memory.device_bytes,
    }


def changes_table(found: Sequence[Change]) -> Table:
    """What became slower or faster since an earlier report, for the terminal."""
    rows = [
        {
            "engine": one.engine,
            "batch": str(one.batch),
            "times reference before": with_interval(one.before, 2),
            "now": with_interval(one.now, 2),
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
        "End to end from uint8 faces in memory to labels, and of that what the runtime computes alone (before, "
        "compute, after). Cores: kept busy during the call. All engines in turn in one run; times reference: median of "
        "the ratios round by round, 95 % bootstrap interval; of five rounds, the least, it covers 92 % by simulation.",
        *_peak_lines(report),
        markdown_table(_engine_rows(report)),
        "Each engine at the batch size at which it decides about most faces a second. Peak: the most that a process of "
        "its own has in memory up to the end of a call of the largest batch; its own: what of that came after imports, "
        "which for the reference are PyTorch and all that rebuilds members.",
        *_uncaptured_lines(report),
        *report.notes,
        machine_line(report.machine),
        *_state_lines(report),
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


def _state_lines(report: SpeedReport) -> list[str]:
    lines = [f"Threads of each runtime: {report.threads or 'as it chose'}."] if report.states else []
    for when, state in report.states.items():
        told = ", ".join(f"{name.replace('_', ' ')} {text}" for name, text in state.items())
        lines.append(f"{when.capitalize()} it: {told}.")
    return [" ".join(lines)] if lines else []


def _size(report: SpeedReport, engine: str) -> int | None:
    """Bytes of what it was opened from, an engine of its own or else the graph of its precision; None of members."""
    if engine not in report.load_s:
        return None
    return size_of(report.size_bytes, engine)


def _engine_rows(report: SpeedReport) -> list[Row]:
    return [
        {
            "engine": best.engine,
            "best batch": str(best.batch),
            "faces/s": f"{best.faces_a_second:.1f}",
            "load s": _number(report.load_s.get(best.engine), 1),
            "file MB": _number(_size(report, best.engine), 1, unit=1e6),
            **_memory_row(report.memory.get(best.engine)),
        }
        for best in best_of(report.results)
    ]


def _memory_row(memory: Memory | None) -> Row:
    peak, baseline = (memory.peak_bytes, memory.baseline_bytes) if memory else (None, 0)
    return {
        "peak MB": _number(peak, 0, unit=1e6),
        "its own MB": _number(None if peak is None else peak - baseline, 0, unit=1e6),
        "on GPU MB": _number(memory.device_bytes if memory else None, 0, unit=1e6),
    }


def _number(value: float | None, digits: int, *, unit: float = 1) -> str:
    """A number in a unit; nothing where it is not known."""
    return "" if value is None else f"{value / unit:.{digits}f}"


def _speed_row(result: EngineSpeed) -> Row:
    precision = precision_of(result.engine)
    engine = result.engine.removesuffix(f"-{precision}")
    return {
        "engine": "PyTorch" if engine == "torch" else engine,
        "precision": precision,
        "batch": str(result.batch),
        "p50 ms": f"{result.latency_ms.p50_ms:.1f}",
        "p90 ms": f"{result.latency_ms.p90_ms:.1f}",
        "p95 ms": f"{result.latency_ms.p95_ms:.1f}",
        "p99 ms": f"{result.latency_ms.p99_ms:.1f}",
        "mean ms": f"{result.latency_ms.mean_ms:.1f}",
        "spread %": f"{result.latency_ms.spread_pct:.1f}" + " unstable" * result.unstable,
        "ms a face": f"{result.ms_a_face:.2f}",
        "faces/s": f"{result.faces_a_second:.1f}",
        "passes/s": f"{result.passes_a_second:,.0f}",
        "times reference": with_interval(result.times_reference, 2),
        "of peak %": _number(result.share_of_peak, 0, unit=0.01),
        "before, compute, after ms": "" if result.split_ms is None else " ".join(f"{ms:.2f}" for ms in result.split_ms),
        "cores": _number(result.cores, 1),
    }
