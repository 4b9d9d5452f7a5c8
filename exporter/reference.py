"""The reference: a plain float32 loop over members and views. It judges everything else.

It is written for reading, not for speed, and shares no code with the fold except what the views are.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from emoexport.decision import Decision
from emoexport.outcome import Outcome
from emoexport.views import View

__all__ = ["Reference"]


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Members, views, vote and decision of an ensemble, run one pass after the other.

    A member maps faces `(n, C, H, W)` in [0, 1] to logits `(n, L)`; what it normalises it does itself. Passes
    are made where the members are, on the CPU or a GPU.
    """

    members: Sequence[nn.Module]
    views: Sequence[View]
    decision: Decision
    weights: NDArray[np.float64] | None = None
    """Of each pass in the vote, `(K, V)`, of any sum; None for equal ones. A pass of weight 0 is not made."""
    batch_size: int = 256

    def scores(
        self, faces: NDArray[np.uint8], *, progress: Callable[[int], object] | None = None
    ) -> NDArray[np.float32]:
        """Probabilities of every pass.

        Args:
            faces: uint8 `(N, H, W, C)`.
            progress: called with the number of faces done after each batch.

        Returns:
            float32 `(N, K, V, L)`; 0 where a pass is not made.
        """
        weights = next(self.members[0].parameters())
        shape = len(self.members), len(self.views), len(self.decision.labels)
        made = np.ones(shape[:2]) if self.weights is None else self.weights
        batches = []
        with torch.inference_mode():
            for start in range(0, len(faces), self.batch_size):
                batch = torch.from_numpy(np.ascontiguousarray(faces[start : start + self.batch_size]))
                pictures = batch.to(weights.device).permute(0, 3, 1, 2).to(weights.dtype) / 255
                scores = torch.zeros(len(batch), *shape, dtype=weights.dtype, device=weights.device)
                for k, member in enumerate(self.members):
                    for v, view in enumerate(self.views):
                        if made[k, v]:
                            scores[:, k, v] = member(view(pictures)).softmax(dim=-1)
                batches.append(scores.cpu().numpy())
                if progress is not None:
                    progress(len(batch))
        return np.concatenate(batches)

    def run(self, faces: NDArray[np.uint8], *, progress: Callable[[int], object] | None = None) -> Outcome:
        """Vote and decide: faces uint8 `(N, H, W, C)` to N outcomes; `progress` as in `scores`."""
        scores = self.scores(faces, progress=progress)
        return self.decision.decide(np.average(scores, axis=(1, 2), weights=self.weights))
