"""One writer at a time: who writes a directory holds its lock; who reads one takes none."""

import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from emoexport.errors import Busy

__all__ = ["lock"]

_HOLDER = re.compile(r"process \d+ on [\w.-]+, since [\d :-]+")
_held = threading.local()


@contextmanager
def lock(target: Path) -> Iterator[bool]:
    """Hold the lock of a directory until the end of the block, or be refused at once.

    It is the file `.<name>.lock` beside the directory, which may be replaced or removed meanwhile; where nothing can be
    written beside it, and so nobody can replace it, `.lock` inside. The kernel takes it from a process that ends,
    however it ends. Forked processes do not have it. A thread that has it may ask again. Two users, of whom one alone
    may write beside the directory, have a lock each: what both write in it stays whole, and the later one's counts.

    Args:
        target: the directory, with no links in its path; it need not exist.

    Returns:
        Whether this thread did not have it before.

    Raises:
        Busy: if another process or thread has it.
        OSError: if the lock cannot be written.
    """
    mine: set[tuple[int, Path]] = _held.__dict__.setdefault("targets", set())
    key = (os.getpid(), target)
    if key in mine:
        yield False
        return
    file = _file_of(target)
    missing = [above for above in file.parents if not above.exists()]
    held = FileLock(file, poll_interval=0.01)
    try:
        _take(held, file)
    except Timeout as err:
        raise Busy(
            f"another emoexport command is writing {_shown(target)}{_holder(file)}.",
            hint="wait until it has ended, or name another output",
        ) from err
    mine.add(key)
    try:
        with suppress(OSError):  # who holds it is a comfort
            file.write_text(f"process {key[0]} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M')}\n")
        yield True
    finally:
        mine.discard(key)
        if os.getpid() == key[0]:  # not a forked process that leaves the block too
            with suppress(OSError):  # while it is held: who opened it before sees that it is gone, and makes another
                file.unlink()
            held.release()
        with suppress(OSError):  # nothing was written
            for folder in missing:
                folder.rmdir()


def _take(held: FileLock, file: Path) -> None:
    for is_last in (False, True):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            held.acquire(timeout=0.1)  # longer than a holder takes from removing the file to letting go of it
        except FileNotFoundError:  # another has just removed the folder, as it wrote nothing
            if is_last:
                raise
        else:
            return


def _file_of(target: Path) -> Path:
    beside = target.with_name(f".{target.name}.lock")
    above = next(one for one in target.parents if one.exists())
    return target / ".lock" if target.is_dir() and not os.access(above, os.W_OK) else beside


def _holder(file: Path) -> str:
    """Who says that it has the lock."""
    try:
        text = file.read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return ""
    return f": {text}" if _HOLDER.fullmatch(text) else ""


def _shown(target: Path) -> str:
    """As a person would name it."""
    return str(target.relative_to(Path.cwd())) if target.is_relative_to(Path.cwd()) else str(target)
