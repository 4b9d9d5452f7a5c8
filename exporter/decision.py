"""From voted probabilities to a label: a temperature, confidence thresholds per emotion, then confusion pairs.

1. *Temperature.* Voted probabilities p become p**(1/T), normalised: above 1 the vote was too sure of itself,
   below 1 not sure enough. All that follows is about these calibrated probabilities: thresholds, margins,
   and the confidence.
2. *Thresholds.* An emotion may be decided only where its probability reaches its threshold. The label is
   the most probable emotion that may be; where none may, it is the most probable one.
3. *Confusion pairs.* A rule (a, b, margin) gives the decision to the runner-up b where a leads b by less
   than the margin: for pairs in which the model is known to lean to a.

The confidence is the probability of the label. Ties go to the emotion that comes first.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator
from scipy.optimize import minimize_scalar
from scipy.stats import binomtest, sem, t

from emoexport.config import Record
from emoexport.labels import EMOTIONS
from emoexport.outcome import Outcome

__all__ = [
    "GUIDE_PAIRS",
    "Decision",
    "DecisionFit",
    "Gain",
    "PairRule",
    "RuleReport",
    "Ruling",
    "TemperatureReport",
    "expected_calibration_error",
    "fit_decision",
]

# The pairs that the recipe names as often confused; each is tried in both directions.
GUIDE_PAIRS = (
    ("angry", "disgust"),
    ("angry", "neutral"),
    ("angry", "sad"),
    ("fear", "surprise"),
    ("neutral", "sad"),
)

_VALUES = tuple(round(0.02 * step, 2) for step in range(1, 46))
"""The thresholds and margins that are tried, 0.02 to 0.9."""

FloatArray = NDArray[np.floating]
IntArray = NDArray[np.int64]


class PairRule(Record):
    """Where `leader` is decided and leads the runner-up `favoured` by less than `margin`, decide `favoured`."""

    leader: str
    favoured: str
    margin: float = Field(gt=0, le=1)


class Ruling(NamedTuple):
    """Which rule decided about a face."""

    label: str
    rule: Literal["most probable", "threshold", "pair"]
    """The last rule that had a say."""
    sentence: str
    """What it did, for people."""


class Decision(Record):
    """The rules of one bundle; without any the most probable emotion is decided."""

    labels: tuple[str, ...] = EMOTIONS
    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """1 leaves the vote as it is."""
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

    def calibrate(self, probabilities: FloatArray) -> FloatArray:
        """Apply the temperature.

        Args:
            probabilities: the vote, `(N, L)` in [0, 1].

        Returns:
            `(N, L)` of the same dtype; rows sum to 1 and keep their order.

        Source: temperature scaling, Guo et al. 2017 (arXiv:1706.04599); the logarithm of a probability is a logit.
        """
        if self.temperature == 1:
            return probabilities
        # As shares of the largest: a power of that is 1, so no row can vanish.
        powers = (probabilities / probabilities.max(axis=1, keepdims=True)) ** (1 / self.temperature)
        calibrated: FloatArray = powers / powers.sum(axis=1, keepdims=True)
        return calibrated

    def decide(self, probabilities: FloatArray) -> Outcome:
        """Calibrate the vote and decide about N faces.

        Args:
            probabilities: the vote, `(N, L)` in [0, 1].
        """
        probabilities = self.calibrate(probabilities)
        first, second, lead = self._leaders(probabilities)
        label = np.where(lead < self.margin_array[first, second], second, first).astype(np.int64)
        answered = probabilities.astype(np.float32, copy=False)
        return Outcome(answered, label, answered[np.arange(len(label)), label])

    def ruling(self, probabilities: FloatArray) -> Ruling:
        """Tell which rule decides about one face.

        Args:
            probabilities: calibrated, as an outcome has them, `(L,)` in [0, 1].
        """
        (first,), (second,), (lead,) = self._leaders(probabilities[None])
        top, threshold, margin = int(probabilities.argmax()), self.threshold_array, self.margin_array[first, second]
        names = self.labels
        rule: Literal["most probable", "threshold", "pair"] = "most probable"
        said = f"{names[top]} is the most probable emotion."
        if first != top:
            rule = "threshold"
            said = (
                f"{names[top]} is more probable, but below its threshold of {threshold[top]:.2f}; of the emotions that "
                f"may be decided, {names[first]} is the most probable."
            )
        elif not (probabilities >= threshold).any():
            said = f"no emotion reaches its threshold, so the most probable one is decided, {names[top]}."
        if not lead < margin:
            return Ruling(names[first], rule, said[0].upper() + said[1:])
        pair = (
            f"{names[first]} leads {names[second]} by {lead:.2f}, less than the {margin:.2f} that the rule for this "
            f"pair wants, which decides {names[second]}."
        )
        said = f"{said} {pair}" if rule == "threshold" else pair
        return Ruling(names[second], "pair", said[0].upper() + said[1:])

    def _leaders(self, probabilities: FloatArray) -> tuple[NDArray[np.int64], NDArray[np.int64], FloatArray]:
        """After the thresholds: of N faces the emotion that leads, the most probable other one, and its lead."""
        rows = np.arange(len(probabilities))
        allowed = probabilities >= self.threshold_array
        allowed |= ~allowed.any(axis=1, keepdims=True)
        first = np.where(allowed, probabilities, -1.0).argmax(axis=1)
        others = np.array(probabilities, copy=True)
        others[rows, first] = -1.0
        second = others.argmax(axis=1)
        return first, second, probabilities[rows, first] - probabilities[rows, second]


class Gain(Record):
    """What rules did to the decisions about the held-out faces; accuracy in percentage points.

    The intervals are on the share of mended faces among those that change between right and wrong, given how
    many do. A lower bound above 0 and the one-sided exact sign test say the same.

    Source: McNemar 1947 for the test, Clopper and Pearson 1934 for the intervals.
    """

    faces: int
    """How many were held out."""
    mended: int
    broken: int
    points: float
    low_points: float
    """Two-sided interval at 95 %."""
    high_points: float
    bound_points: float
    """One-sided lower confidence bound, adjusted for the number of candidates."""
    p_value: float
    """Of the sign test, not adjusted."""


class RuleReport(Record):
    """What one candidate rule did on the half of the validation faces on which it was not fitted."""

    rule: str
    value: float
    gain: Gain
    kept: bool


class TemperatureReport(Record):
    """What the temperature did on the half of the validation faces on which it was not fitted."""

    temperature: float
    """As fitted; 1 is used where it is not kept."""
    faces: int
    """How many were held out."""
    nll_before: float
    """Negative log-likelihood of the true emotion, in nats a face."""
    nll_after: float
    nll_gain_bound: float
    """One-sided lower confidence bound on what a face gains: t interval on paired differences."""
    ece_before: float
    """Expected calibration error, in [0, 1]."""
    ece_after: float
    kept: bool


class DecisionFit(NamedTuple):
    """A decision, and what speaks for it."""

    decision: Decision
    temperature: TemperatureReport
    rules: tuple[RuleReport, ...]
    """Every candidate."""
    together: Gain
    """The candidates that pass alone, applied together."""


def fit_decision(
    probabilities: FloatArray,
    truth: IntArray,
    *,
    labels: Sequence[str] = EMOTIONS,
    pairs: Sequence[tuple[str, str]] = GUIDE_PAIRS,
    level: float = 0.05,
    seed: int = 0,
) -> DecisionFit:
    """Fit temperature, thresholds and pair margins on validation faces, and keep only what is shown to help.

    The faces are cut into two random halves: values are fitted on one and judged on the other. The temperature
    is kept if a lower confidence bound on the gain in log-likelihood is above 0, at `level`. Each candidate rule,
    taken by itself on calibrated probabilities, is kept if the lower bound of its gain in accuracy is above 0,
    at `level` divided by twice the number of candidates (Bonferroni; twice, because the held-out faces have
    chosen between rules with the temperature and rules without). Rules can undo each other: if those kept do
    not gain together by the same measure, at `level`, none is kept.

    Args:
        probabilities: the vote, `(N, L)`.
        truth: true labels, `(N,)` int64.
        labels: names of the L labels.
        pairs: pairs to try, each in both directions.
        level: probability of keeping a useless temperature, and of keeping any useless rule.
        seed: seed of the split into halves.
    """
    fitted = np.random.default_rng(seed).permutation(len(truth)) < len(truth) // 2
    report = _fit_temperature(probabilities, truth, fitted, level=level)
    temperature = report.temperature if report.kept else 1.0
    calibrated = Decision(labels=tuple(labels), temperature=temperature).calibrate(probabilities)
    held_out = calibrated[~fitted], truth[~fitted]
    candidates = _candidates(tuple(labels), pairs)
    rules, reports = [], []
    for name, make in candidates.items():
        value = _best_value(make, calibrated[fitted], truth[fitted])
        gain = _gain(make(value), *held_out, level=level / (2 * len(candidates)))
        kept = gain.bound_points > 0
        reports.append(RuleReport(rule=name, value=value, gain=gain, kept=kept))
        rules += [make(value)] if kept else []
    decision = _joined(rules, tuple(labels))
    together = _gain(decision, *held_out, level=level)
    if together.bound_points <= 0:
        decision = Decision(labels=tuple(labels))
        reports = [one.model_copy(update={"kept": False}) for one in reports]
    return DecisionFit(decision.model_copy(update={"temperature": temperature}), report, tuple(reports), together)


def _fit_temperature(
    probabilities: FloatArray, truth: IntArray, fitted: NDArray[np.bool_], *, level: float
) -> TemperatureReport:
    probabilities = probabilities.astype(np.float64)

    def loss(log_temperature: float) -> float:
        scaled = Decision(temperature=float(np.exp(log_temperature))).calibrate(probabilities[fitted])
        return float(_nll(scaled, truth[fitted]).mean())

    found = minimize_scalar(loss, bounds=(np.log(0.2), np.log(5.0)), method="bounded")
    temperature = round(float(np.exp(found.x)), 4)
    before, truth = probabilities[~fitted], truth[~fitted]
    after = Decision(temperature=temperature).calibrate(before)
    gain = _nll(before, truth) - _nll(after, truth)
    bound = gain.mean() - t.ppf(1 - level, len(gain) - 1) * sem(gain)
    return TemperatureReport(
        temperature=temperature,
        faces=len(truth),
        nll_before=float(_nll(before, truth).mean()),
        nll_after=float(_nll(after, truth).mean()),
        nll_gain_bound=float(bound),
        ece_before=expected_calibration_error(before, truth),
        ece_after=expected_calibration_error(after, truth),
        kept=bool(bound > 0),
    )


def _nll(probabilities: FloatArray, truth: IntArray) -> FloatArray:
    """Of each face, `(N,)`; finite where the true emotion got no probability at all."""
    likelihood = probabilities[np.arange(len(truth)), truth]
    loss: FloatArray = -np.log(np.maximum(likelihood, np.finfo(np.float32).tiny))
    return loss


def expected_calibration_error(probabilities: FloatArray, truth: IntArray, *, bins: int = 15) -> float:
    """How far confidence is from accuracy: the mean distance over bins of equal width, weighted by their faces.

    Args:
        probabilities: `(N, L)`.
        truth: true labels, `(N,)` int64.
        bins: how many, over confidences in [0, 1].

    Returns:
        A share in [0, 1].

    Source: Naeini et al. 2015; as in Guo et al. 2017 (arXiv:1706.04599), equation 3.
    """
    confidence = probabilities.max(axis=1)
    surplus = confidence - (probabilities.argmax(axis=1) == truth)
    edges = np.linspace(0, 1, bins + 1)[1:-1]
    sums = np.bincount(np.digitize(confidence, edges, right=True), weights=surplus, minlength=bins)
    return float(np.abs(sums).sum() / len(truth))


def _candidates(labels: tuple[str, ...], pairs: Sequence[tuple[str, str]]) -> dict[str, Callable[[float], Decision]]:
    """What makes each candidate rule of its value, by the rule's name."""

    def threshold(name: str) -> Callable[[float], Decision]:
        return lambda value: Decision(labels=labels, thresholds={name: value})

    def pair(leader: str, favoured: str) -> Callable[[float], Decision]:
        return lambda value: Decision(labels=labels, pairs=(PairRule(leader=leader, favoured=favoured, margin=value),))

    found = {f"threshold {name}": threshold(name) for name in labels}
    return found | {f"pair {a} > {b}": pair(a, b) for one in pairs for a, b in (one, one[::-1])}


def _best_value(make: Callable[[float], Decision], probabilities: FloatArray, truth: IntArray) -> float:
    """The threshold or margin that mends most on the fitting half, less what it breaks."""
    # A single rule sends a face to its runner-up or nowhere, so it is enough to know what sends it.
    widest = make(_VALUES[-1])
    first, second = np.sort(probabilities, axis=1)[:, :-3:-1].T
    measured = first if widest.thresholds else first - second
    effect = (widest.decide(probabilities).label == truth).astype(int) - (probabilities.argmax(axis=1) == truth)
    balance = effect @ (measured[:, None] < np.array(_VALUES))
    return _VALUES[int(balance.argmax())]


def _joined(rules: Sequence[Decision], labels: tuple[str, ...]) -> Decision:
    thresholds = {name: value for rule in rules for name, value in rule.thresholds.items()}
    return Decision(labels=labels, thresholds=thresholds, pairs=tuple(pair for rule in rules for pair in rule.pairs))


def _changes(rule: Decision, probabilities: FloatArray, truth: IntArray) -> tuple[int, int]:
    """Faces that the rule sets right, and faces that it spoils."""
    before = probabilities.argmax(axis=1) == truth
    after = rule.decide(probabilities).label == truth
    return int((after & ~before).sum()), int((before & ~after).sum())


def _gain(rule: Decision, probabilities: FloatArray, truth: IntArray, *, level: float) -> Gain:
    mended, broken = _changes(rule, probabilities, truth)
    changed = mended + broken
    if changed == 0:
        test, shares = None, (0.5, 0.5, 0.5)
    else:
        test = binomtest(mended, changed, alternative="greater")
        interval = binomtest(mended, changed).proportion_ci(0.95)
        shares = (interval.low, interval.high, test.proportion_ci(1 - level).low)
    low, high, bound = (100 * (2 * float(share) - 1) * changed / len(truth) for share in shares)
    return Gain(
        faces=len(truth),
        mended=mended,
        broken=broken,
        points=100 * (mended - broken) / len(truth),
        low_points=low,
        high_points=high,
        bound_points=bound,
        p_value=float(test.pvalue) if test else 1.0,
    )
