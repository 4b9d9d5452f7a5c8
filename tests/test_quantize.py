import shutil

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from emoexport import onnx_graph, quantize
from emoexport.decision import Decision
from emoexport.engines import BACKENDS, open_engine
from emoexport.errors import BadInput
from emoexport.fold import LAYOUTS, Fold
from emoexport.half import to_bf16, to_fp16
from emoexport.onnx_graph import export_fold
from emoexport.quantize import feeds_of, layers_of, to_fp8, to_int8, to_int8_fp16
from emoexport.rewrites import prepare_members
from emoexport.train.checkpoint import read_run
from emoexport.train.emotenet import ConvNeXtEmoteNet
from emoexport.views import views_named

HALF, FLOAT, BFLOAT16 = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT, onnx.TensorProto.BFLOAT16
REDUCED = {"fp16": HALF, "bf16": BFLOAT16, "int8-fp16": HALF, "fp8": HALF}
PAIRS = ("QuantizeLinear", "DequantizeLinear")


def types_of(graph: onnx.GraphProto) -> dict[str, int]:
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    for value in (*graph.value_info, *graph.input, *graph.output):
        types[value.name] = value.type.tensor_type.elem_type
    return types


@pytest.mark.parametrize("precision", REDUCED)
def test_members_compute_in_the_type_and_all_around_them_in_fp32(bundle, precision):
    model = onnx.shape_inference.infer_shapes(onnx.load(bundle.graph(precision)), strict_mode=True)
    types, kept = types_of(model.graph), bundle.manifest.graphs[precision].kept
    in_fp32 = {name for why in ("reduction", "power") for name in kept[why]}
    inside = [node for node in model.graph.node if node.name.startswith("members.")]
    around = [node for node in model.graph.node if not node.name.startswith(("members.", "cast/"))]
    assert inside
    assert around
    for node in inside:
        found = {types[name] for name in (*node.input, *node.output) if name}
        wrong = REDUCED[precision] if node.name in in_fp32 else FLOAT
        assert wrong not in found, node.name
    assert all(types[name] != REDUCED[precision] for node in around for name in (*node.input, *node.output) if name)


@pytest.mark.parametrize("precision", REDUCED)
def test_what_needs_fp32_keeps_it_and_the_manifest_says_why(bundle, precision):
    operators = {node.name: node.op_type for node in onnx.load(bundle.graph(precision)).graph.node}
    kept = bundle.manifest.graphs[precision].kept
    reductions = {operators[name] for name in kept["reduction"]}
    assert reductions >= {"ReduceMean", "Softmax"}
    assert {operators[name] for name in kept["power"]} >= {"Exp", "Log"}
    members = {name: kind for name, kind in operators.items() if name.startswith("members.")}
    assert "LayerNormalization" in members.values()  # native, it computes in FP32 by itself
    assert not any(operators[name] == "LayerNormalization" for names in kept.values() for name in names)
    sums = {name for name, kind in members.items() if kind in ("ReduceMean", "ReduceSum", "Softmax")}
    assert sums == set(kept["reduction"])


def grown(bundle, path, factor):
    """The FP32 graph with a layer whose output is so many times as large, and is divided by as much after it."""
    model = ir.load(bundle.graph("fp32"))
    layer = next(node for node in layers_of(model.graph) if node.op_type == "MatMul")
    weight = layer.inputs[1]
    weight.const_value = ir.Tensor(weight.const_value.numpy() * np.float32(factor), name=weight.name)
    output = layer.outputs[0]
    readers = list(output.uses())
    shrunk = ir.node("Mul", [output, _number(model.graph, 1 / factor)], name=f"{layer.name}/shrink")
    shrunk.outputs[0].name, shrunk.outputs[0].type = "shrunk", output.type
    shrunk.outputs[0].shape = output.shape
    model.graph.insert_after(layer, shrunk)
    for use in readers:
        use.node.replace_input_with(use.idx, shrunk.outputs[0])
    ir.save(model, path)
    return layer.name


def _number(graph: ir.Graph, number: float) -> ir.Value:
    tensor = ir.Tensor(np.array(number, dtype=np.float32), name="shrinking")
    value = ir.Value(name="shrinking", type=ir.TensorType(ir.DataType.FLOAT), shape=tensor.shape, const_value=tensor)
    graph.register_initializer(value)
    return value


def test_activations_that_fp16_cannot_hold_stay_in_fp32(bundle, tmp_path, faces, calibrated):
    """As is known of ConvNeXt: without the guard these faces get nonsense."""
    source, target = tmp_path / "grown.onnx", tmp_path / "half.onnx"
    name = grown(bundle, source, 1e5)
    calibration = calibrated(source, faces[0][:40])
    kept = to_fp16(source, target, calibration)
    assert name in kept["activations within a factor of 2 of 65504"]
    wanted = _probabilities(bundle.graph("fp32"), faces)
    assert np.abs(_probabilities(target, faces) - wanted).max() < 2e-3
    assert np.isfinite(_output_of(target, name, faces)).all()
    blind = calibration.model_copy(update={"extremes": dict.fromkeys(calibration.extremes, (0.0, 1.0))})
    to_fp16(source, target, blind)
    assert np.isinf(_output_of(target, name, faces)).any()


def test_weights_that_fp16_cannot_hold_stay_in_fp32(bundle, tmp_path, faces, calibrated):
    source = tmp_path / "grown.onnx"
    name = grown(bundle, source, 1e9)
    kept = to_fp16(source, tmp_path / "half.onnx", calibrated(source, faces[0][:40]))
    assert name in {name for names in kept.values() for name in names}
    wanted = _probabilities(bundle.graph("fp32"), faces)
    assert np.abs(_probabilities(tmp_path / "half.onnx", faces) - wanted).max() < 2e-3
    assert kept == to_fp16(source, tmp_path / "half.onnx", calibrated(source, faces[0][:40]))


def _probabilities(graph, faces):
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    return session.run(["probabilities"], {"faces": faces[0][:8]})[0]


def _output_of(graph, name, faces):
    """What a node gives, in its type: inside a graph a CPU would take out the casts and compute in FP32."""
    model = onnx.shape_inference.infer_shapes(onnx.load(graph))
    output = next(node.output[0] for node in model.graph.node if node.name == name)
    model.graph.output.append(next(value for value in model.graph.value_info if value.name == output))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run([output], {"faces": faces[0][:8]})[0]


@pytest.mark.parametrize("precision", ["int8", "int8-fp16", "fp8"])
def test_every_dense_layer_of_the_members_is_quantised_and_nothing_else(bundle, precision):
    plain = ir.load(bundle.graph("fp32"))
    model = onnx.load(bundle.graph(precision))
    wanted = {node.name for node in layers_of(plain.graph)}
    rounded = {output for node in model.graph.node if node.op_type == "DequantizeLinear" for output in node.output}
    assert {node.name for node in model.graph.node if rounded & set(node.input)} == wanted
    for node in model.graph.node:
        if node.name in wanted:
            assert set(node.input[:2]) <= rounded, node.name
    depthwise = [node.name for node in plain.graph if node.op_type == "Conv" and node.attributes["group"].as_int() > 1]
    assert depthwise
    assert set(depthwise) <= set(bundle.manifest.graphs[precision].kept["depthwise or few channels"])
    assert sum("mlp.fc" in name for name in wanted) == 2 * 4 * len(bundle.manifest.members)


@pytest.mark.parametrize(("precision", "stored"), [("int8", np.int8), ("int8-fp16", np.int8), ("fp8", None)])
def test_pairs_are_of_the_flavour_that_tensorrt_accepts(bundle, precision, stored):
    """Symmetric, 8 bits only, a scale for each output channel, biases in floating point."""
    graph = ir.load(bundle.graph(precision)).graph
    pairs = [node for node in graph if node.op_type in PAIRS]
    assert pairs
    dtype = ir.DataType.FLOAT8E4M3FN if stored is None else ir.DataType.INT8
    for node in pairs:
        zero = node.inputs[2].const_value
        assert zero.dtype == dtype
        assert not zero.numpy().astype(np.float32).any()
    weights = [node for node in pairs if node.inputs[0].const_value is not None]
    assert weights
    for node in weights:
        values, scale = node.inputs[0].const_value, node.inputs[1].const_value.numpy().astype(np.float32)
        axis = node.attributes["axis"].as_int()
        assert values.dtype == dtype
        assert scale.shape == (values.shape[axis],)
        largest = np.abs(values.numpy().astype(np.float32)).max(
            axis=tuple(other for other in range(len(values.shape)) if other != axis)
        )
        assert (
            largest >= 0.98 * (448 if stored is None else 127)
        ).all()  # the whole range is used, but for rounded scales


def test_weights_are_rounded_to_the_nearest_step(bundle):
    plain, small = ir.load(bundle.graph("fp32")).graph, ir.load(bundle.graph("int8")).graph
    ups = {node.outputs[0]: node for node in small if node.op_type == "DequantizeLinear"}
    small_layers = {node.name: node for node in small}
    for layer in layers_of(plain):
        weight = layer.inputs[1].const_value.numpy()
        up = ups[small_layers[layer.name].inputs[1]]
        axis = up.attributes["axis"].as_int()
        steps = up.inputs[1].const_value.numpy().reshape([-1 if one == axis else 1 for one in range(weight.ndim)])
        error = np.abs(up.inputs[0].const_value.numpy() * steps - weight)
        assert (error <= steps * 0.501).all(), layer.name


def test_layers_that_are_left_out_stay_as_they_are(bundle, tmp_path, faces, calibrated):
    source, target = bundle.graph("fp32"), tmp_path / "int8.onnx"
    names = [node.name for node in layers_of(ir.load(source).graph)]
    calibration = calibrated(source, faces[0][:40])
    kept = to_int8(source, target, calibration, skip=names)
    assert set(kept["left out"]) == set(names)
    assert not any(node.op_type in PAIRS for node in onnx.load(target).graph.node)
    kept = to_int8_fp16(source, target, calibration, skip=names[1:])
    assert set(kept["left out"]) == set(names[1:])
    assert sum(node.op_type == "QuantizeLinear" for node in onnx.load(target).graph.node) == 1


@pytest.mark.slow
@pytest.mark.parametrize("convert", [to_fp16, to_int8, to_int8_fp16, to_fp8])
def test_calibrations_of_another_graph_are_refused(bundle, tmp_path, faces, calibrated, convert):
    source, target = bundle.graph("fp32"), tmp_path / "x.onnx"
    found = calibrated(source, faces[0][:12])
    with pytest.raises(BadInput, match="another graph"):
        convert(source, target, found.model_copy(update={"extremes": {}, "ranges": {}}))
    with pytest.raises(BadInput, match="without calibration"):
        convert(source, target, None)
    assert not target.exists()


def test_a_graph_that_is_quantised_already_is_refused(bundle, tmp_path):
    with pytest.raises(BadInput, match="quantised already"):
        feeds_of(bundle.graph("int8"))


def test_bf16_needs_no_calibration(bundle, tmp_path):
    kept = to_bf16(bundle.graph("fp32"), tmp_path / "x.onnx", None)
    assert kept == bundle.manifest.graphs["bf16"].kept
    assert (tmp_path / "x.onnx").read_bytes() == bundle.graph("bf16").read_bytes()


@pytest.mark.parametrize("limit", [1000, 10**9], ids=["beside it", "in it"])
def test_a_graph_made_of_one_with_weights_beside_it_needs_none_of_that(
    limit, bundle, tmp_path, faces, calibrated, monkeypatch
):
    monkeypatch.setattr(onnx_graph, "INLINE_LIMIT", 1000)
    source, target = tmp_path / "a/model.onnx", tmp_path / "b/model.int8.onnx"
    for path in (source, target):
        path.parent.mkdir()
    onnx_graph.save_graph(ir.load(bundle.graph("fp32")), source)
    assert (tmp_path / "a/model.onnx.data").is_file()
    monkeypatch.setattr(onnx_graph, "INLINE_LIMIT", limit)
    to_int8(source, target, calibrated(source, faces[0][:40]))
    shutil.rmtree(source.parent)
    assert {file.name for file in target.parent.iterdir()} - {"model.int8.onnx.data"} == {"model.int8.onnx"}
    assert (tmp_path / "b/model.int8.onnx.data").is_file() == (limit == 1000)
    settings = {"precision": "int8", "face_shape": (32, 32, 1), "max_batch": 64}
    assert open_engine(BACKENDS["onnxruntime"], target, **settings).run(faces[0][:4]).label.shape == (4,)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.slow
def test_layers_that_share_a_weight_share_its_rounded_form(layout, run_dir, tmp_path, faces, calibrated):
    """Channel attention sends two pooled vectors through the same layers."""
    config = read_run(run_dir).config.model.model_copy(update={"pyramid_channels": 256, "attention": ("cbam",)})
    torch.manual_seed(0)
    members = [ConvNeXtEmoteNet(config).eval() for _ in range(2)]
    graphs, _ = prepare_members(members, [config] * 2, (1, 32, 32))
    source, target = tmp_path / "model.onnx", tmp_path / "model.int8.onnx"
    fold = Fold(LAYOUTS[layout](graphs), views_named(["identity"]), Decision())
    export_fold(fold, source, face_shape=(32, 32, 1), max_batch=16)
    to_int8(source, target, calibrated(source, faces[0][:40]))
    graph = ir.load(target).graph
    shared = [node for node in graph if node.op_type == "DequantizeLinear" and len(node.outputs[0].uses()) > 1]
    assert any(".rounded" in node.outputs[0].name and "attention" in node.outputs[0].name for node in shared)
    sessions = [onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]) for path in (target, source)]
    found, wanted = (session.run(["probabilities"], {"faces": faces[0]}) for session in sessions)
    assert np.abs(found[0] - wanted[0]).max() < 0.05


@pytest.mark.parametrize(("stored", "smallest"), [(ir.DataType.FLOAT, 1e-9 / 127), (ir.DataType.FLOAT16, 2.0**-17)])
def test_only_scales_in_fp16_have_a_smallest_step_that_matters(stored, smallest):
    steps = quantize._scales(np.array([0.0, 1e-9, 1.27]), ir.DataType.INT8, stored)
    assert steps[1:] == pytest.approx([smallest, 0.01], rel=1e-3)
    assert steps[0] > 0
