"""Where a bundle is verified: engines against the reference, on labelled faces, to a certificate each."""

import dataclasses
import functools
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from emoexport.bundle import Bundle, writes_bundle
from emoexport.clock import timestamp
from emoexport.engines import BACKENDS
from emoexport.engines.base import Engine
from emoexport.engines.certificate import Certificate
from emoexport.engines.machine import describe_machine, versions_of
from emoexport.engines.passport import Passport
from emoexport.engines.timing import interleave, latency_of
from emoexport.errors import BadData, UsageError
from emoexport.files import changed_directory
from emoexport.measurement import first_line
from emoexport.metamorphic import check_relations
from emoexport.opening import graphs_of, noted, open_engines, origin_of, sizes_of, where_it_runs
from emoexport.parity import EngineFacts, EngineReport, ParityReport, VerifyFacts
from emoexport.parity_tables import parity_markdown
from emoexport.precision import PRECISIONS, size_of
from emoexport.precision_proof import prove
from emoexport.progress import progress_bar
from emoexport.run_faces import data_name, data_of_run, describe_faces, drawn_faces
from emoexport.saved_answers import SavedAnswers
from emoexport.sessions import open_judge, open_reference
from emoexport.summary import summarize
from emoexport.verdict import Judgement, Limits

__all__ = ["ANSWERS", "BATCHES", "judge_again", "verify"]

ANSWERS = "reports/answers.npz"
"""Of a bundle, where what engines and reference said is kept."""

BATCHES = (1, 16)
"""Numbers of faces in a call, if none is named."""

_ROUNDING = 2e-3
"""What one face's probabilities may differ by in another batch: other kernels round otherwise, below FP32 in steps."""


@writes_bundle
def verify(
    bundle: Bundle,
    *,
    data: str | None = None,
    split: str | None = None,
    engines: list[str] | None = None,
    precisions: list[str] | None = None,
    run: Path | None = None,
    limit: int | None = None,
    limits: Limits = Limits(),  # noqa: B008 (frozen)
    batches: Sequence[int] | None = None,
    rounds: int = 10,
    threads: int | None = None,
    cache: Path | None = None,
    label_order: str | None = None,
    skip_bad: bool = False,
    console: Console,
) -> ParityReport:
    """Hold every engine against the reference on labelled faces.

    It writes `reports/parity.json` and `.md`, `reports/answers.npz` to judge them again, and each engine's certificate.

    Args:
        bundle: the bundle.
        data: where the faces are; None for where the run read them.
        split: which split; None for the one meant for testing.
        engines: names of backends; None for all that are installed.
        precisions: None for all of the bundle.
        run: where the run is now, if it was moved.
        limit: use this many faces only, drawn at random.
        limits: how much worse than the reference an engine may be.
        batches: numbers of faces in a call: rows are checked to be independent at each, and all faces are answered at
            the largest. None for 1 and 16. An engine that takes fewer is asked for as many as it takes.
        rounds: counted calls for the times.
        threads: how many each runtime may use.
        cache: where runtimes that can keep what they compile.
        label_order: what numbered labels mean; None for what they meant to the run.
        skip_bad: leave out faces that cannot be read.
        console: where progress is shown.

    Raises:
        UsageError: if the bundle takes no such batch.
    """
    sizes = _sizes(bundle, batches)
    reference, where, record = open_reference(bundle, run)
    selection: dict[str, Any] = {"engines": engines, "precisions": precisions}
    opened = open_engines(bundle, **selection, threads=threads, cache=cache, profiled=True, note=noted(console))
    dataset = data_of_run(where, record, data, label_order=label_order, skip_bad=skip_bad)
    split = split or dataset.evaluation_split()
    faces, rows = drawn_faces(dataset, split, limit)
    unfit = describe_faces(dataset, split, record, console)
    judge = open_judge(bundle, reference, threads)
    with progress_bar(console, "reference: every pass of every face", len(faces)) as advance:
        wanted = reference.run(faces.images, progress=advance)
    some = np.resize(faces.images, (sizes[-1], *bundle.manifest.face_shape))
    in_graph = {name: graph.layers_by_number() for name, graph in summarize(bundle).graphs.items()}
    asked = _Asked(bundle=bundle, batches=sizes, precisions=precisions or (), in_graph=in_graph)
    facts, answers = [], {}
    for engine in opened:
        try:
            with progress_bar(console, f"{engine.name}: types, and rows", 1) as advance:
                fact = _fact(asked, engine, some)
                advance(1)
            with progress_bar(console, engine.name, len(faces)) as advance:
                answers[engine.name] = engine.run_all(faces.images, batch_size=fact.batches[-1], progress=advance)
        except Exception as err:  # whatever a runtime raises; the others are judged all the same
            failure = first_line(err).rstrip(".")
            fact = EngineFacts(**_known(asked, engine), proof=Judgement(verdict="failed"), failure=failure)
        facts.append(fact)
    answering = [engine for engine in opened if engine.name in answers]
    timed = min([sizes[-1], *(engine.max_batch for engine in answering)])
    with progress_bar(console, "timing, all in turn", rounds + 2) as advance:
        calls = {engine.name: functools.partial(engine.run, some[:timed]) for engine in (judge, *answering)}
        samples = interleave(calls, rounds=rounds, progress=advance)
    saved = SavedAnswers(
        facts=VerifyFacts(
            created=timestamp(),
            bundle_digest=bundle.manifest.digest,
            data=data_name(dataset.source),
            split=split,
            data_sha256=faces.sha256(),
            faces=len(faces),
            skipped=len(dataset.skipped),
            labels=bundle.manifest.labels,
            unfit=unfit,
            engines=tuple(facts),
            batches=tuple(sizes),
            batch=timed,
            latency={name: latency_of(times) for name, times in samples.items()},
            size_bytes=sizes_of(bundle),
            notes=bundle.notes(graphs_of(opened)),
            machine=describe_machine(),
        ),
        answers=answers,
        reference=wanted,
        truth=faces.labels,
        rows=rows,
    )
    return _report(bundle, saved, limits, keep=True)


def judge_again(answers: Path, limits: Limits, bundle: Bundle | None = None) -> ParityReport:
    """Judge saved answers by other limits; nothing is run.

    Args:
        answers: what `verify` saved.
        limits: how much worse than the reference an engine may be.
        bundle: where the report and the certificates are to be written; None for nowhere.

    Raises:
        BadData: if they are no saved answers, or those of another bundle.
    """
    saved = SavedAnswers.read(answers)
    if bundle is None:
        return saved.judged(limits)
    if saved.facts.bundle_digest != bundle.manifest.digest:
        raise BadData(
            f"{answers} is of the bundle {saved.facts.bundle_digest[:16]}…; {bundle.path} is "
            f"{bundle.manifest.digest[:16]}….",
            hint=f"emoexport verify {bundle.path}, or leave the bundle out to judge without writing",
        )
    with bundle.writing():
        return _report(bundle, saved, limits)


def _report(bundle: Bundle, saved: SavedAnswers, limits: Limits, *, keep: bool = False) -> ParityReport:
    """Judge, and write the certificates of all engines, then the report, with the answers if they are to be kept.

    Certificates are what others go by: if the process is killed between the two, the report is the older one.
    """
    report = saved.judged(limits)
    write = (lambda reports: saved.write(reports / Path(ANSWERS).name)) if keep else None
    with changed_directory(bundle.path / "engines") as engines:
        for engine in report.engines:
            _certify(bundle, report, engine, engines)
    bundle.write_report("parity", report, parity_markdown(report), write=write)
    return report


def _sizes(bundle: Bundle, batches: Sequence[int] | None) -> list[int]:
    most = bundle.manifest.max_batch
    if batches and max(batches) > most:
        raise UsageError(
            f"found --batch {max(batches)}; {bundle.path} takes up to {most} faces in a call.", hint=f"--batch {most}"
        )
    return sorted({min(batch, most) for batch in batches or BATCHES})


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Asked:
    """What is to be found of each engine."""

    bundle: Bundle
    batches: Sequence[int]
    precisions: Sequence[str]
    """Those that were named."""
    in_graph: Mapping[str, Mapping[str, int]]
    """By precision: by type of number, how many multiplications its graph has."""


def _fact(asked: _Asked, engine: Engine, some: NDArray[np.uint8]) -> EngineFacts:
    row, in_graph = PRECISIONS[engine.precision], asked.in_graph.get(engine.precision, {})
    batches = tuple(sorted({min(batch, engine.max_batch) for batch in asked.batches}))
    executed = engine.executed(some[: batches[-1]])
    allowed = row.tolerance.max_difference if row.bits == 32 else _ROUNDING
    return EngineFacts(
        **_known(asked, engine),
        **dataclasses.asdict(executed),
        batches=batches,
        relations=check_relations(engine, some, batches, allowed=allowed, symmetric=_is_symmetric(asked.bundle)),
        proof=prove(row, executed, in_graph, BACKENDS[engine.backend], named=engine.precision in asked.precisions),
    )


def _known(asked: _Asked, engine: Engine) -> dict[str, Any]:
    """What is known of an engine before it answers."""
    file, sha256 = origin_of(asked.bundle, engine)
    return {
        "engine": engine.name,
        "precision": engine.precision,
        "file": file,
        "sha256": sha256,
        "machine": where_it_runs(engine),
        "load_s": engine.load_s,
        "in_graph": dict(asked.in_graph.get(engine.precision, {})),
    }


def _is_symmetric(bundle: Bundle) -> bool:
    """Whether every pass has that of its member on the view's mirror image beside it, with the same weight."""
    manifest = bundle.manifest
    weights = (
        manifest.weights if manifest.weights is not None else np.ones((len(manifest.members), len(manifest.views)))
    )
    voting = [
        (member, view.function, tuple(sorted(view.parameters.items())), float(weights[member, number]), view.mirrored)
        for member in range(len(weights))
        for number, view in enumerate(manifest.views)
        if weights[member, number]
    ]
    return Counter(voting) == Counter((*one, not mirrored) for *one, mirrored in voting)


def _certify(bundle: Bundle, report: ParityReport, engine: EngineReport, engines: Path) -> None:
    """Put the verdict into the passport in a folder; what a runtime makes of a graph each time gets one for that.

    An engine that was built again since it was judged keeps the passport that it has now.
    """
    file = engines / engine.engine
    is_built = BACKENDS[_backend_of(engine)].built_from == "graph"
    passport = Passport.read(file) if is_built else _passport_for(bundle, report, engine)
    if passport.sha256 != engine.sha256:
        return
    found = [result.evidence for result in report.results if result.engine == engine.engine]
    certificate = Certificate(
        verdict=engine.verdict,
        reasons=list(engine.reasons),
        created=report.created,
        engine_sha256=engine.sha256,
        machine=engine.machine,
        batches=list(engine.batches),
        data=report.data,
        split=report.split,
        data_sha256=report.data_sha256,
        faces=report.faces,
        max_drop_points=report.limits.max_drop_points,
        max_disagreement_pct=report.limits.max_disagreement_pct,
        bound_points=min((evidence.bound_points for evidence in found), default=-100.0),
        disagreement_bound_pct=round(100 * max((evidence.disagreement_bound for evidence in found), default=1.0), 4),
        multiplies_in=engine.time_share,
    )
    dataclasses.replace(passport, certificate=dataclasses.asdict(certificate)).write(file)


def _passport_for(bundle: Bundle, report: ParityReport, engine: EngineReport) -> Passport:
    """Of an engine that had none: a runtime makes it of a file of the bundle when it is opened."""
    manifest = bundle.manifest
    has_graph = BACKENDS[_backend_of(engine)].built_from != "fold"
    return Passport(
        file=os.path.relpath(engine.file, "engines"),
        sha256=engine.sha256,
        bytes=size_of(report.size_bytes, engine.engine),
        backend=_backend_of(engine),
        precision=engine.precision,
        graph=manifest.graphs[engine.precision].file if has_graph else "",
        graph_sha256=bundle.graph_sha256(engine.precision) if has_graph else "",
        created=timestamp(),
        seconds=engine.load_s,
        versions=versions_of("emoexport", "onnxruntime-gpu", "onnxruntime", "openvino", "torch"),
        device={name: value for name, value in engine.machine.items() if name != "runtime"},
        profiles=[[1, manifest.max_batch, manifest.max_batch]],
        settings={},
        network={},
    )


def _backend_of(engine: EngineReport) -> str:
    return engine.engine.removesuffix(f"-{engine.precision}")
