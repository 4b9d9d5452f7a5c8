"""A bundle against the clock: its engines, the reference, and what PyTorch makes of the same members."""

import copy
import functools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from emoexport.bundle import Bundle
from emoexport.clock import timestamp
from emoexport.engines import BACKENDS, require_known
from emoexport.engines.base import Engine
from emoexport.engines.cuda import find_cuda, require_device
from emoexport.engines.machine import describe_machine
from emoexport.engines.timing import UNSTABLE_PCT
from emoexport.errors import BadBundle, MissingRuntime, UsageError
from emoexport.fold import Fold
from emoexport.gemm_peak import gemm_peaks
from emoexport.precision import PRECISIONS
from emoexport.progress import progress_bar
from emoexport.reference import Reference
from emoexport.rivals import RivalEngine, rivals_for
from emoexport.sessions import (
    can_open,
    certificate_notes,
    graphs_of,
    noted,
    open_engines,
    open_judge,
    open_reference,
    sizes_of,
)
from emoexport.speed_tables import speed_markdown
from emoexport.throughput import EngineSpeed, Planned, SpeedReport, measure

__all__ = ["DEVICES", "bench", "plan_bench"]

DEVICES = ("cpu", "cuda")

_BUSY_LOAD = 0.7
"""Of one core: a process that computes, not a mail that arrives."""

_BATCHES = {"cpu": (1, 16), "cuda": (1, 2, 4, 8, 16, 32, 64)}


def plan_bench(
    bundle: Bundle,
    *,
    device: str = "cpu",
    engines: list[str] | None = None,
    precisions: list[str] | None = None,
    rivals: bool | None = None,
) -> list[Planned]:
    """What `bench` would time, and what it would skip and why. Nothing is loaded.

    Args:
        bundle: the bundle.
        device: `cpu` or `cuda`.
        engines: names of backends; None for all of the device.
        precisions: None for all of the bundle.
        rivals: whether PyTorch's own ways are timed too; None for `device == "cuda"`.

    Raises:
        UsageError: if there is no such device, or an engine is of the other.
    """
    _require_device_of(device, engines)
    missing = find_cuda().problem if device == "cuda" else ""
    found = [Planned(name="torch-fp32", title="PyTorch, the reference loop, eager FP32", problem=missing)]
    found += [
        Planned(name=row.engine, title=f"PyTorch, {row.title}", problem=missing)
        for row in rivals_for(device)
        if _with_rivals(rivals, device)
    ]
    for name in engines or [row.name for row in BACKENDS.values() if row.device == device]:
        backend = BACKENDS[name]
        for precision in PRECISIONS:
            if precision in backend.precisions and (not precisions or precision in precisions):
                problem = can_open(bundle, backend, precision) or missing
                title = f"{backend.title}, {PRECISIONS[precision].title}"
                found.append(Planned(name=f"{name}-{precision}", title=title, problem=problem))
    return found


def bench(
    bundle: Bundle,
    *,
    device: str = "cpu",
    engines: list[str] | None = None,
    precisions: list[str] | None = None,
    rivals: bool | None = None,
    run: Path | None = None,
    batches: Sequence[int] | None = None,
    rounds: int = 20,
    threads: int | None = None,
    cache: Path | None = None,
    console: Console,
) -> SpeedReport:
    """Time every engine against the reference, and write `reports/bench.json` and `.md`.

    Args:
        bundle: the bundle.
        device: what the reference and its rivals run on, and engines if none is named: `cpu` or `cuda`.
        engines: names of backends; None for all of the device that are usable here.
        precisions: None for all of the bundle.
        rivals: whether PyTorch's own ways are timed too; None for `device == "cuda"`.
        run: where the run is now, if it was moved.
        batches: numbers of faces in a call; None for the device's usual ones.
        rounds: counted calls of each engine at each batch size.
        threads: how many each runtime may use.
        cache: where runtimes that can keep what they compile.
        console: where progress is shown.

    Raises:
        UsageError: if there is no such device, or an engine is of the other.
        MissingRuntime: if there is no such device here.
        BadBundle: if a batch is larger than the bundle takes.
    """
    _require_device_of(device, engines)
    if device == "cuda":
        require_device()
        _require_cuda_in_torch()
    manifest = bundle.manifest
    sizes = batches or [size for size in _BATCHES[device] if size <= manifest.max_batch]
    if min(sizes) < 1 or max(sizes) > manifest.max_batch:
        raise BadBundle(
            f"batches are {list(sizes)}; {bundle.path} takes 1 to {manifest.max_batch} faces in a call.",
            hint="emoexport build --max-batch N",
        )
    busy = _busy()
    reference, _, _ = open_reference(bundle, run)
    judge = open_judge(bundle, reference, threads, device=device)
    opened = open_engines(
        bundle, engines=engines, device=device, precisions=precisions, threads=threads, cache=cache, note=noted(console)
    )
    timed: list[Engine] = [*opened]
    if _with_rivals(rivals, device):
        timed += _open_rivals(bundle, reference, device)
    console.print("a large matrix product at each type of number ...", highlight=False)
    peaks = gemm_peaks(device, tuple({PRECISIONS[engine.precision].number: None for engine in [judge, *timed]}))
    with progress_bar(console, "timing, all in turn", len(sizes) * (rounds + 3)) as advance:
        results, failures = measure(
            timed,
            reference=judge,
            batches=sizes,
            rounds=rounds,
            passes_a_face=manifest.passes_a_face,
            gflop_a_face=manifest.gflop_a_face,
            peaks=peaks,
            progress=advance,
        )
    report = SpeedReport(
        created=timestamp(),
        bundle_digest=manifest.digest,
        passes_a_face=manifest.passes_a_face,
        results=tuple(results),
        gemm_peak_tops=peaks,
        size_bytes=sizes_of(bundle),
        load_s={engine.name: engine.load_s for engine in opened},
        failures=failures,
        notes=(
            *bundle.notes(graphs_of(opened)),
            *certificate_notes(bundle, opened, sizes),
            *busy,
            *_instability(results),
            *(f"{what} failed, and was left out from there on: {why.rstrip('.')}." for what, why in failures.items()),
        ),
        machine=describe_machine(),
    )
    bundle.write_report("bench", report, speed_markdown(report))
    return report


def _require_device_of(device: str, engines: list[str] | None) -> None:
    if device not in DEVICES:
        raise UsageError(f"'{device}' is no device; known are {', '.join(DEVICES)}.")
    require_known(engines or ())
    for name in engines or ():
        if BACKENDS[name].device != device:
            raise UsageError(
                f"{BACKENDS[name].title} runs on {BACKENDS[name].device}, and the reference was to run on {device}.",
                hint=f"--device {BACKENDS[name].device}",
            )


def _busy() -> list[str]:
    """A sentence if others have used the processor before this began."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load < _BUSY_LOAD:
        return []
    return [f"Other processes were busy when this began (load average {load:.1f}): times are of a machine in use."]


def _instability(results: Sequence[EngineSpeed]) -> list[str]:
    count = sum(result.unstable for result in results)
    if not count:
        return []
    return [
        f"Unstable, with a spread above {UNSTABLE_PCT:g} %: {count} of {len(results)} rows. Ratios are taken round by "
        "round, and have intervals."
    ]


def _with_rivals(wish: bool | None, device: str) -> bool:
    return device == "cuda" if wish is None else wish


def _open_rivals(bundle: Bundle, reference: Reference, device: str) -> Iterator[RivalEngine]:
    """Those in FP32 have the members of the reference, the others share a copy, whose weights lie in another order."""
    manifest, copies = bundle.manifest, copy.deepcopy(reference.members)
    fold = functools.partial(Fold, views=reference.views, decision=reference.decision, weights=reference.weights)
    limits: dict[str, Any] = {"face_shape": manifest.face_shape, "max_batch": manifest.max_batch}
    for row in rivals_for(device):
        yield RivalEngine(row, reference.members if row.dtype is None else copies, fold, device=device, **limits)


def _require_cuda_in_torch() -> None:
    """And have it compute FP32 in FP32, as the engines do: TF32 has 10 of its 23 bits."""
    if not torch.cuda.is_available():
        raise MissingRuntime(
            f"PyTorch {torch.__version__} cannot use the GPU here; the reference was to run on it.",
            hint="emoexport doctor says which CUDA the driver runs; install PyTorch for that one",
        )
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
