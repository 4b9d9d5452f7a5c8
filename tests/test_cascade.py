import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy.special import softmax
from vote_cubes import decisions, vote_cube

from emoexport.cascade import Cascade
from emoexport.cascade_fit import fit_cascade
from emoexport.decision import Decision, PairRule
from emoexport.errors import BadInput, UsageError
from emoexport.labels import EMOTIONS
from emoexport.margin import RiskModel, decision_margin
from emoexport.vote_prediction import fit_offsets, fit_risk, order_passes, predicting_weights

RULES = Decision(
    temperature=0.8,
    thresholds={"happy": 0.4, "sad": 0.3},
    pairs=(PairRule(leader="neutral", favoured="sad", margin=0.1),),
)
SCORES, TRUTH = vote_cube(1500, seed=1)
MORE_SCORES, MORE_TRUTH = vote_cube(2000, seed=2)


def full_labels(scores, decision, weights=None):
    weights = np.ones(scores.shape[1:3]) if weights is None else weights
    flat = scores.reshape(len(scores), -1, scores.shape[-1]).astype(np.float64)
    return decision.decide((weights / weights.sum()).ravel() @ flat).label


@pytest.mark.parametrize("rule", ["exact", "agreement", "accuracy"])
def test_a_cascade_is_the_same_after_json(rule, tmp_path):
    cascade = fit_cascade(SCORES, TRUTH, decision=RULES, rule=rule, sizes=(1, 2, 5), offsets=rule == "accuracy")
    (tmp_path / "cascade.json").write_text(cascade.to_json(), encoding="utf-8")
    again = Cascade.parse_json(tmp_path / "cascade.json")
    assert again == cascade
    assert np.array_equal(again.run(MORE_SCORES).outcome.probabilities, cascade.run(MORE_SCORES).outcome.probabilities)


@settings(max_examples=25, deadline=None)
@given(decision=decisions, seed=st.integers(0, 2**32 - 1), weighted=st.booleans())
def test_the_exact_rule_never_decides_otherwise_than_the_full_vote(decision, seed, weighted):
    scores, _ = vote_cube(150, seed=seed, signal=3)
    weights = np.random.default_rng(seed).gamma(1, size=(3, 4)) if weighted else np.ones((3, 4))
    cascade = fit_cascade(scores, weights=weights, decision=decision, rule="exact")
    run = cascade.run(scores)
    assert np.array_equal(run.outcome.label, full_labels(scores, decision, weights))


def test_thresholds_may_settle_a_decision_before_half_of_the_weight_has_spoken():
    bars = Decision(thresholds=dict.fromkeys(EMOTIONS[1:], 0.95))
    scores = np.full((1, 3, 4, 7), 1 / 7, dtype=np.float32)
    run = fit_cascade(scores, decision=bars, rule="exact").run(scores)
    assert run.outcome.label.tolist() == [0]
    assert run.passes.tolist() == [1]  # the 11 of 12 that remain bring no other above 0.93


def test_the_exact_rule_saves_passes():
    run = fit_cascade(SCORES, decision=Decision(), rule="exact").run(MORE_SCORES)
    assert 6 < run.passes.mean() < 11
    assert run.passes.min() >= 6  # of 12: half of them must have spoken


@pytest.mark.parametrize("decision", [Decision(), RULES])
def test_without_a_threshold_every_face_gets_the_full_vote(decision):
    weights = np.random.default_rng(0).gamma(2, size=(3, 4))
    weights[1, 2] = 0
    cascade = fit_cascade(SCORES, weights=weights, decision=decision, sizes=(1, 3, 20))
    assert cascade.threshold is None
    run = cascade.run(MORE_SCORES)
    assert set(run.passes) == {11}
    share = (weights / weights.sum()).ravel()
    chosen = np.flatnonzero(share)
    flat = MORE_SCORES.reshape(len(MORE_SCORES), -1, 7)
    wanted = decision.decide(share[chosen] @ flat[:, chosen].astype(np.float64))  # as `Cube.vote` sums it
    for found, needed in zip(run.outcome, wanted, strict=True):
        assert np.array_equal(found, needed)


def test_ties_of_the_full_vote_are_broken_as_the_full_vote_breaks_them():
    """Two emotions that get the same probabilities from other passes: which is ahead is a matter of rounding."""
    rng = np.random.default_rng(4)
    scores = np.full((600, 3, 4, 7), 0.02, dtype=np.float32)
    scores[..., 0] = rng.uniform(0.3, 0.5, size=(600, 3, 4))
    scores[..., 1] = rng.permuted(scores[..., 0].reshape(600, 12), axis=1).reshape(600, 3, 4)
    wanted = full_labels(scores, Decision())
    assert 0.1 < wanted.mean() < 0.9
    cascade = fit_cascade(SCORES, decision=Decision(), sizes=(1, 3))
    assert cascade.order(2) != tuple(sorted(cascade.order(2)))
    assert np.array_equal(cascade.run(scores).outcome.label, wanted)
    exact = fit_cascade(SCORES, decision=Decision(), rule="exact")
    assert np.array_equal(exact.run(scores).outcome.label, wanted)


def test_a_session_with_numpy_alone_gets_what_run_gets():
    cascade = fit_cascade(SCORES, decision=RULES, sizes=(1, 2, 4, 8)).model_copy(update={"threshold": 0.05})
    run, paths = cascade.run(MORE_SCORES), cascade.paths(MORE_SCORES)
    stage = paths.leaving(0.05)
    assert np.array_equal(stage, run.stage)
    assert np.array_equal(paths.labels_at(stage), run.outcome.label)
    waiting = np.arange(len(MORE_SCORES))
    label = np.full(len(MORE_SCORES), -1)
    for number in range(len(cascade.stages)):
        passes = [MORE_SCORES[waiting, member, view] for member, view in cascade.order(number)]
        answer = cascade.answer(number, np.stack(passes, axis=1))
        label[waiting[answer.leaves]] = answer.outcome.label[answer.leaves]
        waiting = waiting[~answer.leaves]
    assert len(waiting) == 0
    assert np.array_equal(label, run.outcome.label)
    assert 1 < run.passes.mean() < 8
    assert np.array_equal(run.outcome.label[run.stage == 4], full_labels(MORE_SCORES, RULES)[run.stage == 4])


def test_a_larger_threshold_never_costs_passes():
    paths = fit_cascade(SCORES, decision=Decision(), sizes=(1, 2, 4, 8)).paths(MORE_SCORES)
    stages = [paths.leaving(threshold) for threshold in (None, 0.0, 0.01, 0.1, 0.5, 1.0)]
    assert all((after <= before).all() for before, after in itertools.pairwise(stages))
    assert (stages[1] == 4).all()
    assert (stages[-1] == 0).all()


def test_margins_are_distances_to_another_label():
    vote = np.array([[0.5, 0.3, 0.2, 0, 0, 0, 0], [0.2, 0.35, 0.45, 0, 0, 0, 0]])
    assert decision_margin(vote, Decision()) == pytest.approx([0.2, 0.1])
    near = Decision(thresholds={"angry": 0.45})
    assert decision_margin(vote, near) == pytest.approx([0.05, 0.1])
    barred = Decision(thresholds={"angry": 0.56})
    assert decision_margin(vote, barred)[0] == pytest.approx(0.06)
    pair = Decision(pairs=(PairRule(leader="angry", favoured="disgust", margin=0.22),))
    assert decision_margin(vote, pair) == pytest.approx([0.02, 0.1])
    nobody = Decision(thresholds=dict.fromkeys(EMOTIONS, 0.55))
    assert decision_margin(vote, nobody) == pytest.approx([0.05, 0.1])
    next_in_line = Decision(thresholds={**dict.fromkeys(EMOTIONS, 0.9), "disgust": 0.32})
    assert decision_margin(vote, next_in_line)[0] == pytest.approx(0.02)


@settings(max_examples=100, deadline=None)
@given(decision=decisions, seed=st.integers(0, 2**32 - 1))
def test_margins_are_shares_whatever_the_rules(decision, seed):
    margin = decision_margin(np.random.default_rng(seed).dirichlet(np.full(7, 0.3), size=50), decision)
    assert np.isfinite(margin).all()
    assert (margin >= 0).all()
    assert (margin <= 1).all()


def test_passes_that_say_the_same_are_not_chosen_twice():
    """Two groups of equal passes: the first of each stand for all."""
    scores, _ = vote_cube(400, members=2, views=1, seed=3)
    twice = scores.repeat(4, axis=2)
    columns = twice.reshape(400, 8, 7).transpose(1, 0, 2).reshape(8, -1).astype(np.float64)
    gram, full = columns @ columns.T, np.full(8, 1 / 8)
    order = order_passes(gram, full, 4)
    assert {order[0] // 4, order[1] // 4} == {0, 1}
    assert len(set(order)) == 4
    assert predicting_weights(gram, full, order[:2]) == pytest.approx([0.5, 0.5], abs=1e-3)


def test_chosen_passes_predict_the_full_vote_better_than_the_first_ones():
    columns = SCORES.reshape(1500, 12, 7).transpose(1, 0, 2).reshape(12, -1).astype(np.float64)
    gram, full = columns @ columns.T, np.full(12, 1 / 12)
    flat = MORE_SCORES.reshape(2000, 12, 7)
    vote = full @ flat

    def error(chosen):
        weights = predicting_weights(gram, full, chosen)
        assert weights.min() >= 0
        assert weights.sum() == pytest.approx(1)
        return np.square(weights @ flat[:, chosen] - vote).sum()

    assert error(order_passes(gram, full, 3)) < error([0, 1, 2])  # of one member
    assert error(range(12)) < 1e-6 * error([0])


def test_offsets_find_what_was_shifted():
    rng = np.random.default_rng(5)
    shift = np.array([0.5, -0.5, 0.3, 0, 0, -0.3, 0])
    logits = rng.normal(size=(40_000, 7)) * 1.5
    truth = (softmax(logits + shift, axis=1).cumsum(axis=1) < rng.random((40_000, 1))).sum(axis=1)
    found = np.array(fit_offsets(softmax(logits, axis=1), np.minimum(truth, 6), penalty=0.0))
    assert found - found.mean() == pytest.approx(shift - shift.mean(), abs=0.08)
    shrunk = np.array(fit_offsets(softmax(logits, axis=1), np.minimum(truth, 6), penalty=1.0))
    assert np.abs(shrunk).max() < 0.5 * np.abs(found).max()


def test_offsets_fade_towards_the_full_vote():
    """Faces of one emotion are rare where the offsets are fitted, so those of early stages hold it back."""
    kept = (TRUTH != 3) | (np.arange(len(TRUTH)) % 5 == 0)
    cascade = fit_cascade(
        SCORES[kept], TRUTH[kept], decision=Decision(), rule="accuracy", sizes=(1, 3, 6, 11), offsets=True
    )
    held_back = [stage.offsets[3] - np.mean(stage.offsets) for stage in cascade.stages[:-1]]
    assert held_back[0] < -0.2
    assert held_back == sorted(held_back)
    assert -0.1 < held_back[-1] < 0
    assert cascade.stages[-1].offsets == ()


def test_the_risk_is_found_and_never_rises_with_the_margin():
    rng = np.random.default_rng(6)
    planted = RiskModel(intercept=-4.0, slope=-1.2)
    margin = rng.random(20_000)
    found = fit_risk(margin, rng.random(20_000) < planted.risk(margin))
    assert (found.intercept, found.slope) == pytest.approx((-4.0, -1.2), abs=0.25)
    turned = fit_risk(margin, rng.random(20_000) < margin)
    assert turned.slope == 0
    assert 0 < fit_risk(margin, np.zeros(20_000, dtype=bool)).risk(np.array([0.5]))[0] < 0.01


BAD_STAGES = {
    "once": lambda stages: [stages[0], {**stages[1], "passes": stages[0]["passes"]}, *stages[2:]],
    "weights with the sum": lambda stages: [{**stages[0], "weights": [0.7]}, *stages[1:]],
    "2 offsets": lambda stages: [{**stages[0], "offsets": [0.1, 0.2]}, *stages[1:]],
    "no model of risk": lambda stages: [{**stages[0], "risk": None}, *stages[1:]],
}


@pytest.mark.parametrize("problem", BAD_STAGES)
def test_stages_that_do_not_fit_are_refused(problem):
    data = fit_cascade(SCORES, decision=Decision(), sizes=(1, 3)).model_dump(mode="json")
    with pytest.raises(BadInput, match=problem):
        Cascade.parse({**data, "stages": BAD_STAGES[problem](data["stages"])}, source="cascade.json")


def test_other_records_that_do_not_fit_are_refused():
    with pytest.raises(ValidationError):
        RiskModel(intercept=0.0, slope=0.1)
    data = fit_cascade(SCORES, decision=Decision(), rule="exact").model_dump(mode="json")
    with pytest.raises(BadInput, match="threshold 0"):
        Cascade.parse({**data, "threshold": 0.5}, source="cascade.json")
    with pytest.raises(BadInput, match="sum to 1"):
        Cascade.parse({**data, "weights": [[0.5, 0.4]]}, source="cascade.json")


def test_bad_calls_are_refused():
    cascade = fit_cascade(SCORES, decision=Decision(), sizes=(1, 3))
    with pytest.raises(BadInput, match=r"\(faces, 3, 4, 7\)"):
        cascade.run(SCORES[:, :2])
    with pytest.raises(BadInput, match=r"\(faces, 3, 7\)"):
        cascade.answer(1, SCORES[:, 0, :2])
    with pytest.raises(BadInput, match="finite"):
        cascade.paths(np.full_like(SCORES, np.nan))
    with pytest.raises(UsageError, match="no stage 3"):
        cascade.answer(3, SCORES[:, 0])
    with pytest.raises(BadInput, match="1 face or more"):
        fit_cascade(SCORES[:0], decision=Decision())
    for wrong in (np.inf, np.nan, -0.1, 1.1):
        with pytest.raises(BadInput, match="needed are probabilities"):
            fit_cascade(np.full_like(SCORES, wrong), decision=Decision())
    with pytest.raises(UsageError, match="weights of the shape"):
        fit_cascade(SCORES, weights=np.zeros((3, 4)), decision=Decision())
    with pytest.raises(UsageError, match="rising"):
        fit_cascade(SCORES, decision=Decision(), sizes=(3, 2))
    with pytest.raises(UsageError, match="full vote's"):
        fit_cascade(SCORES, TRUTH, decision=Decision(), offsets=True)
    with pytest.raises(BadInput, match="0 labels"):
        fit_cascade(SCORES, decision=Decision(), rule="accuracy", offsets=True)
    with pytest.raises(BadInput, match="from 0 to 7; offsets need one for each of 1500 faces, from 0 to 6"):
        fit_cascade(SCORES, np.arange(1500) % 8, decision=Decision(), rule="accuracy", offsets=True)


def test_one_pass_needs_no_early_stage():
    scores, _ = vote_cube(50, members=1, views=1)
    for rule in ("exact", "agreement"):
        cascade = fit_cascade(scores, decision=Decision(), rule=rule)
        assert len(cascade.stages) == 1
        assert set(cascade.run(scores).passes) == {1}
