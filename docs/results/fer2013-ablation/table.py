"""Writes table.md from the comparisons with the plain network that stand beside this file."""

from pathlib import Path

from emoexport.errors import BadData
from emoexport.evaluation import EvaluationReport
from emoexport.statistics import Estimate
from emoexport.tables import markdown_table

ROWS = {
    "seed": "nothing: another seed",
    "small-backbone": "backbone: a smaller one, widths 16 to 128 in place of 48 to 256",
    "balance": "balanced to 3,500 faces of each emotion",
    "architecture": "pyramid, attention, learnable pooling, calibration, deeper classifier",
    "averages": "EMA, and SWA from epoch 5",
    "distillation": "EMA, SWA, and self-distillation from epoch 3",
    "augmentation": "augmentation by emotion, in five phases",
    "votes": "FER+ votes as half of the target",
    "everything": "everything but the votes and the smaller backbone",
}


def percent(estimate: Estimate) -> str:
    """A share as `60.8 [57.6, 63.9]`."""
    return f"{100 * estimate.value:.1f} [{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]"


def main() -> None:
    """Read, write."""
    here = Path(__file__).parent
    rows = []
    for name, what in ROWS.items():
        report = EvaluationReport.parse_json(here / f"{name}.json", error=BadData)
        (result,) = (found for found in report.results if found.rows == "clean")
        (compared,) = (found for found in report.against.results if found.rows == "clean")
        step = compared.steps[0]
        points = step.gain.points
        rows.append(
            {
                "switched on": what,
                "accuracy % [95 %]": percent(step.accuracy),
                "points [95 %]": f"{points.value:+.1f} [{points.low:+.1f}, {points.high:+.1f}]",
                "verdict": step.gain.verdict,
                "macro-F1 % [95 %]": percent(result.figures.macro_f1),
                "validation accuracy %": f"{100 * report.members[0].validation_accuracy:.1f}",
            }
        )
    plain = {
        "switched on": "nothing",
        "accuracy % [95 %]": percent(step.other),
        "validation accuracy %": f"{100 * report.against.members[0].validation_accuracy:.1f}",
    }
    columns = list(rows[0])
    table = markdown_table([{column: row.get(column, "") for column in columns} for row in (plain, *rows)])
    (here / "table.md").write_text(f"{compared.faces:,} clean rows of the public test, one pass a face.\n\n{table}\n")


if __name__ == "__main__":
    main()
