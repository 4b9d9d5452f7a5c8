"""ONNX Runtime on a GPU: its CUDA provider, and its TensorRT provider."""

import contextlib
import functools
import importlib
import importlib.util
import sys
import threading
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from emoexport.engines.base import GraphEngine, milliseconds_of
from emoexport.engines.cache import kept_in
from emoexport.engines.cuda import require_device
from emoexport.engines.number_types import Executed
from emoexport.engines.onnxruntime_engine import session_options
from emoexport.engines.onnxruntime_profile import Profile
from emoexport.errors import EmoexportError, MissingRuntime
from emoexport.outcome import Outcome

__all__ = ["OnnxRuntimeCudaEngine", "OnnxRuntimeTensorRtEngine", "load_libraries", "load_tensorrt"]

_TYPES: Mapping[str, type[np.generic]] = {"tensor(float)": np.float32, "tensor(int64)": np.int64}
_FP32 = {"use_tf32": "0"}
"""For FP32 to be FP32: TF32 has 10 of its 23 bits."""
_BATCH = 16
"""What TensorRT is to be fastest at: the batch of `Engine.run_all`."""


@dataclass(kw_only=True)
class _Bound:
    """What calls of one batch size share: memory of the device by name, and the binding that names it."""

    buffers: dict[str, Any]
    binding: Any
    repeated: bool = False
    """Whether a call of this size has been made."""


class _GpuEngine(GraphEngine):
    """A session whose inputs and outputs stay on the device, but for what is asked of it.

    Raises:
        MissingRuntime: if there is no device, or the provider's libraries are not there: ONNX Runtime itself would log
            that and use the CPU.
    """

    runtime = f"ONNX Runtime {ort.__version__}"
    provider: ClassVar[str]
    needed: ClassVar[str]
    """What the provider loads."""
    hint: ClassVar[str]
    """How to install it."""

    _session: Any
    uncaptured: str
    """Why calls are not replayed as CUDA graphs; empty where they are."""

    def _load(self, graph: Path, threads: int | None, cache: Path | None) -> None:
        require_device()
        load_libraries()
        self._lock = threading.Lock()
        self._bound: dict[int, _Bound] = {}
        self._open(graph, threads, cache)

    @abstractmethod
    def _open(self, graph: Path, threads: int | None, cache: Path | None) -> None:
        """Set `_session` and `uncaptured`."""

    def _start(self, graph: Path, options: ort.SessionOptions, settings: dict[str, str]) -> ort.InferenceSession:
        """A session of the provider and no other. `enable_fallback=0`: failures are not tried again on the CPU."""
        try:
            session = ort.InferenceSession(graph, options, providers=[(self.provider, settings)], enable_fallback=0)
        except RuntimeError as err:  # of a provider; what is wrong with a graph is of a class of its own
            raise self._missing("nothing") from err
        found: str = session.get_providers()[0]
        if found != self.provider:
            raise self._missing(found)
        return session

    def _missing(self, found: str) -> MissingRuntime:
        return MissingRuntime(
            f"{self.runtime} opened {found}; {self.provider} was asked for, and needs {self.needed}.", hint=self.hint
        )

    def split(self, faces: NDArray[np.uint8]) -> tuple[float, float, float]:
        """Milliseconds of the three steps of a call: copy there, run, copy back."""
        self._refuse(faces)
        with self._lock:
            bound = self._bound.get(len(faces)) or self._bind(len(faces))
            there, computing, back = milliseconds_of(
                lambda: bound.buffers["faces"].update_inplace(np.ascontiguousarray(faces)),
                lambda: self._session.run_with_iobinding(bound.binding, self._run_options(len(faces), bound)),
                lambda: [bound.buffers[name].numpy() for name in Outcome._fields],
            )
        return there, computing, back

    def _run(self, faces: NDArray[np.uint8]) -> Outcome:
        return Outcome(*self._infer(faces, *Outcome._fields))

    def _scores(self, faces: NDArray[np.uint8]) -> NDArray[np.float32]:
        return self._infer(faces, "scores")[0]

    def _infer(self, faces: NDArray[np.uint8], *outputs: str) -> list[NDArray[Any]]:
        with self._lock:  # the buffers hold what goes in and what comes out
            return self._ask(faces, outputs)

    def _ask(self, faces: NDArray[np.uint8], outputs: tuple[str, ...]) -> list[NDArray[Any]]:
        """Copy faces to the device, run, and copy back only these outputs. Each of the three waits for its end."""
        bound = self._bound.get(len(faces)) or self._bind(len(faces))
        bound.buffers["faces"].update_inplace(faces)
        self._session.run_with_iobinding(bound.binding, self._run_options(len(faces), bound))
        bound.repeated = True
        return [bound.buffers[name].numpy() for name in outputs]

    def _run_options(self, count: int, bound: _Bound) -> ort.RunOptions:  # noqa: ARG002 (for those that capture)
        return ort.RunOptions()

    def _bind(self, count: int) -> _Bound:
        """Buffers for a batch size, kept: their addresses are in what is captured."""
        binding, buffers = self._session.io_binding(), {"faces": _on_device((count, *self.face_shape), np.uint8)}
        binding.bind_ortvalue_input("faces", buffers["faces"])
        for output in self._session.get_outputs():
            buffers[output.name] = _on_device((count, *output.shape[1:]), _TYPES[output.type])
            binding.bind_ortvalue_output(output.name, buffers[output.name])
        return self._bound.setdefault(count, _Bound(buffers=buffers, binding=binding))


class OnnxRuntimeCudaEngine(_GpuEngine):
    """The CUDA provider. A batch size that comes again is captured as a CUDA graph, one for each size.

    `session.disable_cpu_ep_fallback` is not set: it refuses graphs of ours for the sizes of their `Resize` nodes, which
    ONNX Runtime computes on the CPU by design (`GetCpuPreferredNodes`). A session that captures refuses nodes that
    compute on the CPU all the same; then `uncaptured` says so.
    """

    backend = "onnxruntime-cuda"
    provider = "CUDAExecutionProvider"
    needed = "the libraries of CUDA 13 and cuDNN 9"
    hint = "pip install 'onnxruntime-gpu[cuda,cudnn]' nvidia-cublas"

    def _open(self, graph: Path, threads: int | None, cache: Path | None) -> None:  # noqa: ARG002 (it keeps none)
        options = session_options(threads)
        self._profile = Profile(options) if self._profiled else None
        self._source = graph, options
        self.uncaptured = ""
        try:
            self._session = self._start(*self._source, _FP32 | {"enable_cuda_graph": "1"})
        except EmoexportError:
            raise
        except Exception as err:  # if it is not about CUDA graphs, it is raised again
            self._open_plain(err)

    def _open_plain(self, why: Exception) -> None:
        self.uncaptured = str(why).strip().partition("\n")[0]
        self._bound.clear()
        self._session = None  # before the weights are loaded again
        self._session = self._start(*self._source, _FP32)

    def executed(self, faces: NDArray[np.uint8]) -> Executed:
        """What has been computed from the first call on to one with these faces; it tells once, and no times."""
        if self._profile is None:
            return Executed()
        self.run(faces)
        profile, self._profile = self._profile, None
        return profile.read(self._session, with_times=False)

    def _ask(self, faces: NDArray[np.uint8], outputs: tuple[str, ...]) -> list[NDArray[Any]]:
        try:
            return super()._ask(faces, outputs)
        except Exception as err:  # a capture may fail for what other threads do, and leaves its stream unusable
            if self.uncaptured:
                raise
            self._open_plain(err)
            return super()._ask(faces, outputs)

    def _run_options(self, count: int, bound: _Bound) -> ort.RunOptions:
        """The first call of a size warms up and is not captured (-1): graphs are never freed, and many sizes come once.

        Source: ONNX Runtime, CUDA Execution Provider, "Using CUDA Graphs": shapes and addresses belong to an id.
        """
        options = ort.RunOptions()
        if not self.uncaptured:
            options.add_run_config_entry("gpu_graph_id", str(count if bound.repeated else -1))
        return options


class OnnxRuntimeTensorRtEngine(_GpuEngine):
    """The TensorRT provider, which builds one engine of the whole graph when it is opened.

    It builds weakly typed networks: the types of a graph are allowed by flags, and TensorRT may use them elsewhere too.
    It has no option against TF32 in FP32; `NVIDIA_TF32_OVERRIDE=0` in the environment of the process is one.
    """

    backend = "onnxruntime-tensorrt"
    provider = "TensorrtExecutionProvider"
    needed = "the libraries of TensorRT 10, CUDA 13 and cuDNN 9"
    hint = "pip install 'tensorrt-cu13<11' 'onnxruntime-gpu[cuda,cudnn]' nvidia-cublas"

    def _open(self, graph: Path, threads: int | None, cache: Path | None) -> None:
        # The provider keeps one CUDA graph a session, and replays it whatever the batch is.
        self.uncaptured = "the TensorRT provider has one CUDA graph for all batch sizes"
        load_tensorrt()
        options = session_options(threads)
        # ONNX Runtime's own passes move Q/DQ pairs to where TensorRT does not fuse them; TensorRT optimises alone.
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        # A part that TensorRT left would need a profile of its own; so all of the graph is TensorRT's, or none.
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        if cache is None:
            self._session = self._start(graph, options, self._settings())
            return
        with kept_in(cache / self.backend, graph) as folder:
            self._session = self._start(graph, options, self._settings() | _kept(folder))

    def _settings(self) -> dict[str, str]:
        """Types and shapes. A weakly typed network may hold FP16 tensors or Q/DQ nodes only where a flag allows it."""
        sizes = {"min": 1, "opt": min(_BATCH, self.max_batch), "max": self.max_batch}
        profiles = {
            f"trt_profile_{name}_shapes": f"faces:{'x'.join(map(str, (size, *self.face_shape)))}"
            for name, size in sizes.items()
        }
        return profiles | {f"trt_{name}_enable": "1" for name in self.precision.split("-") if name != "fp32"}


def _kept(folder: Path) -> dict[str, str]:
    """What TensorRT built, and what it timed for that."""
    enabled = {f"trt_{name}_cache_enable": "1" for name in ("engine", "timing")}
    return enabled | {f"trt_{name}_cache_path": str(folder) for name in ("engine", "timing")}


def _on_device(shape: tuple[int, ...], dtype: type[np.generic]) -> Any:
    return ort.OrtValue.ortvalue_from_shape_and_type(list(shape), dtype, "cuda", 0)


@functools.cache
def load_libraries() -> None:
    """Load CUDA and cuDNN from NVIDIA's packages, wherever they are installed; the system's own are found without.

    What is missing is printed by ONNX Runtime: to standard error, as standard output is for results.
    """
    toolkit = f"cu{str(ort.cuda_version).partition('.')[0]}"
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(root, toolkit, "lib") for root in (spec and spec.submodule_search_locations) or ()]
    with contextlib.redirect_stdout(sys.stderr):
        for folder in folders:
            if folder.is_dir():  # ONNX Runtime itself looks beside its own package only
                ort.preload_dlls(cudnn=False, directory=str(folder))
        ort.preload_dlls()


def load_tensorrt() -> None:
    """Load TensorRT, as its package of libraries does when it is imported; without it the system's own are found."""
    with contextlib.suppress(ImportError):
        importlib.import_module("tensorrt_libs")
