"""`emoexport.load`: a bundle opened for use, with the best engine that this machine runs. It needs no torch."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from emoexport.bundle import Bundle, use_unchanged
from emoexport.cascade_drift import ExitDrift, exit_drift
from emoexport.cascade_record import cascades_in, read_cascade
from emoexport.engines import BACKENDS, Backend, require_known, require_known_device
from emoexport.engines.base import Engine
from emoexport.engines.certificate import Certificate, certificates_in
from emoexport.engines.machine import describe_processor
from emoexport.errors import BadBundle, BadInput, EmoexportError, EngineFailed, MissingRuntime, UsageError
from emoexport.opening import (
    can_open,
    certificate_here,
    certificate_notes,
    open_cascade,
    open_engines,
    origin_of,
)
from emoexport.outcome import Outcome
from emoexport.pass_engine import MOST_FACES, CascadeEngine
from emoexport.precision import PRECISIONS
from emoexport.throughput import SpeedReport

__all__ = ["Session", "best_graph_engine", "load", "speeds_of"]

_BATCH = 16
"""Faces in a call where no certificate says how many were tried."""
_MOST = 64
"""Faces in a call that are taken without being asked for."""


class _Candidate(NamedTuple):
    """An engine that can be opened here."""

    backend: str
    precision: str
    certificate: Certificate | None
    stale: str
    """Why the certificate does not hold here, as far as it is known before the engine is opened; empty if it may."""
    speed: float
    """Faces a second; 0 where it was not measured here."""

    @property
    def name(self) -> str:
        return f"{self.backend}-{self.precision}"

    @property
    def is_certified(self) -> bool:
        return self.certificate is not None and self.certificate.verdict == "certified" and not self.stale


class _Chosen(NamedTuple):
    engine: Engine
    certificate: Certificate | None
    """That holds here; None if there is none."""
    why: str
    notes: list[str]
    left: tuple[int, ...] | None = None
    """Of a cascade, how many of the faces that certified it left at each stage."""


def load(
    bundle: str | Path,
    *,
    engine: str | None = None,
    precision: str | None = None,
    device: str | None = None,
    batch: int | None = None,
    cascade: str | None = None,
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
        device: only engines that run on it, `cpu` or `cuda`; both if none.
        batch: faces in a call of the runtime; if none the most that the certificate was given for, up to 64.
        cascade: one of the bundle, instead of its whole fold: a rule such as `agreement`, or the whole name; of several
            with the rule, of these engines and precisions, the fastest whose certificate holds here.
        threads: how many the runtime may use; it chooses itself if none.
        cache: a folder where runtimes keep what they compile.

    Raises:
        UsageError: if there is no such engine, precision or device, or the engine runs on the other device.
        BadBundle: if the bundle is incomplete or was changed, or has nothing of what is asked for.
        MissingRuntime: if no engine of it runs here.
        WrongMachine: if the engine that was named was built for another machine.
    """
    if device is not None:
        require_known_device(device)
    if engine:
        require_known([engine])
        if device not in (None, BACKENDS[engine].device):
            raise UsageError(f"{engine} runs on {BACKENDS[engine].device}, and {device} is asked for.")
    if threads is not None and threads < 1:
        raise UsageError(f"found {threads} threads; needed is 1 or more.", hint="leave it out, and the runtime chooses")
    limits = {"threads": threads, "cache": Path(cache) if cache else None}

    def session_of(opened: Bundle) -> Session:
        most = MOST_FACES if cascade else opened.manifest.max_batch
        if batch is not None and not 1 <= batch <= most:
            raise UsageError(
                f"found a batch of {batch}; {bundle} takes from 1 to {most} faces.", hint=f"a batch of {most}"
            )
        if cascade is not None:
            return Session(opened, _cascade(opened, cascade, engine, precision, device, limits), batch)
        return Session(opened, _choose(opened, engine, precision, device, batch, limits), batch)

    return use_unchanged(Path(bundle), session_of)


class Session:
    """A bundle in use. Threads may share it: they call the runtime one after the other.

    Attributes:
        path: the bundle.
        manifest: what is in it: members, views, the weights of the vote, the decision.
        labels: names of the emotions, in the order of the probabilities.
        face_shape: `(H, W, C)` of the faces it takes.
        max_batch: the largest number of faces in a call of the runtime.
        batch: the number of faces in a call that `run` uses. Its last call takes what is left.
        engine: runtime and precision, as in `openvino-int8`.
        precision: of the graph that the engine was made of.
        device: where it runs, `cpu` or `cuda`.
        certificate: what `verify` has shown of this engine on this machine; None if nothing that holds here.
        why: why this engine was chosen, a sentence.
        notes: what a user must know, a sentence each: above all that a certificate is missing or stale.
    """

    def __init__(self, bundle: Bundle, chosen: _Chosen, batch: int | None = None) -> None:
        self.path = bundle.path
        self.manifest = bundle.manifest
        self.labels = bundle.manifest.labels
        self.face_shape = bundle.manifest.face_shape
        self.max_batch = chosen.engine.max_batch
        tried = chosen.certificate.batches if chosen.certificate and chosen.left else []
        self.batch = batch or max(tried, default=_batch_of(chosen.certificate, self.max_batch))
        self.engine = chosen.engine.name
        self.precision = chosen.engine.precision
        self.device = BACKENDS[chosen.engine.backend].device
        self.certificate = chosen.certificate
        self.why = chosen.why
        self.notes = (*chosen.notes, *certificate_notes(bundle, [chosen.engine], [self.batch]))
        self._lock = threading.Lock()
        self._engine: Engine | None = chosen.engine
        self._left = chosen.left

    def run(self, faces: NDArray[np.uint8]) -> Outcome:
        """Decide about faces, `batch` of them in a call of the runtime.

        Args:
            faces: uint8 `(N, H, W, C)`, N >= 1; RGB where C is 3.

        Returns:
            Probabilities float32 `(N, L)`, labels int64 `(N,)`, which index `labels`, and confidences float32 `(N,)`.

        Raises:
            BadInput: if the type or the shape is another, or the session is closed.
            EngineFailed: if the runtime raises an error.
            BadBundle: if it answers with anything but probabilities, as one of 16 bits does after an overflow.
        """
        with self._lock:
            return _outcome_of(self._opened_for(faces), faces, batch=self.batch, labels=len(self.labels))

    def scores(self, faces: NDArray[np.uint8]) -> NDArray[np.float32]:
        """What every member says of every view, `batch` faces in a call of the runtime: the votes behind `run`.

        Args:
            faces: uint8 `(N, H, W, C)`, N >= 1; RGB where C is 3.

        Returns:
            Probabilities before the decision's temperature, float32 `(N, K, V, L)`, in the order of the manifest's
            members and views; 0 for passes that have no part in the vote.

        Raises:
            BadInput: if the type or the shape is another, or the session is closed, or it is of a cascade, which
                computes other passes of every face.
            EngineFailed: if the runtime raises an error.
            BadBundle: if it answers with something else.
        """
        with self._lock:
            engine = self._opened_for(faces)
            if isinstance(engine, CascadeEngine):
                raise BadInput(
                    "a cascade computes other passes of every face, and tells none.",
                    hint="open the bundle without a cascade",
                )
            starts = range(0, max(1, len(faces)), self.batch)
            with _failing(engine):
                found = np.concatenate([engine.scores(faces[start : start + self.batch]) for start in starts])
            needed = len(faces), len(self.manifest.members), len(self.manifest.views), len(self.labels)
            if found.shape != needed:
                raise BadBundle(f"{engine.name} answers scores {found.shape}; needed are {needed}.")
            return found

    @property
    def left(self) -> tuple[int, ...] | None:
        """How many faces have left a cascade at each stage so far; None without one."""
        engine = self._engine
        return engine.left if isinstance(engine, CascadeEngine) else None

    def drift(self) -> ExitDrift | None:
        """Whether faces so far leave a cascade where those that certified it did; None without one, or without faces.

        Faces are taken for independent, which frames of one video are not.
        """
        with self._lock:
            if self._left is None or not isinstance(self._engine, CascadeEngine) or not sum(self._engine.left):
                return None
            return exit_drift(self._left, self._engine.left)

    def close(self) -> None:
        """Let go of the engine, after the call that is under way."""
        with self._lock:
            self._engine = None

    def _opened_for(self, faces: NDArray[np.uint8]) -> Engine:
        if not isinstance(faces, np.ndarray):
            raise BadInput(f"found {type(faces).__name__}; needed is an array of uint8 faces (N, H, W, C).")
        if self._engine is None:
            raise BadInput("the session is closed.", hint="emoexport.load opens another")
        return self._engine

    def __enter__(self) -> "Session":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _outcome_of(engine: Engine, faces: NDArray[np.uint8], *, batch: int, labels: int) -> Outcome:
    """What an engine decides, as far as it is a decision: what is not, `verify` measures and nobody uses.

    Raises:
        BadInput: if the type or the shape of the faces is another.
        EngineFailed: if the runtime raises an error.
        BadBundle: if an answer is no outcome of these faces and so many labels.
    """
    with _failing(engine):
        outcome = engine.run_all(faces, batch_size=batch)
    if not outcome.is_of(len(faces), labels):
        raise BadBundle(
            f"{engine.name} answers no probabilities of {labels} emotions, label and confidence a face.",
            hint="emoexport verify says what is wrong with it",
        )
    return outcome


@contextmanager
def _failing(engine: Engine) -> Iterator[None]:
    try:
        yield
    except EmoexportError:
        raise
    except Exception as err:  # what runtimes raise shares no base but this
        raise EngineFailed(f"{engine.name} fails in a call: {err}") from err


def best_graph_engine(bundle: Bundle, *, engine: str | None = None, precision: str | None = None) -> tuple[str, str]:
    """The engine that `load` would open first, of those that are made of graphs; nothing is opened.

    Args:
        bundle: the bundle.
        engine: a runtime; any if none.
        precision: any if none.

    Returns:
        Its runtime and its precision.

    Raises:
        UsageError: if there is no such engine or precision.
        BadBundle: if the bundle has no such graph.
        MissingRuntime: if no such engine runs here.
    """
    require_known([engine] if engine else ())
    if engine and BACKENDS[engine].built_from == "fold":
        raise UsageError(f"{engine} takes no graphs.", hint="--engine names a runtime that does")
    certificates, speeds = certificates_in(bundle.path), speeds_of(bundle)
    candidates = [
        _candidate(bundle, backend.name, name, certificates, speeds)
        for backend in BACKENDS.values()
        for name in bundle.manifest.graphs
        if backend.built_from != "fold"
        and engine in (None, backend.name)
        and precision in (None, name)
        and backend.is_usable()
        and not can_open(bundle, backend, name)
    ]
    if not candidates:  # says what is missing
        open_engines(bundle, engines=[engine] if engine else None, precisions=[precision] if precision else None)
        raise MissingRuntime(f"no engine made of the graphs of {bundle.path} runs here.", hint="emoexport doctor")
    best = min(candidates, key=lambda one: (not one.is_certified, -one.speed * one.is_certified, *_place(one)))
    return best.backend, best.precision


def _choose(
    bundle: Bundle,
    engine: str | None,
    precision: str | None,
    device: str | None,
    batch: int | None,
    limits: dict[str, Any],
) -> _Chosen:
    """Open the best; those that are better and cannot be used are told."""
    backends = [row for row in BACKENDS.values() if engine in (None, row.name) and device in (None, row.device)]
    precisions = [name for name in PRECISIONS if precision in (None, name)]
    certificates, speeds = certificates_in(bundle.path), speeds_of(bundle, batch)
    candidates = [
        _candidate(bundle, backend.name, name, certificates, speeds)
        for backend in backends
        for name in precisions
        if backend.is_usable() and not can_open(bundle, backend, name)
    ]
    notes = _notes_on_absent([row for row in backends if not row.is_installed()], precisions, certificates)
    is_named = bool(engine and precision)
    certified = sorted((one for one in candidates if one.is_certified), key=lambda one: (-one.speed, *_place(one)))
    best = max((one.speed for one in certified), default=0.0)
    notes += [
        f"{one.name} is faster, but its certificate is stale: {one.stale}."
        for one in candidates
        if one.stale and one.speed > best
    ]
    for one in certified:
        found = _open(bundle, one, limits, notes, strict=is_named)
        if found is None:
            continue
        certificate, stale = certificate_here(bundle, found)
        if stale:
            notes.append(f"{one.name} is passed over, as its certificate is stale: {stale}.")
            continue
        return _Chosen(found, certificate, _why(one, certified, is_named=is_named), notes)
    for one in sorted(candidates, key=_place):
        found = _open(bundle, one, limits, notes, strict=is_named)
        if found is not None:
            why = "it was asked for" if is_named else "no engine that runs here has a certificate that holds here"
            return _Chosen(found, None, f"{one.name}: {why}.", notes)
    if not candidates:  # says what is missing
        asked: dict[str, Any] = {
            "engines": [engine] if engine else None,
            "precisions": [precision] if precision else None,
        }
        open_engines(bundle, device=device, **asked, **limits)
    why = notes[-1] if notes else "none can be opened."
    raise MissingRuntime(f"no engine of {bundle.path} runs here: {why}", hint="emoexport doctor")


def _cascade(
    bundle: Bundle,
    name: str,
    engine: str | None,
    precision: str | None,
    device: str | None,
    limits: dict[str, Any],
) -> _Chosen:
    """Open the fastest cascade of a name, or of a rule, whose certificate holds here; or else the fastest."""
    known = cascades_in(bundle.path)
    if not known:
        raise BadBundle(f"{bundle.path} has no cascade.", hint=f"emoexport cascade {bundle.path}")
    notes: list[str] = []
    records = []
    for one in (one for one in known if one == name or one.startswith(f"cascade-{name}-")):
        try:
            record = read_cascade(bundle, one)
        except BadBundle as err:
            notes.append(f"{one} is left out: {err}")
            continue
        backend = BACKENDS[record.backend]
        if (
            engine in (None, backend.name)
            and precision in (None, record.precision)
            and device in (None, backend.device)
        ):
            records.append(record)
    if not records and notes:
        raise BadBundle(notes[0], hint=f"emoexport cascade {bundle.path}")
    if not records:
        raise UsageError(
            f"{bundle.path} has no such cascade as {name}; it has {', '.join(known)}.",
            hint=f"emoexport cascade {bundle.path}",
        )
    first = None
    for record in sorted(records, key=lambda one: (one.verdict != "certified", one.timing.ms_a_face)):
        try:
            opened = open_cascade(bundle, record, **limits)
            with _failing(opened):
                opened.walk(np.zeros((1, *opened.face_shape), dtype=np.uint8))
        except EmoexportError as err:
            notes.append(f"{record.engine} is left out: {err}")
            continue
        certificate, stale = certificate_here(bundle, opened)
        if certificate is not None and not stale and certificate.verdict == "certified":
            why = f"{record.engine}: {record.sentences[0]}"
            return _Chosen(opened, certificate, why, notes, record.left)
        first = first or _Chosen(opened, None, f"{record.engine}: it was asked for.", notes, record.left)
    if first is None:
        raise MissingRuntime(f"no cascade {name} of {bundle.path} runs here: {notes[-1]}", hint="emoexport doctor")
    return first


def _candidate(
    bundle: Bundle,
    backend: str,
    precision: str,
    certificates: Mapping[str, Certificate],
    speeds: Mapping[str, float],
) -> _Candidate:
    name = f"{backend}-{precision}"
    certificate = certificates.get(name)
    found = _Candidate(backend, precision, certificate, "", speeds.get(name, 0.0))
    if certificate is None:
        return found
    here = certificate.machine | ({"processor": describe_processor()} if "processor" in certificate.machine else {})
    return found._replace(stale=certificate.stale_because(origin_of(bundle, found)[1], here))


def _place(one: _Candidate) -> tuple[int, bool]:
    """In the order of the table of precisions, GPUs before CPUs."""
    return list(PRECISIONS).index(one.precision), BACKENDS[one.backend].device == "cpu"


def _open(bundle: Bundle, one: _Candidate, limits: dict[str, Any], notes: list[str], *, strict: bool) -> Engine | None:
    """Open an engine and call it once; None, and a note, if it fails."""
    try:
        (found,) = open_engines(bundle, engines=[one.backend], precisions=[one.precision], **limits)
        face = np.zeros((1, *found.face_shape), dtype=np.uint8)
        _outcome_of(found, face, batch=1, labels=len(bundle.manifest.labels))
    except Exception as err:  # what runtimes raise in a call shares no base but this
        if strict:
            raise
        notes.append(f"{one.name} is left out: {str(err).partition(chr(10))[0]}")
        return None
    return found


def _notes_on_absent(
    absent: Sequence[Backend], precisions: Sequence[str], certificates: Mapping[str, Certificate]
) -> list[str]:
    """Which runtimes have certified engines in a bundle and are not installed."""
    certified = {name for name, one in certificates.items() if one.verdict == "certified"}
    return [
        f"{backend.title} has a certificate, and is not installed: pip install {backend.requirement}."
        for backend in absent
        if certified & {f"{backend.name}-{name}" for name in precisions}
    ]


def speeds_of(bundle: Bundle, batch: int | None = None) -> dict[str, float]:
    """Faces a second by engine, if they were measured on this processor.

    Args:
        bundle: the bundle.
        batch: faces in a call, or the next smaller number that was timed, or else the smallest; if none, of each engine
            the number that `load` takes.
    """
    path = bundle.path / "reports" / "bench.json"
    if not path.exists():
        return {}
    try:
        report = SpeedReport.parse_json(path, inside=bundle.path)
    except BadInput:  # of another version; it is a preference, no more
        return {}
    if report.bundle_digest != bundle.manifest.digest or report.machine.get("processor") != describe_processor():
        return {}
    certificates = certificates_in(bundle.path)
    found: dict[str, float] = {}
    for one in sorted(report.results, key=lambda result: result.batch):
        wanted = batch or _batch_of(certificates.get(one.engine), bundle.manifest.max_batch)
        if one.engine not in found or one.batch <= wanted:
            found[one.engine] = one.faces_a_second
    return found


def _batch_of(certificate: Certificate | None, most: int) -> int:
    """Faces in a call, where nobody asks for a number."""
    tried = certificate.batches if certificate else [_BATCH]
    return max((one for one in tried if one <= min(_MOST, most)), default=1)


def _why(chosen: _Candidate, certified: Sequence[_Candidate], *, is_named: bool) -> str:
    """A sentence for people."""
    certificate = chosen.certificate
    assert certificate is not None
    shown = f"{chosen.name}: certified on {certificate.shown_on}"
    timed = sum(one.speed > 0 for one in certified)
    if is_named:
        return f"{shown}, and asked for."
    if chosen.speed and timed > 1:
        return f"{shown}, the fastest of {timed} such engines that bench has timed here."
    return f"{shown}, the first of {len(certified)} such engines." if len(certified) > 1 else f"{shown}."
