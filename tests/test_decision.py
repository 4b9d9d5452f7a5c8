import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from rich.console import Console
from scipy.stats import binom
from torchmetrics.functional.classification import multiclass_calibration_error

from emoexport.decision import (
    GUIDE_PAIRS,
    Decision,
    DecisionFit,
    Gain,
    PairRule,
    expected_calibration_error,
    fit_decision,
)
from emoexport.fold import Calibrate, Decide
from emoexport.labels import EMOTIONS
from emoexport.tables import rules_markdown, rules_table
from emoexport.train.checkpoint import FittedDecision

ANGRY, DISGUST, FEAR, HAPPY, SAD, SURPRISE, NEUTRAL = range(7)


def vote(**values: float) -> np.ndarray:
    row = np.array([[values.get(name, 0.0) for name in EMOTIONS]])
    rest = np.array([[name not in values for name in EMOTIONS]])
    return np.where(rest, (1 - row.sum()) / rest.sum(), row)


def test_without_rules_the_most_probable_is_decided():
    outcome = Decision().decide(vote(sad=0.5, happy=0.3))
    assert outcome.label.tolist() == [SAD]
    assert outcome.confidence[0] == pytest.approx(0.5)


def test_a_threshold_gives_the_decision_to_the_next_that_may():
    rule = Decision(thresholds={"happy": 0.6})
    assert rule.decide(vote(happy=0.55, sad=0.4)).label.tolist() == [SAD]
    assert rule.decide(vote(happy=0.65, sad=0.3)).label.tolist() == [HAPPY]


def test_where_none_may_the_most_probable_stays():
    rule = Decision(thresholds=dict.fromkeys(EMOTIONS, 0.9))
    assert rule.decide(vote(fear=0.5)).label.tolist() == [FEAR]


def test_a_pair_favours_the_runner_up_within_the_margin_only():
    rule = Decision(pairs=(PairRule(leader="neutral", favoured="sad", margin=0.1),))
    assert rule.decide(vote(neutral=0.45, sad=0.40)).label.tolist() == [SAD]
    assert rule.decide(vote(neutral=0.50, sad=0.35)).label.tolist() == [NEUTRAL]
    assert rule.decide(vote(sad=0.45, neutral=0.40)).label.tolist() == [SAD]
    assert rule.decide(vote(neutral=0.35, fear=0.33, sad=0.30)).label.tolist() == [NEUTRAL]
    outcome = rule.decide(vote(neutral=0.45, sad=0.40))
    assert outcome.confidence[0] == pytest.approx(0.40)


def test_ties_go_to_the_first():
    assert Decision().decide(np.full((1, 7), 1 / 7)).label.tolist() == [ANGRY]


def test_thresholds_margins_and_confidence_are_about_calibrated_probabilities():
    cool = Decision(temperature=0.5, thresholds={"happy": 0.6})
    assert cool.decide(vote(happy=0.5, sad=0.3)).label.tolist() == [HAPPY]  # 0.25 : 0.09, and little else
    assert Decision(thresholds={"happy": 0.6}).decide(vote(happy=0.5, sad=0.3)).label.tolist() == [SAD]
    outcome = Decision(temperature=0.5).decide(np.array([[0.6, 0.2, 0.2, 0, 0, 0, 0]]))
    assert outcome.probabilities[0] == pytest.approx(np.array([9, 1, 1, 0, 0, 0, 0]) / 11)
    assert outcome.confidence[0] == pytest.approx(9 / 11)
    near = PairRule(leader="neutral", favoured="sad", margin=0.1)
    row = vote(neutral=0.45, sad=0.40)
    assert Decision(pairs=(near,)).decide(row).label.tolist() == [SAD]
    assert Decision(pairs=(near,), temperature=0.2).decide(row).label.tolist() == [NEUTRAL]


@settings(max_examples=100, deadline=None)
@given(temperature=st.floats(0.02, 50), seed=st.integers(0, 2**32 - 1))
def test_calibration_keeps_order_and_sums_to_one(temperature, seed):
    probabilities = np.random.default_rng(seed).dirichlet(np.full(7, 0.3), size=20)
    probabilities[0] = np.eye(7)[3]
    calibrated = Decision(temperature=temperature).calibrate(probabilities)
    assert np.abs(calibrated.sum(axis=1) - 1).max() < 1e-12
    order = np.argsort(probabilities, axis=1)
    assert (np.diff(np.take_along_axis(calibrated, order, axis=1), axis=1) >= 0).all()
    assert np.array_equal(calibrated[0], probabilities[0])
    # Source: the definition, as scaled logits.
    with np.errstate(divide="ignore"):
        scaled = torch.from_numpy(np.log(probabilities) / temperature).softmax(dim=-1).numpy()
    assert np.abs(calibrated - scaled).max() < 1e-12


@pytest.mark.parametrize("temperature", [0.05, 0.5, 1.7, 20.0])
def test_the_graph_calibrates_like_numpy(temperature):
    probabilities = np.random.default_rng(0).dirichlet(np.full(7, 0.1), size=200)
    probabilities[:7] = np.eye(7)
    probabilities[7] = 1 / 7
    probabilities[8] = [0.5, 0.5, 0, 0, 0, 0, 0]
    wanted = Decision(temperature=temperature).calibrate(probabilities)
    found = Calibrate(temperature)(torch.from_numpy(probabilities)).numpy()
    assert np.abs(found - wanted).max() < 1e-12
    single = Decision(temperature=temperature).decide(probabilities.astype(np.float32)).probabilities
    assert single.dtype == np.float32
    assert np.isfinite(single).all()
    assert np.abs(single - wanted).max() < 1e-5


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("inf"), float("nan")])
def test_a_temperature_is_positive_and_finite(temperature):
    with pytest.raises(ValidationError):
        Decision(temperature=temperature)


names = st.sampled_from(EMOTIONS)
decisions = st.builds(
    Decision,
    thresholds=st.dictionaries(names, st.floats(0.05, 0.9), max_size=4),
    pairs=st.lists(st.builds(PairRule, leader=names, favoured=names, margin=st.floats(0.01, 0.5)), max_size=5).map(
        tuple
    ),
)


@settings(max_examples=200, deadline=None)
@given(decision=decisions, seed=st.integers(0, 2**32 - 1))
def test_the_graph_decides_like_numpy(decision, seed):
    logits = np.random.default_rng(seed).normal(size=(40, 7))
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    probabilities[0] = 1 / 7
    probabilities = probabilities.astype(np.float32)
    label, confidence = Decide(decision)(torch.from_numpy(probabilities))
    wanted = decision.decide(probabilities)
    assert np.array_equal(label.numpy(), wanted.label)
    assert np.array_equal(confidence.numpy(), wanted.confidence)


def leaning(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A vote that gives half of the sad faces to neutral, narrowly, and is right about the rest."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, 7, n)
    logits = rng.normal(scale=0.2, size=(n, 7))
    logits[np.arange(n), truth] += 3
    lean = (truth == SAD) & (rng.random(n) < 0.5)
    logits[lean, NEUTRAL] = logits[lean, SAD] + 0.05
    return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True), truth


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def drawn_from(probabilities: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """True labels that have exactly these probabilities."""
    return (probabilities.cumsum(axis=1)[:, :-1] < rng.random((len(probabilities), 1))).sum(axis=1)


def most_of(simulations: int, chance: float) -> int:
    """What a count with this chance exceeds once in 10,000."""
    return int(binom.ppf(1 - 1e-4, simulations, chance))


def as_kept(fit: DecisionFit) -> FittedDecision:
    return FittedDecision(
        decision=fit.decision, temperature=fit.temperature, candidates=fit.rules, together=fit.together
    )


def test_a_rule_that_helps_is_found_and_helps_on_new_faces():
    fit = fit_decision(*leaning(2000, seed=1))
    assert any(report.kept and report.rule == "pair neutral > sad" for report in fit.rules)
    probabilities, truth = leaning(2000, seed=2)
    gain = (fit.decision.decide(probabilities).label == truth).mean() - (probabilities.argmax(axis=1) == truth).mean()
    assert gain > 0.05
    assert fit.together.bound_points < 100 * gain < fit.together.high_points + 2


@pytest.mark.parametrize("planted", [0.5, 1.0, 1.8, 3.0])
def test_a_planted_temperature_is_recovered(planted):
    rng = np.random.default_rng(4)
    logits = rng.normal(scale=2, size=(6000, 7))
    truth = drawn_from(softmax(logits), rng)
    fit = fit_decision(softmax(logits * planted), truth)
    assert fit.temperature.temperature == pytest.approx(planted, rel=0.08)
    assert fit.temperature.kept == (planted != 1)
    assert fit.decision.temperature == (fit.temperature.temperature if planted != 1 else 1)
    if planted != 1:
        assert 0 < fit.temperature.nll_gain_bound < fit.temperature.nll_before - fit.temperature.nll_after
        assert fit.temperature.ece_after < fit.temperature.ece_before / 2


def test_a_rule_is_found_under_a_planted_temperature():
    """Rules are fitted on calibrated probabilities, so they hold for those."""
    probabilities, truth = leaning(4000, seed=1)
    sharp = Decision(temperature=0.5).calibrate(probabilities)
    fit = fit_decision(sharp, truth)
    assert fit.temperature.kept
    assert any(report.kept and report.rule == "pair neutral > sad" for report in fit.rules)
    new, labels = leaning(2000, seed=2)
    before = (new.argmax(axis=1) == labels).mean()
    decided = fit.decision.decide(Decision(temperature=0.5).calibrate(new)).label
    assert (decided == labels).mean() > before + 0.05


def test_a_useless_temperature_and_useless_rules_are_seldom_kept():
    """Votes that are right about their own chances: neither can gain."""
    simulations, temperatures, rules = 200, 0, 0
    for seed in range(simulations):
        rng = np.random.default_rng(seed)
        probabilities = rng.dirichlet(np.ones(7), size=300)
        fit = fit_decision(probabilities, drawn_from(probabilities, rng))
        temperatures += fit.temperature.kept
        rules += any(report.kept for report in fit.rules)
    assert temperatures <= most_of(simulations, 0.05)
    assert rules <= most_of(simulations, 0.05)


@pytest.mark.slow
def test_rules_that_neither_gain_nor_lose_are_seldom_kept():
    """The hardest case: labels that have nothing to do with the vote, so that every rule mends as much as it breaks."""
    simulations, kept = 200, 0
    for seed in range(simulations):
        rng = np.random.default_rng(seed)
        fit = fit_decision(rng.dirichlet(np.ones(7), size=300), rng.integers(0, 7, 300))
        kept += any(report.kept for report in fit.rules)
    assert kept <= most_of(simulations, 0.05)


@pytest.mark.parametrize("level", [0.05, 0.05 / 34])
def test_a_bound_above_zero_is_the_exact_sign_test(level):
    """On faces of which a rule changes 40, for every number of them that it mends."""
    truth = np.zeros(200, dtype=np.int64)
    rule = Decision(pairs=(PairRule(leader="sad", favoured="angry", margin=0.2),))
    back = Decision(pairs=(PairRule(leader="angry", favoured="sad", margin=0.2),))
    from emoexport.decision import _gain

    for mended in range(41):
        probabilities = np.tile(vote(angry=0.9), (200, 1))
        probabilities[:mended] = vote(sad=0.5, angry=0.4)
        probabilities[mended:40] = vote(sad=0.5, angry=0.4)[:, [SAD, DISGUST, FEAR, HAPPY, ANGRY, SURPRISE, NEUTRAL]]
        both = Decision(pairs=(*rule.pairs, *back.pairs))
        gain = _gain(both, probabilities, truth, level=level)
        assert (gain.mended, gain.broken) == (mended, 40 - mended)
        assert gain.points == pytest.approx(100 * (2 * mended - 40) / 200)
        assert gain.low_points <= gain.points <= gain.high_points
        assert gain.bound_points <= gain.points
        p_value = binom.sf(mended - 1, 40, 0.5)
        assert gain.p_value == pytest.approx(p_value)
        assert (gain.bound_points > 0) == (p_value < level)


def test_a_rule_that_changes_nothing_gains_nothing():
    fit = fit_decision(np.eye(7)[np.arange(70) % 7], np.arange(70) % 7)
    assert not any(report.kept for report in fit.rules)
    assert not fit.temperature.kept
    assert fit.decision == Decision()
    assert fit.together == Gain(
        faces=35,
        mended=0,
        broken=0,
        points=0,
        low_points=0,
        high_points=0,
        bound_points=0,
        p_value=1,
    )


def test_the_value_of_a_rule_is_the_best_of_all_that_are_tried():
    """By trying them all, face after face."""
    from emoexport.decision import _VALUES, _best_value, _candidates, _changes

    rng = np.random.default_rng(3)
    probabilities = rng.dirichlet(np.ones(7), size=300)
    truth = drawn_from(probabilities**0.5 / (probabilities**0.5).sum(axis=1, keepdims=True), rng)
    for make in _candidates(EMOTIONS, GUIDE_PAIRS).values():
        changes = [_changes(make(value), probabilities, truth) for value in _VALUES]
        balance = [mended - broken for mended, broken in changes]
        assert _best_value(make, probabilities, truth) == _VALUES[int(np.argmax(balance))]


def test_every_pair_is_tried_in_both_directions():
    tried = {report.rule for report in fit_decision(*leaning(140, seed=0)).rules}
    assert {f"pair {x} > {y}" for a, b in GUIDE_PAIRS for x, y in ((a, b), (b, a))} <= tried
    assert len(tried) == 7 + 10


@pytest.mark.parametrize("sharpness", [0.3, 1.0, 3.0])
def test_the_calibration_error_is_that_of_torchmetrics(sharpness):
    rng = np.random.default_rng(7)
    logits = rng.normal(size=(500, 7))
    truth = drawn_from(softmax(logits), rng)
    found = expected_calibration_error(softmax(sharpness * logits), truth)
    wanted = multiclass_calibration_error(
        torch.from_numpy(softmax(sharpness * logits)), torch.from_numpy(truth), num_classes=7, n_bins=15, norm="l1"
    )
    assert found == pytest.approx(float(wanted), abs=1e-6)


def test_the_report_of_the_rules_survives_json_and_is_a_table(tmp_path):
    fitted = as_kept(fit_decision(*leaning(2000, seed=1)))
    (tmp_path / "decision.json").write_text(fitted.to_json())
    assert FittedDecision.parse_json(tmp_path / "decision.json") == fitted
    assert rules_table(fitted).row_count == len(fitted.candidates) + 1
    assert Console(width=200).measure(rules_table(fitted)).maximum <= 80
    markdown = rules_markdown(fitted)
    line = next(line for line in markdown.splitlines() if line.startswith("| pair neutral > sad"))
    assert line.endswith("| yes |")
    assert f"temperature {fitted.temperature.temperature:.3f}" in markdown
    assert "all that pass" in markdown


def test_rules_about_unknown_emotions_are_refused():
    with pytest.raises(ValidationError, match="bored"):
        Decision(thresholds={"bored": 0.5})
    with pytest.raises(ValidationError):
        Decision(thresholds={"sad": 1.5})
