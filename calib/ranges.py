"""What ranges the activations of a graph have on real faces, and the record of how they were found."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod
from onnxruntime.quantization.calibrate import create_calibrator

from emoexport.config import Record
from emoexport.errors import BadData

__all__ = ["Calibration", "activation_ranges"]


class Calibration(Record):
    """`calibration.json`."""

    schema_version: Literal[1] = 1
    method: Literal["min-max"] = "min-max"
    data: str
    """Where the faces are from."""
    data_sha256: str
    """Of the split they were chosen from."""
    face_hashes: tuple[str, ...]
    """Of the pixels of each face."""
    graph_sha256: str
    """Of the FP32 graph whose tensors are named."""
    ranges: dict[str, tuple[float, float]]
    """Tensor name to its lowest and highest value."""


def activation_ranges(
    graph: Path,
    faces: NDArray[np.uint8],
    *,
    scratch: Path,
    operators: Sequence[str],
    batch_size: int = 8,
    progress: Callable[[int], object] = lambda _: None,
) -> dict[str, tuple[float, float]]:
    """Run the FP32 graph on faces and keep the extremes of what feeds the given operators.

    Memory stays bounded by a batch: extremes are reduced in the graph.

    Args:
        graph: the FP32 graph.
        faces: uint8 `(N, H, W, C)`.
        scratch: a directory for the graph with the extremes as outputs.
        operators: operator types whose inputs and outputs are observed.
        batch_size: faces in a call.
        progress: called with the number of faces done after each batch.

    Returns:
        Tensor name to (lowest, highest).

    Raises:
        BadData: if an activation is not finite.
    """
    calibrator = create_calibrator(
        graph,
        list(operators),
        augmented_model_path=str(scratch / "calibrated.onnx"),
        calibrate_method=CalibrationMethod.MinMax,
        providers=["CPUExecutionProvider"],
    )
    for start in range(0, len(faces), batch_size):
        batch = faces[start : start + batch_size]
        calibrator.collect_data(_Batches([batch]))
        progress(len(batch))
    ranges = {}
    for name, found in calibrator.compute_data().items():
        low, high = (float(np.asarray(value).item()) for value in found.range_value)
        if not np.isfinite([low, high]).all():
            raise BadData(f"the activation '{name}' reaches {low} to {high} on the calibration faces.")
        ranges[name] = (low, high)
    return ranges


class _Batches(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, batches: Sequence[NDArray[np.uint8]]) -> None:
        self.batches: Iterator[NDArray[np.uint8]] = iter(batches)

    def get_next(self) -> Any:
        batch = next(self.batches, None)
        return None if batch is None else {"faces": batch}
