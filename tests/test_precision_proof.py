"""What runtimes say that they compute in, against what was asked for."""

import pytest

from emoexport import certification
from emoexport.engines import BACKENDS, open_engine
from emoexport.engines.machine import kernel_extensions
from emoexport.engines.number_types import Executed, RuntimeLayer, executed_of
from emoexport.engines.openvino_engine import OpenVinoEngine
from emoexport.precision import PRECISIONS
from emoexport.precision_proof import prove
from emoexport.verdict import Limits

CPU, GPU = BACKENDS["openvino"], BACKENDS["tensorrt"]
LOOSE = Limits(max_drop_points=20, max_disagreement_pct=20)


def counted(**numbers: int) -> Executed:
    return Executed(layers=numbers, multiplications=numbers, time_share={})


@pytest.mark.parametrize(
    ("precision", "executed", "in_graph", "backend", "named", "verdict"),
    [
        ("fp32", counted(fp32=104), {"fp32": 104}, CPU, False, "certified"),
        ("fp32", counted(fp32=103, bf16=1), {"fp32": 104}, CPU, False, "failed"),
        ("fp16", counted(fp16=100, fp32=4), {"fp16": 104}, GPU, False, "certified"),
        ("fp16", counted(fp32=104), {"fp16": 104}, GPU, False, "failed"),
        ("fp16", counted(fp32=104), {"fp16": 104}, CPU, False, "not judged"),
        ("fp16", counted(fp32=104), {"fp16": 104}, CPU, True, "failed"),
        ("bf16", counted(bf16=104), {"bf16": 104}, CPU, True, "certified"),
        ("bf16", counted(bf16=100, int8=4), {"bf16": 104}, CPU, False, "failed"),
        ("int8", counted(int8=38, fp32=66), {"int8": 38, "fp32": 66}, CPU, True, "certified"),
        ("int8", counted(int8=16, fp32=88), {"int8": 38, "fp32": 66}, CPU, True, "failed"),
        ("int8", counted(fp32=104), {"int8": 1, "fp32": 103}, CPU, True, "failed"),
        ("int8-fp16", counted(int8=30, fp16=74), {"int8": 38, "fp16": 66}, GPU, False, "certified"),
        ("int8", Executed(time_share={"int8": 0.3, "fp32": 0.7}), {"int8": 104}, GPU, False, "certified"),
        ("int8", Executed(time_share={"int8": 0.2, "fp32": 0.8}), {"int8": 104}, GPU, False, "failed"),
        ("int8", counted(int8=38, bf16=66), {"int8": 38, "fp32": 66}, CPU, False, "failed"),
        ("fp16", counted(fp32=104), {"fp16": 104}, BACKENDS["onnxruntime-cuda"], False, "not judged"),
        ("fp16", counted(fp32=104), {"fp32": 104}, CPU, False, "failed"),
        ("fp16", Executed(), {"fp32": 104}, GPU, False, "failed"),
    ],
)
def test_proofs(precision, executed, in_graph, backend, named, verdict):
    found = prove(PRECISIONS[precision], executed, in_graph, backend, named=named)
    assert found.verdict == verdict
    assert bool(found.reasons) == (verdict != "certified")


def test_a_runtime_that_does_not_tell_is_said_to():
    found = prove(PRECISIONS["fp16"], Executed(layers={"fp32": 9}), {"fp16": 104}, GPU, named=True)
    assert (found.verdict, found.reasons) == ("certified", ("TensorRT does not tell in which types it multiplies",))


def test_what_multiplies_is_told_by_its_name():
    kinds = (
        "Conv",
        "FusedConv",
        "MatMulIntegerToFloat",
        "QGemm",
        "FullyConnected",
        "Attention",
        "MatMul",
        "Convolution",
    )
    others = ("Convert", "Cast", "LayerNormalization", "Add", "Reorder", "TRTKernel_graph_1")
    layers = [RuntimeLayer(kind=kind, number="fp32", time=1.0) for kind in kinds + others]
    layers.append(RuntimeLayer(kind="Conv", number="int8", time=8.0))
    layers.append(RuntimeLayer(kind="MatMul", number="", time=9.0))  # of integers that count
    found = executed_of(layers)
    assert found.layers == {"fp32": len(kinds + others), "int8": 1}
    assert found.multiplications == {"fp32": len(kinds), "int8": 1}
    assert found.time_share == {"fp32": 0.5, "int8": 0.5}


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_runtimes_tell_as_many_multiplications_as_the_graph_has(backend, bundle, faces):
    """For FP32, whose operators no runtime splits or drops here."""
    row = BACKENDS[backend]
    if not row.is_usable():
        pytest.skip(f"{row.title} is not usable here")
    limits = {"precision": "fp32", "face_shape": (32, 32, 1), "max_batch": 64}
    engine = open_engine(row, bundle.graph("fp32"), **limits, profiled=True)
    before = engine.run(faces[0][:3])
    found = engine.executed(faces[0][:3])
    operators = bundle.manifest.graphs["fp32"].operators
    assert found.multiplications == {"fp32": sum(operators.get(name, 0) for name in ("Conv", "MatMul", "Gemm"))}
    assert found.time_share == {"fp32": 1.0}
    assert (engine.run(faces[0][:3]).label == before.label).all()  # it goes on as before
    assert open_engine(row, bundle.graph("fp32"), **limits).executed(faces[0][:3]) == Executed()


@pytest.mark.skipif("avx512_bf16" not in kernel_extensions(), reason="the processor has no BF16")
def test_an_openvino_that_lowers_fp32_by_itself_is_caught(bundle, quiet, monkeypatch):
    """Its own default on processors with BF16; our engine asks for FP32."""
    compile_model = OpenVinoEngine._options
    monkeypatch.setattr(
        OpenVinoEngine, "_options", lambda *given: compile_model(*given) | {"INFERENCE_PRECISION_HINT": "bf16"}
    )
    report = certification.verify(
        bundle, engines=["openvino"], precisions=["fp32"], limits=LOOSE, limit=30, rounds=1, console=quiet
    )
    assert report.verdict == "failed"
    assert "OpenVINO multiplies the graph of FP32 in fewer bits (bf16" in report.engines[0].reasons[-1]
