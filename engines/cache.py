"""Folders in which a runtime keeps what it compiled: one a graph, and only what is as it was written is read again."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from emoexport.errors import UsageError
from emoexport.files import sha256_of, sha256_of_graph, write_text

__all__ = ["kept_in"]

_SEAL = "sha256.json"


@contextmanager
def kept_in(cache: Path, graph: Path) -> Iterator[Path]:
    """The folder for what is compiled of a graph: named for what is in the graph, not for where it lies.

    Runtimes know a graph by its path, size and age, and trust what they find. So files that are not as they were after
    an earlier block, or that no block has left, are removed before this one.

    Args:
        cache: where such folders are.
        graph: an ONNX file.

    Raises:
        UsageError: if the folder cannot be written.
    """
    folder = cache / hashlib.sha256(sha256_of_graph(graph).encode()).hexdigest()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        known = _sealed(folder)
        for name, sha256 in _hashes(folder).items():
            if known.get(name) != sha256:
                (folder / name).unlink(missing_ok=True)
        yield folder
        found = _hashes(folder)
        if found != known:
            write_text(folder / _SEAL, json.dumps(found, indent=2) + "\n")
    except OSError as err:
        raise UsageError(
            f"{cache} cannot keep what is compiled: {err.strerror or err}.", hint="--cache with another folder"
        ) from err


def _hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of the files that are there; another process may be taking some away."""
    found = {}
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.name != _SEAL and not file.name.startswith("."):
            try:
                found[file.name] = sha256_of(file)
            except FileNotFoundError:
                continue
    return found


def _sealed(folder: Path) -> dict[str, str]:
    try:
        found: object = json.loads((folder / _SEAL).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    return {str(name): str(value) for name, value in found.items()} if isinstance(found, dict) else {}
