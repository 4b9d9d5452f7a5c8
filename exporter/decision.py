"""From voted probabilities to a label: confidence thresholds per emotion, then confusion pairs.

1. *Thresholds.* An emotion may be decided only where its probability reaches its threshold. The label is
   the most probable emotion that may be; where none may, it is the most probable one.
2. *Confusion pairs.* A rule (a, b, margin) gives the decision to the runner-up b where a leads b by less
   than the margin: for pairs in which the model is known to lean to a.

The confidence is the probability of the label. Ties go to the emotion that comes first.
"""

from collections.abc import Sequence
from typing import Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator
from scipy.stats import binomtest

from emoexport.config import Record
from emoexport.labels import EMOTIONS
from emoexport.outcome import Outcome

__all__ = ["GUIDE_PAIRS", "Decision", "PairRule", "RuleReport", "fit_decision"]

# The pairs that the recipe names as often confused; each is tried in both directions.
GUIDE_PAIRS = (
    ("angry", "disgust"),
    ("angry", "neutral"),
    ("angry", "sad"),
    ("fear", "surprise"),
    ("neutral", "sad"),
)

FloatArray = NDArray[np.floating]
IntArray = NDArray[np.int64]


class PairRule(Record):
    """Where `leader` is decided and leads the runner-up `favoured` by less than `margin`, decide `favoured`."""

    leader: str
    favoured: str
    margin: float = Field(gt=0, le=1)


class Decision(Record):
    """The rules of one bundle; without any the most probable emotion is decided."""

    labels: tuple[str, ...] = EMOTIONS
    thresholds: dict[str, float] = Field(default_factory=dict)
    pairs: tuple[PairRule, ...] = ()

    @model_validator(mode="after")
    def _names_are_labels(self) -> Self:
        named = [*self.thresholds, *(name for pair in self.pairs for name in (pair.leader, pair.favoured))]
        unknown = sorted(set(named) - set(self.labels))
        if unknown:
            raise ValueError(f"rules name {unknown[0]!r}, which is none of {', '.join(self.labels)}")
        if any(not 0 < value <= 1 for value in self.thresholds.values()):
            raise ValueError("thresholds must be in (0, 1]")
        return self

    @property
    def threshold_array(self) -> NDArray[np.float32]:
        """`(L,)` float32; 0 where an emotion has no threshold."""
        return np.array([self.thresholds.get(name, 0.0) for name in self.labels], dtype=np.float32)

    @property
    def margin_array(self) -> NDArray[np.float32]:
        """`(L, L)` float32: row the leader, column the favoured runner-up; minus infinity for no rule."""
        margins = np.full((len(self.labels), len(self.labels)), -np.inf, dtype=np.float32)
        for pair in self.pairs:
            margins[self.labels.index(pair.leader), self.labels.index(pair.favoured)] = pair.margin
        return margins

    def decide(self, probabilities: FloatArray) -> Outcome:
        """Decide about N faces.

        Args:
            probabilities: the vote, `(N, L)` in [0, 1].
        """
        rows = np.arange(len(probabilities))
        allowed = probabilities >= self.threshold_array
        allowed |= ~allowed.any(axis=1, keepdims=True)
        label = np.where(allowed, probabilities, -1.0).argmax(axis=1)
        others = np.array(probabilities, copy=True)
        others[rows, label] = -1.0
        second = others.argmax(axis=1)
        lead = probabilities[rows, label] - probabilities[rows, second]
        label = np.where(lead < self.margin_array[label, second], second, label).astype(np.int64)
        vote = probabilities.astype(np.float32, copy=False)
        return Outcome(vote, label, vote[rows, label])


class RuleReport(Record):
    """What one candidate rule did on the half of the validation faces on which it was not fitted."""

    rule: str
    value: float
    mended: int
    broken: int
    p_value: float
    kept: bool


def fit_decision(
    probabilities: FloatArray,
    truth: IntArray,
    *,
    labels: Sequence[str] = EMOTIONS,
    pairs: Sequence[tuple[str, str]] = GUIDE_PAIRS,
    level: float = 0.05,
    seed: int = 0,
) -> tuple[Decision, list[RuleReport]]:
    """Fit thresholds and pair margins on validation faces, and keep only what is shown to help.

    Each candidate rule, taken by itself, gets the value that does best on one random half of the faces. It
    is kept if on the other half it mends more faces than it breaks by more than chance explains: one-sided
    exact sign test, at `level` divided by the number of candidates (Bonferroni). Rules can undo each other:
    if those kept do not pass the test together, none is kept.

    Args:
        probabilities: the vote, `(N, L)`.
        truth: true labels, `(N,)` int64.
        labels: names of the L labels.
        pairs: pairs to try, each in both directions.
        level: probability of keeping any useless rule.
        seed: seed of the split into halves.

    Returns:
        The decision with the rules kept, and the report of every candidate.

    Source: McNemar 1947 for the test on discordant faces, in its exact binomial form.
    """
    fitted = np.random.default_rng(seed).permutation(len(truth)) < len(truth) // 2
    candidates: list[tuple[str, tuple[str, ...]]] = [("threshold", (name,)) for name in labels]
    candidates += [("pair", direction) for a, b in pairs for direction in ((a, b), (b, a))]
    thresholds: dict[str, float] = {}
    kept_pairs: list[PairRule] = []
    reports = []
    for kind, names in candidates:
        rule = _best_rule(kind, names, labels, probabilities[fitted], truth[fitted])
        value = rule.thresholds[names[0]] if kind == "threshold" else rule.pairs[0].margin
        mended, broken = _changes(rule, probabilities[~fitted], truth[~fitted])
        p_value = _sign_test(mended, broken)
        kept = p_value <= level / len(candidates)
        if kept and kind == "threshold":
            thresholds[names[0]] = value
        elif kept:
            kept_pairs.append(rule.pairs[0])
        reports.append(
            RuleReport(
                rule=f"{kind} {' > '.join(names)}",
                value=value,
                mended=mended,
                broken=broken,
                p_value=p_value,
                kept=kept,
            )
        )
    together = Decision(labels=tuple(labels), thresholds=thresholds, pairs=tuple(kept_pairs))
    if _sign_test(*_changes(together, probabilities[~fitted], truth[~fitted])) > level:
        return Decision(labels=tuple(labels)), [report.model_copy(update={"kept": False}) for report in reports]
    return together, reports


def _best_rule(
    kind: str, names: tuple[str, ...], labels: Sequence[str], probabilities: FloatArray, truth: IntArray
) -> Decision:
    def rule(value: float) -> Decision:
        if kind == "threshold":
            return Decision(labels=tuple(labels), thresholds={names[0]: value})
        pair = PairRule(leader=names[0], favoured=names[1], margin=value)
        return Decision(labels=tuple(labels), pairs=(pair,))

    def gain(value: float) -> int:
        mended, broken = _changes(rule(value), probabilities, truth)
        return mended - broken

    grid = [float(value) for value in np.round(np.arange(0.02, 0.92, 0.02), 2)]
    return rule(max(grid, key=gain))


def _changes(rule: Decision, probabilities: FloatArray, truth: IntArray) -> tuple[int, int]:
    """Faces that the rule sets right, and faces that it spoils."""
    before = probabilities.argmax(axis=1) == truth
    after = rule.decide(probabilities).label == truth
    return int((after & ~before).sum()), int((before & ~after).sum())


def _sign_test(mended: int, broken: int) -> float:
    if mended + broken == 0:
        return 1.0
    return float(binomtest(mended, mended + broken, alternative="greater").pvalue)
