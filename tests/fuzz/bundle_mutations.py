"""Ways to spoil a bundle, drawn by number: the same number spoils the same bundle in the same way."""

import contextlib
import hashlib
import json
import os
import random
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import openvino

from emoexport.cascade_record import CascadeRecord
from emoexport.manifest import Manifest

PATHS = (
    *("../outside/secret.json", "../outside/weights.bin", "/etc/hostname", "/dev/zero", "..", ".", "", "/", "\0"),
    *("model.fp32.onnx\0", "..\\outside\\secret.json", "C:\\secret", "a/../labels.txt", "./labels.txt", "labels.txt/"),
    *(
        "x" * 300,
        "x/" * 3000,
        "manifest.json",
        "labels.txt",
        "model.fp32.onnx",
        "model.int8.onnx",
        "\ud800",
        "é\n\x1b[2J",
    ),
)
"""In place of names of files."""

VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 2**31, 2**63, 10**30, 10**5000, 1e308, -1e308, 5e-324, float("nan"), float("inf"), -0.0),
    *("", "x", "NaN", "1", "x" * 100_000, "\0", "\ud800", "a\x1b[31mb\r\n", "; touch written #", [], {}, [[]], [None]),
    *({"": {}}, {"x": [1, "2"]}, [0] * 1000, "prob-mean", "happy", *PATHS),
)


class Damage(NamedTuple):
    """What was done to a bundle."""

    file: str
    """The one that it begins with, relative to the bundle."""
    how: str
    sealed: bool
    """Whether hashes and digests were then made to fit."""


def spoil(bundle: Path, number: int, *, sealed: bool | None = None) -> Damage:
    """Spoil a copy of a bundle, beside which is a folder `outside` that nothing may read.

    Args:
        bundle: the copy.
        number: of the way.
        sealed: whether hashes and digests are made to fit; as the number says if None.
    """
    rng = random.Random(number)
    files = sorted(
        str(path.relative_to(bundle)) for path in bundle.rglob("*") if path.is_file() and path.suffix != ".md"
    )
    parts = [name for name in files if not name.startswith(("reports", "engines"))]
    file = rng.choice(["manifest.json", rng.choice(parts), rng.choice(parts), rng.choice(files)])
    of_kind = [_ENTRY] if rng.random() < 0.2 else [_BYTES, _JSON] if file.endswith(".json") else [_BYTES]
    of_kind += [_GRAPH] * 3 if file.endswith(".onnx") else []
    table = rng.choice(of_kind)
    how = rng.choice(sorted(table))
    sealed = rng.random() < 0.5 if sealed is None else sealed
    told = table[how](rng, bundle / file) or ""
    if sealed:
        with contextlib.suppress(Exception):  # what no longer has the form has no seal either
            reseal(bundle, file, keep=table is _JSON or how == "absurd size")
    return Damage(file, f"{how} {told}".strip(), sealed)


def spoil_record(data: bytes, folder: Path, number: int) -> bytes:
    """Change something in a JSON document, in a folder to work in; the same bytes if it is none."""
    rng, file = random.Random(number), folder / "record.json"
    file.write_bytes(data)
    with contextlib.suppress(ValueError, AttributeError, IndexError, TypeError, RecursionError):
        _JSON[rng.choice(sorted(_JSON))](rng, file)
    return file.read_bytes()


def reseal(bundle: Path, file: str, *, keep: bool = False) -> None:
    """Make sizes, hashes and digests fit again, as anybody can.

    Args:
        bundle: the bundle.
        file: that was changed.
        keep: whether what a record says of files stays.

    Raises:
        Exception: if something has no longer the form of a bundle.
    """
    for path in bundle.rglob("*.json"):
        if not path.is_file() or path.stat().st_size > 2**26:
            return
    manifest = bundle / "manifest.json"
    found = json.loads(manifest.read_text())
    if file in found["files"] and not keep:
        found["files"][file] = _entry(bundle / file)
    _seal(manifest, found, Manifest)
    for record in bundle.glob("cascades/*/cascade.json"):
        cascade = json.loads(record.read_text())
        for name in cascade["files"]:
            if (record.parent / name) == bundle / file and not keep:
                cascade["files"][name] = _entry(record.parent / name)
        _seal(record, cascade | {"bundle_digest": found["digest"]}, CascadeRecord)
    for report in bundle.glob("reports/*.json"):
        told = json.loads(report.read_text())
        report.write_text(json.dumps(told | {"bundle_digest": found["digest"]}))
    for passport in bundle.glob("engines/*.passport.json"):
        fields = json.loads(passport.read_text())
        fields.pop("digest", None)
        digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
        passport.write_text(json.dumps(fields | {"digest": digest}))


def _entry(path: Path) -> dict[str, Any]:
    data = path.read_bytes() if path.is_file() and path.stat().st_size < 2**28 else b""
    return {"sha256": hashlib.sha256(data).hexdigest(), "bytes": path.stat().st_size}


def _seal(path: Path, fields: dict[str, Any], kind: type[Manifest | CascadeRecord]) -> None:
    fields["digest"] = kind.model_validate_json(json.dumps(fields))._digest()
    path.write_text(json.dumps(fields))


# Of the bytes of any file


def _flip(rng: random.Random, path: Path) -> None:
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice([1, 1, 4, 64])):
        if data:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def _truncate(rng: random.Random, path: Path) -> None:
    os.truncate(path, rng.randrange(path.stat().st_size + 1))


def _extend(rng: random.Random, path: Path) -> None:
    path.write_bytes(path.read_bytes() + rng.choice([b"\0", b" ", b"\n{}", rng.randbytes(1000)]))


def _overwrite(rng: random.Random, path: Path) -> None:
    data = bytearray(path.read_bytes())
    start, size = rng.randrange(len(data) + 1), rng.randrange(256)
    data[start : start + size] = rng.choice([bytes(size), b"\xff" * size, rng.randbytes(size), b""])
    path.write_bytes(data)


def _garbage(rng: random.Random, path: Path) -> None:
    path.write_bytes(rng.choice([b"", rng.randbytes(500), b"\xef\xbb\xbf" + path.read_bytes(), b"\xff\xfe{}"]))


_BYTES: dict[str, Callable[[random.Random, Path], str | None]] = {
    "flip": _flip,
    "truncate": _truncate,
    "extend": _extend,
    "overwrite": _overwrite,
    "garbage": _garbage,
}


# Of what stands under a name


def _nothing(_: random.Random, path: Path) -> None:
    path.unlink()


def _folder(_: random.Random, path: Path) -> None:
    path.unlink()
    path.mkdir()


def _pipe(_: random.Random, path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _socket(_: random.Random, path: Path) -> None:
    path.unlink()
    with socket.socket(socket.AF_UNIX) as made, contextlib.suppress(OSError):  # its name may be too long
        made.bind(str(path))


def _link(rng: random.Random, path: Path) -> str:
    outside = _bundle_of(path).parent / "outside"
    shutil.copyfile(path, outside / path.name)
    target = rng.choice([outside / path.name, Path("/dev/zero"), path, path.parent, _bundle_of(path) / "labels.txt"])
    path.unlink(missing_ok=True)
    path.symlink_to(target)
    return f"to {target}"


def _bundle_of(path: Path) -> Path:
    return next(one for one in path.parents if (one.parent / "outside").is_dir())


def _absurd_size(rng: random.Random, path: Path) -> None:
    with contextlib.suppress(OSError):  # more than the file system takes
        os.truncate(path, rng.choice([2**33, 2**40, 2**43]))
    manifest = _bundle_of(path) / "manifest.json"
    found = json.loads(manifest.read_text()) if path != manifest else {"files": {}}
    name = str(path.relative_to(manifest.parent))
    if name in found["files"]:
        found["files"][name]["bytes"] = path.stat().st_size
        manifest.write_text(json.dumps(found))


def _folder_link(_: random.Random, path: Path) -> str:
    """The folder that a file is in leads outside, to the same files."""
    bundle, folder = _bundle_of(path), path.parent
    if folder == bundle:
        path.rename(bundle.parent / "outside" / path.name)
        path.symlink_to(bundle.parent / "outside" / path.name)
        return "a file"
    shutil.copytree(folder, bundle.parent / "outside" / folder.name)
    shutil.rmtree(folder)
    folder.symlink_to(bundle.parent / "outside" / folder.name)
    return folder.name


def _beside(rng: random.Random, path: Path) -> str:
    """Something that no record lists, where something may look for it: a file, or a link to one outside."""
    ends = (".data", ".bin", ".lock", ".passport.json", ".engine", "..abcdefgh.emoexport", ".x.abcdefgh.emoexport")
    end = rng.choice(ends)
    name = f"{path.name}{end}" if end in (".data", ".lock") else end if "emoexport" in end else f"{path.stem}{end}"
    made = path.with_name(name if name != path.name else f"{name}.data")
    made.unlink(missing_ok=True)
    kind = rng.choice(["link", "file", "folder"])
    if kind == "link":
        made.symlink_to(_bundle_of(path).parent / "outside" / "secret.json")
    elif kind == "file":
        made.write_bytes(path.read_bytes())
    else:
        made.mkdir()
    return f"{kind} {name}"


def _circle(_: random.Random, path: Path) -> None:
    """A folder that is in itself, by a link that stays in the bundle."""
    (path.parent / "round").symlink_to(".")


def _other_format(_: random.Random, path: Path) -> None:
    """OpenVINO's own, whose weights stand beside it: outside, by a link."""
    nothing = openvino.opset13.parameter([1, 4], np.float32)
    openvino.save_model(openvino.Model([nothing], [nothing]), path.with_suffix(".xml"))
    path.with_suffix(".xml").replace(path)
    path.with_suffix(".bin").unlink()
    path.with_suffix(".bin").symlink_to(_bundle_of(path).parent / "outside" / "weights.bin")


_ENTRY: dict[str, Callable[[random.Random, Path], str | None]] = {
    "nothing": _nothing,
    "folder": _folder,
    "pipe": _pipe,
    "socket": _socket,
    "link": _link,
    "folder link": _folder_link,
    "absurd size": _absurd_size,
    "beside": _beside,
    "circle": _circle,
    "other format": _other_format,
}


# Of what a record says


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Everything in a document, as what holds it and its key there."""
    found: list[tuple[Any, Any]] = []
    waiting = [value]
    while waiting:
        holder = waiting.pop()
        keys = holder if isinstance(holder, dict) else range(len(holder)) if isinstance(holder, list) else ()
        found += [(holder, key) for key in keys]
        waiting += [holder[key] for key in keys]
    return found


def _place(rng: random.Random, document: Any) -> tuple[Any, Any]:
    """One of them; those near the top as often as the many below."""
    places = _places(document)
    top = [place for place in places if place[0] is document]
    return rng.choice(rng.choice([top, places]))


def _removed(rng: random.Random, path: Path) -> str:
    document = json.loads(path.read_text())
    holder, key = _place(rng, document)
    del holder[key]
    path.write_text(json.dumps(document))
    return str(key)


def _replaced(rng: random.Random, path: Path) -> str:
    document = json.loads(path.read_text())
    holder, key = _place(rng, document)
    other, where = _place(rng, document)
    holder[key] = rng.choice([*VALUES, other[where]])
    try:
        text = json.dumps(document)
    except ValueError:  # a document in itself, or more digits than Python prints
        holder[key] = 0
        text = json.dumps(document).replace(": 0", ": " + "9" * 5000, 1)
    path.write_text(text)
    return f"{key} by {str(holder[key])[:40] if not isinstance(holder[key], dict | list) else '...'}"


def _added(rng: random.Random, path: Path) -> None:
    document = json.loads(path.read_text())
    holder, _ = _place(rng, document)
    if isinstance(holder, dict):
        holder[str(rng.choice(["x", "", "digest", "__class__", *PATHS]))] = rng.choice(VALUES[:8])
    path.write_text(json.dumps(document))


def _twice(rng: random.Random, path: Path) -> str:
    """A field that stands there twice."""
    document = json.loads(path.read_text())
    key = rng.choice(list(document)) if isinstance(document, dict) and document else "x"
    text = json.dumps(document)
    path.write_text(f'{{"{key}": {json.dumps(rng.choice(VALUES[:8]))}, {text[1:]}')
    return str(key)


def _deep(rng: random.Random, path: Path) -> str:
    depth = rng.choice([150, 500, 5000, 200_000])
    deep = rng.choice(["[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth])
    document = json.loads(path.read_text())
    holder, key = _place(rng, document)
    holder[key] = "DEEP"
    path.write_text(rng.choice([deep, json.dumps(document).replace('"DEEP"', deep)]))
    return f"{key} {depth}"


def _other_file(rng: random.Random, path: Path) -> str:
    """Another path where a file is named."""
    document = json.loads(path.read_text())
    named = [
        (holder, key)
        for holder, key in _places(document)
        if key in ("file", "tuning", "run", "graph")
        or holder is document.get("graphs")
        or holder is document.get("files")
    ]
    if not named:
        return ""
    holder, key = rng.choice(named)
    name = rng.choice(PATHS)
    if isinstance(holder, dict) and holder is document.get("files"):
        holder[name] = holder.pop(key)
    else:
        holder[key] = name
    if "files" in document and rng.random() < 0.5:
        document["files"].setdefault(name, {"sha256": "0" * 64, "bytes": 1})
    path.write_text(json.dumps(document))
    return f"{key}: {name[:40]!r}"


_JSON: dict[str, Callable[[random.Random, Path], str | None]] = {
    "removed": _removed,
    "replaced": _replaced,
    "added": _added,
    "twice": _twice,
    "deep": _deep,
    "other file": _other_file,
}


# Of what a graph says


def _external(rng: random.Random, path: Path) -> str:
    """Weights that are said to lie elsewhere: as in CVE-2022-25882, CVE-2024-27318 and CVE-2025-51480."""
    model = onnx.load(path)
    tensor = rng.choice([one for one in model.graph.initializer if one.raw_data])
    data = tensor.raw_data
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    beside = f"{path.name}.data"
    places = [beside, beside, beside, str(path.parent.parent / "outside" / "weights.bin"), *PATHS]
    told = {
        "location": rng.choice(places),
        "offset": str(rng.choice([0, 0, 0, 1, -1, 2**62, 2**64, "x", len(data)])),
        "length": str(rng.choice([len(data), len(data), 0, 1, -1, 2**62, 2**64, ""])),
        "checksum": "0",
    }
    for key in rng.sample(list(told), rng.randint(1, 4)):
        entry = tensor.external_data.add()
        entry.key = key
        with contextlib.suppress(ValueError):  # no Unicode
            entry.value = told[key]
    weights = path.with_name(beside)
    if rng.random() < 0.5:
        weights.write_bytes(data)
    elif rng.random() < 0.5:
        weights.symlink_to(_bundle_of(path).parent / "outside" / "weights.bin")
    if rng.random() < 0.7:
        _list(path, weights)
    path.write_bytes(model.SerializeToString())
    return str(told)


def _list(graph: Path, file: Path) -> None:
    """Have the record of a graph know of a file beside it."""
    for record in (graph.parent / "manifest.json", graph.parent / "cascade.json"):
        if record.exists():
            found = json.loads(record.read_text())
            found["files"][file.name] = _entry(file) if file.exists() else {"sha256": "", "bytes": 0}
            record.write_text(json.dumps(found))


def _of_node(rng: random.Random, path: Path) -> str:
    model = onnx.load(path)
    node = rng.choice(model.graph.node)
    how = rng.choice(["gone", "operator", "input", "attribute", "domain"])
    if how == "gone":
        model.graph.node.remove(node)
    elif how == "operator":
        node.op_type = rng.choice(["Exp", "Identity", "Loop", "NoSuch", "Log", "Reshape", "Neg", "Sqrt"])
    elif how == "input" and node.input:
        others = [output for one in model.graph.node for output in one.output]
        node.input[rng.randrange(len(node.input))] = rng.choice(["", "x", rng.choice(others)])
    elif how == "attribute" and node.attribute:
        attribute = rng.choice(node.attribute)
        attribute.i = rng.choice([-1, 0, 2**31, 2**62])
        attribute.ints[:] = [rng.choice([-1, 0, 2**31, 2**62]) for _ in attribute.ints]
    else:
        node.domain = "com.microsoft"
    path.write_bytes(model.SerializeToString())
    return f"{how} {node.op_type}"


def _of_weight(rng: random.Random, path: Path) -> str:
    model = onnx.load(path)
    tensor = rng.choice(model.graph.initializer)
    how = rng.choice(["dims", "type", "nan", "whole", "gone", "data"])
    if how == "dims" and tensor.dims:
        tensor.dims[rng.randrange(len(tensor.dims))] = rng.choice([0, -1, 2**31, 2**62, 2**63 - 1])
    elif how == "type":
        tensor.data_type = rng.choice([0, 1, 7, 8, 10, 99])
    elif how == "nan" and tensor.raw_data:
        tensor.raw_data = b"\xff" * len(tensor.raw_data)
    elif how == "whole" and tensor.data_type == onnx.TensorProto.INT64:
        tensor.raw_data = (2**33).to_bytes(8, "little") * (len(tensor.raw_data) // 8)
    elif how == "gone":
        model.graph.initializer.remove(tensor)
    else:
        tensor.raw_data = rng.randbytes(len(tensor.raw_data))
    path.write_bytes(model.SerializeToString())
    return f"{how} {tensor.name}"


def _of_output(rng: random.Random, path: Path) -> str:
    model = onnx.load(path)
    how = rng.choice(["swapped", "gone", "renamed", "huge", "opset", "inputs", "deep"])
    outputs = model.graph.output
    if how == "swapped":
        (first, second) = rng.sample(range(len(outputs)), 2)
        for node in model.graph.node:
            for number, name in enumerate(node.output):
                if name in (outputs[first].name, outputs[second].name):
                    other = outputs[second].name if name == outputs[first].name else outputs[first].name
                    node.output[number] = other
        del model.graph.value_info[:]
    elif how == "gone":
        del outputs[rng.randrange(len(outputs))]
    elif how == "renamed":
        outputs[0].name = "other"
    elif how == "huge":
        _huge(rng, model)
    elif how == "opset":
        model.opset_import[0].version = rng.choice([0, 1, 7, 99, 2**40])
        if rng.random() < 0.5:
            del model.opset_import[:]
    elif how == "inputs":
        model.graph.input[0].type.tensor_type.elem_type = rng.choice([0, 1, 8])
    else:
        data = b""
        for _ in range(rng.choice([90, 300, 20_000])):
            data = (
                onnx.NodeProto().SerializeToString() + b"\x2a" + _varint(len(data)) + data
                if len(data) < 2**20
                else data
            )
        path.write_bytes(model.SerializeToString() + b"\x3a" + _varint(len(data)) + data)
        return how
    path.write_bytes(model.SerializeToString())
    return how


def _varint(number: int) -> bytes:
    found = bytearray()
    while number > 127:
        found.append(number & 127 | 128)
        number >>= 7
    return bytes([*found, number])


def _huge(rng: random.Random, model: onnx.ModelProto) -> None:
    """A tensor of many numbers, on the way to what is answered."""
    many = np.array([rng.choice([2**28, 2**34, 2**40])])
    model.graph.initializer.append(onnx.numpy_helper.from_array(many, "hostile.shape"))
    nodes = [
        onnx.helper.make_node("ConstantOfShape", ["hostile.shape"], ["hostile.many"]),
        onnx.helper.make_node("ReduceSum", ["hostile.many"], ["hostile.sum"], keepdims=0),
    ]
    last = next(node for node in model.graph.node if model.graph.output[0].name in node.output)
    last.output[list(last.output).index(model.graph.output[0].name)] = "hostile.was"
    nodes.append(onnx.helper.make_node("Add", ["hostile.was", "hostile.sum"], [model.graph.output[0].name]))
    model.graph.node.extend(nodes)


_GRAPH: dict[str, Callable[[random.Random, Path], str | None]] = {
    "external data": _external,
    "a node": _of_node,
    "a weight": _of_weight,
    "outputs": _of_output,
}
