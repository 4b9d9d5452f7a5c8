"""ONNX Runtime, on the CPU."""

from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from emoexport.engines.base import Engine
from emoexport.errors import BadBundle
from emoexport.outcome import Outcome

__all__ = ["OnnxRuntimeEngine"]

_PROVIDER = "CPUExecutionProvider"


class OnnxRuntimeEngine(Engine):
    """The CPU provider. Other providers fall back to it without a word, so it is the only one asked for.

    Raises:
        BadBundle: if the runtime refuses the graph.
    """

    backend = "onnxruntime"

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
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads or 0
        try:
            self._session = ort.InferenceSession(graph, options, providers=[_PROVIDER])
        except Exception as err:  # the runtime's exceptions share no base but this
            raise BadBundle(f"ONNX Runtime {ort.__version__} cannot load {graph.name}: {err}") from err
        assert self._session.get_providers() == [_PROVIDER]

    def _run(self, faces: NDArray[np.uint8]) -> Outcome:
        return Outcome(*self._session.run(["probabilities", "label", "confidence"], {"faces": faces}))
