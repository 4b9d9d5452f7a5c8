"""`emoexport.load`: a bundle opened for use, with the best engine that this machine runs. It needs no torch."""

import threading
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from emoexport.bundle import Bundle
from emoexport.engines import BACKENDS
from emoexport.engines.base import Engine
from emoexport.engines.certificate import Certificate, read_certificate
from emoexport.engines.machine import describe_processor
from emoexport.errors import BadInput, MissingRuntime, WrongMachine
from emoexport.opening import can_open, certificate_notes, open_engines, origin_of, where_it_runs
from emoexport.outcome import Outcome
from emoexport.precision import PRECISIONS
from emoexport.throughput import SpeedReport, best_of

__all__ = ["Session", "load"]

_BATCH = 16
"""Faces in a call where no certificate says how many were tried."""


class _Candidate(NamedTuple):
    """An engine that can be opened here."""

    backend: str
    precision: str

    @property
    def name(self) -> str:
        return f"{self.backend}-{self.precision}"


@dataclass(frozen=True, kw_only=True)
class _Chosen:
    engine: Engine
    certificate: Certificate | None
    """That holds here; None if there is none."""
    why: str
    notes: tuple[str, ...]


def load(
    bundle: str | Path,
    *,
    engine: str | None = None,
    precision: str | None = None,
    device: Literal["cpu", "cuda"] | None = None,
    threads: int | None = None,
    cache: str | Path | None = None,
) -> "Session":
    """Open a bundle with the best engine that this machine can run, and warm it up.

    Engines whose certificate holds here come first, and of these the one that decides about most faces a second in the
    bundle's `reports/bench.json`, if that was measured on this processor. Without a certificate FP32 comes first.

    Args:
        bundle: the directory that `emoexport build` wrote.
        engine: a runtime, `onnxruntime` for one; the best if none.
        precision: `fp32`, `int8` and so on; the best if none.
        device: only engines that run on it; both if none.
        threads: how many the runtime may use; it chooses itself if none.
        cache: a folder where runtimes keep what they compile.

    Raises:
        BadBundle: if the bundle is incomplete or was changed, or has nothing of what is asked for.
        MissingRuntime: if no engine of it runs here.
        WrongMachine: if the engine that was named was built for another machine.
    """
    opened = Bundle.open(Path(bundle))
    return Session(opened, _choose(opened, engine, precision, device, threads, Path(cache) if cache else None))


class Session:
    """A bundle in use. Threads may share it: they call the runtime one after the other.

    Attributes:
        labels: names of the emotions, in the order of the probabilities.
        face_shape: `(H, W, C)` of the faces it takes.
        max_batch: the largest number of faces in a call of the runtime.
        batch: the number of faces in a call that `run` uses: the largest that the certificate was given for, up to 64.
        engine: runtime and precision, as in `openvino-int8`.
        certificate: what `verify` has shown of this engine on this machine; None if nothing that holds here.
        why: why this engine was chosen, a sentence.
        notes: what a user must know, a sentence each: above all that a certificate is missing or stale.
    """

    def __init__(self, bundle: Bundle, chosen: _Chosen) -> None:
        self.path = bundle.path
        self.labels = bundle.manifest.labels
        self.face_shape = bundle.manifest.face_shape
        self.max_batch = chosen.engine.max_batch
        self.engine = chosen.engine.name
        self.certificate = chosen.certificate
        self.why = chosen.why
        tried = chosen.certificate.batches if chosen.certificate else [_BATCH]
        self.batch = max((one for one in tried if one <= min(64, self.max_batch)), default=1)
        self.notes = (*chosen.notes, *certificate_notes(bundle, [chosen.engine], [self.batch]))
        self._lock = threading.Lock()
        self._engine: Engine | None = chosen.engine
        self._engine.run(np.zeros((1, *self.face_shape), dtype=np.uint8))

    def run(self, faces: NDArray[np.uint8]) -> Outcome:
        """Decide about faces, `batch` of them in a call of the runtime.

        Args:
            faces: uint8 `(N, H, W, C)`, N >= 1; RGB where C is 3.

        Returns:
            Probabilities float32 `(N, L)`, labels int64 `(N,)`, which index `labels`, and confidences float32 `(N,)`.

        Raises:
            BadInput: if the type or the shape is another, or the session is closed.
        """
        with self._lock:
            if self._engine is None:
                raise BadInput("the session is closed.", hint="emoexport.load opens another")
            return self._engine.run_all(faces, batch_size=self.batch)

    def close(self) -> None:
        """Let go of the engine, after the call that is under way."""
        with self._lock:
            self._engine = None

    def __enter__(self) -> "Session":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _choose(
    bundle: Bundle,
    engine: str | None,
    precision: str | None,
    device: str | None,
    threads: int | None,
    cache: Path | None,
) -> _Chosen:
    found = [
        _Candidate(backend.name, name)
        for backend in BACKENDS.values()
        for name in PRECISIONS
        if engine in (None, backend.name)
        and precision in (None, name)
        and device in (None, backend.device)
        and backend.is_usable()
        and not can_open(bundle, backend, name)
    ]
    speeds = _speeds_of(bundle)
    ranked = sorted(found, key=lambda one: _rank(bundle, one, speeds))
    notes: list[str] = []
    doubtful: list[Engine] = []
    for candidate in ranked:
        certified = _verdict(bundle, candidate.name) == "certified"
        if not certified and doubtful:
            break
        try:
            (opened,) = open_engines(
                bundle, engines=[candidate.backend], precisions=[candidate.precision], threads=threads, cache=cache
            )
        except (MissingRuntime, WrongMachine) as err:
            if engine and precision:
                raise
            notes.append(f"{candidate.name} is left out: {err}")
            continue
        certificate = read_certificate(bundle.path, opened.name) if certified else None
        if certificate and not certificate.stale_because(origin_of(bundle, opened)[1], where_it_runs(opened)):
            why = _why(
                opened.name, certificate, sum(_verdict(bundle, one.name) == "certified" for one in found), speeds
            )
            return _Chosen(engine=opened, certificate=certificate, why=why, notes=tuple(notes))
        doubtful.append(opened)
    if not doubtful:  # says what is missing
        doubtful = open_engines(
            bundle,
            engines=[engine] if engine else None,
            precisions=[precision] if precision else None,
            device=device,
            threads=threads,
            cache=cache,
        )
    chosen = doubtful[0]
    why = f"{chosen.name}: no engine that runs here has a certificate that holds here."
    if engine and precision:
        why = f"{chosen.name}: it was asked for."
    return _Chosen(engine=chosen, certificate=None, why=why, notes=tuple(notes))


def _rank(bundle: Bundle, one: _Candidate, speeds: dict[str, float]) -> tuple[bool, float, bool, int]:
    """Certified before others, then faster before slower, GPUs before CPUs, and as the table of precisions goes."""
    certified = _verdict(bundle, one.name) == "certified"
    fast = speeds.get(one.name, 0.0) if certified else 0.0
    return not certified, -fast, BACKENDS[one.backend].device == "cpu", list(PRECISIONS).index(one.precision)


def _verdict(bundle: Bundle, name: str) -> str:
    found = read_certificate(bundle.path, name)
    return found.verdict if found else ""


def _speeds_of(bundle: Bundle) -> dict[str, float]:
    """Faces a second by engine, if they were measured on this processor; batches each as suits it best."""
    path = bundle.path / "reports" / "bench.json"
    if not path.exists():
        return {}
    try:
        report = SpeedReport.parse_json(path)
    except BadInput:  # of another version; it is a preference, no more
        return {}
    if report.bundle_digest != bundle.manifest.digest or report.machine.get("processor") != describe_processor():
        return {}
    return {one.engine: one.faces_a_second for one in best_of(report.results)}


def _why(name: str, certificate: Certificate, certified: int, speeds: dict[str, float]) -> str:
    """A sentence for people."""
    shown = f"{name}: certified on {certificate.faces:,} faces of {certificate.split}"
    if certified == 1:
        return f"{shown}, as no other engine is that runs here."
    reason = "the fastest" if name in speeds else "first in the table"
    return f"{shown}, {reason} of {certified} such engines here."
