"""One network in training: loss, augmentation, schedule, averaged weights, validation."""

from collections.abc import Iterable, Iterator
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, CosineAnnealingWarmRestarts, LinearLR, LRScheduler, SequentialLR
from torch.optim.swa_utils import AveragedModel
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from emoexport.train.augment import FaceAugmentation
from emoexport.train.batch_norm import estimate_statistics
from emoexport.train.config import RunConfig
from emoexport.train.emotenet import ConvNeXtEmoteNet
from emoexport.train.standing import WeightsName

__all__ = ["MemberTraining", "metric_name"]

Batch = tuple[Tensor, Tensor, Tensor]


def metric_name(weights: WeightsName) -> str:
    """What the validation accuracy of the `network`, its `ema` or its `swa` is called in the history."""
    return "validation_accuracy" if weights == "network" else f"validation_accuracy_{weights}"


class MemberTraining(L.LightningModule):
    """Cross entropy with soft targets, self-distillation, AdamW, warm-up and cosine restarts, EMA and SWA.

    Batches are faces uint8 `(n, C, H, W)`, labels int64 `(n,)` and targets float32 `(n, L)` whose rows sum to 1.

    Every epoch draws its random numbers from the seed and its own number, so that an epoch repeated after a
    kill is the same epoch.

    Sources: SWA, Izmailov et al. 2018 (arXiv:1803.05407); learning from averaged weights, Tarvainen and
    Valpola 2017 (arXiv:1703.01780); distillation, Hinton et al. 2015 (arXiv:1503.02531); cosine restarts,
    Loshchilov and Hutter 2017 (arXiv:1608.03983).
    """

    def __init__(self, config: RunConfig, network: ConvNeXtEmoteNet) -> None:
        super().__init__()
        settings = config.training
        self.settings = settings
        self.network = network.to(memory_format=torch.channels_last)
        self.augment = FaceAugmentation(settings.augmentation, emotion_specific=settings.emotion_specific)
        labels = len(config.model.labels)
        self.train_accuracy = MulticlassAccuracy(labels, average="micro")
        self.macro_f1 = MulticlassF1Score(labels, average="macro")
        self.ema: ModelEmaV3 | None = None
        self.swa: AveragedModel | None = None
        if settings.ema_decay:
            self.ema = ModelEmaV3(self.network, decay=settings.ema_decay, use_warmup=True)
            self.ema.requires_grad_(False)
        if 0 < settings.swa_from <= settings.epochs:
            self.swa = AveragedModel(self.network)
            self.swa.requires_grad_(False)
        self.accuracies = nn.ModuleDict(
            {name: MulticlassAccuracy(labels, average="micro") for name in self.all_weights()}
        )

    def all_weights(self) -> dict[WeightsName, nn.Module]:
        """The network, and its averages as far as they have begun, by the names they have in reports."""
        found: dict[WeightsName, nn.Module] = {"network": self.network}
        if self.ema is not None:
            found["ema"] = self.ema.module
        if self.swa is not None:
            found["swa"] = self.swa.module
        return found

    def ready_weights(self) -> dict[WeightsName, nn.Module]:
        """Those of `all_weights` that can be judged: SWA once it has averaged something."""
        found = self.all_weights()
        if self.swa is not None and not int(self.swa.n_averaged):
            found.pop("swa")
        return found

    @property
    def phase(self) -> int:
        """Which part of the training this epoch is in, from 0."""
        count = len(self.settings.phases)
        return min(count - 1, self.current_epoch * count // self.settings.epochs)

    @property
    def teacher(self) -> nn.Module | None:
        """Whom the network learns from in this epoch: its SWA weights, else its EMA."""
        if not 0 < self.settings.distill_from <= self.current_epoch + 1:
            return None
        ready = self.ready_weights()
        return ready.get("swa") or ready.get("ema")

    def on_train_epoch_start(self) -> None:
        """Seed, set the strength of the augmentation, and log what drives the epoch."""
        torch.manual_seed(self.settings.seed + 1_000_003 * (self.current_epoch + 1) + self.global_rank)
        self.augment.phase = self.settings.phases[self.phase]
        self.network.train()
        for name, weights in self.all_weights().items():
            if name != "network":
                weights.eval()
        self.log("learning_rate", float(self.trainer.optimizers[0].param_groups[0]["lr"]))
        self.log("augmentation", self.augment.phase * self.settings.augmentation)

    def training_step(self, batch: Batch, _: int) -> Tensor:
        """The loss of a batch."""
        faces, labels, targets = batch
        with torch.autocast(faces.device.type, enabled=False):
            pictures = self.augment(faces.float() / 255, labels).clamp(0, 1)
        pictures = pictures.contiguous(memory_format=torch.channels_last)
        logits = self.network(pictures).float()
        loss = F.cross_entropy(logits, targets, label_smoothing=self.settings.label_smoothing)
        if self.teacher is not None:
            loss = self._distilled(loss, logits, pictures, self.teacher)
        self.train_accuracy(logits, labels)
        self.log("train_loss", loss, on_step=False, on_epoch=True, sync_dist=True)
        self.log("train_accuracy", self.train_accuracy, on_step=False, on_epoch=True)
        return loss

    def _distilled(self, loss: Tensor, logits: Tensor, pictures: Tensor, teacher: nn.Module) -> Tensor:
        """Mix the loss with the divergence from the teacher, at a raised temperature (Hinton et al. 2015)."""
        share, temperature = self.settings.distill_weight, self.settings.distill_temperature
        with torch.no_grad():
            wanted = F.log_softmax(teacher(pictures).float() / temperature, dim=-1)
        found = F.log_softmax(logits / temperature, dim=-1)
        divergence = F.kl_div(found, wanted, reduction="batchmean", log_target=True) * temperature**2
        return (1 - share) * loss + share * divergence

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then move the moving average."""
        super().optimizer_step(*args, **kwargs)
        if self.ema is not None:
            self.ema.update(self.network, step=self.global_step)

    def on_validation_epoch_start(self) -> None:
        """Add this epoch's weights to the SWA."""
        if self.swa is None or self.current_epoch + 1 < self.settings.swa_from:
            return
        self.swa.update_parameters(self.network)
        estimate_statistics(self.swa.module, self._training_faces())
        self.swa.eval()

    def _training_faces(self) -> Iterator[Tensor]:
        loader: Iterable[Batch] = self.trainer.train_dataloader or ()
        for faces, _, _ in loader:
            yield faces.to(self.device)

    def validation_step(self, batch: Batch, _: int) -> None:
        """The figures of the network and of its averages over the validation faces, each seen once, as it is."""
        faces, labels, _targets = batch
        pictures = (faces.float() / 255).contiguous(memory_format=torch.channels_last)
        for name, weights in self.ready_weights().items():
            logits = weights(pictures).float()
            accuracy = self.accuracies[name]
            accuracy(logits, labels)
            # Every process sees all validation faces: nothing to add up between them.
            self.log(metric_name(name), accuracy, on_epoch=True)  # type: ignore[arg-type]  # a Metric, kept as Module
            if name == "network":
                self.macro_f1(logits, labels)
                self.log("validation_macro_f1", self.macro_f1, on_epoch=True)
                self.log("validation_loss", F.cross_entropy(logits, labels), on_epoch=True)

    def configure_optimizers(self) -> Any:
        """AdamW without decay on biases and norms, and the schedule, by step."""
        settings = self.settings
        optimizer = create_optimizer_v2(
            self.network, opt="adamw", lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        steps = int(self.trainer.estimated_stepping_batches)
        warmup = max(1, min(steps - 1, round(steps * settings.warmup_epochs / settings.epochs)))
        schedule = SequentialLR(
            optimizer,
            [
                LinearLR(optimizer, start_factor=0.01, total_iters=warmup),
                self._cosine(optimizer, max(1, steps - warmup), steps / settings.epochs),
            ],
            milestones=[warmup],
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _cosine(self, optimizer: torch.optim.Optimizer, steps: int, steps_an_epoch: float) -> LRScheduler:
        """One cosine over `steps`, or a new one every `restart_epochs`."""
        if not self.settings.restart_epochs:
            return CosineAnnealingLR(optimizer, T_max=steps)
        return CosineAnnealingWarmRestarts(optimizer, T_0=max(1, round(self.settings.restart_epochs * steps_an_epoch)))
