"""TensorRT engines of a graph, by TensorRT 10 and 11 and TensorRT-RTX: strongly typed, so in the types of the graph.

Polygraphy makes network, profiles and builder configuration, and knows what each version lacks. In a process it is for
one of the two runtimes, so a process builds for one of them.
"""

import hashlib
import importlib
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from emoexport.clock import timestamp
from emoexport.engines import BACKENDS
from emoexport.engines.cuda import find_cuda, require_device
from emoexport.engines.machine import versions_of
from emoexport.engines.number_types import MEMBERS, network_types, share_of_multiplications
from emoexport.engines.passport import Passport
from emoexport.engines.tensorrt_engine import import_runtime
from emoexport.errors import CheckFailed, EmoexportError, MissingRuntime, UsageError
from emoexport.files import sha256_of_graph, write_bytes
from emoexport.precision import PRECISIONS

if TYPE_CHECKING:
    import tensorrt as trt

__all__ = ["BuilderSettings", "build_engine", "is_weakly_typed", "require_builder"]

_HELD = frozenset({"NORMALIZATION", "REDUCE", "SOFTMAX", "UNARY"})
"""Layers of members that need the range of FP32, as `half` has them in a graph."""

_HARDWARE = {"ampere-plus": "AMPERE_PLUS", "same-compute-capability": "SAME_COMPUTE_CAPABILITY"}


@dataclass(frozen=True, kw_only=True)
class BuilderSettings:
    """What may be asked of TensorRT's builder; None and False leave it to TensorRT."""

    min_batch: int = 1
    """The least number of faces in a call."""
    opt_batch: tuple[int, ...] = (16,)
    """Numbers of faces in a call that kernels are chosen for: a profile for each."""
    max_batch: int = 64
    """The largest number of faces in a call."""
    workspace_gib: float | None = None
    timing_cache: Path | None = None
    """A file that keeps what kernels were timed at, read and added to."""
    optimization_level: int | None = None
    """0 to 5."""
    version_compatible: bool = False
    hardware_compatible: str | None = None
    """`ampere-plus` or `same-compute-capability`."""
    refit: bool = False
    """Weights may be exchanged in the engine."""
    strip: bool = False
    """Weights stay in the graph, and are put in when the engine is loaded."""
    compute_capabilities: tuple[str, ...] = ()
    """TensorRT-RTX: of the cards that the engine is for, as in `8.9`; 8.0 and later if none is named."""

    def check(self, backend: str) -> None:
        """Before anything slow is done.

        Raises:
            UsageError: if settings contradict each other, or are not of this runtime.
            MissingRuntime: if they need a GPU and there is none.
        """
        if not 1 <= self.min_batch <= min(self.opt_batch, default=0) <= max(self.opt_batch) <= self.max_batch:
            raise UsageError(
                f"found --min-batch {self.min_batch}, --opt-batch {', '.join(map(str, self.opt_batch))}, "
                f"--max-batch {self.max_batch}; needed is 1 <= min <= opt <= max.",
                hint="name all three, or leave them out",
            )
        if self.hardware_compatible is not None and self.hardware_compatible not in _HARDWARE:
            raise UsageError(
                f"'{self.hardware_compatible}' is no compatibility of hardware; known are {', '.join(_HARDWARE)}."
            )
        if self.compute_capabilities and backend != "tensorrt-rtx":
            raise UsageError(
                "--compute-capability is of TensorRT-RTX; TensorRT builds for the GPU that it finds.",
                hint="--engine tensorrt-rtx, or --hardware-compatible ampere-plus",
            )
        known = BACKENDS[backend].compute_capabilities
        if unknown := [each for each in self.compute_capabilities if each not in known]:
            raise UsageError(f"'{unknown[0]}' is no compute capability of its cards; known are {', '.join(known)}.")
        if self.optimization_level is not None and not 0 <= self.optimization_level <= 5:
            raise UsageError(f"found --optimization-level {self.optimization_level}; needed is 0 to 5.")
        if self.workspace_gib is not None and self.workspace_gib <= 0:
            raise UsageError(f"found --workspace {self.workspace_gib:g}; needed is more than 0 GiB.")
        if self.timing_cache is not None and not self.timing_cache.resolve().parent.is_dir():
            raise UsageError(f"there is no folder for --timing-cache {self.timing_cache}.", hint="mkdir")
        if backend == "tensorrt-rtx" and (self.version_compatible or self.hardware_compatible):
            raise UsageError(
                "engines of TensorRT-RTX are of one version, and for more than one card by themselves.",
                hint="--compute-capability names cards",
            )
        if backend == "tensorrt-rtx" and (self.refit or self.strip):
            require_device()  # its builder fails without one

    def profiles(self) -> list[list[int]]:
        """Least, best and most faces in a call, of each profile."""
        return [[self.min_batch, opt, self.max_batch] for opt in sorted(set(self.opt_batch))]

    def unusual(self) -> dict[str, Any]:
        """Those of the engine that are not left to TensorRT, but the batches."""
        usual = BuilderSettings()
        left_out = {"min_batch", "opt_batch", "max_batch", "timing_cache"}
        return {
            name: value
            for name, value in asdict(self).items()
            if name not in left_out and value != getattr(usual, name)
        }


def require_builder(backend: str) -> tuple[ModuleType, ModuleType]:
    """The runtime of a backend and Polygraphy's loaders for it.

    Raises:
        MissingRuntime: if one is not installed, or the runtime builds only where there is a GPU and there is none.
        UsageError: if this process has built for the other runtime.
    """
    if backend == "tensorrt":
        require_device()  # before TensorRT, which may end the process where there is none
    runtime = import_runtime(BACKENDS[backend])
    return runtime, _polygraphy(is_rtx=backend == "tensorrt-rtx")


def build_engine(
    backend: str,
    graph: Path,
    engine: Path,
    *,
    precision: str,
    face_shape: tuple[int, int, int],
    settings: BuilderSettings,
    origin: Path | None = None,
    progress: Callable[[str, int, int], object] = lambda *_: None,
) -> Passport:
    """Build an engine of a graph, and write it and its passport.

    Args:
        backend: `tensorrt`, which needs a GPU, or `tensorrt-rtx`, which does not.
        graph: the ONNX file.
        engine: where it goes; it appears when it is complete.
        precision: of the graph.
        face_shape: `(H, W, C)` of the uint8 faces.
        settings: of the builder.
        origin: the graph of the bundle, where `graph` was made from it for this runtime.
        progress: called with a phase of the builder, its steps done and all its steps.

    Raises:
        UsageError: if settings contradict each other.
        MissingRuntime: if the runtime is not installed, or needs a GPU that is not here.
        CheckFailed: if the runtime refuses the graph, or the network is not of the precision.
    """
    settings.check(backend)
    runtime, loaders = require_builder(backend)
    started = time.monotonic()
    with _told_by(loaders, f"TensorRT {runtime.__version__} cannot build an engine of {graph.name}"):
        is_weak = is_weakly_typed(runtime)
        builder, network, parser = loaders.network_from_onnx_path(str(graph), strongly_typed=not is_weak)
        types = network_types(network)
        share = None if is_weak else _require_precision(runtime, network, precision, graph)
        weak = _weak_types(runtime, network, precision) if is_weak else {}
        config = _config(runtime, loaders, backend, settings, face_shape, weak)(builder, network)
        monitor = None
        if hasattr(config, "progress_monitor"):  # from 10 on
            config.progress_monitor = monitor = _monitor(runtime, progress)
        try:
            plan = loaders.engine_bytes_from_network(
                (builder, network, parser), config, save_timing_cache=_path(settings.timing_cache)
            )
        except Exception:
            if monitor is not None and monitor.stopped is not None:
                raise monitor.stopped from None
            raise
    engine.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(engine, plan)
    passport = Passport(
        file=engine.name,
        sha256=hashlib.sha256(plan).hexdigest(),
        bytes=engine.stat().st_size,
        backend=backend,
        precision=precision,
        graph=(origin or graph).name,
        graph_sha256=sha256_of_graph(origin or graph),
        created=timestamp(),
        seconds=round(time.monotonic() - started, 1),
        versions={backend: runtime.__version__, **versions_of("emoexport", "polygraphy")},
        device=_device(backend, settings),
        profiles=settings.profiles(),
        settings=settings.unusual(),
        network=types,
        asked_share=None if share is None else round(share, 4),
    )
    passport.write(engine)
    return passport


def _polygraphy(*, is_rtx: bool) -> ModuleType:
    """Polygraphy's loaders for one of the two runtimes."""
    try:
        from polygraphy import config, logger  # noqa: PLC0415 (an extra)
    except ImportError as err:
        raise MissingRuntime("Polygraphy is not installed here.", hint="pip install polygraphy") from err
    logger.G_LOGGER.colors = False  # or it says that it could have some
    if "polygraphy.backend.trt" in sys.modules and is_rtx != config.USE_TENSORRT_RTX:
        raise UsageError(
            "engines of TensorRT and of TensorRT-RTX are not built in one process.", hint="one command for each"
        )
    config.USE_TENSORRT_RTX = is_rtx
    return importlib.import_module("polygraphy.backend.trt")


def _config(
    runtime: ModuleType,
    loaders: ModuleType,
    backend: str,
    settings: BuilderSettings,
    face_shape: tuple[int, int, int],
    weak: dict[str, Any],
) -> Callable[[Any, Any], Any]:
    """What makes the builder's configuration for a network."""
    chosen: dict[str, Any] = {
        **weak,
        "profiles": [
            loaders.Profile().add("faces", *((count, *face_shape) for count in profile))
            for profile in settings.profiles()
        ],
        "load_timing_cache": _path(settings.timing_cache),
        "builder_optimization_level": settings.optimization_level,
        "refittable": settings.refit,
        "strip_plan": settings.strip,
        "version_compatible": settings.version_compatible,
    }
    if settings.workspace_gib is not None:
        chosen["memory_pool_limits"] = {runtime.MemoryPoolType.WORKSPACE: int(settings.workspace_gib * 2**30)}
    if settings.hardware_compatible is not None:
        level = _HARDWARE[settings.hardware_compatible]
        chosen["hardware_compatibility_level"] = getattr(runtime.HardwareCompatibilityLevel, level)
    if backend == "tensorrt":
        return loaders.CreateConfig(**chosen)  # type: ignore[no-any-return]
    rtx = importlib.import_module("polygraphy.backend.tensorrt_rtx")
    capabilities = [tuple(map(int, each.split("."))) for each in settings.compute_capabilities] or None
    create = rtx.CreateConfigRTX(compute_capabilities=capabilities, **chosen)

    def in_fp32(builder: Any, network: Any) -> Any:
        config = create(builder, network)
        config.clear_flag(runtime.BuilderFlag.TF32)  # as Polygraphy does for TensorRT: FP32 means FP32
        return config

    return in_fp32


def is_weakly_typed(runtime: ModuleType) -> bool:
    """Whether a runtime takes the types of a graph as a proposal: TensorRT before 10."""
    return not hasattr(runtime.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")


def _weak_types(runtime: ModuleType, network: "trt.INetworkDefinition", precision: str) -> dict[str, Any]:
    """TensorRT 8.6: flags that allow types, and layers that are held in FP32 as a graph of these types has them.

    Of its kernels those that need cuBLAS or cuDNN are left out, which it does not use by itself either.
    """
    numbers = set(precision.split("-"))
    if unknown := numbers - {"fp32", "fp16", "int8"}:
        raise UsageError(
            f"TensorRT {runtime.__version__} has no {unknown.pop()}.", hint="--fp16, --int8 or --int8-fp16"
        )
    for index in range(network.num_layers):
        layer: Any = network.get_layer(index)
        is_kept = not layer.name.startswith(MEMBERS) or layer.type.name in _HELD
        if is_kept and layer.get_output(0).dtype == runtime.DataType.FLOAT:
            layer.precision = runtime.DataType.FLOAT
            layer.set_output_type(0, runtime.DataType.FLOAT)
    sources = [runtime.TacticSource.EDGE_MASK_CONVOLUTIONS, runtime.TacticSource.JIT_CONVOLUTIONS]
    flags = {name: name in numbers for name in ("fp16", "int8")}
    return {**flags, "precision_constraints": "obey", "tactic_sources": sources}


def _require_precision(runtime: ModuleType, network: "trt.INetworkDefinition", precision: str, graph: Path) -> float:
    """The share of the members' multiplications that the network makes in the precision."""
    row = PRECISIONS[precision]
    share = share_of_multiplications(runtime, network, row.number)
    if share < row.min_share:
        raise CheckFailed(
            f"{graph.name} is no {row.title} graph to TensorRT: {share:.0%} of the members' multiplications are in "
            f"{row.number}; needed are {row.min_share:.0%}.",
            hint="build the bundle again",
        )
    return share


def _monitor(runtime: ModuleType, progress: Callable[[str, int, int], object]) -> Any:
    class Monitor(runtime.IProgressMonitor):  # type: ignore[misc, name-defined]
        """Tells of phases; what is raised meanwhile, as by an interrupt, stops the build and is kept."""

        def __init__(self) -> None:
            super().__init__()
            self.steps: dict[str, int] = {}
            self.stopped: BaseException | None = None

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:  # noqa: ARG002
            self.steps[phase_name] = num_steps
            self.tell(phase_name, 0)

        def phase_finish(self, phase_name: str) -> None:
            self.tell(phase_name, self.steps.get(phase_name, 1))

        def step_complete(self, phase_name: str, step: int) -> bool:
            self.tell(phase_name, step + 1)
            return self.stopped is None

        def tell(self, phase: str, done: int) -> None:
            try:
                progress(phase, done, self.steps.get(phase, 1))
            except BaseException as err:  # it must not pass through TensorRT
                self.stopped = err

    return Monitor()


@contextmanager
def _told_by(loaders: ModuleType, what: str) -> Iterator[None]:
    """Turn what Polygraphy raises into an error that says what TensorRT logged; warnings are not shown."""
    logger, heard = loaders.util.G_LOGGER, _Heard(logging.ERROR)
    logger.use_python_logging_system = True
    told = logging.getLogger("Polygraphy")
    told.addHandler(heard)
    told.propagate = False
    try:
        yield
    except EmoexportError:
        raise
    except Exception as err:  # Polygraphy's own, and what TensorRT's bindings raise
        said = [" ".join(text.split()) for text in heard.texts if not text.startswith("Could not parse")]
        first = (said or [str(err) or type(err).__name__])[0]
        is_short = "memory" in " ".join(said).lower()
        raise CheckFailed(
            f"{what}: {first}",
            hint="--max-batch with fewer faces, or --workspace"
            if is_short
            else "another precision, or another runtime",
        ) from err
    finally:
        told.removeHandler(heard)


class _Heard(logging.Handler):
    """What was logged."""

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def _device(backend: str, settings: BuilderSettings) -> dict[str, str]:
    """What an engine of these settings needs."""
    if backend == "tensorrt-rtx":
        capabilities = " ".join(settings.compute_capabilities)
        return {"compute_capabilities": capabilities} if capabilities else {}
    device = require_device()
    return {
        "name": device.name,
        "compute_capability": device.compute_capability,
        "cuda": find_cuda().version or "",
    }


def _path(file: Path | None) -> str | None:
    return None if file is None else str(file)
