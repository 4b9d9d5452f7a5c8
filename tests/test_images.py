import io

import numpy as np
import pytest
from PIL import Image

from emoexport.errors import BadData
from emoexport.images import decode_face, resize_face

GREY = np.tile(np.linspace(0, 255, 32).astype(np.uint8), (32, 1))


def encoded(picture: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def test_a_face_of_the_right_size_comes_back_as_it_is():
    face = decode_face(encoded(Image.fromarray(GREY)), size=32, channels=1)
    assert face.dtype == np.uint8
    assert np.array_equal(face[..., 0], GREY)


def test_other_kinds_of_picture():
    near = {"atol": 3}
    sixteen = Image.fromarray(GREY.astype(np.uint16) * 257)
    assert np.allclose(decode_face(encoded(sixteen), size=32, channels=1)[..., 0], GREY, **near)
    colour = Image.merge("RGB", [Image.fromarray(GREY)] * 3)
    assert np.allclose(decode_face(encoded(colour), size=32, channels=1)[..., 0], GREY, **near)
    assert np.allclose(decode_face(encoded(colour), size=32, channels=3)[..., 1], GREY, **near)
    cmyk = decode_face(encoded(colour.convert("CMYK"), "JPEG", quality=95), size=32, channels=1)
    assert np.allclose(cmyk[..., 0].astype(int), GREY, atol=12)
    clear = Image.merge("LA", [Image.fromarray(np.full_like(GREY, 255)), Image.fromarray(GREY)])
    assert np.allclose(decode_face(encoded(clear), size=32, channels=1)[..., 0], GREY, **near)
    frames = [Image.fromarray(GREY), Image.fromarray(255 - GREY)]
    animated = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.allclose(decode_face(animated, size=32, channels=1)[..., 0].astype(int), GREY, atol=6)


def test_a_turned_photograph_is_set_upright():
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    data = encoded(Image.fromarray(GREY), exif=exif)
    assert np.array_equal(decode_face(data, size=32, channels=1)[..., 0], GREY[::-1, ::-1])


def test_scaling_averages_where_it_shrinks():
    stripes = np.tile(np.array([0, 255], dtype=np.uint8), (64, 32))
    assert abs(float(resize_face(stripes, size=16, channels=1).mean()) - 127.5) < 6


@pytest.mark.parametrize("data", [b"", b"hello", encoded(Image.fromarray(GREY))[:-40]])
def test_what_is_no_picture(data):
    with pytest.raises(BadData, match="no picture"):
        decode_face(data, size=32, channels=1)


def test_a_bomb_is_refused_before_it_is_decoded():
    for side in (10_000, 20_000):
        bomb = encoded(Image.new("1", (side, side)))
        assert len(bomb) < 200_000
        with pytest.raises(BadData, match="pixels"):
            decode_face(bomb, size=32, channels=1)
