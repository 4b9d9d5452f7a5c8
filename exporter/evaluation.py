"""What a vote is worth on labelled faces: figures with their intervals, and the gain of each step that made it.

All intervals are 95 %: Wilson's on shares, Tango's on paired differences of accuracy, and the bootstrap
over faces on everything else.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, SupportsFloat

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics.functional.classification import (
    binary_calibration_error,
    multiclass_accuracy,
    multiclass_confusion_matrix,
    multiclass_f1_score,
    multiclass_precision,
    multiclass_recall,
)

from emoexport.config import Record
from emoexport.decision import Decision
from emoexport.outcome import Outcome
from emoexport.statistics import (
    Estimate,
    basic_interval,
    changed,
    paired_interval,
    percentile_interval,
    resampled_sums,
    wilson_interval,
)

__all__ = [
    "BINS",
    "CalibrationBin",
    "ClassFigures",
    "ComparedRows",
    "ComparedStep",
    "Comparison",
    "EvaluatedMember",
    "EvaluationReport",
    "Figures",
    "Gain",
    "RowsResult",
    "Step",
    "assess",
    "compare",
    "outcomes_of_steps",
]

BINS = 15
"""Of the calibration error, of equal width over [0, 1]."""

# The rules of a decision in the order in which they apply: a step's name, and the field that holds its rules.
_RULES = {"temperature": "temperature", "thresholds": "thresholds", "confusion pairs": "pairs"}

# A probability that float32 rounds to 0 would make the likelihood infinite.
_SMALLEST = float(np.finfo(np.float32).tiny)

FloatArray = NDArray[np.floating]
IntArray = NDArray[np.int64]


class ClassFigures(Record):
    """One emotion."""

    label: str
    faces: int
    """How many truly show it."""
    recall: Estimate | None
    """None where no face shows it."""
    precision: Estimate | None
    """None where it is never decided."""


class CalibrationBin(Record):
    """Faces whose confidence lies in one of the equal bins."""

    faces: int
    confidence: float
    """Mean of theirs, in [0, 1]."""
    accuracy: Estimate


class Figures(Record):
    """All figures of one setting on one set of rows. Shares are in [0, 1]."""

    faces: int
    accuracy: Estimate
    macro_f1: Estimate
    ece: Estimate
    """Expected calibration error: confidence of the decided label against how often it is right.

    Its interval is the least sure of all: on simulated faces of known error it held 90 to 98 % of the time, but
    84 % for an error of 0.05 among 500 faces."""
    nll: Estimate
    """Mean negative log likelihood of the true label, in nats."""
    classes: tuple[ClassFigures, ...]
    confusion: tuple[tuple[int, ...], ...]
    """Counts: row the true label, column the decided one."""
    calibration: tuple[CalibrationBin, ...]
    """Bins that hold faces, in rising order."""


class Gain(Record):
    """What a step changes, face by face, against the step before."""

    points: Estimate
    """Accuracy, in percentage points."""
    mended: int
    """Faces that only the later step gets right."""
    broken: int
    """Faces that only the earlier step gets right."""
    ece: Estimate
    """Change of the calibration error; below 0 is better."""
    nll: Estimate
    """Change of the negative log likelihood; below 0 is better."""

    @property
    def verdict(self) -> Literal["gain", "loss", "no gain shown"]:
        """Whether the interval on the accuracy excludes 0, and on which side."""
        if self.points.low > 0:
            return "gain"
        return "loss" if self.points.high < 0 else "no gain shown"


class Step(Record):
    """The ensemble up to one step."""

    name: str
    accuracy: Estimate
    ece: float
    nll: float
    gain: Gain | None
    """None for the first step."""


class RowsResult(Record):
    """One set of rows."""

    rows: str
    """`all`, or `clean`: no copies, leaks, contradictions or blanks."""
    figures: Figures
    steps: tuple[Step, ...]
    """In the order in which they are added; the figures are those of the last."""


class EvaluatedMember(Record):
    """Who was evaluated."""

    file: str
    sha256: str
    backbone: str
    validation_accuracy: float


class ComparedStep(Record):
    """Two ensembles up to the same step."""

    name: str
    accuracy: Estimate
    """Of the one evaluated."""
    other: Estimate
    """Of the one that it is held against."""
    gain: Gain
    """Of the first over the second."""


class ComparedRows(Record):
    """One set of rows, as in `RowsResult`."""

    rows: str
    faces: int
    steps: tuple[ComparedStep, ...]


class Comparison(Record):
    """Another ensemble on the same faces, voting with the same steps."""

    name: str
    members: tuple[EvaluatedMember, ...]
    views: tuple[str, ...]
    results: tuple[ComparedRows, ...]


class EvaluationReport(Record):
    """`reports/evaluation.json`."""

    schema_version: Literal[1] = 1
    created: str
    data: str
    split: str
    data_sha256: str
    skipped: int
    """Faces of the data that could not be read, in all its splits."""
    members: tuple[EvaluatedMember, ...]
    """Those that vote; the first is the one of the single pass."""
    views: tuple[str, ...]
    tta: bool
    ensemble: bool
    post_process: bool
    notes: tuple[str, ...]
    """What a reader of the figures must know, a sentence each."""
    labels: tuple[str, ...]
    results: tuple[RowsResult, ...]
    against: Comparison | None = None
    machine: dict[str, str]

    @property
    def setting(self) -> str:
        """What was evaluated, in words."""
        rules = ", post-processed" if self.post_process else ""
        return f"{_counted(len(self.members), 'member')} x {_counted(len(self.views), 'view')}{rules}"


def outcomes_of_steps(
    scores: FloatArray,
    *,
    labels: Sequence[str],
    tta: bool,
    ensemble: bool,
    decision: Decision | None = None,
    voting: slice = slice(None),
) -> dict[str, Outcome]:
    """What is decided after each step, each added to those before it.

    Args:
        scores: probabilities of every pass, `(N, K, V, L)`; member 0 is the best, view 0 the untouched face.
        labels: names of the L labels.
        tta: whether to add the views.
        ensemble: whether to add the members.
        decision: the rules to add, one kind after the other; None for none.
        voting: which views vote, where the untouched face is none of them.

    Returns:
        By the step's name, in order. The first is the single pass.
    """
    votes = {"single pass": scores[:, 0, 0]}
    if tta:
        votes["+ TTA"] = scores[:, 0, voting].mean(axis=1)
    if ensemble:
        votes["+ ensemble"] = scores[:, :, voting if tta else slice(1)].mean(axis=(1, 2))
    so_far = Decision(labels=tuple(labels))
    outcomes = {name: so_far.decide(vote) for name, vote in votes.items()}
    if decision is not None:
        *_, vote = votes.values()
        for name, rules in _RULES.items():
            so_far = so_far.model_copy(update={rules: getattr(decision, rules)})
            outcomes[f"+ {name}"] = so_far.decide(vote)
    return outcomes


def assess(
    outcomes: Mapping[str, Outcome],
    truth: IntArray,
    *,
    labels: Sequence[str],
    rows: str = "all",
    resamples: int = 2000,
    seed: int = 0,
) -> RowsResult:
    """Judge each step on the same faces.

    Args:
        outcomes: what each step says of N faces, in the order in which the steps are added.
        truth: true labels, `(N,)`.
        labels: names of the L labels.
        rows: which rows these are.
        resamples: how often the bootstrap draws the faces anew, the same for all steps.
        seed: seed of the draws.
    """
    said = list(outcomes.values())
    summands = [_summands(outcome, truth) for outcome in said]
    drawn = resampled_sums(np.hstack(summands), resamples=resamples, seed=seed) / len(truth)
    found = [_Resampled.of(means, len(labels)) for means in np.split(drawn, len(said), axis=1)]
    steps: list[Step] = []
    for name, place in zip(outcomes, range(len(said)), strict=True):
        steps.append(
            Step(
                name=name,
                accuracy=_accuracy(said[place], truth),
                ece=_rounded(_ece(said[place], truth)),
                nll=_rounded(_nll(said[place], truth).mean()),
                gain=_gain(said[place - 1 : place + 1], found[place - 1 : place + 1], truth) if place else None,
            )
        )
    figures = _figures(said[-1], found[-1], truth, labels, resamples=resamples, seed=seed)
    return RowsResult(rows=rows, figures=figures, steps=tuple(steps))


def compare(
    outcomes: Mapping[str, Outcome],
    others: Mapping[str, Outcome],
    truth: IntArray,
    *,
    labels: Sequence[str],
    rows: str = "all",
    resamples: int = 2000,
    seed: int = 0,
) -> ComparedRows:
    """Hold one ensemble against another, step by step and face by face.

    Args:
        outcomes: what each step of the one says of N faces.
        others: what the same steps of the other say of them.
        truth: true labels, `(N,)`.
        labels: names of the L labels.
        rows: which rows these are.
        resamples: how often the bootstrap draws the faces anew, the same for both.
        seed: seed of the draws.
    """
    steps: list[ComparedStep] = []
    for name, outcome in outcomes.items():
        pair = {"other": others[name], name: outcome}
        other, step = assess(pair, truth, labels=labels, rows=rows, resamples=resamples, seed=seed).steps
        assert step.gain is not None  # a second step has one
        steps.append(ComparedStep(name=name, accuracy=step.accuracy, other=other.accuracy, gain=step.gain))
    return ComparedRows(rows=rows, faces=len(truth), steps=tuple(steps))


class _Resampled(NamedTuple):
    """Figures of B resamples, `(B,)` each."""

    macro_f1: NDArray[np.float64]
    ece: NDArray[np.float64]
    nll: NDArray[np.float64]

    @classmethod
    def of(cls, means: NDArray[np.float64], labels: int) -> "_Resampled":
        """Take apart means of `_summands` over resampled faces, `(B, L*L + BINS + 1)`."""
        confusion = means[:, : labels * labels].reshape(-1, labels, labels)
        right = np.diagonal(confusion, axis1=1, axis2=2)
        seen = confusion.sum(axis=1) + confusion.sum(axis=2)
        with np.errstate(invalid="ignore"):  # an emotion neither shown nor decided does not count
            macro_f1 = np.nanmean(np.where(seen > 0, 2 * right / seen, np.nan), axis=1)
        return cls(macro_f1, np.abs(means[:, labels * labels : -1]).sum(axis=1), means[:, -1])


def _summands(outcome: Outcome, truth: IntArray) -> NDArray[np.float64]:
    """What each face adds to the confusion matrix, to the gap of its bin, to the likelihood: `(N, L*L + BINS + 1)`."""
    labels = outcome.probabilities.shape[1]
    rows = np.arange(len(truth))
    columns = np.zeros((len(truth), labels * labels + BINS + 1))
    columns[rows, truth * labels + outcome.label] = 1.0
    columns[rows, labels * labels + _bin_of(outcome.confidence)] = (outcome.label == truth) - _below_one(
        outcome.confidence
    )
    columns[:, -1] = _nll(outcome, truth)
    return columns


def _figures(
    outcome: Outcome, found: _Resampled, truth: IntArray, labels: Sequence[str], *, resamples: int, seed: int
) -> Figures:
    count = len(labels)
    decided, true = torch.from_numpy(outcome.label), torch.from_numpy(truth)
    confusion = multiclass_confusion_matrix(decided, true, num_classes=count).numpy()
    macro_f1 = multiclass_f1_score(decided, true, num_classes=count, average="macro")
    calibrated = _calibrated_eces(outcome, resamples=resamples, seed=seed)
    return Figures(
        faces=len(truth),
        accuracy=_accuracy(outcome, truth),
        macro_f1=_estimate(macro_f1, percentile_interval(found.macro_f1)),
        ece=_estimate(*_ece_interval(_ece(outcome, truth), found.ece, calibrated)),
        nll=_estimate(_nll(outcome, truth).mean(), percentile_interval(found.nll)),
        classes=_classes(decided, true, confusion, labels),
        confusion=tuple(tuple(row) for row in confusion.tolist()),
        calibration=_calibration(outcome, truth),
    )


def _classes(decided: Tensor, true: Tensor, confusion: IntArray, labels: Sequence[str]) -> tuple[ClassFigures, ...]:
    recall = multiclass_recall(decided, true, num_classes=len(labels), average="none")
    precision = multiclass_precision(decided, true, num_classes=len(labels), average="none")
    right, shown, called = confusion.diagonal(), confusion.sum(axis=1), confusion.sum(axis=0)
    return tuple(
        ClassFigures(
            label=label,
            faces=int(shown[row]),
            recall=_share(recall[row], right[row], shown[row]),
            precision=_share(precision[row], right[row], called[row]),
        )
        for row, label in enumerate(labels)
    )


def _share(value: SupportsFloat, count: int, total: int) -> Estimate | None:
    return _estimate(value, wilson_interval(int(count), int(total))) if total else None


def _accuracy(outcome: Outcome, truth: IntArray) -> Estimate:
    decided, true = torch.from_numpy(outcome.label), torch.from_numpy(truth)
    accuracy = multiclass_accuracy(decided, true, num_classes=outcome.probabilities.shape[1], average="micro")
    return _estimate(accuracy, wilson_interval(int((outcome.label == truth).sum()), len(truth)))


def _calibration(outcome: Outcome, truth: IntArray) -> tuple[CalibrationBin, ...]:
    right, place = outcome.label == truth, _bin_of(outcome.confidence)
    bins = []
    for members in (place == number for number in np.unique(place)):
        hits, faces = int(right[members].sum()), int(members.sum())
        bins.append(
            CalibrationBin(
                faces=faces,
                confidence=_rounded(outcome.confidence[members].mean()),
                accuracy=_estimate(hits / faces, wilson_interval(hits, faces)),
            )
        )
    return tuple(bins)


def _ece(outcome: Outcome, truth: IntArray) -> float:
    """Expected calibration error of the decided labels. Source: Guo et al. 2017 (arXiv:1706.04599)."""
    right = torch.from_numpy((outcome.label == truth).astype(np.int64))
    confidence = torch.from_numpy(_below_one(outcome.confidence))
    return float(binary_calibration_error(confidence, right, n_bins=BINS, norm="l1"))


def _ece_interval(value: float, resampled: FloatArray, calibrated: FloatArray) -> tuple[float, tuple[float, float]]:
    """The error and its interval.

    A sample of a calibrated model has an error above 0 too, and resampling adds to it: so resampled errors are
    mirrored, and the interval begins at 0 where at least 1 in 20 `calibrated` ones is as large.

    Source: Broecker and Smith 2007, "Increasing the reliability of reliability diagrams", for the errors of a
        calibrated model.
    """
    low, high = basic_interval(value, resampled)
    low = 0.0 if value <= np.quantile(calibrated, 0.95) else min(max(0.0, low), value)
    return value, (low, max(high, value))


def _calibrated_eces(outcome: Outcome, *, resamples: int, seed: int) -> NDArray[np.float64]:
    """Errors `(B,)` that the same faces would show if each confidence were the probability to be right."""
    rng = np.random.default_rng(seed)
    confidence = _below_one(outcome.confidence).astype(np.float64)
    place = np.eye(BINS)[_bin_of(outcome.confidence)]
    draws = ((rng.random(len(confidence)) < confidence) - confidence for _ in range(resamples))
    return np.array([np.abs(gaps @ place).sum() for gaps in draws]) / len(confidence)


def _nll(outcome: Outcome, truth: IntArray) -> NDArray[np.float64]:
    """Negative log likelihood of the true label of each face, `(N,)`."""
    true = outcome.probabilities[np.arange(len(truth)), truth].astype(np.float64)
    likelihood: NDArray[np.float64] = -np.log(np.maximum(true, _SMALLEST))
    return likelihood


def _gain(said: Sequence[Outcome], found: Sequence[_Resampled], truth: IntArray) -> Gain:
    """What the second of two steps changes."""
    (earlier, later), (resampled_earlier, resampled_later) = said, found
    before, after = earlier.label == truth, later.label == truth
    mended, broken = changed(before, after)
    low, high = paired_interval(mended, broken, len(truth))
    ece = _ece(later, truth) - _ece(earlier, truth)
    nll = float((_nll(later, truth) - _nll(earlier, truth)).mean())
    return Gain(
        points=_estimate(100 * (mended - broken) / len(truth), (100 * low, 100 * high)),
        mended=mended,
        broken=broken,
        ece=_estimate(ece, basic_interval(ece, resampled_later.ece - resampled_earlier.ece)),
        nll=_estimate(nll, percentile_interval(resampled_later.nll - resampled_earlier.nll)),
    )


def _below_one(confidence: NDArray[np.float32]) -> NDArray[np.float32]:
    """Confidences in [0, 1): the last bin is closed, not followed by one for exactly 1."""
    return np.minimum(confidence, np.nextafter(np.float32(1), np.float32(0)))


def _bin_of(confidence: NDArray[np.float32]) -> IntArray:
    """The bins `(N,)` of confidences, with the edges that torchmetrics has."""
    edges = torch.linspace(0, 1, BINS + 1).numpy()
    return np.digitize(_below_one(confidence), edges).astype(np.int64) - 1


def _estimate(value: SupportsFloat, interval: tuple[float, float]) -> Estimate:
    return Estimate(value=_rounded(value), low=_rounded(interval[0]), high=_rounded(interval[1]))


def _rounded(value: SupportsFloat) -> float:
    return round(float(value), 6) + 0.0  # no -0.0


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
