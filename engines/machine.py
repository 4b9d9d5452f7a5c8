"""What a number was measured on."""

import importlib.metadata
import os
import platform
import re
from pathlib import Path

__all__ = ["describe_machine", "instruction_sets", "versions_of"]


def describe_machine() -> dict[str, str]:
    """Processor, cores, load and versions, as short texts."""
    return {
        "processor": _processor(),
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "load_average": f"{os.getloadavg()[0]:.2f}" if hasattr(os, "getloadavg") else "unknown",
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **versions_of("emoexport", "torch", "onnxruntime-gpu", "onnxruntime", "openvino"),
    }


def versions_of(*packages: str) -> dict[str, str]:
    """Versions of those packages that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def instruction_sets() -> tuple[str, ...]:
    """The architecture, and the extensions of it that a compiler told to use this processor may use."""
    fields = _cpuinfo()
    found = (flag for flag in fields.get("flags", fields.get("Features", "")).split() if _EXTENSIONS.match(flag))
    return platform.machine(), *sorted(found)


_EXTENSIONS = re.compile(
    r"s?sse|pni$|avx|amx|fma|f16c|bmi|abm|popcnt|movbe|adx|v?aes|v?pclmul|gfni|sha|asimd|sve|sme|bf16|i8mm|fp|crc32|atomics"
)
"""Names in `/proc/cpuinfo`, of x86 and of ARM, by how they begin."""


def _processor() -> str:
    """The model, and the instructions that decide which kernels run."""
    fields = _cpuinfo()
    if not fields:
        return platform.processor() or "unknown"
    known = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
    flags = set(fields.get("flags", "").split())
    return " ".join([fields.get("model name", "unknown"), *(flag for flag in known if flag in flags)])


def _cpuinfo() -> dict[str, str]:
    """What Linux says of the processor; nothing elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return {key.strip(): value.strip() for key, value in fields.items()}
