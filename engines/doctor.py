"""What this machine can do, and what is missing with the command that adds it.

Other packages are imported in processes of their own: some end the process where something is missing, two TensorRTs do
not share one, and PyTorch, which takes seconds, is not imported at all. Nothing here makes a session or a runtime.
"""

import functools
import importlib.util
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from emoexport.engines import BACKENDS, Backend
from emoexport.engines.cuda import Cuda, Device, find_cuda
from emoexport.engines.machine import (
    describe_processor,
    find_compiler,
    kernel_extensions,
    memory_bytes,
    usable_cores,
    versions_of,
)
from emoexport.errors import MissingRuntime
from emoexport.precision import PRECISIONS

__all__ = ["Diagnosis", "Row", "Status", "examine"]

Status = Literal["ok", "missing", "too little", "broken", "not needed", "not here"]
"""`missing` can be installed, `not here` wants hardware; `not needed` is not installed and would not be used."""

_Finding = tuple[Status, str, str]
"""Status, what was found, and the next command."""

BUILD_GB, CALIBRATION_GB = 7.4, 11.5
"""Memory that five ConvNeXt-Large take. Source: docs/results/fold-full-size.md, as the sizes below."""
GRAPH_GB = {32: 4.02, 16: 2.02, 8: 1.05}
"""Their graphs, by the bits of what they multiply."""
RUN_GB = 4.0
"""The run that they are built from."""

PYTHONS = ((3, 11), (3, 12))

_CPU_KERNELS = {
    "bf16": ("avx512_bf16", "amx_bf16", "bf16"),
    "int8": ("avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm"),
}
"""Extensions that multiply a precision faster than FP32. FP16 has some too, but no runtime here uses them."""
_GPU_KERNELS = {"fp16": (7, 0), "bf16": (8, 0), "int8": (7, 5), "int8-fp16": (7, 5), "fp8": (8, 9)}
"""The first compute capability with tensor cores for a precision. Source: CUDA C++ Programming Guide."""

_RTX_CARDS = ("7.5", "8.6", "8.9", "12.0", "12.1")
"""Compute capabilities that TensorRT-RTX 1.7 knows."""

_PROVIDERS = {"onnxruntime-cuda": "CUDA", "onnxruntime-tensorrt": "Tensorrt"}
"""By backend, how the name of its provider in ONNX Runtime begins."""

_LOAD_PROVIDER = """
import ctypes, pathlib
from emoexport.engines import onnxruntime_gpu as it
it._load_libraries()
it._load_tensorrt()
folder = pathlib.Path(it.ort.__file__).parent / "capi"
for name, mode in (("shared", ctypes.RTLD_GLOBAL), ("{library}", ctypes.RTLD_LOCAL)):
    for file in folder.glob(f"*onnxruntime_providers_{{name}}.*"):
        ctypes.CDLL(str(file), mode)
"""
"""Loads the library of a provider as the engine does, but by itself: ONNX Runtime would go on with the CPU."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One thing that was looked at."""

    part: str
    name: str
    status: Status
    found: str
    next: str = ""
    """The command that mends it; empty where nothing is to be done."""


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """All of them, and what they come to."""

    rows: tuple[Row, ...]
    engines: tuple[str, ...]
    """Backends that run here."""
    summary: tuple[str, ...]
    """Sentences."""

    @property
    def exit_code(self) -> int:
        """0 if at least one engine runs here."""
        return 0 if self.engines else MissingRuntime.exit_code

    def to_dict(self) -> dict[str, Any]:
        """What `--json` prints."""
        return asdict(self)


def examine() -> Diagnosis:
    """Look at the machine. What fails is a row that says why."""
    cuda = _cuda()
    rows = tuple(_row(part, name, probe) for part, name, probe in _probes(cuda))
    usable = [
        BACKENDS[row.name] for row in rows if row.part == "engines" and row.status == "ok" and row.name in BACKENDS
    ]
    return Diagnosis(rows=rows, engines=tuple(row.name for row in usable), summary=tuple(_summary(rows, usable, cuda)))


def _row(part: str, name: str, probe: Callable[[], _Finding]) -> Row:
    try:
        status, found, hint = probe()
    except Exception as err:  # whatever a foreign package raises: the other rows are wanted all the same
        status, found, hint = "broken", f"{err}" or type(err).__name__, getattr(err, "hint", "")
    return Row(part=part, name=name, status=status, found=found, next=hint)


def _probes(cuda: Cuda) -> Iterator[tuple[str, str, Callable[[], _Finding]]]:
    """Part, name and probe of every row."""
    yield "system", "system", _system
    yield "system", "Python", _python
    yield "system", "processor", _processor
    yield "system", "memory", _memory
    yield "system", "disk", _disk
    yield "system", "C++ compiler", _compiler
    yield "GPU", "driver", partial(_driver, cuda)
    for device in cuda.devices:
        yield "GPU", f"device {device.index}", partial(_device, device)
    if cuda.devices and shutil.which("nvidia-smi"):
        yield "GPU", "free memory", _free_memory
    yield "GPU", "cuda-bindings", partial(_memory_package, "cuda-bindings", "cuda.bindings.driver", cuda)
    yield "GPU", "pycuda", partial(_memory_package, "pycuda", "pycuda.driver", cuda)
    yield "engines", "PyTorch", partial(_pytorch, cuda)
    for row in BACKENDS.values():
        yield "engines", row.name, partial(_backend, row, cuda)
    if len(versions_of("onnxruntime", "onnxruntime-gpu")) == 2:
        yield "engines", "onnxruntime, twice", _two_runtimes
    for row in (BACKENDS["tensorrt"], BACKENDS["tensorrt-rtx"]):
        yield "builders", row.title, partial(_builder, row, cuda)
    yield "builders", "Polygraphy", _polygraphy


def _system() -> _Finding:
    try:
        name = platform.freedesktop_os_release()["PRETTY_NAME"] + ", "
    except (OSError, KeyError):  # not Linux, or a bare one
        name = ""
    return "ok", f"{name}{platform.system()} {platform.release()} {platform.machine()}", ""


def _python() -> _Finding:
    known = " or ".join(f"{major}.{minor}" for major, minor in PYTHONS)
    if sys.version_info[:2] in PYTHONS:
        return "ok", platform.python_version(), ""
    return "missing", f"{platform.python_version()}; needed is {known}", "python3.12 -m venv .venv"


def _processor() -> _Finding:
    cores = usable_cores()
    return "ok", f"{describe_processor()}; {cores} core{'s' * (cores != 1)} usable", ""


def _memory() -> _Finding:
    total, free = (size / 1e9 for size in memory_bytes())
    found = f"{total:.1f} GB, {free:.1f} free; five ConvNeXt-Large: {BUILD_GB} to build, {CALIBRATION_GB} to calibrate"
    if free >= CALIBRATION_GB:
        return "ok", found, ""
    return "too little", found, "emoexport build --member 1 --member 2 folds fewer; so does a smaller backbone"


def _disk() -> _Finding:
    free = shutil.disk_usage(Path.cwd()).free / 1e9
    graphs = sum(GRAPH_GB[row.bits] for row in PRECISIONS.values())
    need = f"run {RUN_GB:.1f}, graphs {GRAPH_GB[32]:.1f} at FP32, {graphs:.1f} at all precisions"
    found = f"{free:.1f} GB free here; five ConvNeXt-Large: {need}"
    if free >= RUN_GB + graphs:
        return "ok", found, ""
    return "too little", found, "emoexport build -o DIR writes to another disk"


def _compiler() -> _Finding:
    name, where = find_compiler()
    if where:
        return "ok", where, ""
    return (
        "missing",
        f"there is no {name}, which build --engine inductor needs",
        "apt install g++, or CXX=/path/to/compiler",
    )


def _driver(cuda: Cuda) -> _Finding:
    if cuda.devices:
        return "ok", f"{_kernel_driver()}runs CUDA up to {cuda.version}", ""
    if _nvidia_cards():
        hint = "install NVIDIA's driver; containers are started with --gpus all"
        return "missing", f"there is an NVIDIA card, but {cuda.problem}", hint
    return "not here", cuda.problem, ""


def _kernel_driver() -> str:
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return ""
    found = re.search(r"\s(\d{3,}\.\d[\d.]*)\s", text)
    return f"{found[1]}, " if found else ""


def _nvidia_cards() -> bool:
    """Whether Linux sees a display controller of NVIDIA on the bus."""
    return any(
        path.read_text(encoding="ascii").startswith("0x10de")
        and (path.parent / "class").read_text(encoding="ascii").startswith("0x03")
        for path in Path("/sys/bus/pci/devices").glob("*/vendor")
    )


def _device(device: Device) -> _Finding:
    return (
        "ok",
        f"{device.name}, compute capability {device.compute_capability}, {device.memory_bytes / 1e9:.1f} GB",
        "",
    )


def _free_memory() -> _Finding:
    """The driver's own tool is asked: in CUDA it takes a context, and hundreds of MB on a card that may be full."""
    command = ["nvidia-smi", "--query-gpu=memory.free,memory.total", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)  # noqa: S603 (nothing in it is asked for)
    return "ok", "; ".join(line.replace(", ", " of ") for line in done.stdout.strip().splitlines()), ""


def _memory_package(name: str, module: str, cuda: Cuda) -> _Finding:
    """One of those that hold what goes into TensorRT's engines."""
    found = versions_of("cuda-bindings", "pycuda")
    if name not in found:
        status: Status = "missing" if cuda.devices and not found else "not needed"
        # Without the flag, Ubuntu's linker leaves libcuda out of what it builds.
        flags = "LDFLAGS=-Wl,--no-as-needed " if name == "pycuda" else ""
        hint = f"{flags}pip install {name}" if status == "missing" else ""
        return status, "not installed; holds device memory, as cuda-bindings or pycuda can", hint
    try:
        _version(module, f"pip install --force-reinstall {name}")
    except MissingRuntime:
        if cuda.devices:
            raise
        return "not here", f"{found[name]}; {_lacking(name, cuda)}", ""
    return "ok", found[name], ""


def _pytorch(cuda: Cuda) -> _Finding:
    if not _installed("torch"):
        return "missing", "not installed; train, build and verify need it", "pip install torch"
    version, built = _torch_build()
    hint = f"https://pytorch.org/get-started has the command for CUDA {cuda.version}"
    if built is None:
        return ("missing", f"{version}, built without CUDA", hint) if cuda.devices else ("ok", version, "")
    found = f"{version}, built for CUDA {built}"
    if not cuda.devices:
        return "ok", f"{found}, on the CPU here", ""
    if _major(built) > _major(cuda.version):
        return "broken", f"{found}; the driver runs {cuda.version} at most", f"update the driver, or {hint}"
    return "ok", found, ""


def _backend(row: Backend, cuda: Cuda) -> _Finding:
    lacking = _lacking(row.package, cuda) if row.device == "cuda" else ""
    if not row.is_installed():
        return ("not needed", f"not installed; {lacking}", "") if lacking else _not_installed(_requirement(row, cuda))
    again = f"pip install --force-reinstall {row.requirement}"
    version = _torch_build()[0] if row.package == "torch" else _version(row.package, again)
    found = f"{version}: {', '.join(row.precisions)}"
    if row.name == "onnxruntime":
        found += f"; built in: {', '.join(_providers())}"
    if lacking:
        return "not here", f"{found}; {lacking}", ""
    problem = _provider_problem(_PROVIDERS[row.name]) if row.name in _PROVIDERS else ""
    return ("missing", f"{found}; {problem}", f"pip install {row.requirement}") if problem else ("ok", found, "")


def _lacking(package: str, cuda: Cuda) -> str:
    """Why a runtime for GPUs runs nothing here; empty if it does."""
    if package == "tensorrt_rtx" and cuda.devices and not _rtx_cards(cuda):
        return f"it is not for compute capability {cuda.devices[0].compute_capability}"
    return "" if cuda.devices else "no GPU is found"


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


def _two_runtimes() -> _Finding:
    both = "onnxruntime and onnxruntime-gpu are installed over each other"
    return "broken", both, "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu"


def _builder(row: Backend, cuda: Cuda) -> _Finding:
    """Whether a TensorRT builds engines here; that of RTX needs no GPU for it, but one to run them."""
    anywhere = row.package == "tensorrt_rtx"
    purpose = "builds engines for RTX cards, with or without one" if anywhere else "builds engines for the GPU it is on"
    lacking = _lacking(row.package, cuda) if cuda.devices or not anywhere else ""
    if not row.is_installed():
        if lacking:
            return "not needed", f"not installed; {lacking}", ""
        return _not_installed(_requirement(row, cuda), purpose)
    version = _version(row.package, f"pip install --force-reinstall {row.requirement}")
    if lacking and not anywhere:
        return "not here", f"{version}; {lacking}", ""
    return "ok", f"{version}: {purpose}", ""


def _requirement(row: Backend, cuda: Cuda) -> str:
    """TensorRT 11 is for CUDA 13."""
    return "'tensorrt-cu12<11'" if row.name == "tensorrt" and _major(cuda.version) < 13 else row.requirement


def _polygraphy() -> _Finding:
    found = versions_of("polygraphy")
    if found:
        return "ok", f"{found['polygraphy']}: drives TensorRT's builder", ""
    if _installed("tensorrt") or _installed("tensorrt_rtx"):
        return _not_installed("polygraphy", "drives TensorRT's builder")
    return "not needed", "not installed; drives TensorRT's builder", ""


def _summary(rows: Sequence[Row], usable: Sequence[Backend], cuda: Cuda) -> Iterator[str]:
    names = ", ".join(row.name for row in usable)
    yield f"Engines that run here: {names}." if usable else "No engine runs here; the rows above say what to install."
    if not _installed("torch"):
        yield "Without PyTorch nothing is trained, built or verified here."
    yield _on_cpu([row for row in usable if row.device == "cpu"])
    yield _on_gpu(usable, {row.name for row in rows if row.part == "builders" and row.status == "ok"}, cuda)


def _on_cpu(usable: Sequence[Backend]) -> str:
    """Precisions that some runtime takes and the processor has instructions for."""
    here, taken = kernel_extensions(), {name for row in usable for name in row.precisions}
    found = {name: [one for one in wanted if one in here] for name, wanted in _CPU_KERNELS.items() if name in taken}
    texts = [f"{PRECISIONS[name].title} ({', '.join(flags)})" for name, flags in found.items() if flags]
    if not texts:
        return "On the CPU: FP32; nothing was found that makes fewer bits faster, and emoexport bench tells."
    return f"On the CPU, besides FP32: {_and(texts)}."


def _on_gpu(usable: Sequence[Backend], builders: set[str], cuda: Cuda) -> str:
    if not cuda.devices:
        if {BACKENDS["tensorrt-rtx"].title, "Polygraphy"} <= builders:
            return "No GPU: TensorRT engines can be built for RTX cards, but not run."
        return "No GPU: TensorRT engines can be neither built nor run."
    capability = tuple(int(part) for part in cuda.devices[0].compute_capability.split("."))
    texts = [PRECISIONS[name].title for name, least in _GPU_KERNELS.items() if capability >= least]
    found = f"On the GPU, besides FP32: {_and(texts)}" if texts else "On the GPU: FP32"
    runs = any(row.built_from == "graph" for row in usable)
    return f"{found}; TensorRT engines can be {'built and run' if runs else 'run once TensorRT is installed'}."


def _rtx_cards(cuda: Cuda) -> list[Device]:
    return [device for device in cuda.devices if device.compute_capability in _RTX_CARDS]


def _not_installed(requirement: str, purpose: str = "") -> _Finding:
    return "missing", f"not installed; {purpose}" if purpose else "not installed", f"pip install {requirement}"


def _and(texts: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(texts[:-1]), texts[-1]]))


def _major(version: str | None) -> int:
    return int((version or "0").split(".")[0])


def _cuda() -> Cuda:
    try:
        return find_cuda()
    except Exception as err:  # a driver that is not what it should be
        return Cuda(problem=f"the NVIDIA driver cannot be asked ({err})")


def _installed(package: str) -> bool:
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None  # a folder left behind has none


def _torch_build() -> tuple[str, str | None]:
    """PyTorch's version and the CUDA it was built for, as its files say."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    text = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    known = dict(re.findall(r"^(__version__|cuda)\b[^=]*= *'([^']+)'", text, flags=re.MULTILINE))
    return known["__version__"], known.get("cuda")


def _version(module: str, again: str) -> str:
    """Import a module elsewhere, and say its version without the name of its build; empty if it has none.

    Raises:
        MissingRuntime: if it cannot be imported; the hint is `again`.
    """
    try:
        return _ask(f"import {module} as it; print(getattr(it, '__version__', ''))").partition("-")[0]
    except MissingRuntime as err:
        raise MissingRuntime(f"cannot be imported: {err}", hint=again) from err


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
