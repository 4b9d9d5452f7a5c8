"""Ways to choose few passes: chosen on one score cube, judged against the full vote on the clean rows of another.

    python choices.py cubes/validation cubes/test DATA

Single passes by least squares are what `emoexport plan` takes. Grids are all of some members on all of some views,
grown by one member or view at a time: the one that brings most for each pass that it costs, in squared distance to the
full vote's probabilities, or in the likelihood of the true labels at the temperature that suits the vote. Prints
Markdown.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar

from emoexport.comparison import Comparison
from emoexport.cube import Cube
from emoexport.decision import Decision
from emoexport.passes import weighted_vote
from emoexport.plan_search import candidates_of
from emoexport.table_format import Row, markdown_table, with_interval
from emoexport.train.audit import clean_rows
from emoexport.train.dataset import load_data

Shares = NDArray[np.float64]


def negative_log_likelihood(votes: NDArray[np.float64], truth: NDArray[np.int64]) -> float:
    """Of the true labels, in nats a face, at the best temperature."""
    logs, rows = np.log(np.maximum(votes, 1e-12)), np.arange(len(truth))

    def loss(log_temperature: float) -> float:
        scaled = logs * np.exp(-log_temperature)
        return float((np.logaddexp.reduce(scaled, axis=1) - scaled[rows, truth]).mean())

    return float(minimize_scalar(loss, bounds=(-2.0, 2.0), method="bounded", options={"xatol": 1e-3}).fun)


def grid(members: list[int], views: list[int], shape: tuple[int, ...]) -> Shares:
    """Equal shares of all these members on all these views."""
    shares = np.zeros(shape)
    shares[np.ix_(members, views)] = 1 / (len(members) * len(views))
    return shares


def grown(shape: tuple[int, int], most: int, cost: Callable[[Shares], float]) -> list[Shares]:
    """Grids, each with one member or view more than the one before, of up to so many passes."""
    singles = [([member], [view]) for member in range(shape[0]) for view in range(shape[1])]
    best = min(singles, key=lambda one: cost(grid(*one, shape)))
    found = []
    while len(best[0]) * len(best[1]) <= most:
        found.append(grid(*best, shape))
        reached, size = cost(found[-1]), len(best[0]) * len(best[1])
        wider = [([*best[0], one], best[1]) for one in range(shape[0]) if one not in best[0]]
        wider += [(best[0], [*best[1], one]) for one in range(shape[1]) if one not in best[1]]
        best = min(wider, key=lambda one: (cost(grid(*one, shape)) - reached) / (len(one[0]) * len(one[1]) - size))
    return found


def main(validation: str, test: str, data: str) -> None:
    """Choose, judge and print."""
    chooser, judge = Cube.open(Path(validation)), Cube.open(Path(test))
    clean = clean_rows(load_data(data, size=48, channels=1))[judge.record.split]
    scores, truth = judge.scores[clean], judge.labels[clean]
    decision = Decision(labels=judge.record.labels)
    full, aim = decision.decide(weighted_vote(scores, judge.weights)).label, chooser.vote()
    shape = judge.record.shape[1], judge.record.shape[2]

    def row(way: str, shares: Shares) -> Row:
        found = Comparison.of(decision.decide(weighted_vote(scores, shares)).label, full, truth)
        return {
            "chosen": way,
            "passes": str(np.count_nonzero(shares)),
            "agree %": f"{100 - found.disagreement_pct.value:.1f}",
            "accuracy, points": with_interval(found.gain_points, 2, sign=True),
            "no worse than": f"{found.bound_points:+.2f}",
        }

    def single(passes: dict[str, float]) -> Shares:
        shares = np.zeros(shape)
        for name, weight in passes.items():
            member, _, view = name.partition(":")
            shares[int(member) - 1, judge.record.views.index(view)] = weight
        return shares / shares.sum()

    candidates = candidates_of(chooser, decision, range(1, shape[0] + 1), sizes=(1, 2, 3, 4, 6, 8, 10, 12, 16, 20, 24))
    rows = [row("single passes, least squares", single(one.choice.passes)) for one in candidates]
    for name, cost in (
        ("grid, least squares", lambda shares: float(((weighted_vote(chooser.scores, shares) - aim) ** 2).sum())),
        (
            "grid, likelihood",
            lambda shares: negative_log_likelihood(weighted_vote(chooser.scores, shares), chooser.labels),
        ),
    ):
        rows += [row(name, shares) for shares in grown(shape, 25, cost)]
    print(f"Chosen on {len(chooser.labels):,} validation faces, judged on {clean.sum():,} clean rows.\n")
    print(markdown_table(rows))


if __name__ == "__main__":
    main(*sys.argv[1:])
