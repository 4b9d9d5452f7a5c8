"""Folders that are read from and written to: on a disk, or in an object store, by its URI."""

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import IO, Any, NamedTuple

from pyarrow import fs

from emoexport.errors import BadData, UsageError
from emoexport.files import write_bytes, writing
from emoexport.images import MAX_BYTES
from emoexport.temporaries import sweep_below

__all__ = ["Found", "Storage"]

_OBJECT_STORES = {"s3", "gcs", "abfs"}
"""Here an object is there once all of it is, and not before, so that it needs no other name until then."""


class Found(NamedTuple):
    """A file of a folder."""

    path: str
    """Below the folder, with slashes."""
    size: int
    changed_ns: int
    """When it was changed last, nanoseconds since 1970; 0 where that is not known."""

    @property
    def ending(self) -> str:
        """As in `.png`."""
        return os.path.splitext(self.path)[1].lower()  # noqa: PTH122 (of no path here)


class Storage:
    """A folder on a disk or in an object store (Amazon S3, Google Cloud Storage, Azure), through `pyarrow.fs`."""

    def __init__(self, root: str) -> None:
        """Connect to it; it need not exist.

        Args:
            root: a path, or a URI such as `s3://bucket/folder`.

        Raises:
            UsageError: if the URI is of another kind of store, or makes no sense.
        """
        self.root = root if "://" in root else os.path.abspath(root)  # noqa: PTH100 (links stay)
        self._files: Any = fs.LocalFileSystem()
        self._base = self.root
        try:
            if "://" in root:
                self._files, self._base = fs.FileSystem.from_uri(root)
                self.root = self._base if self.is_local else root
        except (OSError, ValueError, NotImplementedError) as err:
            raise UsageError(f"{root} cannot be opened: {err}.", hint="name a path, or s3://bucket/folder") from err
        kind = self._files.type_name
        if kind != "local" and kind not in _OBJECT_STORES:
            raise UsageError(f"{root}: '{kind}' is no object store.", hint="name a path, or s3://, gs://, abfs://")

    @classmethod
    def of(cls, files: Any, base: str) -> "Storage":
        """A folder of a file system that pyarrow has opened, taken for an object store."""
        made = cls.__new__(cls)
        made.root, made._files, made._base = f"{files.type_name}://{base}", files, base
        return made

    @property
    def is_local(self) -> bool:
        """Whether it is on a disk, or what is mounted like one."""
        return bool(self._files.type_name == "local")

    def kind_of(self, path: str = "") -> str:
        """`file`, `folder`, or nothing if there is none."""
        kind = self._files.get_file_info(self._at(path)).type
        return {fs.FileType.File: "file", fs.FileType.Directory: "folder"}.get(kind, "")

    def files(self) -> list[Found]:
        """All files in it and below, in the order of their paths, but the hidden ones; links that lead nowhere too.

        Raises:
            BadData: if a name is no UTF-8, or a folder cannot be listed.
        """
        try:
            if self.is_local:  # Arrow follows links to folders, round in circles too, and leaves out dead ones
                return sorted(self.look_at(_below(self._base)))
            infos = self._files.get_file_info(fs.FileSelector(self._base, recursive=True, allow_not_found=True))
        except UnicodeError as err:
            raise BadData(f"in {self.root} is a file whose name is not UTF-8.", hint="rename it") from err
        except OSError as err:
            raise BadData(f"{err.filename or self.root} cannot be listed: {err.strerror or err}.") from err
        start = len(self._base.rstrip("/")) + 1
        found = [_found(info, info.path[start:]) for info in infos if info.type != fs.FileType.Directory]
        return sorted(one for one in found if not any(part.startswith(".") for part in one.path.split("/")))

    def look_at(self, paths: Sequence[str]) -> list[Found]:
        """Size and time of files that are named."""
        infos = self._files.get_file_info([self._at(path) for path in paths])
        return [_found(info, path) for info, path in zip(infos, paths, strict=True)]

    def open(self, path: str) -> IO[bytes]:
        """A file to read from, at any place of it.

        Raises:
            OSError: if it cannot be opened, or is a device or a pipe, which would be waited for.
        """
        if self.is_local and self.kind_of(path) != "file":
            Path(self._at(path)).stat()  # says so if nothing is there
            raise OSError("it is no regular file")
        opened: IO[bytes] = self._files.open_input_file(self._at(path))
        return opened

    def read(self, path: str) -> bytes:
        """All bytes of a file.

        Raises:
            OSError: if it cannot be read, or has more bytes than a picture may have.
        """
        with self.open(path) as file:
            if (size := file.seek(0, os.SEEK_END)) > MAX_BYTES:
                raise OSError(f"it has {size:,} bytes; the limit is {MAX_BYTES:,}")
            file.seek(0)
            return file.read()

    def write(self, path: str, content: bytes) -> None:
        """Write a file whole or not at all; one that is there is replaced."""
        if self.is_local:
            write_bytes(Path(self._at(path)), content)
            return
        with self._files.open_output_stream(self._at(path)) as file:
            file.write(content)

    def remove(self, path: str) -> None:
        """Remove a file, if it is there."""
        if self.kind_of(path) == "file":
            self._files.delete_file(self._at(path))

    def sweep(self) -> None:
        """Remove what was being written when its writer was killed."""
        if self.is_local:
            sweep_below(Path(self._base))

    def writing(self) -> AbstractContextManager[None]:
        """Be the one command that writes into it, from here to the end of the block; in an object store nobody asks.

        Raises:
            Busy: if another command is writing it.
        """
        return writing(Path(self._base)) if self.is_local else nullcontext()

    def name(self, path: str) -> str:
        """What a file is called outside the folder."""
        return f"{self.root.rstrip('/')}/{path}"

    def _at(self, path: str) -> str:
        return f"{self._base.rstrip('/')}/{path}" if path else self._base


def _below(folder: str) -> list[str]:
    """Paths of the files in a folder and below; links to folders are not followed."""

    def stop(err: OSError) -> None:
        if err.filename != folder or os.path.lexists(folder):
            raise err

    found = []
    for where, folders, names in os.walk(folder, onerror=stop):
        folders[:] = [name for name in folders if name[0] != "."]
        found += [os.path.relpath(os.path.join(where, name), folder) for name in names if name[0] != "."]  # noqa: PTH118
    "".join(found).encode()  # names that are no text have no place in a table
    return found


def _found(info: Any, path: str) -> Found:
    return Found(path, info.size or 0, info.mtime_ns or 0)
