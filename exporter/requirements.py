"""Packages that are installed here, what these need, and the files of our own."""

import importlib.metadata
import importlib.util
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

__all__ = ["distribution_of", "name_of", "needed_by", "own_files", "version_here"]

_PACKAGES = ("emoexport", "emoexport.engines", "emoexport.train", "emoexport.calib")

_SAME = {"onnxruntime": "onnxruntime-gpu", "onnxruntime-gpu": "onnxruntime"}
"""Packages of one version in two builds: either tells the version, and what both need."""


def name_of(requirement: str) -> str:
    """The name of a package, as pip has it."""
    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert found is not None
    return re.sub(r"[-_.]+", "-", found[0]).lower()


def distribution_of(name: str) -> importlib.metadata.Distribution | None:
    """A package that is installed here, or its other build."""
    for each in (name, _SAME.get(name)):
        if each is not None:
            try:
                return importlib.metadata.distribution(each)
            except importlib.metadata.PackageNotFoundError:
                continue
    return None


def version_here(name: str) -> str | None:
    """Its public version: what stands behind a `+` is of one build."""
    found = distribution_of(name)
    return found.version.partition("+")[0] if found else None


def needed_by(names: Iterable[str]) -> Iterator[str]:
    """Packages that are needed by others, and so on, as far as they are installed here; without any extras."""
    seen, waiting = set(names), list(names)
    while waiting:
        found = distribution_of(waiting.pop())
        for requirement in (found.requires or ()) if found else ():
            name = name_of(requirement)
            if "extra ==" in requirement or name in seen or distribution_of(name) is None:
                continue
            seen.add(name)
            waiting.append(name)
            yield name


def own_files() -> dict[str, Path]:
    """The modules of this package: where each is, by its path below `emoexport/`."""
    found = {}
    for package in _PACKAGES:
        spec = importlib.util.find_spec(package)
        assert spec is not None
        assert spec.submodule_search_locations is not None
        folder = "/".join([*package.split(".")[1:], ""])
        for file in sorted(Path(spec.submodule_search_locations[0]).glob("*.py")):
            found[f"{folder}{file.name}".lstrip("/")] = file
    return found
