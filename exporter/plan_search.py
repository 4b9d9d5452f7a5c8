"""Which passes to plan with, found on a score cube: all arithmetic, no engine."""

from collections.abc import Callable, Sequence

import numpy as np

from emoexport.comparison import Comparison
from emoexport.cube import Cube
from emoexport.decision import Decision
from emoexport.passes import Choice, inner_products
from emoexport.plan import Candidate, Goals
from emoexport.vote_prediction import order_passes, predicting_weights

__all__ = ["SIZES", "candidates_of", "is_likely_to_hold", "likeliest"]

SIZES = (1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64)
"""Passes of the candidates, besides all of them."""

_LEAST_SHARE = 1e-3
"""Of the vote: a pass that weighs less is none."""


def candidates_of(
    cube: Cube, decision: Decision, numbers: Sequence[int], *, sizes: Sequence[int] = SIZES
) -> list[Candidate]:
    """For each number of passes those that predict the full vote best, and how they decide.

    Passes are chosen one by one, by least squares of the full vote's probabilities, which needs no labels and does not
    fit them; their weights likewise. Choosing by the likelihood of labels agreed less with the full vote, and what
    it gained in accuracy was not shown on other faces (docs/decisions/0007-plans.md).

    Args:
        cube: of the faces that choose, with all passes of the full vote.
        decision: what decides about a vote.
        numbers: of each member of the cube, its number in the run.
        sizes: numbers of passes; those above that of the full vote are left out.
    """
    _, members, views, _ = cube.record.shape
    full = cube.weights.ravel()
    gram, target = inner_products(cube.scores), decision.decide(cube.vote()).label
    counts = [size for size in sizes if size < np.count_nonzero(full)]
    order = order_passes(gram, full, max(counts, default=0))
    found: dict[tuple[int, ...], Candidate] = {}
    for size in counts:
        weights = np.zeros(members * views)
        weights[order[:size]] = predicting_weights(gram, full, order[:size])
        weights[weights < _LEAST_SHARE] = 0
        table = weights.reshape(members, views)
        label = decision.decide(cube.vote(weights=table)).label
        kept = [number for number in order[:size] if weights[number]]
        choice = Choice(
            passes={
                f"{numbers[number // views]}:{cube.record.views[number % views]}": round(float(weights[number]), 6)
                for number in kept
            }
        )
        comparison = Comparison.of(label, target, cube.labels)
        found.setdefault(tuple(sorted(kept)), Candidate(choice=choice, selection=comparison))
    return list(found.values())


def is_likely_to_hold(found: Comparison, goals: Goals, faces: int) -> bool:
    """Whether other faces, so many, would show it within the goals' limits four times out of five, if they are alike.

    A gain of accuracy is taken for none: the best of many candidates owes it to chance, as few passes know no more than
    all.

    Source: the usual sample size for non-inferiority of paired proportions, by the normal approximation at a power of
        80 % and a one-sided level of 5 %, with the rates found.
    """
    spread = 1.645 + 0.842
    gained, lost = found.only_right / found.faces, found.only_wrong / found.faces
    drop = min(gained - lost, 0.0) - spread * np.sqrt(max(gained + lost - (gained - lost) ** 2, 1 / faces) / faces)
    if 100 * drop < -goals.max_drop_points:
        return False
    if goals.max_disagreement_pct is None:
        return True
    share = found.disagreement_pct.value / 100
    return bool(
        100 * (share + spread * np.sqrt(max(share * (1 - share), 1 / faces) / faces)) <= goals.max_disagreement_pct
    )


def likeliest(
    candidates: Sequence[Candidate], goals: Goals, faces: int, milliseconds: Callable[[int], float]
) -> tuple[int | None, str]:
    """The candidate of fewest passes that is likely to reach all goals.

    Args:
        candidates: in rising order of passes.
        goals: what is asked for.
        faces: how many will confirm it.
        milliseconds: of a call, as predicted, by number of passes, and how many faces it has.

    Returns:
        Its index, None if there is none; and why not, a sentence without its point.
    """
    holding = [index for index, one in enumerate(candidates) if is_likely_to_hold(one.selection, goals, faces)]
    if not holding:
        return None, f"no number of passes is likely to be shown within the limits on {faces:,} faces"
    first = holding[0]
    passes = candidates[first].passes
    if goals.max_passes is not None and passes > goals.max_passes:
        return None, f"{passes} passes are needed for the limits; allowed are {goals.max_passes}"
    if goals.max_latency_ms is not None and milliseconds(passes) > goals.max_latency_ms:
        return None, (
            f"{passes} passes are needed for the limits, and a call would take {milliseconds(passes):.3g} ms; "
            f"allowed are {goals.max_latency_ms:g}"
        )
    return first, ""
