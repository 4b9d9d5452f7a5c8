"""What copies of training faces do to the accuracy that is reported."""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from emoexport.config import Record
from emoexport.statistics import Estimate, Share
from emoexport.train.audit import DataAudit, RowFindings

__all__ = ["AuditReport", "RunAccuracy", "judge_rows"]


class RunAccuracy(Record):
    """How often the vote of a run is right, by what stands in its training split."""

    run: str
    split: str
    views: tuple[str, ...]
    """Those voted with, by all members and under the decision of the run."""
    accuracy: dict[str, Share]
    """By rows: `all`; `clean`; `leaked`, whose pixels stand in `train`; `near`, clean with a near duplicate in `train`;
    `unseen`, clean with none. Sets without rows are left out."""
    all_minus_clean: Estimate | None
    """Accuracy over all rows minus that over the clean ones; None if all rows are clean, or none."""


class AuditReport(Record):
    """`audit.json`."""

    schema_version: Literal[1] = 1
    created: str
    data: str
    size: int
    """Height and width in pixels at which faces were compared."""
    channels: int
    audit: DataAudit
    run: RunAccuracy | None
    seconds: float
    """Of the search for copies and near duplicates."""


def judge_rows(
    right: NDArray[np.bool_], found: RowFindings, *, run: str, split: str, views: tuple[str, ...], searched: bool
) -> RunAccuracy:
    """Share out the outcomes of one split by what is known of its rows.

    Args:
        right: `(N,)`, whether the run decides a row as its label says.
        found: of the same rows.
        run: its name.
        split: its name.
        views: names of those voted with.
        searched: whether near duplicates were looked for.
    """
    row_sets = {"all": np.ones(len(right), dtype=bool), "clean": found.clean, "leaked": found.leaked}
    if searched:
        row_sets["near"] = found.clean & found.near_train
        row_sets["unseen"] = found.clean & ~found.near_train
    return RunAccuracy(
        run=run,
        split=split,
        views=views,
        accuracy={name: Share.of(right[mask]) for name, mask in row_sets.items() if mask.any()},
        all_minus_clean=_all_minus_clean(right, found.clean),
    )


def _all_minus_clean(right: NDArray[np.bool_], clean: NDArray[np.bool_]) -> Estimate | None:
    """The clean rows are among all rows, so the difference is that of two separate sets, times a share.

    accuracy(all) - accuracy(clean) = share of rows not clean x (accuracy(not clean) - accuracy(clean)).

    Source: Newcombe 1998, "Interval estimation for the difference between independent proportions", method 10.
    """
    if clean.all() or not clean.any():
        return None
    share = float((~clean).mean())
    rest, kept = Share.of(right[~clean]), Share.of(right[clean])
    difference = rest.value - kept.value
    below = np.hypot(rest.value - rest.low, kept.high - kept.value)
    above = np.hypot(rest.high - rest.value, kept.value - kept.low)
    return Estimate(
        value=round(share * difference, 6),
        low=round(share * (difference - float(below)), 6),
        high=round(share * (difference + float(above)), 6),
    )
