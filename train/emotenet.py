"""The network of one member: a timm backbone that takes pictures in [0, 1]."""

import timm
import torch
from torch import Tensor, nn

from emoexport.errors import UsageError
from emoexport.train.config import ModelConfig

__all__ = ["ConvNeXtEmoteNet"]


class ConvNeXtEmoteNet(nn.Module):
    """A backbone with its input normalisation inside, so that no caller can normalise differently.

    Raises:
        UsageError: if timm has no such backbone, or it does not take the arguments.

    Source: ConvNeXt, Liu et al. 2022 (arXiv:2201.03545), for the backbones of the presets.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        for name, values in (("mean", config.mean), ("std", config.std)):
            self.register_buffer(name, torch.tensor(values).reshape(-1, 1, 1), persistent=False)
        try:
            self.backbone = timm.create_model(
                config.backbone,
                in_chans=config.channels,
                num_classes=len(config.labels),
                drop_rate=config.head_dropout,
                drop_path_rate=config.drop_path_rate,
                **config.backbone_args,
            )
        except (RuntimeError, TypeError, ValueError, AssertionError, LookupError) as err:
            raise UsageError(
                f"timm cannot make '{config.backbone}' with {config.backbone_args or 'no arguments'}: {err}"
            ) from err

    def forward(self, pictures: Tensor) -> Tensor:
        """Pictures `(n, C, H, W)` in [0, 1] to logits `(n, L)`."""
        logits: Tensor = self.backbone((pictures - self.mean) / self.std)
        return logits
