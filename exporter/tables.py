"""Reports as tables: whole as Markdown, in 80 columns for the terminal."""

from collections.abc import Sequence

from rich.table import Table

from emoexport.cube import CubeAccuracy
from emoexport.decision import Gain, TemperatureReport
from emoexport.table_format import Row, markdown_table, percent, terminal_table
from emoexport.train.checkpoint import FittedDecision

__all__ = [
    "cube_table",
    "machine_line",
    "rules_markdown",
    "rules_table",
    "temperature_sentence",
]

_RULE_COLUMNS = ("rule", "value", "mended", "broken", "points [95 %]", "at least", "kept")


def cube_table(accuracies: Sequence[CubeAccuracy]) -> Table:
    """How often the vote of a cube and its best pass are right, for the terminal."""
    rows = [
        {
            "rows": found.rows,
            "n": f"{found.vote.n:,}",
            "full vote % [95 %]": percent(found.vote, 1),
            "best pass % [95 %]": percent(found.best_pass, 1),
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


def machine_line(machine: dict[str, str]) -> str:
    """What `describe_machine` found, as a sentence."""
    return "Machine: " + ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in machine.items()) + "."
