"""Where a cascade is made: fitted on validation faces, certified on other faces, timed against the whole fold."""

import contextlib
import dataclasses
import functools
import itertools
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from emoexport.bundle import Bundle, FileEntry
from emoexport.cascade import Cascade, Paths
from emoexport.cascade_certificate import THRESHOLDS, CascadeCertificate, certify, p_value, passing
from emoexport.cascade_fit import fit_cascade
from emoexport.cascade_record import (
    CASCADE_FILE,
    CASCADES,
    CascadeRecord,
    CascadeTiming,
    cascades_in,
    read_cascade,
)
from emoexport.cascade_stages import Calls, choose_stages, with_stages
from emoexport.clock import timestamp
from emoexport.comparison import Comparison
from emoexport.engines import BACKENDS, Backend
from emoexport.engines.base import Engine
from emoexport.engines.certificate import Certificate
from emoexport.engines.machine import versions_of
from emoexport.engines.passport import Passport
from emoexport.engines.tensorrt_build import BuilderSettings, build_engine
from emoexport.engines.timing import interleave, ratio_of
from emoexport.errors import BadBundle, UsageError
from emoexport.files import new_directory, sha256_of, write_text
from emoexport.opening import open_engines, open_members, where_it_runs
from emoexport.pass_engine import CascadeEngine, PassEngine
from emoexport.pass_graph import write_pass_graphs
from emoexport.plan_costs import Setting, call_samples
from emoexport.progress import progress_bar
from emoexport.scoring import Scored, apart, choosing_data, reference_engine, score_split
from emoexport.views import views_named

__all__ = [
    "Claim",
    "Prepared",
    "finish_cascade",
    "make_cascade",
    "open_passes",
    "prepare_cascade",
    "require_batch",
    "voting_weights",
]

_SECONDS = 60.0
"""That the counted calls of one comparison may take, all together."""

_LITTLE = 2.0
"""Passes that a call may cost beside those in it, before a runtime is opened for a few sizes."""
_PREPARED_SIZES = (1, 4, 16, 64)
"""These: each takes memory for the weights of all members."""
_MANY = 64
"""Passes in a large call, in which what it costs besides is little."""
_ROUNDS = 8
"""Of calls of each member, to tell what they cost."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Claim:
    """What a cascade is to be certified for."""

    rule: Literal["exact", "agreement", "accuracy"] = "agreement"
    epsilon: float | None = None
    """The share of labels that may differ, in (0, 1), by the rule `agreement`."""
    max_drop: float | None = None
    """The share of faces by which accuracy may be lower, in (0, 1), by `accuracy`; by `agreement` if asked for."""
    delta: float = 0.05
    """How probable a certificate of what is not so may be."""
    offsets: bool = True
    """By `accuracy`, whether predictions are corrected for emotions that are decided too often."""

    def __post_init__(self) -> None:
        """Refuse what no faces can show, before anything slow is done.

        Raises:
            UsageError: if a limit or delta is out of range.
        """
        for limit in (self.epsilon, self.max_drop):
            if limit is not None and not 0 < limit < 1:
                raise UsageError(
                    f"found a limit of {100 * limit:g}; a cascade is certified for more than 0 and less than 100.",
                    hint="--exact loses nothing" if limit <= 0 else "--max-disagreement 1",
                )
        if not 0 < self.delta < 0.5:
            raise UsageError(f"found --delta {self.delta:g}; needed is a probability in (0, 0.5).", hint="--delta 0.05")

    @classmethod
    def of_goals(
        cls,
        max_disagreement_pct: float | None,
        max_drop_points: float | None,
        *,
        exact: bool = False,
        delta: float = 0.05,
        offsets: bool = True,
    ) -> "Claim":
        """What certifies these goals: 1 % of other labels if there is none.

        Raises:
            UsageError: if they exclude each other, or are out of range.
        """
        if exact and (max_disagreement_pct, max_drop_points) != (None, None):
            raise UsageError("--exact loses nothing; found another goal beside it.", hint="leave one of them out")
        if exact:
            return cls(rule="exact")
        drop = None if max_drop_points is None else max_drop_points / 100
        if max_disagreement_pct is None and drop is not None:
            return cls(rule="accuracy", max_drop=drop, delta=delta, offsets=offsets)
        epsilon = (1.0 if max_disagreement_pct is None else max_disagreement_pct) / 100
        return cls(rule="agreement", epsilon=epsilon, max_drop=drop, delta=delta)


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
    wishes: dict[str, Any] = {"run": run, "threads": threads, "console": console}
    target = bundle.path / CASCADES
    target.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".cascade.", dir=target) as scratch:
        prepared = prepare_cascade(
            bundle, claim, Path(scratch), engine, precision, data=data, batch=batch, cache=cache, **wishes
        )
        return finish_cascade(bundle, prepared, data=data, split=split, rounds=rounds, **wishes)


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
    fit: "Fitted"
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
    *,
    data: str | None,
    run: Path | None,
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
        data: where these faces may be, if not where the run read them.
        run: where the run is now, if it was moved.
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
    fitting = score_split(
        bundle,
        data=choosing_data(bundle, data, run),
        split="validation",
        engine=passes,
        run=run,
        replace=True,
        console=console,
    )
    fit = fitted(fitting, claim, bundle, passes.calls, batch)
    return Prepared(claim, full, passes, files, fitting, fit, batch)


def finish_cascade(
    bundle: Bundle,
    prepared: Prepared,
    *,
    data: str | None,
    split: str | None,
    run: Path | None,
    rounds: int = 100,
    threads: int | None,
    console: Console,
) -> CascadeRecord:
    """Certify a cascade on other faces, time it, and put it into the bundle.

    One of the same name that is certified is not replaced by one that is not.

    Raises:
        UsageError: if there are no other faces.
        BadData: if the faces cannot be read.
    """
    wishes: dict[str, Any] = {"data": data, "split": split, "run": run, "replace": True, "console": console}
    scorer = reference_engine()
    showing = apart(score_split(bundle, engine=prepared.passes, **wishes), prepared.fitting)
    reference = score_split(bundle, engine=scorer, threads=threads, **wishes)
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
        fitted_on=_described(prepared.fitting, "faces"),
        shown_on=_described(showing, "clean rows"),
        unfit=showing.unfit,
        fitted_sha256=prepared.fitting.faces.sha256(),
        shown_sha256=shown.sha256(),
        reference=f"{scorer}-fp32",
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
            highlight=False,
            soft_wrap=True,
        )
        return record
    _put(bundle, record, prepared.files[0].parent, showing)
    return record


def open_passes(
    bundle: Bundle,
    folder: Path,
    engine: str,
    precision: str,
    *,
    threads: int | None = None,
    cache: Path | None = None,
    console: Console,
) -> tuple[PassEngine, list[Path]]:
    """Write the graphs of a bundle's single passes, one a member, and open them the way that is faster here.

    A runtime that loses time where a call has another size than the one before is opened for a few sizes, unless this
    is little beside what is computed: each size takes memory. A compiler builds an engine of each graph first.

    Args:
        bundle: with members as branches, and all passes.
        folder: that gets the graphs.
        engine: a backend that opens graphs, or builds engines of them.
        precision: of the graph.
        threads: how many the runtime may use.
        cache: where a runtime that can keeps what it compiles.
        console: where progress is shown.

    Returns:
        The engine, and the files that it was opened from.

    Raises:
        UsageError: if the engine takes no graphs, passes are left out, or members are stacked.
    """
    manifest, backend = bundle.manifest, BACKENDS[engine]
    if backend.built_from == "fold":
        able = ", ".join(row.name for row in BACKENDS.values() if row.built_from != "fold")
        raise UsageError(
            f"{engine} takes no graphs; a cascade runs on those that do: {able}.", hint="--engine names one"
        )
    if manifest.choice.passes:
        raise UsageError(
            f"{bundle.path} leaves passes out; a cascade ends with all of them.",
            hint="name a bundle that was built without --pass",
        )
    console.print(f"writing graphs of single passes, {precision} ...", highlight=False)
    graphs = write_pass_graphs(
        bundle.graph(precision),
        folder,
        views=views_named([view.name for view in manifest.views]),
        labels=manifest.labels,
        face_shape=manifest.face_shape,
        max_batch=manifest.max_batch,
    )
    settings: dict[str, Any] = {"precision": precision, "face_shape": manifest.face_shape}
    usual = Calls().up_to(min(manifest.max_batch, _MANY) if backend.built_from else manifest.max_batch)
    files = (
        [_engine_of(backend, graph, usual, console, **settings) for graph in graphs] if backend.built_from else graphs
    )

    def opened(calls: Calls) -> PassEngine:
        members = open_members(files, backend, calls, threads=threads, cache=cache, **settings)
        passes = PassEngine(
            members, voting_weights(bundle), manifest.decision, face_shape=manifest.face_shape, calls=calls
        )
        passes.calls = _measured(passes, console)
        return passes

    passes = opened(usual)
    if backend.prepares_sizes and passes.calls.call_ms > _LITTLE * passes.calls.row_ms:
        del passes  # before the weights are loaded again
        passes = opened(usual.model_copy(update={"prepared": True, "sizes": _PREPARED_SIZES}).up_to(manifest.max_batch))
    return passes, files


def _engine_of(
    backend: Backend,
    graph: Path,
    calls: Calls,
    console: Console,
    *,
    precision: str,
    face_shape: tuple[int, int, int],
) -> Path:
    """An engine of a graph of passes, in the graph's place."""
    height, width, channels = face_shape
    most = calls.sizes[-1]
    console.print(f"building an engine of {graph.name} ...", highlight=False)
    engine = graph.with_suffix(".engine")
    build_engine(
        backend.name,
        graph,
        engine,
        precision=precision,
        face_shape=(height + 1, width, channels),
        settings=BuilderSettings(opt_batch=tuple(sorted({1, min(16, most), most})), max_batch=most),
        origin=graph,
    )
    for file in (graph, graph.with_name(f"{graph.name}.data")):
        file.unlink(missing_ok=True)
    return engine


def voting_weights(bundle: Bundle) -> NDArray[np.float64]:
    """Of each pass in the full vote, `(K, V)`, sum 1.

    Those of a view that shows what an earlier one does have 0, and the earlier one has their weight too.
    """
    manifest = bundle.manifest
    shape = len(manifest.members), len(manifest.views)
    found = np.full(shape, 1 / np.prod(shape)) if manifest.weights is None else manifest.weights.copy()
    place = {view.name: number for number, view in enumerate(manifest.views)}
    for number, view in enumerate(manifest.views):
        if view.same_as is not None:
            found[:, place[view.same_as]] += found[:, number]
            found[:, number] = 0
    return found


class Fitted(NamedTuple):
    """What a fit comes to."""

    cascade: Cascade
    labels: NDArray[np.int64]
    """Of the faces that fit, `(N,)`, each half judged by a fit on the other half."""


def fitted(scored: Scored, claim: Claim, bundle: Bundle, calls: Calls, batch: int) -> Fitted:
    """A cascade fitted on all faces of a cube, with the stages that pay for themselves in calls of so many faces.

    Each half of the faces is judged by a fit on the other half; by that the stages are chosen, and a threshold that is
    to be expected: `certified` finds the one that holds.

    Args:
        scored: the faces that fit.
        claim: what is to be certified.
        bundle: that votes.
        calls: what passes take.
        batch: faces in a call.

    Returns:
        The cascade, and the labels with which these faces leave it, `(N,)`.
    """
    cube, weights = scored.cube, voting_weights(bundle)
    fit = functools.partial(
        fit_cascade,
        weights=weights,
        decision=bundle.manifest.decision,
        rule=claim.rule,
        offsets=claim.offsets and claim.rule == "accuracy",
    )
    order = np.random.default_rng(0).permutation(len(cube.labels))
    halves = np.array_split(order, 2)
    found = [
        fit(cube.scores[fitting], cube.labels[fitting]).paths(cube.scores[judged])
        for fitting, judged in (halves, halves[::-1])
    ]
    drawn = np.concatenate(halves[::-1])  # at random, as faces come; data sets are often sorted by emotion
    paths = Paths(*(np.concatenate(parts, axis=1) for parts in zip(*found, strict=True)))

    def threshold(some: Paths) -> float | None:
        if claim.rule == "exact":
            return 0.0
        held = functools.partial(
            p_value, full=some.labels[-1], truth=cube.labels[drawn], epsilon=claim.epsilon, max_drop=claim.max_drop
        )
        passed = passing(some, held, thresholds=THRESHOLDS, delta=claim.delta)
        return THRESHOLDS[passed - 1] if passed else None

    whole = fit(cube.scores, cube.labels)
    kept = choose_stages(whole, paths, threshold, calls, batch)
    some = Paths(paths.labels[kept], paths.risks[kept])
    expected = threshold(some)
    cascade = with_stages(whole, kept).model_copy(update={"threshold": expected})
    labels = np.empty_like(cube.labels)
    labels[drawn] = some.labels_at(some.leaving(expected))
    return Fitted(cascade, labels)


def _measured(passes: PassEngine, console: Console) -> Calls:
    """Time calls of the members, each after one of another member and often of another size, as in a cascade."""
    sizes = [size for size in passes.calls.sizes if size <= _MANY]
    few, many = sizes[min(1, max(0, len(sizes) - 2))], sizes[-1]
    faces = np.random.default_rng(0).integers(0, 256, (many, *passes.face_shape), dtype=np.uint8)

    def turns(rows: int) -> Callable[[], object]:
        members = itertools.cycle(range(len(passes.members)))
        return lambda: passes.passes(faces[:rows], [(next(members), 0)])

    rounds = _ROUNDS * len(passes.members)
    with progress_bar(console, "timing calls of single members", rounds + 2) as advance:
        samples = interleave(
            {str(size): turns(size) for size in (few, many)}, rounds=rounds, seconds=_SECONDS, progress=advance
        )
    return passes.calls.measured(few, float(np.median(samples[str(few)])), many, float(np.median(samples[str(many)])))


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


def _described(scored: Scored, what: str) -> str:
    record = scored.cube.record
    count = int(scored.rows.sum()) if what == "clean rows" else record.faces
    return f"{record.data}, {record.split}, {count:,} {what}"


def _certified_on(bundle: Bundle, shown_sha256: str, name: str) -> int:
    """How many other cascades of a bundle were certified on the same faces."""
    found = 0
    for other in cascades_in(bundle.path):
        with contextlib.suppress(BadBundle):
            record = read_cascade(bundle, other)
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
    with new_directory(target, marker=CASCADE_FILE) as made:
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
