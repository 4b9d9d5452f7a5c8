"""A Docker build context for `emoexport predict` with one engine of a bundle: its runtime, and no PyTorch."""

import re
import shutil
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from emoexport.engines import BACKENDS
from emoexport.engines.passport import Passport
from emoexport.errors import BadBundle
from emoexport.files import new_directory, write_text
from emoexport.manifest import MANIFEST_FILE, Manifest
from emoexport.packaging import RECORD, Packed, Target, render, write_record
from emoexport.requirements import name_of, needed_by, own_files, version_here

__all__ = ["DOCKER", "requirements_for", "write_context"]

DOCKER = Target(
    title="Docker",
    runs=(
        "onnxruntime",
        "openvino",
        "openvino-throughput",
        "onnxruntime-cuda",
        "onnxruntime-tensorrt",
        "tensorrt",
        "tensorrt-rtx",
    ),
    refused={"inductor": "it needs PyTorch, and an image is for the runtime alone."},
)

_COMMON = ("filelock", "numpy", "pillow", "psutil", "pydantic", "rich", "scipy", "typer")
"""What `emoexport predict` imports, beside a runtime."""

_CUDA = ("onnxruntime-gpu[cuda,cudnn]", "nvidia-cublas")
_RUNTIMES: Mapping[str, tuple[str, ...]] = {
    "onnxruntime": ("onnxruntime",),
    "onnxruntime-cuda": _CUDA,
    "onnxruntime-tensorrt": (*_CUDA, "tensorrt-cu13<11"),
    "openvino": ("openvino",),
    "openvino-throughput": ("openvino",),
    "tensorrt": ("tensorrt", "cuda-bindings"),
    "tensorrt-rtx": ("tensorrt-rtx-cu13", "cuda-bindings"),
}
"""By backend, what pip installs for it."""


def write_context(packed: Packed, out: Path) -> None:
    """Write a package for Docker, whole or not at all.

    Args:
        packed: the engine.
        out: the directory, which gets `Dockerfile`, `requirements.txt`, `emoexport/`, `bundle/`, `README.md` and
            `emoexport.json`.

    Raises:
        UsageError: if `out` holds other things.
    """
    with new_directory(out, marker=RECORD) as folder:
        _copy_bundle(packed, folder / "bundle")
        _copy_code(folder / "emoexport")
        requirements = requirements_for(packed)
        write_text(folder / "requirements.txt", "".join(f"{line}\n" for line in requirements))
        words = {
            "packed": packed,
            "backend": BACKENDS[packed.backend],
            "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        }
        write_text(folder / "Dockerfile", render("dockerfile.j2", **words))
        write_text(folder / "README.md", render("docker_readme.md.j2", **words))
        write_record(folder, packed, DOCKER)


def requirements_for(packed: Packed) -> list[str]:
    """Lines of `requirements.txt`: what the engine needs, and what that needs, in the versions that are here.

    A runtime that is not installed here has the version of the engine's passport, or none.
    """
    runtime = _RUNTIMES[packed.backend]
    passport = packed.passport
    known = dict(passport.versions) if passport else {}
    known |= {"tensorrt-rtx-cu13": known["tensorrt-rtx"]} if "tensorrt-rtx" in known else {}
    named = {name_of(each): each for each in (*_COMMON, *runtime)}
    found = {name: _pinned(line, known.get(name) or version_here(name)) for name, line in named.items()}
    for name in needed_by(named):
        found.setdefault(name, _pinned(name, version_here(name)))
    return [found[name] for name in sorted(found)]


def _pinned(requirement: str, version: str | None) -> str:
    return requirement if version is None else f"{re.split('[<>=]', requirement)[0]}=={version}"


def _copy_code(target: Path) -> None:
    """The package as it is here: what has run the engine runs it there."""
    for name, file in own_files().items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target / name)


def _copy_bundle(packed: Packed, target: Path) -> None:
    """The engine with its passport, the graph that it is of, and a manifest of these files."""
    source = packed.bundle.path
    manifest = _kept(packed)
    files = [*manifest.files]
    if packed.passport is not None:
        files.append(packed.file.relative_to(source).as_posix())
    for name in files:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)
    with suppress(BadBundle):  # there is none, or it tells nothing
        engine = Path("engines", packed.name)
        Passport.read(source / engine).write(target / engine)
    write_text(target / MANIFEST_FILE, manifest.to_json())


def _kept(packed: Packed) -> Manifest:
    """The manifest with no other graph than that of the engine, which a built engine is held against."""
    manifest, passport = packed.bundle.manifest, packed.passport
    file = passport.graph if passport else packed.file.name
    precision = next(name for name, entry in manifest.graphs.items() if entry.file == file)
    kept = manifest.model_copy(
        update={
            "graphs": {precision: manifest.graphs[precision]},
            "gate": {name: entry for name, entry in manifest.gate.items() if name == precision},
            "engines": {},
            "tuning": None,
        }
    )
    names = {"labels.txt", f"{file}.data", *kept.named}
    files = {name: entry for name, entry in manifest.files.items() if name in names}
    return kept.model_copy(update={"files": files}).sealed()
