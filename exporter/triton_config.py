"""`config.pbtxt`: how Triton runs each kind of engine, a table, and the text format of protobuf.

Source: Triton's `model_config.proto` and user guide, "Model Configuration" and "Batchers"; READMEs of its backends
`onnxruntime`, `openvino` and `tensorrt`.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["SERVED", "Model", "Served", "Word", "model_config", "to_text"]


class Word(str):
    """A name of the schema, which stands in the text without quotes."""

    __slots__ = ()


@dataclass(frozen=True, kw_only=True)
class Model:
    """What the configuration says of one model."""

    name: str
    backend: str
    """Of `SERVED`."""
    precision: str
    face_shape: tuple[int, int, int]
    """`(H, W, C)` of the uint8 faces."""
    scores_shape: tuple[int, int, int]
    """`(K, V, L)`: members, views, emotions."""
    max_batch: int
    """The largest number of faces in a call."""
    profiles: Sequence[Sequence[int]] = ()
    """Least, best and most faces in a call of each profile of an engine of TensorRT."""
    label_type: str = "TYPE_INT64"
    queue_delay_us: int = 1000
    """How long a request may wait for others, microseconds."""
    instances: int = 1
    parameters: Mapping[str, str]
    """What readers of the configuration are to know; Triton itself does not."""

    @property
    def preferred(self) -> list[int]:
        """Numbers of faces in a call that an engine has kernels for: the best of each of its profiles.

        Not one: Triton would find that fulfilled by any request, and put none together.
        """
        return sorted({best for _, best, _ in self.profiles if 1 < best <= self.max_batch})


def _nothing(_: Model) -> dict[str, Any]:
    return {}


@dataclass(frozen=True, kw_only=True)
class Served:
    """One row of `SERVED`."""

    backend: str
    """Triton's name of what runs it."""
    platform: str = ""
    """Triton's name of the kind of file, where it has one."""
    file: str = "model.onnx"
    kind: str = "KIND_CPU"
    batches: bool = True
    """Whether it computes as many faces as there are: only then may Triton put requests together."""
    settings: Callable[[Model], dict[str, Any]] = _nothing
    """Further fields."""
    parameters: Mapping[str, str] | None = None
    """Further parameters, which its backend reads."""


def _accelerated(name: str, settings: Mapping[str, str], **more: Any) -> dict[str, Any]:
    parameters = [{"key": key, "value": value} for key, value in settings.items()]
    accelerator = {"name": name, "parameters": parameters}
    return {"optimization": {**more, "execution_accelerators": {"gpu_execution_accelerator": [accelerator]}}}


def _cuda(_: Model) -> dict[str, Any]:
    return _accelerated("cuda", {"use_tf32": "0"})  # FP32 means FP32


def _tensorrt_provider(model: Model) -> dict[str, Any]:
    """As `engines.onnxruntime_gpu` has it: types allowed by a flag, one profile, no passes of ONNX Runtime's own."""
    sizes = {"min": 1, "opt": min(16, model.max_batch), "max": model.max_batch}
    shapes = {
        f"trt_profile_{which}_shapes": f"faces:{'x'.join(map(str, (size, *model.face_shape)))}"
        for which, size in sizes.items()
    }
    return _accelerated("tensorrt", {"precision_mode": model.precision.upper(), **shapes}, graph={"level": 2})


SERVED: Mapping[str, Served] = {
    "onnxruntime": Served(backend="onnxruntime", platform="onnxruntime_onnx"),
    "onnxruntime-cuda": Served(backend="onnxruntime", platform="onnxruntime_onnx", kind="KIND_GPU", settings=_cuda),
    "onnxruntime-tensorrt": Served(
        backend="onnxruntime", platform="onnxruntime_onnx", kind="KIND_GPU", settings=_tensorrt_provider
    ),
    # It sets the number of faces of a batching model to `max_batch_size`, whatever comes, and pads or refuses.
    "openvino": Served(backend="openvino", batches=False, parameters={"PERFORMANCE_HINT": "LATENCY"}),
    "openvino-throughput": Served(backend="openvino", batches=False, parameters={"PERFORMANCE_HINT": "THROUGHPUT"}),
    "tensorrt": Served(backend="tensorrt", platform="tensorrt_plan", file="model.plan", kind="KIND_GPU"),
}
"""By name of the backend in `engines.BACKENDS`."""


def model_config(model: Model) -> dict[str, Any]:
    """The fields of Triton's `ModelConfig`, as `to_text` takes them."""
    row = SERVED[model.backend]
    return {
        "name": model.name,
        **({"platform": row.platform} if row.platform else {}),
        "backend": row.backend,
        "default_model_filename": row.file,
        "max_batch_size": model.max_batch if row.batches else 0,
        "version_policy": {"latest": {"num_versions": 1}},
        "input": [_tensor(model, "faces", "TYPE_UINT8", model.face_shape)],
        "output": [
            _tensor(model, "probabilities", "TYPE_FP32", model.scores_shape[2:]) | _label_file(row),
            _tensor(model, "label", model.label_type, ()),
            _tensor(model, "confidence", "TYPE_FP32", ()),
            _tensor(model, "scores", "TYPE_FP32", model.scores_shape),
        ],
        "instance_group": [_instances(model, row)],
        **({"dynamic_batching": _batching(model)} if row.batches else {}),
        **row.settings(model),
        "model_warmup": [_warm_up(model, row, count) for count in sorted({1, *_largest(model)})],
        "response_cache": {"enable": False},
        "parameters": [
            {"key": key, "value": {"string_value": value}}
            for key, value in {**(row.parameters or {}), **model.parameters}.items()
        ],
    }


def _tensor(model: Model, name: str, kind: str, shape: Sequence[int]) -> dict[str, Any]:
    """An input or output of shape `(N, *shape)`.

    Triton knows no empty `dims`: of a batching model a tensor `(N,)` is `(N, 1)` to clients.
    Source: its user guide, "Reshape".
    """
    fields: dict[str, Any] = {"name": name, "data_type": Word(kind)}
    if not SERVED[model.backend].batches:
        return fields | {"dims": [-1, *shape]}
    return fields | ({"dims": [*shape]} if shape else {"dims": [1], "reshape": {"shape": []}})


def _label_file(row: Served) -> dict[str, str]:
    """For Triton's classification extension, which takes a tensor without a batch as a single answer."""
    return {"label_filename": "labels.txt"} if row.batches else {}


def _instances(model: Model, row: Served) -> dict[str, Any]:
    """All profiles for each instance, which takes the one that fits a call best."""
    profiles = [str(index) for index, _ in enumerate(model.profiles)]
    return {
        "count": model.instances,
        "kind": Word(row.kind),
        **({"profile": profiles} if len(profiles) > 1 else {}),
    }


def _batching(model: Model) -> dict[str, Any]:
    """Preferred sizes are for engines with profiles alone, as Triton's user guide advises."""
    preferred = {"preferred_batch_size": model.preferred} if model.preferred else {}
    return {**preferred, "max_queue_delay_microseconds": model.queue_delay_us}


def _largest(model: Model) -> list[int]:
    """Faces in calls that are made before the first request, beside one."""
    return model.preferred or [min(16, model.max_batch)]


def _warm_up(model: Model, row: Served, count: int) -> dict[str, Any]:
    dims = [*model.face_shape] if row.batches else [count, *model.face_shape]
    tensor = {"data_type": Word("TYPE_UINT8"), "dims": dims, "random_data": True}
    return {
        "name": f"{count} {'face' if count == 1 else 'faces'}",
        "batch_size": count if row.batches else 1,
        "inputs": [{"key": "faces", "value": tensor}],
    }


def to_text(message: Mapping[str, Any], indent: str = "") -> str:
    """A message in protobuf's text format: lists of messages as repeated fields, maps as lists of key and value.

    Source: protobuf's "Text Format Language Specification".
    """
    return "".join(_field(name, value, indent) for name, value in message.items())


def _field(name: str, value: Any, indent: str) -> str:
    if isinstance(value, Mapping):
        inside = to_text(value, f"{indent}  ")
        return f"{indent}{name} {{\n{inside}{indent}}}\n"
    if isinstance(value, Sequence) and not isinstance(value, str):
        if any(isinstance(each, Mapping) for each in value):
            return "".join(_field(name, each, indent) for each in value)
        return f"{indent}{name}: [{', '.join(map(_scalar, value))}]\n"
    return f"{indent}{name}: {_scalar(value)}\n"


def _scalar(value: str | int) -> str:
    if isinstance(value, Word):
        return str(value)
    return json.dumps(value, ensure_ascii=False)
