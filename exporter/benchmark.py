"""A bundle against the clock: its engines, the reference, and what others make of the same members."""

import copy
import functools
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from emoexport.bundle import Bundle, writes_bundle
from emoexport.clock import timestamp
from emoexport.engines import BACKENDS, require_known, require_known_device
from emoexport.engines.base import Engine
from emoexport.engines.cuda import find_cuda, require_device
from emoexport.engines.machine import describe_machine, machine_state
from emoexport.engines.others import BUSY_CORES
from emoexport.engines.timing import UNSTABLE_PCT
from emoexport.errors import MissingRuntime, UsageError
from emoexport.fold import Fold
from emoexport.footprint import footprints
from emoexport.gemm_peak import gemm_peaks
from emoexport.measurement import Cost, first_line, measure
from emoexport.opening import can_open, certificate_notes, graphs_of, noted, open_engines, sizes_of
from emoexport.precision import PRECISIONS
from emoexport.progress import progress_bar
from emoexport.reference import Reference
from emoexport.rivals import PlainRival, RivalEngine, export_plain, rivals_for
from emoexport.sessions import open_judge, open_reference
from emoexport.speed_tables import speed_markdown
from emoexport.throughput import REFERENCE, EngineSpeed, Planned, SpeedReport

__all__ = ["bench", "plan_bench"]

_BUSY_LOAD = 0.7
"""Of one core: a process that computes, not a mail that arrives."""


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
        rivals: whether others' ways are timed too; None for `device == "cuda"`.

    Raises:
        UsageError: if there is no such device, or an engine is of the other.
    """
    _require_device_of(device, engines)
    missing = find_cuda().problem if device == "cuda" else ""
    found = [Planned(name=REFERENCE, title="PyTorch, the reference loop, eager FP32", problem=missing)]
    found += [
        Planned(name=row.engine, title=row.title, problem=missing or row.problem)
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


@writes_bundle
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
    seconds: float = 60,
    memory: bool = True,
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
        rivals: whether others' ways are timed too; None for `device == "cuda"`.
        run: where the run is now, if it was moved.
        batches: numbers of faces in a call, timed with all `rounds`; None to double from 1 until nothing gains from it.
        rounds: counted calls of each engine at each batch size.
        seconds: that these may take at a batch size where `batches` is None: then there are fewer, but at least
            `LEAST_ROUNDS`.
        memory: whether the memory of each engine is measured, in a process of its own.
        threads: how many each runtime may use.
        cache: where runtimes that can keep what they compile.
        console: where progress is shown.

    Raises:
        UsageError: if there is no such device, an engine is of the other, or a batch is larger than the bundle takes.
        MissingRuntime: if there is no such device here.
    """
    _require_device_of(device, engines)
    if device == "cuda":
        require_device()
        _require_cuda_in_torch()
    manifest, sizes = bundle.manifest, _sizes(bundle, batches)
    machine, before, busy = describe_machine(), machine_state(), _busy()
    reference, _, _ = open_reference(bundle, run)
    judge = open_judge(bundle, reference, threads, device=device)
    opened = open_engines(
        bundle, engines=engines, device=device, precisions=precisions, threads=threads, cache=cache, note=noted(console)
    )
    timed: list[Engine] = [*opened]
    failures: dict[str, str] = {}
    if _with_rivals(rivals, device):
        timed += _open_rivals(bundle, reference, device, threads, failures)
    console.print("a large matrix product at each type of number ...")
    peaks = gemm_peaks(device, tuple({PRECISIONS[engine.precision].number: None for engine in [judge, *timed]}))
    with progress_bar(console, "timing, all in turn", len(sizes) * (rounds + 3)) as advance:
        found = measure(
            timed,
            reference=judge,
            batches=sizes,
            rounds=rounds,
            seconds=None if batches else seconds,
            growing=not batches,
            cost=Cost(passes_a_face=manifest.passes_a_face, gflop_a_face=manifest.gflop_a_face, peaks=peaks),
            progress=advance,
        )
    after, load_s, graphs = machine_state(), {engine.name: engine.load_s for engine in opened}, graphs_of(opened)
    certificates = certificate_notes(bundle, opened, sorted({result.batch for result in found.results}))
    by_name = {engine.name: (engine.backend, engine.precision) for engine in opened}
    opened.clear()
    timed.clear()
    del judge, reference  # what is measured now needs the memory that they hold
    settings: dict[str, Any] = {"device": device, "run": run, "threads": threads, "cache": cache}
    took, untold = footprints(bundle, by_name, found.results, console=console, **settings) if memory else ({}, {})
    failures |= found.failures
    report = SpeedReport(
        created=timestamp(),
        bundle_digest=manifest.digest,
        passes_a_face=manifest.passes_a_face,
        results=tuple(found.results),
        gemm_peak_tops=peaks,
        size_bytes=sizes_of(bundle),
        load_s=load_s,
        memory=took,
        threads=threads,
        states={"before": before, "after": after},
        failures=failures,
        notes=(
            *bundle.notes(graphs),
            *certificates,
            *busy,
            *_others(found.results),
            *_instability(found.results),
            *filter(None, [found.stopped]),
            *(f"{what} failed, and was left out from there on: {why.rstrip('.')}." for what, why in failures.items()),
            *(f"The memory that {name} takes is not known: {why.rstrip('.')}." for name, why in untold.items()),
        ),
        machine=machine,
    )
    bundle.write_report("bench", report, speed_markdown(report))
    return report


def _sizes(bundle: Bundle, asked: Sequence[int] | None) -> list[int]:
    """Batch sizes asked for, or all that are doubled from 1."""
    most = bundle.manifest.max_batch
    sizes = [*asked] if asked else [1 << power for power in range(most.bit_length())]
    if min(sizes) < 1 or max(sizes) > most:
        raise UsageError(
            f"found batches of {', '.join(map(str, sizes))}; {bundle.path} takes 1 to {most} faces in a call.",
            hint=f"--batch {most}, or emoexport build --max-batch N",
        )
    return sizes


def _require_device_of(device: str, engines: list[str] | None) -> None:
    require_known_device(device)
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
        f"Unstable (~), with a spread above {UNSTABLE_PCT:g} % or others at work: {count} of {len(results)} rows. "
        "Ratios are taken round by round, and have intervals."
    ]


def _others(results: Sequence[EngineSpeed]) -> list[str]:
    """A sentence if others have used the processor while engines were timed."""
    busy = {row.batch: row.others_cores for row in results if (row.others_cores or 0.0) > BUSY_CORES}
    return [
        f"Other processes kept {cores:g} cores busy while batches of {batch} were timed."
        for batch, cores in busy.items()
    ]


def _with_rivals(wish: bool | None, device: str) -> bool:
    return device == "cuda" if wish is None else wish


def _open_rivals(
    bundle: Bundle, reference: Reference, device: str, threads: int | None, failures: dict[str, str]
) -> Iterator[Engine]:
    """Those of a device that can be opened here; of the others it is noted why not.

    Those in FP32 have the members of the reference, the others share a copy, whose weights lie in another order.
    """
    copies = copy.deepcopy(reference.members)
    fold = functools.partial(Fold, views=reference.views, decision=reference.decision, weights=reference.weights)
    limits: dict[str, Any] = {"face_shape": bundle.manifest.face_shape, "max_batch": bundle.manifest.max_batch}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # Windows keeps what is mapped
        export = functools.cache(lambda: export_plain(reference, Path(folder), face_shape=limits["face_shape"]))
        for row in rivals_for(device):
            try:
                if row.problem:
                    failures[row.engine] = row.problem
                elif row.runtime is not None:
                    yield PlainRival(row, reference, export(), threads=threads, **limits)
                else:
                    yield RivalEngine(row, reference.members if row.dtype is None else copies, fold, **limits)
            except Exception as err:  # of any runtime: the others are wanted all the same
                failures[row.engine] = first_line(err)


def _require_cuda_in_torch() -> None:
    """And have it compute FP32 in FP32, as the engines do: TF32 has 10 of its 23 bits."""
    if not torch.cuda.is_available():
        raise MissingRuntime(
            f"PyTorch {torch.__version__} cannot use the GPU here; the reference was to run on it.",
            hint="emoexport doctor says which CUDA the driver runs; install PyTorch for that one",
        )
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
