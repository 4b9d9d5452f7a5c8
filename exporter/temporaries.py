"""Temporary files and directories, told from leftovers: who fills one holds a lock on it, which ends with the process.

They are named `.<name>.<8 letters>.emoexport` beside what they are to become. A process that is killed leaves them;
as nobody holds them then, the next command that writes there removes them. Where there are no such locks (Windows, and
directories on NFS) nothing is taken for a leftover.
"""

import os
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

if sys.platform != "win32":
    import fcntl

__all__ = ["MOVED_AWAY", "sweep_below", "sweep_beside", "temporary_directory", "temporary_file"]

MOVED_AWAY = "moved-away"
"""In a leftover, what stood at its name and was not yet replaced; it is moved back."""

_SUFFIX = ".emoexport"
_OURS = re.compile(r"\.(?P<name>.+)\.[a-z0-9_]{8}" + re.escape(_SUFFIX))


@contextmanager
def temporary_file(path: Path) -> Iterator[Path]:
    """An empty file in the same directory; at the end it is removed, unless it was moved."""

    def make() -> str:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=_SUFFIX, dir=path.parent)
        os.close(handle)
        return name

    with _held(make) as made:
        try:
            yield made
        finally:
            made.unlink(missing_ok=True)


@contextmanager
def temporary_directory(path: Path) -> Iterator[Path]:
    """An empty directory in the same directory; what has its name at the end is removed."""
    with _held(lambda: tempfile.mkdtemp(prefix=f".{path.name}.", suffix=_SUFFIX, dir=path.parent)) as made:
        try:
            yield made
        finally:
            shutil.rmtree(made, ignore_errors=True)


def sweep_beside(path: Path) -> None:
    """Remove leftovers of what was to become `path`."""
    for name in _names_in(path.parent):
        if _name_of(name) == path.name:
            _remove_if_dead(path.with_name(name))


def sweep_below(folder: Path) -> None:
    """Remove all leftovers in a folder and below. Only for a folder that is known to be ours."""
    for where, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            if _name_of(name):
                _remove_if_dead(Path(where, name))
        folders[:] = [name for name in folders if not _name_of(name)]


def _names_in(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)  # noqa: PTH208 (names)
    except (FileNotFoundError, PermissionError):
        return []


def _name_of(name: str) -> str:
    """Of what a temporary thing was to become; nothing if it is none."""
    found = _OURS.fullmatch(name)
    return found["name"] if found and found["name"] not in (".", "..") else ""


@contextmanager
def _held(make: Callable[[], str]) -> Iterator[Path]:
    """Make something and lock it, until the end of the block or of the process."""
    while True:
        made = Path(make())
        if sys.platform == "win32":
            yield made
            return
        handle = os.open(made, os.O_RDONLY)
        try:
            _locked(handle, fcntl.LOCK_EX)
            if not _is_at(made, handle):  # taken for a leftover before it was locked
                continue
            yield made
            return
        finally:
            os.close(handle)  # that alone, as an explicit unlock in a forked process would unlock it for all


def _remove_if_dead(path: Path) -> None:
    """Remove what nobody holds; what cannot be looked at stays."""
    if sys.platform == "win32":
        return
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return
    try:
        if _locked(handle, fcntl.LOCK_EX | fcntl.LOCK_NB) and _is_at(path, handle):
            if stat.S_ISDIR(os.fstat(handle).st_mode):
                home = path.with_name(_name_of(path.name))
                if (path / MOVED_AWAY).exists() and not home.exists():
                    (path / MOVED_AWAY).rename(home)
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
    finally:
        os.close(handle)


def _locked(handle: int, how: int) -> bool:
    try:
        fcntl.flock(handle, how)
    except OSError:  # held by another, or there are no locks here
        return False
    return True


def _is_at(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(path.lstat(), os.fstat(handle))
    except FileNotFoundError:
        return False
