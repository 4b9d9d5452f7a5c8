"""What `verify` found as tables: whole as Markdown, in 80 columns for the terminal."""

from rich.table import Table

from emoexport.parity import EngineParity, EngineReport, ParityReport
from emoexport.precision import size_of
from emoexport.table_format import Row, markdown_table, percent, terminal_table, with_interval
from emoexport.tables import machine_line
from emoexport.verdict import Verdict

__all__ = ["certified_means", "engine_row", "evidence_row", "parity_markdown", "parity_table", "reasons_of"]

_IN_TERMINAL = ("engine", "precision", "accuracy % [95 %]", "no worse than", "other labels", "ms a face", "verdict")


def parity_table(report: ParityReport, rows: str) -> Table:
    """The parity of every engine on one set of rows, for the terminal."""
    return terminal_table(_IN_TERMINAL, _parity_rows(report, rows, digits=1), texts=("engine", "precision", "verdict"))


def parity_markdown(report: ParityReport) -> str:
    """The whole report as Markdown."""
    parts = [
        "# Parity with the PyTorch reference",
        f"Verdict: **{report.verdict}**. Data: {report.data}, split {report.split}, {report.faces:,} faces "
        f"(SHA-256 {report.data_sha256[:16]}…). Bundle {report.bundle_digest[:16]}…. {report.created}.",
        certified_means(report),
        markdown_table([engine_row(engine) for engine in report.engines]),
        *_reasons(report),
    ]
    for rows in dict.fromkeys(result.rows for result in report.results):
        found = [result for result in report.results if result.rows == rows]
        parts += [
            f"## {rows} rows (n = {found[0].accuracy.n:,})",
            markdown_table(_parity_rows(report, rows, digits=2)),
            "Face by face against the reference:",
            markdown_table([evidence_row(result) for result in found]),
            "Recall of each emotion, points of difference [95 %]:",
            markdown_table([_recall_row(result) for result in found]),
            "The ten faces whose probabilities differ most, by number among those that were read, and by how much:",
            markdown_table([_worst_row(result) for result in found]),
        ]
    parts += [
        "Points and recall: accuracy and recall of the engine less those of the reference on the same faces, "
        "with Tango's intervals; no worse than, and at most: one-sided bounds at 95 % (Tango; Clopper-Pearson). KL in "
        "nats, from the reference's probabilities.",
        f"Accuracy: Wilson interval; agreement: Clopper-Pearson. Times: median of a call with {report.batch} faces, "
        "end to end, all engines in turn in one run, while the runtimes tell what they execute.",
        *report.notes,
        machine_line(report.machine),
    ]
    return "\n\n".join(parts) + "\n"


def _recall_row(result: EngineParity) -> Row:
    row = {"engine": result.engine}
    for name, change in result.evidence.recall.items():
        row[f"{name} ({change.faces:,})"] = with_interval(change.points, 2, sign=True)
    return row


def _worst_row(result: EngineParity) -> Row:
    worst = ", ".join(f"{one.index} ({one.largest_difference:.1e})" for one in result.evidence.worst)
    return {"engine": result.engine, "faces": worst}


def certified_means(report: ParityReport) -> str:
    """What a certificate of this report says, as a sentence."""
    limits = report.limits
    return (
        f"Certified is an engine that, at 95 %, loses no more than {limits.max_drop_points:g} points of accuracy and "
        f"decides no more than {limits.max_disagreement_pct:g} % of the faces otherwise; whose probabilities differ by "
        "no more than rounding explains; whose rows are independent at the batches "
        f"{', '.join(map(str, report.batches))}; and which multiplies in the type that was asked for, as far as its "
        "runtime tells."
    )


def reasons_of(report: ParityReport) -> dict[tuple[Verdict, str], list[str]]:
    """What is said of engines beside their verdict: by verdict and sentence, the engines that it is said of."""
    found: dict[tuple[Verdict, str], list[str]] = {}
    for engine in report.engines:
        for reason in engine.reasons:
            found.setdefault((engine.verdict, reason), []).append(engine.engine)
    return found


def _reasons(report: ParityReport) -> list[str]:
    lines = [f"- {', '.join(names)}: {verdict}. {reason}." for (verdict, reason), names in reasons_of(report).items()]
    return ["## Reasons", "\n".join(lines)] if lines else []


def engine_row(engine: EngineReport) -> Row:
    """What was found of an engine beside its answers."""
    if engine.failure:
        told = dict.fromkeys(("multiplies in", "layers by type", "answers go together", "runtime"), "")
        file = f"{engine.file} ({engine.sha256[:12]}…)"
        return {"engine": engine.engine, "verdict": engine.verdict, **told, "file": file}
    worst = max(engine.relations, key=lambda check: (not check.holds, check.largest_difference))
    return {
        "engine": engine.engine,
        "verdict": engine.verdict,
        "multiplies in": _shares(engine),
        "layers by type": ", ".join(f"{number} {count:,}" for number, count in engine.layers.items()),
        "answers go together": f"{'yes' if worst.holds else 'no'}, within {worst.largest_difference:.1e}",
        "runtime": engine.machine["runtime"],
        "file": f"{engine.file} ({engine.sha256[:12]}…)",
    }


def _shares(engine: EngineReport) -> str:
    """By share of time, where that is known, or else by number."""
    if engine.time_share:
        return ", ".join(f"{number} {100 * part:.0f} %" for number, part in engine.time_share.items())
    if engine.multiplications:
        return ", ".join(f"{count:,} x {number}" for number, count in engine.multiplications.items())
    return "not told"


def _parity_rows(report: ParityReport, rows: str, *, digits: int) -> list[Row]:
    results = [result for result in report.results if result.rows == rows]
    reference = {
        "engine": "PyTorch",
        "precision": "fp32",
        "accuracy % [95 %]": percent(results[0].reference_accuracy, digits),
        "ms a face": f"{report.latency['torch-fp32'].p50_ms / report.batch:.2f}",
        "verdict": "reference",
    }
    return [reference, *(_parity_row(report, result, digits) for result in results)]


def _parity_row(report: ParityReport, result: EngineParity, digits: int) -> Row:
    evidence = result.evidence
    verdict = next(engine.verdict for engine in report.engines if engine.engine == result.engine)
    return {
        "engine": result.engine.removesuffix(f"-{result.precision}"),
        "precision": result.precision,
        "accuracy % [95 %]": percent(result.accuracy, digits),
        "no worse than": f"{evidence.bound_points:+.2f}",
        "other labels": f"at most {100 * evidence.disagreement_bound:.2f} %",
        "agreement % [95 %]": percent(result.agreement, digits),
        "max Δp": f"{result.max_difference:.1e}",
        "mean Δp": f"{result.mean_difference:.1e}",
        "ms a face": f"{report.latency[result.engine].p50_ms / report.batch:.2f}",
        "MB": f"{size_of(report.size_bytes, result.engine) / 1e6:.1f}",
        "verdict": verdict,
    }


def evidence_row(result: EngineParity) -> Row:
    """How an engine and the reference compare face by face."""
    found = result.evidence
    emotion, change = min(found.recall.items(), key=lambda item: item[1].points.value)
    return {
        "engine": result.engine,
        "only it right": str(found.engine_only_right),
        "only the reference": str(found.reference_only_right),
        "points [95 %]": with_interval(found.gain_points, 2, sign=True),
        "McNemar p": f"{found.mcnemar_p:.2g}",
        "other labels": str(found.disagreements),
        "KL": f"{found.divergence_nats:.1e}",
        "ECE % (reference)": f"{100 * found.calibration_error:.2f} ({100 * found.reference_calibration_error:.2f})",
        "recall, largest loss [95 %]": f"{emotion} {with_interval(change.points, 2, sign=True)}",
    }
