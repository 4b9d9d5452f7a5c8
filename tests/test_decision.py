import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from emoexport.decision import Decision, PairRule, fit_decision
from emoexport.fold import Decide
from emoexport.labels import EMOTIONS

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


def test_a_rule_that_helps_is_found_and_helps_on_new_faces():
    decision, reports = fit_decision(*leaning(2000, seed=1))
    assert any(report.kept and report.rule == "pair neutral > sad" for report in reports)
    probabilities, truth = leaning(2000, seed=2)
    before = (probabilities.argmax(axis=1) == truth).mean()
    assert (decision.decide(probabilities).label == truth).mean() > before + 0.05


def test_chance_is_not_kept():
    """Over 40 votes that no rule can mend, almost none keeps one."""
    kept = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        probabilities = rng.dirichlet(np.ones(7), size=400)
        truth = np.array([rng.choice(7, p=row) for row in probabilities])
        kept += any(report.kept for report in fit_decision(probabilities, truth)[1])
    assert kept <= 5  # 40 x 5 % would be 2


def test_rules_about_unknown_emotions_are_refused():
    with pytest.raises(ValidationError, match="bored"):
        Decision(thresholds={"bored": 0.5})
    with pytest.raises(ValidationError):
        Decision(thresholds={"sad": 1.5})
