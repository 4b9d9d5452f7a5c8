import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from emoexport.errors import BadData
from emoexport.images import MAX_BYTES, decode_face, read_picture, resize_face
from emoexport.pictures import Picture, Unreadable, pictures_in
from emoexport.storage import Storage

GREY = np.tile(np.linspace(0, 255, 32).astype(np.uint8), (32, 1))


def encoded(picture: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def test_a_face_of_the_right_size_comes_back_as_it_is():
    face = decode_face(encoded(Image.fromarray(GREY)), size=32, channels=1)
    assert face.dtype == np.uint8
    assert np.array_equal(face[..., 0], GREY)


RGB = Image.merge("RGB", [Image.fromarray(GREY)] * 3)
WIDE = GREY.astype(np.uint16) * 257
OTHER = Image.fromarray(255 - GREY)
"""A second frame or page, which has no part in the answer."""


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(bits: int, kind: int, rows: bytes, *chunks: bytes, size: tuple[int, int] = (32, 32)) -> bytes:
    """A PNG as its specification has it, of kinds that Pillow does not write."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, bits, kind, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def wide_rows(*bands: np.ndarray) -> bytes:
    """Rows of a PNG of 16 bits, each with the number of its filter before it."""
    return b"".join(b"\0" + row.astype(">u2").tobytes() for row in np.stack(bands, axis=2))


def several(kind: str, **options: object) -> bytes:
    return encoded(RGB, kind, save_all=True, append_images=[OTHER.convert("RGB")], **options)


def notes(size: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x9286] = b"x" * size
    return exif


def clear(alpha: int) -> Image.Image:
    return Image.merge("RGBA", [*RGB.split(), Image.new("L", RGB.size, alpha)])


SAME = {
    "16 bits": (encoded(Image.fromarray(WIDE)), 0),
    "16 bits, TIFF": (encoded(Image.fromarray(WIDE), "TIFF"), 0),
    "16 bits, PPM": (b"P5 32 32 65535\n" + WIDE.astype(">u2").tobytes(), 0),
    "32 bits, of which 16 are used": (encoded(Image.fromarray(WIDE.astype(np.int32)), "TIFF"), 0),
    "16 bits, colours": (png(16, 2, wide_rows(WIDE, WIDE, WIDE)), 0),
    "16 bits, colours and transparency": (png(16, 6, wide_rows(WIDE, WIDE, WIDE, np.full_like(WIDE, 65535))), 0),
    "colours": (encoded(RGB), 0),
    "CMYK, JPEG": (encoded(RGB.convert("CMYK"), "JPEG", quality=98), 2),
    "CMYK, TIFF": (encoded(RGB.convert("CMYK"), "TIFF"), 1),
    "YCbCr": (encoded(RGB.convert("YCbCr"), "JPEG", quality=98), 2),
    "palette": (encoded(RGB.quantize(256)), 0),
    "palette, opaque": (encoded(RGB.quantize(256), transparency=bytes([255] * 256)), 0),
    "opaque": (encoded(clear(255)), 0),
    "white as transparent as it is dark": (
        encoded(Image.merge("LA", [Image.new("L", (32, 32), 255), Image.fromarray(GREY)])),
        1,
    ),
    "animated GIF": (several("GIF"), 0),
    "animated WebP": (several("WEBP", lossless=True), 0),
    "animated PNG": (several("PNG"), 0),
    "pages of a TIFF": (several("TIFF"), 0),
    "notes": (encoded(RGB, "JPEG", quality=98, exif=notes(60_000)), 2),
    "more notes": (png(8, 0, b"".join(b"\0" + bytes(row) for row in GREY), chunk(b"tEXt", b"a\0" + b"x" * 10**7)), 0),
    "more pixels than it says": (png(8, 0, b"".join(b"\0" + bytes(row) for row in GREY) + bytes(10**6)), 0),
}
"""Pictures that show `GREY`, and how far their pixels may be from it."""


@pytest.mark.parametrize(("data", "most"), SAME.values(), ids=SAME)
@pytest.mark.parametrize("channels", [1, 3])
def test_other_kinds_of_picture_show_the_same(data, most, channels):
    face = decode_face(data, size=32, channels=channels)
    assert face.shape == (32, 32, channels)
    assert np.abs(face.astype(int) - GREY[..., None]).max() <= most


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tiff", "a.eps"])
def test_what_counts_is_what_is_in_a_file_not_its_name(name, tmp_path):
    (tmp_path / name).write_bytes(SAME["pages of a TIFF"][0])
    (found,) = pictures_in([tmp_path / name])
    assert isinstance(found, Picture)
    assert np.array_equal(np.asarray(found.image)[..., 1], GREY)


def test_what_is_transparent_is_black():
    for picture in (encoded(clear(0)), encoded(RGB.quantize(256), transparency=bytes(256))):
        assert decode_face(picture, size=32, channels=3).max() == 0


def test_black_and_white():
    face = decode_face(encoded(Image.fromarray(GREY > 127)), size=32, channels=1)
    assert np.array_equal(face[..., 0], np.where(GREY > 127, 255, 0))


TURNED = {
    1: np.asarray,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.swapaxes(0, 1),
    6: np.rot90,
    7: lambda upright: np.rot90(upright.swapaxes(0, 1), 2),
    8: lambda upright: np.rot90(upright, -1),
}
"""By EXIF's number of an orientation, the pixels of a file that show a picture: 6 is to be turned clockwise."""


@pytest.mark.parametrize("number", TURNED)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_a_turned_photograph_is_set_upright(number, kind, tmp_path):
    upright = np.zeros((40, 24), dtype=np.uint8)
    upright[:10, :8], upright[30:, :8] = 255, 128
    exif = Image.Exif()
    exif[0x0112] = number
    data = encoded(Image.fromarray(np.ascontiguousarray(TURNED[number](upright))).convert("RGB"), kind, exif=exif)
    (tmp_path / "a").write_bytes(data)
    (found,) = pictures_in([tmp_path / "a"])
    assert found.image.size == (24, 40)
    assert np.abs(np.asarray(found.image.convert("L")).astype(int) - upright).max() < 40
    plain = decode_face(encoded(Image.fromarray(upright)), size=32, channels=1)
    assert np.abs(decode_face(data, size=32, channels=1).astype(int) - plain).mean() < 4


def test_scaling_averages_where_it_shrinks():
    stripes = np.tile(np.array([0, 255], dtype=np.uint8), (64, 32))
    assert abs(float(resize_face(stripes, size=16, channels=1).mean()) - 127.5) < 6


def with_size(data: bytes, place: int, size: bytes) -> bytes:
    return data[:place] + size + data[place + len(size) :]


def tiff_of(side: int) -> bytes:
    data = encoded(Image.fromarray(GREY), "TIFF")
    for tag in (256, 257):
        data = with_size(data, data.index(struct.pack("<HH", tag, 4)), struct.pack("<HHII", tag, 4, 1, side))
    return data


PHOTO = encoded(RGB.resize((256, 256)), "JPEG", progressive=True, quality=95)

BAD = {
    "nothing": (b"", "no picture of a known kind"),
    "text": (b"hello", "no picture of a known kind"),
    "EPS": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "no picture of a known kind"),
    "cut PNG": (encoded(Image.fromarray(GREY))[:-40], "no picture that can be read"),
    "cut progressive JPEG": (PHOTO[: len(PHOTO) // 2], "no picture that can be read"),
    "cut WebP": (encoded(RGB, "WEBP", lossless=True)[:-20], "no picture"),
    "cut GIF": (encoded(RGB.quantize(256), "GIF")[:-100], "no picture that can be read"),
    "cut TIFF": (encoded(RGB, "TIFF", compression="tiff_lzw")[:-60], "no picture"),
    "fractions": (encoded(Image.fromarray(GREY / np.float32(255)), "TIFF"), "its pixels are fractions"),
    "fractions, PPM": (b"Pf 32 32 -1.0\n" + GREY.astype("<f4").tobytes(), "its pixels are fractions"),
    "notes that grow": (
        png(8, 0, b"".join(b"\0" + bytes(row) for row in GREY), chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**8)))),
        "no picture that can be read",
    ),
    "PNG bomb": (png(8, 2, bytes(1000), size=(2**31 - 1, 2**31 - 1)), "pixels"),
    "PNG bomb that Pillow lets pass": (png(1, 0, bytes(1000), size=(10_000, 10_000)), "10000 x 10000 pixels"),
    "GIF bomb": (with_size(encoded(Image.fromarray(GREY), "GIF"), 6, b"\xff" * 4), "pixels"),
    "BMP bomb": (with_size(encoded(Image.fromarray(GREY), "BMP"), 18, struct.pack("<ii", 2**30, 2**30)), "pixels"),
    "PPM bomb": (b"P5 100000 100000 255\nx", "pixels"),
    "TIFF bomb": (tiff_of(2**31 - 1), "pixels"),
    "WebP bomb": (with_size(encoded(RGB, "WEBP", lossless=True), 21, b"\xff\xff\xff\x0f"), "pixels"),
}
"""What is no picture that can be taken, and what is said of it."""


@pytest.mark.parametrize(("data", "said"), BAD.values(), ids=BAD)
def test_what_is_no_picture_is_a_sentence(data, said, tmp_path):
    with pytest.raises(BadData, match=said) as caught:
        decode_face(data, size=32, channels=1)
    (tmp_path / "a.png").write_bytes(data)
    (found,) = pictures_in([tmp_path / "a.png"])
    assert found == Unreadable(source=str(tmp_path / "a.png"), reason=str(caught.value))


def test_files_that_would_be_waited_for_or_fill_the_memory(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with (tmp_path / "hole.png").open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    for name, said in (("pipe.png", "a device or a pipe"), ("hole.png", "the limit is")):
        with pytest.raises(BadData, match=said):
            read_picture(tmp_path / name)
        (found,) = pictures_in([tmp_path / name])
        assert said in found.reason
    for name, said in (("pipe.png", "no regular file"), ("hole.png", "the limit is"), ("none.png", "No such file")):
        with pytest.raises(OSError, match=said):
            Storage(str(tmp_path)).read(name)
