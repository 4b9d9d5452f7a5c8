"""What the doctor says of machines that are not here: drivers, packages, processors, disks."""

import importlib.metadata
import importlib.util
import json
import re
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import pytest

from emoexport.engines import BACKENDS, doctor, doctor_probes, machine
from emoexport.engines.cuda import Cuda, Device, find_cuda
from emoexport.errors import MissingRuntime

NO_DRIVER = Cuda(problem="there is no NVIDIA driver here (libcuda.so.1 cannot be loaded)")
H100 = Device(index=0, name="NVIDIA H100 80GB HBM3", compute_capability="9.0", memory_bytes=85_000_000_000)
L4 = Device(index=0, name="NVIDIA L4", compute_capability="8.9", memory_bytes=23_000_000_000)
CPU_ONLY = {"torch": "2.14.1", "onnxruntime": "1.31.1", "openvino": "2026.4.1-22982-release"}
PROVIDERS = [f"{name}ExecutionProvider" for name in ("Tensorrt", "CUDA", "CPU")]


def with_device(device, version="13.0"):
    return Cuda(devices=(device,), version=version)


@pytest.fixture
def examined(monkeypatch):
    """Examine a machine that is described: rows by name, and the diagnosis."""

    def examine(
        *,
        cuda=NO_DRIVER,
        packages=CPU_ONLY,
        fails=None,
        flags="",
        memory=(64, 48),
        disk=99,
        card=False,
        built=PROVIDERS,
    ):
        asked = []

        def answer(code):
            asked.append(code)
            for module, why in (fails or {}).items():
                if module in code:
                    raise MissingRuntime(why)
            if "get_available_providers" in code:
                return " ".join(built)
            return next((version for name, version in packages.items() if f"import {name} " in code), "")

        named = {"cuda.bindings": "cuda-bindings"}
        versions = {named.get(name, name): version for name, version in packages.items()}
        system = {
            "find_cuda": lambda: cuda,
            "memory_bytes": lambda: tuple(size * 10**9 for size in memory),
            "shutil": SimpleNamespace(disk_usage=lambda _: SimpleNamespace(free=disk * 10**9)),
        }
        others = {
            "versions_of": lambda *names: {name: versions[name] for name in names if name in versions},
            "shutil": SimpleNamespace(which=lambda name: None),
            "_ask": answer,
            "_nvidia_cards": lambda: card,
            "_torch_build": lambda: (packages["torch"], packages.get("torch's CUDA")),
        }
        for module, values in ((doctor, system), (doctor_probes, others)):
            for name, value in values.items():
                monkeypatch.setattr(module, name, value)
        spec = SimpleNamespace(origin="somewhere")
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec if name in packages else None)
        monkeypatch.setattr(machine, "_cpuinfo", lambda: {"model name": "Some CPU", "flags": flags})
        found = doctor.examine()
        assert not [code for code in asked if "torch" in code or "Runtime(" in code or "Session(" in code]
        rows = {row.name: row for row in found.rows}
        assert len(rows) == len(found.rows)
        return rows, found

    return examine


def test_a_plain_cpu(examined):
    rows, found = examined()
    assert found.exit_code == 0
    assert found.engines == tuple(row.name for row in BACKENDS.values() if row.device == "cpu")
    assert rows["driver"].status == "not here"
    assert "libcuda.so.1" in rows["driver"].found
    assert rows["openvino"].found.startswith("2026.4.1: fp32")
    assert rows["onnxruntime"].found.endswith("built in: Tensorrt, CUDA, CPU")
    assert rows["onnxruntime-cuda"].status == "not here"
    assert rows["onnxruntime-cuda"].found.endswith("no GPU is found")
    for name in ("pycuda", "cuda-bindings", "TensorRT", "Polygraphy"):
        assert (rows[name].status, rows[name].next) == ("not needed", "")
    assert rows["TensorRT-RTX"].next == "pip install 'emoexport[tensorrt-rtx]'"
    assert "emoexport bench tells" in found.summary[1]
    assert found.summary[-1] == "No GPU: TensorRT engines can be neither built nor run."


def test_an_h100_with_everything(examined):
    packages = {
        **CPU_ONLY,
        **{"torch's CUDA": "13.0", "tensorrt": "11.4.0.106", "tensorrt_rtx": "1.7.1.116", "polygraphy": "0.53.6"},
        **{"cuda.bindings": "13.5.0", "pycuda": "2026.1"},
    }
    rows, found = examined(cuda=with_device(H100), packages=packages)
    gpu = [row for row in found.rows if row.part != "system"]
    lacking = {name for name, row in BACKENDS.items() if row.package == "tensorrt_rtx"}  # not for this card
    assert {row.status for row in gpu if row.name not in lacking} == {"ok"}
    assert rows["driver"].found.endswith("runs CUDA up to 13.0")
    assert rows["device 0"].found == "NVIDIA H100 80GB HBM3, compute capability 9.0, 85.0 GB"
    assert rows["tensorrt-rtx"].found.endswith("; it is not for compute capability 9.0")
    assert "FP16, BF16, INT8, INT8 + FP16 and FP8" in found.summary[-1]
    assert found.summary[-1].endswith("TensorRT engines can be built and run.")


def test_a_gpu_without_what_uses_it(examined):
    rows, found = examined(
        cuda=with_device(H100), fails={"onnxruntime_providers": "libcudnn.so.9: cannot open shared object file"}
    )
    assert rows["onnxruntime-cuda"].status == "missing"
    assert "CUDA is built in, but does not load: libcudnn.so.9" in rows["onnxruntime-cuda"].found
    assert rows["onnxruntime-cuda"].next == f"pip install {BACKENDS['onnxruntime-cuda'].requirement}"
    assert rows["TensorRT"].next == rows["tensorrt"].next == "pip install 'emoexport[tensorrt]'"
    assert rows["TensorRT-RTX"].status == rows["tensorrt-rtx"].status == "not needed"
    assert rows["cuda-bindings"].next == "pip install cuda-bindings"
    assert rows["pycuda"].next == "LDFLAGS=-Wl,--no-as-needed pip install pycuda"
    assert (rows["PyTorch"].status, rows["PyTorch"].found) == ("missing", "2.14.1, built without CUDA")
    assert found.summary[-1].endswith("TensorRT engines can be run once TensorRT is installed.")


def test_an_onnxruntime_for_the_cpu_alone(examined):
    rows, _ = examined(cuda=with_device(H100), built=PROVIDERS[2:])
    assert rows["onnxruntime-cuda"].found.endswith("CUDA is not built into this ONNX Runtime")
    assert (rows["onnxruntime-cuda"].status, rows["onnxruntime"].status) == ("missing", "ok")


@pytest.mark.skipif(bool(find_cuda().version), reason="there is a driver")
@pytest.mark.parametrize("name", ["CUDA", "Tensorrt"])
def test_providers_that_are_built_in_do_not_load_without_a_driver(name):
    if name in doctor_probes._providers():
        assert re.search(r"does not load: OSError: lib\w+\.so", doctor_probes._provider_problem(name))


def test_one_package_for_device_memory_is_enough(examined):
    rows, _ = examined(cuda=with_device(H100), packages={**CPU_ONLY, "cuda.bindings": "13.5.0"})
    assert (rows["cuda-bindings"].status, rows["pycuda"].status) == ("ok", "not needed")


def test_an_rtx_card_runs_what_tensorrt_rtx_builds(examined):
    rows, found = examined(cuda=with_device(L4), packages={**CPU_ONLY, "tensorrt_rtx": "1.7.1.116"})
    assert rows["TensorRT-RTX"].found == "1.7.1.116: builds engines for RTX cards, with or without one"
    assert "tensorrt-rtx" in found.engines
    assert rows["Polygraphy"].next == "pip install polygraphy"
    assert found.summary[-1].endswith("can be built and run.")


def test_tensorrt_rtx_builds_without_a_gpu(examined):
    packages = {**CPU_ONLY, "tensorrt_rtx": "1.7.1.116", "tensorrt": "11.4"}
    assert examined(packages=packages)[1].summary[-1].endswith("can be neither built nor run.")
    rows, found = examined(packages={**packages, "polygraphy": "0.53.6"})
    assert (rows["TensorRT-RTX"].status, rows["tensorrt-rtx"].status) == ("ok", "not here")
    assert rows["TensorRT"].status == rows["tensorrt"].status == "not here"
    assert found.summary[-1] == "No GPU: TensorRT engines can be built for RTX cards, but not run."


def test_an_old_driver(examined):
    cuda, packages = with_device(H100, version="12.4"), {**CPU_ONLY, "torch's CUDA": "13.0"}
    rows, _ = examined(cuda=cuda, packages=packages)
    assert rows["PyTorch"].status == "broken"
    assert "built for CUDA 13.0; the driver runs 12.4 at most" in rows["PyTorch"].found
    assert rows["TensorRT"].next == rows["tensorrt"].next == "pip install 'tensorrt-cu12<11'"
    assert rows["cuda-bindings"].next == "pip install 'cuda-bindings<13'"
    why = "it sees no device: cudaErrorInsufficientDriver (35)"
    rows, _ = examined(cuda=cuda, packages={**packages, "cuda.bindings": "13.5.0"}, fails={"cudaGetDeviceCount": why})
    assert (rows["cuda-bindings"].status, rows["cuda-bindings"].found) == ("broken", f"13.5.0: {why}")
    assert rows["cuda-bindings"].next == "pip install --force-reinstall 'cuda-bindings<13'"


@pytest.mark.parametrize(("status", "said"), [(0, None), (35, "it sees no device: insufficient (35)")])
def test_cuda_bindings_is_called(status, said, tmp_path, monkeypatch):
    package = tmp_path / "cuda/bindings"
    package.mkdir(parents=True)
    (package / "runtime.py").write_text(
        f"import enum\nStatus = enum.IntEnum('Status', {{'fine': 0, 'insufficient': 35}})\n"
        f"def cudaGetDeviceCount(): return Status({status}), {None if status else 1}"
    )
    for folder in (package, package.parent):
        (folder / "__init__.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(doctor_probes, "versions_of", lambda *_: {"cuda-bindings": "13.5.0"})
    doctor_probes._ask.cache_clear()
    probes = {name: probe for _, name, probe in doctor_probes.probes(with_device(H100))}
    found = probes["cuda-bindings"]()
    doctor_probes._ask.cache_clear()
    assert found.found == ("13.5.0" if said is None else f"13.5.0: {said}")
    assert found.status == ("ok" if said is None else "broken")


def test_a_card_without_a_driver(examined):
    rows, _ = examined(card=True)
    assert rows["driver"].status == "missing"
    assert "--gpus all" in rows["driver"].next


def test_a_runtime_that_is_not_installed(examined):
    packages = {"torch": "2.14.1", "openvino": "2026.4.1"}
    rows, found = examined(packages=packages)
    assert (rows["onnxruntime"].status, rows["onnxruntime"].next) == ("missing", "pip install onnxruntime-gpu")
    assert found.exit_code == 0


def test_no_runtime_at_all(examined):
    rows, found = examined(packages={})
    assert (found.exit_code, found.engines) == (3, ())
    assert found.summary[0].startswith("No engine runs here")
    assert found.summary[1].startswith("Without PyTorch")
    assert all(rows[name].next for name, row in BACKENDS.items() if row.device == "cpu")


def test_packages_that_do_not_load(examined):
    packages = {**CPU_ONLY, "pycuda": "2026.1"}
    why = "ImportError: libcuda.so.1: cannot open shared object file"
    fails = {"pycuda.driver": why, "openvino": "it ends the process (-11)"}
    rows, found = examined(packages=packages, fails=fails)
    assert (rows["pycuda"].status, rows["pycuda"].found) == ("not here", "2026.1; no GPU is found")
    assert rows["openvino"].status == rows["openvino-throughput"].status == "broken"
    assert "it ends the process (-11)" in rows["openvino"].found
    assert rows["openvino"].next == "pip install --force-reinstall 'emoexport[openvino]'"
    assert "openvino" not in found.engines
    rows, _ = examined(packages=packages, fails=fails, cuda=with_device(H100))
    assert rows["pycuda"].status == "broken"
    assert why in rows["pycuda"].found


def test_two_onnxruntimes(examined):
    rows, _ = examined(packages={**CPU_ONLY, "onnxruntime-gpu": "1.31.1"})
    assert rows["onnxruntime, twice"].status == "broken"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("avx2", "nothing was found"),
        ("avx2 avx_vnni", "INT8 (avx_vnni)."),
        ("avx512f avx512_vnni amx_int8 amx_bf16", "BF16 (amx_bf16) and INT8 (avx512_vnni, amx_int8)."),
        ("asimdhp asimddp i8mm bf16", "BF16 (bf16) and INT8 (asimddp, i8mm)."),
    ],
)
def test_precisions_follow_the_processor(flags, said, examined):
    rows, found = examined(flags=flags)
    assert said in found.summary[1]
    assert f"Some CPU {flags};" in rows["processor"].found


def test_precisions_follow_the_runtimes(examined):
    _, found = examined(packages={"onnxruntime": "1.31.1"}, flags="avx512_vnni avx512_bf16")
    assert found.summary[-2] == "On the CPU, besides FP32: INT8 (avx512_vnni)."


def test_arm_calls_its_flags_features(monkeypatch):
    monkeypatch.setattr(machine, "_cpuinfo", lambda: {"Features": "fp asimd asimddp i8mm bf16"})
    assert machine.kernel_extensions() == ("asimddp", "i8mm", "bf16")


def test_no_compiler(examined, monkeypatch):
    monkeypatch.setenv("CXX", "/nowhere/c++")
    rows, _ = examined()
    assert rows["C++ compiler"].status == "missing"
    assert "there is no /nowhere/c++" in rows["C++ compiler"].found
    assert "CXX=" in rows["C++ compiler"].next


@pytest.mark.parametrize("name", ["memory", "disk"])
def test_too_little(name, examined):
    rows, found = examined(**{name: {"memory": (16, 11), "disk": 15}[name]})
    assert [row.name for row in found.rows if row.status == "too little"] == [name]
    assert rows[name].next.startswith("emoexport build")


def test_a_failing_probe_is_a_row(examined, monkeypatch):
    monkeypatch.setattr(doctor, "usable_cores", lambda: 1 // 0)
    rows, found = examined()
    assert (rows["processor"].status, rows["processor"].found) == ("broken", "integer division or modulo by zero")
    assert found.exit_code == 0


def test_memory_is_that_of_the_container(tmp_path, monkeypatch):
    files = {"/proc/meminfo": "MemTotal: 64000 kB\nMemAvailable: 32000 kB\nHugePages_Total: 0\n"}
    files["/sys/fs/cgroup/memory.max"] = f"{16_000 * 1024}\n"
    for name, text in files.items():
        path = tmp_path / name[1:]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(machine, "Path", lambda *parts: tmp_path.joinpath("/".join(parts)[1:]))
    assert machine.memory_bytes() == (16_000 * 1024, 16_000 * 1024)
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("max\n")
    assert machine.memory_bytes() == (64_000 * 1024, 32_000 * 1024)


GPU_KEYS = ["gpu", "compute_capability", "gpu_memory", "driver_cuda", "kernel_driver", "gpu_state"]


@pytest.fixture
def described(monkeypatch, tmp_path):
    """What numbers were measured on, of a machine that is described, and what was asked of its nvidia-smi."""

    def describe(cuda, *, packages=(), smi="", fails=None):
        commands = []

        def answer(command, **settings):
            commands.append((command, settings["timeout"]))
            if fails:
                raise fails
            return SimpleNamespace(stdout=smi)

        def version(name):
            if name not in packages:
                raise importlib.metadata.PackageNotFoundError
            return packages[name]

        file = tmp_path / "proc/driver/nvidia/version"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (x@y)\n")
        monkeypatch.setattr(machine, "Path", lambda *parts: tmp_path.joinpath("/".join(parts)[1:]))
        monkeypatch.setattr(machine, "find_cuda", lambda: cuda)
        monkeypatch.setattr(machine, "describe_processor", lambda: "Some CPU")
        monkeypatch.setattr(subprocess, "run", answer)
        monkeypatch.setattr(importlib.metadata, "version", version)
        return machine.describe_machine(), commands

    return describe


def test_figures_name_the_gpu(described):
    packages = {"tensorrt-cu13": "11.4.0.106", "cuda-bindings": "13.5.0", "polygraphy": "0.53.6"}
    found, commands = described(with_device(H100), packages=packages, smi="1755 MHz, 1980 MHz, 700.00 W, 41\n")
    assert found.items() >= packages.items()
    assert {name: found[name] for name in GPU_KEYS} == {
        "gpu": "NVIDIA H100 80GB HBM3",
        "compute_capability": "9.0",
        "gpu_memory": "85.0 GB",
        "driver_cuda": "13.0",
        "kernel_driver": "580.65.06",
        "gpu_state": "SM at 1755 MHz of 1980 MHz, limit 700.00 W, 41 °C",
    }
    assert [(command[0], seconds) for command, seconds in commands] == [("nvidia-smi", 10)]


@pytest.mark.parametrize("error", [FileNotFoundError(), subprocess.TimeoutExpired("", 10), OSError()])
def test_a_gpu_whose_clocks_cannot_be_asked_for(error, described):
    assert set(GPU_KEYS) - set(described(with_device(H100), fails=error)[0]) == {"gpu_state"}


def test_figures_of_a_machine_without_a_gpu(described):
    found, commands = described(NO_DRIVER, packages={"torch": "2.14.1"})
    assert set(found) == {"processor", "cores", "load_average", "system", "python", "torch"}
    assert commands == []


def test_the_table_has_the_rows_of_the_document(examined, monkeypatch, call):
    _, found = examined(cuda=with_device(H100), flags="avx512_vnni")
    monkeypatch.setattr("emoexport.cli_doctor.examine", lambda: found)
    code, out, err = call("doctor", "--json")
    assert (code, err) == (0, "")
    document = json.loads(out)
    assert tuple(doctor.Row(**row) for row in document["rows"]) == found.rows
    code, out, _ = call("doctor")
    assert code == 0
    lines = [" ".join(line.split()) for line in out.splitlines() if line.strip()]
    expected = []
    for row in document["rows"]:
        expected += [row["part"]] * (row["part"] not in expected)
        expected.append(f"{row['name']} {row['status']} {row['found']}")
        expected += [f"next: {row['next']}"] * bool(row["next"])
    assert lines == expected + document["summary"]


def test_a_machine_without_runtimes_exits_with_3(examined, monkeypatch, call):
    _, found = examined(packages={})
    monkeypatch.setattr("emoexport.cli_doctor.examine", lambda: found)
    assert call("doctor")[0] == call("doctor", "--json")[0] == 3


def test_help_has_an_example(call):
    code, out, _ = call("doctor", "--help")
    assert code == 0
    assert "Example: emoexport doctor" in out


@pytest.mark.parametrize(
    ("source", "status", "said"),
    [
        ("__version__ = '11.4.0'\nimport os\nRuntime = Builder = Logger = lambda *_: os._exit(9)", "ok", "11.4.0"),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", "broken", "it ends the process (-9)"),
        ("raise OSError('libnvinfer.so.11: cannot open')", "broken", "OSError: libnvinfer.so.11: cannot open"),
    ],
)
def test_tensorrt_is_imported_elsewhere_and_no_runtime_made(source, status, said, tmp_path, monkeypatch):
    (tmp_path / "tensorrt.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    doctor_probes._ask.cache_clear()
    monkeypatch.setattr(doctor, "_probes", lambda cuda: [("builders", "TensorRT", lambda: probe(cuda))])
    monkeypatch.setattr(doctor, "find_cuda", lambda: with_device(H100))
    probe = partial(doctor_probes._builder, BACKENDS["tensorrt"])
    (row,) = doctor.examine().rows
    doctor_probes._ask.cache_clear()
    assert row.status == status
    assert said in row.found
    assert "tensorrt" not in sys.modules or not sys.modules["tensorrt"].__file__.startswith(str(tmp_path))


def test_this_machine_without_loading_anything():
    script = (
        "import sys, emoexport.cli as cli\n"
        "code = cli.app(['doctor', '--json'], standalone_mode=False)\n"
        "heavy = {'torch', 'onnx', 'onnxruntime', 'openvino', 'tensorrt', 'tensorrt_rtx', 'pycuda'}\n"
        "print(code, sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr.strip() == "0 []"
    assert json.loads(done.stdout)["engines"]
