"""Where faces to be judged come from: pictures, folders, patterns, videos and a camera."""

import glob
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from PIL import Image

from emoexport.errors import BadData, MissingRuntime, UsageError
from emoexport.images import open_picture

__all__ = ["Picture", "Unreadable", "find_files", "import_opencv", "pictures_in", "pictures_of_camera"]

_VIDEOS = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv"}


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture, or a frame of a video or of a camera."""

    source: str
    """The file, or `camera N`."""
    image: Image.Image
    """Upright."""
    frame: int | None = None
    """Of a video or a camera, counted from 0."""
    time_s: float | None = None
    """Of a frame, seconds since the video or the camera began."""


@dataclass(frozen=True, kw_only=True)
class Unreadable:
    """A file that is left out, or a video from where it cannot be read."""

    source: str
    reason: str


def find_files(paths: Sequence[str]) -> list[Path]:
    """The files that paths name: of a folder all pictures and videos in it and below, of a pattern all that match.

    Hidden files of folders are passed over; a file that is named twice is taken once.

    Raises:
        UsageError: if a path names nothing.
    """
    known = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN} | _VIDEOS
    found: dict[Path, None] = {}
    for path in paths:
        named = [path] if os.path.lexists(path) else sorted(glob.glob(path, recursive=True))  # noqa: PTH207 (absolute patterns too)
        if not named:
            raise UsageError(
                f"there is no file, folder or match for '{path}'.", hint="ls, or put the pattern in quotes"
            )
        for name in map(Path, named):
            if not name.is_dir():
                found[name] = None
                continue
            inside = [file for file in sorted(name.rglob("*")) if file.suffix.lower() in known and file.is_file()]
            visible = [file for file in inside if not any(part[0] == "." for part in file.relative_to(name).parts)]
            if not visible:
                raise UsageError(f"the folder {name} holds no picture and no video.", hint="name one that does")
            found |= dict.fromkeys(visible)
    return list(found)


def pictures_in(
    files: Sequence[Path], *, every: int = 1, done: Callable[[int], object] = lambda _: None
) -> Iterator[Picture | Unreadable]:
    """Read files one after the other, each when it is asked for.

    Args:
        files: pictures and videos.
        every: of videos each n-th frame.
        done: called with 1 after each file.

    Raises:
        MissingRuntime: at a video, if OpenCV is not installed.
    """
    for file in files:
        try:
            if file.suffix.lower() in _VIDEOS:
                yield from _frames(import_opencv().VideoCapture(str(file)), str(file), every)
            else:
                yield Picture(source=str(file), image=open_picture(file.read_bytes()))
        except BadData as err:
            yield Unreadable(source=str(file), reason=str(err))
        except OSError as err:
            yield Unreadable(source=str(file), reason=f"it cannot be read: {err.strerror}.")
        done(1)


def pictures_of_camera(number: int, *, every: int = 1) -> Iterator[Picture | Unreadable]:
    """Frames of a camera, until it ends or is let go.

    Raises:
        MissingRuntime: if there is no such camera, or OpenCV is not installed.
    """
    capture = import_opencv().VideoCapture(number)
    if not capture.isOpened():
        raise MissingRuntime(f"there is no camera {number} here.", hint="--camera 0 is the first")
    yield from _frames(capture, f"camera {number}", every)


def import_opencv() -> ModuleType:
    """OpenCV, which videos, cameras and the detector need.

    Raises:
        MissingRuntime: if it is not installed.
    """
    try:
        import cv2  # noqa: PLC0415 (an extra)
    except ImportError as err:
        raise MissingRuntime("OpenCV is not installed here.", hint="pip install 'emoexport[detect]'") from err
    return cv2


def _frames(capture: Any, source: str, every: int) -> Iterator[Picture | Unreadable]:
    """Each n-th frame of what OpenCV opened, and what is wrong with it."""
    cv2 = import_opencv()
    rate, promised = capture.get(cv2.CAP_PROP_FPS), int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
    number = 0
    try:
        while capture.grab():
            if number % every == 0:
                good, pixels = capture.retrieve()
                if not good:
                    break
                image = Image.fromarray(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB))
                yield Picture(source=source, image=image, frame=number, time_s=number / rate if rate > 0 else None)
            number += 1
    finally:
        capture.release()
    if number == 0:
        yield Unreadable(source=source, reason="this is no video that OpenCV can read.")
    elif number < 0.9 * promised:  # counts in headers are estimates
        yield Unreadable(source=source, reason=f"it ends after {number:,} of {promised:,} frames.")
