"""Files that are written whole or not at all, and the hashes that name them."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from emoexport.errors import BadInput, UsageError, reason_of

__all__ = [
    "lies_inside",
    "move_directory",
    "new_directory",
    "new_file",
    "read_text",
    "refuse_foreign",
    "sha256_of",
    "sha256_of_graph",
    "unfinished_directory",
    "write_bytes",
    "write_text",
]

_MOST_TEXT = 2**26
"""Bytes of a file that is read as text: records of the largest bundles have a few millions."""


def lies_inside(path: Path, folder: Path) -> bool:
    """Whether a path leads to somewhere in a folder, whatever links it goes through; not where it is no path at all."""
    try:
        return path.resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError, RuntimeError):  # too long, with a zero byte, links in a circle
        return False


def read_text(path: Path, *, inside: Path | None = None, error: type[BadInput] = BadInput, hint: str = "") -> str:
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
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        raise UsageError(f"{path} is no regular file, so it is not replaced.", hint="name another output")
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@contextmanager
def new_directory(target: Path, *, marker: str) -> Iterator[Path]:
    """Fill a temporary directory beside `target` and move it into place if the block ends well.

    What stood at `target` before is replaced only then, and only if it holds the file `marker`, which tells
    that it is one of ours; if the block fails it stays as it was.

    Raises:
        UsageError: if `target` is a file, or a directory with other things in it.
    """
    target = target.resolve()  # the parent of "." is "." too
    refuse_foreign(target, marker=marker)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        move_directory(temporary, target, marker=marker)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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
    """Move a directory to `target`, replacing what stands there if it is ours.

    Raises:
        UsageError: if `target` is a file, or a directory with things in it but not `marker`.
    """
    refuse_foreign(target, marker=marker)
    _replace_directory(source, target.resolve())


def _replace_directory(source: Path, target: Path) -> None:
    if not target.exists():
        source.rename(target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
    target.rename(old / "was")
    try:
        source.rename(target)
    except BaseException:
        (old / "was").rename(target)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)
