"""OpenVINO, on the CPU."""

from pathlib import Path

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from emoexport.engines.base import GraphEngine
from emoexport.outcome import Outcome

__all__ = ["OpenVinoEngine"]


class OpenVinoEngine(GraphEngine):
    """The CPU plug-in, told to compute in FP32 whatever the graph leaves in floating point.

    Unless told so, OpenVINO computes FP32 graphs in BF16 on processors that have it.
    """

    backend = "openvino"
    runtime = f"OpenVINO {ov.__version__}"

    def _load(self, graph: Path, threads: int | None) -> None:
        options = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
        if threads:
            options["INFERENCE_NUM_THREADS"] = str(threads)
        self._request = ov.Core().compile_model(str(graph), "CPU", options).create_infer_request()

    def _run(self, faces: NDArray[np.uint8]) -> Outcome:
        results = self._request.infer({"faces": faces})
        return Outcome(*(np.array(results[name]) for name in Outcome._fields))

    def _scores(self, faces: NDArray[np.uint8]) -> NDArray[np.float32]:
        return np.array(self._request.infer({"faces": faces})["scores"])
