"""From an encoded picture to a face: uint8, of the size and the channels asked for."""

import io
import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from emoexport.errors import BadData

__all__ = ["MAX_BYTES", "decode_face", "open_picture", "read_picture", "refuse_device", "resize_face", "to_face"]

MAX_PIXELS = 64_000_000
"""A picture with more pixels is refused before it is decoded."""
MAX_BYTES = 2**29
"""And a file with more bytes before it is read: so many pixels take less, whatever they are."""
_KINDS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""Of pictures. What strangers made is not handed to the rarer decoders of Pillow, one of which calls Ghostscript."""


def decode_face(data: bytes, *, size: int, channels: int) -> NDArray[np.uint8]:
    """Decode a picture, turned upright, converted and scaled.

    Args:
        data: an encoded picture, as `open_picture` takes it; of an animation the first frame.
        size: height and width of the face in pixels.
        channels: 1 for grey, 3 for RGB.

    Returns:
        uint8 `(size, size, channels)`.

    Raises:
        BadData: as `open_picture` does.
    """
    return to_face(open_picture(data), size=size, channels=channels)


def refuse_device(path: Path) -> None:
    """Before anything is opened that might be waited for.

    Raises:
        BadData: if this is a device or a pipe.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise BadData("this is no file, but a device or a pipe.")


def read_picture(path: Path) -> bytes:
    """Read a file that is said to be a picture.

    Raises:
        BadData: if it is a device or a pipe, or has more than `MAX_BYTES`.
        OSError: if it cannot be read.
    """
    refuse_device(path)
    if (size := path.stat().st_size) > MAX_BYTES:
        raise BadData(f"it has {size:,} bytes; the limit is {MAX_BYTES:,}.")
    return path.read_bytes()


def open_picture(data: bytes) -> Image.Image:
    """Decode a picture and turn it upright; of an animation or of several pages the first.

    Args:
        data: the file, of one of a few common kinds, whatever its name says.

    Returns:
        Of 8 bits a channel, grey (`L`) or `RGB`. What is transparent is black.

    Raises:
        BadData: if the bytes are no picture, are cut short, more than `MAX_PIXELS` pixels, or fractions.
    """
    Image.init()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of bombs, which are refused here, and of palettes
            with Image.open(io.BytesIO(data), formats=[kind for kind in _KINDS if kind in Image.OPEN]) as picture:
                if picture.width * picture.height > MAX_PIXELS:
                    raise BadData(f"{picture.width} x {picture.height} pixels; the limit is {MAX_PIXELS:,}.")
                picture.load()
                return _in_eight_bits(ImageOps.exif_transpose(picture))
    except BadData:
        raise
    except Image.DecompressionBombError as err:  # refused by Pillow, which allows more, before it can be asked
        raise BadData(f"more pixels than the limit of {MAX_PIXELS:,}.") from err
    except UnidentifiedImageError as err:
        raise BadData(f"this is no picture of a known kind ({len(data):,} bytes).") from err
    except Exception as err:  # Pillow's decoders raise a score of kinds, SyntaxError and struct.error among them
        raise BadData(f"this is no picture that can be read ({type(err).__name__}: {err}).") from err


def resize_face(face: NDArray[np.uint8], *, size: int, channels: int) -> NDArray[np.uint8]:
    """Scale and convert a decoded face.

    Args:
        face: uint8 `(H, W)`, `(H, W, 1)` or `(H, W, 3)`.
        size: height and width wanted, in pixels.
        channels: 1 for grey, 3 for RGB.

    Returns:
        uint8 `(size, size, channels)`.
    """
    flat = face[..., 0] if face.ndim == 3 and face.shape[2] == 1 else face
    return to_face(Image.fromarray(flat), size=size, channels=channels)


def to_face(picture: Image.Image, *, size: int, channels: int) -> NDArray[np.uint8]:
    """Convert and scale a whole picture, which is a face.

    Args:
        picture: upright, grey or RGB, of 8 bits a channel.
        size: height and width wanted, in pixels.
        channels: 1 for grey, 3 for RGB.

    Returns:
        uint8 `(size, size, channels)`.
    """
    picture = picture.convert("L" if channels == 1 else "RGB")
    if picture.size != (size, size):
        picture = picture.resize((size, size), Image.Resampling.BICUBIC)
    return np.array(picture, dtype=np.uint8).reshape(size, size, channels)


def _in_eight_bits(picture: Image.Image) -> Image.Image:
    if picture.mode == "F":
        raise BadData("its pixels are fractions; needed are whole numbers of 8 or 16 bits.")
    if picture.mode.startswith("I"):  # 16 bits a pixel, which convert("L") would clip
        wide = np.asarray(picture).clip(0, 65535).astype(np.int32)
        wide += 128
        wide //= 257  # rounded, as an odd number leaves no halves
        return Image.fromarray(wide.astype(np.uint8))
    if "A" in picture.getbands() or "transparency" in picture.info:
        rgba = picture.convert("RGBA")  # what is transparent becomes black, not whatever lies beneath
        return Image.alpha_composite(Image.new("RGBA", rgba.size, (0, 0, 0, 255)), rgba).convert("RGB")
    return picture if picture.mode == "L" else picture.convert("L" if picture.mode == "1" else "RGB")
