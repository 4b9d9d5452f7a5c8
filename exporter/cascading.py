"""Where a cascade is made: fitted on validation faces, certified on other faces, timed against the whole fold."""

import contextlib
import dataclasses
import functools
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from emoexport.bundle import Bundle, writes_bundle
from emoexport.cascade import Cascade
from emoexport.cascade_certificate import CascadeCertificate, certify, p_value
from emoexport.cascade_claim import Claim, Fitted, fitted
from emoexport.cascade_record import (
    CASCADE_FILE,
    CASCADES,
    CascadeRecord,
    CascadeTiming,
    cascades_in,
    read_cascade,
    record_of,
)
from emoexport.clock import timestamp
from emoexport.comparison import Comparison
from emoexport.engines.base import Engine
from emoexport.engines.certificate import Certificate
from emoexport.engines.machine import versions_of
from emoexport.engines.passport import Passport
from emoexport.engines.timing import ratio_of
from emoexport.errors import BadBundle, UsageError
from emoexport.files import new_directory, sha256_of, write_text
from emoexport.manifest import FileEntry
from emoexport.opening import open_engines, where_it_runs
from emoexport.pass_engine import CascadeEngine, PassEngine
from emoexport.pass_opening import open_passes
from emoexport.plan_costs import Setting, call_samples
from emoexport.progress import progress_bar
from emoexport.scoring import (
    Scored,
    SplitFaces,
    apart,
    open_scorer,
    read_choosing_faces,
    read_split,
    reference_engine,
    score_faces,
)
from emoexport.temporaries import temporary_directory

__all__ = ["Prepared", "finish_cascade", "make_cascade", "prepare_cascade", "require_batch"]


@writes_bundle
def make_cascade(
    bundle: Bundle,
    claim: Claim,
    *,
    engine: str,
    precision: str,
    data: str | None = None,
    split: str | None = None,
    run: Path | None = None,
    batch: int = 16,
    rounds: int = 100,
    threads: int | None = None,
    cache: Path | None = None,
    console: Console,
) -> CascadeRecord:
    """Fit, certify and time a cascade, and put it into the bundle, with its certificate.

    The validation faces fit it. The clean rows of the split certify it, in passes of the engine itself, against the
    full vote of the FP32 reference. Score cubes are computed once and kept under `cubes/`.

    Args:
        bundle: with members as branches, and all passes.
        claim: what it is to be certified for.
        engine: a backend that opens graphs, or builds engines of them.
        precision: of the graph.
        data: where the faces that certify are; None for where the run read them.
        split: which split; None for the one meant for testing.
        run: where the run is now, if it was moved.
        batch: faces in a call.
        rounds: counted calls, at most.
        threads: how many the runtime may use.
        cache: where a runtime that can keeps what it compiles.
        console: where progress is shown.

    Raises:
        UsageError: if the engine takes no graphs, passes are left out, members are stacked, the bundle takes fewer
            faces in a call, or the faces that certify are those that fit.
        BadCheckpoint: if the run is not there or not the one that was folded.
        BadData: if the faces cannot be read.
        MissingRuntime: if the runtime is not installed.
    """
    require_batch(bundle, batch)
    sources: dict[str, Any] = {"data": data, "run": run, "console": console}
    target = bundle.path / CASCADES
    target.mkdir(exist_ok=True)
    with temporary_directory(target / "cascade") as scratch:
        prepared = prepare_cascade(
            bundle,
            claim,
            scratch,
            engine,
            precision,
            read_choosing_faces(bundle, **sources),
            batch=batch,
            threads=threads,
            cache=cache,
            console=console,
        )
        read = read_split(bundle, split=split, **sources)
        scorer = open_scorer(bundle, reference_engine(), threads=threads, run=run)
        reference = score_faces(bundle, scorer, read, replace=True, console=console)
        return finish_cascade(bundle, prepared, read, reference, rounds=rounds, console=console)


def require_batch(bundle: Bundle, batch: int) -> None:
    """Before anything slow is done.

    Raises:
        UsageError: if the bundle takes fewer faces in a call.
    """
    most = bundle.manifest.max_batch
    if batch > most:
        raise UsageError(
            f"found --batch {batch}; {bundle.path} takes up to {most} faces in a call.", hint=f"--batch {most}"
        )


class Prepared(NamedTuple):
    """A cascade fitted on an engine, which nothing is certified of yet."""

    claim: Claim
    full: Engine
    """The whole fold, in the same runtime and precision."""
    passes: PassEngine
    files: list[Path]
    """What the passes' engine was opened from."""
    fitting: Scored
    """The faces that fitted it."""
    fit: Fitted
    batch: int

    def opened(self, cascade: Cascade) -> CascadeEngine:
        """An engine that runs a cascade on these passes."""
        settings: dict[str, Any] = {"face_shape": self.passes.face_shape, "calls": self.passes.calls}
        return CascadeEngine(self.passes.members, cascade, **settings)


def prepare_cascade(
    bundle: Bundle,
    claim: Claim,
    folder: Path,
    engine: str,
    precision: str,
    choosing: SplitFaces,
    *,
    batch: int,
    threads: int | None,
    cache: Path | None = None,
    console: Console,
) -> Prepared:
    """Open the passes of an engine, and fit a cascade on the faces that the members were validated on.

    Args:
        bundle: with members as branches, and all passes.
        claim: what it is to be certified for.
        folder: that gets the graphs.
        engine: a backend that opens graphs, or builds engines of them.
        precision: of the graph.
        choosing: these faces.
        batch: faces in a call.
        threads: how many the runtime may use.
        cache: where a runtime that can keeps what it compiles.
        console: where progress is shown.

    Raises:
        UsageError: as `open_passes`.
    """
    opening: dict[str, Any] = {"threads": threads, "cache": cache}
    (full,) = open_engines(bundle, engines=[engine], precisions=[precision], **opening)
    passes, files = open_passes(bundle, folder, engine, precision, **opening, console=console)
    fitting = score_faces(bundle, passes, choosing, replace=True, console=console)
    fit = fitted(fitting.cube, claim, weights=passes.weights, decision=passes.decision, calls=passes.calls, batch=batch)
    return Prepared(claim, full, passes, files, fitting, fit, batch)


def finish_cascade(
    bundle: Bundle,
    prepared: Prepared,
    read: SplitFaces,
    reference: Scored,
    *,
    rounds: int = 100,
    console: Console,
) -> CascadeRecord:
    """Certify a cascade on other faces, time it, and put it into the bundle.

    One of the same name that is certified is not replaced by one that is not.

    Args:
        bundle: the bundle.
        prepared: the cascade as it was fitted.
        read: the faces that certify.
        reference: the passes of the FP32 reference on them.
        rounds: counted calls, at most.
        console: where progress is shown.

    Raises:
        UsageError: if the faces are those that fitted it.
    """
    showing = apart(score_faces(bundle, prepared.passes, read, replace=True, console=console), prepared.fitting)
    vote = bundle.manifest.decision.decide(reference.cube.vote()).label[showing.rows]
    shown = showing.faces.take(showing.rows)
    opened, certificate, label = _shown(prepared, showing, vote, console)
    left = np.array(opened.left)
    passes, calls, full = prepared.passes, prepared.passes.calls, prepared.full
    record = CascadeRecord(
        created=timestamp(),
        bundle_digest=bundle.manifest.digest,
        backend=passes.backend,
        precision=passes.precision,
        calls=calls,
        cascade=opened.cascade,
        fitted_on=prepared.fitting.title,
        shown_on=showing.clean_title,
        unfit=showing.unfit,
        fitted_sha256=prepared.fitting.faces.sha256(),
        shown_sha256=shown.sha256(),
        reference=f"{reference.cube.record.engine}-{reference.cube.record.precision}",
        others=_certified_on(bundle, shown.sha256(), opened.name),
        certificate=certificate,
        shown=Comparison.of(label, vote, shown.labels),
        left=tuple(left.tolist()),
        passes_per_face=round(float(left @ opened.cascade.sizes / left.sum()), 4),
        timing=_timed(opened, full, shown.images, batch=prepared.batch, rounds=rounds, console=console),
        machine=where_it_runs(full),
        graphs=tuple(file.name for file in prepared.files),
        files={
            file.name: FileEntry(sha256=sha256_of(file), bytes=file.stat().st_size)
            for file in sorted(prepared.files[0].parent.iterdir())
            if file.is_file()
        },
    ).sealed()
    if record.verdict != "certified" and _has_certified(bundle, record.engine):
        console.print(
            f"{bundle.path} keeps the {record.engine} that is certified; this one is not.",
            style="yellow",
        )
        return record
    _put(bundle, record, prepared.files[0].parent, showing)
    return record


def _shown(
    prepared: Prepared, showing: Scored, vote: NDArray[np.int64], console: Console
) -> tuple[CascadeEngine, CascadeCertificate | None, NDArray[np.int64]]:
    """The cascade with the largest threshold that is certified, and what its engine itself decides with it.

    The engine's labels may differ from those of the cube by rounding, in calls of other sizes: where they do not pass,
    the next smaller threshold is taken, down to none.
    """
    cascade, claim = prepared.fit.cascade, prepared.claim
    shown = showing.faces.take(showing.rows)
    if claim.rule == "exact":
        opened = prepared.opened(cascade)
        return opened, None, _answers(opened, shown.images, prepared.batch, console)
    certify_at = functools.partial(
        certify,
        cascade,
        showing.cube.scores[showing.rows],
        shown.labels,
        vote=vote,
        epsilon=claim.epsilon,
        max_drop=claim.max_drop,
        delta=claim.delta,
        data_sha256={"faces": shown.sha256()},
    )
    most: int | None = None
    while True:
        at_most, certificate = certify_at(most=most)
        opened = prepared.opened(at_most)
        label = _answers(opened, shown.images, prepared.batch, console)
        found = p_value(label, full=vote, truth=shown.labels, epsilon=claim.epsilon, max_drop=claim.max_drop)
        if found <= claim.delta or certificate.threshold is None:
            return opened, certificate, label
        most = certificate.passed - 1


def _answers(opened: CascadeEngine, faces: NDArray[np.uint8], batch: int, console: Console) -> NDArray[np.int64]:
    """What a cascade itself decides in calls of so many faces."""
    with progress_bar(console, f"{opened.name} on the faces that certify", len(faces)) as advance:
        return opened.run_all(faces, batch_size=batch, progress=advance).label


def _timed(
    cascade: CascadeEngine, full: Engine, faces: NDArray[np.uint8], *, batch: int, rounds: int, console: Console
) -> CascadeTiming:
    """Time a cascade and the whole fold in turn, both on the same real faces, other ones at every call."""
    setting = Setting(full.name, min(batch, len(faces)))
    engines: dict[tuple[Setting, str], Engine] = {(setting, "cascade"): cascade, (setting, "full"): full}
    with progress_bar(console, f"timing {cascade.name} and {full.name} in turn", rounds + 2) as advance:
        samples = call_samples(engines, faces, rounds=rounds, progress=advance)
    fast, slow = samples[setting, "cascade"], samples[setting, "full"]
    return CascadeTiming(
        batch=setting.batch,
        calls=len(slow),
        ms_a_face=float(f"{fast.mean() / setting.batch:.5g}"),
        full_ms_a_face=float(f"{slow.mean() / setting.batch:.5g}"),
        times_full=ratio_of(slow, fast),
    )


def _certified_on(bundle: Bundle, shown_sha256: str, name: str) -> int:
    """How many other cascades of a bundle were certified on the same faces; what they consist of is not read."""
    found = 0
    for other in cascades_in(bundle.path):
        with contextlib.suppress(BadBundle):
            record = record_of(bundle, other)
            found += other != name and record.shown_sha256 == shown_sha256 and record.verdict == "certified"
    return found


def _has_certified(bundle: Bundle, name: str) -> bool:
    """Whether a bundle has a cascade of this name that is whole and certified."""
    with contextlib.suppress(BadBundle):
        return read_cascade(bundle, name).verdict == "certified"
    return False


def _put(bundle: Bundle, record: CascadeRecord, folder: Path, showing: Scored) -> None:
    """Put a cascade into its bundle; its passport first, which is stale until the cascade is there."""
    target = bundle.path / CASCADES / record.engine
    with bundle.writing(), new_directory(target, marker=CASCADE_FILE) as made:
        for name in record.files:
            shutil.move(folder / name, made / name)
        write_text(made / CASCADE_FILE, record.to_json())
        _write_passport(bundle, record, showing, sha256_of(made / CASCADE_FILE))


def _write_passport(bundle: Bundle, record: CascadeRecord, showing: Scored, sha256: str) -> None:
    """The certificate of the cascade as an engine's: what loads it asks for no other."""
    found, limits, most = record.shown, record.limits, record.calls.sizes[-1]
    certificate = Certificate(
        verdict=record.verdict,
        reasons=list(record.reasons),
        created=record.created,
        engine_sha256=sha256,
        machine=record.machine,
        batches=[record.timing.batch],
        data=showing.cube.record.data,
        split=showing.cube.record.split,
        data_sha256=record.shown_sha256,
        faces=found.faces,
        max_drop_points=limits.max_drop_points,
        max_disagreement_pct=limits.max_disagreement_pct,
        bound_points=found.bound_points,
        disagreement_bound_pct=found.disagreement_bound_pct,
        multiplies_in={},
    )
    engine = bundle.path / "engines" / record.engine
    engine.parent.mkdir(exist_ok=True)
    Passport(
        file=f"../{CASCADES}/{record.engine}/{CASCADE_FILE}",
        sha256=sha256,
        bytes=sum(entry.bytes for entry in record.files.values()),
        backend=record.backend,
        precision=record.precision,
        graph=bundle.manifest.graphs[record.precision].file,
        graph_sha256=bundle.graph_sha256(record.precision),
        created=record.created,
        seconds=0.0,
        versions=versions_of("emoexport", "onnxruntime-gpu", "onnxruntime", "openvino", "tensorrt"),
        device={name: value for name, value in record.machine.items() if name != "runtime"},
        profiles=[[1, most, most]],
        settings={},
        network={},
        certificate=dataclasses.asdict(certificate),
    ).write(engine)
