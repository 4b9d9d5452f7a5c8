"""Which engine of a bundle to use: the best with a certificate that holds on this machine. It needs no torch."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from emoexport.bundle import Bundle
from emoexport.cascade_record import cascades_in, read_cascade
from emoexport.engines import BACKENDS, Backend, require_known
from emoexport.engines.base import Engine
from emoexport.engines.certificate import Certificate, certificates_in
from emoexport.engines.checked import outcome_of, telling_failures
from emoexport.engines.machine import describe_processor
from emoexport.errors import BadBundle, BadInput, EmoexportError, MissingRuntime, UsageError
from emoexport.opening import can_open, certificate_here, open_cascade, open_engines, origin_of
from emoexport.precision import PRECISIONS
from emoexport.throughput import SpeedReport

__all__ = ["Chosen", "best_graph_engine", "choose", "choose_cascade", "speeds_of", "usual_batch"]

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


class Chosen(NamedTuple):
    """An engine that was opened, and why it is this one."""

    engine: Engine
    certificate: Certificate | None
    """That holds here; None if there is none."""
    why: str
    notes: list[str]
    left: tuple[int, ...] | None = None
    """Of a cascade, how many of the faces that certified it left at each stage."""


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


def choose(
    bundle: Bundle,
    engine: str | None,
    precision: str | None,
    device: str | None,
    batch: int | None,
    limits: dict[str, Any],
) -> Chosen:
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
        return Chosen(found, certificate, _why(one, certified, is_named=is_named), notes)
    for one in sorted(candidates, key=_place):
        found = _open(bundle, one, limits, notes, strict=is_named)
        if found is not None:
            why = "it was asked for" if is_named else "no engine that runs here has a certificate that holds here"
            return Chosen(found, None, f"{one.name}: {why}.", notes)
    if not candidates:  # says what is missing
        asked: dict[str, Any] = {
            "engines": [engine] if engine else None,
            "precisions": [precision] if precision else None,
        }
        open_engines(bundle, device=device, **asked, **limits)
    why = notes[-1] if notes else "none can be opened."
    raise MissingRuntime(f"no engine of {bundle.path} runs here: {why}", hint="emoexport doctor")


def choose_cascade(
    bundle: Bundle,
    name: str,
    engine: str | None,
    precision: str | None,
    device: str | None,
    limits: dict[str, Any],
) -> Chosen:
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
            with telling_failures(opened):
                opened.walk(np.zeros((1, *opened.face_shape), dtype=np.uint8))
        except EmoexportError as err:
            notes.append(f"{record.engine} is left out: {err}")
            continue
        certificate, stale = certificate_here(bundle, opened)
        if certificate is not None and not stale and certificate.verdict == "certified":
            why = f"{record.engine}: {record.sentences[0]}"
            return Chosen(opened, certificate, why, notes, record.left)
        first = first or Chosen(opened, None, f"{record.engine}: it was asked for.", notes, record.left)
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
        outcome_of(found, face, batch=1, labels=len(bundle.manifest.labels))
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
        wanted = batch or usual_batch(certificates.get(one.engine), bundle.manifest.max_batch)
        if one.engine not in found or one.batch <= wanted:
            found[one.engine] = one.faces_a_second
    return found


def usual_batch(certificate: Certificate | None, most: int) -> int:
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
