"""A plan as tables, as Markdown and as a picture."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from emoexport.cascade_record import is_cascade
from emoexport.cascade_tables import stage_rows
from emoexport.comparison import Comparison
from emoexport.plan import Plan, Timing
from emoexport.plots import plain_axes, png
from emoexport.table_format import Row, markdown_table, terminal_table, with_interval

__all__ = ["plan_markdown", "plan_plot", "plan_sentences", "plan_tables"]


def plan_tables(plan: Plan) -> list[tuple[str, Table]]:
    """The candidates, and what was timed, each with its title."""
    candidates, timings = _candidate_rows(plan), _timing_rows(plan)
    return [
        (f"chosen on {plan.selected_on}", terminal_table(list(candidates[0]), candidates, texts=("", "of"))),
        ("calls, all in turn", terminal_table(list(timings[0]), timings, texts=("engine",))),
    ]


def plan_sentences(plan: Plan) -> list[str]:
    """What was found, for people."""
    verdict = f"verdict: {plan.verdict}" + (f": {'; '.join(plan.reasons)}." if plan.reasons else "")
    found = plan.confirmation
    if found is None or plan.selection is None:
        return [*plan.notes, verdict]
    return [
        *plan.notes,
        _sentence_on_speed(plan),
        *([plan.cascade.sentences[0]] if plan.cascade else []),
        f"Confirmed on {plan.confirmed_on}: accuracy {with_interval(found.gain_points, 2, sign=True)} points, no worse "
        f"than {found.bound_points:+.2f}; {found.disagreement_pct.value:.2f} % of the labels differ, at most "
        f"{found.disagreement_bound_pct:.2f} %.",
        f"The gain is {_shrinkage(plan)} there than where it was chosen ({plan.selection.gain_points.value:+.2f}).",
        verdict,
    ]


def _shrinkage(plan: Plan) -> str:
    lost = plan.shrinkage_points or 0.0
    return f"{lost:+.2f} points smaller" if lost >= 0 else f"{-lost:.2f} points larger"


def _sentence_on_speed(plan: Plan) -> str:
    if plan.cascade is not None:
        return plan.cascade.sentences[-1]
    assert plan.chosen is not None
    chosen, fast = plan.candidates[plan.chosen], _finalist(plan, "passes")
    assert fast is not None
    of = f" of the {chosen.soup} soup" if chosen.soup else ""
    return (
        f"{chosen.passes} pass{'es' * (chosen.passes != 1)}{of} by {fast.engine}: "
        f"{fast.ms_a_face:.3g} ms a face in calls of {fast.batch}, {with_interval(fast.times_full, 1)} times as fast "
        "as the full vote by the same engine."
    )


def _finalist(plan: Plan, which: str) -> Timing | None:
    """What was timed of a finalist, `passes` or `cascade`: the last of its kind."""
    kinds = [one for one in plan.timings if is_cascade(one.engine) == (which == "cascade")]
    if which == "passes" and plan.chosen is not None:
        kinds = [one for one in kinds if one.passes == plan.candidates[plan.chosen].passes and one.batch == plan.batch]
    return kinds[-1] if kinds else None


def plan_markdown(plan: Plan) -> str:
    """`plan.md`."""
    goals = ", ".join(f"{name} {value:g}" for name, value in plan.goals.model_dump().items() if value is not None)
    parts = [
        "# The cheapest deployment that decides as well as the full vote",
        f"Goals: {goals}. Bundle {plan.bundle_digest[:16]}…. {plan.created}.",
        "\n".join(plan_sentences(plan)),
        "![Accuracy against milliseconds a face](plan.png)",
        f"Candidates, on {plan.selected_on}:",
        markdown_table(_candidate_rows(plan)),
        "Calls, all in turn; a cascade is timed on the faces that choose:",
        markdown_table(_timing_rows(plan)),
        *_passes_markdown(plan),
    ]
    return "\n\n".join(parts) + "\n"


def _passes_markdown(plan: Plan) -> list[str]:
    if plan.choice is not None:
        return ["Each pass of the choice, and its share of the vote:", markdown_table(_pass_rows(plan))]
    if plan.cascade is not None:
        return [f"Where the faces leave, on {plan.confirmed_on}:", markdown_table(stage_rows(plan.cascade))]
    return ["Nothing was chosen."]


def plan_plot(plan: Plan) -> bytes:
    """Accuracy against milliseconds a face, as PNG."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    _draw_front(axes, plan)
    return png(figure)


def _draw_front(axes: Axes, plan: Plan) -> None:
    final = _finalist(plan, "passes")
    timed = [one for one in plan.timings if one.batch == plan.batch and not is_cascade(one.engine)]
    name = plan_engine(plan) or (final or min(timed, key=lambda one: one.ms_a_face)).engine
    known = {one.passes: one.ms_a_face for one in timed if one.engine == name}
    few, most = min(known), max(known)
    slope = (known[most] - known[few]) / (most - few)

    def at(passes: float) -> float:
        return known.get(passes, known[few] + slope * (passes - few))

    kinds = {
        "": "passes of the members",
        **{one.soup: f"of the {one.soup} soup" for one in plan.candidates if one.soup},
    }
    for index, one in enumerate(plan.candidates):
        wins = index == plan.chosen and plan.winner == "passes"
        colour = _WINNER if wins else "#55a868" if one.soup else "#4c72b0"
        marker = "o" if one.passes in known and not one.soup else "."
        kind = None if wins else kinds.pop(one.soup, None)
        _point(axes, at(one.passes), one.selection, marker, colour, str(one.passes), label=kind, faint=not wins)
        if wins and plan.confirmation:
            _point(axes, at(one.passes) * 1.06, plan.confirmation, "D", _WINNER, label="the winner, on other faces")
    exits = _finalist(plan, "cascade")
    if exits is not None and plan.exits is not None:
        colour = _WINNER if plan.winner == "cascade" else "#8172b3"
        _point(axes, exits.ms_a_face, plan.exits, "s", colour, f"{exits.passes:.1f}", label="cascade, mean passes")
    if plan.cascade is not None:
        cost = plan.cascade.timing.ms_a_face
        _point(axes, cost * 1.06, plan.cascade.shown, "D", _WINNER, label="the winner, on other faces")
    _point(axes, at(1), plan.best_member, "^", "#937860", label="the best member, one pass")
    axes.plot(at(most), 0, "s", color="black", label=f"the full vote, {most:g} passes")
    axes.axhline(-plan.goals.max_drop_points, color=_WINNER, linestyle="--", linewidth=1, label="the limit")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel(f"milliseconds a face, {name}, calls of {plan.batch}; small dots lie on the line of costs")
    axes.set_ylabel("accuracy less that of the full vote, points")
    axes.legend(fontsize=8, loc="lower right")
    plain_axes(axes)


_WINNER = "#c44e52"


def plan_engine(plan: Plan) -> str:
    """The name of the winner's engine, of a cascade the one whose passes it takes; empty if nothing won."""
    return f"{plan.engine}-{plan.precision}" if plan.engine else ""


def _point(
    axes: Axes,
    at: float,
    found: Comparison,
    marker: str,
    colour: str,
    text: str = "",
    *,
    label: str | None = None,
    faint: bool = False,
) -> None:
    """A gain of accuracy with its interval."""
    gain = found.gain_points
    axes.errorbar(
        at,
        gain.value,
        [[gain.value - gain.low], [gain.high - gain.value]],
        fmt=marker,
        color=colour,
        mfc="white" if marker == "D" else colour,
        alpha=0.6 if faint else 1,
        label=label,
    )
    if text:
        axes.annotate(text, (at, gain.high), ha="center", va="bottom", fontsize=8)


def _candidate_rows(plan: Plan) -> list[Row]:
    rows = [
        ("final" if index == plan.chosen else "", one.soup and f"{one.soup} soup", str(one.passes), one.selection)
        for index, one in enumerate(plan.candidates)
    ]
    exits = _finalist(plan, "cascade")
    if plan.exits is not None and exits is not None:
        rows.append(("final", "cascade", f"{exits.passes:.2f}", plan.exits))
    rows.append(("", "best member", "1", plan.best_member))
    return [
        {
            "": mark,
            "of": of or "members",
            "passes": passes,
            "accuracy, points": with_interval(found.gain_points, 2, sign=True),
            "no worse than": f"{found.bound_points:+.2f}",
            "other labels %": with_interval(found.disagreement_pct, 2),
        }
        for mark, of, passes, found in rows
    ]


def _timing_rows(plan: Plan) -> list[Row]:
    def row(one: Timing) -> Row:
        return {
            "engine": one.engine,
            "faces": str(one.batch),
            "passes": f"{one.passes:g}",
            "call ms": f"{one.latency_ms:.4g}",
            "99th %": f"{one.slow_ms:.4g}",
            "ms a face": f"{one.ms_a_face:.3g}",
            "times the full vote": with_interval(one.times_full, 1),
        }

    return [row(one) for one in sorted(plan.timings, key=lambda one: (one.engine, one.batch, one.passes))]


def _pass_rows(plan: Plan) -> list[Row]:
    assert plan.choice is not None
    total = sum(plan.choice.passes.values())
    return [
        {"member": name.partition(":")[0], "view": name.partition(":")[2], "share %": f"{100 * weight / total:.1f}"}
        for name, weight in plan.choice.passes.items()
    ]
