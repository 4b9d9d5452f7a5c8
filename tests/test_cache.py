"""What OpenVINO keeps of what it compiled: used again, and never for another graph or when it is damaged."""

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from emoexport.engines import BACKENDS, open_engine
from emoexport.engines.base import Engine


def opened(graph: Path, cache: Path | None, backend: str = "openvino") -> Engine:
    if not BACKENDS[backend].is_usable():
        pytest.skip(f"{backend} is not installed")
    settings = {"precision": "fp32", "face_shape": (32, 32, 1), "max_batch": 64, "cache": cache}
    return open_engine(BACKENDS[backend], graph, **settings)


def blobs(cache: Path) -> dict[Path, tuple[int, bytes]]:
    return {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in cache.rglob("*.blob")}


@pytest.mark.parametrize("backend", ["openvino", "openvino-throughput"])
def test_what_was_compiled_is_used_again(backend, bundle, faces, tmp_path):
    graph, some = bundle.graph("fp32"), faces[0][:4]
    wanted = opened(graph, None, backend).run(some)
    first = opened(graph, tmp_path, backend).run(some)
    kept = blobs(tmp_path)
    assert len(kept) == 1
    again = opened(graph, tmp_path, backend).run(some)
    assert blobs(tmp_path) == kept
    for found in (first, again):
        assert np.array_equal(found.label, wanted.label)
        assert np.abs(found.probabilities - wanted.probabilities).max() < 1e-6


@pytest.mark.parametrize("damage", ["flipped", "cut off", "not sealed"])
def test_what_is_damaged_is_compiled_anew(damage, bundle, faces, tmp_path):
    graph, some = bundle.graph("fp32"), faces[0][:4]
    wanted = opened(graph, tmp_path).run(some)
    (file,) = blobs(tmp_path)
    content = bytearray(file.read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 0xFF
    if damage == "not sealed":
        next(tmp_path.rglob("sha256.json")).write_text("[]")
    file.write_bytes(content[: len(content) // 2] if damage == "cut off" else content)
    before = file.stat().st_mtime_ns
    found = opened(graph, tmp_path).run(some)
    assert np.abs(found.probabilities - wanted.probabilities).max() < 1e-6
    assert blobs(tmp_path)[file][0] != before


def test_another_graph_of_the_same_name_size_and_age_is_another_graph(bundle, faces, tmp_path):
    model = onnx.load(bundle.graph("fp32"))
    graph, some = tmp_path / "model.onnx", faces[0][:4]
    biases = [tensor for tensor in model.graph.initializer if tensor.name.endswith("classifier.output.bias")]
    assert len(biases) == 2
    for emotion in (6, 0):
        for bias in biases:
            values = np.where(np.arange(7) == emotion, 100, 0).astype(np.float32)
            bias.CopyFrom(numpy_helper.from_array(values, bias.name))
        onnx.save(model, graph)
        os.utime(graph, ns=(0, 0))
        found = opened(graph, tmp_path / "cache").run(some).label
        assert set(found.tolist()) == {emotion}
