"""The fold compiled ahead of time by PyTorch: packages of machine code and weights, for one kind of machine."""

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch import nn

from emoexport.aot_compile import compile_apart
from emoexport.engines import BACKENDS, open_engine
from emoexport.engines.machine import find_compiler, instruction_sets, versions_of
from emoexport.errors import CheckFailed, MissingRuntime
from emoexport.fold import Autocast, Branches, Fold
from emoexport.manifest import PackageEntry
from emoexport.member_graph import MemberGraph
from emoexport.precision import PRECISIONS

__all__ = ["compile_fold", "require_compiler"]

_BACKEND = BACKENDS["inductor"]

_FACES = 16
"""In the call that kernels and the order of weights in memory are chosen for; any other number works too."""


_MEMBERS: Mapping[str, Callable[[Branches], nn.Module]] = {
    "fp32": lambda members: members,
    "bf16": lambda members: Autocast(members, device="cpu", dtype=torch.bfloat16),
}
"""By precision, what computes in it."""


def require_compiler() -> None:
    """Before anything slow is done.

    Raises:
        MissingRuntime: if there is no C++ compiler.
    """
    compiler, where = find_compiler()
    if where is None:
        raise MissingRuntime(
            f"{_BACKEND.title} needs a C++ compiler; there is no {compiler} here.",
            hint="apt install g++; or CXX=/path/to/compiler; or build without --engine inductor",
        )


def compile_fold(
    members: Sequence[MemberGraph],
    fold: Callable[[nn.Module], Fold],
    directory: Path,
    *,
    face_shape: tuple[int, int, int],
    max_batch: int,
    console: Console,
) -> dict[str, PackageEntry]:
    """Compile a fold for this machine at each precision of the backend, members side by side.

    Args:
        members: traced networks, pictures to logits. They stay as they are.
        fold: what makes the fold of the members, once they are one module.
        directory: the bundle, which gets `engines/<backend>-<precision>.pt2`.
        face_shape: `(H, W, C)` of the uint8 faces.
        max_batch: the largest number of faces in a call.
        console: where progress is shown.

    Returns:
        Entries of the manifest, by name of the engine.

    Raises:
        MissingRuntime: if there is no C++ compiler.
        CheckFailed: if the compiler fails, or what it made does not compute what the fold does.
    """
    require_compiler()
    entries = {}
    for precision in _BACKEND.precisions:
        title = f"{_BACKEND.title} at {PRECISIONS[precision].title}"
        console.print(f"compiling for {title}, up to a minute a member ...")
        file = Path("engines") / f"{_BACKEND.name}-{precision}.pt2"
        (directory / file).parent.mkdir(exist_ok=True)
        started = time.monotonic()
        whole = fold(_MEMBERS[precision](Branches(members)))
        try:
            _compile(whole, directory / file, face_shape=face_shape, max_batch=max_batch)
        except Exception as err:  # what compilers raise shares no base but this
            first = (str(err).strip() or type(err).__name__).splitlines()[0]
            raise CheckFailed(
                f"{title} cannot compile the fold: {first}", hint="build without --engine inductor"
            ) from err
        _require_the_same(whole, directory / file, precision, face_shape=face_shape, max_batch=max_batch)
        entries[f"{_BACKEND.name}-{precision}"] = PackageEntry(
            file=file.as_posix(),
            backend=_BACKEND.name,
            precision=precision,
            torch=versions_of("torch")["torch"],
            instruction_sets=instruction_sets(),
            seconds=round(time.monotonic() - started, 1),
        )
    return entries


def _compile(fold: Fold, path: Path, *, face_shape: tuple[int, int, int], max_batch: int) -> None:
    """Export with a free number of faces, and compile in a process of its own."""
    faces = torch.zeros(_FACES, *face_shape, dtype=torch.uint8)
    many = torch.export.Dim("N", min=1, max=max(max_batch, 64))
    with torch.no_grad():
        program = torch.export.export(fold, (faces,), dynamic_shapes=({0: many},), strict=False)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as folder:
        saved = Path(folder) / "program.pt2"
        torch.export.save(program, saved)
        compile_apart(saved, path)


@torch.inference_mode()
def _require_the_same(
    fold: Fold, package: Path, precision: str, *, face_shape: tuple[int, int, int], max_batch: int
) -> None:
    """Hold the passes of a package against those of the fold: compilers err, and at some numbers of faces only."""
    engine = open_engine(_BACKEND, package, precision=precision, face_shape=face_shape, max_batch=max_batch)
    limit = 10 * PRECISIONS[precision].tolerance.mean_difference
    for count in sorted({1, min(3, max_batch), min(_FACES, max_batch)}):
        faces = np.random.default_rng(count).integers(0, 256, (count, *face_shape), dtype=np.uint8)
        difference = float(np.abs(engine.scores(faces) - fold(torch.from_numpy(faces))[3].numpy()).mean())
        if not difference <= limit:
            raise CheckFailed(
                f"{engine.name} differs from the fold it was compiled from by {difference:.2g} on average over "
                f"{count} faces; needed is at most {limit:g}.",
                hint="build without --engine inductor, or with another version of PyTorch",
            )
