"""TensorRT and TensorRT-RTX: engines that `build --engine` made, run with numpy, the runtime and a CUDA binding."""

import functools
import importlib
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from emoexport.engines.base import GraphEngine
from emoexport.engines.cuda import Device, find_cuda, require_device
from emoexport.engines.device_memory import open_device_memory
from emoexport.engines.number_types import EngineLayer, layers_of
from emoexport.engines.passport import Passport, rebuild_command
from emoexport.errors import BadBundle, CheckFailed, MissingRuntime, WrongMachine
from emoexport.outcome import Outcome

if TYPE_CHECKING:
    import tensorrt as trt

__all__ = ["TensorRtEngine", "TensorRtRtxEngine", "import_runtime", "require_this_machine"]

_INPUT = "faces"
_SIZES_KEPT = 16
"""Of calls, as CUDA graphs; each holds memory of the device."""


def import_runtime(name: str, requirement: str) -> ModuleType:
    """Import `tensorrt` or `tensorrt_rtx`.

    Raises:
        MissingRuntime: if it cannot be imported.
    """
    try:
        return importlib.import_module(name)
    except Exception as err:  # its libraries are loaded here, and what fails is theirs to say
        raise MissingRuntime(f"{name} cannot be imported: {err}.", hint=f"pip install {requirement}") from err


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
    problem = ""
    if any_version and (_major(version) != _major(built) or _numbers(version) < _numbers(built)):
        problem = f"{passport.backend} here is {version}; needed is {built} or a later {_major(built)}"
    elif not any_version and version != built:
        problem = f"{passport.backend} here is {version}; needed is {built}"
    elif device.compute_capability not in capabilities:
        problem = (
            f"{device.name} has compute capability {device.compute_capability}; needed is {' or '.join(capabilities)}"
        )
    elif hardware == "ampere-plus" and _numbers(device.compute_capability) < (8, 0):
        problem = f"{device.name} has compute capability {device.compute_capability}; needed is 8.0 or more"
    elif hardware != "ampere-plus" and capability != device.compute_capability:
        problem = f"{device.name} has compute capability {device.compute_capability}; needed is {capability}"
    elif hardware is None and asked.get("name", device.name) != device.name:
        problem = f"the GPU here is {device.name}; needed is {asked['name']}"
    elif _numbers(cuda) < _numbers(asked.get("cuda", cuda)):
        problem = f"the driver here runs CUDA {cuda}; needed is {asked['cuda']} or later"
    if problem:
        raise WrongMachine(f"{passport.file} was built for another machine: {problem}.", hint=hint)


class TensorRtEngine(GraphEngine):
    """An engine of TensorRT, on the first device.

    A call goes through page-locked memory on one stream; from the second call with as many faces on, copies and kernels
    are one CUDA graph, where the binding has graphs. One lock stands before the buffers, so threads take turns.
    """

    backend = "tensorrt"
    runtime = "TensorRT"
    module: ClassVar[str] = "tensorrt"

    def _load(self, graph: Path, threads: int | None, cache: Path | None) -> None:  # noqa: ARG002 (not its own)
        hint = rebuild_command(graph, self.backend, self.precision)
        passport = Passport.read(graph, hint=hint)
        device = require_device()
        self._trt = import_runtime(self.module, f"'emoexport[{self.backend}]'")
        require_this_machine(passport, self._trt.__version__, device, find_cuda().version or "0", hint=hint)
        passport.require_intact(graph, hint=hint)
        self._memory = open_device_memory()
        self._lock = threading.Lock()
        with self._memory.current():
            self._engine = self._deserialize(graph, passport, hint)
            self._profiles = [
                tuple(shape[0] for shape in self._engine.get_tensor_profile_shape(_INPUT, index))
                for index in range(self._engine.num_optimization_profiles)
            ]
            self.max_batch = min(self.max_batch, max(most for _, _, most in self._profiles))
            self._reserve(max(self.max_batch, *(least for least, _, _ in self._profiles)))
        self._contexts: dict[int, trt.IExecutionContext] = {}
        self._graphs: dict[tuple[int, int, tuple[str, ...]], Callable[[], None] | None] = {}
        self.uncaptured = "" if self._memory.has_graphs else f"{self._memory.name} has no CUDA graphs"
        """Why calls are not CUDA graphs; empty where they are."""

    def layers(self, faces: NDArray[np.uint8]) -> tuple[list[EngineLayer], dict[str, float]]:
        """The layers as the engine's inspector tells of them, and the milliseconds of each in one call.

        Args:
            faces: uint8 `(N, H, W, C)`, 1 <= N <= `max_batch`.
        """
        self._refuse(faces)
        with self._lock, self._memory.current():
            index, count = self._place(len(faces))
            context = self._new_context(index)  # a profiler is a context's for good
            context.set_input_shape(_INPUT, (count, *self.face_shape))
            profiler = _profiler(self._trt)
            np.copyto(self._host[_INPUT][: len(faces)], faces)
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

    def split(self, faces: NDArray[np.uint8]) -> tuple[float, float, float]:
        """Milliseconds that a call takes to the device, in the engine, and back, as the device has them."""
        self._refuse(faces)
        with self._lock, self._memory.current():
            index, count = self._place(len(faces))
            context = self._context(index, count)
            np.copyto(self._host[_INPUT][: len(faces)], faces)
            there, computing, back = self._memory.time(
                lambda: self._copy_in(count),
                lambda: self._enqueue(context),
                lambda: self._copy_out(Outcome._fields, count),
            )
        return there, computing, back

    def close(self) -> None:
        """Give the device's memory back; the session answers nothing afterwards."""
        with self._lock:
            self._contexts.clear()
            self._graphs.clear()
            self._memory.close()

    def _run(self, faces: NDArray[np.uint8]) -> Outcome:
        probabilities, label, confidence = self._infer(faces, Outcome._fields)
        return Outcome(probabilities, label.astype(np.int64, copy=False), confidence)  # TensorRT 8 has no INT64

    def _scores(self, faces: NDArray[np.uint8]) -> NDArray[np.float32]:
        return self._infer(faces, ("scores",))[0]

    def _infer(self, faces: NDArray[np.uint8], outputs: tuple[str, ...]) -> list[NDArray[Any]]:
        with self._lock, self._memory.current():
            index, count = self._place(len(faces))
            np.copyto(self._host[_INPUT][: len(faces)], faces)
            self._launcher(index, count, outputs)()
            self._memory.synchronize()
            return [self._host[name][: len(faces)].copy() for name in outputs]

    def _launcher(self, index: int, count: int, outputs: tuple[str, ...]) -> Callable[[], None]:
        """What begins a call: by itself the first time, as a graph from then on."""
        key = (index, count, outputs)

        def begin() -> None:
            self._copy_in(count)
            self._enqueue(self._context(index, count))
            self._copy_out(outputs, count)

        if self.uncaptured:
            return begin
        if key not in self._graphs:
            self._graphs[key] = None
            return begin
        launch = self._graphs.pop(key)
        if launch is None:
            self._context(index, count)  # shapes are set before: nothing but work for the device is recorded
            try:
                launch = self._memory.capture(begin)
            except CheckFailed as err:
                self.uncaptured = str(err)
                return begin
        self._graphs[key] = launch  # the last to be dropped
        if len(self._graphs) > _SIZES_KEPT:
            del self._graphs[next(iter(self._graphs))]
        return launch

    def _place(self, faces: int) -> tuple[int, int]:
        """The profile for a call, and how many rows it computes: at least as many as the profile's least."""

        def fit(index: int) -> tuple[bool, int]:
            best = self._profiles[index][1]
            return best < faces, abs(best - faces)

        index = min((index for index, (_, _, most) in enumerate(self._profiles) if faces <= most), key=fit)
        return index, max(faces, self._profiles[index][0])

    def _context(self, index: int, count: int) -> "trt.IExecutionContext":
        """The context of a profile, which are slow to make and hold memory, for a number of rows."""
        if index not in self._contexts:
            self._contexts[index] = self._new_context(index)
        context = self._contexts[index]
        if context.get_tensor_shape(_INPUT)[0] != count:
            context.set_input_shape(_INPUT, (count, *self.face_shape))
        return context

    def _new_context(self, index: int) -> "trt.IExecutionContext":
        context = self._engine.create_execution_context()
        if context is None:
            raise CheckFailed(f"{self.runtime} has no memory for a context: {_errors(self._trt)}.", hint="--max-batch")
        context.set_optimization_profile_async(index, self._memory.stream)
        for name, address in self._device.items():
            context.set_tensor_address(name, address)
        self._memory.synchronize()
        return context

    def _enqueue(self, context: "trt.IExecutionContext") -> None:
        if not context.execute_async_v3(self._memory.stream):
            raise CheckFailed(f"{self.runtime} cannot run the engine: {_errors(self._trt)}.", hint="emoexport doctor")

    def _copy_in(self, count: int) -> None:
        self._memory.copy_in(self._device[_INPUT], self._host[_INPUT][:count])

    def _copy_out(self, outputs: tuple[str, ...], count: int) -> None:
        for name in outputs:
            self._memory.copy_out(self._host[name][:count], self._device[name])

    def _deserialize(self, file: Path, passport: Passport, hint: str) -> "trt.ICudaEngine":
        runtime = self._trt.Runtime(_logger(self._trt))
        if passport.settings.get("version_compatible"):
            runtime.engine_host_code_allowed = True  # it brings its own runtime; the passport says that it is ours
        plan = file.read_bytes()
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
    """An engine of TensorRT-RTX, which compiles its kernels when it is loaded."""

    backend = "tensorrt-rtx"
    runtime = "TensorRT-RTX"
    module = "tensorrt_rtx"

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
