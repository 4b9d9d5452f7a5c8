"""OpenVINO, on the CPU."""

from pathlib import Path

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from emoexport.engines.base import Engine
from emoexport.errors import BadBundle
from emoexport.outcome import Outcome

__all__ = ["OpenVinoEngine"]


class OpenVinoEngine(Engine):
    """The CPU plug-in, with FP32 as the highest and lowest precision of what the graph leaves in floating point.

    Unless told so, OpenVINO computes FP32 graphs in BF16 on processors that have it.

    Raises:
        BadBundle: if the runtime refuses the graph.
    """

    backend = "openvino"

    def __init__(
        self,
        graph: Path,
        *,
        precision: str,
        face_shape: tuple[int, int, int],
        max_batch: int,
        threads: int | None = None,
    ) -> None:
        super().__init__(precision=precision, face_shape=face_shape, max_batch=max_batch)
        options = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
        if threads:
            options["INFERENCE_NUM_THREADS"] = str(threads)
        try:
            self._model = ov.Core().compile_model(str(graph), "CPU", options)
        except Exception as err:  # the runtime's exceptions share no base but this
            raise BadBundle(f"OpenVINO {ov.__version__} cannot load {graph.name}: {err}") from err
        self._request = self._model.create_infer_request()

    def _run(self, faces: NDArray[np.uint8]) -> Outcome:
        results = self._request.infer({"faces": faces})
        probabilities, label, confidence = (
            np.array(results[name]) for name in ("probabilities", "label", "confidence")
        )
        return Outcome(probabilities, label, confidence)
