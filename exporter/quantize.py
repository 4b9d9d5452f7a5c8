"""From the FP32 graph to one whose dense layers multiply 8-bit numbers: pairs of QuantizeLinear and DequantizeLinear.

The pairs are of the flavour that TensorRT accepts and ONNX Runtime and OpenVINO run: symmetric, activations per tensor,
weights per output channel and stored as 8-bit numbers, biases in floating point, outputs not quantised.
"""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from emoexport.calib.observer import refuse_quantised
from emoexport.calib.record import Calibration
from emoexport.errors import BadInput
from emoexport.half import Kept, by_reason, retype, stays_fp32
from emoexport.member_graph import in_member
from emoexport.onnx_graph import save_graph

__all__ = ["feeds_of", "layers_of", "to_fp8", "to_int8", "to_int8_fp16"]

_CHANNELS: Mapping[str, slice] = {"Conv": slice(2), "Gemm": slice(2), "MatMul": slice(-2, None)}
"""By operator, which dimensions of its weight are channels; stacked members have `(K, in, out)`."""

_OUTPUTS: Mapping[str, int] = {"Conv": 0, "Gemm": 1, "MatMul": -1}
"""By operator, the axis of the output channels."""

_SMALL = 16
"""Layers with fewer input or output channels stay as they are: nothing to gain, much to lose."""

_SMALLEST_STEP: Mapping[ir.DataType, float] = {ir.DataType.FLOAT16: 2.0**-17, ir.DataType.FLOAT: 2.0**-60}
"""By type of the scales, what one step is worth at least: below it FP16 has less than 7 bits to tell scales apart."""


def to_int8(source: Path, target: Path, calibration: Calibration | None, skip: Collection[str] = ()) -> Kept:
    """Have the members' dense layers multiply INT8, and leave FP32 between them.

    Args:
        source: the FP32 graph.
        target: the file to write.
        calibration: with the ranges of the activations that feed these layers.
        skip: names of nodes to leave as they are.

    Returns:
        Why layers of the members stay as they are, and their names.

    Raises:
        BadInput: if the calibration is missing or of another graph, or the graph is quantised already.
    """
    return _write(source, target, calibration, skip, ir.DataType.INT8, ir.DataType.FLOAT)


def to_int8_fp16(source: Path, target: Path, calibration: Calibration | None, skip: Collection[str] = ()) -> Kept:
    """As `to_int8`, with FP16 between the layers, for GPUs; what stays in FP32 is what `half.to_fp16` keeps."""
    return _write(source, target, calibration, skip, ir.DataType.INT8, ir.DataType.FLOAT16)


def to_fp8(source: Path, target: Path, calibration: Calibration | None, skip: Collection[str] = ()) -> Kept:
    """As `to_int8_fp16`, with FP8 (E4M3) in the place of INT8."""
    return _write(source, target, calibration, skip, ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT16)


def _write(
    source: Path,
    target: Path,
    calibration: Calibration | None,
    skip: Collection[str],
    dtype: ir.DataType,
    between: ir.DataType,
) -> Kept:
    model = ir.load(source)
    if calibration is None:
        raise BadInput("8-bit layers are made without calibration; needed are the ranges of what feeds them.")
    reasons = stays_fp32(model.graph, between, calibration)
    left = set(skip)
    skipped = {**dict.fromkeys(skip, "left out"), **{str(node.name): why for node, why in reasons.items()}}
    layers = layers_of(model.graph)
    wide = set(layers)
    few = {node: "depthwise or few channels" for node in model.graph if _is_layer(node) and node not in wide}
    _quantize(model.graph, [node for node in layers if node.name not in skipped], calibration, dtype, between)
    if between != ir.DataType.FLOAT:
        low = {node for node in model.graph if in_member(node.name) and node.name not in left}
        retype(model, low - set(reasons), between)
    save_graph(model, target)
    onnx.checker.check_model(str(target), full_check=True)
    return by_reason(reasons | few | {node: skipped[str(node.name)] for node in layers if node.name in skipped})


def layers_of(graph: ir.Graph) -> list[ir.Node]:
    """The layers that can be quantised: dense ones of the members, neither depthwise nor with few channels.

    Raises:
        BadInput: if the graph is quantised already.
    """
    refuse_quantised(graph)
    return [
        node
        for node in graph
        if _is_layer(node)
        # depthwise weights are (C, 1, k, k)
        and min(_weight_of(node).shape.numpy()[_CHANNELS[node.op_type]]) >= _SMALL
    ]


def feeds_of(source: Path) -> list[str]:
    """The tensors that feed the layers of a graph that can be quantised, by name."""
    return list(dict.fromkeys(str(_input(node).name) for node in layers_of(ir.load(source).graph)))


def _is_layer(node: ir.Node) -> bool:
    """Whether a node is a product with weights, in a member."""
    return (
        in_member(node.name)
        and node.op_type in _CHANNELS
        and len(node.inputs) > 1
        and node.inputs[1] is not None
        and node.inputs[1].const_value is not None
    )


def _input(node: ir.Node) -> ir.Value:
    value = node.inputs[0]
    assert value is not None
    return value


def _weight_of(node: ir.Node) -> ir.TensorProtocol:
    value = node.inputs[1]
    assert value is not None
    assert value.const_value is not None
    return value.const_value


def _quantize(
    graph: ir.Graph, layers: Sequence[ir.Node], calibration: Calibration, dtype: ir.DataType, scales: ir.DataType
) -> None:
    """Give each layer the rounded form of its input and of its weight; all other readers keep the exact ones."""
    ranges = calibration.ranges_of(str(_input(node).name) for node in layers)
    rounded: dict[ir.Value, ir.Value] = {}
    weights: dict[ir.Value, ir.Value] = {}
    for node in layers:
        value = _input(node)
        if value not in rounded:
            limit = max(map(abs, ranges[str(value.name)]))
            scale = _scales(np.array(limit), dtype, scales)
            rounded[value] = _pair(graph, value, scale, dtype)
        node.replace_input_with(0, rounded[value])
        _quantize_weight(graph, node, dtype, scales, weights)


def _pair(graph: ir.Graph, value: ir.Value, scale: NDArray[np.float32], dtype: ir.DataType) -> ir.Value:
    producer = value.producer()
    owner = (producer.name if producer is not None and in_member(producer.name) else None) or "members.input"
    parameters = [
        _constant(graph, f"{value.name}.scale", scale),
        _constant(graph, f"{value.name}.zero", np.zeros((), dtype.numpy()), dtype),
    ]
    down = ir.node("QuantizeLinear", [value, *parameters], name=f"{owner}/quantize")
    up = ir.node("DequantizeLinear", [down.outputs[0], *parameters], name=f"{owner}/dequantize")
    for node, ending, type_ in ((down, "quantized", dtype), (up, "rounded", ir.DataType.FLOAT)):
        output = node.outputs[0]
        output.name, output.type, output.shape = f"{value.name}.{ending}", ir.TensorType(type_), value.shape
    if producer is None:
        graph.insert_before(graph[0], [down, up])
    else:
        graph.insert_after(producer, [down, up])
    return up.outputs[0]


def _quantize_weight(
    graph: ir.Graph, node: ir.Node, dtype: ir.DataType, scales: ir.DataType, known: dict[ir.Value, ir.Value]
) -> None:
    """Store a weight as 8-bit numbers with a scale for each output channel, once for all layers that share it.

    DequantizeLinear takes scales along one axis only, and ONNX Runtime none of its own in a batched product. So of a
    stacked weight `(K, in, out)` each output of each member is brought to the whole range of the type beforehand, the
    weight as a whole has the scale 1, and the product is multiplied by the scales `(K, 1, out)`.
    """
    weight = node.inputs[1]
    assert weight is not None
    values = _weight_of(node).numpy()
    axis = _OUTPUTS[node.op_type] % values.ndim
    stacked = values.ndim == 3 and node.op_type == "MatMul"
    others = (1,) if stacked else tuple(index for index in range(values.ndim) if index != axis)
    scale = _scales(np.abs(values).max(axis=others, keepdims=True), dtype, scales)
    if stacked:
        _multiply(graph, node, scale)
    if weight not in known:
        stored = _constant(graph, f"{weight.name}.{dtype.name.lower()}", _as(values / scale, dtype), dtype)
        own = np.ones(()) if stacked else scale.reshape(-1)
        zeros = _constant(graph, f"{weight.name}.zero", np.zeros(own.shape, dtype.numpy()), dtype)
        parameters = [_constant(graph, f"{weight.name}.scale", own), zeros]
        up = ir.node("DequantizeLinear", [stored, *parameters], {} if stacked else {"axis": axis})
        up.name, output = f"{node.name}/weight", up.outputs[0]
        output.name, output.type, output.shape = (
            f"{weight.name}.rounded",
            ir.TensorType(ir.DataType.FLOAT),
            weight.shape,
        )
        graph.insert_before(node, up)
        known[weight] = output
    node.replace_input_with(1, known[weight])
    if not weight.uses():
        graph.initializers.pop(str(weight.name))


def _multiply(graph: ir.Graph, node: ir.Node, scale: NDArray[np.float32]) -> None:
    product = node.outputs[0]
    factor = _constant(graph, f"{node.name}.scale", scale)
    scaled = ir.node("Mul", [product, factor], name=f"{node.name}/scale")
    output = scaled.outputs[0]
    output.name, output.type, output.shape = f"{product.name}.scaled", product.type, product.shape
    for use in list(product.uses()):
        if use.node is not scaled:
            use.node.replace_input_with(use.idx, output)
    graph.insert_after(node, scaled)


def _scales(limits: NDArray[np.floating], dtype: ir.DataType, stored: ir.DataType) -> NDArray[np.float32]:
    """What one step is worth where the largest number of a type stands for a limit; exact in the type of the scales."""
    steps: NDArray[np.float32] = np.maximum(limits / _largest(dtype), _SMALLEST_STEP[stored]).astype(stored.numpy())
    return steps.astype(np.float32)


def _largest(dtype: ir.DataType) -> float:
    return 127 if dtype == ir.DataType.INT8 else float(dtype.max)


def _as(values: NDArray[np.floating], dtype: ir.DataType) -> NDArray[np.generic]:
    """The nearest numbers of a type."""
    largest = _largest(dtype)
    near = np.rint(values) if dtype == ir.DataType.INT8 else values
    found: NDArray[np.generic] = np.clip(near, -largest, largest).astype(dtype.numpy())
    return found


def _constant(
    graph: ir.Graph, name: str, array: NDArray[np.generic], dtype: ir.DataType = ir.DataType.FLOAT
) -> ir.Value:
    """An initializer; the one of this name if there is one."""
    if name in graph.initializers:
        return graph.initializers[name]
    tensor = ir.Tensor(np.asarray(array, dtype.numpy()), dtype=dtype, name=name)
    value = ir.Value(name=name, type=ir.TensorType(dtype), shape=tensor.shape, const_value=tensor)
    graph.register_initializer(value)
    return value
