import copy

import numpy as np
import pytest
import torch

from emoexport.decision import Decision
from emoexport.fold import Fold
from emoexport.reference import Reference
from emoexport.views import VIEWS, views_named

ALL = tuple(VIEWS.values())


def run(fold: Fold, faces: np.ndarray) -> list[np.ndarray]:
    with torch.inference_mode():
        return [output.numpy() for output in fold(torch.from_numpy(faces))]


@pytest.mark.parametrize("count", [1, 2, 7])
def test_the_fold_is_the_reference_in_float64(count, networks, rules, faces):
    members = [copy.deepcopy(network).double() for network in networks]
    reference = Reference(members=members, views=ALL, decision=rules)
    wanted = reference.scores(faces[0][:count]).mean(axis=(1, 2))
    assert wanted.dtype == np.float64
    probabilities, label, confidence = run(Fold(members, ALL, rules), faces[0][:count])
    assert np.abs(probabilities - wanted).max() < 1e-10
    assert np.array_equal(label, rules.decide(wanted).label)
    assert np.array_equal(confidence, probabilities[np.arange(count), label])


def test_the_rules_do_change_decisions_here(networks, rules, faces):
    """Or the test above would not see a fold that ignores them."""
    plain = Reference(members=networks, views=ALL, decision=Decision()).run(faces[0])
    ruled = Reference(members=networks, views=ALL, decision=rules).run(faces[0])
    assert 0 < (plain.label != ruled.label).mean() < 1


def test_identical_members_are_one_member(networks, faces):
    one = copy.deepcopy(networks[0]).double()
    single = run(Fold([one], ALL, Decision()), faces[0][:5])
    triple = run(Fold([one, one, one], ALL, Decision()), faces[0][:5])
    assert np.abs(single[0] - triple[0]).max() < 1e-12


def test_the_order_of_members_and_views_does_not_matter(networks, faces):
    members = [copy.deepcopy(network).double() for network in networks]
    forward = run(Fold(members, ALL, Decision()), faces[0][:3])
    backward = run(Fold(members[::-1], ALL[::-1], Decision()), faces[0][:3])
    assert np.abs(forward[0] - backward[0]).max() < 1e-12


def test_scores_hold_every_pass(networks, faces):
    """Row k, v of the scores is what member k says of view v alone."""
    views = views_named(["zoom", "flip"])
    scores = Reference(members=networks, views=views, decision=Decision(), batch_size=4).scores(faces[0][:6])
    assert scores.shape == (6, 3, 2, 7)
    pictures = torch.from_numpy(faces[0][:6]).permute(0, 3, 1, 2) / 255
    with torch.inference_mode():
        alone = networks[2](views[1](pictures)).softmax(dim=-1).numpy()
    assert np.abs(scores[:, 2, 1] - alone).max() < 1e-6
