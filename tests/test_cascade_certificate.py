import functools

import numpy as np
import pytest
from vote_cubes import vote_cube

from emoexport.cascade import Cascade
from emoexport.cascade_certificate import THRESHOLDS, CascadeCertificate, agreement_p, certify, fixed_sequence
from emoexport.cascade_drift import exit_drift
from emoexport.cascade_fit import fit_cascade
from emoexport.decision import Decision
from emoexport.errors import BadInput, UsageError
from emoexport.statistics import paired_interval, paired_p

DELTA = 0.05
DRAWS = 1000
# One of 1,000 simulations in which exactly 5 % fail shows more than this once in a thousand times.
ROOM = DELTA + 3.1 * np.sqrt(DELTA * (1 - DELTA) / DRAWS)
GRID = np.array(THRESHOLDS[::4])


@functools.cache
def fitted(rule: str) -> Cascade:
    scores, truth = vote_cube(1500, seed=1)
    return fit_cascade(scores, truth, decision=Decision(), rule=rule, sizes=(1, 2, 4, 8), offsets=rule == "accuracy")


@functools.cache
def population(rule: str) -> tuple[np.ndarray, np.ndarray]:
    """Of 30,000 faces at every threshold `(G, N)`: decided otherwise than the full vote; and what accuracy gains."""
    scores, truth = vote_cube(30_000, seed=2)
    paths = fitted(rule).paths(scores)
    labels = np.stack([paths.labels_at(paths.leaving(threshold)) for threshold in GRID])
    return labels != paths.labels[-1], (labels == truth).astype(np.int8) - (paths.labels[-1] == truth)


def resampled(values: np.ndarray, faces: int, seed: int) -> np.ndarray:
    """Sums over calibration sets drawn from the population: `(G, N)` to `(DRAWS, G)`."""
    rng = np.random.default_rng(seed)
    return np.stack([values[:, rng.integers(values.shape[1], size=faces)].sum(axis=1) for _ in range(DRAWS)])


def failures(passed: np.ndarray, true: np.ndarray, allowed: float) -> float:
    """How often the threshold chosen is one whose true risk is above what is allowed."""
    risk = np.r_[0.0, true][passed]
    return float((risk > allowed).mean())


@pytest.mark.parametrize(("faces", "about"), [(500, 0.02), (1000, 0.01), (1000, 0.05)])
def test_the_agreement_certified_holds(faces, about):
    """Over 1,000 calibration sets, more than epsilon truly disagree in no more than delta of them."""
    differs, _ = population("agreement")
    true = differs.mean(axis=1)
    epsilon = 0.999 * true[np.abs(true - about).argmin()]  # the hardest: one threshold is only just too risky
    counts = resampled(differs, faces, seed=3)
    passed = fixed_sequence(agreement_p(counts, faces, epsilon) <= DELTA)
    assert failures(passed, true, epsilon) <= ROOM
    assert (passed > 0).mean() > 0.9  # and it is of use
    # Wrong: to take the largest threshold at which so few disagreements were seen, without a test.
    naive = len(GRID) - np.argmax((counts <= epsilon * faces)[:, ::-1], axis=1)
    assert failures(naive, true, epsilon) > 0.4


@pytest.mark.parametrize(("faces", "about"), [(1000, 0.005), (1500, 0.01), (500, 0.03)])
def test_the_accuracy_certified_holds(faces, about):
    """Likewise of the true drop of accuracy. The test is approximate, and covers here."""
    _, gain = population("accuracy")
    true = -gain.mean(axis=1)
    max_drop = 0.999 * true[np.abs(true - about).argmin()]
    mended, broken = resampled(gain > 0, faces, seed=4), resampled(gain < 0, faces, seed=4)
    passed = fixed_sequence(paired_p(mended, broken, faces, max_drop) <= DELTA)
    assert failures(passed, true, max_drop) <= ROOM
    assert (passed > 0).mean() > 0.9
    naive = len(GRID) - np.argmax((broken - mended <= max_drop * faces)[:, ::-1], axis=1)
    assert failures(naive, true, max_drop) > 0.4


def test_taking_the_best_of_many_tests_is_wrong():
    """Twenty settings, each a little too risky and each with luck of its own: an order protects, bounds do not."""
    rng = np.random.default_rng(5)
    faces, epsilon, settings = 1000, 0.02, 20
    counts = rng.binomial(faces, 1.001 * epsilon, size=(DRAWS, settings))
    rejected = agreement_p(counts, faces, epsilon) <= DELTA
    assert (fixed_sequence(rejected) > 0).mean() <= ROOM
    assert rejected.any(axis=1).mean() > 5 * DELTA


def test_certifying_on_the_faces_of_the_fit_is_wrong():
    """Few faces, and offsets fitted to their labels: on these very faces accuracy looks better than it is."""
    flattered, honest = [], []
    for seed in range(40):
        scores, truth = vote_cube(120, seed=100 + seed, signal=0.8)
        cascade = fit_cascade(
            scores, truth, decision=Decision(), rule="accuracy", sizes=(1,), offsets=True, offset_penalty=0.0
        )
        for found, (some, labels) in ((flattered, (scores, truth)), (honest, vote_cube(2000, seed=9, signal=0.8))):
            label = cascade.paths(some).labels[0]
            found.append((label == labels).mean())
    assert np.mean(flattered) > np.mean(honest) + 0.01


def test_the_sequence_ends_at_the_first_that_is_not_rejected():
    rejected = np.array([[True, True, False, True], [False, True, True, True], [True, True, True, True]])
    assert fixed_sequence(rejected).tolist() == [2, 0, 4]
    assert fixed_sequence(rejected[0]) == 2


@pytest.mark.parametrize("max_drop", [0.005, 0.02, 0.3])
def test_the_paired_test_is_the_one_that_its_interval_inverts(max_drop):
    rng = np.random.default_rng(6)
    for faces in (40, 700):
        for mended, broken in [(0, 0), (0, 3), (3, 0), *rng.integers(0, faces // 3, size=(40, 2)).tolist()]:
            for delta in (0.01, 0.05, 0.2):
                low = paired_interval(mended, broken, faces, level=1 - 2 * delta)[0]
                p_value = float(paired_p(mended, broken, faces, max_drop))
                assert (p_value <= delta) == (low >= -max_drop) or abs(low + max_drop) < 1e-9


def test_a_certificate_says_what_was_seen(tmp_path):
    scores, truth = vote_cube(3000, seed=7)
    cascade, found = certify(
        fitted("agreement"), scores, truth, epsilon=0.02, delta=DELTA, data_sha256={"calibration": "ab" * 32}
    )
    run = cascade.run(scores)
    assert cascade.threshold == found.threshold == THRESHOLDS[found.passed - 1]
    assert found.passes_per_face == pytest.approx(run.passes.mean())
    assert 1 < found.passes_per_face < 8
    assert found.left == tuple(np.bincount(run.stage, minlength=5))
    full = fitted("agreement").run(scores).outcome.label
    assert found.disagreements == (run.outcome.label != full).sum()
    assert found.disagreements / 3000 < found.disagreement_bound <= 0.02
    gain = 100 * ((run.outcome.label == truth).mean() - (full == truth).mean())
    assert found.accuracy_points is not None
    assert found.accuracy_points.value == pytest.approx(gain, abs=1e-3)
    assert "at most 2 % of faces" in found.sentence
    (tmp_path / "certificate.json").write_text(found.to_json(), encoding="utf-8")
    assert CascadeCertificate.parse_json(tmp_path / "certificate.json") == found


def test_accuracy_is_certified_with_its_bound():
    scores, truth = vote_cube(3000, seed=8)
    cascade, found = certify(fitted("accuracy"), scores, truth, max_drop=0.01, delta=0.1)
    assert cascade.threshold is not None
    assert found.accuracy_bound_points is not None
    assert found.accuracy_bound_points >= -1
    assert "at most 1 points below" in found.sentence


@pytest.mark.parametrize(("rule", "claim"), [("agreement", {"epsilon": 0.001}), ("accuracy", {"max_drop": 0.0005})])
def test_where_nothing_is_certified_every_face_gets_the_full_vote(rule, claim):
    scores, truth = vote_cube(200, seed=9)
    cascade, found = certify(fitted(rule), scores, truth, **claim)
    assert cascade.threshold is None
    assert found.threshold is None
    assert (found.passed, found.disagreements, found.passes_per_face) == (0, 0, 12.0)
    assert found.left == (0, 0, 0, 0, 200)
    assert found.sentence.startswith("Nothing is certified")
    assert set(cascade.run(scores).passes) == {12}


def test_bad_calls_are_refused():
    scores, truth = vote_cube(100, seed=9)
    cascade = fitted("agreement")
    with pytest.raises(UsageError, match="for epsilon"):
        certify(cascade, scores, truth, max_drop=0.01)
    with pytest.raises(UsageError, match="found the limit 1;"):
        certify(cascade, scores, epsilon=1.0)
    with pytest.raises(UsageError, match="for max_drop, and for nothing else"):
        certify(fitted("accuracy"), scores, truth, max_drop=0.1, epsilon=0.1)
    with pytest.raises(UsageError, match="delta"):
        certify(cascade, scores, epsilon=0.1, delta=0.7)
    with pytest.raises(UsageError, match="must rise"):
        certify(cascade, scores, epsilon=0.1, thresholds=(0.2, 0.1))
    with pytest.raises(UsageError, match="true labels"):
        certify(fitted("accuracy"), scores, max_drop=0.1)
    with pytest.raises(BadInput, match="99 labels"):
        certify(cascade, scores, truth[1:], epsilon=0.1)
    with pytest.raises(BadInput, match="0 faces"):
        certify(cascade, scores[:0], epsilon=0.1)
    exact = fit_cascade(scores, decision=Decision(), rule="exact")
    with pytest.raises(UsageError, match="no certificate"):
        certify(exact, scores, epsilon=0.1)


def test_the_vote_that_is_meant_may_be_another_ones():
    """As that of the reference, where the scores are those of numbers with fewer bits."""
    scores, truth = vote_cube(2000, seed=11)
    cascade = fitted("agreement")
    own = cascade.paths(scores).labels[-1]
    found = certify(cascade, scores, truth, epsilon=0.02)[1]
    same = certify(cascade, scores, truth, epsilon=0.02, vote=own)[1]
    assert same == found
    other = own.copy()
    other[:10] = (own[:10] + 1) % 7
    strict = certify(cascade, scores, truth, epsilon=0.02, vote=other)[1]
    assert strict.vote_holds
    assert strict.threshold < found.threshold  # 10 of the labels that may differ are spent
    other[:100] = (own[:100] + 1) % 7
    broken, certificate = certify(cascade, scores, truth, epsilon=0.02, vote=other)
    assert not certificate.vote_holds
    assert broken.threshold is None
    assert "even where none leaves early" in certificate.sentence


def test_accuracy_may_be_asked_for_besides_agreement():
    scores, truth = vote_cube(1500, seed=12)
    cascade = fitted("agreement")
    one = certify(cascade, scores, truth, epsilon=0.05)[1]
    both = certify(cascade, scores, truth, epsilon=0.05, max_drop=0.003)[1]
    assert both.passed < one.passed
    assert both.accuracy_bound_points >= -0.3
    assert " % of faces are decided otherwise than by the full vote and accuracy is at most" in both.sentence


def test_drift_is_seen_and_seldom_where_there_is_none():
    rng = np.random.default_rng(10)
    shares = [0.6, 0.2, 0.1, 0.05, 0.03, 0.015, 0.005]
    before = rng.multinomial(1500, shares)
    alarms = [
        exit_drift(rng.multinomial(1500, shares).tolist(), rng.multinomial(400, shares).tolist(), level=0.05).drifted
        for _ in range(400)
    ]
    assert np.mean(alarms) < 0.085
    harder = exit_drift(before.tolist(), rng.multinomial(400, [0.4, 0.25, 0.15, 0.1, 0.05, 0.03, 0.02]).tolist())
    assert harder.drifted
    assert "calibrate on faces like these" in harder.sentence
    same = exit_drift(before.tolist(), before.tolist())
    assert not same.drifted
    assert same.p_value == pytest.approx(1)
    assert "as far as can be told" in same.sentence


def test_drift_with_too_little_to_compare():
    few = exit_drift([900, 50, 50], [2, 1, 0])
    assert (few.p_value, few.drifted) == (1.0, False)
    assert "too few" in few.sentence
    assert exit_drift([0, 0, 900], [0, 0, 300]).p_value == 1
    assert exit_drift([900, 60, 40], [90, 6, 4]).groups == 2  # 4 are expected at the last stage, too few
    for calibrated, used in (([1, 2], [1, 2, 3]), ([5, -1], [1, 1]), ([0, 0], [1, 1]), ([], [])):
        with pytest.raises(BadInput, match="as many of both"):
            exit_drift(calibrated, used)
    with pytest.raises(UsageError, match="level"):
        exit_drift([1, 2], [1, 2], level=1.5)
