"""Faces as batches on each device."""

from collections.abc import Iterator
from typing import Any

import lightning as L
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from emoexport.labels import EMOTIONS
from emoexport.train.dataset import Faces

__all__ = ["FaceBatches", "shuffled_faces", "soft_targets"]


class FaceBatches(L.LightningDataModule):
    """Training faces shared out among the processes, validation faces whole for each.

    The order of an epoch follows from the seed and the epoch's number alone. That every process validates on all
    faces costs little, and makes the figures those of one process.

    Batches are faces uint8 `(n, C, H, W)`, labels int64 `(n,)` and targets float32 `(n, L)`.
    """

    def __init__(self, train: Faces, validation: Faces, *, batch_size: int, soft_labels: float, seed: int) -> None:
        super().__init__()
        self.train, self.validation = train, validation
        self.batch_size, self.soft_labels, self.seed = batch_size, soft_labels, seed

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled batches of this process's share."""
        assert self.trainer is not None
        faces = _tensors(self.train, self.soft_labels)
        sampler: DistributedSampler[Any] = DistributedSampler(
            faces, num_replicas=self.trainer.world_size, rank=self.trainer.global_rank, shuffle=True, seed=self.seed
        )
        # Lightning begins the first epoch of a process before it says which, and before the epoch's random numbers.
        sampler.set_epoch(self.trainer.current_epoch)
        return DataLoader(
            faces,
            self.batch_size,
            sampler=sampler,
            drop_last=len(sampler) > self.batch_size,
            generator=torch.Generator(),
        )

    def val_dataloader(self) -> DataLoader[Any]:
        """All validation faces, in order."""
        return DataLoader(_tensors(self.validation, 0.0), 4 * self.batch_size)


def shuffled_faces(faces: Faces, batch_size: int, *, seed: int) -> Iterator[Tensor]:
    """Faces once in an order drawn by the seed, in batches uint8 `(n, C, H, W)` of one size.

    What is left over at the end is left out, unless it is all there is.
    """
    rows = np.random.default_rng(seed).permutation(len(faces))
    for start in range(0, max(1, len(faces) - batch_size + 1), batch_size):
        images = faces.images[rows[start : start + batch_size]]
        yield torch.from_numpy(images).permute(0, 3, 1, 2)


def _tensors(faces: Faces, soft_labels: float) -> TensorDataset:
    pictures = torch.from_numpy(faces.images).permute(0, 3, 1, 2).contiguous()
    targets = torch.from_numpy(soft_targets(faces, soft_labels))
    return TensorDataset(pictures, torch.from_numpy(faces.labels), targets)


def soft_targets(faces: Faces, weight: float) -> NDArray[np.float32]:
    """What the network is to answer, float32 `(N, L)`, rows sum to 1.

    Args:
        faces: N faces; where they have votes, these take part.
        weight: share of the votes in [0, 1]; the rest is the label.

    Source: label distributions of FER+, Barsoum et al. 2016 (arXiv:1608.01041).
    """
    targets: NDArray[np.float32] = np.eye(len(EMOTIONS), dtype=np.float32)[faces.labels]
    if faces.votes is None or weight == 0:
        return targets
    voted = ~np.isnan(faces.votes).any(axis=1)
    targets[voted] = (1 - weight) * targets[voted] + weight * faces.votes[voted]
    return targets
