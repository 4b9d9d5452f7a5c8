"""Faults that are planted into a bundle whose manifest looks right: `verify` finds each, and no certificate hides one.

Rows of an engine that are off are planted in test_parity.py, a runtime that computes in fewer bits in
test_precision_proof.py, and each metamorphic relation has its fault in test_metamorphic.py.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import emoexport
from emoexport import certification
from emoexport.bundle import Bundle
from emoexport.files import sha256_of, write_text
from emoexport.manifest import MANIFEST_FILE, FileEntry
from emoexport.verdict import Limits

ONE = {"engines": ["onnxruntime"], "limit": 60, "batches": [8], "rounds": 1}
LOOSE = Limits(max_drop_points=5, max_disagreement_pct=5)
"""What is certified is not the question."""


@pytest.fixture
def copy(bundle, tmp_path) -> Path:
    return Path(shutil.copytree(bundle.path, tmp_path / "build" / "copy"))


def plant(path: Path, precision: str, change: Callable[[onnx.ModelProto], onnx.ModelProto | None]) -> Bundle:
    """Change a graph, and the manifest so that it fits, as whoever exchanges one does."""
    manifest = Bundle.open(path).manifest
    file = path / manifest.graphs[precision].file
    model = onnx.load(file)
    onnx.save(change(model) or model, file)
    files = manifest.files | {file.name: FileEntry(sha256=sha256_of(file), bytes=file.stat().st_size)}
    write_text(path / MANIFEST_FILE, manifest.model_copy(update={"files": files}).sealed().to_json())
    return Bundle.open(path)


def retrained(model: onnx.ModelProto) -> None:
    """A member has another weight."""
    edit(
        model, "members.0.graph_module.classifier.output.bias", lambda bias: bias + np.eye(1, 7, 3, dtype="f4")[0] / 10
    )


def relabelled(model: onnx.ModelProto) -> None:
    """All members have their emotions in another order."""
    for kind in ("weight", "bias"):
        for member in (0, 1):
            name = f"members.{member}.graph_module.classifier.output.{kind}"
            edit(model, name, lambda values: np.roll(values, 1, axis=-1))


def turned_around(model: onnx.ModelProto) -> None:
    """The last face of a call gets the answer of the first."""
    for name, values in (("start", [-1]), ("stop", [-(2**31)]), ("axis", [0]), ("step", [-1])):
        model.graph.initializer.append(numpy_helper.from_array(np.array(values, dtype=np.int64), f"planted.{name}"))
    between(model, [output.name for output in model.graph.output], "Slice", "start", "stop", "axis", "step")


def decided_otherwise(model: onnx.ModelProto) -> None:
    """Probabilities are right, and the label is another one's."""
    model.graph.initializer.append(numpy_helper.from_array(np.array(6, dtype=np.int64), "planted.last"))
    renamed = between(model, ["label"], "Sub", "last")
    renamed["label"].input[:] = renamed["label"].input[::-1]


def edit(model: onnx.ModelProto, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    (tensor,) = (each for each in model.graph.initializer if each.name == name)
    tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor)), name))


def between(model: onnx.ModelProto, outputs: list[str], operator: str, *inputs: str) -> dict[str, onnx.NodeProto]:
    """Put a node before each of these outputs."""
    put = {}
    for node in [*model.graph.node]:
        for place, name in enumerate(node.output):
            if name in outputs:
                node.output[place] = f"planted.{name}"
                given = [f"planted.{name}", *(f"planted.{each}" for each in inputs)]
                put[name] = onnx.helper.make_node(operator, given, [name])
    for node in model.graph.node:
        for place, name in enumerate(node.input):
            if name in put:
                node.input[place] = f"planted.{name}"
    model.graph.node.extend(put.values())
    assert put.keys() == set(outputs)
    return put


@pytest.mark.parametrize(
    ("precision", "fault", "said"),
    [
        ("fp32", retrained, "a probability differs by"),
        ("fp32", relabelled, "points"),
        ("fp32", turned_around, "its answers do not go together at batch 8"),
        ("fp32", decided_otherwise, "its answers do not go together at batch 8, 'consistent'"),
        ("fp32", "fp16", "a probability differs by"),
        ("fp32", "int8", "in fewer bits"),
        ("fp16", "fp32", "the graph of FP16 multiplies nothing in fp16"),
        ("int8", "fp32", "the graph of INT8 multiplies nothing in int8"),
        ("int8", "fp16", "the graph of INT8 multiplies nothing in int8"),
    ],
)
@pytest.mark.slow
def test_verify_finds_what_was_exchanged(precision, fault, said, copy, run_dir, quiet):
    graph = fault if callable(fault) else lambda _: onnx.load(copy / f"model.{fault}.onnx")
    planted = plant(copy, precision, graph)
    report = certification.verify(planted, **ONE, run=run_dir, precisions=[precision], limits=LOOSE, console=quiet)
    assert report.verdict == "failed"
    assert said in " ".join(report.engines[0].reasons)


def test_no_certificate_outlives_the_graph_that_it_is_of(copy, run_dir, quiet):
    """Nor what is kept of the engine: whoever loads it is told."""
    chosen = {"precisions": ["fp32"], "run": run_dir, "limits": LOOSE, "console": quiet}
    report = certification.verify(Bundle.open(copy), **ONE | {"limit": 100}, **chosen)
    assert report.verdict == "certified"
    with emoexport.load(copy, engine="onnxruntime", precision="fp32") as session:
        assert session.certificate is not None
    plant(copy, "fp32", retrained)
    with emoexport.load(copy, engine="onnxruntime", precision="fp32") as session:
        assert session.certificate is None
        assert any("stale" in note or "another" in note for note in session.notes), session.notes
