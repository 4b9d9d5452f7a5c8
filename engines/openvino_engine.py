"""OpenVINO, on the CPU: one call with all cores, or a call in parts with a core or a few for each."""

import contextlib
import functools
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino import opset13
from openvino.frontend import FrontEndManager, NodeContext
from openvino.frontend.onnx import ConversionExtension

from emoexport.engines.base import GraphEngine, milliseconds_of
from emoexport.engines.cache import kept_in
from emoexport.engines.number_types import Executed, RuntimeLayer, executed_of
from emoexport.errors import BadInput
from emoexport.external_data import opsets_of
from emoexport.outcome import Outcome

__all__ = ["OpenVinoEngine", "OpenVinoThroughputEngine"]

_MOST_OPSETS = 1000
"""ONNX has 28 of them in 2026."""

_NUMBERS = {"f32": "fp32", "f16": "fp16", "bf16": "bf16", "i8": "int8", "u8": "int8"}
"""OpenVINO's names of types, and ours."""


@functools.cache
def _core() -> ov.Core:
    """One for the process, and never let go.

    Each has a CPU plugin that gives the thread a stack for signals, and puts back the one before when it goes. Where
    several go in another order than they came, one that is freed is put back, and Ctrl-C ends the process with a
    segmentation fault.
    """
    return ov.Core()


def _read(graph: Path) -> ov.Model:
    """An ONNX graph as that and nothing else.

    By itself OpenVINO takes a file for any format that it knows, among them one whose weights are in a file beside it.

    Raises:
        ValueError: if it is written in an opset that cannot be: OpenVINO counts down from it to one that it knows.
    """
    newest = max(opsets_of(graph), default=0)
    if newest > _MOST_OPSETS:
        raise ValueError(f"it names opset {newest}, and there is none.")
    frontend = _onnx()
    return frontend.convert(frontend.load(str(graph)))


@functools.cache
def _onnx() -> Any:
    frontend = FrontEndManager().load_by_framework("onnx")
    frontend.add_extension(ConversionExtension("Clip", _clip))
    return frontend


def _clip(node: NodeContext) -> list[ov.Output]:
    """A Clip with a minimum, a maximum or both, as graphs have it.

    OpenVINO's own conversion puts the largest number of its type in the place of a maximum that is left out, and ends
    the process where it knows no type, as after an operator that could not be converted.
    """
    data, *limits = (node.get_input(number) for number in range(node.get_input_size()))
    for limit, bound in zip(limits, (opset13.maximum, opset13.minimum), strict=False):
        data = bound(data, limit).output(0)
    return [data]


class OpenVinoEngine(GraphEngine):
    """The CPU plug-in, told to compute in FP32 whatever the graph leaves in floating point.

    Unless told so, OpenVINO computes FP32 graphs in BF16 on processors that have it.
    """

    backend = "openvino"
    runtime = f"OpenVINO {ov.__version__.partition('-')[0]}"
    hint: ClassVar[str] = "LATENCY"
    """OpenVINO's name for what it is to be good at."""

    def _load(self, graph: Path, threads: int | None, cache: Path | None) -> None:
        self._lock = threading.Lock()
        with contextlib.nullcontext() if cache is None else kept_in(cache / self.backend, graph) as folder:
            options = self._options(threads) | ({} if folder is None else {"CACHE_DIR": str(folder)})
            if self._sizes:
                sized = {size: self._compile_for(size, graph, options) for size in self._sizes}
                self._compiled = sized[max(sized)]
            else:
                sized, self._compiled = {}, _core().compile_model(_read(graph), "CPU", options)
        self._sized = {size: compiled.create_infer_request() for size, compiled in sized.items()}
        streams = 0 if sized else self._compiled.get_property("NUM_STREAMS")
        self._requests = [self._compiled.create_infer_request() for _ in range(streams)]

    def _compile_for(self, size: int, graph: Path, options: dict[str, str]) -> Any:
        """The graph for calls of so many faces, each with all cores: small ones gain nothing from streams."""
        model = _read(graph)
        model.reshape([size, *self.face_shape])
        return _core().compile_model(model, "CPU", options | {"PERFORMANCE_HINT": OpenVinoEngine.hint})

    def _options(self, threads: int | None) -> dict[str, str]:
        options = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": self.hint}
        if self._profiled:
            options["PERF_COUNT"] = "YES"
        if threads:
            options["INFERENCE_NUM_THREADS"] = str(threads)
        return options

    def executed(self, faces: NDArray[np.uint8]) -> Executed:
        """What its execution graph says of a call with these faces.

        Source: OpenVINO's "CPU device": `runtimePrecision` and `execTimeMcs` of each node of the compiled model.
        """
        if not self._profiled:
            return Executed()
        self.run(faces)
        return executed_of([_layer(node.get_rt_info()) for node in self._compiled.get_runtime_model().get_ops()])

    def _run(self, faces: NDArray[np.uint8]) -> Outcome:
        return Outcome(*self._infer(faces, *Outcome._fields))

    def _scores(self, faces: NDArray[np.uint8]) -> NDArray[np.float32]:
        return self._infer(faces, "scores")[0]

    def split(self, faces: NDArray[np.uint8]) -> tuple[float, float, float] | None:
        """Milliseconds to fill the requests' tensors, until the last request is done, and to put outcomes together.

        It is not told where the engine was opened for some sizes.
        """
        self._refuse(faces)
        if self._sizes:
            return None
        parts = np.array_split(faces, min(len(self._requests), len(faces)))
        requests = self._requests[: len(parts)]

        def fill() -> None:
            for request, part in zip(requests, parts, strict=True):
                request.get_tensor("faces").shape = part.shape
                request.get_tensor("faces").data[:] = part

        with self._lock:
            before, within, after = milliseconds_of(
                fill, lambda: _compute(requests, [None] * len(parts)), lambda: _fetch(requests, Outcome._fields)
            )
        return before, within, after

    def _infer(self, faces: NDArray[np.uint8], *outputs: str) -> list[NDArray[Any]]:
        """Outputs of all faces, computed in as many parts as there are streams, of one size within a face."""
        if self._sizes:
            if len(faces) not in self._sized:
                raise BadInput(f"found {len(faces)} faces in a call; {self.name} was opened for {self._sizes} of them.")
            with self._lock:
                request = self._sized[len(faces)]
                _compute([request], [{"faces": faces}])
                return _fetch([request], outputs)
        parts = np.array_split(faces, min(len(self._requests), len(faces)))
        requests = self._requests[: len(parts)]
        with self._lock:  # the requests hold what goes in and what comes out
            _compute(requests, [{"faces": part} for part in parts])
            return _fetch(requests, outputs)


def _compute(requests: Sequence[Any], inputs: Sequence[dict[str, NDArray[np.uint8]] | None]) -> None:
    """Start every request, with what is in its tensors where nothing is given, and wait for all."""
    try:
        for request, given in zip(requests, inputs, strict=True):
            request.start_async(given)
    finally:
        for request in requests:
            request.wait()


def _fetch(requests: Sequence[Any], outputs: Sequence[str]) -> list[NDArray[Any]]:
    found = [[request.get_tensor(name).data for request in requests] for name in outputs]
    return [np.concatenate(pieces) for pieces in found]


def _layer(told: Any) -> RuntimeLayer:
    kind, number, time = (
        told[name].astype(str) if name in told else "" for name in ("layerType", "runtimePrecision", "execTimeMcs")
    )
    return RuntimeLayer(
        kind=kind,
        number=_NUMBERS.get(number, ""),
        time=float(time) if time.isdecimal() else 0.0,  # or not executed
    )


class OpenVinoThroughputEngine(OpenVinoEngine):
    """The same graph in streams that work side by side: more faces a second, and more time for a single one."""

    backend = "openvino-throughput"
    hint = "THROUGHPUT"
