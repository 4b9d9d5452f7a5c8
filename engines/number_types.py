"""Which types of numbers a compiler's layers compute in, in what it read and in what it made.

A compiler may leave a precision that was asked for without a word. So what it did is read back from it, and counted.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tensorrt as trt

__all__ = [
    "MEMBERS",
    "EngineLayer",
    "Executed",
    "RuntimeLayer",
    "executed_of",
    "layers_of",
    "network_types",
    "share_of_multiplications",
    "share_of_time",
]

_NUMBERS = {"FLOAT": "fp32", "HALF": "fp16"}
"""TensorRT's names, where ours are not the same in small letters."""

_WRITTEN = (
    ("int8", r"(?<!u)int8"),
    ("fp8", r"fp8|e4m3"),
    ("bf16", r"bf16|bfloat16"),
    ("fp16", r"half|fp16|(?<!b)float16"),
    ("fp32", r"(?<!b)float(?!8|16)|fp32"),
)
"""How the inspector writes them: `Half`, `Row major linear FP16 format`, `Thirty-two wide ... Int8 format`."""

MEMBERS = "members."
"""How the names of nodes begin that are of members; the rest are views, vote and decision, in FP32 by design."""


@dataclass(frozen=True, kw_only=True)
class Executed:
    """Which types of numbers a runtime has computed in, as it says itself; empty where it does not."""

    layers: dict[str, int] = field(default_factory=dict)
    """By type of number, how many layers."""
    multiplications: dict[str, int] = field(default_factory=dict)
    """How many of these are convolutions, matrix products or attention; empty where a runtime names no operators."""
    time_share: dict[str, float] = field(default_factory=dict)
    """By type of number, what part of the time of these, or of all layers of members where they cannot be told."""


@dataclass(frozen=True, kw_only=True)
class RuntimeLayer:
    """A layer that a runtime has run, as it tells of it."""

    kind: str
    """The runtime's name of the operator."""
    number: str
    """Our name of the type that it computes in; empty for numbers that count or index."""
    time: float
    """In any unit; 0 where it is not known."""


def executed_of(layers: Collection[RuntimeLayer]) -> Executed:
    """Count layers, and add up the time of those that multiply."""
    multiplying = [layer for layer in layers if layer.number and _MULTIPLIES.search(layer.kind)]
    times: dict[str, float] = {}
    for layer in multiplying:
        times[layer.number] = times.get(layer.number, 0.0) + layer.time
    total = sum(times.values())
    return Executed(
        layers=_counted(layer.number for layer in layers if layer.number),
        multiplications=_counted(layer.number for layer in multiplying),
        time_share={number: round(time / total, 4) for number, time in sorted(times.items())} if total else {},
    )


def _counted(numbers: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(numbers).items()))


_MULTIPLIES = re.compile(r"conv(?!ert)|matmul|gemm|fullyconnected|attention", re.IGNORECASE)
"""In names of operators, as ONNX Runtime and OpenVINO give them, of what multiplies matrices or convolves."""


def number_of(kind: "trt.DataType") -> str:
    """Our name of a type of TensorRT's."""
    return _NUMBERS.get(kind.name, kind.name.lower())


def network_types(network: "trt.INetworkDefinition") -> dict[str, dict[str, int]]:
    """Count the layers of a parsed network: by their type, how many put out which type of number."""
    found: dict[str, Counter[str]] = {}
    for layer in _layers(network):
        found.setdefault(layer.type.name.lower(), Counter())[number_of(layer.get_output(0).dtype)] += 1
    return {kind: dict(sorted(numbers.items())) for kind, numbers in sorted(found.items())}


def share_of_multiplications(runtime: ModuleType, network: "trt.INetworkDefinition", number: str) -> float:
    """The share of the members' multiplications in a parsed network that are of a type of number.

    A layer that reads what a DEQUANTIZE layer puts out multiplies what that one reads: TensorRT makes one kernel of
    both. Counted is a call with one face, for which the network's input is given that shape, and then its own again.

    Args:
        runtime: `tensorrt` or `tensorrt_rtx`.
        network: as its parser made it.
        number: as in `Precision.number`.
    """
    faces: Any = network.get_input(0)
    shape, faces.shape = faces.shape, (1, *tuple(faces.shape)[1:])
    try:
        counts = _count(runtime, _layers(network))
    finally:
        faces.shape = shape
    return counts[number] / counts.total() if counts else 0.0


def _count(runtime: ModuleType, layers: Collection["trt.ILayer"]) -> Counter[str]:
    """Multiplications of the members by type of number."""
    made_by = {layer.get_output(index).name: layer for layer in layers for index in range(layer.num_outputs)}
    counts: Counter[str] = Counter()
    for layer in layers:
        if layer.name.startswith(MEMBERS) and layer.type.name in _MULTIPLICATIONS:
            counts[_multiplied(layer, made_by)] += _MULTIPLICATIONS[layer.type.name](runtime, layer)
    return counts


@dataclass(frozen=True, kw_only=True)
class EngineLayer:
    """A layer of an engine, as its inspector tells of it."""

    name: str
    numbers: frozenset[str]
    """Types that it reads and puts out."""
    is_of_members: bool


def layers_of(information: str) -> list[EngineLayer]:
    """Read the JSON text of an engine inspector, as versions 8 to 11 write it.

    Raises:
        ValueError: if it is not such a text.
    """
    found = json.loads(information)
    layers = found.get("Layers") if isinstance(found, dict) else None
    if not isinstance(layers, list):
        raise ValueError("the inspector lists no layers")
    return [_engine_layer(layer) for layer in layers]


def share_of_time(layers: Collection[EngineLayer], milliseconds: Mapping[str, float]) -> dict[str, float]:
    """By type of number, the share of the members' time in an engine; a layer counts for its narrowest type.

    Args:
        layers: of the engine.
        milliseconds: by the layer's name, as a profiler took them.

    Returns:
        Nothing if less than half of the time is of layers that the inspector tells of: profilers have other names for
        some.
    """
    times: dict[str, float] = {}
    told = [layer for layer in layers if layer.numbers and layer.name in milliseconds]
    for layer in [layer for layer in told if layer.is_of_members] or told:
        number = narrowest(layer.numbers)
        times[number] = times.get(number, 0.0) + milliseconds[layer.name]
    total = sum(times.values())
    if not total or sum(milliseconds[layer.name] for layer in told) < sum(milliseconds.values()) / 2:
        return {}
    return {number: round(time / total, 4) for number, time in sorted(times.items())}


def narrowest(numbers: Collection[str]) -> str:
    """Of several types the one with fewest bits, in the order of this file."""
    return next(number for number, _ in _WRITTEN if number in numbers)


def _layers(network: "trt.INetworkDefinition") -> list["trt.ILayer"]:
    return [network.get_layer(index) for index in range(network.num_layers)]


def _multiplied(layer: "trt.ILayer", made_by: Mapping[str, "trt.ILayer"]) -> str:
    """The type of the numbers that a layer multiplies."""
    tensor = layer.get_input(0)
    before = made_by.get(tensor.name)
    if before is not None and before.type.name == "DEQUANTIZE":
        tensor = before.get_input(0)
    return number_of(tensor.dtype)


def _of_convolution(runtime: ModuleType, layer: Any) -> int:
    channels = layer.get_input(0).shape[1]
    layer.__class__ = runtime.IConvolutionLayer  # how TensorRT's Python tells a layer's own attributes
    a_number = _size(layer.kernel_size_nd) * int(channels) // int(layer.num_groups)
    return _size(layer.get_output(0).shape) * a_number


def _of_product(_: ModuleType, layer: "trt.ILayer") -> int:
    return _size(layer.get_output(0).shape) * abs(layer.get_input(0).shape[-1])


_MULTIPLICATIONS = {"CONVOLUTION": _of_convolution, "MATRIX_MULTIPLY": _of_product}


def _size(shape: Any) -> int:
    """How many numbers a shape has, which types know as no sequence though it is one."""
    return abs(math.prod(int(length) for length in shape))


def _engine_layer(layer: Any) -> EngineLayer:
    if isinstance(layer, str):  # names are all there is where the engine was built without details
        return EngineLayer(name=layer, numbers=frozenset(), is_of_members=MEMBERS in layer)
    tensors = [*layer.get("Inputs", ()), *layer.get("Outputs", ())]
    texts = " ".join(str(value) for tensor in tensors for key, value in tensor.items() if "type" in key.lower())
    return EngineLayer(
        name=layer.get("Name", ""),
        numbers=frozenset(number for number, pattern in _WRITTEN if re.search(pattern, texts, re.IGNORECASE)),
        is_of_members=MEMBERS in f"{layer.get('Name', '')} {layer.get('Metadata', '')}",
    )
