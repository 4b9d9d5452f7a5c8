"""Batch-norm statistics of averaged weights: no face has ever passed through an average of networks."""

from collections.abc import Iterable, Iterator
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn

__all__ = ["BATCHES", "estimate_statistics"]

BATCHES = 50
"""Of training faces: as many are looked at."""


def estimate_statistics(network: nn.Module, batches: Iterable[Tensor]) -> int:
    """Estimate mean and variance of every batch norm anew, in place; nothing is done where there is none.

    Args:
        network: maps pictures `(n, C, H, W)` in [0, 1] to logits.
        batches: training faces in random order, uint8 `(n, C, H, W)`, where the network is; `BATCHES` are taken.

    Returns:
        How many faces were looked at; 0 where there is no batch norm.

    Source: SWA, Izmailov et al. 2018 (arXiv:1803.05407), as `torch.optim.swa_utils.update_bn`.
    """
    if not any(isinstance(module, _BatchNorm) for module in network.modules()):
        return 0
    seen = 0

    def pictures() -> Iterator[Tensor]:
        nonlocal seen
        for faces in islice(batches, BATCHES):
            seen += len(faces)
            yield faces.to(torch.float32) / 255

    update_bn(pictures(), network)
    return seen
