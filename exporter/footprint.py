"""How much memory each engine of a bundle takes, and the reference: each in a process of its own."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from emoexport.bundle import Bundle
from emoexport.engines import BACKENDS
from emoexport.engines.memory_probe import Memory, Request, measure_memory
from emoexport.engines.torch_engine import TorchEngine
from emoexport.errors import CheckFailed
from emoexport.opening import file_for
from emoexport.progress import progress_bar
from emoexport.sessions import open_judge, open_reference
from emoexport.throughput import REFERENCE, EngineSpeed

__all__ = ["footprints", "open_loop"]


def footprints(
    bundle: Bundle,
    opened: Mapping[str, tuple[str, str]],
    results: Sequence[EngineSpeed],
    *,
    device: str,
    run: Path | None,
    threads: int | None,
    cache: Path | None,
    console: Console,
) -> tuple[dict[str, Memory], dict[str, str]]:
    """Measure every engine at the largest batch that it was timed at, opened as it was there.

    Rivals are left out: they would export and compile anew, which takes more memory than what comes of it.

    Args:
        bundle: the bundle.
        opened: by name of an engine its backend and precision; the reference is none of them.
        results: what was timed.
        device: of the reference.
        run: where the run is now, if it was moved.
        threads: how many each runtime may use.
        cache: where runtimes that can keep what they compile.
        console: where progress is shown.

    Returns:
        By name what each takes, and of those that failed why.
    """
    largest = {row.engine: row.batch for row in sorted(results, key=lambda row: row.batch)}
    loop = {"bundle": str(bundle.path), "run": None if run is None else str(run), "threads": threads, "device": device}
    requests = {REFERENCE: Request(module=__name__, opener=f"{__name__}:open_loop", settings=loop, device=device)}
    shared = {"threads": threads, "cache": None if cache is None else str(cache)}
    for name in opened:
        if name in largest:
            requests[name] = _request(bundle, *opened[name], shared)
    found: dict[str, Memory] = {}
    failures: dict[str, str] = {}
    with progress_bar(console, "memory, each in a process of its own", len(requests)) as advance:
        for name, request in requests.items():
            try:
                found[name] = measure_memory(request, largest[name])
            except CheckFailed as err:
                failures[name] = str(err)
            advance(1)
    return found, failures


def open_loop(bundle: str, run: str | None, threads: int | None, device: str) -> TorchEngine:
    """The reference of a bundle, by arguments of what JSON has."""
    opened = Bundle.open(Path(bundle))
    reference, _, _ = open_reference(opened, None if run is None else Path(run))
    return open_judge(opened, reference, threads, device=device)


def _request(bundle: Bundle, name: str, precision: str, shared: dict[str, Any]) -> Request:
    backend, manifest = BACKENDS[name], bundle.manifest
    own = {"backend": name, "file": str(file_for(bundle, backend, precision)), "precision": precision}
    limits = {"face_shape": manifest.face_shape, "max_batch": manifest.max_batch}
    return Request(
        module=backend.target.partition(":")[0],
        opener="emoexport.engines.memory_probe:open_graph",
        settings=own | limits | shared,
        device=backend.device,
    )
