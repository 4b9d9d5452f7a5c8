"""Which passes to plan with, found on a score cube: all arithmetic, no engine."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from emoexport.comparison import Comparison
from emoexport.cube import Cube
from emoexport.decision import Decision
from emoexport.passes import Choice, inner_products
from emoexport.plan import Candidate, Goals
from emoexport.vote_prediction import order_passes, predicting_weights

__all__ = ["SIZES", "best_member_of", "candidates_of", "is_likely_to_hold", "likeliest"]

SIZES = (1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64)
"""Passes of the candidates, besides all of them."""

_LEAST_SHARE = 1e-3
"""Of the vote: a pass that weighs less is none."""


def candidates_of(
    cube: Cube,
    decision: Decision,
    numbers: Sequence[int],
    *,
    sizes: Sequence[int] = SIZES,
    vote: NDArray[np.int64] | None = None,
    soup: tuple[str, str] = ("", ""),
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
        vote: labels of the full vote, `(N,)`; None for that of the cube.
        soup: which soup the cube is of, and the SHA-256 of its weights; empty for the members themselves.
    """
    _, members, views, _ = cube.record.shape
    full = cube.weights.ravel()
    gram, target = inner_products(cube.scores), decision.decide(cube.vote()).label if vote is None else vote
    most = np.count_nonzero(full) - (vote is None)  # all passes are no candidate where they are the full vote
    counts = [size for size in sizes if size <= most]
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
        found.setdefault(
            tuple(sorted(kept)), Candidate(choice=choice, soup=soup[0], soup_sha256=soup[1], selection=comparison)
        )
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
    candidates: Sequence[Candidate], goals: Goals, faces: int, why_slow: Callable[[int], str]
) -> tuple[int | None, str]:
    """The candidate of fewest passes that is likely to reach all goals.

    Args:
        candidates: in rising order of passes.
        goals: what is asked for.
        faces: how many will confirm it.
        why_slow: by number of passes, why no engine reaches the goals of speed; empty where one does.

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
    slow = why_slow(passes)
    return (None, f"{passes} passes are needed for the limits, and {slow}") if slow else (first, "")


def best_member_of(cube: Cube, decision: Decision) -> Comparison:
    """One pass of the member that is right most often with the first view, the face as it is."""
    label = np.stack([decision.decide(cube.scores[:, member, 0]).label for member in range(cube.scores.shape[1])])
    best = int((label == cube.labels).sum(axis=1).argmax())
    return Comparison.of(label[best], decision.decide(cube.vote()).label, cube.labels)
