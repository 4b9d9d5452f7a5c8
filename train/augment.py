"""Random changes of the training faces, drawn anew for every face."""

import kornia.augmentation as K
from torch import nn

__all__ = ["augmentation"]


def augmentation(strength: float) -> nn.Module:
    """Mirror, move, scale, turn, light and cover faces `(N, C, H, W)` in [0, 1].

    Args:
        strength: 1 for the usual amount, 0 for no change; the extent of each change grows with it.
    """
    if strength == 0:
        return nn.Identity()
    changes: nn.Module = K.AugmentationSequential(
        K.RandomHorizontalFlip(p=0.5),
        K.RandomAffine(
            degrees=12 * strength,
            translate=(0.07 * strength, 0.07 * strength),
            scale=(1 - 0.12 * strength, 1 + 0.12 * strength),
            padding_mode="border",
            p=0.9,
        ),
        K.RandomBrightness((1 - 0.25 * strength, 1 + 0.25 * strength), p=0.5),
        K.RandomContrast((1 - 0.25 * strength, 1 + 0.25 * strength), p=0.5),
        K.RandomErasing(scale=(0.02, 0.02 + 0.13 * strength), p=0.3),
        data_keys=["input"],
    )
    return changes
