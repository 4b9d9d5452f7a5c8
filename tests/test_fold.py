import copy
import pkgutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from emoexport.decision import Decision
from emoexport.engines import BACKENDS, open_engine
from emoexport.fold import Fold, Vote
from emoexport.onnx_graph import export_fold
from emoexport.precision import PRECISIONS
from emoexport.reference import Reference
from emoexport.train.checkpoint import load_members
from emoexport.views import VIEWS, View, coinciding, views_named, zoom

ALL = tuple(VIEWS.values())
STILL = View(name="still", function=zoom, parameters={"factor": 1.0})


def run(fold: Fold, faces: np.ndarray) -> list[np.ndarray]:
    with torch.inference_mode():
        return [output.numpy() for output in fold(torch.from_numpy(faces))]


@pytest.mark.parametrize("count", [1, 2, 7])
def test_the_fold_is_the_reference_in_float64(count, networks, rules, faces):
    members = [copy.deepcopy(network).double() for network in networks]
    reference = Reference(members=members, views=ALL, decision=rules)
    every_pass = reference.scores(faces[0][:count])
    wanted = every_pass.mean(axis=(1, 2))
    assert wanted.dtype == np.float64
    probabilities, label, confidence, scores = run(Fold(members, ALL, rules), faces[0][:count])
    assert np.abs(probabilities - wanted).max() < 1e-10
    assert np.abs(scores - every_pass).max() < 1e-10
    assert np.array_equal(label, rules.decide(wanted).label)
    assert np.array_equal(confidence, probabilities[np.arange(count), label])


@pytest.mark.parametrize("temperature", [0.4, 1.7])
def test_the_fold_calibrates_like_the_reference_in_float64(temperature, networks, rules, faces):
    members = [copy.deepcopy(network).double() for network in networks]
    warm = rules.model_copy(update={"temperature": temperature})
    wanted = warm.calibrate(Reference(members=members, views=ALL, decision=warm).scores(faces[0][:7]).mean(axis=(1, 2)))
    probabilities, label, *_ = run(Fold(members, ALL, warm), faces[0][:7])
    assert np.abs(probabilities - wanted).max() < 1e-12
    plain = run(Fold(members, ALL, rules), faces[0][:7])[0]
    assert np.abs(probabilities - plain).max() > 1e-3
    without_temperature = warm.model_copy(update={"temperature": 1.0})
    assert np.array_equal(label, without_temperature.decide(wanted).label)


@pytest.fixture(scope="module")
def warm_graphs(tmp_path_factory, run_dir, rules, faces, calibrated) -> tuple[Reference, dict[str, Path]]:
    """A weighted fold of trained members with a view twice and a temperature, at every precision; its reference."""
    folder = tmp_path_factory.mktemp("warm")
    graphs = {name: folder / f"{name}.onnx" for name in PRECISIONS}
    members, views = load_members(run_dir)[1], (*views_named(["identity", "flip"]), STILL)
    weights, warm = np.array([[3.0, 0.2, 1.0], [0.1, 2.0, 0.5]]), rules.model_copy(update={"temperature": 1.6})
    reference = Reference(members=members, views=views, decision=warm, weights=weights)
    fold = Fold(members, views, warm, weights=weights, same_as=[0, 1, 0])
    export_fold(fold, graphs["fp32"], face_shape=(32, 32, 1), max_batch=64)
    calibration = calibrated(graphs["fp32"], faces[0][:40])
    for row in PRECISIONS.values():
        if row.converter:
            pkgutil.resolve_name(row.converter)(graphs["fp32"], graphs[row.name], calibration)
    return reference, graphs


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_graphs_with_weights_and_a_temperature_decide_like_the_reference(backend, precision, warm_graphs, faces):
    if not BACKENDS[backend].is_usable():
        pytest.skip(f"{backend} is not installed")
    if not BACKENDS[backend].takes(precision):
        pytest.skip(f"{backend} takes no {precision}")
    reference, graphs = warm_graphs
    engine = open_engine(
        BACKENDS[backend], graphs[precision], precision=precision, face_shape=(32, 32, 1), max_batch=64
    )
    found, wanted = engine.run_all(faces[0]), reference.run(faces[0])
    tolerance = PRECISIONS[precision].tolerance
    assert np.abs(found.probabilities - wanted.probabilities).max() <= tolerance.max_difference
    assert (found.label == wanted.label).mean() >= (1.0 if precision == "fp32" else 0.9)
    assert np.abs(found.probabilities.sum(axis=1) - 1).max() < 1e-5
    assert engine.scores(faces[0][:64]).shape == (64, 2, 3, 7)


@pytest.mark.slow
def test_vote_and_calibration_are_fp32_at_every_precision_and_absent_where_they_do_nothing(warm_graphs):
    for path in warm_graphs[1].values():
        model = onnx.shape_inference.infer_shapes(onnx.load(path), strict_mode=True)
        types = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
        types |= {tensor.name: tensor.data_type for tensor in model.graph.initializer}
        types |= {value.name: value.type.tensor_type.elem_type for value in model.graph.output}
        inside = [node for node in model.graph.node if node.name.startswith(("calibrate", "vote", "repeat"))]
        assert {node.op_type for node in inside} >= {"Pow", "Mul", "ReduceSum", "Gather"}
        floats = [types[name] for node in inside for name in node.output]
        assert set(floats) == {onnx.TensorProto.FLOAT}
    plain = Fold([torch.nn.Identity()], ALL, Decision(), weights=np.full((1, 16), 0.3), same_as=range(16))
    assert isinstance(plain.calibrate, torch.nn.Identity)
    assert isinstance(plain.repeat, torch.nn.Identity)
    assert plain.vote.shares is None


def naive_vote(members, views, weights, faces: np.ndarray) -> np.ndarray:
    """The weighted mean, one pass after the other."""
    pictures = torch.from_numpy(faces).permute(0, 3, 1, 2).double() / 255
    total = torch.zeros(len(faces), 7, dtype=torch.float64)
    with torch.inference_mode():
        for k, member in enumerate(members):
            for v, view in enumerate(views):
                total += weights[k, v] * member(view(pictures)).softmax(dim=-1)
    return total.numpy() / weights.sum()


@pytest.fixture(scope="module")
def exact(networks):
    return [copy.deepcopy(network).double() for network in networks]


HEAVY = np.full((3, 16), 1e-3)
HEAVY[1, 11] = 1e9
WEIGHTS = {
    "random": np.random.default_rng(3).uniform(0.1, 5, (3, 16)),
    "of members": np.repeat([[0.5], [1.0], [2.0]], 16, axis=1),
    "heavy": HEAVY,
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_the_weighted_vote_is_that_of_a_naive_loop_at_every_scale_in_float64(name, exact, rules, faces):
    weights, some = WEIGHTS[name], faces[0][:3]
    wanted = naive_vote(exact, ALL, weights, some)
    reference = Reference(members=exact, views=ALL, decision=rules, weights=weights)
    found, label, _, scores = run(Fold(exact, ALL, rules, weights=weights), some)
    assert np.abs(found - wanted).max() < 1e-12
    assert np.abs(reference.run(some).probabilities - wanted).max() < 1e-7  # answered as float32
    assert np.array_equal(label, reference.run(some).label)
    for scale in (1e-30, 7.0, 1e30):
        voted = Vote(weights * scale)(torch.from_numpy(scores)).numpy()
        assert np.abs(voted - wanted).max() < 1e-12
    if name == "heavy":
        assert np.abs(found - scores[:, 1, 11]).max() < 1e-9


@pytest.mark.parametrize("weights", [None, np.random.default_rng(4).uniform(0.1, 5, (3, 5))], ids=["equal", "weighted"])
def test_views_that_coincide_are_computed_once_and_count_in_full(weights, exact, rules, faces):
    mirrored = View(name="still-flipped", function=zoom, parameters={"factor": 1.0}, mirrored=True)
    views = (*views_named(["flip", "identity"]), STILL, VIEWS["gamma"], mirrored)
    same_as = coinciding(views, (32, 32, 1))
    assert same_as == (0, 1, 1, 3, 0)
    pictures = []
    hook = exact[0].register_forward_pre_hook(lambda _, given: pictures.append(len(given[0])))
    plain = run(Fold(exact, views, rules, weights=weights), faces[0][:4])
    merged = run(Fold(exact, views, rules, weights=weights, same_as=same_as), faces[0][:4])
    hook.remove()
    assert pictures == [4 * 5, 4 * 3]
    for one, other in zip(plain, merged, strict=True):
        assert one.shape == other.shape
        assert np.abs(one - other).max() < 1e-12


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
