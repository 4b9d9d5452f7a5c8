"""What reads files of others, each as a function of bytes that returns or raises an error of emoexport's own.

To fuzz another reader, write one function and one row of `TARGETS`.
"""

import csv
import io
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pyarrow as pa
import pyarrow.parquet as pq
from google.protobuf.message import DecodeError
from PIL import Image

from emoexport.bundle import Bundle
from emoexport.decision import Decision
from emoexport.engines.passport import Passport, passport_of
from emoexport.errors import BadBundle
from emoexport.external_data import opsets_of, places_of_weights
from emoexport.images import decode_face
from emoexport.labels import EMOTIONS
from emoexport.manifest import MANIFEST_FILE, Manifest
from emoexport.train.dataset import load_data

CORPUS = Path(__file__).parent / "corpus"
"""By target, what once ended in something else than an answer or a sentence."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """One row of `TARGETS`."""

    read: Callable[[bytes, Path], object]
    """Given bytes and an empty folder."""
    seeds: Callable[[], list[bytes]]
    """Where to begin: drawn, or written out."""
    is_json: bool = False
    """Whether the search is to change fields as well as bytes."""

    def run(self, data: bytes) -> None:
        """Read bytes in a folder of their own."""
        with tempfile.TemporaryDirectory(dir=_MEMORY if _MEMORY.is_dir() else None) as folder:
            self.read(data, Path(folder))


_MEMORY = Path("/dev/shm")


def manifest(data: bytes, folder: Path) -> None:
    """A manifest as it is, and, where it has the form of one, with a digest that fits."""
    path = folder / MANIFEST_FILE
    path.write_bytes(data)
    try:
        Bundle.open(folder)
        return
    except BadBundle:
        found = Manifest.parse_json(path, error=BadBundle)
    path.write_text(found.sealed().to_json())
    opened = Bundle.open(folder).manifest
    assert np.isfinite(opened.merged_weights).all()
    assert opened.passes_a_face > 0
    assert opened.gflop_a_face is None or opened.gflop_a_face >= 0


def passport(data: bytes, folder: Path) -> None:
    """A passport beside an engine."""
    passport_of(folder / "x").write_bytes(data)
    found = Passport.read(folder / "x")
    found.write(folder / "x")
    assert Passport.read(folder / "x").settings == found.settings


def table(data: bytes, folder: Path) -> None:
    """FER-2013's CSV."""
    (folder / "x.csv").write_bytes(data)
    load_data(str(folder / "x.csv"), size=8)
    load_data(str(folder / "x.csv"), size=8, channels=3, skip_bad=True, label_order="ferplus")


def votes(data: bytes, folder: Path) -> None:
    """Rows of a Parquet file of faces: a list in JSON of lists `[label, split, votes]`."""
    try:
        rows = [dict(zip(("label", "split", "ferplus_votes"), row, strict=True)) for row in json.loads(data)]
        pq.write_table(pa.Table.from_pylist([{"png": _FACE, **row} for row in rows]), folder / "x.parquet")
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError, pa.ArrowException, KeyError):
        return  # nothing that a Parquet file can hold
    for faces in load_data(str(folder / "x.parquet"), size=8).splits.values():
        if faces.votes is not None:
            voted = faces.votes[~np.isnan(faces.votes).any(axis=1)]
            assert (voted >= 0).all()
            assert np.allclose(voted.sum(axis=1), 1)


def parquet(data: bytes, folder: Path) -> None:
    """A Parquet file of faces."""
    (folder / "x.parquet").write_bytes(data)
    load_data(str(folder / "x.parquet"), size=8)


def picture(data: bytes, folder: Path) -> None:
    """An encoded picture."""
    for channels in (1, 3):
        assert decode_face(data, size=16, channels=channels).shape == (16, 16, channels)


def graph(data: bytes, folder: Path) -> None:
    """Where a graph has its weights, and its opsets: nothing that onnx finds may be missed."""
    (folder / "x.onnx").write_bytes(data)
    try:
        model = onnx.load(folder / "x.onnx", load_external_data=False)
    except (DecodeError, ValueError):
        model = onnx.ModelProto()
    try:
        found = places_of_weights(folder / "x.onnx")
        opsets = opsets_of(folder / "x.onnx")
    except ValueError as err:
        raise BadBundle(str(err)) from err
    entries = [entry for tensor in _tensors(model) for entry in tensor.external_data if entry.key == "location"]
    named = {
        value.decode(errors="backslashreplace") if isinstance(value := entry.value, bytes) else value
        for entry in entries
    }
    assert named <= found, f"missed {named - found}"
    versions = {entry.version % 2**64 for entry in model.opset_import if entry.HasField("version")}
    assert versions <= {version % 2**64 for version in opsets}, f"missed {versions}"


def _tensors(message: object) -> Iterator[onnx.TensorProto]:
    """All tensors of a message, at any depth."""
    waiting = [message]
    while waiting:
        one = waiting.pop()
        if isinstance(one, onnx.TensorProto):
            yield one
        for field, value in one.ListFields():
            if field.message_type is not None:
                waiting += list(value) if hasattr(value, "add") else [value]


def _encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


_GREY = np.add.outer(np.arange(0, 128, 8), np.arange(0, 128, 8)).astype(np.uint8)
_FACE = _encoded(Image.fromarray(_GREY), "PNG")


def _manifests() -> list[bytes]:
    member = {"sha256": "0" * 64, "backbone": "x", "epoch": 1, "validation_accuracy": 0.5, "gflop_a_pass": 0.1}
    view = {"name": "identity", "function": "x", "parameters": {}, "mirrored": False}
    least = {
        "created": "",
        "face_shape": (16, 16, 1),
        "max_batch": 4,
        "labels": EMOTIONS,
        "run": "../x",
        "members": [member],
        "views": [view, {**view, "name": "flip", "same_as": "identity"}],
        "decision": Decision(thresholds={"happy": 0.5}).model_dump(),
        "graphs": {},
        "data": {"train_faces": 1},
        "versions": {},
        "files": {},
    }
    weighted = {**least, "members": [{**member, "weight": 2.0}, member], "choice": {"members": {"1": 2.0, "2": 1.0}}}
    passes = {**least, "choice": {"passes": {"1:identity": 1.0, "1:flip": 0.5}}}
    file = {"x.onnx": {"sha256": "0" * 64, "bytes": 1}}
    entry = {"fp32": {"file": "x.onnx", "opset": 20, "operators": {}}}
    return [json.dumps(one).encode() for one in (least, weighted, passes, {**least, "files": file, "graphs": entry})]


def _passports() -> list[bytes]:
    fields = dict.fromkeys(("file", "sha256", "backend", "precision", "graph", "graph_sha256", "created"), "")
    fields |= {"bytes": 1, "seconds": 0.5, "versions": {}, "device": {}, "profiles": [[1, 2, 3]], "settings": {}}
    fields |= {"precision": "fp32"}
    fields |= {"network": {}}
    with tempfile.TemporaryDirectory() as folder:
        Passport(**fields).write(Path(folder) / "x")
        return [passport_of(Path(folder) / "x").read_bytes(), json.dumps(fields).encode(), b"{}"]


def _tables() -> list[bytes]:
    rows = [[label, " ".join(map(str, range(label, label + 4)))] for label in range(7)]
    found = []
    for header, usage in ((["emotion", "pixels", "Usage"], ["Training"]), (["emotion", "pixels"], [])):
        text = io.StringIO()
        csv.writer(text).writerows([header, *([*row, *usage] for row in rows)])
        found.append(text.getvalue().encode())
    return [*found, b"\xef\xbb\xbf" + found[0].replace(b"Training", b'"Public\nTest"')]


def _votes() -> list[bytes]:
    rows = [[label, "train", [0, 1, 2, 0, 0, 0, 0, 5, 1, 0]] for label in range(7)]
    return [json.dumps(rows).encode(), json.dumps([[*row[:2], None] for row in rows]).encode()]


def _parquets() -> list[bytes]:
    buffer = io.BytesIO()
    rows = [{"png": _FACE, "label": label, "split": "train"} for label in range(7)]
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    return [buffer.getvalue()]


def _pictures() -> list[bytes]:
    grey, colours = Image.fromarray(_GREY), Image.merge("RGB", [Image.fromarray(_GREY)] * 3)
    turned = Image.Exif()
    turned[0x0112] = 6
    found = [_encoded(colours, kind, exif=turned) for kind in ("JPEG", "PNG", "WEBP", "TIFF")]
    found += [_encoded(colours.quantize(16), "GIF", save_all=True, append_images=[grey]), _encoded(grey, "BMP")]
    found += [_encoded(Image.fromarray(_GREY.astype(np.uint16) * 257), kind) for kind in ("PNG", "TIFF", "PPM")]
    return [*found, _encoded(colours.convert("CMYK"), "JPEG"), _encoded(grey, "TIFF", compression="tiff_lzw")]


def _graphs() -> list[bytes]:
    def outside(name: str) -> onnx.TensorProto:
        tensor = onnx.TensorProto(name=name, dims=[1], data_type=1, data_location=onnx.TensorProto.EXTERNAL)
        tensor.external_data.add(key="location", value=f"{name}.data")
        tensor.external_data.add(key="offset", value="0")
        return tensor

    inner = onnx.helper.make_graph([], "inner", [], [], [outside("c")])
    nodes = [
        onnx.helper.make_node("Constant", [], ["x"], value=outside("a")),
        onnx.helper.make_node("If", ["x"], ["y"], then_branch=inner, else_branch=inner),
    ]
    whole = onnx.helper.make_model(onnx.helper.make_graph(nodes, "outer", [], [], [outside("b")]))
    sparse = onnx.SparseTensorProto(values=outside("d"), indices=outside("e"), dims=[1])
    whole.graph.sparse_initializer.append(sparse)
    whole.functions.add(name="f").node.append(nodes[0])
    return [whole.SerializeToString(), onnx.helper.make_model(inner).SerializeToString()]


TARGETS = {
    "manifest": Target(read=manifest, seeds=_manifests, is_json=True),
    "passport": Target(read=passport, seeds=_passports, is_json=True),
    "csv": Target(read=table, seeds=_tables),
    "votes": Target(read=votes, seeds=_votes, is_json=True),
    "parquet": Target(read=parquet, seeds=_parquets),
    "picture": Target(read=picture, seeds=_pictures),
    "graph": Target(read=graph, seeds=_graphs),
}


def seeds_of(name: str) -> list[bytes]:
    """Where to begin, and what was once not taken well."""
    return [*TARGETS[name].seeds(), *(file.read_bytes() for file in sorted((CORPUS / name).glob("*")))]
