"""AOTInductor: what PyTorch's compiler made of the fold when the bundle was built."""

import logging
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from emoexport.engines.base import GraphEngine
from emoexport.outcome import Outcome

__all__ = ["InductorEngine"]


class InductorEngine(GraphEngine):
    """A package of machine code and weights, which holds to the machine it was compiled on.

    Whether this is such a machine stands in the bundle's manifest; what is loaded here is run.
    """

    backend = "inductor"
    runtime = f"PyTorch {torch.__version__}"

    def _load(self, graph: Path, threads: int | None, cache: Path | None) -> None:  # noqa: ARG002 (it keeps none)
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it looks for CUDA, and says so
        self._package = torch._inductor.aoti_load_package(str(graph))
        if threads:
            torch.set_num_threads(threads)

    def _run(self, faces: NDArray[np.uint8]) -> Outcome:
        return Outcome(*(result.numpy() for result in self._call(faces)[:3]))

    def _scores(self, faces: NDArray[np.uint8]) -> NDArray[np.float32]:
        return self._call(faces)[3].numpy()

    @torch.inference_mode()
    def _call(self, faces: NDArray[np.uint8]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        found: tuple[Tensor, Tensor, Tensor, Tensor] = self._package(torch.from_numpy(faces))
        return found
