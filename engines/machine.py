"""What a number was measured on."""

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

from emoexport.engines.cuda import find_cuda

__all__ = [
    "ask_nvidia_smi",
    "describe_machine",
    "describe_processor",
    "find_compiler",
    "instruction_sets",
    "kernel_driver",
    "kernel_extensions",
    "machine_state",
    "memory_bytes",
    "usable_cores",
    "versions_of",
]

_KERNELS = (
    *("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "avx512_fp16", "amx_int8", "amx_bf16", "amx_fp16"),
    *("asimdhp", "asimddp", "i8mm", "bf16"),
)
"""Names in `/proc/cpuinfo`, of x86 and of ARM, of the extensions that decide which kernels run."""

_PACKAGES = (
    *("emoexport", "torch", "onnxruntime-gpu", "onnxruntime", "openvino"),
    *("tensorrt", "tensorrt-cu12", "tensorrt-cu13", "tensorrt-rtx-cu13", "cuda-bindings", "pycuda", "polygraphy"),
)
"""Those whose versions decide how fast anything is, and what it answers."""


def describe_machine() -> dict[str, str]:
    """Processor, cores, load, versions, and the GPU where there is one, as short texts."""
    return {
        "processor": describe_processor(),
        "cores": str(usable_cores()),
        "load_average": f"{os.getloadavg()[0]:.2f}" if hasattr(os, "getloadavg") else "unknown",
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **versions_of(*_PACKAGES),
        **_describe_gpu(),
    }


def machine_state() -> dict[str, str]:
    """What changes from one moment to the next: clocks, who sets them, load; what the system does not tell is left out.

    Source: Linux, `cpufreq` (scaling_governor, scaling_cur_freq and cpuinfo_max_freq in kHz, boost) and `intel_pstate`
    (no_turbo) under /sys/devices/system/cpu; where a guest has neither, the clocks of /proc/cpuinfo.
    """
    found = {
        "governor": ", ".join(sorted(set(_cpufreq("scaling_governor")))),
        "clock": _clock(),
        "turbo": _turbo(),
        "load_average": f"{os.getloadavg()[0]:.2f}" if hasattr(os, "getloadavg") else "",
        "gpu_state": _gpu_state() if find_cuda().devices else "",
    }
    return {name: text for name, text in found.items() if text}


def _clock() -> str:
    """The mean clock of the cores now, and the highest of any."""
    now = [float(text) / 1000 for text in _cpufreq("scaling_cur_freq")]
    if not now:
        lines = _read(Path("/proc/cpuinfo")).splitlines()
        now = [float(line.partition(":")[2]) for line in lines if line.startswith("cpu MHz")]
    if not now:
        return ""
    most = max((int(text) // 1000 for text in _cpufreq("cpuinfo_max_freq")), default=None)
    return f"{sum(now) / len(now):.0f} MHz" + (f" of {most}" if most else "")


def _turbo() -> str:
    """Whether clocks may be above the nominal one; empty where it is not told."""
    texts = (_read(Path(f"/sys/devices/system/cpu/{name}")) for name in ("cpufreq/boost", "intel_pstate/no_turbo"))
    boost, off = (text.strip() for text in texts)
    return {"1": "on", "0": "off"}.get(boost) or {"1": "off", "0": "on"}.get(off, "")


def _cpufreq(name: str) -> list[str]:
    """A field of each core; none where the system does not tell."""
    files = sorted(Path("/sys/devices/system/cpu").glob(f"cpu[0-9]*/cpufreq/{name}"))
    return [text for file in files if (text := _read(file).strip())]


def _read(path: Path) -> str:
    """What a file says; nothing if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


def _describe_gpu() -> dict[str, str]:
    """The first device, which is the one that runtimes use, and its driver; nothing where there is none."""
    cuda = find_cuda()
    if not cuda.devices:
        return {}
    device = cuda.devices[0]
    found = {
        "gpu": device.name,
        "compute_capability": device.compute_capability,
        "gpu_memory": f"{device.memory_bytes / 1e9:.1f} GB",
        "driver_cuda": cuda.version or "",
        "kernel_driver": kernel_driver(),
        "gpu_state": _gpu_state(),
    }
    return {name: text for name, text in found.items() if text}


def _gpu_state() -> str:
    """Clocks and limits, which decide how fast a GPU is beside its name; empty if they cannot be asked for."""
    try:
        rows = ask_nvidia_smi("clocks.sm", "clocks.max.sm", "power.limit", "temperature.gpu")
    except (OSError, subprocess.SubprocessError):
        return ""
    # The tool's order of devices is not that of CUDA, so all of them are told.
    return "; ".join(f"SM at {clock} of {most}, limit {power}, {heat} °C" for clock, most, power, heat in rows)


def ask_nvidia_smi(*fields: str) -> list[list[str]]:
    """Ask the driver's own tool about each GPU: CUDA would take a context for it, hundreds of MB of the card.

    Raises:
        OSError: if there is no such tool.
        subprocess.SubprocessError: if it fails, or takes longer than 10 seconds.
    """
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)  # noqa: S603 (nothing in it is asked for)
    return [line.split(", ") for line in done.stdout.strip().splitlines()]


def kernel_driver() -> str:
    """The version of NVIDIA's module in the kernel; empty where Linux has none."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return ""
    found = re.search(r"\s(\d{3,}\.\d[\d.]*)\s", text)
    return found[1] if found else ""


def versions_of(*packages: str) -> dict[str, str]:
    """Versions of those packages that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def describe_processor() -> str:
    """The model, and the extensions that decide which kernels run."""
    model = _cpuinfo().get("model name") or platform.processor() or "unknown"
    return " ".join([model, *kernel_extensions()])


def usable_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_bytes() -> tuple[int, int]:
    """All of the memory, and what is free of it; a container has no more than its limit.

    Raises:
        OSError: if the system does not tell.
    """
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    fields = {name: int(value.split()[0]) * 1024 for name, value in (line.split(":") for line in lines)}
    limit = fields["MemTotal"]
    for file in ("memory.max", "memory/memory.limit_in_bytes"):
        path = Path("/sys/fs/cgroup", file)
        if path.is_file() and (text := path.read_text(encoding="utf-8").strip()).isdecimal():
            limit = min(limit, int(text))
    # What a container has in use is not taken off: most of it are cached files, which give way.
    return limit, min(limit, fields["MemAvailable"])


def find_compiler() -> tuple[str, str | None]:
    """The C++ compiler that PyTorch calls, and where it is; None if it is not there."""
    name = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    return name, shutil.which(name)


def kernel_extensions() -> tuple[str, ...]:
    """Those extensions of the processor that decide which kernels run; none where the system does not tell."""
    flags = _flags()
    return tuple(name for name in _KERNELS if name in flags)


def instruction_sets() -> tuple[str, ...]:
    """The architecture, and the extensions of it that a compiler told to use this processor may use."""
    return platform.machine(), *sorted(flag for flag in _flags() if _EXTENSIONS.match(flag))


_EXTENSIONS = re.compile(
    r"s?sse|pni$|avx|amx|fma|f16c|bmi|abm|popcnt|movbe|adx|v?aes|v?pclmul|gfni|sha|asimd|sve|sme|bf16|i8mm|fp|crc32|atomics"
)
"""Names in `/proc/cpuinfo`, of x86 and of ARM, by how they begin."""


def _flags() -> set[str]:
    fields = _cpuinfo()
    return set(fields.get("flags", fields.get("Features", "")).split())


def _cpuinfo() -> dict[str, str]:
    """What Linux says of the processor; nothing elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return {key.strip(): value.strip() for key, value in fields.items()}
