"""What a bundle holds and what a face costs, from its manifest and its graph files alone: no torch, no training run."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from typing import Literal

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError

from emoexport.bundle import Bundle
from emoexport.config import Record
from emoexport.decision import Decision
from emoexport.engines.certificate import Certificate, certificates_in
from emoexport.engines.passport import Passport, passports_in
from emoexport.errors import BadBundle, EmoexportError
from emoexport.manifest import CalibrationEntry, LayoutEntry, MemberEntry, PackageEntry, ViewEntry
from emoexport.passes import Choice
from emoexport.precision import ONNX_NUMBERS

__all__ = ["LAYERS", "BundleSummary", "GraphSummary", "PackageSummary", "TypeCount", "summarize"]

LAYERS = frozenset({"Conv", "ConvTranspose", "Einsum", "Gemm", "MatMul"})
"""The operators that do nearly all the arithmetic: those that `flops.gflop_a_pass` counts."""

_SMALL_BYTES = 4096
"""Constants up to this size may be shapes, which inference reads; the values of larger ones are not needed."""


class TypeCount(Record):
    """What one tensor type does in a graph."""

    weights: int = 0
    """Numbers in the initializers of this type, the constants of the views among them."""
    weight_bytes: int = 0
    layers: int = 0
    """Nodes of `LAYERS` that compute in this type: that of their output, or, where input and weight both come from
    DequantizeLinear, the type that was dequantised, since that is what an engine makes of the pair."""
    other_nodes: int = 0
    """All other nodes, by the type of their first output."""


class GraphSummary(Record):
    """One graph of the bundle."""

    file: str
    bytes: int
    """With the weights that lie beside it."""
    opset: int
    operators: dict[str, int]
    """Nodes of each operator, most frequent first."""
    kept: dict[str, tuple[str, ...]]
    """By reason, the nodes of members that stayed in FP32, or unquantised."""
    types: dict[str, TypeCount]
    """The precision histogram, by ONNX tensor type (FLOAT, FLOAT16, INT8, ...), most weight bytes first."""

    def layers_by_number(self) -> dict[str, int]:
        """Nodes of `LAYERS` by our name of the type of number that they compute in."""
        found: Counter[str] = Counter()
        for kind, count in self.types.items():
            found[ONNX_NUMBERS.get(kind, kind.lower())] += count.layers
        return dict(+found)


class PackageSummary(PackageEntry):
    """The fold compiled for one kind of machine."""

    bytes: int


class BundleSummary(Record):
    """What `emoexport inspect` finds."""

    schema_version: Literal[1] = 1
    bundle: str
    digest: str
    """Of the manifest."""
    created: str
    face_shape: tuple[int, int, int]
    """`(H, W, C)`."""
    max_batch: int
    labels: tuple[str, ...]
    members: tuple[MemberEntry, ...]
    views: tuple[ViewEntry, ...]
    choice: Choice
    """What of the run was asked for."""
    vote: str
    decision: Decision
    layout: LayoutEntry
    rewrites: dict[str, int] | None
    """By name, how many nodes each took out; None where the bundle is from before there were any."""
    passes_a_face: int
    """Computed: those of a view that shows what another one does are not."""
    parameters: int | None
    """Of all members; None where the bundle is from before they were counted, as in the next field."""
    gflop_a_face: float | None
    """10^9 floating-point operations of all these passes, as `flops.gflop_a_pass` counts them."""
    bytes_in_a_face: int
    bytes_out_a_face: dict[str, int]
    """By output of the graph."""
    calibration: CalibrationEntry | None
    """What the activations were calibrated on; None where nothing needed it."""
    graphs: dict[str, GraphSummary]
    """By precision."""
    engines: dict[str, PackageSummary]
    """What PyTorch compiled ahead of time, by name of the engine."""
    passports: dict[str, Passport]
    """Of engines that were built of the graphs, by name of the engine."""
    certificates: dict[str, Certificate]
    """What `verify` has shown, by name of the engine; whether it holds here, who opens the engine asks."""


def summarize(bundle: Bundle) -> BundleSummary:
    """Read what a bundle holds.

    Raises:
        BadBundle: if a graph cannot be read.
    """
    try:
        return _summarized(bundle)
    except EmoexportError:
        raise
    except Exception as err:  # a type of number that onnx does not know, and what is missing, share no base
        raise BadBundle(
            f"a graph of {bundle.path} cannot be read as ONNX: {err}.", hint=bundle.build_command()
        ) from err


def _summarized(bundle: Bundle) -> BundleSummary:
    manifest = bundle.manifest
    models = {precision: _read_graph(bundle, precision) for precision in manifest.graphs}
    parameters = [member.parameters for member in manifest.members if member.parameters is not None]
    return BundleSummary(
        bundle=str(bundle.path),
        digest=manifest.digest,
        created=bundle.built,
        face_shape=manifest.face_shape,
        max_batch=manifest.max_batch,
        labels=manifest.labels,
        members=manifest.members,
        views=manifest.views,
        choice=manifest.choice,
        vote=manifest.vote,
        decision=manifest.decision,
        layout=manifest.layout,
        rewrites=manifest.rewrites,
        passes_a_face=manifest.passes_a_face,
        parameters=sum(parameters) if len(parameters) == len(manifest.members) else None,
        gflop_a_face=manifest.gflop_a_face,
        calibration=manifest.calibration,
        bytes_in_a_face=math.prod(manifest.face_shape),
        bytes_out_a_face=_output_bytes(next(iter(models.values())).graph),
        graphs={precision: _summary_of(bundle, precision, model) for precision, model in models.items()},
        engines={
            name: PackageSummary(**dict(entry), bytes=bundle.sizes()[name]) for name, entry in manifest.engines.items()
        },
        passports=passports_in(bundle.path),
        certificates=certificates_in(bundle.path),
    )


def _read_graph(bundle: Bundle, precision: str) -> onnx.ModelProto:
    """A graph with the types of all its tensors, and without the values of its weights."""
    path = bundle.graph(precision)
    try:
        model = onnx.load(path, load_external_data=False)
        for tensor in model.graph.initializer:
            if len(tensor.raw_data) > _SMALL_BYTES:
                tensor.ClearField("raw_data")
        model = onnx.shape_inference.infer_shapes(model)
    except (DecodeError, onnx.shape_inference.InferenceError) as err:
        raise BadBundle(f"{path} cannot be read as ONNX: {err}.", hint=bundle.build_command()) from err
    if not model.graph.output:
        raise BadBundle(f"{path} cannot be read as ONNX: it has no outputs.", hint=bundle.build_command())
    return model


def _summary_of(bundle: Bundle, precision: str, model: onnx.ModelProto) -> GraphSummary:
    return GraphSummary(
        file=bundle.manifest.graphs[precision].file,
        bytes=bundle.size_of(precision),
        opset=next(entry.version for entry in model.opset_import if not entry.domain),
        kept=bundle.manifest.graphs[precision].kept,
        operators=dict(Counter(node.op_type for node in model.graph.node).most_common()),
        types=_type_counts(model.graph),
    )


def _output_bytes(graph: onnx.GraphProto) -> dict[str, int]:
    """Bytes of each output for one face: all axes but the first."""
    found = {}
    for value in graph.output:
        tensor = value.type.tensor_type
        found[value.name] = _bytes_of(tensor.elem_type, (dim.dim_value for dim in tensor.shape.dim[1:]))
    return found


def _type_counts(graph: onnx.GraphProto) -> dict[str, TypeCount]:
    counts: dict[int, Counter[str]] = defaultdict(Counter)
    for tensor in graph.initializer:
        counts[tensor.data_type]["weights"] += math.prod(tensor.dims)
        counts[tensor.data_type]["weight_bytes"] += _bytes_of(tensor.data_type, tensor.dims)
    for kind, of_type in _computing_types(graph):
        counts[of_type][kind] += 1
    ordered = sorted(counts.items(), key=lambda item: (-item[1]["weight_bytes"], item[0]))
    return {onnx.TensorProto.DataType.Name(number): TypeCount(**count) for number, count in ordered}


def _computing_types(graph: onnx.GraphProto) -> Iterator[tuple[str, int]]:
    """Of each node `layers` or `other_nodes`, and the number of the type that it computes in."""
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.value_info, *graph.output)}
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    dequantized = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    for node in graph.node:
        operands = list(node.input[:2])  # a bias follows, which stays in floating point
        quantized = node.op_type in LAYERS and all(name in dequantized for name in operands)
        deciding = dequantized[operands[0]] if quantized else node.output[0]
        yield "layers" if node.op_type in LAYERS else "other_nodes", types.get(deciding, onnx.TensorProto.UNDEFINED)


def _bytes_of(data_type: int, shape: Iterable[int]) -> int:
    return math.ceil(math.prod(shape) * ir.DataType(data_type).bitwidth / 8)
