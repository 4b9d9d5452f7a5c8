"""One network in training: loss, augmentation, schedule, validation accuracy."""

from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR
from torchmetrics.classification import MulticlassAccuracy

from emoexport.train.augment import augmentation
from emoexport.train.config import RunConfig
from emoexport.train.emotenet import ConvNeXtEmoteNet

__all__ = ["MemberTraining"]

Batch = tuple[Tensor, Tensor]


class MemberTraining(L.LightningModule):
    """AdamW, linear warm-up and cosine decay by step, cross entropy with smoothed labels.

    Batches are faces uint8 `(n, C, H, W)` and labels int64 `(n,)`.
    """

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        self.config = config.training
        self.network = ConvNeXtEmoteNet(config.model).to(memory_format=torch.channels_last)
        self.augment = augmentation(config.training.augmentation)
        self.accuracy = MulticlassAccuracy(len(config.model.labels), average="micro")

    def training_step(self, batch: Batch, _: int) -> Tensor:
        """The loss of a batch."""
        faces, labels = batch
        with torch.autocast(faces.device.type, enabled=False):
            pictures = self.augment(faces.float() / 255).clamp(0, 1)
        logits = self.network(pictures.contiguous(memory_format=torch.channels_last))
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=self.config.label_smoothing)
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Batch, _: int) -> None:
        """The accuracy over the validation faces, each seen once, as it is."""
        faces, labels = batch
        logits = self.network(faces.float() / 255).float()
        self.accuracy(logits, labels)
        self.log("validation_loss", F.cross_entropy(logits, labels), on_epoch=True)
        self.log("validation_accuracy", self.accuracy, on_epoch=True)

    def configure_optimizers(self) -> Any:
        """AdamW without decay on biases and norms, and the schedule."""
        optimizer = create_optimizer_v2(
            self.network,
            opt="adamw",
            lr=self.config.learning_rate,
            weight_decay=self.config.weight_decay,
        )
        steps = int(self.trainer.estimated_stepping_batches)
        warmup = max(1, min(steps - 1, round(steps * self.config.warmup_epochs / self.config.epochs)))
        schedule = SequentialLR(
            optimizer,
            [
                LinearLR(optimizer, start_factor=0.01, total_iters=warmup),
                CosineAnnealingLR(optimizer, T_max=max(1, steps - warmup)),
            ],
            milestones=[warmup],
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
