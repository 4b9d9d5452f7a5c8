import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vote_cubes import decisions

from emoexport.decision import Decision, PairRule
from emoexport.labels import EMOTIONS
from emoexport.settled import OPEN, settled


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(decision=decisions, remaining=st.floats(0, 1), peak=st.floats(0.03, 2), seed=st.integers(0, 2**32 - 1))
def test_no_remaining_passes_turn_a_settled_decision(decision, remaining, peak, seed):
    rng = np.random.default_rng(seed)
    sums = (1 - remaining) * rng.dirichlet(np.full(7, peak), size=40)
    label = settled(sums, remaining, decision)
    edges = 0.5 * (np.eye(7)[:, None] + np.eye(7)).reshape(-1, 7)
    for rest in (*np.eye(7), *edges, *rng.dirichlet(np.full(7, 0.3), size=20)):
        found = decision.decide(sums + remaining * rest).label
        assert ((label == OPEN) | (label == found)).all()
        # Nor does the rounding of an engine that computes in float32.
        rounded = decision.decide((sums + remaining * rest).astype(np.float32)).label
        assert ((label == OPEN) | (label == rounded)).all()


@settings(max_examples=50, deadline=None)
@given(temperature=st.sampled_from([0.3, 1.0, 3.0]), remaining=st.floats(0.01, 0.99), seed=st.integers(0, 2**32 - 1))
def test_without_rules_a_lead_above_the_rest_settles_and_nothing_less_does(temperature, remaining, seed):
    sums = (1 - remaining) * np.random.default_rng(seed).dirichlet(np.full(7, 0.3), size=200)
    ordered = np.sort(sums, axis=1)
    lead = ordered[:, -1] - ordered[:, -2]
    is_settled = settled(sums, remaining, Decision(temperature=temperature)) != OPEN
    assert is_settled[lead > 1.002 * remaining + 1e-5].all()
    assert not is_settled[lead <= remaining].any()


def test_ties_are_never_settled():
    tie = np.array([[0.4, 0.4, 0.2, 0, 0, 0, 0]])
    assert settled(tie, 0.0, Decision()).tolist() == [OPEN]
    lead = np.array([[0.75, 0.25, 0, 0, 0, 0, 0]])
    assert settled(lead * 0.5, 0.25, Decision()).tolist() == [OPEN]
    at_threshold = Decision(thresholds={"angry": 0.75})
    assert settled(lead, 0.0, at_threshold).tolist() == [OPEN]
    at_margin = Decision(pairs=(PairRule(leader="angry", favoured="disgust", margin=0.5),))
    assert settled(lead, 0.0, at_margin).tolist() == [OPEN]


@pytest.mark.parametrize(
    ("decision", "label"),
    [
        (Decision(), 0),
        (Decision(thresholds={"angry": 0.55}), 0),
        (Decision(thresholds={"angry": 0.9}), 1),
        (Decision(thresholds=dict.fromkeys(EMOTIONS, 0.9)), 0),
        (Decision(pairs=(PairRule(leader="angry", favoured="disgust", margin=0.9),)), 1),
        (Decision(pairs=(PairRule(leader="angry", favoured="disgust", margin=0.1),)), 0),
        (Decision(pairs=(PairRule(leader="disgust", favoured="angry", margin=0.9),)), 0),
        (Decision(thresholds={"angry": 0.65}), OPEN),
        (Decision(pairs=(PairRule(leader="angry", favoured="disgust", margin=0.4),)), OPEN),
    ],
)
def test_rules_settle_where_they_are_clear(decision, label):
    sums = np.array([[0.6, 0.3, 0, 0, 0, 0, 0]])
    assert settled(sums, 0.1, decision).tolist() == [label]
