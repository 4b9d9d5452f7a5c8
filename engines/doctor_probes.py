"""What the doctor looks at beyond the system: GPUs, engines and builders, a probe for each row.

Packages are imported in processes of their own: some end the process where something is missing, two TensorRTs do not
share one, and PyTorch, which takes seconds, is not imported at all. Nothing here makes a session or a runtime.
"""

import functools
import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

from emoexport.engines import BACKENDS, Backend
from emoexport.engines.cuda import Cuda, Device
from emoexport.engines.machine import ask_nvidia_smi, kernel_driver, versions_of
from emoexport.errors import MissingRuntime

__all__ = ["Finding", "Probe", "Status", "probes"]

Status = Literal["ok", "missing", "too little", "broken", "not needed", "not here"]
"""`missing` can be installed, `not here` wants hardware; `not needed` is not installed and would not be used."""

_PROVIDERS = {"onnxruntime-cuda": "CUDA", "onnxruntime-tensorrt": "Tensorrt"}
"""By backend, how the name of its provider in ONNX Runtime begins."""

_LOAD_PROVIDER = """
import ctypes, pathlib
from emoexport.engines import onnxruntime_gpu as it
it.load_libraries()
it.load_tensorrt()
folder = pathlib.Path(it.ort.__file__).parent / "capi"
for name, mode in (("shared", ctypes.RTLD_GLOBAL), ("{library}", ctypes.RTLD_LOCAL)):
    for file in folder.glob(f"*onnxruntime_providers_{{name}}.*"):
        ctypes.CDLL(str(file), mode)
"""
"""Loads the library of a provider as the engine does, but by itself: ONNX Runtime would go on with the CPU."""

_COUNT_DEVICES = """
from cuda.bindings import runtime
status, *_ = runtime.cudaGetDeviceCount()
if int(status):
    raise SystemExit(f"it sees no device: {status.name} ({int(status)})")
"""
"""What sessions use of cuda-bindings can be imported whatever the driver is; the first call tells."""


class Finding(NamedTuple):
    """What a probe says."""

    status: Status
    found: str
    next: str = ""
    """The command that mends it; empty where nothing is to be done."""


Probe = tuple[str, str, Callable[[], Finding]]
"""Part and name of a row, and what finds the rest; it may raise anything."""


def probes(cuda: Cuda) -> Iterator[Probe]:
    """Those of the parts GPU, engines and builders."""
    yield "GPU", "driver", partial(_driver, cuda)
    for device in cuda.devices:
        yield "GPU", f"device {device.index}", partial(_device, device)
    if cuda.devices and shutil.which("nvidia-smi"):
        yield "GPU", "free memory", _free_memory
    yield "GPU", "cuda-bindings", partial(_memory_package, "cuda-bindings", _COUNT_DEVICES, cuda)
    yield "GPU", "pycuda", partial(_memory_package, "pycuda", "import pycuda.driver", cuda)
    yield "engines", "PyTorch", partial(_pytorch, cuda)
    for row in BACKENDS.values():
        yield "engines", row.name, partial(_backend, row, cuda)
    if len(versions_of("onnxruntime", "onnxruntime-gpu")) == 2:
        both = "onnxruntime and onnxruntime-gpu are installed over each other"
        again = "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu"
        yield "engines", "onnxruntime, twice", partial(Finding, "broken", both, again)
    for row in (BACKENDS["tensorrt"], BACKENDS["tensorrt-rtx"]):
        yield "builders", row.title, partial(_builder, row, cuda)
    yield "builders", "Polygraphy", _polygraphy


def _driver(cuda: Cuda) -> Finding:
    if cuda.devices:
        return Finding("ok", ", ".join(filter(None, [kernel_driver(), f"runs CUDA up to {cuda.version}"])))
    if _nvidia_cards():
        hint = "install NVIDIA's driver; containers are started with --gpus all"
        return Finding("missing", f"there is an NVIDIA card, but {cuda.problem}", hint)
    return Finding("not here", cuda.problem)


def _nvidia_cards() -> bool:
    """Whether Linux sees a display controller of NVIDIA on the bus."""
    return any(
        path.read_text(encoding="ascii").startswith("0x10de")
        and (path.parent / "class").read_text(encoding="ascii").startswith("0x03")
        for path in Path("/sys/bus/pci/devices").glob("*/vendor")
    )


def _device(device: Device) -> Finding:
    memory = f"{device.memory_bytes / 1e9:.1f} GB"
    return Finding("ok", f"{device.name}, compute capability {device.compute_capability}, {memory}")


def _free_memory() -> Finding:
    return Finding("ok", "; ".join(" of ".join(row) for row in ask_nvidia_smi("memory.free", "memory.total")))


def _memory_package(name: str, use: str, cuda: Cuda) -> Finding:
    """One of those that hold what goes into TensorRT's engines, and the code that shows whether it works."""
    found = versions_of("cuda-bindings", "pycuda")
    requirement = "'cuda-bindings<13'" if name == "cuda-bindings" and _major(cuda.version) < 13 else name
    # Without the flag, Ubuntu's linker leaves libcuda out of what it builds.
    install = "LDFLAGS=-Wl,--no-as-needed pip install" if name == "pycuda" else "pip install"
    if name not in found:
        needed = bool(cuda.devices) and not found
        return _absent("holds device memory, as cuda-bindings or pycuda can", f"{install} {requirement}", needed)
    if not cuda.devices:
        return Finding("not here", f"{found[name]}; {_lacking(cuda)}")
    try:
        _ask(use)
    except MissingRuntime as err:
        return Finding("broken", f"{found[name]}: {err}", f"{install} --force-reinstall {requirement}")
    return Finding("ok", found[name])


def _pytorch(cuda: Cuda) -> Finding:
    if not BACKENDS["inductor"].is_installed():
        return _absent("train, build and verify need it", "pip install torch")
    version, built = _torch_build()
    if not cuda.devices:
        return Finding("ok", f"{version}, built for CUDA {built}, on the CPU here" if built else version)
    hint = f"https://pytorch.org/get-started has the command for CUDA {cuda.version}"
    if built is None:
        return Finding("missing", f"{version}, built without CUDA", hint)
    found = f"{version}, built for CUDA {built}"
    if _major(built) > _major(cuda.version):
        return Finding("broken", f"{found}; the driver runs {cuda.version} at most", f"update the driver, or {hint}")
    return Finding("ok", found)


def _backend(row: Backend, cuda: Cuda) -> Finding:
    lacking = _lacking(cuda, row.compute_capabilities) if row.device == "cuda" else ""
    if not row.is_installed():
        return _absent(lacking, _install(row, cuda), not lacking)
    version = _torch_build()[0] if row.package == "torch" else _version(row.package, row.requirement)
    found = f"{version}: {', '.join(row.precisions)}"
    if row.name == "onnxruntime":
        found += f"; built in: {', '.join(_providers())}"
    if lacking:
        return Finding("not here", f"{found}; {lacking}")
    problem = _provider_problem(_PROVIDERS[row.name]) if row.name in _PROVIDERS else ""
    return Finding("missing", f"{found}; {problem}", _install(row, cuda)) if problem else Finding("ok", found)


def _lacking(cuda: Cuda, known: Sequence[str] = ()) -> str:
    """Why a runtime that knows these compute capabilities, or all, runs nothing here; empty if it does."""
    if not cuda.devices:
        return "no GPU is found"
    found = cuda.devices[0].compute_capability
    return f"it is not for compute capability {found}" if known and found not in known else ""


def _providers() -> list[str]:
    """Those built into ONNX Runtime, which it lists whether they load or not."""
    names = _ask("import onnxruntime; print(*onnxruntime.get_available_providers())").split()
    return [name.removesuffix("ExecutionProvider") for name in names]


def _provider_problem(name: str) -> str:
    """Why a provider does not load here; empty if it does."""
    if name not in _providers():
        return f"{name} is not built into this ONNX Runtime"
    try:
        _ask(_LOAD_PROVIDER.format(library=name.lower()))
    except MissingRuntime as err:
        return f"{name} is built in, but does not load: {err}"
    return ""


def _builder(row: Backend, cuda: Cuda) -> Finding:
    """Whether a TensorRT builds engines here; that of RTX needs no GPU for it, but one to run them."""
    anywhere = row.package == "tensorrt_rtx"
    purpose = "builds engines for RTX cards, with or without one" if anywhere else "builds engines for the GPU it is on"
    lacking = _lacking(cuda, row.compute_capabilities) if cuda.devices or not anywhere else ""
    if not row.is_installed():
        return _absent(lacking or purpose, _install(row, cuda), not lacking)
    version = _version(row.package, row.requirement)
    if lacking and not anywhere:
        return Finding("not here", f"{version}; {lacking}")
    return Finding("ok", f"{version}: {purpose}")


def _polygraphy() -> Finding:
    purpose, found = "drives TensorRT's builder", versions_of("polygraphy")
    if found:
        return Finding("ok", f"{found['polygraphy']}: {purpose}")
    needed = BACKENDS["tensorrt"].is_installed() or BACKENDS["tensorrt-rtx"].is_installed()
    return _absent(purpose, "pip install polygraphy", needed)


def _absent(why: str, command: str, needed: bool = True) -> Finding:
    found = f"not installed; {why}" if why else "not installed"
    return Finding("missing", found, command) if needed else Finding("not needed", found)


def _install(row: Backend, cuda: Cuda) -> str:
    """TensorRT 11 is for CUDA 13."""
    old = row.name == "tensorrt" and _major(cuda.version) < 13
    return "pip install 'tensorrt-cu12<11'" if old else f"pip install {row.requirement}"


def _major(version: str | None) -> int:
    return int((version or "0").split(".")[0])


def _torch_build() -> tuple[str, str | None]:
    """PyTorch's version and the CUDA it was built for, as its files say."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    text = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    known = dict(re.findall(r"^(__version__|cuda)\b[^=]*= *'([^']+)'", text, flags=re.MULTILINE))
    return known["__version__"], known.get("cuda")


def _version(module: str, requirement: str) -> str:
    """Import a module elsewhere, and say its version without the name of its build; empty if it has none."""
    try:
        return _ask(f"import {module} as it; print(getattr(it, '__version__', ''))").partition("-")[0]
    except MissingRuntime as err:
        raise MissingRuntime(f"cannot be imported: {err}", hint=f"pip install --force-reinstall {requirement}") from err


@functools.cache
def _ask(code: str) -> str:
    """What Python prints last for `code`, in a process of its own, which may end without taking this one with it.

    Raises:
        MissingRuntime: with the last line of its complaint.
    """
    # -P: a folder here that is named like a package is not that package.
    command = [sys.executable, "-P", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)  # noqa: S603 (our own code)
    if done.returncode:
        complaint = done.stderr.strip().splitlines() if done.returncode > 0 else []
        raise MissingRuntime(complaint[-1] if complaint else f"it ends the process ({done.returncode})")
    return done.stdout.strip().rpartition("\n")[2]
