import numpy as np
import onnx_ir as ir
import pytest

from emoexport.calib.observer import Observer
from emoexport.calib.record import Calibration
from emoexport.calib.sampler import balanced_rows
from emoexport.calib.thresholds import METHODS, entropy_limit, percentile_limit
from emoexport.calibration import choose_faces
from emoexport.errors import BadData, BadInput
from emoexport.files import sha256_of_graph
from emoexport.labels import EMOTIONS
from emoexport.quantize import feeds_of, layers_of
from emoexport.run_faces import data_of_run
from emoexport.train.audit import face_hashes
from emoexport.train.checkpoint import read_run
from emoexport.train.dataset import DataSet


@pytest.fixture(scope="module")
def calibration(bundle) -> Calibration:
    return Calibration.parse_json(bundle.path / "calibration.json")


@pytest.fixture(scope="module")
def data(run_dir) -> DataSet:
    return data_of_run(run_dir, read_run(run_dir))


@pytest.fixture(scope="module")
def outputs(bundle, faces) -> dict[str, np.ndarray]:
    """What five tensors hold on seven faces, read from the whole graph."""
    import onnx
    import onnxruntime

    names = feeds_of(bundle.graph("fp32"))[:5]
    model = onnx.shape_inference.infer_shapes(onnx.load(bundle.graph("fp32")))
    model.graph.output.extend(value for value in model.graph.value_info if value.name in names)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return dict(zip(names, session.run(names, {"faces": faces[0][:7]}), strict=True))


def test_what_is_observed_is_what_the_graph_computes(bundle, faces, outputs):
    for pictures in (1, 7, 64):
        observer = Observer(bundle.graph("fp32"), pictures=pictures)
        extremes = observer.extremes(faces[0][:7])
        limits = {name: 0.5 * float(np.abs(values).max()) for name, values in outputs.items()}
        clipped = observer.clipped(faces[0][:7], limits)
        counts = observer.histograms(faces[0][:7], limits, bins=8)
        for name, values in outputs.items():
            assert extremes[name] == pytest.approx((values.min(), values.max()), rel=1e-4)
            assert clipped[name] == pytest.approx((np.abs(values) > limits[name]).mean(), abs=1e-4)
            wanted = np.histogram(np.minimum(np.abs(values), limits[name]), bins=8, range=(0, limits[name]))[0]
            assert counts[name].sum() == values.size
            assert np.abs(counts[name] - wanted).sum() <= 1e-3 * values.size
    assert [path.name for path in bundle.path.glob("tmp*")] == []


def test_all_tensors_of_the_members_are_observed(bundle):
    members = [node for node in ir.load(bundle.graph("fp32")).graph if node.name.startswith("members.")]
    made = {value.name for node in members for value in node.outputs if value.dtype == ir.DataType.FLOAT}
    observer = Observer(bundle.graph("fp32"))
    assert set(observer.tensors) == made | {observer.tensors[0]}


def test_activations_that_are_not_finite_are_named(bundle, faces, tmp_path):
    model = ir.load(bundle.graph("fp32"))
    layer = layers_of(model.graph)[3]
    weight = layer.inputs[1]
    weight.const_value = ir.Tensor(np.full_like(weight.const_value.numpy(), 3e38), name=weight.name)
    ir.save(model, tmp_path / "model.onnx")
    with pytest.raises(BadData, match=f"'{layer.outputs[0].name}' is .*inf") as caught:
        Observer(tmp_path / "model.onnx").extremes(faces[0][:3])
    assert "finite" in str(caught.value)


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_a_quantised_graph_is_not_observed(bundle, precision):
    with pytest.raises(BadInput, match="quantised already"):
        Observer(bundle.graph(precision))


def test_a_graph_that_is_no_fold_is_not_observed(bundle, tmp_path):
    model = ir.load(bundle.graph("fp32"))
    for node in model.graph:
        node.name = None
    ir.save(model, tmp_path / "model.onnx")
    with pytest.raises(BadInput, match="no graph of a fold"):
        Observer(tmp_path / "model.onnx")


def test_faces_are_balanced_and_named(calibration):
    assert calibration.method == "min-max"
    assert calibration.faces == dict.fromkeys(EMOTIONS, 5)
    assert len(set(calibration.face_hashes)) == 35
    assert len(set(calibration.held_out_hashes) - set(calibration.face_hashes)) == 35
    assert not calibration.random


def test_no_face_that_judges_calibrates(calibration, data, run_dir):
    assert set(calibration.disjoint_from) == {"validation", "test"}
    chosen = {*calibration.face_hashes, *calibration.held_out_hashes}
    for name in calibration.disjoint_from:
        others = set(face_hashes(data.split(name).images))
        assert calibration.disjoint_from[name] == len(others)
        assert not others & chosen
    assert chosen <= set(face_hashes(data.split("train").images))


def test_training_faces_that_another_split_shows_are_left_out(data, run_dir):
    """A data set that leaks: the copies may be trained on, but do not calibrate."""
    record, train = read_run(run_dir), data.split("train")
    copies = train.take(np.arange(0, len(train), 2))
    leaking = DataSet(**{**vars(data), "splits": {**data.splits, "private_test": copies}})
    chosen = choose_faces(leaking, record, 35)
    assert chosen.left_out == len(set(face_hashes(copies.images)))
    assert not set(face_hashes(copies.images)) & set(face_hashes(np.concatenate([chosen.images, chosen.held_out])))
    everything = DataSet(**{**vars(data), "splits": {**data.splits, "private_test": train}})
    with pytest.raises(BadData, match="no face of 'angry' to calibrate on among 0 training faces"):
        choose_faces(everything, record, 35)


def test_too_few_faces(data, run_dir):
    with pytest.raises(BadData, match="3 calibration faces cannot hold all 7 classes"):
        choose_faces(data, read_run(run_dir), 3)


def test_a_class_with_few_faces_gives_all_it_has():
    labels = np.repeat(np.arange(7), [2, 50, 50, 50, 50, 50, 50])
    rows = balanced_rows(labels, 70, seed=1)
    assert np.bincount(labels[rows]).tolist() == [2, 12, 12, 11, 11, 11, 11] or np.bincount(labels[rows]).min() == 2
    assert len(rows) == 70


def test_ranges_keep_what_the_method_keeps(bundle, faces, calibrated):
    found = {method: calibrated(bundle.graph("fp32"), faces[0][:40], method) for method in METHODS}
    whole = found["min-max"]
    assert whole.ranges == {name: whole.extremes[name] for name in whole.ranges}
    for method in ("entropy", "percentile"):
        cut = found[method]
        assert cut.extremes == whole.extremes
        for name, (low, high) in cut.ranges.items():
            assert whole.ranges[name][0] <= low <= high <= whole.ranges[name][1]
        assert sum(cut.ranges[name] != whole.ranges[name] for name in cut.ranges) >= 10
        assert max(cut.clipped.values()) > max(whole.clipped.values())
        assert max(cut.clipped.values()) < 0.2
    assert 0 < np.mean(list(found["percentile"].clipped.values())) < 2e-3


@pytest.mark.parametrize("percent", [50.0, 90.0, 99.0])
def test_percentiles_are_those_of_numpy(percent):
    values = np.abs(np.random.default_rng(0).normal(size=200_000))
    counts, edges = np.histogram(values, bins=2048, range=(0, values.max()))
    found = percentile_limit(counts.astype(float), percent=percent) * edges[-1]
    assert found == pytest.approx(np.percentile(values, percent), abs=2 * edges[1])


def test_entropy_cuts_off_what_is_rare_and_far_and_nothing_of_an_even_spread():
    rng = np.random.default_rng(0)
    far = np.abs(np.concatenate([rng.normal(size=100_000), [40.0]]))
    counts = np.histogram(far, bins=2048, range=(0, 40))[0].astype(float)
    assert 2.5 < entropy_limit(counts) * 40 < 8
    even = np.histogram(rng.uniform(0, 1, 1_000_000), bins=2048, range=(0, 1))[0].astype(float)
    assert entropy_limit(even) > 0.95
    assert entropy_limit(np.eye(1, 2048)[0]) == 1.0  # nothing but zeros


def test_the_hash_of_a_graph_is_of_its_weights_too(bundle, tmp_path):
    model = ir.load(bundle.graph("fp32"))
    ir.save(model, tmp_path / "model.onnx", external_data="model.onnx.data")
    before = sha256_of_graph(tmp_path / "model.onnx")
    weights = bytearray((tmp_path / "model.onnx.data").read_bytes())
    weights[100] ^= 1
    (tmp_path / "model.onnx.data").write_bytes(weights)
    assert sha256_of_graph(tmp_path / "model.onnx") != before


@pytest.mark.slow
def test_a_calibration_is_used_again_until_something_changes(run_dir, tmp_path, call, bundle):
    out, options = tmp_path / "x", ("--int8", "--keep-rejected", "--calib-size", 35, "--max-batch", 64)
    assert "calibrating on training faces" in call("build", run_dir, "-o", out, *options)[1]
    first = (out / "calibration.json").read_bytes()
    said = call("build", run_dir, "-o", out, *options)[1]
    assert "nothing has changed" in said
    assert "calibrating on" not in said
    assert (out / "calibration.json").read_bytes() == first == (bundle.path / "calibration.json").read_bytes()
    said = call("build", run_dir, "-o", out, *options, "--calib-method", "percentile")[1]
    assert "calibrating anew: the method changed" in said
    said = call(
        "build", run_dir, "-o", out, "--int8", "--keep-rejected", "--calib-size", 36, "--calib-method", "percentile"
    )[1]
    assert "calibrating anew: the faces changed" in said
    given = ("--int8", "--keep-rejected", "--calib-file", bundle.path / "calibration.json")
    code, said, _ = call("build", run_dir, "-o", tmp_path / "given", *given)
    assert (code, "calibrating" in said) == (0, False)
    assert (tmp_path / "given" / "model.int8.onnx").read_bytes() == bundle.graph("int8").read_bytes()
    code, _, error = call("build", run_dir, "-o", tmp_path / "other", *given, "--view", "identity")
    assert code == 4
    assert "is of another fold: its graph have the SHA-256" in error
    assert "next: leave --calib-file out" in error
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_noise_calibrates_only_when_asked_and_reports_repeat_it(run_dir, tmp_path, call):
    out = tmp_path / "noise"
    code, said, _ = call("build", run_dir, "-o", out, "--int8", "--keep-rejected", "--calib-size", 14, "--calib-random")
    assert (code, "calibrating on random pictures" in said) == (0, True)
    found = Calibration.parse_json(out / "calibration.json")
    assert (found.random, found.data, found.disjoint_from) == (True, "random", {})
    for command in (("inspect", out), ("verify", out, "--limit", 14, "--rounds", 1), ("bench", out, "--rounds", 2)):
        assert "calibrated on random pictures" in call(*command)[1], command
    assert "calibrated on random pictures" in (out / "reports" / "parity.md").read_text()
    code, _, error = call("build", run_dir, "-o", out, "--int8", "--calib-random", "--calib-data", "synthetic:70")
    assert (code, "--calib-random is given together with faces" in error) == (2, True)
    code, _, error = call("build", run_dir, "-o", out, "--int8", "--calib-method", "median")
    assert (code, "'median' is no calibration method; known are min-max, entropy, percentile" in error) == (2, True)


def test_pictures_go_through_one_at_a_time_where_all_tensors_of_more_would_not_fit(bundle, monkeypatch):
    graph = bundle.graph("fp32")
    shapes = {value.name: value.shape for node in ir.load(graph).graph for value in node.outputs}
    a_picture = sum(
        4 * np.prod([d for d in shapes[name] if isinstance(d, int)]) for name in Observer(graph).tensors[1:]
    )
    assert Observer(graph)._pictures == 64
    for room, wanted in ((1, 1), (int(3.5 * a_picture), 3)):
        monkeypatch.setattr("emoexport.calib.observer._ROOM", room)
        assert Observer(graph)._pictures == wanted
