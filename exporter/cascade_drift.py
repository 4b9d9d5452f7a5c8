"""Do faces in use leave a cascade where the calibration faces left it? If not, its certificate says nothing of them."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import chi2_contingency

from emoexport.config import Record
from emoexport.errors import BadInput, UsageError

__all__ = ["ExitDrift", "exit_drift"]

# A chi-square test is trusted where at least so many are expected in each cell.
_LEAST = 5.0


class ExitDrift(Record):
    """How faces in use leave, held against those of the calibration."""

    p_value: float
    """That both are drawn from the same faces; 1 where there is too little to compare."""
    level: float
    drifted: bool
    """Whether the p-value is below the level."""
    faces: int
    """In use."""
    groups: int
    """How many groups of stages were compared."""

    @property
    def sentence(self) -> str:
        """What was found, in words."""
        if self.groups < 2:
            return f"{self.faces:,} faces in use are too few, or leave too much alike, to tell whether they drifted."
        if self.drifted:
            return (
                f"{self.faces:,} faces in use leave at other stages than the calibration faces (p = "
                f"{self.p_value:.2g}): the certificate does not speak of them; calibrate on faces like these."
            )
        return (
            f"{self.faces:,} faces in use leave as the calibration faces do, as far as can be told "
            f"(p = {self.p_value:.2g})."
        )


def exit_drift(calibrated: Sequence[int], used: Sequence[int], *, level: float = 0.01) -> ExitDrift:
    """Compare how many faces left at each stage.

    Stages at which few are expected are taken together with the next.

    Args:
        calibrated: of the calibration faces, one count a stage, as a certificate has them.
        used: of faces in use, likewise. They are taken for independent, which the frames of one video are not.
        level: how probable a false alarm may be.

    Raises:
        BadInput: if the counts are not as many, or negative, or all 0.
        UsageError: if the level is not in (0, 1).

    Source: Pearson's chi-square test of homogeneity, as `scipy.stats.chi2_contingency`.
    """
    if not 0 < level < 1:
        raise UsageError(f"found the level {level:g}; needed is a probability in (0, 1).")
    if len(calibrated) != len(used) or min([*calibrated, *used], default=-1) < 0 or not sum(calibrated) * sum(used):
        raise BadInput(
            f"found counts of {len(calibrated)} and {len(used)} stages; needed are as many of both, 0 or more and not "
            "all 0."
        )
    table = _grouped(np.array([calibrated, used], dtype=np.int64))
    p_value = 1.0 if table.shape[1] < 2 else float(chi2_contingency(table, correction=False).pvalue)
    return ExitDrift(p_value=p_value, level=level, drifted=p_value < level, faces=int(sum(used)), groups=table.shape[1])


def _grouped(table: NDArray[np.int64]) -> NDArray[np.int64]:
    """The table `(2, stages)` with neighbours summed until enough are expected in each cell."""
    smaller = table.sum(axis=1).min() / table.sum()
    groups: list[NDArray[np.int64]] = []
    waiting = np.zeros(2, dtype=np.int64)
    for column in table.T:
        waiting = waiting + column
        if waiting.sum() * smaller >= _LEAST:
            groups.append(waiting)
            waiting = np.zeros(2, dtype=np.int64)
    if groups:
        groups[-1] = groups[-1] + waiting
    else:
        groups.append(waiting)
    return np.stack(groups, axis=1)
