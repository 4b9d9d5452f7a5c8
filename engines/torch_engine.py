"""PyTorch: the reference loop behind the interface of an engine, as the rival that every bench has."""

import numpy as np
import torch
from numpy.typing import NDArray

from emoexport.engines.base import Engine
from emoexport.outcome import Outcome
from emoexport.reference import Reference

__all__ = ["TorchEngine"]


class TorchEngine(Engine):
    """The eager float32 loop over members and views. It compiles nothing, so it is opened from the members."""

    backend = "torch"

    def __init__(
        self,
        reference: Reference,
        *,
        face_shape: tuple[int, int, int],
        max_batch: int,
        threads: int | None = None,
    ) -> None:
        super().__init__(precision="fp32", face_shape=face_shape, max_batch=max_batch)
        self.reference = reference
        if threads:
            torch.set_num_threads(threads)

    def _run(self, faces: NDArray[np.uint8]) -> Outcome:
        return self.reference.run(faces)

    def _scores(self, faces: NDArray[np.uint8]) -> NDArray[np.float32]:
        return self.reference.scores(faces)
