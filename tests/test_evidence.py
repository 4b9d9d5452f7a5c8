"""What faces say of an engine: figures of hand-made outcomes, and how often bounds hold in simulation."""

import numpy as np
import pytest
from scipy.special import softmax

from emoexport.evidence import evidence_of
from emoexport.labels import EMOTIONS
from emoexport.outcome import Outcome
from emoexport.statistics import exact_bound, mcnemar_p


def outcome(labels: np.ndarray, *, sharpness: float = 2.0, seed: int = 0) -> Outcome:
    """Probabilities whose largest is at these labels."""
    logits = np.random.default_rng(seed).normal(0, 0.1, (len(labels), 7))
    logits[np.arange(len(labels)), labels] += sharpness
    probabilities = softmax(logits, axis=1).astype(np.float32)
    return Outcome(probabilities, labels.astype(np.int64), probabilities.max(axis=1))


def test_an_engine_that_is_the_reference():
    truth = np.arange(700) % 7
    same = outcome(truth)
    found = evidence_of(same, same, truth, EMOTIONS)
    assert (found.faces, found.engine_only_right, found.reference_only_right, found.disagreements) == (700, 0, 0, 0)
    assert found.mcnemar_p == 1
    assert found.divergence_nats == 0
    assert found.gain_points.value == 0
    assert found.gain_points.low < 0 < found.gain_points.high
    assert found.disagreement_bound == pytest.approx(1 - 0.05 ** (1 / 700), rel=1e-3)  # the rule of three, exactly
    assert found.calibration_error == found.reference_calibration_error
    assert set(found.recall) == set(EMOTIONS)
    assert all(change.faces == 100 for change in found.recall.values())
    assert len(found.worst) == 10


def test_changes_are_counted_where_they_are():
    truth = np.arange(700) % 7
    reference, engine = truth.copy(), truth.copy()
    reference[:21] = (truth[:21] + 1) % 7  # wrong in 21 faces, 3 of each emotion
    engine[:7] = reference[:7]  # 7 of them wrong in the same way
    engine[100] = (truth[100] + 2) % 7  # and one that only the reference has right
    found = evidence_of(outcome(engine), outcome(reference), truth, EMOTIONS)
    assert (found.engine_only_right, found.reference_only_right, found.disagreements) == (14, 1, 15)
    assert found.gain_points.value == pytest.approx(100 * 13 / 700, abs=1e-3)
    assert found.gain_points.low > 0
    assert found.bound_points > found.gain_points.low
    assert found.mcnemar_p == pytest.approx(2 * 16 / 2**15, abs=1e-5)
    hit = EMOTIONS[100 % 7]
    assert found.recall[hit].points.value == pytest.approx(1.0, abs=1e-6)  # 2 of 100 mended, 1 broken
    assert {face.index for face in found.worst} <= {*range(7, 21), 100}
    assert found.worst[0].largest_difference >= found.worst[-1].largest_difference > 0.3


def test_a_sharper_engine_diverges():
    truth = np.zeros(50, dtype=int)
    found = evidence_of(outcome(truth, sharpness=4), outcome(truth), truth, EMOTIONS)
    assert found.divergence_nats > 0.1
    assert found.disagreements == 0
    assert set(found.recall) == {EMOTIONS[0]}


def test_an_engine_without_numbers_is_told_as_such():
    truth = np.zeros(5, dtype=int)
    broken = outcome(truth)
    broken.probabilities[2] = np.nan
    found = evidence_of(broken, outcome(truth), truth, EMOTIONS)
    assert np.isnan(found.divergence_nats)
    assert found.worst[0].index == 2


@pytest.mark.parametrize("share", [0.0, 0.002, 0.01, 0.05])
def test_a_bound_on_labels_that_change_holds_often_enough(share):
    counts = np.random.default_rng(1).binomial(1500, share, 2000)
    held = np.mean([share <= exact_bound(int(count), 1500) for count in counts])
    assert held >= 0.94


def test_mcnemar_is_a_test_of_its_size():
    rng = np.random.default_rng(2)
    rejected = np.mean([mcnemar_p(int(count), 20 - int(count)) < 0.05 for count in rng.binomial(20, 0.5, 4000)])
    assert rejected <= 0.055
    assert mcnemar_p(6, 0) == pytest.approx(2 / 64)
    assert mcnemar_p(0, 5) > 0.05
