"""The views: what each of the test-time transforms does to a face.

A view maps faces `(N, C, H, W)` in [0, 1], floating point, to the same shape and range. Geometry is given in
fractions of the face, so a view means the same at every size; pixels outside the face repeat its border.
Each of the eight transforms stands twice, on the face and on its mirror image. So the set is closed under
flips: a mirrored face is shown the same 16 pictures, in another order.

To add a view, write one function and one row; a function that moves pixels says in `MOVES` where it reads them.
"""

import difflib
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from emoexport.errors import UsageError

__all__ = ["VIEWS", "View", "coinciding", "views_named"]


def identity(faces: Tensor) -> Tensor:
    """The face as it is."""
    return faces


def shift(faces: Tensor, *, right: float = 0.0, down: float = 0.0) -> Tensor:
    """Move the picture by fractions of its width and height."""
    return _sample(faces, _shifted(*faces.shape[-2:], right=right, down=down))


def zoom(faces: Tensor, *, factor: float) -> Tensor:
    """Enlarge the picture about its centre."""
    return _sample(faces, _zoomed(*faces.shape[-2:], factor=factor))


def rotate(faces: Tensor, *, degrees: float) -> Tensor:
    """Turn the picture clockwise about its centre."""
    return _sample(faces, _rotated(*faces.shape[-2:], degrees=degrees))


def brightness(faces: Tensor, *, factor: float) -> Tensor:
    """Multiply the light."""
    return (faces * factor).clamp(0.0, 1.0)


def contrast(faces: Tensor, *, factor: float) -> Tensor:
    """Stretch about middle grey."""
    return ((faces - 0.5) * factor + 0.5).clamp(0.0, 1.0)


def gamma(faces: Tensor, *, exponent: float) -> Tensor:
    """Raise to a power: below 1 lifts the shadows."""
    return faces**exponent


Affine = tuple[tuple[float, float, float], tuple[float, float, float]]
"""A place in the output to one in the input, both in fractions of the face from its centre."""


def _shifted(height: int, width: int, *, right: float = 0.0, down: float = 0.0) -> Affine:  # noqa: ARG001
    return (1.0, 0.0, -right), (0.0, 1.0, -down)


def _zoomed(height: int, width: int, *, factor: float) -> Affine:  # noqa: ARG001
    return (1 / factor, 0.0, 0.0), (0.0, 1 / factor, 0.0)


def _rotated(height: int, width: int, *, degrees: float) -> Affine:
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return (cos, sin * height / width, 0.0), (-sin * width / height, cos, 0.0)


MOVES: Mapping[Callable[..., Tensor], Callable[..., Affine]] = {shift: _shifted, zoom: _zoomed, rotate: _rotated}
"""Of each function that moves pixels, and changes no light, where it reads them in a face of a height and a width."""


@dataclass(frozen=True, kw_only=True)
class View:
    """One row of `VIEWS`: a function, its parameters, and whether it sees the mirrored face."""

    name: str
    function: Callable[..., Tensor]
    parameters: Mapping[str, float] = field(default_factory=dict)
    mirrored: bool = False

    def __call__(self, faces: Tensor) -> Tensor:
        """Transform faces `(N, C, H, W)` in [0, 1]."""
        return self.function(faces.flip(-1) if self.mirrored else faces, **self.parameters)

    def taps(self, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
        """Where it reads each pixel.

        Returns:
            Indices int64 `(4, H*W)` into the flat face, and weights float64 `(4, H*W)` that sum to 1.
        """
        move = MOVES.get(self.function)
        affine = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0)) if move is None else move(height, width, **self.parameters)
        taps, weights = _bilinear_taps(height, width, affine)
        if self.mirrored:
            taps = taps // width * width + (width - 1 - taps % width)
        return taps, weights

    def levels(self) -> np.ndarray:
        """What it makes of each of the 256 levels of a pixel, float32 in [0, 1]; a view that moves pixels, nothing."""
        levels = torch.arange(256, dtype=torch.float32) / 255
        if self.function not in MOVES:
            levels = self.function(levels[None, None, None], **self.parameters)[0, 0, 0]
        return levels.numpy()


_TRANSFORMS = (
    View(name="identity", function=identity),
    View(name="shift-right", function=shift, parameters={"right": 1 / 24}),
    View(name="shift-down", function=shift, parameters={"down": 1 / 24}),
    View(name="zoom", function=zoom, parameters={"factor": 1.1}),
    View(name="rotate", function=rotate, parameters={"degrees": 8.0}),
    View(name="brightness", function=brightness, parameters={"factor": 1.2}),
    View(name="contrast", function=contrast, parameters={"factor": 1.3}),
    View(name="gamma", function=gamma, parameters={"exponent": 0.75}),
)

VIEWS: Mapping[str, View] = {
    view.name: view
    for transform in _TRANSFORMS
    for view in (
        transform,
        View(
            name="flip" if transform.function is identity else f"{transform.name}-flipped",
            function=transform.function,
            parameters=transform.parameters,
            mirrored=True,
        ),
    )
}


def views_named(names: Sequence[str]) -> tuple[View, ...]:
    """Look up views by name, in the order given.

    Raises:
        UsageError: if a name is unknown or stands twice, or if there is none.
    """
    unknown = [name for name in names if name not in VIEWS]
    if unknown:
        near = difflib.get_close_matches(unknown[0], VIEWS, n=1)
        raise UsageError(
            f"'{unknown[0]}' is no view; known are {', '.join(VIEWS)}.",
            hint=f"did you mean '{near[0]}'?" if near else "name some of these",
        )
    if not names or len(set(names)) != len(names):
        raise UsageError(f"views must be named once each, at least one; found {list(names)}.")
    return tuple(VIEWS[name] for name in names)


def coinciding(views: Sequence[View], face_shape: tuple[int, int, int]) -> tuple[int, ...]:
    """Find the views that show the same picture of every face of a shape.

    Args:
        views: V views.
        face_shape: `(H, W, C)` of the uint8 faces.

    Returns:
        Of each view the index of the first one that shows what it shows: V integers, its own where none before does.
        One that differs by rounding alone shows another picture, which costs its passes and nothing else.
    """
    # Two random faces stand for all. Geometry samples every face with the same taps and weights, so where these
    # differ, random pixels do; photometry is a function of the level, and all 256 of them occur.
    height, width, channels = face_shape
    count = max(2, math.ceil(256 / math.prod(face_shape)))
    levels = np.resize(np.arange(256, dtype=np.uint8), (count, channels, height, width))
    faces = torch.from_numpy(np.random.default_rng(0).permuted(levels)).double() / 255
    shown = [view(faces) for view in views]
    return tuple(next(at for at, other in enumerate(shown) if torch.equal(other, picture)) for picture in shown)


def _sample(faces: Tensor, affine: Affine) -> Tensor:
    """Read each output pixel by bilinear interpolation where `affine` points to.

    The four taps and their weights depend on the size alone, so an exported graph holds them as constants
    and does four gathers: the same arithmetic in every runtime, with none of grid_sample's variants.
    """
    height, width = faces.shape[-2:]
    taps, weights = _bilinear_taps(height, width, affine)
    pixels = faces.flatten(-2)
    parts = [
        pixels.index_select(-1, torch.as_tensor(tap, device=faces.device))
        * torch.as_tensor(weight, dtype=faces.dtype, device=faces.device)
        for tap, weight in zip(taps, weights, strict=True)
    ]
    return (parts[0] + parts[1] + parts[2] + parts[3]).reshape(faces.shape)


@functools.lru_cache(maxsize=64)
def _bilinear_taps(height: int, width: int, affine: Affine) -> tuple[np.ndarray, np.ndarray]:
    """Indices int64 `(4, H*W)` into the flat face, and weights float64 `(4, H*W)` that sum to 1.

    `affine` maps a place in the output to one in the input, both in fractions of the face from its centre.
    """
    # Pixels from the centre are halves, which are exact: a move by whole pixels, or by none, mixes no two of them.
    middle, centre = (height - 1) / 2, (width - 1) / 2
    y, x = np.meshgrid(np.arange(height) - middle, np.arange(width) - centre, indexing="ij")
    (a, b, right), (c, d, down) = affine
    # Clamping to the outermost pixel centres repeats the border.
    column = np.clip(a * x + b * width / height * y + right * width + centre, 0, width - 1).ravel()
    row = np.clip(c * height / width * x + d * y + down * height + middle, 0, height - 1).ravel()
    left, top = np.floor(column).astype(np.int64), np.floor(row).astype(np.int64)
    across, along = column - left, row - top
    right_of, below = np.minimum(left + 1, width - 1), np.minimum(top + 1, height - 1)
    taps = np.stack([top * width + left, top * width + right_of, below * width + left, below * width + right_of])
    weights = np.stack([(1 - along) * (1 - across), (1 - along) * across, along * (1 - across), along * across])
    return taps, weights
