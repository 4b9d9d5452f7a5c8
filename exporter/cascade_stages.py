"""Which stages a cascade has: as many as pay for themselves where a call costs something, whatever is in it.

A stage more lets some faces leave earlier, and costs a call of every member that it asks. Stages say the same of a face
whichever others there are, so any of them can be left out.
"""

import functools
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from emoexport.cascade import Cascade, Paths
from emoexport.config import Record

__all__ = ["Calls", "choose_stages", "milliseconds_a_face", "with_stages"]

USUAL_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)


class Calls(Record):
    """How passes of a member are put into calls of a runtime."""

    sizes: tuple[int, ...] = Field(default=USUAL_SIZES, min_length=1)
    """The numbers of passes that a call may have, rising. Runtimes prepare kernels, and capture graphs, for each size
    that they meet, so they are few."""
    prepared: bool = False
    """Whether the runtime is opened for these sizes and no others."""
    call_ms: float = Field(default=1.0, ge=0)
    """What a call takes whatever is in it, milliseconds."""
    row_ms: float = Field(default=1.0, ge=0)
    """And for each pass."""

    def up_to(self, most: int) -> "Calls":
        """The same where a call has room for so many passes only."""
        sizes = tuple(dict.fromkeys(min(size, most) for size in self.sizes))
        return self.model_copy(update={"sizes": sizes})

    def measured(self, few: int, few_ms: float, many: int, many_ms: float) -> "Calls":
        """The same with the line through two calls; a flat one where they are of the same size."""
        row = max(many_ms - few_ms, 0.0) / max(many - few, 1)
        return self.model_copy(update={"call_ms": max(few_ms - few * row, 0.0), "row_ms": row})

    def of(self, rows: int) -> list[int]:
        """The cheapest sizes of calls with room for so many passes, of which the last one may stay partly empty."""
        most = self.sizes[-1]
        return [most] * (rows // most) + list(_cheapest(rows % most, self.sizes, self.call_ms, self.row_ms))

    def milliseconds(self, rows: int) -> float:
        """What so many passes take."""
        return sum(self.call_ms + self.row_ms * size for size in self.of(rows))


@functools.cache
def _cheapest(rows: int, sizes: tuple[int, ...], call_ms: float, row_ms: float) -> tuple[int, ...]:
    if rows <= 0:
        return ()
    in_one = (next(size for size in sizes if size >= rows),)
    parts = [(size, *_cheapest(rows - size, sizes, call_ms, row_ms)) for size in sizes if size < rows]
    return min([in_one, *parts], key=lambda calls: call_ms * len(calls) + row_ms * sum(calls))


def with_stages(cascade: Cascade, kept: Sequence[int]) -> Cascade:
    """The cascade with some of its stages only; what the others add, the next one that is kept adds.

    Args:
        cascade: any.
        kept: stages, counted from 0, rising; the last one must be among them.
    """
    stages = [
        cascade.stages[stage].model_copy(
            update={"passes": tuple(one for added in cascade.stages[before + 1 : stage + 1] for one in added.passes)}
        )
        for before, stage in zip([-1, *kept], kept, strict=False)
    ]
    return cascade.model_copy(update={"stages": tuple(stages)})


def choose_stages(
    cascade: Cascade,
    paths: Paths,
    threshold: Callable[[Paths], float | None],
    calls: Calls,
    batch: int,
) -> list[int]:
    """Leave out stages one by one, each time the one without which a face takes least, as long as it takes less.

    Args:
        cascade: as fitted, with all stages that there may be.
        paths: of faces that had no part in the fit that they are of.
        threshold: with which faces would leave, of paths of some stages; None for none before the last.
        calls: what passes take.
        batch: faces that go through the cascade together.

    Returns:
        The stages that are left, counted from 0.
    """

    def takes(kept: list[int]) -> float:
        some = Paths(paths.labels[kept], paths.risks[kept])
        return milliseconds_a_face(with_stages(cascade, kept), some.leaving(threshold(some)), calls, batch)

    kept = list(range(len(cascade.stages)))
    least = takes(kept)
    while len(kept) > 1:
        without = {stage: takes([one for one in kept if one != stage]) for stage in kept[:-1]}
        worst = min(without, key=without.__getitem__)
        if without[worst] >= least:
            break
        least = without[worst]
        kept.remove(worst)
    return kept


def milliseconds_a_face(cascade: Cascade, left: NDArray[np.int64], calls: Calls, batch: int) -> float:
    """What a face takes on average.

    Args:
        cascade: any.
        left: at which stage each face leaves, `(N,)`, in the order in which they come.
        calls: what passes take.
        batch: faces that go through the cascade together.
    """
    starts = np.arange(0, len(left), batch)
    total = 0.0
    for stage, added in enumerate(cascade.stages):
        waiting, times = np.unique(np.add.reduceat((left >= stage).astype(np.int64), starts), return_counts=True)
        for passes in Counter(member for member, _ in added.passes).values():
            each = [calls.milliseconds(passes * count) for count in waiting.tolist()]
            total += float(np.dot(times, each))
    return total / len(left)
