"""Verdicts: what labelled faces show of an engine, by bounds and never by what was found alone.

Certified is what is shown at 95 % to be within both limits. Failed is what is shown to be beyond one of them, at
97.5 %, since there are two. Between these there is not enough evidence, and it is said how many such faces would do.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Literal

from pydantic import Field

from emoexport.config import Record
from emoexport.evidence import Evidence
from emoexport.statistics import exact_bound, exact_floor, paired_interval

__all__ = ["EXIT_CODES", "Judgement", "Limits", "Verdict", "joined", "judge", "judge_counts", "worst_of"]

Verdict = Literal["certified", "failed", "not enough evidence", "not judged"]

EXIT_CODES: Mapping[str, int] = MappingProxyType(
    {"certified": 0, "failed": 1, "not enough evidence": 6, "not judged": 6}
)

_WORST_FIRST: tuple[Verdict, ...] = ("failed", "not enough evidence", "certified", "not judged")
_MOST_FACES = 100_000_000
"""More than these nobody labels."""


class Limits(Record):
    """How much worse than the reference an engine may be."""

    max_drop_points: float = Field(default=0.5, ge=0, le=100)
    """Of accuracy, in percentage points."""
    max_disagreement_pct: float = Field(default=1.0, ge=0, le=100)
    """Of faces on which it decides otherwise."""


class Judgement(Record):
    """A verdict and why."""

    verdict: Verdict
    reasons: tuple[str, ...] = ()
    """A sentence each, without its point; of what is certified, what could not be told."""
    faces_needed: int | None = None
    """For a certificate, if faces go on to be as these are; None where none are, or no number would do."""


def judge(evidence: Evidence, limits: Limits) -> Judgement:
    """Hold what faces show against the limits.

    Accuracy: non-inferiority by the bounds of Tango's interval. Labels: by those of Clopper and Pearson. Both must hold
    for a certificate, so neither needs a correction for the other there (Berger 1982, intersection-union tests).
    """
    counts = evidence.engine_only_right, evidence.reference_only_right, evidence.disagreements
    return judge_counts(*counts, evidence.faces, limits)


def judge_counts(mended: int, broken: int, changed: int, faces: int, limits: Limits) -> Judgement:
    """The same, where only counts are known: faces set right, faces broken, labels changed, and all faces."""
    return joined([_judge_accuracy(mended, broken, faces, limits), _judge_labels(changed, faces, limits)])


def joined(parts: Sequence[Judgement]) -> Judgement:
    """The judgement on the whole, by those on its parts: the worst of them, and the reasons of that one."""
    worst = worst_of(parts)
    decisive = [part for part in parts if part.verdict == worst]
    needed = [part.faces_needed for part in decisive]
    return Judgement(
        verdict=worst,
        reasons=tuple(dict.fromkeys(reason for part in decisive for reason in part.reasons)),
        faces_needed=None if None in needed else max((count for count in needed if count), default=None),
    )


def worst_of(judgements: Iterable[Judgement]) -> Verdict:
    """The verdict on the whole, by those on its parts; parts that are not judged count only where all are."""
    found = {one.verdict for one in judgements}
    return next((verdict for verdict in _WORST_FIRST if verdict in found), "not judged")


def _judge_accuracy(mended: int, broken: int, faces: int, limits: Limits) -> Judgement:
    low = 100 * paired_interval(mended, broken, faces, level=0.9)[0]
    high = 100 * paired_interval(mended, broken, faces, level=0.95)[1]
    allowed = f"allowed are {limits.max_drop_points:g}"
    if low >= -limits.max_drop_points:
        return Judgement(verdict="certified")
    if high < -limits.max_drop_points:
        return Judgement(verdict="failed", reasons=(f"at least {-high:.2f} points of accuracy are lost; {allowed}",))

    def holds(count: float) -> bool:
        scale = count / faces
        return 100 * paired_interval(scale * mended, scale * broken, count, level=0.9)[0] >= -limits.max_drop_points

    return _undecided(f"up to {-low:.2f} points of accuracy may be lost; {allowed}", holds, faces)


def _judge_labels(changed: int, faces: int, limits: Limits) -> Judgement:
    least, most = 100 * exact_floor(changed, faces, level=0.975), 100 * exact_bound(changed, faces)
    allowed = f"allowed are {limits.max_disagreement_pct:g} %"
    if most <= limits.max_disagreement_pct:
        return Judgement(verdict="certified")
    if least > limits.max_disagreement_pct:
        return Judgement(verdict="failed", reasons=(f"at least {least:.2f} % of the labels differ; {allowed}",))

    def holds(count: float) -> bool:
        return 100 * exact_bound(changed * count / faces, count) <= limits.max_disagreement_pct

    return _undecided(f"up to {most:.2f} % of the labels may differ; {allowed}", holds, faces)


def _undecided(reason: str, holds: Callable[[float], bool], faces: int) -> Judgement:
    needed = _least(holds, faces)
    told = f"{needed:,} such faces would do" if needed else "at these rates no number of faces would do"
    return Judgement(verdict="not enough evidence", reasons=(f"{reason}: {told}",), faces_needed=needed)


def _least(holds: Callable[[float], bool], above: int) -> int | None:
    """The least number above this one at which something begins to hold, in steps of a hundredth of it."""
    most = above
    while not holds(most):
        most *= 2
        if most > _MOST_FACES:
            return None
    least = most // 2
    while most - least > max(1, most // 100):
        middle = (least + most) // 2
        least, most = (least, middle) if holds(middle) else (middle, most)
    return most
