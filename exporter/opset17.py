"""Graphs for TensorRT 8.6, whose parser ends at opset 17."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from emoexport.errors import CheckFailed
from emoexport.onnx_graph import save_graph

__all__ = ["to_opset_17"]

_OPSET = 17
_REDUCTIONS = frozenset({"ReduceL1", "ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd"})
"""Axes are an attribute of these up to 17, and an input from 18 on."""

_SINCE = {
    "Resize": ("antialias", "axes", "keep_aspect_ratio_policy"),
    "Cast": ("saturate",),
    "QuantizeLinear": ("saturate",),
    **dict.fromkeys(_REDUCTIONS, ("noop_with_empty_axes",)),
}
"""Attributes from after 17, which mean what 17 does where they have their usual values; the checker finds others."""


def to_opset_17(source: Path, target: Path) -> None:
    """Say the same as a graph in operators of opset 17.

    Gelu becomes its definition, x (1 + erf(x / sqrt 2)) / 2; axes of reductions become attributes.

    Args:
        source: a graph of opset 20 with FP32 members, or INT8 ones with FP32 between.
        target: the file to write.

    Raises:
        CheckFailed: if the graph has an operator that opset 17 lacks.
    """
    model = ir.load(source)
    for node in list(model.graph):
        for name in _SINCE.get(node.op_type, ()):
            node.attributes.pop(name, None)
        if node.op_type == "Gelu":
            _write_out(model.graph, node)
        elif node.op_type in _REDUCTIONS and len(node.inputs) == 2 and node.inputs[1] is not None:
            axes = ir.convenience.get_const_tensor(node.inputs[1])
            if axes is not None:  # the checker refuses the node if it is not known
                node.resize_inputs(1)
                node.attributes.add(ir.AttrInt64s("axes", [int(axis) for axis in axes.numpy()]))
    model.graph.opset_imports[""] = _OPSET
    RemoveUnusedNodesPass()(model)  # axes that nothing reads any more
    save_graph(model, target)
    try:
        onnx.checker.check_model(target, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as err:
        target.unlink()
        raise CheckFailed(
            f"{source.name} cannot be said in opset {_OPSET}: {str(err).splitlines()[0]}",
            hint="a later version of TensorRT takes the graph as it is",
        ) from err


def _write_out(graph: ir.Graph, gelu: ir.Node) -> None:
    """Replace a Gelu by its definition, under names that keep it among the nodes of its member."""
    (x,), (out,) = gelu.inputs, gelu.outputs
    scalars = {}
    for name, number in (("root", np.sqrt(0.5)), ("one", 1.0), ("half", 0.5)):
        value = ir.Value(name=f"{gelu.name}.{name}", const_value=ir.tensor(np.float32(number)))
        graph.register_initializer(value)
        scalars[name] = value
    nodes: list[ir.Node] = []

    def add(op_type: str, *inputs: ir.Value | None) -> ir.Value:
        node = ir.node(op_type, inputs, name=f"{gelu.name}.{op_type.lower()}.{len(nodes)}")
        node.outputs[0].name = f"{node.name}.out"
        nodes.append(node)
        return node.outputs[0]

    whole = add(
        "Mul", add("Mul", x, scalars["half"]), add("Add", add("Erf", add("Mul", x, scalars["root"])), scalars["one"])
    )
    ir.convenience.replace_nodes_and_values(graph, gelu, [gelu], nodes, [out], [whole])
