"""From an encoded picture to a face: uint8, of the size and the channels asked for."""

import io
import warnings

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from emoexport.errors import BadData

__all__ = ["decode_face", "open_picture", "resize_face", "to_face"]

MAX_PIXELS = 64_000_000
"""A picture with more pixels is refused before it is decoded."""


def decode_face(data: bytes, *, size: int, channels: int) -> NDArray[np.uint8]:
    """Decode a picture, turned upright, converted and scaled.

    Args:
        data: an encoded picture of any kind that Pillow reads; of an animation the first frame.
        size: height and width of the face in pixels.
        channels: 1 for grey, 3 for RGB.

    Returns:
        uint8 `(size, size, channels)`.

    Raises:
        BadData: as `open_picture` does.
    """
    return to_face(open_picture(data), size=size, channels=channels)


def open_picture(data: bytes, *, kinds: list[str] | None = None) -> Image.Image:
    """Decode a picture and turn it upright; of an animation the first frame.

    Args:
        data: the file.
        kinds: the only formats that are tried, by Pillow's names; None for all that Pillow reads.

    Returns:
        Of 8 bits a channel, grey (`L`) or `RGB`. What is transparent is black.

    Raises:
        BadData: if the bytes are no picture, are cut short, more than `MAX_PIXELS` pixels, or fractions.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of bombs, which are refused here, and of palettes
            with Image.open(io.BytesIO(data), formats=kinds) as picture:
                if picture.width * picture.height > MAX_PIXELS:
                    raise BadData(f"{picture.width} x {picture.height} pixels; the limit is {MAX_PIXELS:,}.")
                picture.load()
                return _in_eight_bits(ImageOps.exif_transpose(picture))
    except BadData:
        raise
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
        wide = np.asarray(picture).astype(np.float64) / 257
        return Image.fromarray(wide.round().clip(0, 255).astype(np.uint8))
    if "A" in picture.getbands() or "transparency" in picture.info:
        rgba = picture.convert("RGBA")  # what is transparent becomes black, not whatever lies beneath
        return Image.alpha_composite(Image.new("RGBA", rgba.size, (0, 0, 0, 255)), rgba).convert("RGB")
    return picture if picture.mode == "L" else picture.convert("L" if picture.mode == "1" else "RGB")
