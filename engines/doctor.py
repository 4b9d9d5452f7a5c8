"""What this machine can do, and what is missing with the command that adds it."""

import platform
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from emoexport.engines import BACKENDS, Backend
from emoexport.engines.cuda import Cuda, find_cuda
from emoexport.engines.doctor_probes import Finding, Probe, Status, probes
from emoexport.engines.machine import describe_processor, find_compiler, kernel_extensions, memory_bytes, usable_cores
from emoexport.errors import MissingRuntime
from emoexport.precision import PRECISIONS

__all__ = ["Diagnosis", "Row", "Status", "examine"]

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
    rows = tuple(_row(*probe) for probe in _probes(cuda))
    usable = [
        BACKENDS[row.name] for row in rows if row.part == "engines" and row.status == "ok" and row.name in BACKENDS
    ]
    return Diagnosis(rows=rows, engines=tuple(row.name for row in usable), summary=tuple(_summary(rows, usable, cuda)))


def _row(part: str, name: str, probe: Callable[[], Finding]) -> Row:
    try:
        finding = probe()
    except Exception as err:  # whatever a foreign package raises: the other rows are wanted all the same
        finding = Finding("broken", f"{err}" or type(err).__name__, getattr(err, "hint", ""))
    return Row(part=part, name=name, **finding._asdict())


def _probes(cuda: Cuda) -> Iterator[Probe]:
    yield "system", "system", _system
    yield "system", "Python", _python
    yield "system", "processor", _processor
    yield "system", "memory", _memory
    yield "system", "disk", _disk
    yield "system", "C++ compiler", _compiler
    yield from probes(cuda)


def _system() -> Finding:
    try:
        name = platform.freedesktop_os_release()["PRETTY_NAME"] + ", "
    except (OSError, KeyError):  # not Linux, or a bare one
        name = ""
    return Finding("ok", f"{name}{platform.system()} {platform.release()} {platform.machine()}")


def _python() -> Finding:
    version = platform.python_version()
    if sys.version_info[:2] in PYTHONS:
        return Finding("ok", version)
    known = " or ".join(f"{major}.{minor}" for major, minor in PYTHONS)
    return Finding("missing", f"{version}; needed is {known}", "python3.12 -m venv .venv")


def _processor() -> Finding:
    cores = usable_cores()
    return Finding("ok", f"{describe_processor()}; {cores} core{'s' * (cores != 1)} usable")


def _memory() -> Finding:
    total, free = (size / 1e9 for size in memory_bytes())
    found = f"{total:.1f} GB, {free:.1f} free; five ConvNeXt-Large: {BUILD_GB} to build, {CALIBRATION_GB} to calibrate"
    if free >= CALIBRATION_GB:
        return Finding("ok", found)
    return Finding("too little", found, "emoexport build --member 1 --member 2 folds fewer; so does a smaller backbone")


def _disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free / 1e9
    graphs = sum(GRAPH_GB[row.bits] for row in PRECISIONS.values())
    need = f"run {RUN_GB:.1f}, graphs {GRAPH_GB[32]:.1f} at FP32, {graphs:.1f} at all precisions"
    found = f"{free:.1f} GB free here; five ConvNeXt-Large: {need}"
    if free >= RUN_GB + graphs:
        return Finding("ok", found)
    return Finding("too little", found, "emoexport build -o DIR writes to another disk")


def _compiler() -> Finding:
    name, where = find_compiler()
    if where:
        return Finding("ok", where)
    found = f"there is no {name}, which build --engine inductor needs"
    return Finding("missing", found, "apt install g++, or CXX=/path/to/compiler")


def _summary(rows: Sequence[Row], usable: Sequence[Backend], cuda: Cuda) -> Iterator[str]:
    names = ", ".join(row.name for row in usable)
    yield f"Engines that run here: {names}." if usable else "No engine runs here; the rows above say what to install."
    if not BACKENDS["inductor"].is_installed():
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


def _and(texts: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(texts[:-1]), texts[-1]]))


def _cuda() -> Cuda:
    try:
        return find_cuda()
    except Exception as err:  # a driver that is not what it should be
        return Cuda(problem=f"the NVIDIA driver cannot be asked ({err})")
