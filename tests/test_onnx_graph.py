import copy
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from emoexport.decision import Decision
from emoexport.errors import CheckFailed
from emoexport.fold import Fold
from emoexport.onnx_graph import PASSES, check_graph, export_fold
from emoexport.precision import PRECISIONS
from emoexport.reference import Reference
from emoexport.sessions import open_reference
from emoexport.summary import summarize
from emoexport.train.config import ModelConfig
from emoexport.train.emotenet import ConvNeXtEmoteNet
from emoexport.views import VIEWS

SHAPE = (32, 32, 1)
COLOUR = ModelConfig(
    image_size=32,
    channels=3,
    backbone_args={"patch_size": 4, "depths": (1, 1, 1, 1), "dims": (16, 16, 32, 32), "conv_mlp": False},
)

# What ONNX Runtime, OpenVINO and TensorRT 10 and 11 all read, by the TensorRT layer that it becomes. No If, Loop or
# Scan, no other domain. tests/test_engines.py runs the first two. The layers are those of tensorrt.LayerType in
# 10.0.1 and in 11.4.0; its parser's own list is docs/operators.md of github.com/onnx/onnx-tensorrt,
# OpenVINO's is "Supported Operations" on docs.openvino.ai: look there before adding one.
PORTABLE = {
    "ACTIVATION": {"Clip", "Gelu", "Relu", "Sigmoid"},  # the Gelu by erf and the one by tanh
    "CAST": {"Cast"},
    "CONCATENATION": {"Concat"},
    "CONVOLUTION": {"Conv"},
    "DEQUANTIZE": {"DequantizeLinear"},
    "ELEMENTWISE": {"Add", "Div", "Equal", "GreaterOrEqual", "Less", "Mul", "Pow", "Sub"},
    "GATHER": {"Gather", "GatherElements", "GatherND"},
    "MATRIX_MULTIPLY": {"Gemm", "MatMul"},
    "NORMALIZATION": {"LayerNormalization"},  # native, and so accumulated in FP32
    "QUANTIZE": {"QuantizeLinear"},
    "REDUCE": {"ReduceMax", "ReduceMean", "ReduceSum"},
    "RESIZE": {"Resize"},
    "SELECT": {"Where"},
    "SHAPE": {"Shape"},
    "SHUFFLE": {"Reshape", "Squeeze", "Transpose", "Unsqueeze"},
    "SLICE": {"Slice"},
    "SOFTMAX": {"Softmax"},
    "TOPK": {"ArgMax"},
    "UNARY": {"Exp", "Log"},
}
OPSET = 20
"""Gelu begins with 20, and the parser of TensorRT 10.0 ends with it; that of 11 reads up to 25. Conv in BF16 begins
with 22."""
TYPES = {"FLOAT", "FLOAT16", "BFLOAT16", "FLOAT8E4M3FN", "INT8", "UINT8", "INT32", "INT64", "BOOL"}
"""What tensorrt.DataType of 10.0.1 and 11.4.0 has of ONNX's; no DOUBLE."""


@pytest.fixture(scope="module")
def graph(tmp_path_factory, networks, rules) -> Path:
    path = tmp_path_factory.mktemp("graph") / "model.onnx"
    fold = Fold([copy.deepcopy(network) for network in networks], tuple(VIEWS.values()), rules)
    export_fold(fold, path, face_shape=SHAPE, max_batch=64)
    return path


@pytest.mark.parametrize("count", [1, 2, 16, 64])
def test_onnx_runtime_says_what_the_reference_says(count, graph, networks, rules, faces):
    some = np.resize(faces[0], (count, *SHAPE))
    wanted = Reference(members=networks, views=tuple(VIEWS.values()), decision=rules).run(some)
    session = ort.InferenceSession(graph, providers=["CPUExecutionProvider"])
    probabilities, label, confidence = session.run(["probabilities", "label", "confidence"], {"faces": some})
    assert np.abs(probabilities - wanted.probabilities).max() < 1e-5
    assert np.array_equal(label, wanted.label)
    assert np.abs(confidence - wanted.confidence).max() < 1e-5
    assert (probabilities.dtype, label.dtype, confidence.dtype) == (np.float32, np.int64, np.float32)


@pytest.mark.slow
def test_faces_in_colour(tmp_path, faces):
    torch.manual_seed(0)
    network = ConvNeXtEmoteNet(COLOUR).eval()
    views = tuple(VIEWS.values())
    colour = np.concatenate([faces[0][:6], faces[0][6:12], faces[0][12:18]], axis=3)
    export_fold(Fold([network], views, Decision()), tmp_path / "m.onnx", face_shape=(32, 32, 3), max_batch=8)
    session = ort.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    wanted = Reference(members=[network], views=views, decision=Decision()).run(colour)
    probabilities, label, *_ = session.run(None, {"faces": colour})
    assert np.abs(probabilities - wanted.probabilities).max() < 1e-5
    assert np.array_equal(label, wanted.label)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_operators_opset_and_types_are_portable(precision, bundle):
    summary = summarize(bundle).graphs[precision]
    assert set(summary.operators) <= set().union(*PORTABLE.values())
    assert summary.opset == (22 if precision == "bf16" else OPSET)
    assert set(summary.types) <= TYPES
    model = onnx.load(bundle.graph(precision))
    assert {node.domain for node in model.graph.node} | {entry.domain for entry in model.opset_import} == {""}
    assert not model.functions
    normalized = sum(isinstance(module, torch.nn.LayerNorm) for module in members_of(bundle))
    assert summary.operators["LayerNormalization"] == normalized  # none taken apart into its arithmetic


def members_of(bundle):
    reference, *_ = open_reference(bundle)
    return [module for member in reference.members for module in member.modules()]


def test_nodes_are_named_for_the_modules_they_come_from(graph):
    names = [node.name for node in onnx.load(graph).graph.node]
    assert len(names) == len(set(names))
    assert {name.split("/")[0].split(".")[0] for name in names} == {
        "show",
        "members",
        "score",
        "vote",
        "decide",
    }


def test_the_file_tells_nothing_of_the_machine_it_was_made_on(graph):
    data = graph.read_bytes()
    for trace in (b"stack_trace", b"site-packages", str(Path(__file__).parents[1]).encode(), b"/home/"):
        assert trace not in data


def test_the_passes_are_visible():
    assert [one_pass.__name__ for one_pass in PASSES] == ["_name_by_scope", "_strip_metadata"]


def test_another_graph_is_refused(graph):
    with pytest.raises(CheckFailed, match="faces"):
        check_graph(graph, face_shape=(48, 48, 1))
