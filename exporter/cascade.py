"""A cascade: few passes for all faces, more for those whose decision is not clear, the full vote for the rest.

A stage adds passes. Of all passes so far it predicts the full vote, as their weighted mean, and decides about it. A
face leaves where the rule lets it:

- `exact`: the passes that remain cannot turn the decision, whatever they say (see `settled`);
- `agreement`: the risk that the full vote decides otherwise is at most the threshold;
- `accuracy`: likewise, with a threshold that bounds what accuracy is lost. Predictions may then have offsets, which
  mend some of what the full vote gets wrong.

The last stage completes the full vote of the passes computed before and those that remain: its labels are those of
the full vote. The threshold orders all ways to leave, from none early (0) to all after the first stage (1).

Source: cascades of an ensemble's members, Wang et al. 2022 (arXiv:2012.01988); vector scaling without its slopes for
the offsets, Guo et al. 2017 (arXiv:1706.04599).
"""

from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from emoexport.config import Record
from emoexport.decision import Decision
from emoexport.errors import BadInput, UsageError
from emoexport.margin import RiskModel, decision_margin, with_offsets
from emoexport.outcome import Outcome
from emoexport.passes import faces_at_once
from emoexport.settled import OPEN, settled

__all__ = ["Cascade", "CascadeRun", "Paths", "Stage", "StageAnswer"]

FloatArray = NDArray[np.floating]
Share = Annotated[float, Field(ge=0, le=1)]

# How far from 1 weights may sum: they are divided by their sum, and no more exact than that.
_ROUNDING = 1e-9


class Stage(Record):
    """What one stage adds, and how it predicts the full vote."""

    passes: tuple[tuple[int, int], ...] = Field(min_length=1)
    """Those it adds, as member and view, indices into the axes K and V, in the order of computing."""
    weights: tuple[Share, ...]
    """Of all passes so far, in the order of computing, in the prediction; they sum to 1."""
    offsets: tuple[float, ...] = ()
    """Added to the logarithms of the predicted probabilities, one for each emotion; none for no change."""
    risk: RiskModel | None = None
    """None at the last stage, whose labels are the full vote's, and where faces leave by exact bounds."""


class StageAnswer(NamedTuple):
    """What a stage says of N faces."""

    leaves: NDArray[np.bool_]
    """`(N,)`: whose answer this is; the others go on."""
    outcome: Outcome
    risk: NDArray[np.float64]
    """`(N,)` in [0, 1]: that the full vote, with offsets like the stage's, decides otherwise, as the stage estimates
    it; by exact bounds, 0 where that cannot be and 1 where it can."""


class CascadeRun(NamedTuple):
    """What a cascade says of N faces."""

    outcome: Outcome
    stage: NDArray[np.int64]
    """`(N,)`: at which each left, counted from 0."""
    passes: NDArray[np.int64]
    """`(N,)`: how many each took."""


class Paths(NamedTuple):
    """What each of S stages says of N faces, whoever leaves before: any threshold is arithmetic on it."""

    labels: NDArray[np.int64]
    """`(S, N)`."""
    risks: NDArray[np.float64]
    """`(S, N)` in [0, 1], 0 at the last stage."""

    def leaving(self, threshold: float | None) -> NDArray[np.int64]:
        """The stage at which each face leaves, `(N,)`; the last one for all where the threshold is None."""
        if threshold is None:
            return np.full(self.risks.shape[1], len(self.risks) - 1)
        stage: NDArray[np.int64] = (self.risks <= threshold).argmax(axis=0)
        return stage

    def labels_at(self, stage: NDArray[np.int64]) -> NDArray[np.int64]:
        """The labels `(N,)` with which faces leave at these stages `(N,)`."""
        found: NDArray[np.int64] = np.take_along_axis(self.labels, stage[None], axis=0)[0]
        return found


class Cascade(Record):
    """Stages, and the rule and threshold by which faces leave."""

    schema_version: Literal[1] = 1
    weights: tuple[tuple[Share, ...], ...]
    """Of the full vote, K rows of V; they sum to 1."""
    decision: Decision
    rule: Literal["exact", "agreement", "accuracy"]
    threshold: float | None = Field(default=None, ge=0, le=1)
    """The largest risk with which a face leaves. None: no face leaves early, every one gets the full vote."""
    stages: tuple[Stage, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        if len({len(row) for row in self.weights}) != 1 or abs(self.full.sum() - 1) > _ROUNDING:
            raise ValueError("the weights of the full vote must be a table of shares that sum to 1")
        added = [one for stage in self.stages for one in stage.passes]
        voting = {(int(member), int(view)) for member, view in np.argwhere(self.full > 0)}
        if len(added) != len(set(added)) or set(added) != voting:
            raise ValueError(f"the stages must add each of the {len(voting)} passes of the full vote once")
        if self.rule == "exact" and self.threshold not in (None, 0):
            raise ValueError("the rule 'exact' has the threshold 0: a face that is not settled never leaves")
        for number, stage in enumerate(self.stages):
            _check_stage(stage, len(self.order(number)), len(self.decision.labels), self._needs_risk(number))
        return self

    def _needs_risk(self, stage: int) -> bool:
        return self.rule != "exact" and stage < len(self.stages) - 1

    @property
    def full(self) -> NDArray[np.float64]:
        """The weights of the full vote, float64 `(K, V)`."""
        return np.array(self.weights, dtype=np.float64)

    def order(self, stage: int) -> tuple[tuple[int, int], ...]:
        """All passes up to a stage, counted from 0, as member and view, in the order of computing."""
        return tuple(one for added in self.stages[: stage + 1] for one in added.passes)

    @property
    def sizes(self) -> NDArray[np.int64]:
        """How many passes a face has taken after each stage, `(S,)`."""
        return np.cumsum([len(stage.passes) for stage in self.stages])

    def answer(self, stage: int, scores: FloatArray) -> StageAnswer:
        """Decide about the faces that reached a stage, and which of them leave.

        Args:
            stage: counted from 0.
            scores: the probabilities of all passes so far, `(N, passes so far, L)`, in the order of `order(stage)`.

        Raises:
            UsageError: if there is no such stage.
            BadInput: if the scores are of another shape or not finite.
        """
        if not 0 <= stage < len(self.stages):
            raise UsageError(f"there is no stage {stage}; the cascade has {len(self.stages)}, counted from 0.")
        scores = np.asarray(scores)
        needed = len(self.order(stage)), len(self.decision.labels)
        if scores.ndim != 3 or scores.shape[1:] != needed or not np.isfinite(scores).all():
            raise BadInput(
                f"found scores of the shape {scores.shape}; needed after stage {stage} are finite ones of the shape "
                f"(faces, {needed[0]}, {needed[1]})."
            )
        if stage == len(self.stages) - 1:
            outcome = self.decision.decide(self._vote(scores, self.order(stage)))
            return StageAnswer(np.ones(len(scores), dtype=bool), outcome, np.zeros(len(scores)))
        outcome, risk = self._exact(stage, scores) if self.rule == "exact" else self._predicted(stage, scores)
        leaves = np.zeros(len(scores), dtype=bool) if self.threshold is None else risk <= self.threshold
        return StageAnswer(leaves, outcome, risk)

    def walk(self, faces: int, compute: Callable[[NDArray[np.int64], int], FloatArray]) -> CascadeRun:
        """Take faces through the stages.

        Args:
            faces: how many, N.
            compute: given which of them, `(n,)` integers below N, and a stage, finds the probabilities of the passes
                that the stage adds, `(n, added, L)`. It is asked for none twice.

        Raises:
            BadInput: if what it finds is not finite.
        """
        labels = len(self.decision.labels)
        outcome = Outcome(np.zeros((faces, labels), np.float32), np.zeros(faces, np.int64), np.zeros(faces, np.float32))
        left = np.zeros(faces, dtype=np.int64)
        for rows in faces_at_once(faces, self._scores_a_face):
            waiting = np.arange(faces)[rows]
            scores = np.empty((len(waiting), 0, labels), dtype=np.float32)
            for stage in range(len(self.stages)):
                scores = np.concatenate([scores, compute(waiting, stage)], axis=1)
                if self.threshold is None and stage < len(self.stages) - 1:
                    continue
                found = self.answer(stage, scores)
                leaving = waiting[found.leaves]
                left[leaving] = stage
                outcome.probabilities[leaving], outcome.label[leaving], outcome.confidence[leaving] = (
                    found.outcome.take(found.leaves)
                )
                waiting, scores = waiting[~found.leaves], scores[~found.leaves]
                if not waiting.size:
                    break
        return CascadeRun(outcome, left, self.sizes[left])

    def run(self, scores: FloatArray) -> CascadeRun:
        """Take all faces of a cube through the stages.

        Args:
            scores: `(N, K, V, L)`, as in a score cube.

        Raises:
            BadInput: if they are of another shape or not finite.
        """
        self._check_cube(scores)
        added = [np.array(stage.passes).T for stage in self.stages]
        return self.walk(len(scores), lambda faces, stage: scores[faces[:, None], *added[stage]])

    def paths(self, scores: FloatArray) -> Paths:
        """What every stage says of every face of a cube `(N, K, V, L)`.

        Raises:
            BadInput: if the scores are of another shape or not finite.
        """
        self._check_cube(scores)
        shape = len(self.stages), len(scores)
        found = Paths(np.empty(shape, dtype=np.int64), np.empty(shape))
        for stage in range(len(self.stages)):
            for rows in faces_at_once(len(scores), self._scores_a_face):
                answer = self.answer(stage, scores[rows][:, *self._axes(stage)])
                found.labels[stage, rows], found.risks[stage, rows] = answer.outcome.label, answer.risk
        return found

    def _exact(self, stage: int, scores: FloatArray) -> tuple[Outcome, NDArray[np.float64]]:
        weights = np.array([self.weights[member][view] for member, view in self.order(stage)])
        sums = weights @ scores.astype(np.float64)
        label = settled(sums, max(0.0, 1 - float(weights.sum())), self.decision)
        is_open = label == OPEN
        outcome = self.decision.decide(sums / weights.sum())
        label = np.where(is_open, outcome.label, label)
        confidence = outcome.probabilities[np.arange(len(label)), label]
        # Of a face that is open nothing is known: it stays, whatever the threshold below 1.
        return Outcome(outcome.probabilities, label, confidence), is_open.astype(np.float64)

    def _predicted(self, number: int, scores: FloatArray) -> tuple[Outcome, NDArray[np.float64]]:
        stage = self.stages[number]
        predicted = np.array(stage.weights) @ scores.astype(np.float64)
        predicted = with_offsets(predicted, stage.offsets)
        assert stage.risk is not None
        return self.decision.decide(predicted), stage.risk.risk(decision_margin(predicted, self.decision))

    def _vote(self, scores: FloatArray, order: tuple[tuple[int, int], ...]) -> NDArray[np.float64]:
        """The full vote `(N, L)`, summed in the order in which `Cube.vote` sums it, so that not a bit differs."""
        members, views = np.array(order).T
        rows = np.lexsort((views, members))
        vote: NDArray[np.float64] = self.full[members[rows], views[rows]] @ scores[:, rows].astype(np.float64)
        return vote

    def _axes(self, stage: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        members, views = np.array(self.order(stage)).T
        return members, views

    @property
    def _scores_a_face(self) -> int:
        return self.full.size * len(self.decision.labels)

    def _check_cube(self, scores: Any) -> None:
        needed = *self.full.shape, len(self.decision.labels)
        if np.ndim(scores) != 4 or scores.shape[1:] != needed:
            raise BadInput(
                f"found scores of the shape {np.shape(scores)}; needed is (faces, {', '.join(map(str, needed))})."
            )


def _check_stage(stage: Stage, passes: int, labels: int, needs_risk: bool) -> None:
    if len(stage.weights) != passes or abs(sum(stage.weights) - 1) > _ROUNDING:
        raise ValueError(
            f"a stage has {len(stage.weights)} weights with the sum {sum(stage.weights):g}; needed is one for each "
            f"of the {passes} passes so far, with the sum 1"
        )
    if stage.offsets and (len(stage.offsets) != labels or not np.isfinite(stage.offsets).all()):
        raise ValueError(f"a stage has {len(stage.offsets)} offsets; needed are {labels} finite ones, or none")
    if needs_risk and stage.risk is None:
        raise ValueError("a stage before the last has no model of risk; only the rule 'exact' needs none")
