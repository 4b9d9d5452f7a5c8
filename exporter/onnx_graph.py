"""The fold as an ONNX file: exported, put in order by a visible list of passes, checked."""

import logging
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch

from emoexport.branches import repeat_members, scopes_of
from emoexport.errors import CheckFailed
from emoexport.fold import Branches, Fold
from emoexport.outcome import Outcome

__all__ = [
    "INLINE_LIMIT",
    "INPUT",
    "OPSET",
    "OUTPUTS",
    "PASSES",
    "check_graph",
    "export_fold",
    "operators",
    "opset_of",
    "save_graph",
]

INPUT = "faces"
OUTPUTS = (*Outcome._fields, "scores")
OPSET = 20
"""The first with Gelu; TensorRT 10 and 11, OpenVINO and ONNX Runtime read it."""

INLINE_LIMIT = 1_500_000_000
"""Weights of more bytes go beside the graph: protobuf ends at 2 GB."""


def export_fold(fold: Fold, path: Path, *, face_shape: tuple[int, int, int], max_batch: int) -> None:
    """Export a fold with a free number of faces.

    Args:
        fold: in evaluation mode.
        path: the ONNX file to write, as `save_graph` does.
        face_shape: `(H, W, C)` of the uint8 faces.
        max_batch: the largest number of faces in a call.

    Raises:
        CheckFailed: if the exported graph is not what was asked for.
    """
    faces = torch.zeros(2, *face_shape, dtype=torch.uint8)
    branches = fold.members if isinstance(fold.members, Branches) else Branches([])
    with warnings.catch_warnings(), branches.one_of_each() as answering:
        warnings.simplefilter("ignore")  # the exporter warns of its own deprecations
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.onnx.export(
            fold,
            (faces,),
            dynamo=True,
            opset_version=OPSET,
            input_names=[INPUT],
            output_names=list(OUTPUTS),
            # A range of few values would be exported as constants; engines hold the real limit.
            dynamic_shapes={INPUT: {0: torch.export.Dim("N", min=1, max=max(max_batch, 64))}},
            verbose=False,
            optimize=False,
        )
        assert program is not None
        repeat_members(program.model, list(branches), answering)
        program.optimize()
    for one_pass in PASSES:
        one_pass(program.model)
    save_graph(program.model, path)
    check_graph(path, face_shape=face_shape)


def save_graph(model: ir.Model, path: Path) -> None:
    """Write a graph; weights too large for one file go to `<path>.data`."""
    weights = [value.const_value for value in model.graph.initializers.values()]
    size = sum(weight.nbytes for weight in weights if weight is not None)
    if size > INLINE_LIMIT:
        ir.save(model, path, external_data=f"{path.name}.data")
    else:  # weights that were read from beside another graph would still be looked for there
        ir.save(ir.external_data.load_to_model(model), path)


def _name_by_scope(model: ir.Model) -> None:
    """Give each node the name of the module it came from, so that converters and people can tell them apart."""
    used: Counter[str] = Counter()
    for node in model.graph:
        scopes = [scope for scope in scopes_of(node) if scope]
        name = "/".join(scopes[-2:]) or node.op_type
        used[name] += 1
        node.name = name if used[name] == 1 else f"{name}.{used[name]}"


def _strip_metadata(model: ir.Model) -> None:
    """Drop what the exporter notes about its own run: stack traces name files of the machine it ran on."""
    for holder in (model, model.graph):
        holder.metadata_props.clear()
        holder.doc_string = None
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()


PASSES: tuple[Callable[[ir.Model], None], ...] = (_name_by_scope, _strip_metadata)


def check_graph(path: Path, *, face_shape: tuple[int, int, int]) -> None:
    """Check a graph file by path, as is needed past 2 GB.

    Raises:
        CheckFailed: if ONNX's checker refuses it, or its inputs and outputs are not ours.
    """
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as err:
        raise CheckFailed(f"{path.name} is no valid ONNX graph: {err}") from err
    graph = onnx.load(path, load_external_data=False).graph
    found = [_signature(value) for value in (*graph.input, *graph.output)]
    height, width, channels = face_shape
    emotions = found[1][2][-1] if len(found) > 1 else 0
    members_and_views = found[-1][2][1:3]
    wanted = [
        (INPUT, "UINT8", ["N", height, width, channels]),
        (OUTPUTS[0], "FLOAT", ["N", emotions]),
        (OUTPUTS[1], "INT64", ["N"]),
        (OUTPUTS[2], "FLOAT", ["N"]),
        (OUTPUTS[3], "FLOAT", ["N", *members_and_views, emotions]),
    ]
    if found != wanted:
        raise CheckFailed(f"{path.name} has the inputs and outputs {found}; needed are {wanted}.")


def _signature(value: onnx.ValueInfoProto) -> tuple[str, str, list[Any]]:
    tensor = value.type.tensor_type
    shape = [dim.dim_param or dim.dim_value for dim in tensor.shape.dim]
    return value.name, onnx.TensorProto.DataType.Name(tensor.elem_type), shape


def opset_of(path: Path) -> int:
    """The version of ONNX's operators that a graph file is written in."""
    imports = onnx.load(path, load_external_data=False).opset_import
    return next(int(entry.version) for entry in imports if not entry.domain)


def operators(path: Path) -> dict[str, int]:
    """How many nodes of each operator a graph file has, most frequent first."""
    graph = onnx.load(path, load_external_data=False).graph
    return dict(Counter(node.op_type for node in graph.node).most_common())
