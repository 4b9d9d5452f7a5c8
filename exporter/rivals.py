"""What PyTorch itself makes of the same members, each way set up as its documentation advises: what engines must beat.

They get more than a user of PyTorch would write down: the views as one batch for each member, the vote on the device.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from emoexport.engines.base import Engine
from emoexport.fold import Autocast, Branches, Fold
from emoexport.outcome import Outcome

__all__ = ["RIVALS", "Rival", "RivalEngine", "rivals_for"]

_RECOMPILES = 64
"""Of one class, for all of its instances together: PyTorch's 8 are fewer than the batch sizes of two rivals."""


@dataclass(frozen=True, kw_only=True)
class Rival:
    """One row of `RIVALS`."""

    name: str
    title: str
    precision: str
    devices: tuple[str, ...]
    dtype: torch.dtype | None = None
    """Of automatic mixed precision; None for FP32."""
    compile_mode: str | None = None
    """Of `torch.compile`; `reduce-overhead` launches CUDA graphs."""

    @property
    def engine(self) -> str:
        """Its name among engines, which has the precision."""
        return f"{self.name}-{self.precision}"


RIVALS: Mapping[str, Rival] = {
    row.engine: row
    for row in (
        Rival(name="torch-batched", title="views as one batch", precision="fp32", devices=("cpu", "cuda")),
        Rival(
            name="torch-autocast",
            title="autocast to FP16, channels last",
            precision="fp16",
            devices=("cuda",),
            dtype=torch.float16,
        ),
        Rival(
            name="torch-autocast",
            title="autocast to BF16, channels last",
            precision="bf16",
            devices=("cpu", "cuda"),
            dtype=torch.bfloat16,
        ),
        Rival(
            name="torch-compile",
            title="torch.compile and CUDA graphs, autocast to FP16, channels last",
            precision="fp16",
            devices=("cuda",),
            dtype=torch.float16,
            compile_mode="reduce-overhead",
        ),
        Rival(
            name="torch-compile",
            title="torch.compile and CUDA graphs, autocast to BF16, channels last",
            precision="bf16",
            devices=("cuda",),
            dtype=torch.bfloat16,
            compile_mode="reduce-overhead",
        ),
    )
}


def rivals_for(device: str) -> Sequence[Rival]:
    """The rivals on a kind of device, in the order of the table."""
    return [row for row in RIVALS.values() if device in row.devices]


class RivalEngine(Engine):
    """A rival behind the interface of an engine: uint8 faces in host memory to outcomes there.

    Args:
        rival: a row of `RIVALS`.
        members: as they were trained; they are moved to the device, and those of a rival in fewer bits reordered.
        fold: what makes the fold of them, once they are one module.
        device: `cpu` or `cuda`.
        face_shape: `(H, W, C)`.
        max_batch: the largest number of faces in a call.

    Source: PyTorch's "Performance Tuning Guide" (channels last, automatic mixed precision, pinned memory, no gradients)
    and "torch.compile" (`mode="reduce-overhead"`, a graph for each shape).
    """

    backend = "torch"

    def __init__(
        self,
        rival: Rival,
        members: Sequence[nn.Module],
        fold: Callable[[nn.Module], Fold],
        *,
        device: str,
        face_shape: tuple[int, int, int],
        max_batch: int,
    ) -> None:
        super().__init__(precision=rival.precision, face_shape=face_shape, max_batch=max_batch)
        self._rival, self._device = rival, device
        together: nn.Module = Branches(members)
        if rival.dtype is not None:
            together.to(memory_format=torch.channels_last)
            together = Autocast(Branches(members), device=device, dtype=rival.dtype)
        whole = fold(together).eval().to(device)
        self._call: Callable[[Tensor], Any] = whole
        if rival.compile_mode is not None:
            # Beyond the limit PyTorch calls what it has not compiled, unasked; that is to be an error.
            strict = torch._dynamo.config.patch(recompile_limit=_RECOMPILES, fail_on_recompile_limit_hit=True)
            self._call = strict(torch.compile(whole, mode=rival.compile_mode, dynamic=False))
        self._faces = torch.empty((max_batch, *face_shape), dtype=torch.uint8, pin_memory=device == "cuda")

    @property
    def name(self) -> str:
        """The rival's."""
        return self._rival.engine

    def _run(self, faces: NDArray[np.uint8]) -> Outcome:
        return Outcome(*(result.cpu().numpy() for result in self._infer(faces)[:3]))

    def _scores(self, faces: NDArray[np.uint8]) -> NDArray[np.float32]:
        return self._infer(faces)[3].float().cpu().numpy()

    def _infer(self, faces: NDArray[np.uint8]) -> Sequence[Tensor]:
        some = self._faces[: len(faces)]
        some.copy_(torch.from_numpy(faces))
        with torch.inference_mode():
            found: Sequence[Tensor] = self._call(some.to(self._device, non_blocking=True))
        return found
