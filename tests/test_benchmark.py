"""What a bench times and what it skips; PyTorch's own ways; peaks. How fast anything is, no test says."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from emoexport import benchmark, gemm_peak, sessions
from emoexport.engines import BACKENDS
from emoexport.engines.cuda import find_cuda
from emoexport.errors import MissingRuntime, UsageError
from emoexport.fold import Fold
from emoexport.rivals import RIVALS, RivalEngine, rivals_for
from emoexport.throughput import EngineSpeed, measure

no_gpu = pytest.mark.skipif(bool(find_cuda().devices), reason="there is a CUDA device")


@no_gpu
def test_a_dry_run_on_a_gpu_that_is_not_there_lists_all_and_skips_all(bundle, call):
    planned = benchmark.plan_bench(bundle, device="cuda")
    names = {one.name for one in planned}
    for backend in BACKENDS.values():
        for precision in backend.precisions:
            assert (f"{backend.name}-{precision}" in names) == (backend.device == "cuda")
    assert {f"{row.name}-{row.precision}" for row in rivals_for("cuda")} < names
    assert all(one.problem for one in planned)
    code, out, _ = call("bench", bundle.path, "--device", "cuda", "--dry-run")
    assert code == 0
    assert "tensorrt-fp16" in out
    assert "skipped: there is no NVIDIA driver here" in out
    assert not (bundle.path / "reports/bench-cuda.json").exists()


@no_gpu
def test_a_bench_on_a_gpu_that_is_not_there(bundle, call, quiet):
    with pytest.raises(MissingRuntime) as caught:
        benchmark.bench(bundle, device="cuda", console=quiet)
    assert caught.value.exit_code == 3
    code, out, err = call("bench", bundle.path, "--device", "cuda")
    assert (code, out) == (3, "")
    assert "a CUDA device is needed" in err


def test_a_dry_run_on_the_cpu_says_what_is_missing(bundle):
    planned = {one.name: one.problem for one in benchmark.plan_bench(bundle)}
    assert planned["onnxruntime-fp32"] == ""
    assert planned["inductor-fp32"] == "the bundle has no engine of it"
    assert not any(name in planned for name in RIVALS)
    few = benchmark.plan_bench(bundle, engines=["onnxruntime"], precisions=["int8"], rivals=True)
    assert [one.name for one in few] == ["torch-fp32", "torch-batched-fp32", "torch-autocast-bf16", "onnxruntime-int8"]


def test_devices_and_engines_must_agree(bundle):
    with pytest.raises(UsageError, match="'tpu' is no device"):
        benchmark.plan_bench(bundle, device="tpu")
    with pytest.raises(UsageError, match="OpenVINO runs on cpu") as caught:
        benchmark.plan_bench(bundle, device="cuda", engines=["openvino"])
    assert caught.value.hint == "--device cpu"


@pytest.mark.parametrize("row", rivals_for("cpu"), ids=lambda row: f"{row.name}-{row.precision}")
def test_rivals_decide_as_the_reference_does(row, bundle, faces):
    import copy

    reference = sessions.open_reference(bundle)[0]
    members = copy.deepcopy(reference.members)
    engine = RivalEngine(
        row,
        members,
        lambda together: Fold(together, reference.views, reference.decision),
        device="cpu",
        face_shape=(32, 32, 1),
        max_batch=64,
    )
    assert engine.name == f"{row.name}-{row.precision}"
    found, wanted = engine.run(faces[0][:9]), reference.run(faces[0][:9])
    slack = 1e-5 if row.precision == "fp32" else 5e-2
    assert np.abs(found.probabilities - wanted.probabilities).max() <= slack
    assert found.probabilities.dtype == np.float32
    assert np.abs(engine.scores(faces[0][:9]) - reference.scores(faces[0][:9])).max() <= 2 * slack


def test_a_bench_with_rivals_knows_the_peak(bundle, quiet, monkeypatch):
    monkeypatch.setattr(gemm_peak, "_SECONDS", 0.01)
    monkeypatch.setattr(gemm_peak, "_SIZE", {"cpu": 64})
    report = benchmark.bench(
        bundle, engines=["onnxruntime"], precisions=["fp32", "int8"], rivals=True, batches=[2], rounds=2, console=quiet
    )
    found = {result.engine: result for result in report.results}
    assert set(found) == {
        *("torch-fp32", "torch-batched-fp32", "torch-autocast-bf16"),
        *("onnxruntime-fp32", "onnxruntime-int8"),
    }
    assert set(report.gemm_peak_tops) == {"fp32", "bf16"}  # PyTorch has no product of INT8 on CPUs
    fast = found["onnxruntime-fp32"]
    gflop = bundle.manifest.gflop_a_face
    assert fast.share_of_peak == pytest.approx(
        fast.faces_a_second * gflop / 1000 / report.gemm_peak_tops["fp32"], rel=1e-2, abs=1e-4
    )
    assert found["onnxruntime-int8"].share_of_peak is None
    assert fast.split_ms is None
    text = (bundle.path / "reports/bench.md").read_text()
    assert "A large matrix product by PyTorch reaches here" in text
    assert "| torch-autocast | bf16 | 2 |" in text
    assert "| onnxruntime | int8 | 2 |" in text


def test_int8_with_fp16_between_is_one_precision(bundle, quiet):
    benchmark.bench(bundle, engines=["onnxruntime"], precisions=["int8-fp16"], batches=[1], rounds=2, console=quiet)
    assert "| onnxruntime | int8-fp16 | 1 |" in (bundle.path / "reports/bench.md").read_text()


def test_an_engine_is_not_timed_beyond_its_largest_call(bundle):
    opened = sessions.open_engines(bundle, engines=["onnxruntime"], precisions=["fp32"])
    judge = sessions.open_judge(bundle, sessions.open_reference(bundle)[0])
    opened[0].max_batch = 2
    found: list[EngineSpeed] = measure(opened, reference=judge, batches=[2, 4], rounds=2, passes_a_face=32)
    assert [(one.engine, one.batch) for one in found] == [
        ("torch-fp32", 2),
        ("onnxruntime-fp32", 2),
        ("torch-fp32", 4),
    ]


def test_a_peak_is_of_the_order_of_what_a_core_can_do(monkeypatch):
    monkeypatch.setattr(gemm_peak, "_SECONDS", 0.2)
    monkeypatch.setattr(gemm_peak, "_SIZE", {"cpu": 512})
    peaks = gemm_peak.gemm_peaks("cpu", ("fp32", "int8", "fp8"))
    assert set(peaks) == {"fp32"}
    assert 0.001 < peaks["fp32"] < 100


def test_a_pytorch_that_cannot_use_the_gpu(bundle, quiet, monkeypatch):
    monkeypatch.setattr(benchmark, "require_device", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MissingRuntime, match="cannot use the GPU here"):
        benchmark.bench(bundle, device="cuda", console=quiet)


def test_only_engines_of_the_device_are_opened(bundle, monkeypatch):
    monkeypatch.setattr(
        sessions,
        "open_engine",
        lambda backend, file, *, precision, **_: SimpleNamespace(name=f"{backend.name}-{precision}"),
    )
    for backend in BACKENDS.values():
        monkeypatch.setattr(type(backend), "is_usable", lambda self: not self.built_from)
    found = {device: {one.name for one in sessions.open_engines(bundle, device=device)} for device in ("cpu", "cuda")}
    assert "onnxruntime-fp32" in found["cpu"]
    assert "onnxruntime-cuda-fp16" in found["cuda"]
    assert not found["cpu"] & found["cuda"]
    assert {one.name for one in sessions.open_engines(bundle)} == found["cpu"] | found["cuda"]


@pytest.mark.gpu
def test_a_bench_on_a_gpu(bundle, quiet):
    if not find_cuda().devices:
        pytest.skip("there is no CUDA device")
    report = benchmark.bench(bundle, device="cuda", batches=[1, 4], rounds=5, console=quiet)
    names = {result.engine for result in report.results}
    assert {"torch-fp32", *(f"{row.name}-{row.precision}" for row in rivals_for("cuda"))} <= names
    assert set(report.gemm_peak_tops) >= {"fp32", "fp16", "bf16"}
    for result in report.results:
        assert result.share_of_peak is None or 0 < result.share_of_peak < 1.5
