"""What a session decides about the faces of pictures, picture by picture, in batches behind the scenes."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from emoexport.detection import DetectedFace, Detector, aligned_face
from emoexport.images import to_face
from emoexport.outcome import Outcome
from emoexport.pictures import Picture, Unreadable
from emoexport.runtime import Session

__all__ = ["JudgedFace", "JudgedPicture", "face_at", "predict"]


@dataclass(frozen=True, kw_only=True)
class JudgedFace:
    """One face of a picture, decided."""

    place: DetectedFace | None
    """Where it was found; None where the whole picture was taken as a face."""
    label: str
    confidence: float
    """The probability of the label, from 0 to 1."""
    probabilities: dict[str, float]
    """By emotion, calibrated; they add up to 1."""


@dataclass(frozen=True, kw_only=True)
class JudgedPicture:
    """A picture and what was decided about each of its faces, from left to right; none if the detector found none."""

    picture: Picture
    faces: tuple[JudgedFace, ...]


_Waiting = tuple[Picture, Sequence[DetectedFace | None]]

_PIXELS = 50_000_000
"""Of pictures that wait for a call; it bounds the memory."""


def predict(
    session: Session,
    pictures: Iterable[Picture | Unreadable],
    *,
    detector: Detector | None = None,
    live: bool = False,
) -> Iterator[JudgedPicture | Unreadable]:
    """Decide about the faces of pictures as they come; what comes out has the order of what goes in.

    Args:
        session: what decides.
        pictures: what is decided about; what could not be read is passed on.
        detector: finds the faces; without one each picture is a face.
        live: answer after each picture, and gather none for a call.
    """
    waiting: list[_Waiting | Unreadable] = []
    faces: list[NDArray[np.uint8]] = []
    pixels = 0
    height, _, channels = session.face_shape
    for picture in pictures:
        if isinstance(picture, Unreadable):
            waiting.append(picture)
        else:
            places = detector.find(picture.image) if detector else [None]
            waiting.append((picture, places))
            pixels += picture.image.width * picture.image.height
            faces += [face_at(picture.image, place, size=height, channels=channels) for place in places]
        if live or len(faces) >= session.batch or len(waiting) >= 2 * session.batch or pixels >= _PIXELS:
            yield from _judged(session, waiting, faces)
            waiting, faces, pixels = [], [], 0
    yield from _judged(session, waiting, faces)


def face_at(picture: Image.Image, place: DetectedFace | None, *, size: int, channels: int) -> NDArray[np.uint8]:
    """The face at a place of a picture, or the whole picture as a face.

    Args:
        picture: upright.
        place: where the detector found it; None for the whole picture.
        size: height and width wanted, in pixels.
        channels: 1 for grey, 3 for RGB.

    Returns:
        uint8 `(size, size, channels)`.
    """
    if place is None:
        return to_face(picture, size=size, channels=channels)
    return aligned_face(picture, place, size=size, channels=channels)


def _judged(
    session: Session, waiting: Sequence[_Waiting | Unreadable], faces: Sequence[NDArray[np.uint8]]
) -> Iterator[JudgedPicture | Unreadable]:
    outcome = session.run(np.stack(faces)) if faces else None
    start = 0
    for one in waiting:
        if isinstance(one, Unreadable):
            yield one
            continue
        picture, places = one
        judged = [_face(session.labels, outcome, start + row, place) for row, place in enumerate(places) if outcome]
        start += len(places)
        yield JudgedPicture(picture=picture, faces=tuple(judged))


def _face(labels: Sequence[str], outcome: Outcome, row: int, place: DetectedFace | None) -> JudgedFace:
    return JudgedFace(
        place=place,
        label=labels[outcome.label[row]],
        confidence=float(outcome.confidence[row]),
        probabilities=dict(zip(labels, map(float, outcome.probabilities[row]), strict=True)),
    )
