"""Files and directories that are written whole or not at all, by one command at a time, and the hashes that name them.

Whenever a process is killed, what stands at a name is the old thing or the new one, each whole.
"""

import ctypes
import errno
import hashlib
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from emoexport.errors import BadInput, DiskFull, EmoexportError, UsageError, reason_of
from emoexport.locks import lock
from emoexport.temporaries import MOVED_AWAY, sweep_below, sweep_beside, temporary_directory, temporary_file

__all__ = [
    "changed_directory",
    "lies_inside",
    "move_directory",
    "new_directory",
    "new_file",
    "read_text",
    "refuse_foreign",
    "room_for",
    "sha256_of",
    "sha256_of_graph",
    "unfinished_directory",
    "write_bytes",
    "write_text",
    "writing",
]

_MOST_TEXT = 2**26
"""Bytes of a file that is read as text: records of the largest bundles have a few millions."""
_FULL = (errno.ENOSPC, errno.EDQUOT)
_HERE = -100
"""`AT_FDCWD` of Linux: paths are seen from the working directory."""
_EXCHANGE = 2
"""`RENAME_EXCHANGE` of Linux."""


def lies_inside(path: Path, folder: Path) -> bool:
    """Whether a path leads to somewhere in a folder, whatever links it goes through; not where it is no path at all."""
    try:
        return path.resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError, RuntimeError):  # too long, with a zero byte, links in a circle
        return False


def read_text(path: Path, *, inside: Path | None = None, error: type[EmoexportError] = BadInput, hint: str = "") -> str:
    """Read UTF-8 text, whatever may stand under the name.

    Args:
        path: the file.
        inside: a folder that it must not lead out of; None for anywhere.
        error: the class raised.
        hint: what comes next where it cannot be read.

    Raises:
        BadInput: (or `error`) if it leads out of the folder, is no regular file, too large or no UTF-8, or cannot be
            read.
    """
    try:
        size = path.stat().st_size
        if inside is not None and not lies_inside(path, inside):
            raise error(f"{path} leads out of {inside}.", hint=hint)
        if not path.is_file():  # a pipe would be waited for
            raise error(f"{path} cannot be read as text: it is no regular file.", hint=hint)
        if size > _MOST_TEXT:
            raise error(f"{path} has {size:,} bytes; the limit is {_MOST_TEXT:,}.", hint=hint)
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as err:
        raise error(f"{path} cannot be read as text: {reason_of(err)}.", hint=hint) from err


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_graph(graph: Path) -> str:
    """SHA-256 of a graph, followed by that of its weights where they stand beside it."""
    weights = graph.with_name(f"{graph.name}.data")
    return sha256_of(graph) + (sha256_of(weights) if weights.exists() else "")


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text as `write_bytes` does."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, as `new_file` does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path) as file:
        file.write(content)


@contextmanager
def new_file(path: Path) -> Iterator[IO[bytes]]:
    """A file to write under a temporary name in the same directory, moved to `path` if the block ends well.

    Where `path` is a link, what it points to is replaced.

    Raises:
        UsageError: if `path` is a directory, a device or a pipe.
        DiskFull: if there is no room for it.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        raise UsageError(f"{path} is no regular file, so it is not replaced.", hint="name another output")
    with room_for(path), temporary_file(path) as temporary:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
        _flush(path.parent)


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """Be the one command that writes a directory, from here to the end of the block; who only reads it need not ask.

    What a killed command left beside it is removed first.

    Raises:
        Busy: if another command is writing it; nothing was changed.
        DiskFull: if the block fails for want of room.
    """
    target = target.resolve()  # the parent of "." is "." too
    with room_for(target), lock(target) as first:
        if first:
            sweep_beside(target)
            sweep_below(unfinished_directory(target))
        yield


@contextmanager
def new_directory(target: Path, *, marker: str) -> Iterator[Path]:
    """Fill a temporary directory beside `target` and move it into place if the block ends well.

    What stood at `target` before is replaced only then, and only if it holds the file `marker`, which tells
    that it is one of ours; if the block fails it stays as it was.

    Raises:
        UsageError: if `target` is a file, or a directory with other things in it.
        Busy: if another command is writing it.
        DiskFull: if there is no room for it.
    """
    target = target.resolve()
    refuse_foreign(target, marker=marker)
    with writing(target), temporary_directory(target) as temporary:
        yield temporary
        temporary.chmod(0o755)
        move_directory(temporary, target, marker=marker)


@contextmanager
def changed_directory(target: Path) -> Iterator[Path]:
    """Change some files of a directory, all at once or none: the block changes a copy, which then takes its place.

    Files of the copy are the same as those of the directory until they are replaced: `new_file` does, and a file must
    not be opened to be changed. Whoever changes it holds the lock of what it is part of.

    Raises:
        DiskFull: if there is no room for what is new.
    """
    target = target.resolve()
    with room_for(target), temporary_directory(target) as copy:
        if target.is_dir():
            shutil.copytree(target, copy, symlinks=True, copy_function=_link, dirs_exist_ok=True)
        yield copy
        copy.chmod(0o755)
        _replace_directory(copy, target)


def unfinished_directory(out: Path) -> Path:
    """Where what becomes the directory `out` is kept until it is complete: beside it, and hidden."""
    out = out.resolve()
    return out.with_name(f".{out.name}.unfinished")


def refuse_foreign(target: Path, *, marker: str) -> None:
    """Refuse to replace what is not ours.

    Raises:
        UsageError: if `target` is a file, or a directory with things in it but not `marker`.
    """
    if target.is_dir():
        if any(target.iterdir()) and not (target / marker).is_file():
            raise UsageError(
                f"{target} holds other files (there is no {marker} in it), so it is not replaced.",
                hint="name an empty or a new directory",
            )
    elif target.exists():
        raise UsageError(f"{target} is a file; needed is a directory.", hint="name another output")


def move_directory(source: Path, target: Path, *, marker: str) -> None:
    """Move a directory to `target`, replacing what stands there if it is ours. Whoever does so holds its lock.

    Raises:
        UsageError: if `target` is a file, or a directory with things in it but not `marker`.
    """
    refuse_foreign(target, marker=marker)
    _replace_directory(source, target.resolve())


@contextmanager
def room_for(path: Path) -> Iterator[None]:
    """Say of a disk that is full what did not fit on it.

    Raises:
        DiskFull: if the block fails for want of room, whoever says so: the system, or a library in its own words.
    """
    path = path.absolute()
    try:
        yield
    except Exception as err:
        if isinstance(err, DiskFull):
            if not err.path:  # as another process told it
                raise
            full = Path(err.path)
        elif getattr(err, "errno", None) in _FULL or os.strerror(errno.ENOSPC) in str(err):
            named = getattr(err, "filename2", None) or getattr(err, "filename", None)  # of a copy the second
            full = Path(str(named or path))
        else:
            raise
        ours = f".{path.name}.", f"{path.name}{os.sep}"
        if os.path.relpath(full, path.parent).startswith(ours):  # part of it, by a name that people do not know
            full = path
        above = next(one for one in full.absolute().parents if one.exists())
        raise DiskFull(
            f"{full} could not be written, as its disk is full: {shutil.disk_usage(above).free / 1e6:.1f} MB are free "
            "there, and more is needed.",
            hint="free some room and repeat the command, or name another output; what stood there is as it was",
            path=str(full),
        ) from err


def _replace_directory(source: Path, target: Path) -> None:
    """Move a directory to a name at once, and remove what was there.

    On Linux the two are exchanged (renameat2), so that there is one at every moment. Elsewhere, and on file systems
    that cannot (NFS), the old one is moved away first: for a moment there is none, and if the process is killed in it,
    the next command that writes there moves it back.
    """
    _flush_below(source)
    if not target.exists():
        source.rename(target)
        _flush(target.parent)
        return
    with temporary_directory(target) as old:
        if _exchange(source, target):
            source.rename(old / "replaced")
        else:
            target.rename(old / MOVED_AWAY)
            try:
                source.rename(target)
            except BaseException:
                (old / MOVED_AWAY).rename(target)
                raise
        _flush(target.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange what two names stand for; false where the kernel or the file system cannot.

    Source: renameat2(2); Python has no binding of it, and the one on PyPI is a C extension of 2022.
    """
    if sys.platform != "linux":
        return False
    rename = getattr(ctypes.CDLL(None), "renameat2", None)  # of glibc 2.28 and musl 1.2.4 or later
    return rename is not None and rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0


def _link(source: str, copy: str) -> None:
    """A second name for a file, or where there is no such thing a copy of it."""
    try:
        os.link(source, copy, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, copy, follow_symlinks=False)


def _flush_below(directory: Path) -> None:
    """Have all of a directory on the disk before its name is: a power cut must not leave the name alone."""
    for where, _, names in os.walk(directory):
        for name in names:
            _flush(Path(where, name))
        _flush(Path(where))


def _flush(path: Path) -> None:
    if os.name == "posix" and not path.is_symlink():
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
