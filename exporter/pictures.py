"""Where faces to be judged come from: pictures, folders, patterns, videos and a camera."""

import glob
import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from PIL import Image

from emoexport.errors import BadData, MissingRuntime, UsageError
from emoexport.images import open_picture, read_picture, refuse_device

__all__ = [
    "BOXED",
    "Picture",
    "Unreadable",
    "find_files",
    "import_opencv",
    "picture_endings",
    "pictures_in",
    "pictures_of_camera",
    "require_readers",
]

_VIDEOS = {
    *(".3gp", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ogv", ".ts"),
    *(".webm", ".wmv"),
}
_UNDECODED = {".cr2", ".dng", ".heic", ".heif", ".jxl", ".nef", ".svg"}
"""Pictures that Pillow does not read: they are named as such, not passed over in silence."""
BOXED = ".predicted.png"
"""How the names of annotated pictures end; in folders they are passed over."""


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

    Hidden files of folders are passed over; a file that is named twice is taken once. A folder below that cannot be
    listed is among them, to be told.

    Raises:
        UsageError: if a path names nothing.
    """
    found: dict[Path, None] = {}
    for path in paths:
        is_there = os.path.lexists(path)
        named = [path] if is_there else sorted(glob.glob(path, recursive=True))  # noqa: PTH207 (absolute ones too)
        if not named:
            hint = "name what is there; or emoexport data draw photos/, for faces to try it on"
            raise UsageError(f"there is no file, folder or match for '{path}'.", hint=hint)
        inside = [file for name in named for file in (_inside(name) if os.path.isdir(name) else [Path(name)])]  # noqa: PTH112
        if not inside:
            has_tables = any(next(Path(name).rglob("*.parquet"), None) for name in named)
            hint = f"emoexport score {path} --out preds/ reads Parquet" if has_tables else "name another folder"
            raise UsageError(f"in {path} is no picture and no video.", hint=hint)
        found |= dict.fromkeys(inside)
    return list(found)


def _inside(folder: str) -> list[Path]:
    """Pictures and videos of a folder and those below it, sorted."""
    known = picture_endings() | _VIDEOS
    found: list[Path] = []
    unlisted: list[Path] = []
    for where, below, names in os.walk(folder, onerror=lambda err: unlisted.append(Path(err.filename))):
        below[:] = [name for name in below if name[0] != "."]
        files = (Path(where, name) for name in names if name[0] != "." and not name.endswith(BOXED))
        found += [file for file in files if file.suffix.lower() in known]
    return sorted([*found, *unlisted])


def picture_endings() -> set[str]:
    """How the names of pictures end, as in `.png`: of those that Pillow reads, and of others that are known by name."""
    return _UNDECODED | {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}


def require_readers(files: Sequence[Path]) -> None:
    """Before anything slow is done.

    Raises:
        MissingRuntime: if there are videos alone, and no OpenCV.
    """
    if files and all(file.suffix.lower() in _VIDEOS for file in files):
        import_opencv()


def pictures_in(
    files: Sequence[Path], *, every: int = 1, done: Callable[[int], object] = lambda _: None
) -> Iterator[Picture | Unreadable]:
    """Read files one after the other, each when it is asked for.

    Args:
        files: pictures and videos; these cannot be read without OpenCV.
        every: of videos each n-th frame.
        done: called with 1 after each file.
    """
    for file in files:
        source = os.fsencode(file).decode(errors="backslashreplace")
        try:
            if source != str(file):
                raise BadData("its name is not UTF-8.")
            refuse_device(file)
            if file.is_dir():
                os.scandir(file).close()  # says why it cannot be listed
            if file.suffix.lower() in _VIDEOS:
                yield from _frames_of_video(file, every)
            else:
                yield Picture(source=source, image=open_picture(read_picture(file)))
        except BadData as err:
            yield Unreadable(source=source, reason=str(err))
        except MissingRuntime as err:  # of a video; pictures need no more than is here
            yield Unreadable(source=source, reason=f"{err} Next: {err.hint}")
        except OSError as err:
            yield Unreadable(source=source, reason=f"it cannot be read: {err.strerror}.")
        done(1)


def pictures_of_camera(
    number: int, *, every: int = 1, stop: Callable[[], bool] = lambda: False
) -> Iterator[Picture | Unreadable]:
    """Frames of a camera as they come.

    Args:
        number: of the camera, from 0.
        every: each n-th frame.
        stop: asked after each frame whether this was enough.

    Raises:
        MissingRuntime: if there is no such camera, or OpenCV is not installed.
    """
    capture = import_opencv().VideoCapture(number)
    if not capture.isOpened():
        raise MissingRuntime(f"there is no camera {number} here that OpenCV can open.", hint="ls /dev/video*")
    begun = time.monotonic()
    frames = 0
    for frame, image in _frames(capture, every):
        frames += 1
        yield Picture(source=f"camera {number}", image=image, frame=frame, time_s=round(time.monotonic() - begun, 3))
        if stop():
            return
    reason = "it gives no frame." if not frames else f"it gave no more after {frames:,} frames."
    yield Unreadable(source=f"camera {number}", reason=reason)


def import_opencv() -> ModuleType:
    """OpenCV, which videos, cameras and the detector need.

    Raises:
        MissingRuntime: if it is not installed.
    """
    os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")  # what is wrong is said by us
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    try:
        import cv2  # noqa: PLC0415 (an extra)
    except ImportError as err:
        raise MissingRuntime("OpenCV is not installed here.", hint="pip install 'emoexport[detect]'") from err
    return cv2


def _frames_of_video(file: Path, every: int) -> Iterator[Picture | Unreadable]:
    cv2 = import_opencv()
    file.open("rb").close()  # says why, if it cannot be read
    capture = cv2.VideoCapture(str(file))
    promised, rate = int(capture.get(cv2.CAP_PROP_FRAME_COUNT)), capture.get(cv2.CAP_PROP_FPS)
    last = -1
    for last, image in _frames(capture, every):
        at = capture.get(cv2.CAP_PROP_POS_MSEC) / 1000 or (last / rate if rate > 0 else None)
        yield Picture(source=str(file), image=image, frame=last, time_s=at)
    if last < 0:
        raise BadData("this is no video that OpenCV can read.")
    if last + every < 0.9 * promised:  # counts in headers are estimates
        yield Unreadable(source=str(file), reason=f"it ends after {last + 1:,} of {promised:,} frames.")


def _frames(capture: Any, every: int) -> Iterator[tuple[int, Image.Image]]:
    """Each n-th frame of what OpenCV opened, with its number, until there is none or one that cannot be decoded."""
    cv2 = import_opencv()
    try:
        for number in itertools.count():
            if not capture.grab():
                return
            if number % every == 0:
                good, pixels = capture.retrieve()
                if not good:
                    return
                yield number, Image.fromarray(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB))
    except cv2.error:
        return
    finally:
        capture.release()
