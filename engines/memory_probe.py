"""How much memory an engine takes at most, asked of a process of its own, which has its runtime and nothing besides.

In a process that holds a dozen engines, PyTorch and the members, no figure of memory is of one of them. What is opened
there is named as a text, and settings go over as JSON: nothing that belongs to the asking process is carried along.
"""

import importlib
import json
import pkgutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from emoexport.engines import BACKENDS, open_engine
from emoexport.engines.base import Engine
from emoexport.engines.machine import ask_nvidia_smi
from emoexport.errors import CheckFailed

__all__ = ["Memory", "Request", "measure_memory", "open_graph"]

_SECONDS = 600
"""That opening and calling may take: providers that compile take minutes."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to open there, and how to call it."""

    module: str
    """Imported before anything is opened: what it takes is no engine's."""
    opener: str
    """`module:function` to an `Engine`."""
    settings: Mapping[str, Any]
    """Its arguments, of what JSON has."""
    device: str = "cpu"
    """`cpu` or `cuda`."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Of the process, in bytes."""

    batch: int
    """Faces in the call that was made."""
    baseline_bytes: int
    """Most that was resident once the runtime was imported, before the engine was opened."""
    peak_bytes: int
    """Most that was resident at all: opening is part of it."""
    device_bytes: int | None = None
    """Of the GPU's memory, what came to be used from before the engine was opened to after the call, by anyone; None on
    the CPU, and where the driver's tool cannot be asked."""


def measure_memory(request: Request, batch: int) -> Memory:
    """Open an engine in a process of its own, call it with so many faces, and say what that took.

    Raises:
        CheckFailed: if the process fails or takes too long, with the last line of its complaint.
    """
    # -P: a folder here that is named like a package is not that package.
    command = [sys.executable, "-P", "-m", "emoexport.engines.memory_probe", json.dumps(asdict(request)), str(batch)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)  # noqa: S603 (our own)
    except subprocess.TimeoutExpired as err:
        raise CheckFailed(f"it took more than {_SECONDS} s") from err
    if done.returncode:
        complaint = done.stderr.strip().splitlines() if done.returncode > 0 else []
        raise CheckFailed(complaint[-1] if complaint else f"its process ended with {done.returncode}")
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]  # runtimes print too
    try:
        return Memory(**json.loads(lines[-1]))
    except (IndexError, TypeError, ValueError) as err:
        raise CheckFailed(f"it did not say what it took: {err}") from err


def open_graph(backend: str, file: str, *, face_shape: list[int], cache: str | None, **settings: Any) -> Engine:
    """`open_engine` with arguments of what JSON has."""
    height, width, channels = face_shape
    kept_in = None if cache is None else Path(cache)
    return open_engine(BACKENDS[backend], Path(file), face_shape=(height, width, channels), cache=kept_in, **settings)


def _peak_bytes() -> int:
    """The most that this process has had in memory.

    Linux: VmHWM, which is the program's own. `ru_maxrss` of a process begins with what its parent had, because it
    outlives `exec` (getrusage(2); `setmax_mm_hiwater_rss` in fs/exec.c), and the parent here holds every engine.
    """
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        pass
    if sys.platform == "win32":
        import psutil  # noqa: PLC0415 (elsewhere nothing needs it)

        return int(psutil.Process().memory_info().peak_wset)
    import resource  # noqa: PLC0415 (Windows has none)

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def _device_bytes() -> int | None:
    """What is in use of the memory of all GPUs."""
    try:
        return sum(int(row[0].split()[0]) << 20 for row in ask_nvidia_smi("memory.used"))
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def _answer(request: Request, batch: int) -> Memory:
    importlib.import_module(request.module)
    baseline, used = _peak_bytes(), _device_bytes() if request.device == "cuda" else None
    engine: Engine = pkgutil.resolve_name(request.opener)(**request.settings)
    faces = np.zeros((batch, *engine.face_shape), np.uint8)
    for _ in range(2 if request.device == "cuda" else 1):  # the second call of a size is captured as a CUDA graph
        engine.run(faces)
    now = None if used is None else _device_bytes()
    return Memory(
        batch=batch,
        baseline_bytes=baseline,
        peak_bytes=_peak_bytes(),
        device_bytes=None if used is None or now is None else max(0, now - used),
    )


if __name__ == "__main__":
    print(json.dumps(asdict(_answer(Request(**json.loads(sys.argv[1])), int(sys.argv[2])))))
