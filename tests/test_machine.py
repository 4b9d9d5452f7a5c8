"""The state of a machine, who else computes on it, and what an engine takes of its memory."""

import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest

from emoexport.engines import BACKENDS, machine, memory_probe, others
from emoexport.engines.cuda import Cuda
from emoexport.engines.memory_probe import Memory, Request, measure_memory
from emoexport.errors import CheckFailed

CPU = "sys/devices/system/cpu"


@pytest.fixture
def state(monkeypatch, tmp_path):
    """The state of a machine whose system tells what these files say."""

    def tell(files):
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(f"{text}\n")
        monkeypatch.setattr(machine, "Path", lambda path: tmp_path / path[1:])
        monkeypatch.setattr(machine, "find_cuda", Cuda)
        monkeypatch.setattr("os.getloadavg", lambda: (0.254, 1.0, 1.0))
        return machine.machine_state()

    return tell


def test_clocks_are_those_of_the_cores(state):
    cores = {
        f"{CPU}/cpu{core}/cpufreq/{name}": text
        for core, clock in ((0, 2_000_000), (1, 3_000_000))
        for name, text in (
            ("scaling_governor", "performance"),
            ("scaling_cur_freq", clock),
            ("cpuinfo_max_freq", 3_500_000),
        )
    }
    assert state({**cores, f"{CPU}/intel_pstate/no_turbo": "0", "proc/cpuinfo": "cpu MHz : 1"}) == {
        "governor": "performance",
        "clock": "2500 MHz of 3500",
        "turbo": "on",
        "load_average": "0.25",
    }


def test_a_guest_has_the_clocks_it_is_told(state):
    assert state({"proc/cpuinfo": "cpu MHz\t\t: 2596.150\nflags : fpu\ncpu MHz\t\t: 2596.150"}) == {
        "clock": "2596 MHz",
        "load_average": "0.25",
    }


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [("cpufreq/boost", "1", "on"), ("cpufreq/boost", "0", "off"), ("intel_pstate/no_turbo", "1", "off")],
)
def test_turbo_is_told_in_two_ways(file, text, said, state):
    assert state({f"{CPU}/{file}": text})["turbo"] == said


Core = namedtuple("Core", "user nice system idle iowait steal")
Spent = namedtuple("Spent", "user system children_user children_system")


@pytest.fixture
def clocks(monkeypatch):
    """What the system says has passed: seconds, a list of cores, our process, a child of it that runs."""
    at = SimpleNamespace(now=0.0, cores=[Core(0, 0, 0, 0, 0, 0)] * 3, own=Spent(0, 0, 0, 0), child=Spent(0, 0, 0, 0))
    child = SimpleNamespace(cpu_times=lambda: at.child)
    process = SimpleNamespace(cpu_times=lambda: at.own, children=lambda recursive: [child] * recursive)
    monkeypatch.setattr(others, "psutil", SimpleNamespace(cpu_times=lambda percpu: at.cores, Error=psutil.Error))
    monkeypatch.setattr(others.psutil, "Process", lambda: process, raising=False)
    monkeypatch.setattr(others, "time", SimpleNamespace(monotonic=lambda: at.now))
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 2}, raising=False)
    return at


def test_others_are_all_that_is_neither_ours_nor_idle(clocks):
    watch = others.OtherProcesses()
    clocks.now = 10.0
    # Ours are 4 + 1 s, 2 s of children that have ended and 3 s of one that runs; core 1 is not for us to use.
    clocks.own, clocks.child = Spent(4, 1, 1.5, 0.5), Spent(2.5, 0.5, 0, 0)
    clocks.cores = [Core(6, 0, 1, 3, 0, 0), Core(10, 0, 0, 0, 0, 0), Core(2, 1, 1, 4, 1, 1)]
    assert watch.cores() == 0.2
    clocks.own = Spent(8, 1, 1.5, 0.5)
    assert watch.cores() == 0, "counted in ticks, ours may seem to be more than all"


def test_nothing_is_said_of_a_moment(clocks):
    watch = others.OtherProcesses()
    clocks.now, clocks.cores = 0.4, [Core(0.4, 0, 0, 0, 0, 0)] * 3
    assert watch.cores() is None


def test_children_are_ours():
    """Of this system, with a process that computes while this one waits."""
    watch = others.OtherProcesses()
    started = time.monotonic()
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as child:
        time.sleep(0.8)
        found, elapsed = others._seconds(), time.monotonic() - started
        child.kill()
    assert found[2] - watch._since[2] > 0.3 * elapsed


def request(bundle, backend: str, **changed) -> Request:
    settings = {"backend": backend, "file": str(bundle.path / "model.fp32.onnx"), "precision": "fp32"}
    settings |= {"face_shape": [32, 32, 1], "max_batch": 64, "threads": 1, "cache": None}
    return Request(
        module=BACKENDS[backend].target.partition(":")[0],
        opener="emoexport.engines.memory_probe:open_graph",
        settings=settings | changed,
    )


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_memory_is_that_of_a_process_without_torch(backend, bundle, tmp_path, monkeypatch):
    if not BACKENDS[backend].is_usable():
        pytest.skip(f"{backend} is not installed")
    (tmp_path / "torch.py").write_text("raise ImportError('torch is not to be imported')")
    path = [str(tmp_path), *filter(None, sys.path)]
    monkeypatch.setenv("PYTHONPATH", ":".join(path))
    held = np.ones(50_000_000)  # 400 MB of this process, which are no engine's
    found = measure_memory(request(bundle, backend), 16)
    graph = (bundle.path / "model.fp32.onnx").stat().st_size
    assert found.batch == 16
    assert found.device_bytes is None
    assert 10e6 < found.baseline_bytes < held.nbytes
    assert found.baseline_bytes + graph < found.peak_bytes < held.nbytes + found.baseline_bytes


def test_a_larger_batch_takes_more_memory(bundle):
    one, many = (measure_memory(request(bundle, "onnxruntime"), batch) for batch in (1, 64))
    assert many.peak_bytes > one.peak_bytes + 64 * 16 * 32 * 32 * 4, "the views of 64 faces are among it"


def test_a_process_that_fails_says_why(bundle, tmp_path, monkeypatch):
    with pytest.raises(CheckFailed, match=r"BadBundle: .*no\.onnx"):
        measure_memory(request(bundle, "onnxruntime", file=str(tmp_path / "no.onnx")), 1)
    monkeypatch.setattr(memory_probe, "_SECONDS", 0.001)
    with pytest.raises(CheckFailed, match=r"more than 0\.001 s"):
        measure_memory(request(bundle, "onnxruntime"), 1)


def test_memory_of_a_device_is_what_came_to_be_used(monkeypatch):
    used = iter(([["100 MiB"], ["7 MiB"]], [["350 MiB"], ["7 MiB"]]))
    monkeypatch.setattr(memory_probe, "ask_nvidia_smi", lambda *_: next(used))
    calls = []
    engine = SimpleNamespace(face_shape=(2, 2, 1), run=lambda faces: calls.append(faces.shape))
    monkeypatch.setattr(memory_probe, "open_graph", lambda: engine)
    asked = Request(module="json", opener="emoexport.engines.memory_probe:open_graph", settings={}, device="cuda")
    found = memory_probe._answer(asked, 3)
    assert isinstance(found, Memory)
    assert found.device_bytes == 250 << 20
    assert calls == [(3, 2, 2, 1)] * 2, "the second is captured, which takes memory"
    monkeypatch.setattr(memory_probe, "ask_nvidia_smi", lambda *_: Path("/there is none").read_text())
    assert memory_probe._answer(asked, 3).device_bytes is None
