"""ONNX Runtime's providers for GPUs, on a runtime that computes on the CPU and keeps the rules of a device.

Buffers have fixed addresses and count what is copied; a CUDA graph is bound to what it was captured with, replays that
whatever is asked of it, and can be captured only where it was allowed. What is computed, the CPU provider computes.
"""

import re
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import onnxruntime as ort
import pytest

from emoexport.decision import Decision
from emoexport.engines import BACKENDS, Backend, backends_named, cuda, onnxruntime_gpu, open_engine
from emoexport.engines.base import Engine
from emoexport.engines.cuda import Cuda, Device, find_cuda
from emoexport.errors import BadBundle, BadInput, MissingRuntime
from emoexport.fold import Fold
from emoexport.onnx_graph import export_fold
from emoexport.outcome import Outcome
from emoexport.views import views_named

NAMES = [name for name in BACKENDS if name.startswith("onnxruntime-")]
CUDA, TENSORRT = "onnxruntime-cuda", "onnxruntime-tensorrt"
BATCHES = (1, 2, 7, 16)
NO_FALLBACK = "session.disable_cpu_ep_fallback"


class FakeValue:
    """Memory of a device: one array for life, entered and left by counted copies."""

    copied: ClassVar[Counter] = Counter()
    made = 0

    def __init__(self, shape, dtype):
        self.memory, self.name = np.zeros(shape, dtype), ""

    @classmethod
    def ortvalue_from_shape_and_type(cls, shape, dtype, device, index):
        assert (device, index) == ("cuda", 0)
        FakeValue.made += 1
        return cls(shape, dtype)

    def update_inplace(self, data):
        assert (data.shape, data.dtype) == (self.memory.shape, self.memory.dtype)
        FakeValue.copied["in"] += 1
        self.memory[...] = data

    def numpy(self):
        FakeValue.copied[self.name] += 1
        return self.memory.copy()


class FakeBinding:
    def __init__(self, session):
        self.session, self.inputs, self.outputs = session, {}, {}

    def bind_ortvalue_input(self, name, value):
        self.inputs[name] = value

    def bind_ortvalue_output(self, name, value):
        value.name, self.outputs[name] = name, value


class FakeSession:
    """A provider for a GPU that loads, and computes as the CPU provider does."""

    opened: ClassVar[list["FakeSession"]] = []
    loads = True
    captures = True
    breaks: Exception | None = None
    """What the next capture raises."""

    def __init__(self, path, options, *, providers, enable_fallback=1):
        ((self.provider, self.settings),) = providers
        assert enable_fallback == 0, "what fails would be tried on the CPU"
        self.options, self.graphs, self.ids, self.running = options, {}, [], threading.Lock()
        if not self.loads and self.provider == "TensorrtExecutionProvider":
            raise RuntimeError("Please install TensorRT libraries")
        if self.settings.get("enable_cuda_graph") == "1" and not self.captures:
            raise ort.capi.onnxruntime_pybind11_state.Fail("This session cannot use the graph capture feature\nat 0x1")
        real = ort.SessionOptions()
        real.intra_op_num_threads, real.log_severity_level = 1, 4
        self.real = ort.InferenceSession(path, real, providers=["CPUExecutionProvider"])
        self.get_outputs = self.real.get_outputs
        if folder := self.settings.get("trt_engine_cache_path"):
            (Path(folder) / "graph_sm90.engine").write_bytes(b"built")
        self.opened.append(self)

    def get_providers(self):
        return [self.provider] * self.loads + ["CPUExecutionProvider"]

    def io_binding(self):
        return FakeBinding(self)

    def run_with_iobinding(self, binding, options):
        assert binding.session is self
        assert self.running.acquire(blocking=False), "two calls at once share what is bound"
        try:
            self._run(binding, self._graph_id(options))
        finally:
            self.running.release()

    def _graph_id(self, options):
        try:
            found = int(options.get_run_config_entry("gpu_graph_id"))
        except RuntimeError:
            found = 0
        self.ids.append(found)
        return found

    def _run(self, binding, graph_id):
        if self.settings.get("enable_cuda_graph") == "1" and graph_id != -1:
            if graph_id not in self.graphs and FakeSession.breaks:
                error, FakeSession.breaks = FakeSession.breaks, None
                raise error
            binding = self.graphs.setdefault(graph_id, binding)  # a replay reads and writes what was captured
        feeds = {name: value.memory for name, value in binding.inputs.items()}
        for name, found in zip(binding.outputs, self.real.run(list(binding.outputs), feeds), strict=True):
            assert found.shape == binding.outputs[name].memory.shape
            binding.outputs[name].memory[...] = found


@pytest.fixture(scope="module")
def graph(tmp_path_factory, networks) -> Path:
    path = tmp_path_factory.mktemp("gpu") / "model.fp32.onnx"
    fold = Fold(networks[:2], views_named(["identity", "flip"]), Decision())
    export_fold(fold, path, face_shape=(32, 32, 1), max_batch=64)
    return path


@pytest.fixture(scope="module")
def wanted(graph) -> Engine:
    return opened(graph, "onnxruntime")


@pytest.fixture
def gpu(monkeypatch) -> None:
    """A machine with a device and both providers, as far as the engines can see."""
    device = Device(index=0, name="drawn", compute_capability="9.0", memory_bytes=1 << 36)
    monkeypatch.setattr(cuda, "find_cuda", lambda: Cuda(devices=(device,), version="13.0"))
    monkeypatch.setattr(onnxruntime_gpu, "load_libraries", lambda: None)
    monkeypatch.setattr(onnxruntime_gpu, "load_tensorrt", lambda: None)
    names = {"SessionOptions", "RunOptions", "GraphOptimizationLevel"}
    fake = SimpleNamespace(
        InferenceSession=FakeSession, OrtValue=FakeValue, **{name: getattr(ort, name) for name in names}
    )
    monkeypatch.setattr(onnxruntime_gpu, "ort", fake)
    monkeypatch.setattr(FakeSession, "opened", [])
    monkeypatch.setattr(FakeValue, "copied", Counter())
    monkeypatch.setattr(FakeValue, "made", 0)


def opened(graph: Path, name: str, **settings) -> Engine:
    settings = {"precision": "fp32", "face_shape": (32, 32, 1), "max_batch": 64, "threads": 1} | settings
    return open_engine(BACKENDS[name], graph, **settings)


def assert_same(found: Outcome, expected: Outcome, slack: float = 0.0) -> None:
    assert np.abs(found.probabilities - expected.probabilities).max() <= slack
    assert np.abs(found.confidence - expected.confidence).max() <= slack
    assert (found.label.dtype, found.label.tolist()) == (np.int64, expected.label.tolist())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("count", BATCHES)
def test_outcomes_are_those_of_the_cpu(name, count, graph, wanted, gpu, faces):
    engine = opened(graph, name)
    assert engine.name == f"{name}-fp32"
    for start in (0, 20, 40):  # plain, captured and replayed, where graphs are
        some = faces[0][start : start + count]
        assert_same(engine.run(some), wanted.run(some))
        assert np.array_equal(engine.scores(some), wanted.scores(some))
    with pytest.raises(BadInput, match="needed are uint8 faces"):
        engine.run(faces[0][:0])


@pytest.mark.parametrize("name", NAMES)
def test_an_outcome_is_not_written_over_by_the_next_call(name, graph, wanted, gpu, faces):
    engine = opened(graph, name)
    first = engine.run(faces[0][:4])
    engine.run(faces[0][10:14])
    assert_same(first, wanted.run(faces[0][:4]))


@pytest.mark.parametrize("name", NAMES)
def test_without_a_device_no_session_is_made(name, graph, gpu, monkeypatch):
    monkeypatch.setattr(cuda, "find_cuda", lambda: Cuda(problem="there is no NVIDIA driver here"))
    with pytest.raises(MissingRuntime, match="a CUDA device is needed") as caught:
        opened(graph, name)
    assert caught.value.exit_code == 3
    assert FakeSession.opened == []


@pytest.mark.parametrize("name", NAMES)
def test_a_provider_that_does_not_load_is_an_error(name, graph, gpu, monkeypatch):
    monkeypatch.setattr(FakeSession, "loads", False)
    with pytest.raises(
        MissingRuntime, match=r"^ONNX Runtime \S+ opened \w+; \w+ was asked for, and needs .*\.$"
    ) as caught:
        opened(graph, name)
    assert caught.value.exit_code == 3
    assert caught.value.hint.startswith("pip install ")
    assert len(FakeSession.opened) <= 1, "it is not tried again"


@pytest.mark.skipif(bool(find_cuda().devices), reason="there is a device: the providers may load")
@pytest.mark.parametrize("name", NAMES)
def test_onnx_runtime_itself_without_the_provider_is_an_error(name, graph, gpu, monkeypatch, capfd):
    """The real one, whose answer to a missing provider is a line in its log and the CPU."""
    monkeypatch.setattr(onnxruntime_gpu, "ort", ort)
    with pytest.raises(MissingRuntime, match="was asked for"):
        opened(graph, name)
    assert "EP Error" not in capfd.readouterr().out, "ONNX Runtime has tried again on the CPU"


@pytest.mark.parametrize("name", NAMES)
def test_a_file_that_is_no_graph(name, gpu, tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"\x08\x07not a graph")
    with pytest.raises(BadBundle, match=r"model\.onnx"):
        opened(tmp_path / "model.onnx", name)


@pytest.mark.parametrize("name", NAMES)
def test_only_what_is_asked_for_is_copied(name, graph, gpu, faces):
    engine = opened(graph, name)
    engine.run(faces[0][:4])
    assert FakeValue.copied == {"in": 1, "probabilities": 1, "label": 1, "confidence": 1}
    FakeValue.copied.clear()
    engine.scores(faces[0][:4])
    assert FakeValue.copied == {"in": 1, "scores": 1}


@pytest.mark.parametrize("name", NAMES)
def test_a_call_is_split_into_copies_and_a_run(name, graph, gpu, faces):
    engine = opened(graph, name)
    engine.run(faces[0][:3])
    FakeValue.copied.clear()
    made = FakeValue.made
    parts = engine.split(faces[0][:3])
    assert len(parts) == 3
    assert min(parts) > 0
    assert FakeValue.copied == {"in": 1, **dict.fromkeys(Outcome._fields, 1)}
    assert FakeValue.made == made


@pytest.mark.parametrize("name", NAMES)
def test_buffers_of_a_batch_size_are_made_once(name, graph, gpu, faces):
    engine = opened(graph, name)
    for _ in range(3):
        engine.run(faces[0][:4])
        engine.scores(faces[0][:5])
    assert FakeValue.made == 2 * 5


def test_a_batch_size_that_comes_again_has_a_cuda_graph_of_its_own(graph, wanted, gpu, faces):
    engine = opened(graph, CUDA)
    for start, count in enumerate((4, 7, 4, 4, 7)):
        some = faces[0][start : start + count]
        assert_same(engine.run(some), wanted.run(some))
    engine.scores(faces[0][:1])
    (session,) = FakeSession.opened
    assert engine.uncaptured == ""
    assert session.ids == [-1, -1, 4, 4, 7, -1]
    assert set(session.graphs) == {4, 7}


def test_a_graph_that_cannot_be_captured_runs_plainly_and_says_why(graph, wanted, gpu, faces, monkeypatch):
    monkeypatch.setattr(FakeSession, "captures", False)
    engine = opened(graph, CUDA)
    assert engine.uncaptured == "This session cannot use the graph capture feature"
    for _ in range(2):
        assert_same(engine.run(faces[0][:4]), wanted.run(faces[0][:4]))
    (session,) = FakeSession.opened
    assert session.settings == {"use_tf32": "0"}
    assert session.graphs == {}


def test_a_capture_that_fails_in_a_call_is_given_up(graph, wanted, gpu, faces, monkeypatch):
    engine = opened(graph, CUDA)
    engine.run(faces[0][:4])
    monkeypatch.setattr(FakeSession, "breaks", RuntimeError("CUDA failure 901: operation failed"))
    for _ in range(2):
        assert_same(engine.run(faces[0][:4]), wanted.run(faces[0][:4]))
    assert engine.uncaptured == "CUDA failure 901: operation failed"
    assert ["enable_cuda_graph" in session.settings for session in FakeSession.opened] == [True, False]


def test_what_fails_without_cuda_graphs_too_is_raised(graph, gpu, faces, monkeypatch):
    engine = opened(graph, CUDA)
    monkeypatch.setattr(FakeSession, "_run", lambda *_: (_ for _ in ()).throw(MemoryError("out of memory")))
    for _ in range(2):
        with pytest.raises(MemoryError):
            engine.run(faces[0][:4])


def test_settings_of_the_cuda_provider(graph, gpu, tmp_path):
    opened(graph, CUDA, precision="fp16", cache=tmp_path)
    (session,) = FakeSession.opened
    assert session.settings == {"use_tf32": "0", "enable_cuda_graph": "1"}
    with pytest.raises(RuntimeError, match=re.escape(NO_FALLBACK)):  # shapes are computed on the CPU by design
        session.options.get_session_config_entry(NO_FALLBACK)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("precision", "flags"),
    [("fp32", set()), ("fp16", {"fp16"}), ("int8", {"int8"}), ("int8-fp16", {"int8", "fp16"})],
)
def test_settings_of_the_tensorrt_provider(precision, flags, graph, gpu):
    engine = opened(graph, TENSORRT, precision=precision, max_batch=10)
    (session,) = FakeSession.opened
    assert session.settings == {
        "trt_profile_min_shapes": "faces:1x32x32x1",
        "trt_profile_opt_shapes": "faces:10x32x32x1",
        "trt_profile_max_shapes": "faces:10x32x32x1",
        **{f"trt_{flag}_enable": "1" for flag in flags},
    }
    assert session.options.get_session_config_entry(NO_FALLBACK) == "1"
    assert session.options.graph_optimization_level == ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    assert "one CUDA graph for all batch sizes" in engine.uncaptured


def test_the_precisions_of_the_rows_are_those_with_settings():
    assert {BACKENDS[name].precisions for name in NAMES} == {("fp32", "fp16", "int8", "int8-fp16")}


def test_what_tensorrt_builds_is_kept_in_a_sealed_folder_of_the_graph(graph, gpu, tmp_path):
    opened(graph, TENSORRT, cache=tmp_path)
    (session,) = FakeSession.opened
    folder = Path(session.settings["trt_engine_cache_path"])
    assert folder.parent == tmp_path / TENSORRT
    assert {file.name for file in folder.iterdir()} == {"graph_sm90.engine", "sha256.json"}
    assert (
        session.settings.items()
        >= {
            "trt_engine_cache_enable": "1",
            "trt_timing_cache_enable": "1",
            "trt_timing_cache_path": str(folder),
        }.items()
    )


@pytest.mark.parametrize("name", NAMES)
def test_threads_share_an_engine(name, graph, wanted, gpu, faces):
    engine = opened(graph, name)
    slices = [faces[0][start : start + count] for start in range(0, 40, 5) for count in (2, 3)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(engine.run, slices))
    for outcome, some in zip(found, slices, strict=True):
        assert_same(outcome, wanted.run(some))


def test_libraries_are_looked_for_in_nvidias_packages(monkeypatch, tmp_path, capsys):
    (tmp_path / "cu13/lib").mkdir(parents=True)
    calls = []

    def preload_dlls(**settings):
        print("Failed to load")
        calls.append(settings)

    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path / "elsewhere"), str(tmp_path)])
    monkeypatch.setattr("importlib.util.find_spec", lambda _: spec)
    monkeypatch.setattr(onnxruntime_gpu, "ort", SimpleNamespace(cuda_version="13.0", preload_dlls=preload_dlls))
    onnxruntime_gpu.load_libraries.__wrapped__()
    assert calls == [{"cudnn": False, "directory": str(tmp_path / "cu13/lib")}, {}]
    printed = capsys.readouterr()
    assert (printed.out, printed.err.count("Failed to load")) == ("", 2)


@pytest.mark.skipif(bool(find_cuda().devices), reason="there is a device")
@pytest.mark.parametrize("name", NAMES)
def test_they_are_not_among_what_is_usable_without_a_device(name, monkeypatch):
    monkeypatch.setattr(Backend, "is_installed", lambda _: True)
    assert name not in {row.name for row in backends_named(None)}
    with pytest.raises(MissingRuntime, match="a CUDA device is needed"):
        backends_named([name])


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "slack"), [(CUDA, 1e-5), (TENSORRT, 1e-2)])
def test_a_device_decides_like_the_cpu(name, slack, graph, wanted, faces, tmp_path):
    """TensorRT's slack is that of TF32, which its provider cannot be told to leave out."""
    if not BACKENDS[name].is_usable():
        pytest.skip(f"{BACKENDS[name].title} needs {BACKENDS[name].package} and a CUDA device")
    engine = opened(graph, name, cache=tmp_path)
    for count in BATCHES:
        for start in (0, 20, 40):
            some = faces[0][start : start + count]
            found, expected = engine.run(some), wanted.run(some)
            assert np.abs(found.probabilities - expected.probabilities).max() <= slack
            assert np.abs(engine.scores(some) - wanted.scores(some)).max() <= slack
    assert engine.uncaptured == "" or name == TENSORRT
