import numpy as np
import onnx
import pytest

from emoexport.errors import BadInput, CheckFailed
from emoexport.quantize import quantized_nodes, to_fp16, to_int8

HALF, FLOAT = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT


def types_of(graph: onnx.GraphProto) -> dict[str, int]:
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    for value in (*graph.value_info, *graph.input, *graph.output):
        types[value.name] = value.type.tensor_type.elem_type
    return types


def test_fp16_is_fp16_in_the_members_and_fp32_around_them(bundle):
    model = onnx.shape_inference.infer_shapes(onnx.load(bundle.graph("fp16")), strict_mode=True)
    types = types_of(model.graph)
    inside = [node for node in model.graph.node if node.name.startswith("members.")]
    around = [node for node in model.graph.node if not node.name.startswith(("members.", "cast/"))]
    assert inside
    assert around
    assert all(types[name] != FLOAT for node in inside for name in (*node.input, *node.output) if name)
    assert all(types[name] != HALF for node in around for name in (*node.input, *node.output) if name)


def test_fp16_has_one_cast_for_what_enters_and_one_a_member_for_what_leaves(bundle):
    casts = [node.name for node in onnx.load(bundle.graph("fp16")).graph.node if node.name.startswith("cast/")]
    assert len(casts) == 1 + len(bundle.manifest.members)


def test_a_weight_beyond_fp16_is_refused(bundle, tmp_path):
    model = onnx.load(bundle.graph("fp32"))
    weight = next(
        tensor for tensor in model.graph.initializer if "mlp.fc1.weight" in tensor.name or tensor.dims == [16, 64]
    )
    values = onnx.numpy_helper.to_array(weight).copy()
    values.flat[0] = 1e6
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    onnx.save(model, tmp_path / "big.onnx")
    with pytest.raises(CheckFailed, match="1e\\+06"):
        to_fp16(tmp_path / "big.onnx", tmp_path / "half.onnx")
    assert not (tmp_path / "half.onnx").exists()


def test_int8_quantises_every_dense_layer_of_the_members_and_nothing_else(bundle):
    plain = onnx.load(bundle.graph("fp32"))
    model = onnx.load(bundle.graph("int8"))
    wanted = set(quantized_nodes(plain))
    makers = {output: node for node in model.graph.node for output in node.output}
    fed = {
        node.name
        for node in model.graph.node
        if any(makers.get(name) is not None and makers[name].op_type == "DequantizeLinear" for name in node.input)
    }
    assert fed == wanted
    depthwise = [
        n.name
        for n in plain.graph.node
        if n.op_type == "Conv" and any(a.name == "group" and a.i > 1 for a in n.attribute)
    ]
    assert depthwise
    assert not wanted & set(depthwise)
    assert sum("mlp.fc" in name for name in wanted) == 2 * 4 * len(bundle.manifest.members)


def test_int8_is_of_the_flavour_that_tensorrt_accepts(bundle):
    """Symmetric, int8 only, biases in floating point."""
    model = onnx.load(bundle.graph("int8"))
    tensors = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    pairs = [node for node in model.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert pairs
    for node in pairs:
        zero = tensors[node.input[2]]
        assert zero.dtype == np.int8
        assert not zero.any()
    assert not any(array.dtype == np.int32 for array in tensors.values())
    weights = [tensors[n.input[1]] for n in pairs if n.op_type == "DequantizeLinear" and n.input[0] in tensors]
    assert weights
    assert all(scale.ndim == 1 and scale.size > 1 for scale in weights)  # per output channel


def test_ranges_of_another_graph_are_refused(bundle, tmp_path):
    with pytest.raises(BadInput, match="another graph"):
        to_int8(bundle.graph("fp32"), tmp_path / "int8.onnx", {"somewhere": (-1.0, 1.0)})
    assert not (tmp_path / "int8.onnx").exists()
