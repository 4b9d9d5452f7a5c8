"""A plan as tables, as Markdown and as a picture."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from emoexport.plan import Plan, Timing
from emoexport.plots import plain_axes, png
from emoexport.table_format import Row, markdown_table, terminal_table, with_interval

__all__ = ["plan_markdown", "plan_plot", "plan_sentences", "plan_tables"]


def plan_tables(plan: Plan) -> list[tuple[str, Table]]:
    """The candidates, and what was timed, each with its title."""
    candidates, timings = _candidate_rows(plan), _timing_rows(plan)
    return [
        (f"chosen on {plan.selected_on}", terminal_table(list(candidates[0]), candidates, texts=("",))),
        (f"calls of {plan.batch} faces", terminal_table(list(timings[0]), timings, texts=("engine",))),
    ]


def plan_sentences(plan: Plan) -> list[str]:
    """What was found, for people."""
    if plan.chosen is None or plan.confirmation is None:
        return [f"verdict: {plan.verdict}: {'; '.join(plan.reasons)}."]
    chosen, found = plan.candidates[plan.chosen], plan.confirmation
    fast = next(
        one for one in plan.timings if one.engine == f"{plan.engine}-{plan.precision}" and one.passes == chosen.passes
    )
    return [
        f"{chosen.passes} passes by {fast.engine}: {fast.ms_a_face:.3g} ms a face, {with_interval(fast.times_full, 1)} "
        "times as fast as the full vote by the same engine.",
        f"Confirmed on {plan.confirmed_on}: accuracy {with_interval(found.gain_points, 2, sign=True)} points, no worse "
        f"than {found.bound_points:+.2f}; {found.disagreement_pct.value:.2f} % of the labels differ, at most "
        f"{found.disagreement_bound_pct:.2f} %.",
        f"The gain is {plan.shrinkage_points:+.2f} points smaller there than where it was chosen "
        f"({chosen.selection.gain_points.value:+.2f}).",
        f"verdict: {plan.verdict}" + (f": {'; '.join(plan.reasons)}." if plan.reasons else ""),
    ]


def plan_markdown(plan: Plan) -> str:
    """`plan.md`."""
    goals = ", ".join(f"{name} {value:g}" for name, value in plan.goals.model_dump().items() if value is not None)
    parts = [
        "# The cheapest passes that decide as well as all",
        f"Goals: {goals}. Bundle {plan.bundle_digest[:16]}…. {plan.created}.",
        "\n".join(plan_sentences(plan)),
        "![Accuracy against milliseconds a face](plan.png)",
        f"Candidates, on {plan.selected_on}:",
        markdown_table(_candidate_rows(plan)),
        f"Calls of {plan.batch} faces, all in turn:",
        markdown_table(_timing_rows(plan)),
        "Each pass of the choice, and its share of the vote:",
        markdown_table(_pass_rows(plan)) if plan.choice else "None was chosen.",
    ]
    return "\n\n".join(parts) + "\n"


def plan_plot(plan: Plan) -> bytes:
    """Accuracy against milliseconds a face, as PNG."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    _draw_front(axes, plan)
    return png(figure)


def _draw_front(axes: Axes, plan: Plan) -> None:
    name = (
        f"{plan.engine}-{plan.precision}" if plan.engine else min(plan.timings, key=lambda one: one.latency_ms).engine
    )
    known = {one.passes: one.ms_a_face for one in plan.timings if one.engine == name}
    few, most = min(known), max(known)
    slope = (known[most] - known[few]) / (most - few)
    for index, one in enumerate(plan.candidates):
        gain = one.selection.gain_points
        at = known.get(one.passes, known[few] + slope * (one.passes - few))
        chosen = index == plan.chosen
        axes.errorbar(
            at,
            gain.value,
            [[gain.value - gain.low], [gain.high - gain.value]],
            fmt="o" if one.passes in known else ".",
            color="#c44e52" if chosen else "#4c72b0",
            alpha=1 if chosen else 0.6,
            label="chosen, where it was chosen" if chosen else None,
        )
        axes.annotate(str(one.passes), (at, gain.high), ha="center", va="bottom", fontsize=8)
        if chosen and plan.confirmation:
            gain = plan.confirmation.gain_points
            axes.errorbar(
                at * 1.06, gain.value, [[gain.value - gain.low], [gain.high - gain.value]], fmt="D", color="#c44e52",
                mfc="white", label="chosen, confirmed on other faces",
            )  # fmt: skip
    axes.plot(known[most], 0, "s", color="black", label=f"the full vote, {most} passes")
    axes.axhline(-plan.goals.max_drop_points, color="#c44e52", linestyle="--", linewidth=1, label="the limit")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel(f"milliseconds a face, {name}, calls of {plan.batch}; small dots lie on the line of costs")
    axes.set_ylabel("accuracy less that of the full vote, points")
    axes.legend(fontsize=8, loc="lower right")
    plain_axes(axes)


def _candidate_rows(plan: Plan) -> list[Row]:
    return [
        {
            "": "chosen" if index == plan.chosen else "",
            "passes": str(one.passes),
            "accuracy, points": with_interval(one.selection.gain_points, 2, sign=True),
            "no worse than": f"{one.selection.bound_points:+.2f}",
            "other labels %": with_interval(one.selection.disagreement_pct, 2),
        }
        for index, one in enumerate(plan.candidates)
    ]


def _timing_rows(plan: Plan) -> list[Row]:
    def row(one: Timing) -> Row:
        return {
            "engine": one.engine,
            "passes": str(one.passes),
            "call ms": f"{one.latency_ms:.4g}",
            "ms a face": f"{one.ms_a_face:.3g}",
            "times the full vote": with_interval(one.times_full, 1),
        }

    return [row(one) for one in sorted(plan.timings, key=lambda one: (one.engine, one.passes))]


def _pass_rows(plan: Plan) -> list[Row]:
    assert plan.choice is not None
    total = sum(plan.choice.passes.values())
    return [
        {"member": name.partition(":")[0], "view": name.partition(":")[2], "share %": f"{100 * weight / total:.1f}"}
        for name, weight in plan.choice.passes.items()
    ]
