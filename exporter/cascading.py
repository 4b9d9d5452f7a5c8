"""Where a cascade is made: fitted on validation faces, certified on other faces, timed against the whole fold."""

import dataclasses
import functools
import itertools
import os
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
from emoexport.cascade_record import CASCADE_FILE, CASCADES, CascadeRecord, CascadeTiming
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
from emoexport.errors import UsageError
from emoexport.files import new_directory, sha256_of, write_text
from emoexport.opening import open_engines, open_members, where_it_runs
from emoexport.pass_engine import CascadeEngine, PassEngine
from emoexport.pass_graph import write_pass_graphs
from emoexport.progress import progress_bar
from emoexport.scoring import Scored, score_split
from emoexport.views import views_named

__all__ = ["Claim", "fitted", "make_cascade", "open_passes", "voting_weights"]

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
            UsageError: if they exclude each other.
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
        UsageError: if the engine takes no graphs, passes are left out, or members are stacked.
        BadCheckpoint: if the run is not there or not the one that was folded.
        BadData: if the faces cannot be read.
        MissingRuntime: if the runtime is not installed.
    """
    (full,) = open_engines(bundle, engines=[engine], precisions=[precision], threads=threads, cache=cache)
    settings: dict[str, Any] = {"run": run, "threads": threads, "console": console}
    name = f"cascade-{claim.rule}-{engine}-{precision}"
    with new_directory(bundle.path / CASCADES / name, marker=CASCADE_FILE) as folder:
        passes, graphs = open_passes(bundle, folder, engine, precision, threads=threads, cache=cache, console=console)
        fitting = score_split(bundle, data=data, split="validation", engine=passes, **settings)
        showing = score_split(bundle, data=data, split=split, engine=passes, **settings)
        reference = score_split(bundle, data=data, split=split, engine=_scorer(), **settings)
        vote = bundle.manifest.decision.decide(reference.cube.vote()).label[showing.rows]
        cascade, certificate = certified(
            fitted(fitting, claim, bundle, passes.calls, batch).cascade, showing, vote, claim
        )
        opened = CascadeEngine(passes.members, cascade, face_shape=bundle.manifest.face_shape, calls=passes.calls)
        shown = showing.faces.take(showing.rows)
        label, left = _answers(opened, shown.images, batch, console)
        if certificate is not None:
            certificate = _held_by_itself(certificate, label, vote, shown.labels, claim)
        record = CascadeRecord(
            created=timestamp(),
            bundle_digest=bundle.manifest.digest,
            backend=engine,
            precision=precision,
            calls=passes.calls,
            cascade=cascade,
            fitted_on=_described(fitting, fitting.cube.record.faces, "faces"),
            shown_on=_described(showing, len(shown), "clean rows"),
            unfit=showing.unfit,
            fitted_sha256=fitting.cube.record.data_sha256,
            shown_sha256=shown.sha256(),
            certificate=certificate,
            shown=Comparison.of(label, vote, shown.labels),
            left=tuple(left.tolist()),
            passes_per_face=round(float(left @ cascade.sizes / left.sum()), 4),
            timing=timed(opened, full, shown.images, batch=batch, rounds=rounds, console=console),
            machine=where_it_runs(full),
            graphs={file.name: FileEntry(sha256=sha256_of(file), bytes=file.stat().st_size) for file in graphs},
        ).sealed()
        write_text(folder / CASCADE_FILE, record.to_json())
    _write_passport(bundle, record, showing, opened)
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
    graph.unlink()
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
    back = np.argsort(np.concatenate(halves[::-1]))
    paths = Paths(*(np.concatenate(parts, axis=1)[:, back] for parts in zip(*found, strict=True)))

    def threshold(some: Paths) -> float | None:
        if claim.rule == "exact":
            return 0.0
        held = functools.partial(
            p_value, full=some.labels[-1], truth=cube.labels, epsilon=claim.epsilon, max_drop=claim.max_drop
        )
        passed = passing(some, held, thresholds=THRESHOLDS, delta=claim.delta)
        return THRESHOLDS[passed - 1] if passed else None

    whole = fit(cube.scores, cube.labels)
    kept = choose_stages(whole, paths, threshold, calls, batch)
    some = Paths(paths.labels[kept], paths.risks[kept])
    expected = threshold(some)
    cascade = with_stages(whole, kept).model_copy(update={"threshold": expected})
    return Fitted(cascade, some.labels_at(some.leaving(expected)))


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


def certified(
    cascade: Cascade, scored: Scored, vote: NDArray[np.int64], claim: Claim
) -> tuple[Cascade, CascadeCertificate | None]:
    """The largest threshold that the clean rows of a cube certify; an exact cascade needs none.

    Args:
        cascade: as fitted.
        scored: faces that had no part in the fit.
        vote: labels of the full vote that is meant, of the clean rows.
        claim: what is to be certified.
    """
    if claim.rule == "exact":
        return cascade, None
    return certify(
        cascade,
        scored.cube.scores[scored.rows],
        scored.cube.labels[scored.rows],
        vote=vote,
        epsilon=claim.epsilon,
        max_drop=claim.max_drop,
        delta=claim.delta,
        data_sha256={"faces": scored.cube.record.data_sha256},
    )


def timed(
    cascade: CascadeEngine, full: Engine, faces: NDArray[np.uint8], *, batch: int, rounds: int, console: Console
) -> CascadeTiming:
    """Time a cascade and the whole fold in turn, both on the same real faces, other ones at every call."""
    most = min(batch, len(faces))
    parts = [faces[start : start + most] for start in range(0, len(faces) - most + 1, most)]

    def turns(engine: Engine) -> Callable[[], object]:
        given = itertools.cycle(parts)
        return lambda: engine.run(next(given))

    with progress_bar(console, f"timing {cascade.name} and {full.name} in turn", rounds + 2) as advance:
        samples = interleave(
            {"cascade": turns(cascade), "full": turns(full)}, rounds=rounds, seconds=_SECONDS, progress=advance
        )
    return CascadeTiming(
        batch=most,
        calls=len(samples["full"]),
        ms_a_face=float(f"{samples['cascade'].mean() / most:.5g}"),
        full_ms_a_face=float(f"{samples['full'].mean() / most:.5g}"),
        times_full=ratio_of(samples["full"], samples["cascade"]),
    )


def _answers(
    opened: CascadeEngine, faces: NDArray[np.uint8], batch: int, console: Console
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """What a cascade itself decides in calls of so many faces, and how many left at each stage."""
    with progress_bar(console, f"{opened.name} on the faces that certify", len(faces)) as advance:
        label = opened.run_all(faces, batch_size=batch, progress=advance).label
    return label, np.array(opened.left, dtype=np.int64)


def _held_by_itself(
    certificate: CascadeCertificate,
    label: NDArray[np.int64],
    vote: NDArray[np.int64],
    truth: NDArray[np.int64],
    claim: Claim,
) -> CascadeCertificate:
    """The certificate, withdrawn where what the engine itself decides, rounded otherwise than the cube, fails."""
    by_itself = p_value(label, full=vote, truth=truth, epsilon=claim.epsilon, max_drop=claim.max_drop)
    if by_itself <= claim.delta:
        return certificate
    return certificate.model_copy(update={"vote_holds": False})


def _scorer() -> str:
    """What computes the full vote of the reference: an FP32 graph in a runtime that is here, which is faster."""
    usable = [row.name for row in BACKENDS.values() if row.takes("fp32") and row.device == "cpu" and row.is_usable()]
    return usable[0] if usable else "torch"


def _described(scored: Scored, count: int, what: str) -> str:
    record = scored.cube.record
    return f"{record.data}, {record.split}, {count:,} {what}"


def _write_passport(bundle: Bundle, record: CascadeRecord, showing: Scored, opened: CascadeEngine) -> None:
    """The certificate of the cascade as an engine's: what loads it asks for no other."""
    file = bundle.path / CASCADES / record.engine / CASCADE_FILE
    found, limits = record.shown, record.limits
    graph = bundle.manifest.graphs[record.precision].file
    certificate = Certificate(
        verdict=record.verdict,
        reasons=[record.sentences[0].rstrip(".")],
        created=record.created,
        engine_sha256=sha256_of(file),
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
        file=os.path.relpath(file, engine.parent),
        sha256=certificate.engine_sha256,
        bytes=sum(entry.bytes for entry in record.graphs.values()),
        backend=record.backend,
        precision=record.precision,
        graph=graph,
        graph_sha256=bundle.graph_sha256(record.precision),
        created=record.created,
        seconds=opened.load_s,
        versions=versions_of("emoexport", "onnxruntime-gpu", "onnxruntime", "openvino"),
        device={name: value for name, value in record.machine.items() if name != "runtime"},
        profiles=[[1, record.calls.sizes[-1], record.calls.sizes[-1]]],
        settings={},
        network={},
        certificate=dataclasses.asdict(certificate),
    ).write(engine)
