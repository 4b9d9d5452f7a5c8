"""Engines: graphs compiled for one runtime. To add a runtime, write one file and one row of `BACKENDS`.

Nothing here imports a runtime until an engine of it is opened, and nothing but `torch_engine` needs torch.
"""

import importlib.util
import pkgutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from emoexport.engines.base import Engine
from emoexport.engines.cuda import find_cuda, require_device
from emoexport.errors import MissingRuntime, UsageError

__all__ = ["BACKENDS", "DEVICES", "Backend", "backends_named", "open_engine", "require_known", "require_known_device"]


@dataclass(frozen=True, kw_only=True)
class Backend:
    """One row of `BACKENDS`."""

    name: str
    title: str
    target: str
    """`module:Class`, a text so that naming an engine imports no runtime."""
    package: str
    """What must be importable."""
    requirement: str
    """What to install if it is not."""
    precisions: tuple[str, ...]
    device: Literal["cpu", "cuda"] = "cpu"
    """What its engines run on."""
    built_from: Literal["", "fold", "graph"] = ""
    """What `build --engine` makes its engines from, which are files of the bundle; empty if it opens the graphs."""
    prepares_sizes: bool = False
    """Whether a call in another number of faces than the one before costs it time, unless it is opened for them."""
    compute_capabilities: tuple[str, ...] = ()
    """Of the devices that it runs on; empty for all."""

    def is_installed(self) -> bool:
        """Whether the runtime can be imported here."""
        found = importlib.util.find_spec(self.package)
        return found is not None and found.origin is not None  # a folder that holds types only has none

    def is_usable(self) -> bool:
        """Whether its engines run here: the runtime is installed, and there is a device of its kind."""
        if self.device == "cpu" or not self.is_installed():
            return self.is_installed()
        first = find_cuda().devices[:1]
        return bool(first) and first[0].compute_capability in (
            self.compute_capabilities or {first[0].compute_capability}
        )

    def takes(self, precision: str) -> bool:
        """Whether it opens a graph of this precision."""
        return precision in self.precisions and not self.built_from


_ONNXRUNTIME = Backend(
    name="onnxruntime",
    title="ONNX Runtime",
    target="emoexport.engines.onnxruntime_engine:OnnxRuntimeEngine",
    package="onnxruntime",
    requirement="onnxruntime-gpu",
    precisions=("fp32", "fp16", "int8", "int8-fp16"),
)

_OPENVINO = Backend(
    name="openvino",
    title="OpenVINO",
    target="emoexport.engines.openvino_engine:OpenVinoEngine",
    package="openvino",
    requirement="'emoexport[openvino]'",
    precisions=("fp32", "fp16", "bf16", "int8"),
    prepares_sizes=True,
)

_TENSORRT = Backend(
    name="tensorrt",
    title="TensorRT",
    target="emoexport.engines.tensorrt_engine:TensorRtEngine",
    package="tensorrt",
    requirement="'emoexport[tensorrt]'",
    precisions=("fp32", "fp16", "bf16", "int8", "int8-fp16", "fp8"),
    device="cuda",
    built_from="graph",
)

BACKENDS: Mapping[str, Backend] = {
    row.name: row
    for row in (
        _ONNXRUNTIME,
        replace(  # not in BF16: it has no kernels for ReduceMax, Resize and Clip in it, and the CPU none to stand in
            _ONNXRUNTIME,
            name="onnxruntime-cuda",
            title="ONNX Runtime with CUDA",
            target="emoexport.engines.onnxruntime_gpu:OnnxRuntimeCudaEngine",
            requirement="'onnxruntime-gpu[cuda,cudnn]' nvidia-cublas",
            device="cuda",
        ),
        replace(
            _ONNXRUNTIME,
            name="onnxruntime-tensorrt",
            title="ONNX Runtime with TensorRT",
            target="emoexport.engines.onnxruntime_gpu:OnnxRuntimeTensorRtEngine",
            package="tensorrt",
            requirement="'tensorrt-cu13<11'",
            device="cuda",
        ),
        _OPENVINO,
        replace(
            _OPENVINO,
            name="openvino-throughput",
            title="OpenVINO in streams",
            target="emoexport.engines.openvino_engine:OpenVinoThroughputEngine",
        ),
        Backend(
            name="inductor",
            title="AOTInductor",
            target="emoexport.engines.inductor_engine:InductorEngine",
            package="torch",
            requirement="torch",
            precisions=("fp32", "bf16"),
            built_from="fold",
        ),
        _TENSORRT,
        replace(
            _TENSORRT,
            name="tensorrt-rtx",
            title="TensorRT-RTX",
            target="emoexport.engines.tensorrt_engine:TensorRtRtxEngine",
            package="tensorrt_rtx",
            requirement="'emoexport[tensorrt-rtx]'",
            compute_capabilities=("7.5", "8.6", "8.9", "12.0", "12.1"),
        ),
    )
}


DEVICES = ("cpu", "cuda")


def require_known_device(name: str) -> None:
    """Before anything is looked for.

    Raises:
        UsageError: if there is no such device.
    """
    if name not in DEVICES:
        raise UsageError(f"'{name}' is no device; known are {', '.join(DEVICES)}.")


def require_known(names: Sequence[str]) -> None:
    """Before anything is looked for.

    Raises:
        UsageError: if a name is of no row of `BACKENDS`.
    """
    for name in names:
        if name not in BACKENDS:
            raise UsageError(f"'{name}' is no engine; known are {', '.join(BACKENDS)}.")


def backends_named(names: list[str] | None) -> list[Backend]:
    """Look up backends by name; without names those that are usable here.

    Raises:
        UsageError: if a name is unknown.
        MissingRuntime: if a runtime asked for by name is not installed, or needs a device that is not here.
    """
    if not names:
        return [row for row in BACKENDS.values() if row.is_usable()]
    require_known(names)
    for name in names:
        if not BACKENDS[name].is_installed():
            raise MissingRuntime(
                f"{BACKENDS[name].title} is not installed here.",
                hint=f"pip install {BACKENDS[name].requirement}",
            )
        if BACKENDS[name].device == "cuda":
            require_device()
    return [BACKENDS[name] for name in names]


def open_engine(
    backend: Backend,
    graph: Path,
    *,
    precision: str,
    face_shape: tuple[int, int, int],
    max_batch: int,
    threads: int | None = None,
    cache: Path | None = None,
    profiled: bool = False,
    sizes: Sequence[int] = (),
) -> Engine:
    """Compile a graph for this machine, or load what was compiled for it.

    Args:
        backend: a row of `BACKENDS`.
        graph: the ONNX file; of a backend that builds engines, the engine.
        precision: its precision.
        face_shape: `(H, W, C)` of the faces.
        max_batch: the largest number of faces in a call.
        threads: how many the runtime may use; None leaves it to the runtime.
        cache: where it keeps what it compiles, if it can; None for nowhere.
        profiled: whether `Engine.executed` is to be asked, which costs a little at every call.
        sizes: the only numbers of faces in a call, of a backend that prepares for them; none for any number.

    Raises:
        MissingRuntime: if the runtime is not installed.
        BadBundle: if the runtime cannot load the graph.
    """
    try:
        engine = pkgutil.resolve_name(backend.target)
    except ImportError as err:
        raise MissingRuntime(
            f"{backend.title} cannot be imported: {err}.", hint=f"pip install {backend.requirement}"
        ) from err
    started = time.monotonic()
    limits: dict[str, Any] = {"face_shape": face_shape, "max_batch": max_batch}
    if sizes:
        limits["sizes"] = sizes
    opened: Engine = engine(graph, precision=precision, threads=threads, cache=cache, profiled=profiled, **limits)
    opened.load_s = round(time.monotonic() - started, 3)
    return opened
