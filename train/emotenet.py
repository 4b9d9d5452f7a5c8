"""The network of one member: a timm backbone, and a head that looks at its feature maps on several scales.

pictures -> backbone -> feature pyramid -> attention -> learnable pooling -> channel calibration -> classifier

Every part but the backbone can be switched off by itself in `ModelConfig`.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import timm
import torch
from timm.layers import EcaModule, Format, SEModule
from timm.layers.cbam import CbamModule
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork

from emoexport.errors import UsageError
from emoexport.train.config import ModelConfig

__all__ = ["SCALES", "ConvNeXtEmoteNet", "create_backbone"]

SCALES = 3
"""How many of the backbone's feature maps the pyramid takes, from the last."""


class ConvNeXtEmoteNet(nn.Module):
    """Pictures in [0, 1] to logits; the input normalisation is inside, so that no caller can do it differently.

    The names of the weights begin with their part: `backbone`; `pyramid`; `attention` and `pooling`, with the
    number of the scale, the finest first; `norm`, over the pooled scales side by side; `calibration`; `classifier`.

    Raises:
        UsageError: as `create_backbone`.

    Source: ConvNeXt, Liu et al. 2022 (arXiv:2201.03545), for the backbones of the presets; feature pyramid,
    Lin et al. 2017 (arXiv:1612.03144).
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        for name, values in (("mean", config.mean), ("std", config.std)):
            self.register_buffer(name, torch.tensor(values).reshape(-1, 1, 1), persistent=False)
        self.backbone = create_backbone(config)
        # Swin and a few others compute with the channels last; the wrappers of plain transformers turn their maps.
        self.turns_maps = getattr(self.backbone, "output_fmt", Format.NCHW) == Format.NHWC
        widths: list[int] = self.backbone.feature_info.channels()  # type: ignore[union-attr,operator]
        self.pyramid = FeaturePyramidNetwork(widths, config.pyramid_channels) if config.pyramid_channels else None
        if self.pyramid is not None:
            widths = [config.pyramid_channels] * len(widths)
        self.attention = nn.ModuleList(
            nn.Sequential(*(ATTENTION[name](width) for name in config.attention)) for width in widths
        )
        self.pooling = nn.ModuleList(MixedPooling(config.pooling, width) for width in widths)
        self.norm = nn.LayerNorm(sum(widths))
        self.calibration = ChannelCalibration(sum(widths)) if config.channel_calibration else nn.Identity()
        self.dropout = nn.Dropout(config.feature_dropout)
        self.classifier = _classifier(sum(widths), config)

    def forward(self, pictures: Tensor) -> Tensor:
        """Pictures `(n, C, H, W)` in [0, 1] to logits `(n, L)`."""
        maps: list[Tensor] = self.backbone((pictures - self.mean) / self.std)
        if self.turns_maps:
            maps = [one.permute(0, 3, 1, 2) for one in maps]
        if self.pyramid is not None:
            maps = list(self.pyramid(OrderedDict((str(i), one) for i, one in enumerate(maps))).values())
        pooled = [pool(attend(one)) for one, attend, pool in zip(maps, self.attention, self.pooling, strict=True)]
        features = self.calibration(self.norm(torch.cat(pooled, dim=1)))
        logits: Tensor = self.classifier(self.dropout(features))
        return logits


def create_backbone(config: ModelConfig, **loading: Any) -> nn.Module:
    """A timm backbone that turns pictures into a list of feature maps, the finest first.

    It gives its last `SCALES` maps (of a ConvNeXt or ResNet: strides 8, 16 and 32; of a plain transformer: the
    last blocks, all of one size), or the last alone where there is no pyramid. A 3x3 convolution over stride 4
    would cost three times those over the other three, for the features that have seen the fewest layers.

    Args:
        config: the backbone, and what it is made with. One that is built for a single size gets `image_size`.
        loading: where its weights come from, for `timm.create_model`.

    Raises:
        UsageError: if timm has no such backbone, it gives too few feature maps, or it does not take the arguments.
    """
    settings: dict[str, Any] = {
        "features_only": True,
        "out_indices": tuple(range(-SCALES if config.pyramid_channels else -1, 0)),
        "in_chans": config.channels,
        "drop_path_rate": config.drop_path_rate,
    }
    try:
        known = timm.get_pretrained_cfg(config.backbone)
        if known is not None and known.fixed_input_size:
            settings["img_size"] = config.image_size
        return _create_model(config.backbone, {**settings, **config.backbone_args, **loading})
    except (RuntimeError, TypeError, ValueError, AssertionError, AttributeError, LookupError) as err:
        raise UsageError(
            f"timm cannot make '{config.backbone}' with {config.backbone_args or 'no arguments'} for its last "
            f"{len(settings['out_indices'])} feature maps (features_only): {err}",
            hint="name another timm backbone; with pyramid_channels = 0 the last feature map is enough",
        ) from err


def _create_model(name: str, settings: dict[str, Any]) -> nn.Module:
    try:
        model: nn.Module = timm.create_model(name, **settings)
    except TypeError:
        if settings["drop_path_rate"]:
            raise
        model = timm.create_model(name, **{**settings, "drop_path_rate": None})  # VGG and its age have no such thing
    return model


class ChannelAttention(EcaModule):  # type: ignore[misc]  # timm publishes no types
    """Efficient channel attention, with a gate that broadcasts: timm expands it, by a size read from the graph's input.

    Source: ECA, Wang et al. 2020 (arXiv:1910.03151).
    """

    def forward(self, features: Tensor) -> Tensor:
        """Features `(n, C, h, w)` to the same shape."""
        gate: Tensor = self.gate(self.conv(features.mean(dim=(2, 3)).unsqueeze(1)))  # (n, 1, C)
        return features * gate.transpose(1, 2).unsqueeze(-1)


ATTENTION: dict[str, type[nn.Module]] = {"se": SEModule, "eca": ChannelAttention, "cbam": CbamModule}
"""Squeeze-and-excitation, Hu et al. 2018 (arXiv:1709.01507); ECA; convolutional block attention over channels, then
over places, Woo et al. 2018 (arXiv:1807.06521)."""


class MixedPooling(nn.Module):
    """A map to one value a channel by several poolings, mixed by learned weights that sum to 1.

    Source: mixed max-average pooling, Lee et al. 2016 (arXiv:1509.08985), here of any poolings over the whole map.
    """

    def __init__(self, names: tuple[str, ...], width: int) -> None:
        super().__init__()
        self.pools = nn.ModuleDict({name: POOLING[name](width) for name in names})
        self.mixture = nn.Parameter(torch.zeros(len(names))) if len(names) > 1 else None

    def forward(self, features: Tensor) -> Tensor:
        """Features `(n, C, h, w)` to `(n, C)`, computed at least in float32 where autocast made them less."""
        places = features.flatten(2).to(torch.promote_types(features.dtype, torch.float32))
        pooled = torch.cat([pool(places) for pool in self.pools.values()], dim=-1)
        if self.mixture is not None:
            pooled = pooled * self.mixture.softmax(dim=0)
        return pooled.sum(dim=-1)


class PlainPooling(nn.Module):
    """The mean of all places by `torch.mean`, or the largest by `torch.amax`."""

    def __init__(self, reduce: Callable[..., Tensor]) -> None:
        super().__init__()
        self.reduce = reduce

    def forward(self, places: Tensor) -> Tensor:
        """Features `(n, C, places)` to `(n, C, 1)`."""
        return self.reduce(places, dim=-1, keepdim=True)


class GeneralizedMeanPooling(nn.Module):
    """mean(x^p)^(1/p) over all places, of positive x and a learned p: the average at 1, towards the maximum above.

    Source: GeM, Radenovic et al. 2018 (arXiv:1711.02512).
    """

    def __init__(self) -> None:
        super().__init__()
        self.power = nn.Parameter(torch.full((1,), 3.0))

    def forward(self, places: Tensor) -> Tensor:
        """Features `(n, C, places)` to `(n, C, 1)`."""
        power = self.power.clamp(min=1)
        positive = places.clamp(min=1e-4)  # FP16 is exact down to 6e-5
        # As shares of the largest no power overflows FP16; the largest cancels, and with it its gradient.
        largest = positive.amax(dim=-1, keepdim=True).detach()
        return largest * (positive / largest).pow(power).mean(dim=-1, keepdim=True).pow(1 / power)


class AttentionPooling(nn.Module):
    """The mean over all places, weighted by how well each answers one learned query.

    Source: attention pooling, Ilse et al. 2018 (arXiv:1802.04712), with a linear score.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query = nn.Conv1d(width, 1, kernel_size=1, bias=False)

    def forward(self, places: Tensor) -> Tensor:
        """Features `(n, C, places)` to `(n, C, 1)`."""
        weights: Tensor = self.query(places).softmax(dim=-1)
        return (places * weights).sum(dim=-1, keepdim=True)


POOLING: dict[str, Callable[[int], nn.Module]] = {
    "avg": lambda _: PlainPooling(torch.mean),
    "max": lambda _: PlainPooling(torch.amax),
    "gem": lambda _: GeneralizedMeanPooling(),
    "attention": AttentionPooling,
}


class ChannelCalibration(nn.Module):
    """A gate in (0, 1) on each pooled feature, computed from all of them.

    Source: context gating, Miech et al. 2017 (arXiv:1706.06905).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, width)

    def forward(self, features: Tensor) -> Tensor:
        """Features `(n, F)` to `(n, F)`."""
        gate: Tensor = self.gate(features)
        return features * gate.sigmoid()


def _classifier(width: int, config: ModelConfig) -> nn.Sequential:
    """Linear, norm and GELU for each hidden width; dropout, and the last layer to the logits."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for number, hidden in enumerate(config.hidden, start=1):
        layers[f"hidden{number}"] = nn.Sequential(nn.Linear(width, hidden), nn.LayerNorm(hidden), nn.GELU())
        width = hidden
    if config.hidden:
        layers["dropout"] = nn.Dropout(config.head_dropout)
    layers["output"] = nn.Linear(width, len(config.labels))
    return nn.Sequential(layers)
