"""From the FP32 graph to the same graph in another precision. The types stand in the graph itself."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnxruntime.quantization import CalibrationMethod, QuantType
from onnxruntime.quantization.calibrate import TensorsData
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

from emoexport.errors import BadInput, CheckFailed
from emoexport.onnx_graph import INLINE_LIMIT, save_graph

__all__ = ["QUANTIZED_OPERATORS", "quantized_nodes", "to_fp16", "to_int8"]

Ranges = Mapping[str, tuple[float, float]]

QUANTIZED_OPERATORS = ("Conv", "MatMul", "Gemm")

_SMALL = 16
"""Layers with fewer input or output channels stay as they are: nothing to gain, much to lose."""


def to_fp16(source: Path, target: Path, ranges: Ranges | None = None) -> None:  # noqa: ARG001 (one signature for all)
    """Make the members compute in FP16.

    Views, softmax, vote and decision stay in FP32: they cost little, and a tie should not turn on rounding.

    Raises:
        CheckFailed: if a weight lies beyond FP16's 65,504.
    """
    model = ir.load(source)
    _retype_members(model, ir.DataType.FLOAT16)
    save_graph(model, target)
    onnx.checker.check_model(str(target), full_check=True)


def _retype_members(model: ir.Model, dtype: ir.DataType) -> None:
    """Give every FP32 tensor inside the members another type, with one Cast for each value that crosses over."""
    graph = model.graph
    entered: dict[ir.Value, ir.Value] = {}
    members = [node for node in graph if _in_member(node.name)]
    inside = set(members)
    for node in members:
        for index, value in enumerate(node.inputs):
            if value is None or value.dtype != ir.DataType.FLOAT or value.producer() in inside:
                continue
            if value not in entered:
                entered[value] = _weight_as(graph, value, dtype) or _cast_before(graph, node, value, dtype)
            node.replace_input_with(index, entered[value])
        if node.op_type == "Cast" and node.attributes["to"].as_int() == ir.DataType.FLOAT:
            node.attributes["to"] = ir.AttrInt64("to", dtype)
    for node in members:
        for value in node.outputs:
            if value.dtype != ir.DataType.FLOAT:
                continue
            value.dtype = dtype
            outside = [use for use in value.uses() if use.node not in inside]
            if outside:
                back = _cast_after(graph, node, value, ir.DataType.FLOAT)
                for use in outside:
                    use.node.replace_input_with(use.idx, back)
    for name in [name for name, value in graph.initializers.items() if not value.uses()]:
        del graph.initializers[name]


def _cast_before(graph: ir.Graph, node: ir.Node, value: ir.Value, dtype: ir.DataType) -> ir.Value:
    cast = _cast(value, dtype)
    graph.insert_before(node, cast)
    return cast.outputs[0]


def _cast_after(graph: ir.Graph, node: ir.Node, value: ir.Value, dtype: ir.DataType) -> ir.Value:
    cast = _cast(value, dtype)
    graph.insert_after(node, cast)
    return cast.outputs[0]


def _cast(value: ir.Value, dtype: ir.DataType) -> ir.Node:
    name = f"{value.name}.{dtype.name.lower()}"
    output = ir.Value(name=name, type=ir.TensorType(dtype), shape=value.shape)
    return ir.Node("", "Cast", [value], [ir.AttrInt64("to", dtype)], outputs=[output], name=f"cast/{name}")


def _weight_as(graph: ir.Graph, value: ir.Value, dtype: ir.DataType) -> ir.Value | None:
    """A copy of a weight in another type; None where the value is no weight."""
    if value.const_value is None:
        return None
    array = value.const_value.numpy()
    limit = np.finfo(dtype.numpy()).max
    if np.abs(array).max(initial=0) > limit:
        raise CheckFailed(
            f"the weight {value.name} reaches {np.abs(array).max():.3g}, beyond the {limit:.3g} of {dtype.name}."
        )
    name = f"{value.name}.{dtype.name.lower()}"
    weight = ir.Value(
        name=name,
        type=ir.TensorType(dtype),
        shape=value.shape,
        const_value=ir.Tensor(array.astype(dtype.numpy()), name=name),
    )
    graph.register_initializer(weight)
    return weight


def to_int8(source: Path, target: Path, ranges: Ranges | None = None) -> None:
    """Put Q/DQ pairs around the heavy layers of the members.

    Symmetric int8 activations and weights, weights per output channel, float biases: what TensorRT accepts
    and ONNX Runtime and OpenVINO run.

    Args:
        source: the FP32 graph.
        target: the file to write.
        ranges: lowest and highest value of each activation that feeds a quantised layer.

    Raises:
        BadInput: if a range is missing: the calibration is of another graph.
    """
    model = onnx.load(source)
    nodes = quantized_nodes(model)
    whole = _scale_outside(model.graph, set(nodes))
    initializers = {tensor.name for tensor in model.graph.initializer}
    feeds = {node.input[0] for node in model.graph.node if node.name in nodes} - initializers
    missing = sorted(feeds - set(ranges or {}))
    if missing or ranges is None:
        raise BadInput(
            f"the calibration has no range for '{missing[0] if missing else 'any tensor'}': it is of another graph.",
            hint="build again",
        )
    quantizer = QDQQuantizer(
        model=model,
        per_channel=True,
        reduce_range=False,
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType.QInt8,
        tensors_range=_tensors_data({name: ranges[name] for name in feeds}),
        nodes_to_quantize=nodes,
        nodes_to_exclude=[],
        op_types_to_quantize=list(QUANTIZED_OPERATORS),
        extra_options={
            "ActivationSymmetric": True,
            "WeightSymmetric": True,
            "QuantizeBias": False,
            "AddQDQPairToWeight": False,
            "OpTypesToExcludeOutputQuantization": list(QUANTIZED_OPERATORS),
            "QDQOpTypePerChannelSupportToAxis": {"Conv": 0, "MatMul": 1, "Gemm": 1},
            "TensorQuantOverrides": {name: [{"scale": np.float32(1), "zero_point": np.int8(0)}] for name in whole},
        },
    )
    quantizer.quantize_model()
    _round_for(quantizer.model.model.graph, set(nodes))
    quantizer.model.topological_sort()
    _save(quantizer.model.model, target)


def _scale_outside(graph: onnx.GraphProto, nodes: set[str]) -> list[str]:
    """Divide stacked weights `(K, in, out)` of `nodes` by a scale `(K, 1, out)`, and multiply their products by it.

    DequantizeLinear takes scales along one axis only, and ONNX Runtime none of its own in a batched product. So each
    output of each member is brought to the whole range of INT8 beforehand, and the weight as a whole has the scale 1.

    Returns:
        Names of these weights.
    """
    weights = {tensor.name: tensor for tensor in graph.initializer}
    batched = [node for node in graph.node if node.name in nodes and len(weights[node.input[1]].dims) == 3]
    for node in batched:
        weight = weights[node.input[1]]
        values = onnx.numpy_helper.to_array(weight)
        scale = np.maximum(np.abs(values).max(axis=1, keepdims=True), np.finfo(np.float32).tiny) / 127
        weight.CopyFrom(onnx.numpy_helper.from_array(values / scale, weight.name))
        name, product, result = f"{node.name}.scale", f"{node.output[0]}.unscaled", node.output[0]
        graph.initializer.append(onnx.numpy_helper.from_array(scale, name))
        graph.node.append(onnx.helper.make_node("Mul", [product, name], [result], name=name))
        node.output[0] = product
    return [node.input[1] for node in batched]


def _round_for(graph: onnx.GraphProto, nodes: set[str]) -> None:
    """Let `nodes` alone read the rounded activations: the quantiser gives them to all readers, also past the branch."""
    quantized = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "QuantizeLinear"}
    pairs = [node for node in graph.node if node.op_type == "DequantizeLinear" and node.input[0] in quantized]
    exact = {pair.output[0]: quantized[pair.input[0]] for pair in pairs}
    for node in graph.node:
        if node.name not in nodes:
            node.input[:] = [exact.get(name, name) for name in node.input]


def quantized_nodes(model: onnx.ModelProto) -> list[str]:
    """Names of the nodes to quantise: dense layers of the members, neither depthwise nor tiny."""
    shapes = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    channels = {"Conv": slice(2), "Gemm": slice(2), "MatMul": slice(-2, None)}  # stacked members have (K, in, out)
    return [
        node.name
        for node in model.graph.node
        if node.op_type in QUANTIZED_OPERATORS
        and _in_member(node.name)
        and len(node.input) > 1
        and min(shapes.get(node.input[1], [0])[channels[node.op_type]]) >= _SMALL  # depthwise weights are (C, 1, k, k)
    ]


def _in_member(name: str | None) -> bool:
    return (name or "").startswith("members.")


def _tensors_data(ranges: Ranges) -> TensorsData:
    pairs = {name: (np.float32(low), np.float32(high)) for name, (low, high) in ranges.items()}
    return TensorsData(CalibrationMethod.MinMax, pairs)


def _save(model: onnx.ModelProto, path: Path) -> None:
    external = model.ByteSize() > INLINE_LIMIT
    onnx.save(model, path, save_as_external_data=external, location=f"{path.name}.data")
    onnx.checker.check_model(str(path), full_check=True)
