"""What requests bring, read within limits and in memory alone: pictures, forms with one, arrays of faces."""

import io
import sys
from collections.abc import AsyncGenerator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from emoexport.errors import BadData, EmoexportError

__all__ = ["NPY", "PictureTooLarge", "WrongMediaType", "faces_in", "packed", "read_array", "read_picture"]

NPY = "application/x-npy"
_SEND_A_PICTURE = "curl -F picture=@face.jpg, or -H 'Content-Type: image/jpeg' --data-binary @face.jpg"


class PictureTooLarge(EmoexportError):
    """A body is longer than may be sent."""


class WrongMediaType(EmoexportError):
    """A body is of another kind than is taken here."""


class _InMemory(MultiPartParser):
    """Starlette's parser, which would put what is large into a file."""

    spool_max_size = sys.maxsize


async def read_picture(request: Request, limit: int) -> bytes:
    """The picture of a request: its body, or the first file of its form.

    Args:
        request: `image/*` or `multipart/form-data`.
        limit: bytes of the body at most.

    Raises:
        WrongMediaType: if it is neither.
        PictureTooLarge: if it is longer.
        BadData: if the form cannot be read, or has no file.
    """
    kind = _kind_of(request)
    if kind.startswith("image/"):
        return await _whole(request, limit)
    if kind != "multipart/form-data":
        raise WrongMediaType(f"found {kind or 'no Content-Type'}; needed is a picture.", hint=_SEND_A_PICTURE)
    try:
        form = await _InMemory(request.headers, _chunks(request, limit), max_files=1, max_fields=8).parse()
    except MultiPartException as err:
        raise BadData(f"the form cannot be read: {err.message}", hint=_SEND_A_PICTURE) from err
    for value in form.values():
        if isinstance(value, UploadFile):
            return await value.read()
    raise BadData("the form has no file in it.", hint=_SEND_A_PICTURE)


async def read_array(request: Request, limit: int) -> bytes:
    """The body of a request that brings faces as an array; errors as of `read_picture`."""
    kind = _kind_of(request)
    if kind != NPY:
        raise WrongMediaType(
            f"found {kind or 'no Content-Type'}; needed is {NPY}.",
            hint=f"numpy.save, sent with -H 'Content-Type: {NPY}'",
        )
    return await _whole(request, limit)


def faces_in(data: bytes, shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    """Faces from a file of `numpy.save`.

    Args:
        data: the file. Its header is checked before anything is made of it, and nothing in it can run.
        shape: `(H, W, C)`.

    Returns:
        uint8 `(N, H, W, C)`, N >= 1.

    Raises:
        BadData: if it is no such file, or of another type or shape.
    """
    file = io.BytesIO(data)
    needed = f"uint8 faces (N, {', '.join(map(str, shape))}), in the order of C"
    try:
        version = np.lib.format.read_magic(file)
        read: Any = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        found, fortran, dtype = read(file)
    except Exception as err:  # a header is parsed as Python, which raises a score of kinds
        raise BadData(f"this is no array of numpy.save; needed are {needed}.") from err
    if dtype != np.uint8 or len(found) != 4 or found[1:] != shape or fortran or found[0] < 1:
        raise BadData(f"found {dtype} {found}; needed are {needed}.")
    if len(data) - file.tell() != int(np.prod(found, dtype=object)):
        raise BadData(f"the array is cut short, or goes on after its end; needed are {needed}.")
    return np.frombuffer(data, dtype=np.uint8, offset=file.tell()).reshape(found)


def packed(array: NDArray[Any]) -> bytes:
    """An array as a file of `numpy.save`."""
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


def _kind_of(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def _whole(request: Request, limit: int) -> bytes:
    return b"".join([chunk async for chunk in _chunks(request, limit)])


async def _chunks(request: Request, limit: int) -> AsyncGenerator[bytes, None]:
    """The body as it comes, as long as it is no longer than it may be."""
    _require_within(_declared(request.headers), limit)
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        _require_within(size, limit)
        yield chunk


def _declared(headers: Headers) -> int:
    length = headers.get("content-length", "")
    return int(length) if length.isdecimal() else 0


def _require_within(size: int, limit: int) -> None:
    if size > limit:
        raise PictureTooLarge(
            f"the body has {size:,} bytes or more; the limit is {limit:,}.",
            hint="send a smaller picture, or start the server with a higher --max-megabytes",
        )
