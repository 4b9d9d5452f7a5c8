"""What was found of each block: for the terminal, as Markdown, as a picture."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter
from rich.table import Table

from emoexport.calib.tuning import Trial, Tuning
from emoexport.engines import BACKENDS
from emoexport.plots import BLUE, GREY, VERMILION, plain_axes, png
from emoexport.precision import PRECISIONS
from emoexport.statistics import exact_interval
from emoexport.table_format import Row, markdown_table, terminal_table, with_interval

__all__ = ["draw_costs", "draw_gains", "tuning_markdown", "tuning_plot", "tuning_sentences", "tuning_table"]


def tuning_table(tuning: Tuning) -> Table:
    """The blocks, for the terminal."""
    return terminal_table(list(_block_rows(tuning)[0]), _block_rows(tuning), texts=("block", "chosen"))


def tuning_sentences(tuning: Tuning) -> list[str]:
    """What was chosen and what that costs and gains."""
    precision = PRECISIONS[tuning.setting.precision].title
    chosen = tuning.trials[-1]
    cost, speed = chosen.cost, chosen.times_as_fast
    assert cost is not None
    assert speed is not None
    faces = tuning.setting.faces
    low, high = (100 * bound for bound in exact_interval(cost.changed, faces))
    kept = len(tuning.blocks) - len(tuning.left)
    shared = tuning.shared_with_gate
    return [
        f"{kept} of {len(tuning.blocks)} blocks in {precision}; in FP32: {', '.join(tuning.left) or 'none'}.",
        f"{speed.value:.3f} times as fast as all blocks in {precision} [{speed.low:.3f}, {speed.high:.3f}], "
        f"{chosen.ms_a_face:.2f} ms a face: {BACKENDS[tuning.setting.engine].title}, {tuning.setting.batch} faces a "
        "call.",
        f"{cost.changed} of {faces:,} validation faces have another label than in FP32 "
        f"[{low:.2f} %, {high:.2f} %]; {cost.mended} are right only now, {cost.broken} were right only before; the "
        f"accuracy is no worse than {100 * tuning.bound:+.2f} points, {-100 * tuning.max_drop:+g} is allowed. "
        "The search was made with the same faces.",
        *(["Calibrated on random pictures: this tells nothing of real faces."] if tuning.calibrated_on_noise else []),
        *([f"{shared:,} of these faces judge the engines in `build` too: the run has few."] if shared else []),
    ]


def tuning_markdown(tuning: Tuning) -> str:
    """The whole report as Markdown."""
    setting = tuning.setting
    parts = [
        f"# {PRECISIONS[setting.precision].title} block by block",
        "\n".join(f"- {sentence}" for sentence in tuning_sentences(tuning)),
        "![Cost and gain of each block](tuning.png)",
        "## Blocks",
        markdown_table(_block_rows(tuning)),
        "Costs: the block alone in that precision, all else in FP32, against the FP32 graph. Time gained: by all "
        "blocks in few bits over all but this one, in percent of the latter, 95 % bootstrap interval. FP16 is computed "
        "by a runtime that rounds to it.",
        "## Steps of the search",
        markdown_table([_search_row(tuning, trial) for trial in tuning.trials if trial.kind == "search"]),
        f"Bundle {tuning.bundle_digest[:16]}…; {setting.faces:,} validation faces (SHA-256 "
        f"{setting.faces_sha256[:16]}…); {setting.rounds} rounds in turn of {setting.batch} faces a call. "
        f"{tuning.created}.",
        "Machine: " + ", ".join(f"{name} {value}" for name, value in setting.machine.items()) + ".",
    ]
    return "\n\n".join(parts) + "\n"


def tuning_plot(tuning: Tuning) -> bytes:
    """Cost and gain of each block: PNG."""
    figure = Figure(figsize=(11, 1.6 + 0.34 * len(tuning.blocks)), layout="constrained")
    costs, gains = figure.subplots(1, 2, sharey=True)
    draw_costs(costs, tuning)
    draw_gains(gains, tuning)
    for axes in (costs, gains):
        axes.legend(loc="best", frameon=False)
    setting = tuning.setting
    figure.suptitle(
        f"{PRECISIONS[setting.precision].title} block by block, {BACKENDS[setting.engine].title}, "
        f"n = {setting.faces:,} validation faces"
    )
    return png(figure)


def draw_costs(axes: Axes, tuning: Tuning) -> None:
    """How far the vote moves where one block alone is in few bits, or in FP16."""
    places = np.arange(len(tuning.blocks))
    for precision, colour, marker in ((tuning.setting.precision, VERMILION, "o"), ("fp16", BLUE, "s")):
        found = [_alone(tuning, block, precision) for block in tuning.blocks]
        values = [np.nan if trial is None or trial.cost is None else trial.cost.kl for trial in found]
        axes.plot(values, places, marker, color=colour, label=PRECISIONS[precision].title)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0e}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("KL of the vote, nats (the block alone)")
    _as_list(axes, tuning.blocks)


def draw_gains(axes: Axes, tuning: Tuning) -> None:
    """What part of the time few bits in a block gain, with intervals."""
    places = np.arange(len(tuning.blocks))
    left = [block in tuning.left for block in tuning.blocks]
    estimates = [_gain(_trial(tuning, "without", tuning.setting.precision, (block,))) for block in tuning.blocks]
    for is_left, colour, title in ((False, VERMILION, "chosen"), (True, GREY, "stays in FP32")):
        rows = [row for row in places if left[row] == is_left]
        middle = np.array([estimates[row][0] for row in rows])
        reach = np.abs(np.array([estimates[row][1:] for row in rows]).reshape(-1, 2).T - middle)
        axes.errorbar(middle, rows, xerr=reach, fmt="o", color=colour, capsize=3, label=title)
    axes.axvline(0, color=GREY, linewidth=0.8)
    axes.set_xlabel("time gained by few bits, % of a call")
    _as_list(axes, tuning.blocks)


def _as_list(axes: Axes, names: Sequence[str]) -> None:
    plain_axes(axes)
    axes.set_yticks(np.arange(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(axis="y", linewidth=0.4, color="#dddddd")


def _block_rows(tuning: Tuning) -> list[Row]:
    precision = tuning.setting.precision
    rows = []
    for block in tuning.blocks:
        row = {"block": block}
        for name in dict.fromkeys((precision, "fp16")):
            trial = _alone(tuning, block, name)
            cost = None if trial is None else trial.cost
            row[f"{name} KL"] = "" if cost is None else f"{cost.kl:.1e}"
            row[f"{name} changed %"] = "" if cost is None else f"{100 * cost.changed / tuning.setting.faces:.2f}"
        gain, low, high = _gain(_trial(tuning, "without", precision, (block,)))
        row["time gained % [95 %]"] = f"{gain:.1f} [{low:.1f}, {high:.1f}]"
        row["chosen"] = "fp32" if block in tuning.left else precision
        rows.append(row)
    return rows


def _search_row(tuning: Tuning, trial: Trial) -> Row:
    cost, speed = trial.cost, trial.times_as_fast
    assert cost is not None
    assert speed is not None
    return {
        "in FP32": ", ".join(trial.left) or "none",
        "changed %": f"{100 * cost.changed / tuning.setting.faces:.2f}",
        "mended": str(cost.mended),
        "broken": str(cost.broken),
        "KL": f"{cost.kl:.1e}",
        "times as fast [95 %]": with_interval(speed, 3),
        "ms a face": f"{trial.ms_a_face:.2f}",
        "chosen": "yes" if trial.left == tuning.left else "",
    }


def _gain(trial: Trial) -> tuple[float, float, float]:
    """What a block in few bits saves of the time without it, in percent, with its interval."""
    speed = trial.times_as_fast
    assert speed is not None
    return 100 * (1 - speed.value), 100 * (1 - speed.high), 100 * (1 - speed.low)


def _alone(tuning: Tuning, block: str, precision: str) -> Trial | None:
    left = tuple(name for name in tuning.blocks if name != block)
    found = (trial for trial in tuning.trials if trial.kind == "alone" and trial.precision == precision)
    return next((trial for trial in found if trial.left == left), None)


def _trial(tuning: Tuning, kind: str, precision: str, left: tuple[str, ...]) -> Trial:
    wanted = (kind, precision, left)
    return next(trial for trial in tuning.trials if (trial.kind, trial.precision, trial.left) == wanted)
