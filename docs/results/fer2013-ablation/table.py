"""Writes table.md from the evaluations that stand beside this file."""

from pathlib import Path

from emoexport.errors import BadData
from emoexport.evaluation import EvaluationReport
from emoexport.statistics import Estimate
from emoexport.table_format import markdown_table

ROWS = {
    "plain": "nothing",
    "seed": "nothing, another seed",
    "small-backbone": "backbone: a smaller one, widths 16 to 128 in place of 48 to 256",
    "balance": "balancing: 3,500 faces of each emotion",
    "architecture": "architecture: pyramid, attention, learnable pooling, calibration, deeper classifier",
    "averages": "EMA, and SWA from epoch 5",
    "distillation": "EMA, SWA, and self-distillation from epoch 3",
    "augmentation": "augmentation by emotion, in five phases",
    "votes": "FER+ votes as half of the target",
    "everything": "all of it but the votes and the smaller backbone",
}


def main() -> None:
    """Read, write."""
    here = Path(__file__).parent
    rows = []
    for name, what in ROWS.items():
        report = EvaluationReport.parse_json(here / f"{name}.json", error=BadData)
        (result,) = (found for found in report.results if found.rows == "clean")
        points, verdict = "", ""
        if report.against:
            (compared,) = (found for found in report.against.results if found.rows == "clean")
            gain = compared.steps[0].gain
            points, verdict = _signed(gain.points), gain.verdict
        rows.append(
            {
                "switched on": what,
                "accuracy % [95 %]": _percent(result.figures.accuracy),
                "points [95 %]": points,
                "verdict": verdict,
                "macro-F1 % [95 %]": _percent(result.figures.macro_f1),
                "validation accuracy %": f"{100 * report.members[0].validation_accuracy:.1f}",
            }
        )
    title = f"{result.figures.faces:,} clean rows of the public test, one pass a face."
    (here / "table.md").write_text(f"{title}\n\n{markdown_table(rows)}\n")


def _percent(estimate: Estimate) -> str:
    return f"{100 * estimate.value:.1f} [{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]"


def _signed(estimate: Estimate) -> str:
    return f"{estimate.value:+.1f} [{estimate.low:+.1f}, {estimate.high:+.1f}]"


if __name__ == "__main__":
    main()
