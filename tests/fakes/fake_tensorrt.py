"""TensorRT's Python interface as each of its versions has it, and a device behind it: what engines do, without a GPU.

Modules are made from lists of names that were read from the wheels, `tests/tensorrt_api/*.json`; whatever touches a
name that a version lacks raises AttributeError. An engine holds its graph, which ONNX Runtime runs. The
device does nothing before it is waited for, as real ones do, so that what is not waited for is seen to be missing.
"""

import base64
import ctypes
import enum
import functools
import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import onnx
import onnxruntime as ort

API = Path(__file__).parent.parent / "tensorrt_api"
VERSIONS = sorted(file.stem for file in API.glob("*.json"))
STREAM = 7

_DTYPES = {"FLOAT": "float32", "HALF": "float16", "INT64": "int64", "INT32": "int32", "UINT8": "uint8", "BOOL": "bool"}
_OF_ONNX = {"FLOAT16": "HALF", "BFLOAT16": "BF16", "FLOAT8E4M3FN": "FP8"}
_LAYERS = {
    "Conv": "CONVOLUTION",
    "MatMul": "MATRIX_MULTIPLY",
    "QuantizeLinear": "QUANTIZE",
    "DequantizeLinear": "DEQUANTIZE",
    "LayerNormalization": "NORMALIZATION",
}


class FakeDevice:
    """A device with one stream, whose memory is the host's."""

    name = "fake"
    has_graphs = True
    stream = STREAM

    def __init__(self) -> None:
        self.begun: list[Callable[[], object]] = []
        self.recorded: list[Callable[[], object]] | None = None
        self.buffers: list[np.ndarray] = []
        self.copied_out: list[tuple[int, ...]] = []
        self.captures = self.launches = self.deserialized = 0
        self.graphs: list[FakeGraph] = []
        self.contexts = 0
        self.is_closed = False

    def begin(self, work: Callable[[], object]) -> None:
        (self.begun if self.recorded is None else self.recorded).append(work)

    def current(self) -> Any:
        return nullcontext()

    def allocate(self, size: int) -> int:
        return self.pinned((size,), np.dtype(np.uint8)).ctypes.data

    def pinned(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        self.buffers.append(np.full(int(np.prod(shape)) * dtype.itemsize, 255, np.uint8))  # NaN, or nonsense
        return self.buffers[-1].view(dtype).reshape(shape)

    def copy_in(self, address: int, array: np.ndarray) -> None:
        assert array.flags["C_CONTIGUOUS"]
        self.begin(lambda: ctypes.memmove(address, array.ctypes.data, array.nbytes))

    def copy_out(self, array: np.ndarray, address: int) -> None:
        assert array.flags["C_CONTIGUOUS"]
        self.copied_out.append(array.shape)
        self.begin(lambda: ctypes.memmove(array.ctypes.data, address, array.nbytes))

    def synchronize(self) -> None:
        assert self.recorded is None, "waiting is not allowed while a stream is captured"
        begun, self.begun = self.begun, []
        for work in begun:
            work()

    def capture(self, work: Callable[[], object]) -> "FakeGraph":
        self.recorded = []
        try:
            work()
            recorded = self.recorded
        finally:
            self.recorded = None
        self.captures += 1
        self.graphs.append(FakeGraph(self, recorded))
        return self.graphs[-1]

    def time(self, *works: Callable[[], object]) -> list[float]:
        for work in works:
            work()
        self.synchronize()
        return [0.5] * len(works)

    def close(self) -> None:
        self.is_closed = True


class FakeGraph:
    """What was recorded."""

    def __init__(self, device: FakeDevice, recorded: list[Callable[[], object]]) -> None:
        self.device, self.recorded = device, recorded

    def launch(self) -> None:
        assert self in self.device.graphs, "it was destroyed"
        self.device.launches += 1
        self.device.begun += self.recorded

    def destroy(self) -> None:
        self.device.graphs.remove(self)


def make_module(api: str, device: FakeDevice) -> ModuleType:
    """The module of a version, whose engines run on a device."""
    lists = json.loads((API / f"{api}.json").read_text())
    module = ModuleType("tensorrt_rtx" if "rtx" in api else "tensorrt")
    module.__version__ = lists["version"]
    module.__spec__ = SimpleNamespace(name=module.__name__, origin="fake", loader=None)
    names = set(lists["names"].split())
    made: dict[str, Any] = {}
    for key, text in lists.items():
        kind, _, name = key.partition(" ")
        if kind == "enum":
            made[name] = enum.IntEnum(name, text.split(), start=0)
        elif kind == "class":
            made[name] = _make_class(name, frozenset(text.split()), lists["version"])
    for name, kind in made.items():
        assert name in names, name
        setattr(module, name, kind)
    for name in names - set(made):
        setattr(module, name, MagicMock(name=name))
    module.nptype = lambda kind: np.dtype(_DTYPES[kind.name])
    module.Builder.fake_module = module.Runtime.fake_module = module
    module.Runtime.fake_device = device
    return module


def make_8_6(device: FakeDevice) -> ModuleType:
    """TensorRT 8.6: the names of 10.0 less those that came after 8.6, of what is touched here."""
    module = make_module("tensorrt-10.0.1", device)
    module.__version__ = "8.6.0"
    module.NetworkDefinitionCreationFlag = enum.IntEnum("Flag", ["EXPLICIT_BATCH", "EXPLICIT_PRECISION"], start=0)
    module.TacticSource = enum.IntEnum(
        "TacticSource", ["CUBLAS", "EDGE_MASK_CONVOLUTIONS", "JIT_CONVOLUTIONS"], start=0
    )
    module.IBuilderConfig.fake_allowed -= {"progress_monitor"}
    del module.IProgressMonitor
    del module.ExecutionContextAllocationStrategy
    module.ICudaEngine.fake_allowed -= {"device_memory_size_v2"}
    return module


def _make_class(name: str, allowed: frozenset[str], version: str) -> type:
    behaviour = BEHAVIOUR.get(name, {})
    kept = {key: value for key, value in behaviour.items() if key in allowed or key.startswith(("_", "fake_"))}
    severities = {"INTERNAL_ERROR": 0, "ERROR": 1, "WARNING": 2, "INFO": 3, "VERBOSE": 4} if "Logger" in name else {}
    return type(name, (_Restricted,), {**severities, **kept, "fake_allowed": allowed, "fake_version": version})


class _Restricted:
    """An object that has the names of its list, those that the fake knows nothing of as mocks."""

    fake_allowed: frozenset[str]
    fake_version: str

    def __getattr__(self, name: str) -> Any:
        if name.startswith(("_", "fake_")) or name not in self.fake_allowed:
            raise AttributeError(f"{type(self).__name__} of TensorRT {self.fake_version} has no '{name}'")
        mock = MagicMock(name=name)
        object.__setattr__(self, name, mock)
        return mock

    def __setattr__(self, name: str, value: object) -> None:
        is_derived = "fake_allowed" not in vars(type(self))  # a logger or a monitor has its own names too
        if not is_derived and not name.startswith(("__", "fake_")) and name not in self.fake_allowed:
            raise AttributeError(f"{type(self).__name__} of TensorRT {self.fake_version} has no '{name}'")
        object.__setattr__(self, name, value)


def _tensor(module: ModuleType, name: str, element: int, shape: tuple[int, ...]) -> Any:
    tensor = module.ITensor()
    written = onnx.TensorProto.DataType.Name(element) if element else "FLOAT"
    tensor.name, tensor.shape = name, shape
    tensor.dtype = module.DataType[_OF_ONNX.get(written, written)]
    return tensor


@functools.lru_cache(maxsize=8)
def _inferred(model: bytes) -> onnx.ModelProto:
    return onnx.shape_inference.infer_shapes(model)


def _layers_of(module: ModuleType, model: onnx.ModelProto) -> tuple[list[Any], list[Any]]:
    """Layers of a network, one for each node of a graph, and its outputs."""
    graph = _inferred(model.SerializeToString()).graph
    known = {
        value.name: (
            value.type.tensor_type.elem_type,
            tuple(dim.dim_value or -1 for dim in value.type.tensor_type.shape.dim),
        )
        for value in (*graph.input, *graph.value_info, *graph.output)
    } | {tensor.name: (tensor.data_type, tuple(tensor.dims)) for tensor in graph.initializer}
    tensors = {name: _tensor(module, name, *about) for name, about in known.items()}
    layers = []
    for node in graph.node:
        kind = _LAYERS.get(node.op_type, "ELEMENTWISE")
        layer = (module.IConvolutionLayer if kind == "CONVOLUTION" else module.ILayer)()
        layer.name, layer.type = node.name, module.LayerType[kind]
        layer.num_inputs, layer.num_outputs = len(node.input), len(node.output)
        inputs = [tensors.get(name) or _tensor(module, name, 0, ()) for name in node.input]
        outputs = [tensors.get(name) or _tensor(module, name, 0, ()) for name in node.output]
        layer.get_input, layer.get_output = inputs.__getitem__, outputs.__getitem__
        if kind == "CONVOLUTION":
            layer.kernel_size_nd = known[node.input[1]][1][2:]
            layer.num_groups = next((each.i for each in node.attribute if each.name == "group"), 1)
        layers.append(layer)
    return layers, [tensors[value.name] for value in graph.output]


def _create_network(self: Any, flags: int = 0) -> Any:
    module = self.fake_module
    strongly = getattr(module.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = module.INetworkDefinition()
    network.fake_module, network.fake_layers, network.fake_graph = module, [], ""
    network.fake_is_strongly_typed = strongly is not None and bool(flags & (1 << strongly))
    network.num_layers = network.num_outputs = network.num_inputs = 0
    return network


def _parse_from_file(self: Any, path: str) -> bool:
    network = self.fake_network
    try:
        network.fake_layers, outputs = _layers_of(network.fake_module, onnx.load(path))
    except Exception as err:
        self.num_errors, said = 1, f"In node -1: {err}"
        self.get_error = lambda _: said
        return False
    faces = _tensor(network.fake_module, "faces", onnx.TensorProto.UINT8, (-1, 32, 32, 1))
    faces.is_shape_tensor = False
    network.fake_graph, network.num_layers = path, len(network.fake_layers)
    network.get_layer = network.fake_layers.__getitem__
    network.num_inputs, network.get_input = 1, [faces].__getitem__
    network.num_outputs, network.get_output = len(outputs), outputs.__getitem__
    return True


def _init_parser(self: Any, network: Any, logger: Any) -> None:
    self.fake_network, self.fake_logger, self.num_errors = network, logger, 0


def _build_serialized_network(self: Any, network: Any, config: Any) -> bytes | None:
    if not self.fake_module.__version__.startswith("8."):
        assert network.fake_is_strongly_typed, "a network that is not strongly typed may be run in other types"
    monitor = getattr(config, "progress_monitor", None)
    if monitor is not None:
        monitor.phase_start("Building engine", None, 2)
        assert monitor.step_complete("Building engine", 0)
        monitor.phase_finish("Building engine")
    profiles = getattr(config, "fake_profiles", [])
    plan = {"graph": network.fake_graph, "profiles": profiles, "version": self.fake_version, "flags": config.fake_flags}
    plan["model"] = base64.b64encode(Path(network.fake_graph).read_bytes()).decode()
    held = [layer.name for layer in network.fake_layers if "precision" in vars(layer)]
    plan["held in FP32"] = held
    plan["hardware"] = getattr(vars(config).get("hardware_compatibility_level"), "name", None)
    return json.dumps(plan).encode()


def _create_builder_config(self: Any) -> Any:
    config = self.fake_module.IBuilderConfig()
    config.fake_flags, config.fake_profiles = [], []
    return config


def _deserialize(self: Any, plan: bytes) -> Any:
    self.fake_device.deserialized += 1
    try:
        found = json.loads(plan)
    except ValueError:
        self.fake_logger.log(1, "IRuntime::deserializeCudaEngine: Error Code 1: magic tag does not match")
        return None
    engine = self.fake_module.ICudaEngine()
    engine.fake_module, engine.fake_device = self.fake_module, self.fake_device
    engine.fake_model = base64.b64decode(found["model"])
    engine.fake_session = ort.InferenceSession(engine.fake_model, providers=["CPUExecutionProvider"])
    engine.fake_profiles = [profile["faces"] for profile in found["profiles"]]
    engine.fake_flags, engine.fake_held = found["flags"], found["held in FP32"]
    engine.fake_has_weights = "STRIP_PLAN" not in found["flags"]
    tensors = [*engine.fake_session.get_inputs(), *engine.fake_session.get_outputs()]
    engine.fake_tensors = {tensor.name: tensor for tensor in tensors}
    engine.fake_scratch = 100
    engine.num_io_tensors, engine.num_optimization_profiles = len(tensors), len(engine.fake_profiles)
    return engine


def _tensor_dtype(self: Any, name: str) -> Any:
    written = self.fake_tensors[name].type.removeprefix("tensor(").removesuffix(")")
    return self.fake_module.DataType[{"float": "FLOAT", "uint8": "UINT8", "int64": "INT64"}[written]]


def _tensor_shape(self: Any, name: str) -> tuple[int, ...]:
    return tuple(size if isinstance(size, int) else -1 for size in self.fake_tensors[name].shape)


def _create_context(self: Any, how: Any = None) -> Any:
    context = self.fake_module.IExecutionContext()
    self.fake_device.contexts += 1
    has_config = hasattr(how, "fake_is_config")
    assert has_config == (self.fake_module.__name__ == "tensorrt_rtx"), "TensorRT-RTX is told how by a configuration"
    context.fake_engine, context.fake_addresses, context.fake_profile = self, {}, None
    context.fake_shape, context.fake_is_warm, context.fake_changes = None, False, 0
    return context


def _set_profile(self: Any, index: int, stream: int) -> bool:
    assert stream == STREAM
    self.fake_profile = self.fake_engine.fake_profiles[index]
    return True


def _set_input_shape(self: Any, name: str, shape: tuple[int, ...]) -> bool:
    least, _, most = self.fake_profile
    assert name == "faces"
    assert least[0] <= shape[0] <= most[0], "outside of the profile"
    assert list(shape[1:]) == list(least[1:])
    self.fake_shape, self.fake_is_warm = tuple(shape), False
    self.fake_changes += 1
    return True


def _context_shape(self: Any, name: str) -> tuple[int, ...]:
    return self.fake_shape or _tensor_shape(self.fake_engine, name)


def _set_address(self: Any, name: str, address: int) -> bool:
    self.fake_addresses[name] = address
    return True


def _at(address: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype).reshape(shape)


def _execute(self: Any, stream: int) -> bool:
    engine, shape = self.fake_engine, self.fake_shape
    if stream != STREAM or shape is None or set(self.fake_addresses) != set(engine.fake_tensors):
        return False
    is_recorded = engine.fake_device.recorded is not None
    if is_recorded and not self.fake_is_warm:
        return False  # the first enqueue after a shape was set prepares what cannot be captured
    self.fake_is_warm, at = True, self.fake_changes

    def compute() -> None:
        assert engine.fake_has_weights, "the engine has no weights"
        assert not is_recorded or self.fake_changes == at, "the context was changed after it was captured"
        if "device_memory" in vars(self):
            _at(self.device_memory, (engine.fake_scratch,), np.uint8)
        faces = _at(self.fake_addresses["faces"], shape, np.uint8)
        names = [output.name for output in engine.fake_session.get_outputs()]
        for name, value in zip(names, engine.fake_session.run(names, {"faces": faces}), strict=True):
            _at(self.fake_addresses[name], value.shape, value.dtype)[...] = value
        if "profiler" in vars(self):
            for layer in _inspected(engine, with_types=True):
                self.profiler.report_layer_time(layer["Name"], 2.0 if "members" in layer["Metadata"] else 1.0)

    engine.fake_device.begin(compute)
    return True


def _inspected(engine: Any, *, with_types: bool) -> list[dict[str, Any]]:
    """Layers as an inspector lists them: dense ones by themselves, names of kernels, types as TensorRT writes them."""
    layers, _ = _layers_of(engine.fake_module, onnx.load_from_string(engine.fake_model))
    written = {"FLOAT": "Float", "HALF": "Half", "INT8": "Int8", "BF16": "BFloat16", "FP8": "FP8"}
    made_by = {layer.get_output(0).name: layer for layer in layers}
    found = []
    for number, layer in enumerate(layers):
        if layer.type.name in {"CONVOLUTION", "MATRIX_MULTIPLY", "NORMALIZATION"}:
            before = made_by.get(layer.get_input(0).name)
            is_quantized = before is not None and before.type.name == "DEQUANTIZE"
            read = (before if is_quantized else layer).get_input(0)
            tensors = {"Inputs": read, "Outputs": layer.get_output(0)}
            entry: dict[str, Any] = {"Name": f"__myl_{number}", "LayerType": "gemm"}
            entry["Metadata"] = f"[ONNX Layer: {layer.name}]"
            may_be_half = "FP16" in engine.fake_flags and layer.name not in engine.fake_held  # as flags allow in 8
            for side, tensor in tensors.items():
                told = written.get(tensor.dtype.name, "Int64")
                shown = "Half" if may_be_half and told == "Float" else told
                kind = {"Format/Datatype": shown} if with_types else {}
                entry[side] = [{"Name": tensor.name, **kind}]
            found.append(entry)
    return found


def _engine_information(self: Any, kind: Any) -> str:
    assert kind.name == "JSON"
    context = vars(self).get("execution_context")
    layers = _inspected(self.fake_engine, with_types=context is not None and context.fake_shape is not None)
    rest = "I/O Tensors" if self.fake_version.startswith("11") else "Bindings"
    return json.dumps({"Layers": layers, rest: []})


def _create_runtime_config(self: Any) -> Any:
    config = self.fake_module.IRuntimeConfig()
    config.fake_is_config, config.fake_module = True, self.fake_module
    return config


def _create_runtime_cache(self: Any) -> Any:
    cache = self.fake_module.IRuntimeCache()
    cache.fake_content = b"compiled now"
    return cache


def _fill_runtime_cache(self: Any, content: bytes) -> bool:
    self.fake_content = content
    return True


def _create_inspector(self: Any) -> Any:
    inspector = self.fake_module.EngineInspector()
    inspector.fake_engine = self
    return inspector


def _refit(self: Any, path: str) -> bool:
    self.fake_refitter.fake_is_ready = Path(path).is_file()
    return bool(self.fake_refitter.fake_is_ready)


def _refit_engine(self: Any) -> bool:
    self.fake_engine.fake_has_weights = self.fake_is_ready
    return bool(self.fake_is_ready)


def _keep(*names: str) -> Callable[..., None]:
    """An `__init__` that keeps what it is given."""

    def init(self: Any, *values: Any) -> None:
        for name, value in zip(names, values, strict=True):
            setattr(self, f"fake_{name}", value)

    return init


def _add_profile(self: Any, profile: Any) -> int:
    self.fake_profiles.append(profile.fake_shapes)
    return len(self.fake_profiles) - 1


def _create_profile(self: Any) -> Any:
    profile = self.fake_module.IOptimizationProfile()
    profile.fake_shapes = {}
    return profile


BEHAVIOUR: dict[str, dict[str, Any]] = {
    "Builder": {
        "__init__": _keep("logger"),
        "create_network": _create_network,
        "create_builder_config": _create_builder_config,
        "create_optimization_profile": _create_profile,
        "build_serialized_network": _build_serialized_network,
    },
    "IBuilderConfig": {
        "DLA_core": -1,
        "int8_calibrator": None,
        "num_optimization_profiles": 1,
        "get_memory_pool_limit": lambda *_: 1 << 30,
        "set_flag": lambda self, flag: self.fake_flags.append(flag.name),
        "clear_flag": lambda self, flag: self.fake_flags.append(f"no {flag.name}"),
        "add_optimization_profile": _add_profile,
        "set_timing_cache": lambda *_, **__: True,
    },
    "IOptimizationProfile": {
        "set_shape": lambda self, name, *shapes: self.fake_shapes.update({name: [tuple(each) for each in shapes]}),
        "__bool__": lambda _: True,
    },
    "ILayer": {"precision_is_set": False},
    "IConvolutionLayer": {"precision_is_set": False},
    "INetworkDefinition": {"__getitem__": lambda self, index: self.fake_layers[index]},
    "OnnxParser": {"__init__": _init_parser, "parse_from_file": _parse_from_file},
    "OnnxParserRefitter": {"__init__": _keep("refitter", "logger"), "refit_from_file": _refit},
    "Refitter": {"__init__": _keep("engine", "logger"), "refit_cuda_engine": _refit_engine},
    "Runtime": {
        "__init__": _keep("logger"),
        "deserialize_cuda_engine": _deserialize,
        "fake_validity": ("VALID", 0),
        "get_engine_validity": lambda self, _: (
            self.fake_module.EngineValidity[self.fake_validity[0]],
            self.fake_validity[1],
        ),
    },
    "ICudaEngine": {
        "get_tensor_name": lambda self, index: list(self.fake_tensors)[index],
        "get_tensor_dtype": _tensor_dtype,
        "get_tensor_shape": _tensor_shape,
        "get_tensor_profile_shape": lambda self, name, index: [tuple(each) for each in self.fake_profiles[index]],
        "create_execution_context": _create_context,
        "create_execution_context_without_device_memory": _create_context,
        "create_runtime_config": _create_runtime_config,
        "device_memory_size": 100,
        "device_memory_size_v2": 100,
        "create_engine_inspector": _create_inspector,
    },
    "IExecutionContext": {
        "set_optimization_profile_async": _set_profile,
        "set_input_shape": _set_input_shape,
        "get_tensor_shape": _context_shape,
        "set_tensor_address": _set_address,
        "execute_async_v3": _execute,
    },
    "IRuntimeConfig": {"create_runtime_cache": _create_runtime_cache, "set_runtime_cache": lambda *_: True},
    "IRuntimeCache": {"serialize": lambda self: self.fake_content + b"!", "deserialize": _fill_runtime_cache},
    "EngineInspector": {"get_engine_information": _engine_information},
}


class FakeDriver:
    """The driver's library with one device."""

    def __init__(self, *, name: str = "NVIDIA H100 80GB HBM3", capability: str = "9.0", version: int = 13000) -> None:
        self.name, self.capability, self.version = name, capability, version

    def cuInit(self, _: int) -> int:
        return 0

    def cuDriverGetVersion(self, number: Any) -> int:
        number._obj.value = self.version
        return 0

    def cuDeviceGetCount(self, number: Any) -> int:
        number._obj.value = 1
        return 0

    def cuDeviceGet(self, handle: Any, index: int) -> int:
        handle._obj.value = index
        return 0

    def cuDeviceGetName(self, text: Any, size: int, _: Any) -> int:
        text.value = self.name.encode()[: size - 1]
        return 0

    def cuDeviceTotalMem_v2(self, size: Any, _: Any) -> int:
        size._obj.value = 80 * 2**30
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, _: Any) -> int:
        value._obj.value = int(self.capability.split(".")[{75: 0, 76: 1}[attribute]])
        return 0
