"""Which files an ONNX graph says its weights are in, read without onnx: a runtime may follow it anywhere.

Runtimes differ, by version too, in which names they follow: absolute ones, links, and, in ONNX Runtime, one that stands
for an address in memory. So a bundle is held against what its graphs name before any runtime sees them.

Source: onnx.proto, and "Message Structure" in the encoding of Protocol Buffers.
"""

import mmap
import os
from collections.abc import Iterator
from pathlib import Path

from emoexport.errors import BadBundle

__all__ = ["WITHIN", "opsets_of", "places_of_weights", "require_own_weights"]

WITHIN = {
    "ModelProto": {7: "GraphProto", 20: "TrainingInfoProto", 25: "FunctionProto"},
    "TrainingInfoProto": {1: "GraphProto", 2: "GraphProto"},
    "FunctionProto": {7: "NodeProto", 11: "AttributeProto"},
    "GraphProto": {1: "NodeProto", 5: "TensorProto", 15: "SparseTensorProto"},
    "NodeProto": {5: "AttributeProto"},
    "AttributeProto": {
        **{5: "TensorProto", 6: "GraphProto", 10: "TensorProto", 11: "GraphProto"},
        **{22: "SparseTensorProto", 23: "SparseTensorProto"},
    },
    "SparseTensorProto": {1: "TensorProto", 2: "TensorProto"},
    "TensorProto": {13: "StringStringEntryProto"},
}
"""By message, the fields that lead to a place of weights, and the messages in them."""

_KEY = b"location"
_OPSET_IMPORT, _VERSION = 8, 2
"""Fields of ModelProto and of OperatorSetIdProto."""


def require_own_weights(graph: Path, *, listed: bool) -> None:
    """Before a graph is handed to a runtime: its weights are in it, or in the file beside it that is named for it.

    Args:
        graph: an ONNX file.
        listed: whether the record that the graph is of has that file, `<graph>.data`.

    Raises:
        BadBundle: if it names another file, or may and is no ONNX graph; or if that file is there and not listed.
    """
    weights = graph.with_name(f"{graph.name}.data")
    own = {weights.name} if listed else set()
    try:
        others = sorted(places_of_weights(graph) - own)
    except ValueError as err:
        raise BadBundle(f"{graph} cannot be read as ONNX: {err}.") from err
    if others:
        raise BadBundle(
            f"{graph} has its weights in '{others[0]}'; they may be in {graph.name}.data alone, if that is listed."
        )
    if not listed and os.path.lexists(weights):
        raise BadBundle(f"{weights} is listed nowhere.", hint="remove it")


def places_of_weights(graph: Path) -> set[str]:
    """The places outside an ONNX file where it says that its weights are.

    Raises:
        ValueError: if it may name some, and is no ONNX file.
    """
    if not graph.stat().st_size:
        return set()
    with graph.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data.find(_KEY) < 0:  # in most graphs: no place can be named without this word
            return set()
        # Of a field that stands twice the last one counts.
        entries = [{field: data[begin:end] for field, begin, end in _fields(data, *entry)} for entry in _entries(data)]
    return {entry.get(2, b"").decode(errors="backslashreplace") for entry in entries if entry.get(1) == _KEY}


def opsets_of(graph: Path) -> list[int]:
    """The versions of operators that an ONNX file says it is written in, one a domain.

    Raises:
        ValueError: if it is no ONNX file.
    """
    with graph.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        imports = [(begin, end) for field, begin, end in _fields(data, 0, len(data)) if field == _OPSET_IMPORT]
        fields = [entry for one in imports for entry in _fields(data, *one)]
        return [_varint(data, begin, end)[0] for field, begin, end in fields if field == _VERSION]


def _entries(data: mmap.mmap) -> Iterator[tuple[int, int]]:
    """From where to where entries about external data stand, at any depth."""
    waiting = [("ModelProto", 0, len(data))]
    while waiting:
        kind, start, stop = waiting.pop()
        if kind not in WITHIN:
            yield start, stop
            continue
        inner = WITHIN[kind]
        waiting += [(inner[field], begin, end) for field, begin, end in _fields(data, start, stop) if field in inner]


def _fields(data: mmap.mmap, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """The fields of a message that are integers or have a length: number, and from where to where."""
    while start < stop:
        key, start = _varint(data, start, stop)
        number, kind = (key & 0xFFFFFFFF) >> 3, key & 7
        begin = start
        if kind == 0:
            _, start = _varint(data, start, stop)
        elif kind == 2:
            size, begin = _varint(data, start, stop)
            start = begin + size
        elif kind in (1, 5):
            start += 8 if kind == 1 else 4
        else:
            raise ValueError("it has a group, which ONNX has not")
        if start > stop:
            raise ValueError("it is cut short")
        if kind in (0, 2):
            yield number, begin, start


def _varint(data: mmap.mmap, start: int, stop: int) -> tuple[int, int]:
    """A number in groups of seven bits, the lowest first, and where it ends."""
    found = 0
    for place in range(start, min(stop, start + 10)):
        found |= (data[place] & 127) << 7 * (place - start)
        if data[place] < 128:
            return found, place + 1
    raise ValueError("it is cut short")
