"""From the FP32 graph to FP16 or BF16 members, with FP32 kept where range or reduction needs it."""

from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from emoexport.calib.record import Calibration
from emoexport.errors import BadInput
from emoexport.member_graph import in_member
from emoexport.onnx_graph import save_graph

__all__ = ["HEADROOM", "Kept", "by_reason", "retype", "stays_fp32", "to_bf16", "to_fp16"]

Kept = dict[str, tuple[str, ...]]
"""Why nodes of the members stay in FP32, and which."""

HEADROOM = 2.0
"""How many times the largest value seen in calibration has to fit: other faces reach further."""

_REDUCTIONS = frozenset({"GlobalAveragePool", "ReduceL2", "ReduceMean", "ReduceSum", "ReduceSumSquare", "Softmax"})
"""Long sums, which FP16 ends at 65,504 and BF16 at 8 bits. LayerNormalization is none of them: by its specification it
computes in FP32 whatever goes in (attribute `stash_type`)."""

_POWERS = frozenset({"Div", "Exp", "Log", "Pow", "Reciprocal", "Sqrt"})
"""What makes small numbers vanish and large ones overflow."""

_BF16_OPSET = 22
"""The first with Conv in BF16. Nothing that a fold is made of means another thing than in opset 20."""


def to_fp16(source: Path, target: Path, calibration: Calibration | None, skip: Collection[str] = ()) -> Kept:
    """Make the members compute in FP16.

    Views, softmax, vote and decision stay in FP32: they cost little, and a tie should not turn on rounding. So do, in
    the members, reductions, powers, and what does not fit.

    Args:
        source: the FP32 graph.
        target: the file to write.
        calibration: with the extremes of the members' tensors on real faces.
        skip: names of nodes to leave as they are.

    Returns:
        Why nodes of the members stay in FP32, and their names.

    Raises:
        BadInput: if the calibration is missing, or of another graph.
    """
    return _write(source, target, ir.DataType.FLOAT16, calibration, skip)


def to_bf16(source: Path, target: Path, calibration: Calibration | None = None, skip: Collection[str] = ()) -> Kept:
    """Make the members compute in BF16, which has the range of FP32 and 8 bits of precision; else as `to_fp16`."""
    return _write(source, target, ir.DataType.BFLOAT16, calibration, skip)


def _write(
    source: Path, target: Path, dtype: ir.DataType, calibration: Calibration | None, skip: Collection[str]
) -> Kept:
    model = ir.load(source)
    reasons = stays_fp32(model.graph, dtype, calibration)
    reasons |= {node: "left out" for node in model.graph if node.name in skip}
    retype(model, {node for node in model.graph if in_member(node.name)} - set(reasons), dtype)
    save_graph(model, target)
    onnx.checker.check_model(str(target), full_check=True)
    return by_reason(reasons)


def by_reason(reasons: Mapping[ir.Node, str]) -> Kept:
    """Turn why each node stays as it is into what stays for which reason."""
    kept: dict[str, list[str]] = {}
    for node, why in reasons.items():
        kept.setdefault(why, []).append(str(node.name))
    return {why: tuple(names) for why, names in kept.items()}


def stays_fp32(graph: ir.Graph, dtype: ir.DataType, calibration: Calibration | None) -> dict[ir.Node, str]:
    """Which nodes of the members cannot compute in another floating-point type, and why.

    Raises:
        BadInput: if that takes a calibration and it is missing, or of another graph.
    """
    if dtype == ir.DataType.FLOAT:
        return {}
    members = [node for node in graph if in_member(node.name)]
    extremes: Mapping[str, tuple[float, float]] = {}
    if dtype == ir.DataType.FLOAT16:
        if calibration is None:
            raise BadInput("FP16 is made without calibration; needed are the extremes of activations on real faces.")
        extremes = calibration.extremes_of(
            str(value.name) for node in members for value in node.outputs if value.dtype == ir.DataType.FLOAT
        )
    found = {node: _why_fp32(node, float(dtype.max), extremes) for node in members}
    return {node: why for node, why in found.items() if why}


def _why_fp32(node: ir.Node, limit: float, extremes: Mapping[str, tuple[float, float]]) -> str:
    """Why a node of a member cannot compute in a type with this largest number; empty if it can."""
    if node.op_type in _REDUCTIONS:
        return "reduction"
    if node.op_type in _POWERS:
        return "power"
    for value in (*node.inputs, *node.outputs):
        if value is None:
            continue
        low, high = extremes.get(str(value.name), (0.0, 0.0))
        if HEADROOM * max(-low, high) > limit:
            return f"activations within a factor of {HEADROOM:g} of {limit:g}"
        weight = value.const_value if value.dtype == ir.DataType.FLOAT else None
        if weight is not None and np.abs(weight.numpy()).max(initial=0) > limit:
            return f"weights beyond {limit:g}"
    return ""


def retype(model: ir.Model, low: set[ir.Node], dtype: ir.DataType) -> None:
    """Give nodes another type instead of FP32, with one Cast for each value that crosses over."""
    graph = model.graph
    if dtype == ir.DataType.BFLOAT16:
        graph.opset_imports[""] = _BF16_OPSET
    entered: dict[ir.Value, ir.Value] = {}
    for node in [node for node in graph if node in low]:
        for index, value in enumerate(node.inputs):
            if value is None or value.dtype != ir.DataType.FLOAT or value.producer() in low:
                continue
            if value not in entered:
                entered[value] = _weight_as(graph, value, dtype) or _cast(graph, node, value, dtype, before=True)
            node.replace_input_with(index, entered[value])
        if node.op_type == "Cast" and node.attributes["to"].as_int() == ir.DataType.FLOAT:
            node.attributes["to"] = ir.AttrInt64("to", dtype)
    for node in low:
        for value in node.outputs:
            if value.dtype != ir.DataType.FLOAT:
                continue
            value.dtype = dtype
            outside = [use for use in value.uses() if use.node not in low]
            if outside:
                back = _cast(graph, node, value, ir.DataType.FLOAT, before=False)
                for use in outside:
                    use.node.replace_input_with(use.idx, back)
    for name in [name for name, value in graph.initializers.items() if not value.uses()]:
        del graph.initializers[name]


def _cast(graph: ir.Graph, node: ir.Node, value: ir.Value, dtype: ir.DataType, *, before: bool) -> ir.Value:
    """A value in another type, cast before or after a node."""
    name = f"{value.name}.{dtype.name.lower()}"
    output = ir.Value(name=name, type=ir.TensorType(dtype), shape=value.shape)
    cast = ir.Node("", "Cast", [value], [ir.AttrInt64("to", dtype)], outputs=[output], name=f"cast/{name}")
    if before:
        graph.insert_before(node, cast)
    else:
        graph.insert_after(node, cast)
    return output


def _weight_as(graph: ir.Graph, value: ir.Value, dtype: ir.DataType) -> ir.Value | None:
    """A copy of a weight in another type; None where the value is no weight."""
    if value.const_value is None:
        return None
    name = f"{value.name}.{dtype.name.lower()}"
    array = value.const_value.numpy().astype(dtype.numpy())
    weight = ir.Value(
        name=name, type=ir.TensorType(dtype), shape=value.shape, const_value=ir.Tensor(array, dtype=dtype, name=name)
    )
    graph.register_initializer(weight)
    return weight
