"""What a bench times, skips and loses; PyTorch's own ways; peaks; the script. How fast anything is, no test says."""

import copy
import csv
import functools
import json
import os
import pkgutil
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch

from emoexport import benchmark, footprint, gemm_peak, measurement, opening, sessions
from emoexport.decision import Decision
from emoexport.engines import BACKENDS
from emoexport.engines.base import Engine
from emoexport.engines.cuda import find_cuda
from emoexport.engines.machine import find_compiler
from emoexport.engines.memory_probe import Memory
from emoexport.engines.timing import Ratio, latency_of
from emoexport.errors import CheckFailed, MissingRuntime, UsageError
from emoexport.fold import Fold
from emoexport.measurement import Cost, measure
from emoexport.outcome import Outcome
from emoexport.reference import Reference
from emoexport.rivals import RIVALS, PlainRival, Rival, RivalEngine, export_plain, rivals_for
from emoexport.speed_tables import speed_csv, speed_markdown
from emoexport.throughput import EngineSpeed, SpeedReport, best_of, changes, lost_engines, unlike
from emoexport.views import VIEWS, views_named

no_gpu = pytest.mark.skipif(bool(find_cuda().devices), reason="there is a CUDA device")
RUN_SH = Path(__file__).parents[1] / "docs/results/gpu/run.sh"


class Scripted(Engine):
    """Answers until a call, counted from 0 at each batch size, of so many faces or more."""

    backend = "onnxruntime"

    def __init__(self, precision, *, fails_from=99, at_call=0, split=None):
        super().__init__(precision=precision, face_shape=(2, 2, 1), max_batch=64)
        self.fails_from, self.at_call, self.fails_to_split = fails_from, at_call, split
        self.calls = []

    def _run(self, faces):
        self.calls.append(len(faces))
        if len(faces) >= self.fails_from and self.calls.count(len(faces)) > self.at_call:
            raise RuntimeError("out of memory\nTry less.")
        return Outcome(np.zeros((len(faces), 7), np.float32), np.zeros(len(faces), int), np.zeros(len(faces)))

    def _scores(self, faces):
        raise NotImplementedError

    def split(self, faces):
        if len(faces) == self.fails_to_split:
            raise ValueError
        return 0.1, 0.2, 0.3


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
    assert not any(row.engine in planned for row in RIVALS)
    few = benchmark.plan_bench(bundle, engines=["onnxruntime"], precisions=["int8"], rivals=True)
    assert [one.name for one in few] == [
        *("torch-fp32", "torch-batched-fp32", "torch-autocast-bf16", "torch-compile-fp32", "torch-compile-bf16"),
        *("onnxruntime-plain-fp32", "openvino-plain", "onnxruntime-int8"),
    ]


def test_rivals_that_lack_something_are_skipped(bundle, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr("emoexport.rivals.importlib.util.find_spec", lambda name: None if name == "openvino" else name)
    problems = {row.engine: row.problem for row in rivals_for("cpu")}
    lacking = "there is no no-such-compiler, which torch.compile needs"
    assert {name: why for name, why in problems.items() if why} == {
        **dict.fromkeys(["torch-compile-fp32", "torch-compile-bf16"], lacking),
        "openvino-plain": "not installed",
    }
    assert not any(row.problem for row in rivals_for("cuda"))


def test_devices_and_engines_must_agree(bundle):
    with pytest.raises(UsageError, match="'tpu' is no device"):
        benchmark.plan_bench(bundle, device="tpu")
    with pytest.raises(UsageError, match="OpenVINO runs on cpu") as caught:
        benchmark.plan_bench(bundle, device="cuda", engines=["openvino"])
    assert caught.value.hint == "--device cpu"


def decides_as_the_reference_does(engine: Engine, reference: Reference, images: np.ndarray) -> None:
    found, wanted = engine.run(images), reference.run(images)
    slack = 1e-5 if engine.precision == "fp32" else 5e-2
    assert np.abs(found.probabilities - wanted.probabilities).max() <= slack
    assert found.probabilities.dtype == np.float32
    assert np.abs(engine.scores(images) - reference.scores(images)).max() <= 2 * slack
    if engine.precision == "fp32":
        assert np.array_equal(found.label, wanted.label)


def rival_of(row: Rival, reference: Reference) -> RivalEngine:
    """With members of its own, since those of a rival in fewer bits are put in another order."""
    members, decided = copy.deepcopy(reference.members), (reference.views, reference.decision)
    return RivalEngine(row, members, lambda together: Fold(together, *decided), face_shape=(32, 32, 1), max_batch=64)


OF_PYTORCH = [row for row in rivals_for("cpu") if row.runtime is None]


@pytest.mark.parametrize("row", OF_PYTORCH, ids=lambda row: row.engine)
def test_rivals_decide_as_the_reference_does(row, bundle, faces, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "compile", lambda whole, **settings: asked.append(settings) or whole)
    reference = sessions.open_reference(bundle)[0]
    engine = rival_of(row, reference)
    assert engine.name == row.engine
    decides_as_the_reference_does(engine, reference, faces[0][:9])
    assert asked == [{"dynamic": False, "options": {"freezing": True}}] * row.name.startswith("torch-compile")


@pytest.mark.slow
@pytest.mark.skipif(find_compiler()[1] is None, reason="there is no C++ compiler")
@pytest.mark.parametrize("row", [row for row in OF_PYTORCH if row.compiled], ids=lambda row: row.engine)
def test_compiled_rivals_decide_as_the_reference_does(row, bundle, faces):
    reference = sessions.open_reference(bundle)[0]
    torch.compiler.reset()
    decides_as_the_reference_does(rival_of(row, reference), reference, faces[0][:9])
    torch.compiler.reset()


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A reference of two small members, with weights and rules, and what the exporter writes of them."""
    torch.manual_seed(1)
    flat, pool = torch.nn.Flatten, torch.nn.AdaptiveAvgPool2d
    members = [
        torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3), torch.nn.GELU(), pool(4), flat(), torch.nn.Linear(128, 7)).eval()
        for _ in range(2)
    ]
    weights, rules = np.array([[1.0, 2, 3], [4, 5, 6]]), Decision(temperature=0.5, thresholds={"happy": 0.2})
    reference = Reference(members=members, views=views_named(list(VIEWS)[:3]), decision=rules, weights=weights)
    return reference, export_plain(reference, tmp_path_factory.mktemp("plain"), face_shape=(32, 32, 1))


@pytest.mark.parametrize("row", [row for row in rivals_for("cpu") if row.runtime], ids=lambda row: row.engine)
def test_plain_exports_decide_as_the_reference_does(row, plain, faces):
    if row.problem:
        pytest.skip(row.problem)
    reference, files = plain
    engine = PlainRival(row, reference, files, face_shape=(32, 32, 1), max_batch=64, threads=1)
    assert engine.name == f"{row.name}-{engine.precision}"
    assert row.precision in ("", engine.precision)
    decides_as_the_reference_does(engine, reference, faces[0][:9])
    assert len(engine.run(faces[0][:1]).label) == 1


def test_plain_exports_have_none_of_our_rewrites(plain):
    """Each file is one member, from pictures to logits, with the shapes that PyTorch gives."""
    reference, files = plain
    assert len(files) == len(reference.members)
    for member, file in zip(reference.members, files, strict=True):
        graph = onnx.load(file).graph
        assert [dim.dim_value for dim in graph.input[0].type.tensor_type.shape.dim][1:] == [1, 32, 32]
        assert len(graph.output) == 1
        stored = {tuple(weight.dims) for weight in graph.initializer}
        assert {tuple(weight.shape) for weight in member.parameters() if weight.ndim == 4} <= stored


def test_a_bench_with_rivals_knows_the_peak(bundle, quiet, small_peak, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no translation\nfor this operator")

    monkeypatch.setattr(torch.onnx, "export", fail)
    monkeypatch.setattr(torch, "compile", lambda whole, **_: whole)
    chosen = {"engines": ["onnxruntime"], "precisions": ["fp32", "int8"], "rivals": True, "memory": False}
    report = benchmark.bench(bundle, **chosen, batches=[2], rounds=2, console=quiet)
    found = {result.engine: result for result in report.results}
    assert set(found) == {
        *("torch-fp32", "torch-batched-fp32", "torch-autocast-bf16", "torch-compile-fp32", "torch-compile-bf16"),
        *("onnxruntime-fp32", "onnxruntime-int8"),
    }
    assert report.failures == dict.fromkeys(["onnxruntime-plain-fp32", "openvino-plain"], "no translation")
    assert "openvino-plain failed, and was left out from there on: no translation." in report.notes
    assert set(report.gemm_peak_tops) == {"fp32", "bf16"}  # PyTorch has no product of INT8 on CPUs
    fast = found["onnxruntime-fp32"]
    gflop = bundle.manifest.gflop_a_face
    assert fast.share_of_peak == pytest.approx(
        fast.faces_a_second * gflop / 1000 / report.gemm_peak_tops["fp32"], rel=1e-2, abs=1e-4
    )
    assert found["onnxruntime-int8"].share_of_peak is None
    assert fast.compute_ms == fast.split_ms[1] > 0
    assert found["torch-batched-fp32"].split_ms is None
    text = (bundle.path / "reports/bench.md").read_text()
    assert "A large matrix product by PyTorch reaches here" in text
    assert "| torch-autocast | bf16 | 2 |" in text
    assert "| onnxruntime | int8 | 2 |" in text


def test_int8_with_fp16_between_is_one_precision(bundle, quiet, small_peak):
    benchmark.bench(
        bundle, engines=["onnxruntime"], precisions=["int8-fp16"], batches=[1], rounds=2, memory=False, console=quiet
    )
    assert "| onnxruntime | int8-fp16 | 1 |" in (bundle.path / "reports/bench.md").read_text()


def test_an_engine_is_not_timed_beyond_its_largest_call(bundle):
    opened = opening.open_engines(bundle, engines=["onnxruntime"], precisions=["fp32"])
    judge = sessions.open_judge(bundle, sessions.open_reference(bundle)[0])
    opened[0].max_batch = 2
    found, failures, _ = measure(opened, reference=judge, batches=[2, 4], rounds=2, cost=Cost(passes_a_face=32))
    assert failures == {}
    assert [(one.engine, one.batch) for one in found] == [
        ("torch-fp32", 2),
        ("onnxruntime-fp32", 2),
        ("torch-fp32", 4),
    ]


@pytest.mark.parametrize("at_call", [0, 2, 4], ids=["when first called", "when captured", "when timed"])
def test_an_engine_that_fails_costs_only_itself(at_call, monkeypatch):
    emptied = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(1))
    judge, sound, ill = Scripted("fp32"), Scripted("int8"), Scripted("fp16", fails_from=2, at_call=at_call)
    # Whatever the order: a larger batch is not tried after a smaller one that failed.
    found, failures, _ = measure([ill, sound], reference=judge, batches=[4, 2, 1], rounds=3, cost=Cost(passes_a_face=1))
    assert failures == {"onnxruntime-fp16 at batch 2": "out of memory"}
    assert emptied == [1]
    assert [(one.engine[12:], one.batch) for one in found] == [
        *(("fp32", 1), ("fp16", 1), ("int8", 1)),
        *(("fp32", 2), ("int8", 2), ("fp32", 4), ("int8", 4)),
    ]
    assert ill.calls == [1] * 6 + [2] * (at_call + 1)
    assert len(sound.calls) == 18


def test_an_engine_that_cannot_tell_its_parts(monkeypatch):
    ill = Scripted("fp16", split=2)
    found, failures, _ = measure(
        [ill], reference=Scripted("fp32"), batches=[1, 2, 4], rounds=2, cost=Cost(passes_a_face=1)
    )
    assert failures == {"onnxruntime-fp16 at batch 2": "ValueError"}
    assert [one.split_ms for one in found if one.engine == ill.name] == [(0.1, 0.2, 0.3), None]


def test_the_reference_must_not_fail():
    judge = Scripted("fp32", fails_from=2)
    with pytest.raises(RuntimeError, match="out of memory"):
        measure([Scripted("fp16")], reference=judge, batches=[1, 2], rounds=2, cost=Cost(passes_a_face=1))


def test_failures_and_what_is_not_captured_are_reported(bundle, call, small_peak, monkeypatch):
    ill, lacking, captured = (Scripted(precision) for precision in ("fp16", "int8", "int8-fp16"))
    ill.fails_from = 4
    lacking.uncaptured, captured.uncaptured = "some binding has no CUDA graphs", ""
    for engine in (ill, lacking, captured):
        engine.face_shape = bundle.manifest.face_shape
    monkeypatch.setattr(benchmark, "open_engines", lambda *_, **__: [ill, lacking, captured])
    code, out, _ = call("bench", bundle.path, "--batch", 2, "--batch", 4, "--rounds", 2, "--no-memory")
    said = "onnxruntime-fp16 at batch 4 failed, and was left out from there on: out of memory."
    assert code == 0
    assert said in out
    document = json.loads(out.splitlines()[-1])
    assert document["failures"] == {"onnxruntime-fp16 at batch 4": "out of memory"}
    uncaptured = {(one["engine"], one["batch"]): one["uncaptured"] for one in document["results"]}
    assert uncaptured["onnxruntime-int8", 4] == "some binding has no CUDA graphs"
    assert (uncaptured["onnxruntime-int8-fp16", 2], uncaptured["torch-fp32", 2]) == ("", None)
    text = (bundle.path / "reports/bench.md").read_text()
    assert said in text
    assert text.count("replays no CUDA graphs of ours") == 1
    assert "onnxruntime-int8 replays no CUDA graphs of ours: some binding has no CUDA graphs." in text


@pytest.fixture
def compiled_rival(monkeypatch):
    """Makes rivals that are compiled by a backend that counts its graphs, and those graphs."""
    graphs = []

    def count(graph, *_, **__):
        graphs.append(graph)
        return graph.forward

    def make(precision, dtype):
        settings = {"dtype": dtype, "compiled": {"options": {"freezing": True}}}
        row = Rival(name="torch-compile", title="", precision=precision, device="cpu", **settings)
        members = [torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 7))]
        fold = functools.partial(Fold, views=views_named(["identity"]), decision=Decision())
        return RivalEngine(row, members, fold, face_shape=(4, 4, 1), max_batch=64)

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=count))
    torch.compiler.reset()
    with torch._dynamo.config.patch(recompile_limit=8):  # PyTorch's own; an optimiser of timm raises it for all
        yield make, graphs
    torch.compiler.reset()


def test_rivals_are_compiled_at_each_batch_size(compiled_rival):
    make, graphs = compiled_rival
    rivals = make("fp16", torch.float16), make("bf16", torch.bfloat16)
    for batch in (1, 2, 4, 8, 16, 32, 64):
        for rival in rivals:
            rival.run(np.zeros((batch, 4, 4, 1), np.uint8))
    assert len(graphs) == 2 * 7


def test_a_rival_that_is_compiled_no_more_is_not_timed(compiled_rival, monkeypatch):
    monkeypatch.setattr("emoexport.rivals._RECOMPILES", 1)
    rival = compiled_rival[0]("fp32", None)
    reference = Scripted("fp16")
    reference.face_shape = rival.face_shape
    found, failures, _ = measure([rival], reference=reference, batches=[1, 2], rounds=2, cost=Cost(passes_a_face=1))
    assert [one.batch for one in found if one.engine == rival.name] == [1]
    assert "recompile_limit" in failures["torch-compile-fp32 at batch 2"]


def test_peaks_are_of_random_numbers_in_the_order_of_fast_kernels(monkeypatch):
    products = []

    def multiply(_, product):
        products.append(product())
        return 1.0

    monkeypatch.setattr(gemm_peak, "_SIZE", {"cpu": 64})
    monkeypatch.setattr(gemm_peak, "_FAST", {"cpu": ("fp32", "fp16", "int8")})
    monkeypatch.setattr(gemm_peak, "_least", multiply)
    monkeypatch.setattr(torch, "_int_mm", lambda one, other: (one, other))
    gemm_peak.gemm_peaks("cpu", ("fp32", "fp16", "int8"))
    *floats, (one, other) = products
    assert [product.float().std() > 1 for product in floats] == [True, True]
    assert one.is_contiguous()
    assert other.t().is_contiguous()
    for matrix in (one, other):
        assert (matrix.min(), matrix.max()) == (-127, 127)


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
        opening,
        "open_engine",
        lambda backend, file, *, precision, **_: SimpleNamespace(name=f"{backend.name}-{precision}"),
    )
    for backend in BACKENDS.values():
        monkeypatch.setattr(type(backend), "is_usable", lambda self: not self.built_from)
    found = {device: {one.name for one in opening.open_engines(bundle, device=device)} for device in ("cpu", "cuda")}
    assert "onnxruntime-fp32" in found["cpu"]
    assert "onnxruntime-cuda-fp16" in found["cuda"]
    assert not found["cpu"] & found["cuda"]
    assert {one.name for one in opening.open_engines(bundle)} == found["cpu"] | found["cuda"]


@pytest.mark.gpu
def test_a_bench_on_a_gpu(bundle, quiet):
    if not find_cuda().devices:
        pytest.skip("there is no CUDA device")
    report = benchmark.bench(bundle, device="cuda", batches=[1, 4], rounds=5, console=quiet)
    names = {result.engine for result in report.results}
    assert {"torch-fp32", *(f"{row.name}-{row.precision}" for row in rivals_for("cuda"))} <= names
    assert set(report.gemm_peak_tops) >= {"fp32", "fp16", "bf16"}
    for result in report.results:
        assert result.share_of_peak is None or 0 < result.share_of_peak < 1.05
    assert "gpu" in report.machine


FAKE_PYTHON = """#!/bin/sh
case "$*" in
  *find_cuda*) echo Some-GPU ;;
  *"rows['tensorrt-rtx']"*) exit 1 ;;
  '-c '*) ;;
  *) echo "$*" >>"$CALLS"; case "$*" in *"$FAILING"*) exit 7 ;; esac ;;
esac
"""


@pytest.fixture
def run_script(tmp_path):
    """Runs the script with a Python that notes what it is called with: exit codes, and those of steps by name."""
    python, out = tmp_path / "a folder/python", tmp_path / "the reports"
    python.parent.mkdir()
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    settings = {"PYTHON": python, "OUT": out, "WORK": tmp_path / "the work", "CALLS": tmp_path / "calls"}

    def run(**further):
        environment = {**os.environ, **{name: str(value) for name, value in (settings | further).items()}}
        done = subprocess.run(["bash", RUN_SH], env=environment, capture_output=True, timeout=60, check=False)
        steps = dict(re.findall(r"^(.+): exit code (\d+)", (out / "steps.txt").read_text(), flags=re.MULTILINE))
        return done.returncode, steps, (tmp_path / "calls").read_text().splitlines()

    return run


needs_bash = pytest.mark.skipif(not (shutil.which("bash") and shutil.which("timeout")), reason="there is no bash")


@needs_bash
def test_the_script_goes_on_after_a_step_that_fails(run_script, tmp_path):
    code, steps, calls = run_script(FULL="yes", FAILING="--layout branches")
    assert list(steps) == [
        *("doctor", "tests", "train", "build-branches", "build-branches-tensorrt", "bench-branches"),
        *("full-run", "build-full", "build-full-fp16-tensorrt", "bench-full-fp16"),
        *("build-stacked", "build-stacked-tensorrt", "bench-stacked", "verify-branches", "verify-stacked"),
        *("build-full-bf16-tensorrt", "bench-full-bf16"),
    ]
    assert [name for name, status in steps.items() if status != "0"] == ["build-branches"]
    assert code == 1
    full = f"-m emoexport build {tmp_path}/the work/full"
    assert f"{full} --engine tensorrt --fp16 --opt-batch 1 --max-batch 8" in calls
    assert not any("tensorrt-rtx" in call for call in calls)


@needs_bash
def test_the_script_where_all_is_well(run_script):
    code, steps, calls = run_script(FULL="no", FAILING="nothing")
    assert (code, set(steps.values())) == (0, {"0"})
    assert not any("full" in text for text in [*steps, *calls])


def speed(ratio: tuple[float, float, float], engine: str = "onnxruntime-fp32", batch: int = 4) -> EngineSpeed:
    """A row of a report, of which the ratio matters."""
    times = np.array([10.0, 11.0, 12.0])
    return EngineSpeed(
        engine=engine,
        batch=batch,
        latency_ms=latency_of(times),
        ms_a_face=2.5,
        faces_a_second=400.0,
        passes_a_second=1.0,
        times_reference=Ratio(value=ratio[0], low=ratio[1], high=ratio[2]),
        samples_ms=tuple(times),
    )


def report(*results: EngineSpeed) -> SpeedReport:
    return SpeedReport(
        created="", bundle_digest="", passes_a_face=32, results=results, size_bytes={}, machine={"processor": "x"}
    )


def quick_bench(bundle, *, batch: int, rounds: int) -> tuple[object, ...]:
    """The command that times one engine beside the reference, and no memory."""
    engine = ("--engine", "onnxruntime", "--precision", "fp32")
    return "bench", bundle.path, *engine, "--batch", batch, "--rounds", rounds, "--no-memory"


def test_changes_are_those_beyond_both_intervals():
    before = report(speed((3.0, 2.8, 3.2)), speed((3.0, 2.8, 3.2), batch=1), speed((1.0, 1.0, 1.0), "torch-fp32"))
    now = report(
        speed((2.5, 2.4, 2.7)),
        speed((2.9, 2.7, 3.1), batch=1),
        speed((9.0, 9.0, 9.0), "openvino-fp32"),
        speed((1.0, 1.0, 1.0), "torch-fp32"),
    )
    found = changes(now, before)
    assert [(one.engine, one.batch, one.is_slower, one.is_faster) for one in found] == [
        ("onnxruntime-fp32", 4, True, False),
        ("onnxruntime-fp32", 1, False, False),
    ]
    assert [one.is_faster for one in changes(before, now)] == [True, False]


def test_engines_that_are_lost_since():
    before = report(speed((3.0, 2.8, 3.2)), speed((3.0, 2.8, 3.2), "openvino-fp32"), speed((2, 1, 3), "x-fp32", 64))
    assert lost_engines(report(speed((3.0, 2.8, 3.2))), before) == ["openvino-fp32"]  # none were timed at 64
    assert lost_engines(before, before) == []
    assert unlike(before, before) == []
    other = before.model_copy(update={"bundle_digest": "another", "machine": before.machine | {"processor": "a Z80"}})
    told = unlike(before, other)
    assert told[0] == "The earlier report is of another bundle."
    assert "its processor was a Z80; here is " in told[1]


def test_the_command_fails_where_an_engine_became_slower(bundle, call, small_peak, tmp_path):
    earlier = tmp_path / "earlier.json"
    typed = quick_bench(bundle, batch=4, rounds=3)
    earlier.write_text(report(speed((1e6, 1e6 - 1, 1e6 + 1))).to_json())
    code, out, _ = call(*typed, "--compare", earlier)
    assert code == 1
    assert "slower" in out
    assert json.loads(out.splitlines()[-1])["results"]
    earlier.write_text(report(speed((1e-6, 1e-7, 2e-6))).to_json())
    code, out, _ = call(*typed, "--compare", earlier)
    assert code == 0
    assert "faster" in out
    earlier.write_text("{}")
    assert call(*typed, "--compare", earlier)[0] == 4


def test_what_became_slower_does_not_stand_in_the_csv(bundle, call, small_peak, tmp_path):
    earlier = tmp_path / "earlier.json"
    earlier.write_text(report(speed((1e6, 1e6 - 1, 1e6 + 1))).to_json())
    code, out, err = call(*quick_bench(bundle, batch=4, rounds=2), "--csv", "--compare", earlier)
    assert (code, "slower" in out, "slower" in err) == (1, False, True)
    assert len(list(csv.DictReader(out.splitlines()))) == 2


def test_other_forms_are_alone_on_standard_output(bundle, call, small_peak):
    typed = quick_bench(bundle, batch=2, rounds=2)
    _, out, _ = call(*typed, "--csv")
    rows = list(csv.DictReader(out.splitlines()))
    assert [(row["engine"], row["batch"]) for row in rows] == [("torch-fp32", "2"), ("onnxruntime-fp32", "2")]
    assert float(rows[1]["low"]) <= float(rows[1]["times_reference"]) <= float(rows[1]["high"])
    assert [(row["unstable"] in "01", row["peak_bytes"]) for row in rows] == [(True, "")] * 2
    assert float(rows[1]["before_ms"]) + float(rows[1]["compute_ms"]) + float(rows[1]["after_ms"]) > 0
    assert int(rows[1]["size_bytes"]) == bundle.sizes()["fp32"]
    _, out, _ = call(*typed, "--markdown")
    assert out.startswith("# Throughput")


def test_rows_that_vary_are_marked(bundle, quiet, small_peak, monkeypatch):
    monkeypatch.setattr("os.getloadavg", lambda: (3.0, 1.0, 1.0))
    chosen = {"engines": ["onnxruntime"], "precisions": ["fp32"], "memory": False}
    found = benchmark.bench(bundle, **chosen, batches=[1], rounds=4, console=quiet)
    for result in found.results:
        assert result.unstable == (result.latency_ms.spread_pct > 2.5 or (result.others_cores or 0) > 0.1)
        assert result.cores > 0
    assert any("load average 3.0" in note for note in found.notes)
    assert any("Unstable" in note for note in found.notes) == any(result.unstable for result in found.results)
    assert set(found.load_s) == {"onnxruntime-fp32"}
    assert found.load_s["onnxruntime-fp32"] > 0
    assert {when: state["load_average"] for when, state in found.states.items()} == {"before": "3.00", "after": "3.00"}
    assert found.memory == {}


def test_rows_timed_beside_others_are_marked(monkeypatch):
    monkeypatch.setattr(measurement.OtherProcesses, "cores", lambda _: 0.4)
    found, _, _ = measure([], reference=Scripted("fp32"), batches=[1], rounds=5, cost=Cost(passes_a_face=1))
    assert found[0].others_cores == 0.4
    assert found[0].unstable
    assert benchmark._others(found) == ["Other processes kept 0.4 cores busy while batches of 1 were timed."]
    still = found[0].model_copy(
        update={"others_cores": 0.1, "latency_ms": found[0].latency_ms.model_copy(update={"spread_pct": 2.5})}
    )
    assert not still.unstable
    assert benchmark._others([still]) == []


@pytest.fixture
def scripted_times(monkeypatch):
    """Has engines take so many milliseconds by batch size, as a function says; calls for the rounds that were asked."""

    def say(milliseconds):
        asked = []

        def interleave(calls, *, rounds, seconds, warmup, progress):
            for name in calls:
                for _ in range(warmup + rounds):
                    calls[name]()
            asked.append(seconds)
            return {name: np.full(rounds, milliseconds(name, 1 << len(asked) - 1)) for name in calls}

        monkeypatch.setattr(measurement, "interleave", interleave)
        return asked

    return say


SIZES = (1, 2, 4, 8, 16, 32, 64)


def growing(**further):
    settings = {"batches": SIZES, "rounds": 5, "growing": True, "cost": Cost(passes_a_face=1)} | further
    return measure([Scripted("fp16")], reference=Scripted("fp32"), **settings)


def test_batches_are_doubled_until_no_engine_gains(scripted_times):
    # The reference gains nothing; the other 20 % from 1 to 2 and from 2 to 4, and 4 % from 4 to 8.
    gains = {1: 1, 2: 1.2, 4: 1.44, 8: 1.44 * 1.04, 16: 99}
    asked = scripted_times(lambda name, batch: 10 * batch / (gains[batch] if name.endswith("16") else 1))
    found, _, stopped = growing(seconds=60)
    assert asked == [60] * 4
    assert {row.batch for row in found} == {1, 2, 4, 8}
    assert stopped == "Batches were doubled up to 8, where no engine was 5 % faster than before."
    assert [(row.engine, row.batch) for row in best_of(found)] == [("onnxruntime-fp32", 1), ("onnxruntime-fp16", 8)]


def test_gains_are_over_the_best_and_not_the_last(scripted_times):
    rates = {1: 100, 2: 50, 4: 90, 8: 999}
    scripted_times(lambda name, batch: 1000 * batch / rates[batch])
    assert {row.batch for row in growing()[0]} == {1, 2}


def test_batches_are_doubled_as_long_as_there_is_time(scripted_times):
    scripted_times(lambda name, batch: 500.0)  # a round is 1 s, and is taken for 2 s at twice the batch
    found, _, stopped = growing(seconds=9.9)
    assert {row.batch for row in found} == {1}
    assert stopped == "Batches were doubled up to 1: 5 rounds at 2 would have taken 10 s, and may take 9.9."
    assert {row.batch for row in growing(seconds=10)[0]} == set(SIZES)


def test_batches_that_are_given_are_all_timed(scripted_times, bundle):
    scripted_times(lambda name, batch: 1e6 * batch)
    found, _, stopped = growing(growing=False)
    assert ({row.batch for row in found}, stopped) == (set(SIZES), "")
    assert benchmark._sizes(bundle, [3, 1]) == [3, 1]
    assert benchmark._sizes(bundle, None) == list(SIZES)


def test_a_bench_doubles_and_measures_memory(bundle, call, small_peak, monkeypatch):
    real, asked = footprint.measure_memory, []

    def probe(request, batch):
        asked.append((request.settings.get("precision"), batch))
        if request.opener.endswith(":open_loop"):  # in this process, since PyTorch takes seconds to import
            engine = pkgutil.resolve_name(request.opener)(**json.loads(json.dumps(request.settings)))
            assert len(engine.run(np.zeros((batch, 32, 32, 1), np.uint8)).label) == batch
            return Memory(batch=batch, baseline_bytes=4 * 10**8, peak_bytes=5 * 10**8)
        if request.settings["precision"] == "int8":
            raise CheckFailed("killed")
        return real(request, batch)

    monkeypatch.setattr(footprint, "measure_memory", probe)
    monkeypatch.setattr(benchmark, "_sizes", lambda *_: [1, 2])
    typed = ("--engine", "onnxruntime", "--precision", "fp32", "--precision", "int8", "--rounds", 2, "--threads", 1)
    code, out, _ = call("bench", bundle.path, *typed)
    assert code == 0
    assert asked == [(None, 2), ("fp32", 2), ("int8", 2)]
    found = SpeedReport.parse_json(bundle.path / "reports/bench.json")
    assert found == SpeedReport.model_validate_json(out.splitlines()[-1])
    assert set(found.memory) == {"torch-fp32", "onnxruntime-fp32"}
    assert (found.threads, found.memory["onnxruntime-fp32"].batch) == (1, 2)
    assert "The memory that onnxruntime-int8 takes is not known: killed." in found.notes
    peak = f"{found.memory['onnxruntime-fp32'].peak_bytes / 1e6:.0f}"
    for text in (out, (bundle.path / "reports/bench.md").read_text()):
        row = next(line for line in text.split("best batch")[1].splitlines() if "onnxruntime-fp32" in line)
        assert peak in row.replace("|", " ").split()


def test_reports_of_before_are_read():
    """One that was written before it had memory, parts of a call and states: they are not known."""
    found = SpeedReport.parse_json(RUN_SH.parents[1] / "precision-cpu/bench.json")
    assert (found.schema_version, found.memory, found.states) == (1, {}, {})
    assert {row.compute_ms for row in found.results} == {None}
    assert not any(one.is_slower or one.is_faster for one in changes(found, found))
    assert len(speed_csv(found).splitlines()) == 1 + len(found.results)
    assert speed_markdown(found).count("| torch-fp32 |") == 1
