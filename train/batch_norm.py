"""Batch-norm statistics of averaged weights: no face has ever passed through an average of networks."""

from collections.abc import Iterable
from itertools import islice

from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

__all__ = ["BATCHES", "estimate_statistics"]

BATCHES = 50
"""Of training faces: as many are looked at."""


def estimate_statistics(network: nn.Module, batches: Iterable[Tensor]) -> None:
    """Estimate mean and variance of every batch norm anew, in place; where there is none, no face is read.

    Args:
        network: maps pictures `(n, C, H, W)` in [0, 1] to logits.
        batches: training faces in random order, uint8 `(n, C, H, W)`, where the network is; `BATCHES` are taken.

    Source: SWA, Izmailov et al. 2018 (arXiv:1803.05407), as `torch.optim.swa_utils.update_bn`.
    """
    update_bn((faces.float() / 255 for faces in islice(batches, BATCHES)), network)
