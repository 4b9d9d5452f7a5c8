"""Random changes of the training faces, drawn anew for every face.

How far each change may go depends on three things: `LIMITS`, the usual extent; `TABLE`, what an emotion's faces
bear of it; and the strength, which the phases of a training scale up. Places are fractions of an aligned face, so
all holds at any size.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

import torch
from kornia.enhance import adjust_brightness, adjust_contrast_with_mean_subtraction, adjust_gamma
from kornia.filters import gaussian_blur2d
from kornia.geometry.transform import get_affine_matrix2d, warp_affine
from torch import Tensor, nn

from emoexport.labels import EMOTIONS

__all__ = ["EYE_LINE", "LIMITS", "NOSE_LINE", "TABLE", "Amounts", "FaceAugmentation", "erase", "turn"]

EYE_LINE = 0.4
"""How far down an aligned face its eyes are, in heights: the middle that it turns about."""
NOSE_LINE = 0.55
"""Eyes and brows lie above it, the mouth below."""

_ERASED = 0.3  # the share of faces with a box
_LIGHTENED = 0.5  # the share that each change of light comes to
_SMALLEST_BOX = 0.15  # of the largest


@dataclass(frozen=True, kw_only=True)
class Amounts:
    """How far changes go: in the units below in `LIMITS`, as multiples of those in `TABLE`."""

    rotation: float = 1.0
    """Degrees, either way."""
    shift: float = 1.0
    """Fraction of the side, either way."""
    scale: float = 1.0
    """Logarithm of the factor, either way; so for contrast and gamma."""
    brightness: float = 1.0
    """Added to pixels in [0, 1], either way."""
    contrast: float = 1.0
    gamma: float = 1.0
    noise: float = 1.0
    """Standard deviation of what is added to pixels in [0, 1]."""
    blur: float = 1.0
    """Standard deviation of the Gaussian, as a fraction of the side."""
    erase_eyes: float = 1.0
    """Area of a box over eyes and brows, as a fraction of the face."""
    erase_mouth: float = 1.0
    """Area of a box over the mouth."""
    mirror: float = 1.0
    """The share of faces mirrored; not scaled by the strength."""
    reason: str = ""


LIMITS = Amounts(
    rotation=12.0,
    shift=0.07,
    scale=0.12,
    brightness=0.25,
    contrast=0.25,
    gamma=0.3,
    noise=0.04,
    blur=0.012,
    erase_eyes=0.15,
    erase_mouth=0.15,
    mirror=0.5,
    reason="At strength 1 people still read the expression.",
)

# AU n is an action unit of the Facial Action Coding System (Ekman, Friesen and Hager 2002). No label has a side, so
# every emotion may be mirrored.
TABLE: Mapping[str, Amounts] = {
    "angry": Amounts(
        contrast=0.6,
        gamma=0.7,
        noise=0.7,
        blur=0.7,
        erase_eyes=0.3,
        erase_mouth=0.6,
        reason="Rests on the lowered brow (AU4), which a box hides and hard shadows imitate; lips barely press.",
    ),
    "disgust": Amounts(
        rotation=1.3,
        shift=1.2,
        scale=1.2,
        contrast=0.8,
        noise=0.5,
        blur=0.4,
        erase_mouth=0.3,
        reason="Rests on the fine wrinkles of the nose (AU9) and the raised lip (AU10), so no blur; rarest, so its "
        "faces come again most often and must differ by pose.",
    ),
    "fear": Amounts(
        contrast=0.8,
        blur=0.7,
        erase_eyes=0.4,
        erase_mouth=0.4,
        reason="Parted from surprise by drawn brows (AU4) and stretched lips (AU20): with either hidden it is neither.",
    ),
    "happy": Amounts(
        rotation=1.2,
        brightness=1.2,
        contrast=1.2,
        gamma=1.2,
        noise=1.2,
        blur=1.2,
        erase_eyes=1.6,
        erase_mouth=0.5,
        reason="The smile (AU12) is large and stays readable without eyes, hardly without a mouth.",
    ),
    "sad": Amounts(
        rotation=0.8,
        contrast=0.7,
        noise=0.7,
        blur=0.6,
        erase_eyes=0.4,
        erase_mouth=0.4,
        reason="Slight everywhere: inner brows (AU1) and lip corners (AU15) move by a few pixels.",
    ),
    "surprise": Amounts(
        rotation=1.2,
        brightness=1.2,
        contrast=1.2,
        gamma=1.2,
        noise=1.2,
        blur=1.2,
        erase_eyes=1.4,
        erase_mouth=0.6,
        reason="The dropped jaw (AU26) and the raised brows (AU1 and 2) are large, and either tells it.",
    ),
    "neutral": Amounts(
        contrast=0.6,
        gamma=0.7,
        blur=0.7,
        erase_eyes=0.3,
        erase_mouth=0.3,
        reason="Is the absence of marks: hard shadows draw some, and behind a box there might be one.",
    ),
}

_CHANGES = tuple(field.name for field in fields(Amounts) if field.name != "reason")


class FaceAugmentation(nn.Module):
    """Mirror, cover, turn, light, blur and grain faces, each by what is drawn for it.

    Random numbers come from torch's generator of the faces' device, so seeding that repeats them.

    Args:
        strength: 1 for the usual extent, 0 for no change.
        emotion_specific: whether extents follow `TABLE`; if not, they are the same for all emotions.

    Attributes:
        phase: multiplies the strength; set while training (progressive augmentation).
    """

    extents: Tensor

    def __init__(self, strength: float, emotion_specific: bool) -> None:
        super().__init__()
        self.strength = strength
        self.phase = 1.0
        rows = [TABLE[name] if emotion_specific else Amounts() for name in EMOTIONS]
        extents = torch.tensor([_numbers(row) for row in rows]) * torch.tensor(_numbers(LIMITS))
        self.register_buffer("extents", extents, persistent=False)

    def forward(self, pictures: Tensor, labels: Tensor) -> Tensor:
        """Change faces.

        Args:
            pictures: float `(n, C, H, W)` in [0, 1], C = 1 or 3.
            labels: int64 `(n,)`, indices into `EMOTIONS`.

        Returns:
            As many faces of the same shape, in [0, 1]; the same tensor where strength or phase is 0.
        """
        strength = self.strength * self.phase
        if strength == 0:
            return pictures
        within = dict(zip(_CHANGES, self.extents[labels].unbind(1), strict=True))
        within = {name: extent if name == "mirror" else strength * extent for name, extent in within.items()}
        pictures = _mirror(pictures, within["mirror"])
        pictures = erase(pictures, eyes=within["erase_eyes"], mouth=within["erase_mouth"], share=_ERASED)
        pictures = _move(pictures, within)
        pictures = _light(pictures, within)
        return _spoil(pictures, within)


def turn(pictures: Tensor, *, degrees: Tensor, factor: Tensor, shift: Tensor) -> Tensor:
    """Turn and scale faces about the middle of the eye line, then shift them; the border is repeated.

    Args:
        pictures: float `(n, C, H, W)`.
        degrees: `(n,)`, clockwise.
        factor: `(n,)`, above 1 to enlarge.
        shift: `(n, 2)`, right and down, as fractions of width and height.
    """
    height, width = pictures.shape[-2:]
    side = pictures.new_tensor([width, height])
    # Pixel i is centred i + 0.5 pixels from the border.
    middle = side * pictures.new_tensor([0.5, EYE_LINE]) - 0.5
    matrix = get_affine_matrix2d(shift * side, middle.expand_as(shift), factor[:, None].expand_as(shift), degrees)
    moved: Tensor = warp_affine(pictures, matrix[:, :2], (height, width), padding_mode="border")
    return moved


def erase(pictures: Tensor, *, eyes: Tensor, mouth: Tensor, share: float) -> Tensor:
    """Cover some faces with one box, filled with the face's mean grey or with noise about it.

    A box lies wholly above `NOSE_LINE` or wholly below, so that eyes and mouth are never both covered.

    Args:
        pictures: float `(n, C, H, W)` in [0, 1].
        eyes: `(n,)`, the largest area of a box over the eyes, as a fraction of the face; 0 for none.
        mouth: `(n,)`, likewise over the mouth.
        share: of the faces that get a box.

    Source: random erasing, Zhong et al. 2017 (arXiv:1708.04896), there without regard to what is erased.
    """
    height, width = pictures.shape[-2:]
    chosen, upper, area, aspect, down, right, noisy = _uniform(pictures, 7)
    over_eyes = upper < 0.5
    part = torch.where(over_eyes, NOSE_LINE, 1 - NOSE_LINE)
    area = torch.where(over_eyes, eyes, mouth) * (_SMALLEST_BOX + (1 - _SMALLEST_BOX) * area)
    ratio = torch.exp((2 * aspect - 1) * math.log(2))
    tall = torch.minimum(torch.sqrt(area / ratio), part)
    wide = torch.sqrt(area * ratio).clamp(max=1)
    top = torch.where(over_eyes, 0, NOSE_LINE) + down * (part - tall)
    y = ((torch.arange(height, device=pictures.device) + 0.5) / height)[None]
    rows = _between(y, top, tall) & ((y < NOSE_LINE) == over_eyes[:, None]) & (chosen < share)[:, None]
    x = ((torch.arange(width, device=pictures.device) + 0.5) / width)[None]
    box = rows[:, None, :, None] & _between(x, right * (1 - wide), wide)[:, None, None, :]
    grain = torch.where(noisy < 0.5, 0.2, 0.0)[:, None, None, None] * _grain(pictures)
    fill = (pictures.mean(dim=(1, 2, 3), keepdim=True) + grain).clamp(0, 1)
    return torch.where(box, fill, pictures)


def _numbers(row: Amounts) -> list[float]:
    values = asdict(row)
    return [float(values[name]) for name in _CHANGES]


def _uniform(pictures: Tensor, count: int) -> tuple[Tensor, ...]:
    """Numbers in [0, 1): `count` tensors `(n,)`."""
    return torch.rand(count, len(pictures), device=pictures.device).unbind(0)


def _either_way(pictures: Tensor, count: int) -> tuple[Tensor, ...]:
    return tuple(2 * column - 1 for column in _uniform(pictures, count))


def _between(places: Tensor, start: Tensor, length: Tensor) -> Tensor:
    return (places >= start[:, None]) & (places < (start + length)[:, None])


def _grain(pictures: Tensor) -> Tensor:
    """Normal noise `(n, 1, H, W)`, the same in all channels: grey faces in three channels stay grey."""
    return torch.randn_like(pictures[:, :1])


def _mirror(pictures: Tensor, share: Tensor) -> Tensor:
    (drawn,) = _uniform(pictures, 1)
    return torch.where((drawn < share)[:, None, None, None], pictures.flip(-1), pictures)


def _move(pictures: Tensor, within: Mapping[str, Tensor]) -> Tensor:
    angle, size, right, down = _either_way(pictures, 4)
    return turn(
        pictures,
        degrees=angle * within["rotation"],
        factor=torch.exp(size * within["scale"]),
        shift=torch.stack([right, down], dim=1) * within["shift"][:, None],
    )


def _light(pictures: Tensor, within: Mapping[str, Tensor]) -> Tensor:
    amounts = []
    for name in ("brightness", "contrast", "gamma"):
        drawn, chosen = _uniform(pictures, 2)
        amounts.append((2 * drawn - 1) * within[name] * (chosen < _LIGHTENED))
    brightness, contrast, gamma = amounts
    pictures = adjust_brightness(pictures, brightness)
    pictures = adjust_contrast_with_mean_subtraction(pictures, torch.exp(contrast))
    lit: Tensor = adjust_gamma(pictures, torch.exp(gamma))
    return lit


def _spoil(pictures: Tensor, within: Mapping[str, Tensor]) -> Tensor:
    """Blur, and then grain, as a lens and a sensor do."""
    soft, grain = _uniform(pictures, 2)
    side = min(pictures.shape[-2:])
    sigma = soft * within["blur"] * side
    # Two usual deviations either way; a size that hung on the draw would wait for the device.
    reach = max(1, round(2 * side * LIMITS.blur))
    blurred: Tensor = gaussian_blur2d(pictures, 2 * reach + 1, sigma.clamp(min=1e-2)[:, None].expand(-1, 2))
    noise = _grain(pictures) * (grain * within["noise"])[:, None, None, None]
    return (blurred + noise).clamp(0, 1)
