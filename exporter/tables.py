"""Reports as tables: whole as Markdown, in 80 columns for the terminal."""

import csv
import io
from collections.abc import Sequence

from rich.table import Table

from emoexport.cube import CubeAccuracy
from emoexport.decision import Gain, TemperatureReport
from emoexport.evidence import Evidence
from emoexport.parity import EngineParity, ParityReport
from emoexport.precision import PRECISIONS
from emoexport.statistics import Share
from emoexport.table_format import Row, markdown_table, terminal_table
from emoexport.throughput import Change, EngineSpeed, Planned, SpeedReport
from emoexport.train.checkpoint import FittedDecision

__all__ = [
    "changes_table",
    "cube_table",
    "machine_line",
    "parity_markdown",
    "parity_table",
    "planned_table",
    "rules_markdown",
    "rules_table",
    "speed_csv",
    "speed_markdown",
    "speed_table",
    "temperature_sentence",
]

_PARITY_IN_TERMINAL = ("precision", "engine", "accuracy % [95 %]", "agreement % [95 %]", "ms a face", "MB")
_RULE_COLUMNS = ("rule", "value", "mended", "broken", "points [95 %]", "at least", "kept")
_SPEED_IN_TERMINAL = ("engine", "precision", "batch", "p50 ms", "p95 ms", "ms a face", "faces/s", "times reference")


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


def cube_table(accuracies: Sequence[CubeAccuracy]) -> Table:
    """How often the vote of a cube and its best pass are right, for the terminal."""
    rows = [
        {
            "rows": found.rows,
            "n": f"{found.vote.n:,}",
            "full vote % [95 %]": _percent(found.vote, 1),
            "best pass % [95 %]": _percent(found.best_pass, 1),
            "which": f"member {found.member + 1}, {found.view}",
        }
        for found in accuracies
    ]
    return terminal_table(list(rows[0]), rows, texts=("rows", "which"))


def rules_table(fitted: FittedDecision) -> Table:
    """What each candidate rule gains on held-out validation faces, for the terminal."""
    return terminal_table(_RULE_COLUMNS, _rule_rows(fitted, digits=1), texts=("rule",))


def rules_markdown(fitted: FittedDecision) -> str:
    """What temperature and rules gain, as Markdown."""
    parts = [
        "# The decision",
        temperature_sentence(fitted.temperature) if fitted.temperature else "No temperature was fitted.",
    ]
    if fitted.candidates:
        parts += [
            markdown_table(_rule_rows(fitted, digits=2)),
            f"Gains are points of accuracy on {fitted.candidates[0].gain.faces:,} validation faces on which the rules "
            "were not fitted, with Clopper-Pearson intervals; 'at least' is the one-sided bound adjusted for the "
            "number of candidates, and a rule is kept where it is above 0.",
        ]
    return "\n\n".join(parts) + "\n"


def temperature_sentence(report: TemperatureReport) -> str:
    """What the temperature does on held-out validation faces, and whether it is kept."""
    verdict = "kept" if report.kept else "not kept, 1 is used"
    return (
        f"temperature {report.temperature:.3f}, {verdict}: NLL {report.nll_before:.4f} -> {report.nll_after:.4f} "
        f"(gain at least {report.nll_gain_bound:+.4f}), ECE {100 * report.ece_before:.1f} % -> "
        f"{100 * report.ece_after:.1f} % on {report.faces:,} held-out faces"
    )


def _rule_rows(fitted: FittedDecision, *, digits: int) -> list[Row]:
    rows = [
        {"rule": report.rule, "value": f"{report.value:.2f}", **_gain_row(report.gain, digits, kept=report.kept)}
        for report in fitted.candidates
    ]
    if fitted.together and fitted.together.mended + fitted.together.broken:
        kept = any(report.kept for report in fitted.candidates)
        rows.append({"rule": "all that pass", "value": "", **_gain_row(fitted.together, digits, kept=kept)})
    return rows


def _gain_row(gain: Gain, digits: int, *, kept: bool) -> Row:
    return {
        "mended": str(gain.mended),
        "broken": str(gain.broken),
        "points [95 %]": f"{gain.points:+.{digits}f} [{gain.low_points:+.{digits}f}, {gain.high_points:+.{digits}f}]",
        "at least": f"{gain.bound_points:+.{digits}f}",
        "kept": "yes" if kept else "no",
    }


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


def _percent(share: Share, digits: int) -> str:
    return f"{100 * share.value:.{digits}f} [{100 * share.low:.{digits}f}, {100 * share.high:.{digits}f}]"


def machine_line(machine: dict[str, str]) -> str:
    """What `describe_machine` found, as a sentence."""
    return "Machine: " + ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in machine.items()) + "."
