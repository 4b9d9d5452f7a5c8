"""TensorRT and TensorRT-RTX: engines that `build --engine` made, run with numpy, the runtime and a CUDA binding."""

import functools
import importlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from emoexport.engines import BACKENDS, Backend
from emoexport.engines.base import GraphEngine
from emoexport.engines.cuda import Device, find_cuda, require_device
from emoexport.engines.device_memory import Captured, DeviceMemory, open_device_memory
from emoexport.engines.number_types import EngineLayer, Executed, layers_of, narrowest, share_of_time
from emoexport.engines.passport import Passport, read_engine, rebuild_command
from emoexport.errors import BadBundle, CheckFailed, MissingRuntime, WrongMachine
from emoexport.files import write_bytes
from emoexport.outcome import Outcome

if TYPE_CHECKING:
    import tensorrt as trt

__all__ = ["TensorRtEngine", "TensorRtRtxEngine", "import_runtime", "require_this_machine"]

_INPUT = "faces"
_Key = tuple[int, int, tuple[str, ...]]
"""Of a kind of call: its profile, how many rows it computes, and which outputs come back."""
_SIZES_KEPT = 16
"""Of calls, as CUDA graphs; each holds memory of the device."""


def import_runtime(backend: Backend) -> ModuleType:
    """Import `tensorrt` or `tensorrt_rtx`.

    Raises:
        MissingRuntime: if it cannot be imported.
    """
    try:
        return importlib.import_module(backend.package)
    except Exception as err:  # its libraries are loaded here, and what fails is theirs to say
        raise MissingRuntime(
            f"{backend.package} cannot be imported: {err}.", hint=f"pip install {backend.requirement}"
        ) from err


def require_this_machine(passport: Passport, version: str, device: Device, cuda: str, *, hint: str) -> None:
    """Before the runtime sees an engine: it may take one that it cannot run, or end the process.

    Args:
        passport: of the engine.
        version: of the runtime here.
        device: the GPU here.
        cuda: the newest that the driver here runs.
        hint: the command that builds the engine again.

    Raises:
        WrongMachine: if the engine is for another GPU, runtime or driver.
    """
    asked = passport.device
    built, any_version = passport.versions[passport.backend], passport.settings.get("version_compatible", False)
    hardware = passport.settings.get("hardware_compatible")
    capability = asked.get("compute_capability", device.compute_capability)
    capabilities = asked.get("compute_capabilities", device.compute_capability).split()
    here, problem = f"{device.name} has compute capability {device.compute_capability}", ""
    if any_version and (_major(version) != _major(built) or _numbers(version) < _numbers(built)):
        problem = f"{passport.backend} here is {version}; needed is {built} or a later {_major(built)}"
    elif not any_version and version != built:
        problem = f"{passport.backend} here is {version}; needed is {built}"
    elif device.compute_capability not in capabilities:
        problem = f"{here}; needed is {' or '.join(capabilities)}"
    elif hardware == "ampere-plus" and _numbers(device.compute_capability) < (8, 0):
        problem = f"{here}; needed is 8.0 or more"
    elif hardware != "ampere-plus" and capability != device.compute_capability:
        problem = f"{here}; needed is {capability}"
    elif hardware is None and asked.get("name", device.name) != device.name:
        problem = f"the GPU here is {device.name}; needed is {asked['name']}"
    elif _numbers(cuda)[0] < _numbers(asked.get("cuda", cuda))[0]:
        problem = f"the driver here runs CUDA {cuda}; needed is {_major(asked['cuda'])} or later"
    if problem:
        raise WrongMachine(f"{passport.file} was built for another machine: {problem}.", hint=hint)


class TensorRtEngine(GraphEngine):
    """An engine of TensorRT, on the first device.

    A call goes through page-locked memory on one stream; from the second call with as many faces on, copies and kernels
    are one CUDA graph, where the binding has graphs. Each graph has a context of its own, which is not touched again;
    all contexts share one block of memory, since one runs at a time: a lock stands before it, so threads take turns.
    """

    backend = "tensorrt"
    runtime = "TensorRT"
    version: str

    def _load(self, graph: Path, threads: int | None, cache: Path | None) -> None:  # noqa: ARG002 (not its own)
        hint = rebuild_command(graph, self.backend, self.precision)
        passport = Passport.read(graph, hint=hint)
        device = require_device()
        self._trt = import_runtime(BACKENDS[self.backend])
        self.version = self._trt.__version__
        require_this_machine(passport, self.version, device, find_cuda().version or "0", hint=hint)
        plan = read_engine(graph, passport, hint=hint)
        self._memory: DeviceMemory = open_device_memory()
        self._lock = threading.Lock()
        self._contexts: dict[int, trt.IExecutionContext] = {}
        self._called: set[_Key] = set()
        self._captured: dict[_Key, tuple[trt.IExecutionContext, Captured]] = {}
        self.uncaptured = "" if self._memory.has_graphs else f"{self._memory.name} has no CUDA graphs"
        """Why calls are not CUDA graphs; empty where they are."""
        try:
            with self._memory.current():
                self._open(graph, plan, passport, hint, cache)
        except BaseException:
            self._memory.close()
            raise

    def _open(
        self,
        file: Path,
        plan: bytes,
        passport: Passport,
        hint: str,
        cache: Path | None,  # noqa: ARG002 (for RTX)
    ) -> None:
        """Load the engine, and reserve memory for its largest call."""
        self._engine: Any = self._deserialize(file, plan, passport, hint)
        self._profiles = [
            tuple(shape[0] for shape in self._engine.get_tensor_profile_shape(_INPUT, index))
            for index in range(self._engine.num_optimization_profiles)
        ]
        self.max_batch = min(self.max_batch, max(most for _, _, most in self._profiles))
        self._reserve(max(self.max_batch, *(least for least, _, _ in self._profiles)))

    def layers(self, faces: NDArray[np.uint8]) -> tuple[list[EngineLayer], dict[str, float]]:
        """The layers as the engine's inspector tells of them, and the milliseconds of each in one call.

        Args:
            faces: uint8 `(N, H, W, C)`, 1 <= N <= `max_batch`.
        """
        self._refuse(faces)
        with self._turn(faces) as (index, count):
            context = self._new_context(index)  # a profiler is a context's for good
            self._set_rows(context, count)
            profiler = _profiler(self._trt)
            self._copy_in(count)
            self._enqueue(context)  # a first call loads kernels
            self._memory.synchronize()
            context.profiler = profiler
            self._enqueue(context)
            self._memory.synchronize()
            inspector = self._engine.create_engine_inspector()
            inspector.execution_context = context  # or nothing is told where shapes are not known before a call
            text = inspector.get_engine_information(self._trt.LayerInformationFormat.JSON)
        return layers_of(text), profiler.milliseconds

    def executed(self, faces: NDArray[np.uint8]) -> Executed:
        """The narrowest type that each layer of the engine reads or puts out, and the members' time by it."""
        layers, milliseconds = self.layers(faces)
        counts = Counter(narrowest(layer.numbers) for layer in layers if layer.numbers)
        return Executed(layers=dict(counts), time_share=share_of_time(layers, milliseconds))

    def split(self, faces: NDArray[np.uint8]) -> tuple[float, float, float]:
        """Milliseconds that a call takes to the device, in the engine, and back, as the device has them."""
        self._refuse(faces)
        with self._turn(faces) as (index, count):
            context = self._context(index, count)
            there, computing, back = self._memory.time(
                lambda: self._copy_in(count),
                lambda: self._enqueue(context),
                lambda: self._copy_out(Outcome._fields, count),
            )
        return there, computing, back

    def close(self) -> None:
        """Give the device's memory back; the session answers nothing afterwards."""
        with self._lock, self._memory.current():
            self._captured.clear()
            self._contexts.clear()
            self._engine = self._kept = None
            self._host.clear()
        self._memory.close()

    def _run(self, faces: NDArray[np.uint8]) -> Outcome:
        probabilities, label, confidence = self._infer(faces, Outcome._fields)
        return Outcome(probabilities, label.astype(np.int64, copy=False), confidence)  # TensorRT 8 has no INT64

    def _scores(self, faces: NDArray[np.uint8]) -> NDArray[np.float32]:
        return self._infer(faces, ("scores",))[0]

    def _infer(self, faces: NDArray[np.uint8], outputs: tuple[str, ...]) -> list[NDArray[Any]]:
        with self._turn(faces) as (index, count):
            self._launcher((index, count, outputs))()
            self._memory.synchronize()
            return [self._host[name][: len(faces)].copy() for name in outputs]

    @contextmanager
    def _turn(self, faces: NDArray[np.uint8]) -> Iterator[tuple[int, int]]:
        """A block with the device for one call, its faces in host memory: its profile, and the rows it computes."""
        with self._lock, self._memory.current():
            if not self._host:
                raise CheckFailed(f"the session is closed: {self.name} answers nothing any more.", hint="open it again")
            np.copyto(self._host[_INPUT][: len(faces)], faces)
            yield self._place(len(faces))

    def _launcher(self, key: _Key) -> Callable[[], None]:
        """What begins a call: by itself the first time, as a graph from then on."""
        index, count, outputs = key
        if key in self._captured:
            self._captured[key] = self._captured.pop(key)  # the last to be dropped
            return self._captured[key][1].launch
        if self.uncaptured or key not in self._called:
            self._called.add(key)
            return functools.partial(self._begin, self._context(index, count), count, outputs)
        return self._capture(key)

    def _capture(self, key: _Key) -> Callable[[], None]:
        """Record a call in a context of its own."""
        index, count, outputs = key
        context = self._new_context(index)
        self._set_rows(context, count)
        begin = functools.partial(self._begin, context, count, outputs)
        begin()  # the first enqueue after a shape was set prepares what cannot be recorded
        self._memory.synchronize()
        try:
            self._captured[key] = context, self._memory.capture(begin)
        except CheckFailed as err:
            self.uncaptured = str(err)
            return begin
        if len(self._captured) > _SIZES_KEPT:
            _, oldest = self._captured.pop(next(iter(self._captured)))
            oldest.destroy()
        return self._captured[key][1].launch

    def _begin(self, context: "trt.IExecutionContext", count: int, outputs: tuple[str, ...]) -> None:
        self._copy_in(count)
        self._enqueue(context)
        self._copy_out(outputs, count)

    def _place(self, faces: int) -> tuple[int, int]:
        """The profile for a call, and how many rows it computes: at least as many as the profile's least."""

        def fit(index: int) -> tuple[bool, int]:
            best = self._profiles[index][1]
            return best < faces, abs(best - faces)

        index = min((index for index, (_, _, most) in enumerate(self._profiles) if faces <= most), key=fit)
        return index, max(faces, self._profiles[index][0])

    def _context(self, index: int, count: int) -> "trt.IExecutionContext":
        """The context of a profile for calls that are not captured, set to a number of rows."""
        if index not in self._contexts:
            self._contexts[index] = self._new_context(index)
        context = self._contexts[index]
        if context.get_tensor_shape(_INPUT)[0] != count:
            self._set_rows(context, count)
        return context

    def _new_context(self, index: int) -> "trt.IExecutionContext":
        context: trt.IExecutionContext = self._create_context()
        self._require(context is not None, "make a context")
        self._require(context.set_optimization_profile_async(index, self._memory.stream), f"take profile {index}")
        for name, address in self._device.items():
            self._require(context.set_tensor_address(name, address), f"take an address for {name}")
        self._memory.synchronize()
        return context

    def _create_context(self) -> Any:
        """A context in the memory that all share."""
        if hasattr(self._trt, "ExecutionContextAllocationStrategy"):
            strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
            context = self._engine.create_execution_context(strategy)
        else:  # version 8
            context = self._engine.create_execution_context_without_device_memory()
        if context is not None:
            context.device_memory = self._scratch
        return context

    @functools.cached_property
    def _scratch(self) -> int:
        """The address of memory for what is between the layers, of any profile."""
        has_v2 = hasattr(self._engine, "device_memory_size_v2")  # its name from 10.1 on
        size = self._engine.device_memory_size_v2 if has_v2 else self._engine.device_memory_size
        return self._memory.allocate(max(1, size))

    def _set_rows(self, context: "trt.IExecutionContext", count: int) -> None:
        self._require(context.set_input_shape(_INPUT, (count, *self.face_shape)), f"take {count} faces")

    def _enqueue(self, context: "trt.IExecutionContext") -> None:
        self._require(context.execute_async_v3(self._memory.stream), "run the engine")

    def _require(self, is_done: bool, what: str) -> None:
        if not is_done:
            raise CheckFailed(f"{self.runtime} cannot {what}: {_errors(self._trt)}.", hint="emoexport doctor")

    def _copy_in(self, count: int) -> None:
        self._memory.copy_in(self._device[_INPUT], self._host[_INPUT][:count])

    def _copy_out(self, outputs: tuple[str, ...], count: int) -> None:
        for name in outputs:
            self._memory.copy_out(self._host[name][:count], self._device[name])

    def _deserialize(self, file: Path, plan: bytes, passport: Passport, hint: str) -> "trt.ICudaEngine":
        runtime = self._trt.Runtime(_logger(self._trt))
        if passport.settings.get("version_compatible"):
            runtime.engine_host_code_allowed = True  # it brings its own runtime; the passport says that it is ours
        self._require_valid(runtime, plan, file, hint)
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise BadBundle(f"{self.runtime} cannot load {file.name}: {_errors(self._trt)}.", hint=hint)
        if passport.settings.get("strip"):
            self._put_weights_in(engine, file.parent.parent / passport.graph, passport, hint)
        self._kept = runtime  # an engine does not outlive its runtime
        return engine  # type: ignore[no-any-return]

    def _require_valid(self, runtime: "trt.Runtime", plan: bytes, file: Path, hint: str) -> None:
        """What the runtime itself has to say of an engine before it loads it."""

    def _put_weights_in(self, engine: "trt.ICudaEngine", graph: Path, passport: Passport, hint: str) -> None:
        if not graph.is_file() or not passport.is_of(graph):
            raise BadBundle(f"{passport.file} has no weights, and {graph} is not the graph that has them.", hint=hint)
        refitter = self._trt.Refitter(engine, _logger(self._trt))
        parser = self._trt.OnnxParserRefitter(refitter, _logger(self._trt))
        if not parser.refit_from_file(str(graph)) or not refitter.refit_cuda_engine():
            raise BadBundle(
                f"{self.runtime} cannot put the weights of {graph.name} in: {_errors(self._trt)}.", hint=hint
            )

    def _reserve(self, rows: int) -> None:
        """Memory for the largest call, on both sides."""
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        if missing := {_INPUT, "scores", *Outcome._fields} - set(names):
            raise BadBundle(f"the engine has no tensor {', '.join(sorted(missing))}; it has {', '.join(names)}.")
        self._host: dict[str, NDArray[Any]] = {}
        self._device: dict[str, int] = {}
        for name in names:
            dtype = np.dtype(self._trt.nptype(self._engine.get_tensor_dtype(name)))
            a_face: Any = self._engine.get_tensor_shape(name)
            self._host[name] = self._memory.pinned((rows, *tuple(a_face)[1:]), dtype)
            self._device[name] = self._memory.allocate(self._host[name].nbytes)


class TensorRtRtxEngine(TensorRtEngine):
    """An engine of TensorRT-RTX, which compiles kernels when shapes are first seen, and captures CUDA graphs by itself.

    What it compiled is kept in the cache, if there is one, when the session is closed.
    """

    backend = "tensorrt-rtx"
    runtime = "TensorRT-RTX"

    def _open(self, file: Path, plan: bytes, passport: Passport, hint: str, cache: Path | None) -> None:
        super()._open(file, plan, passport, hint, cache)
        self.uncaptured = "TensorRT-RTX captures by itself"
        self._compiled = None if cache is None else cache / self.backend / f"{passport.sha256}.kernels"
        self._settings = self._engine.create_runtime_config()
        self._settings.cuda_graph_strategy = self._trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        strategies = self._trt.DynamicShapesKernelSpecializationStrategy
        self._settings.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER  # or the first calls are slow
        self._kernels = self._settings.create_runtime_cache()
        if self._compiled is not None and self._compiled.is_file():
            self._kernels.deserialize(self._compiled.read_bytes())  # one that does not fit is left alone, and replaced
        self._settings.set_runtime_cache(self._kernels)

    def close(self) -> None:
        """Keep what was compiled, and give the device's memory back."""
        if self._compiled is not None and self._host:
            write_bytes(self._compiled, self._kernels.serialize())
        self._settings = self._kernels = None
        super().close()

    def _create_context(self) -> Any:
        return self._engine.create_execution_context(self._settings)

    def _require_valid(self, runtime: Any, plan: bytes, file: Path, hint: str) -> None:
        validity, diagnostics = runtime.get_engine_validity(plan)
        if validity == self._trt.EngineValidity.INVALID:
            reasons = self._trt.EngineInvalidityDiagnostics.__members__.items()
            said = ", ".join(name.lower().replace("_", " ") for name, bit in reasons if int(bit) & diagnostics)
            raise WrongMachine(
                f"{self.runtime} cannot run {file.name} on this machine: {said or 'it does not say why'}.", hint=hint
            )


@functools.cache
def _logger(trt: ModuleType) -> Any:
    """The one logger of the process: TensorRT keeps the first that it is given."""

    class Logger(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self.errors.append(" ".join(msg.split()))

    return Logger()


def _errors(trt: ModuleType) -> str:
    """What was logged since the last time, or that nothing was."""
    logger = _logger(trt)
    said = "; ".join(logger.errors) or "it does not say why"
    logger.errors.clear()
    return said


def _profiler(trt: ModuleType) -> Any:
    class Profiler(trt.IProfiler):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.milliseconds: dict[str, float] = {}

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self.milliseconds[layer_name] = self.milliseconds.get(layer_name, 0.0) + ms

    return Profiler()


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def _major(version: str) -> str:
    return version.split(".", maxsplit=1)[0]
