"""Faces drawn from parameters, for the demo, the tests and CI: no photograph of a person is needed.

A face is who (`_Identity`), what they show (`Expression`) and how it was taken: pose, light, noise, and what
covers it. Drawing is a stack of smooth shapes evaluated on the pixel grid for a batch of faces at once.

Face coordinates: u to the right and v down, both about -1 to 1 across the picture; a is |u|, so that what is
drawn at a appears on both sides. Tones run from 0, black, to 1, white.
"""

from dataclasses import astuple, dataclass
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

__all__ = ["EXPRESSIONS", "Expression", "synthetic_faces"]

# Floating point, `(B, 1, 1)` for one number per face of a batch or `(B, size, size)` for one per pixel.
Field = NDArray[np.floating]
Number = TypeVar("Number", float, Field)


@dataclass(frozen=True)
class Expression(Generic[Number]):
    """What the muscles do, each about -1 to 1 and 0 at rest: one number, or one per face of a batch.

    AU n is an action unit of the Facial Action Coding System (Ekman, Friesen and Hager 2002).

    Attributes:
        brow_slope: inner ends down (AU4 brow lowerer), or up if negative (AU1 inner brow raiser with AU4).
        brow_height: up (AU1 and AU2, inner and outer brow raiser), or down if negative (AU4).
        eye_opening: wide (AU5 upper lid raiser), or narrow if negative (AU6 cheek raiser, AU7 lid tightener).
        mouth_curvature: corners up (AU12 lip corner puller), or down if negative (AU15 depressor).
        mouth_opening: open (AU25 lips part, AU26 jaw drop), or pressed if negative (AU24 lip pressor).
        mouth_width: wide (AU12, AU20 lip stretcher), or narrow if negative (AU23 lip tightener, AU27).
        nose_wrinkle: wrinkled (AU9 nose wrinkler), the upper lip raised with it (AU10).
    """

    brow_slope: Number
    brow_height: Number
    eye_opening: Number
    mouth_curvature: Number
    mouth_opening: Number
    mouth_width: Number
    nose_wrinkle: Number


# The prototypes of EMFACS; label n is the n-th key.
EXPRESSIONS: dict[str, Expression[float]] = {
    "angry": Expression(1.0, -0.7, 0.1, -0.25, -0.8, -0.4, 0.1),  # AU4 + 5 + 7 + 23 + 24
    "disgust": Expression(0.5, -0.5, -0.6, -0.5, 0.2, 0.0, 1.0),  # AU4 + 7 + 9 + 10 + 15
    "fear": Expression(-0.7, 0.5, 0.8, -0.3, 0.4, 0.6, 0.0),  # AU1 + 2 + 4 + 5 + 20 + 25
    "happy": Expression(0.0, 0.0, -0.4, 1.0, 0.35, 0.6, 0.0),  # AU6 + 12 + 25
    "sad": Expression(-1.0, 0.0, -0.4, -0.9, -0.1, -0.2, 0.0),  # AU1 + 4 + 7 + 15
    "surprise": Expression(0.0, 1.0, 1.0, 0.0, 1.0, -0.6, 0.0),  # AU1 + 2 + 5 + 26 + 27
    "neutral": Expression(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0),
}

# Faces drawn together: their fields stay in the processor's cache. A last batch is drawn whole and cut, so
# that a face is computed in the same place of the same arrays, to the last bit, however many are asked for.
_BATCH = 32
_DRAWS = 128  # random numbers a face may use, besides its noise
_LABEL_STREAM = 2**64 - 1  # the stream of random numbers for labels; those from 0 on belong to faces


def synthetic_faces(
    n: int, *, size: int = 48, seed: int = 0, difficulty: float = 1.0
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Draw faces that show the seven emotions, equally often.

    Face i depends on `seed`, i, `size` and `difficulty` alone, so a longer draw begins with the shorter one.

    Args:
        n: number of faces, 1 or more.
        size: height and width in pixels, 16 or more.
        seed: any integer; draws of different seeds share no face.
        difficulty: 0 for posed faces in a studio, 1 for everyday pictures; the more, the weaker and the more
            mixed the expressions, and the worse pose, light, noise and what covers the face.

    Returns:
        Grey faces uint8 `(n, size, size, 1)` in [0, 255], and labels int64 `(n,)` in [0, 6] that index the
        keys of `EXPRESSIONS`; any 7 faces from a multiple of 7 on show each emotion once.

    Raises:
        ValueError: if `n`, `size` or `difficulty` is below its least value, or `difficulty` is not finite.
    """
    if n < 1:
        raise ValueError(f"n is {n}; at least 1 face must be drawn.")
    if size < 16:
        raise ValueError(f"size is {size}; a face needs at least 16 pixels a side.")
    if not 0 <= difficulty < np.inf:
        raise ValueError(f"difficulty is {difficulty}; it must be a finite number of 0 or more.")
    labels = _labels(n + _BATCH, seed)
    faces = np.empty((n, size, size, 1), dtype=np.uint8)
    for start in range(0, n, _BATCH):
        batch = _draw_batch(start, labels[start : start + _BATCH], size, seed, difficulty)
        faces[start : start + _BATCH, :, :, 0] = batch[: n - start]
    return faces, labels[:n]


def _stream(seed: int, index: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=seed % 2**64 << 64 | index))


def _labels(n: int, seed: int) -> NDArray[np.int64]:
    blocks = _stream(seed, _LABEL_STREAM).random((-(-n // len(EXPRESSIONS)), len(EXPRESSIONS)))
    return blocks.argsort(axis=1).astype(np.int64).reshape(-1)[:n]


class _Draws:
    """Hands out random numbers of each face, `(B, 1, 1)` at a time, from uniform ones `(B, _DRAWS)`."""

    def __init__(self, uniforms: Field) -> None:
        self._columns = iter(uniforms.T[:, :, None, None])

    def uniform(self, low: float, high: float) -> Field:
        column: Field = next(self._columns)
        return low + (high - low) * column

    def normal(self, deviation: float) -> Field:
        """Near-normal numbers: the sum of three uniform ones, so never beyond 3 deviations."""
        return deviation * (self.uniform(-1, 1) + self.uniform(-1, 1) + self.uniform(-1, 1))


@dataclass(frozen=True)
class _Identity:
    """Who it is: lengths in face coordinates, and tones."""

    width: Field
    height: Field
    jaw: Field
    eye_distance: Field
    eye_width: Field
    eye_opening: Field
    brow_height: Field
    brow_thickness: Field
    brow_arch: Field
    nose_length: Field
    nose_width: Field
    mouth_height: Field
    mouth_width: Field
    lips: Field
    hairline: Field
    skin: Field
    hair: Field
    brow: Field
    iris: Field


def _draw_batch(start: int, labels: NDArray[np.int64], size: int, seed: int, difficulty: float) -> NDArray[np.uint8]:
    streams = [_stream(seed, start + k) for k in range(_BATCH)]
    draws = _Draws(np.stack([stream.random(_DRAWS, dtype=np.float32) for stream in streams]))
    noise = np.stack([stream.standard_normal((size, size), dtype=np.float32) for stream in streams])
    who = _identity(draws)
    shown = _act(labels, draws, difficulty)
    u, v, edge = _pose(size, draws, difficulty)
    face = _head(u, v, edge, who, shown, draws)
    _eyes(face, u, v, edge, who, shown, draws)
    _nose(face, u, v, edge, who, shown)
    _mouth(face, u, v, edge, who, shown)
    _cover(face, u, v, edge, who, draws, difficulty)
    _light(face, u, v, draws, difficulty)
    face += noise * (difficulty * draws.uniform(0.005, 0.04))
    return (np.clip(face, 0, 1) * 255 + 0.5).astype(np.uint8)


def _identity(draws: _Draws) -> _Identity:
    skin = draws.uniform(0.38, 0.85)
    return _Identity(
        width=draws.uniform(0.66, 0.82),
        height=draws.uniform(0.90, 1.02),
        jaw=draws.uniform(0.12, 0.38),
        eye_distance=draws.uniform(0.31, 0.38),
        eye_width=draws.uniform(0.16, 0.20),
        eye_opening=draws.uniform(0.065, 0.085),
        brow_height=draws.uniform(-0.46, -0.40),
        brow_thickness=draws.uniform(0.025, 0.05),
        brow_arch=draws.uniform(0.0, 0.06),
        nose_length=draws.uniform(0.18, 0.27),
        nose_width=draws.uniform(0.09, 0.13),
        mouth_height=draws.uniform(0.50, 0.56),
        mouth_width=draws.uniform(0.27, 0.34),
        lips=draws.uniform(0.04, 0.07),
        hairline=draws.uniform(0.56, 0.90),
        skin=skin,
        hair=draws.uniform(0.05, 0.65) * skin,
        brow=draws.uniform(0.15, 0.5) * skin,
        iris=draws.uniform(0.05, 0.3),
    )


def _act(labels: NDArray[np.int64], draws: _Draws, difficulty: float) -> Expression[Field]:
    """Weaken each prototype, mix it with that of another emotion, and let every muscle vary."""
    prototypes = np.array([astuple(e) for e in EXPRESSIONS.values()], dtype=np.float32)
    other = (len(prototypes) * draws.uniform(0, 1)[:, 0, 0]).astype(np.int64) % len(prototypes)
    strength = draws.uniform(0.9, 1.1) / (1 + difficulty * draws.uniform(0, 0.5))
    mix = strength * (1 - 1 / (1 + difficulty * draws.uniform(0, 0.25)))
    own, others = prototypes[labels].T[:, :, None, None], prototypes[other].T[:, :, None, None]
    spread = 0.03 + 0.07 * difficulty
    return Expression(
        *((strength - mix) * x + mix * y + draws.normal(spread) for x, y in zip(own, others, strict=True))
    )


def _pose(size: int, draws: _Draws, difficulty: float) -> tuple[Field, Field, Field]:
    """Face coordinates u and v of each pixel, and the width of an edge: a pixel, or more out of focus."""
    grid = ((np.arange(size, dtype=np.float32) + 0.5) * 2 / size - 1)[None]
    x = grid[:, None, :] - draws.normal(0.03 * difficulty)
    y = grid[:, :, None] - draws.normal(0.03 * difficulty)
    angle, zoom = draws.normal(0.07 * difficulty), np.exp(draws.normal(0.04 * difficulty))
    cos, sin = np.cos(angle) / zoom, np.sin(angle) / zoom
    u, v = cos * x + sin * y, cos * y - sin * x
    # A turned head: its middle moves sideways more than its outline does.
    u = u + draws.normal(0.05 * difficulty) * (1 - u * u)
    return u, v, 2 / size * (1 + difficulty * draws.uniform(0, 0.6)) / zoom


def _inside(distance: Field, edge: Field) -> Field:
    """1 where the signed distance to a shape is negative, 0 outside, a ramp `edge` wide between."""
    return np.clip(0.5 - distance / edge, 0, 1)


def _spot(x: Field, y: Field) -> Field:
    """A soft round spot, 1 in its middle and 0.37 at distance 1."""
    return np.exp(-(x * x + y * y))


def _paint(face: Field, mask: Field, tone: Field | float) -> None:
    face += mask * (tone - face)


def _head(u: Field, v: Field, edge: Field, who: _Identity, shown: Expression[Field], draws: _Draws) -> Field:
    """Background, hair, neck, ears, and the head with the wrinkles of the forehead."""
    below = np.maximum(v, 0)
    radius = who.width * (1 - who.jaw * below * below)
    height = who.height + 0.08 * np.maximum(shown.mouth_opening, 0) * (v > 0)
    r = np.sqrt((u / radius) ** 2 + (v / height) ** 2)
    face = draws.uniform(0.1, 0.9) + draws.uniform(-0.2, 0.2) * v
    _paint(face, _inside(r - draws.uniform(1.05, 1.3), 1.3 * edge) * (v < draws.uniform(0, 1.2)), who.hair)
    _paint(face, _inside(np.maximum(np.abs(u) - 0.45, 0.6 - v), edge), 0.65 * who.skin)
    ears = np.sqrt(((np.abs(u) - who.width) / 0.1) ** 2 + ((v - 0.02) / 0.2) ** 2) - 1
    _paint(face, _inside(0.1 * ears, edge), 0.85 * who.skin)
    forehead = np.maximum(shown.brow_height, 0) * np.cos(40 * v) * _spot(u / 0.4, (v + 0.66) / 0.12)
    skin = who.skin * (1.06 - 0.28 * r**4 - 0.1 * forehead)
    _paint(face, _inside(r - 1, 1.3 * edge), skin)
    fringe = v + who.hairline - draws.uniform(0, 0.7) * u * u - draws.uniform(-0.2, 0.2) * u
    _paint(face, _inside(np.maximum(fringe, r - 1.05), 1.5 * edge), who.hair)
    return face


def _eyes(
    face: Field, u: Field, v: Field, edge: Field, who: _Identity, shown: Expression[Field], draws: _Draws
) -> None:
    a = np.abs(u) - who.eye_distance
    y = v + 0.18
    x = a / who.eye_width
    _paint(face, 0.3 * _spot(a / 0.2, (y + 0.03) / 0.12), 0.5 * who.skin)

    half = who.eye_opening * np.maximum(1 + 0.75 * shown.eye_opening, 0.15)
    lens = half * (1 - x * x)
    lift = y + 0.25 * half  # the upper lid moves more than the lower
    opened = _inside(np.abs(lift) - lens, edge)
    _paint(face, opened, 0.35 + 0.6 * who.skin)
    gaze = draws.normal(0.015) * np.sign(u)
    iris = _inside(np.sqrt((a - gaze) ** 2 + lift**2) - 0.075, edge)
    _paint(face, iris * opened, who.iris)
    lid = np.maximum(np.abs(lift + np.maximum(lens, 0)) - 0.02, who.eye_width * (np.abs(x) - 1.1))
    _paint(face, 0.8 * _inside(lid, edge), 0.3 * who.skin)

    t = a / 0.22  # along the brow, from -1, its inner end, to 1
    line = who.brow_height - 0.11 * shown.brow_height - 0.09 * shown.brow_slope * t - who.brow_arch * (1 - t * t)
    thickness = who.brow_thickness * (1 - 0.35 * t)
    brow = np.maximum(np.abs(v - line) - thickness, 0.22 * (np.abs(t) - 1))
    _paint(face, 0.9 * _inside(brow, edge), who.brow)


def _nose(face: Field, u: Field, v: Field, edge: Field, who: _Identity, shown: Expression[Field]) -> None:
    """The nose, the folds from it to the mouth, and the wrinkles on it and between the brows."""
    a = np.abs(u)
    wrinkle, frown = np.maximum(shown.nose_wrinkle, 0), np.maximum(-shown.brow_height, 0)
    tip = who.nose_length - 0.04 * wrinkle
    face *= 1 + 0.12 * _spot(u / 0.05, (v - tip + 0.2) / 0.25)
    face *= 1 - 0.22 * _spot((a - who.nose_width - 0.02) / 0.05, (v - tip + 0.12) / 0.16)
    face *= 1 - 0.25 * _spot(u / who.nose_width, (v - tip - 0.06) / 0.04)
    nostril = np.sqrt((a - 0.65 * who.nose_width) ** 2 + (1.5 * (v - tip)) ** 2) - 0.035
    _paint(face, 0.75 * _inside(nostril, edge), 0.25 * who.skin)
    face *= 1 - 0.35 * wrinkle * np.maximum(np.cos(42 * v), 0) * _spot(u / 0.13, (v + 0.08) / 0.13)
    face *= 1 - 0.45 * frown * _spot((a - 0.05) / 0.025, (v + 0.38) / 0.1)
    fold = a - who.nose_width - 0.08 - 0.5 * (v - tip)
    depth = 0.05 + 0.25 * wrinkle + 0.15 * np.maximum(shown.mouth_curvature, 0)
    face *= 1 - depth * _spot(fold / 0.04, (v - tip - 0.08) / 0.16)


def _mouth(face: Field, u: Field, v: Field, edge: Field, who: _Identity, shown: Expression[Field]) -> None:
    """Lips, the gap between them, and the upper teeth, which wide mouths show."""
    opening = np.maximum(shown.mouth_opening, 0)
    width = who.mouth_width * (1 + 0.3 * shown.mouth_width)
    q = (u / width) ** 2
    bow = np.maximum(1 - q, 0)
    middle = who.mouth_height + 0.05 * opening + 0.14 * shown.mouth_curvature * (0.5 - np.minimum(q, 1.2))
    raised = 0.05 * np.maximum(shown.nose_wrinkle, 0)
    gap = 0.015 + 0.17 * opening
    lips = who.lips * (1 + 0.7 * np.minimum(shown.mouth_opening, 0))
    top, bottom = middle - (0.7 * gap + raised) * bow, middle + 1.3 * gap * bow
    inside_width = width * (np.sqrt(q) - 1)
    outer = np.maximum(top - 0.8 * lips * np.sqrt(bow) - v, v - bottom - 1.2 * lips * np.sqrt(bow))
    _paint(face, 0.7 * _inside(np.maximum(outer, inside_width), edge), 0.6 * who.skin)
    dark = _inside(np.maximum(np.maximum(top - v, v - bottom), inside_width), edge)
    _paint(face, 0.9 * dark, 0.12)
    teeth = np.clip(0.3 + shown.mouth_width, 0, 1) * _inside(v - top - 0.45 * gap - 0.015, edge)
    _paint(face, teeth * dark * (gap > 0.04), 0.9)
    face *= 1 - 0.15 * _spot(u / 0.15, (v - bottom - lips - 0.09) / 0.04)


def _cover(face: Field, u: Field, v: Field, edge: Field, who: _Identity, draws: _Draws, difficulty: float) -> None:
    """Cover some faces with one of glasses, strands of hair, a hand or a bar."""
    kind = np.floor(draws.uniform(0, 1) / max(0.05 * difficulty, 1e-9))
    a = np.abs(u)
    ring = np.sqrt((a - who.eye_distance) ** 2 + (1.2 * (v + 0.16)) ** 2) - 0.24
    bridge = np.maximum(np.abs(v + 0.2) - 0.02, a - 0.12)
    tint = draws.uniform(-0.8, 0.7)
    _paint(face, (kind == 0) * np.maximum(tint, 0) * _inside(ring, edge), 0.1)
    frame = np.minimum(np.abs(ring) - 0.025, bridge)
    _paint(face, (kind == 0) * _inside(frame, edge), draws.uniform(0.0, 0.3))

    side = np.sign(draws.uniform(-1, 1))
    strands = 0.25 + 0.25 * v + 0.04 * np.sin(11 * v) - side * u + draws.uniform(-0.05, 0.25)
    _paint(face, (kind == 1) * _inside(strands, edge), who.hair * (1 + 0.1 * np.sin(30 * u)))

    x, y = u - draws.uniform(-0.6, 0.6), v - draws.uniform(0.5, 0.9)
    along, across = x + side * 0.5 * y, y - side * 0.5 * x
    hand = np.sqrt((along / 0.55) ** 2 + (across / 0.26) ** 2) - 1
    _paint(
        face,
        (kind == 2) * _inside(0.3 * hand, edge),
        who.skin * (0.95 + 0.1 * np.cos(45 * across) - 0.3 * (hand + 1) ** 4),
    )

    tilt = draws.uniform(-1.5, 1.5)
    bar = np.abs(np.cos(tilt) * v + np.sin(tilt) * u - draws.uniform(-0.6, 0.6)) - draws.uniform(0.06, 0.16)
    _paint(face, (kind == 3) * _inside(bar, edge), draws.uniform(0, 1))


def _light(face: Field, u: Field, v: Field, draws: _Draws, difficulty: float) -> None:
    """Light from one side, then the camera's gain and offset."""
    face *= np.maximum(1 + draws.normal(0.2 * difficulty) * u + draws.normal(0.15 * difficulty) * v, 0.1)
    face *= np.exp(draws.normal(0.13 * difficulty))
    face += draws.normal(0.03 * difficulty)
