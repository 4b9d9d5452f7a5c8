"""What labelled faces say of an engine against the reference, face by face, with how sure they are of it."""

import numpy as np
from numpy.typing import NDArray

from emoexport.calib.sensitivity import cost_of
from emoexport.config import Record
from emoexport.decision import expected_calibration_error
from emoexport.outcome import Outcome
from emoexport.statistics import Estimate, changed, exact_bound, mcnemar_p, paired_bound, paired_points

__all__ = ["Evidence", "FaceDifference", "RecallChange", "evidence_of"]

_WORST = 10


class RecallChange(Record):
    """How much more often an emotion is found by the engine."""

    faces: int
    """With this emotion."""
    points: Estimate
    """Recall of the engine less that of the reference, paired 95 % interval."""


class FaceDifference(Record):
    """A face on which the two differ; its picture is in nobody's report."""

    index: int
    """Among all faces that were read for the comparison, in their order."""
    largest_difference: float
    """Of the probabilities of its emotions."""
    label: int
    """By the engine, as in the next."""
    reference_label: int
    true_label: int


class Evidence(Record):
    """An engine and the reference on the same N faces."""

    faces: int
    engine_only_right: int
    reference_only_right: int
    mcnemar_p: float
    """Two-sided, that both are right equally often."""
    gain_points: Estimate
    """Accuracy of the engine less that of the reference, paired 95 % interval."""
    bound_points: float
    """Its lower bound, one-sided at 95 %: -0.3 says that no more than 0.3 points are lost."""
    disagreements: int
    disagreement_bound: float
    """Share of faces on which they decide differently, no more than this at 95 %, one-sided."""
    recall: dict[str, RecallChange]
    """By emotion that some face has."""
    divergence_nats: float
    """Mean Kullback-Leibler divergence of the engine's probabilities from the reference's."""
    calibration_error: float
    """Expected, of the engine; and in the next of the reference."""
    reference_calibration_error: float
    worst: tuple[FaceDifference, ...]
    """The ten whose probabilities differ most."""


def evidence_of(
    engine: Outcome,
    reference: Outcome,
    truth: NDArray[np.int64],
    labels: tuple[str, ...],
    index: NDArray[np.int64] | None = None,
) -> Evidence:
    """Hold an engine against the reference.

    Args:
        engine: what the engine says of N faces.
        reference: what the reference says of them.
        truth: true labels, `(N,)`.
        labels: the emotions, by index.
        index: what the faces are numbered by, `(N,)`; their order if None.
    """
    right, reference_right = engine.label == truth, reference.label == truth
    cost, faces = cost_of(reference, engine, truth), len(truth)
    return Evidence(
        faces=faces,
        engine_only_right=cost.mended,
        reference_only_right=cost.broken,
        mcnemar_p=round(mcnemar_p(cost.mended, cost.broken), 6),
        gain_points=paired_points(cost.mended, cost.broken, faces),
        bound_points=round(100 * paired_bound(cost.mended, cost.broken, faces), 4),
        disagreements=cost.changed,
        disagreement_bound=round(exact_bound(cost.changed, faces), 6),
        recall={
            name: _recall(right[truth == index], reference_right[truth == index])
            for index, name in enumerate(labels)
            if (truth == index).any()
        },
        divergence_nats=float(f"{cost.kl:.6g}"),
        calibration_error=round(expected_calibration_error(engine.probabilities, truth), 6),
        reference_calibration_error=round(expected_calibration_error(reference.probabilities, truth), 6),
        worst=_worst(engine, reference, truth, np.arange(faces) if index is None else index),
    )


def _recall(right: NDArray[np.bool_], reference_right: NDArray[np.bool_]) -> RecallChange:
    return RecallChange(faces=len(right), points=paired_points(*changed(reference_right, right), len(right)))


def _worst(
    engine: Outcome, reference: Outcome, truth: NDArray[np.int64], numbers: NDArray[np.int64]
) -> tuple[FaceDifference, ...]:
    differences = np.abs(engine.probabilities.astype(np.float64) - reference.probabilities).max(axis=1)
    order = np.argsort(-np.nan_to_num(differences, nan=np.inf), kind="stable")[:_WORST]
    return tuple(
        FaceDifference(
            index=int(numbers[index]),
            largest_difference=float(f"{differences[index]:.6g}"),
            label=int(engine.label[index]),
            reference_label=int(reference.label[index]),
            true_label=int(truth[index]),
        )
        for index in order
    )
