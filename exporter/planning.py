"""Where a plan is made: passes chosen on validation faces, engines timed here, the winner confirmed on other faces."""

import dataclasses
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from emoexport.bundle import Bundle
from emoexport.calibration import Wish
from emoexport.cascade_record import CascadeRecord
from emoexport.cascading import Claim, fitted, make_cascade, open_passes
from emoexport.clock import timestamp
from emoexport.comparison import Comparison
from emoexport.engines import BACKENDS
from emoexport.engines.base import Engine
from emoexport.engines.machine import describe_machine
from emoexport.engines.tensorrt_build import BuilderSettings
from emoexport.engines.timing import Samples
from emoexport.errors import BadInput, MissingRuntime, UsageError
from emoexport.files import new_directory, write_bytes, write_text
from emoexport.opening import certificate_here, noted, open_engines
from emoexport.pass_engine import CascadeEngine
from emoexport.passes import Choice
from emoexport.pipeline import build
from emoexport.plan import PLAN_FILE, Candidate, Goals, Plan, Timing
from emoexport.plan_costs import Costs, Setting, call_samples, is_fast_enough, timing_of
from emoexport.plan_search import best_member_of, candidates_of, likeliest
from emoexport.plan_soups import soup_candidates, soup_run_for
from emoexport.plan_tables import plan_markdown, plan_plot
from emoexport.prebuilt import build_engines
from emoexport.progress import progress_bar
from emoexport.run_faces import data_of_run
from emoexport.scoring import Scored, score_split
from emoexport.sessions import run_of
from emoexport.train.checkpoint import MemberRecord, read_run
from emoexport.verdict import Limits, Verdict, judge_counts

__all__ = ["Wishes", "make_plan", "planned"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wishes:
    """What of planning can be chosen besides the goals."""

    data: str | None = None
    """Where the faces that confirm are; None for where the run read them."""
    split: str | None = None
    """Which split; None for the one meant for testing."""
    run: Path | None = None
    """Where the run is now, if it was moved."""
    engines: list[str] | None = None
    """Names of backends that are made of graphs; None for all of the device that are usable here."""
    device: str = "cpu"
    """What they run on, if none is named: `cpu` or `cuda`."""
    precisions: list[str] | None = None
    """None for all of the bundle."""
    batches: tuple[int, ...] = (16,)
    """Faces in a call, of which the best is chosen."""
    rounds: int = 20
    """Counted calls of each engine, at most."""
    threads: int | None = None
    """How many a runtime may use."""
    soups: bool = True
    """Whether the mean of the members' weights is tried."""
    exits: bool = True
    """Whether a cascade is tried."""


def make_plan(bundle: Bundle, out: Path, goals: Goals, wishes: Wishes = Wishes(), *, console: Console) -> Plan:
    """Find the cheapest deployment that is shown to decide as well as the full vote, and what it costs here.

    The score cubes of the validation faces and of the faces that confirm are computed once and kept under `cubes/`.

    Args:
        bundle: with the full vote.
        out: the directory that gets `plan.json`, `plan.md` and `plan.png`.
        goals: what the deployment must do.
        wishes: what else can be chosen.
        console: where progress is shown.

    Raises:
        UsageError: if the bundle leaves passes out, or takes fewer faces in a call.
        BadCheckpoint: if the run is not there or not the one that was folded.
        BadData: if the faces cannot be read.
        MissingRuntime: if no engine runs here.
    """
    most = bundle.manifest.max_batch
    if max(wishes.batches) > most:
        raise UsageError(f"found --batch {max(wishes.batches)}; {bundle.path} takes up to {most} faces in a call.")
    with tempfile.TemporaryDirectory() as scratch:
        plan = _Planner(bundle, goals, wishes, Path(scratch), console).plan(out)
    with new_directory(out, marker=PLAN_FILE) as directory:
        write_text(directory / PLAN_FILE, plan.to_json())
        write_text(directory / "plan.md", plan_markdown(plan))
        write_bytes(directory / "plan.png", plan_plot(plan))
    return plan


class _Final(NamedTuple):
    """What came to the final, timed with the full vote on the faces that choose."""

    setting: Setting
    engines: Mapping[str, Engine]
    """`full`, and of `passes` and `cascade` those that came."""
    samples: Mapping[str, Samples]
    timings: tuple[Timing, ...]
    exits: Comparison | None

    def winner(self, goals: Goals) -> str | None:
        """What takes least a face on average, of those whose slow calls reach the goals; None if none does."""
        batch = self.setting.batch
        able = {
            name: float(samples.mean())
            for name, samples in self.samples.items()
            if name != "full"
            and is_fast_enough(float(np.percentile(samples, 99)), batch, _latency_of(goals))
            and is_fast_enough(float(samples.mean()), batch, goals.model_copy(update={"max_latency_ms": None}))
        }
        return min(able, key=able.__getitem__, default=None)


class _Planner:
    """One plan in the making."""

    def __init__(self, bundle: Bundle, goals: Goals, wishes: Wishes, scratch: Path, console: Console) -> None:
        self.bundle, self.goals, self.wishes, self.scratch, self.console = bundle, goals, wishes, scratch, console
        self.run, self.record = run_of(bundle, wishes.run)
        opened = open_engines(
            bundle,
            engines=wishes.engines,
            precisions=wishes.precisions,
            device=wishes.device,
            threads=wishes.threads,
            note=noted(console),
        )
        self.full = {engine.name: engine for engine in _eligible(bundle, opened, console)}
        self.notes: list[str] = []

    def plan(self, out: Path) -> Plan:
        """Search, time, confirm."""
        bundle, goals = self.bundle, self.goals
        selection, scored = self._scored("validation"), self._scored(self.wishes.split)
        decision, faces = bundle.manifest.decision, int(scored.rows.sum())
        vote = decision.decide(selection.cube.vote()).label
        candidates = self._candidates(selection, vote)
        costs, timings = self._costs(selection, candidates[0])
        passes = bundle.manifest.passes_a_face
        chosen, why = likeliest(candidates, goals, faces, lambda passes: costs.why_slow(passes, goals))
        about = passes if chosen is None else candidates[chosen].passes
        setting = costs.fastest(about, goals) or costs.fastest(about, Goals())
        assert setting is not None
        final = self._final(setting, None if chosen is None else candidates[chosen], selection, vote)
        winner = final.winner(goals)
        verdict: Verdict = "not enough evidence"
        reasons: tuple[str, ...] = (why,) if why else ()
        confirmation, cascade = None, None
        if winner is None and not reasons:
            reasons = ("what was timed does not reach the goals of speed",)
        if winner == "passes":
            confirmation = self._confirmed(final.engines["passes"], scored, setting.batch)
            verdict, reasons = _judged(confirmation, goals)
        if winner == "cascade":
            cascade = self._cascade(setting)
            confirmation, verdict = cascade.shown, cascade.verdict
            reasons = () if verdict == "certified" else (cascade.sentences[0].rstrip("."),)
            if cascade.cascade.threshold is None:
                verdict, reasons = "not enough evidence", (cascade.sentences[0].rstrip("."),)
        engine = self.full[setting.engine]
        return Plan(
            created=timestamp(),
            bundle_digest=bundle.manifest.digest,
            bundle=os.path.relpath(bundle.path.resolve(), out.resolve()),
            members={
                number: member.sha256 for number, member in zip(self._numbers, bundle.manifest.members, strict=True)
            },
            goals=goals,
            selected_on=f"{selection.cube.record.data}, validation, {selection.cube.record.faces:,} faces",
            confirmed_on=f"{scored.cube.record.data}, {scored.cube.record.split}, {faces:,} clean rows",
            selection_sha256=selection.cube.record.data_sha256,
            confirmation_sha256=scored.cube.record.data_sha256,
            full_accuracy=round(float((vote == selection.cube.labels).mean()), 6),
            best_member=best_member_of(selection.cube, decision),
            candidates=tuple(candidates),
            chosen=chosen,
            exits=final.exits,
            winner=winner,
            engine=engine.backend if winner else None,
            precision=engine.precision if winner else None,
            batch=setting.batch,
            timings=(*timings, *final.timings),
            confirmation=confirmation,
            cascade=cascade,
            verdict=verdict,
            reasons=reasons,
            notes=tuple(self.notes),
            machine=describe_machine(),
        ).sealed()

    @property
    def _numbers(self) -> list[int]:
        manifest = self.bundle.manifest
        return manifest.choice.numbers or list(range(1, len(manifest.members) + 1))

    @property
    def _scorer(self) -> str:
        """What computes the reference's passes: an FP32 graph, where one is planned with."""
        return next((engine.backend for engine in self.full.values() if engine.precision == "fp32"), "torch")

    def _scored(self, split: str | None) -> Scored:
        wishes = self.wishes
        settings: dict[str, Any] = {"run": wishes.run, "threads": wishes.threads, "console": self.console}
        return score_split(self.bundle, data=wishes.data, split=split, engine=self._scorer, **settings)

    def _candidates(self, selection: Scored, vote: NDArray[np.int64]) -> list[Candidate]:
        """Passes of the members, and of their soup, from few to many; of as many those that agree more come first."""
        found = candidates_of(selection.cube, self.bundle.manifest.decision, self._numbers)
        if self.wishes.soups:
            soups = soup_candidates(
                self.bundle,
                self.run,
                self.record,
                self.scratch,
                vote,
                data=self.wishes.data,
                engine=self._scorer,
                threads=self.wishes.threads,
                console=self.console,
            )
            self.notes.append(soups.note)
            found += soups.candidates
        return sorted(found, key=lambda one: (one.passes, one.selection.disagreements))

    def _costs(self, selection: Scored, one: Candidate) -> tuple[Costs, list[Timing]]:
        """Lines of all engines at all batches, through one pass and the full vote."""
        least = self._opened(self._built(one, "one"), list(self.full.values()))
        everyone = {
            (Setting(name, batch), which): engine
            for which, some in (("full", self.full), ("one", least))
            for name, engine in some.items()
            for batch in self.wishes.batches
        }
        samples = self._timed(everyone, selection)
        counts = {"full": self.bundle.manifest.passes_a_face, "one": one.passes}
        timings = [
            timing_of(setting.engine, counts[which], setting.batch, times, samples[setting, "full"])
            for (setting, which), times in samples.items()
        ]
        return Costs.of(samples, counts["full"], counts["one"]), timings

    def _final(self, setting: Setting, chosen: Candidate | None, selection: Scored, vote: NDArray[np.int64]) -> _Final:
        """Build what came to the final for one engine, and time it with the full vote on the faces that choose."""
        full = self.full[setting.engine]
        engines, passes, exits = {"full": full}, {"full": float(self.bundle.manifest.passes_a_face)}, None
        if chosen is not None:
            engines |= {"passes": self._opened(self._built(chosen, "few"), [full])[full.name]}
            passes["passes"] = float(chosen.passes)
        if self.wishes.exits and self.goals.max_passes is None:
            opened, _ = open_passes(
                self.bundle,
                self.scratch,
                full.backend,
                full.precision,
                threads=self.wishes.threads,
                console=self.console,
            )
            judged = score_split(
                self.bundle, data=self.wishes.data, split="validation", engine=opened, run=self.wishes.run,
                console=self.console,
            )  # fmt: skip
            fit = fitted(judged, self._claim, self.bundle, opened.calls, setting.batch)
            cascade = CascadeEngine(opened.members, fit.cascade, face_shape=full.face_shape, calls=opened.calls)
            engines["cascade"], exits = cascade, Comparison.of(fit.labels, vote, selection.cube.labels)
        timed = self._timed({(setting, which): engine for which, engine in engines.items()}, selection)
        samples = {which: timed[setting, which] for which in engines}
        if isinstance(engines.get("cascade"), CascadeEngine):
            passes["cascade"] = _passes_of(engines["cascade"])
        timings = tuple(
            timing_of(engines[which].name, passes[which], setting.batch, samples[which], samples["full"])
            for which in engines
            if which != "full"
        )
        return _Final(setting, engines, samples, timings, exits)

    @property
    def _claim(self) -> Claim:
        return Claim.of_goals(self.goals.max_disagreement_pct, self.goals.max_drop_points)

    def _cascade(self, setting: Setting) -> CascadeRecord:
        """The cascade that won, certified and put into the bundle."""
        wishes, engine = self.wishes, self.full[setting.engine]
        return make_cascade(
            self.bundle,
            self._claim,
            engine=engine.backend,
            precision=engine.precision,
            data=wishes.data,
            split=wishes.split,
            run=wishes.run,
            batch=setting.batch,
            threads=wishes.threads,
            console=self.console,
        )

    def _built(self, candidate: Candidate, name: str) -> Bundle:
        """A bundle of some passes, calibrated as the one with all is."""
        known = self.bundle.manifest.calibration
        wish = Wish() if known is None else Wish(faces=known.faces, method=known.method, random=known.random)
        precisions = {engine.precision for engine in self.full.values()} - {"fp32"}
        self.console.print(
            f"building with {candidate.passes} of {self.bundle.manifest.passes_a_face} passes ...", highlight=False
        )
        built = build(
            self.scratch / "soup" if candidate.soup else self.run,
            self.scratch / name,
            choice=candidate.choice,
            precisions=sorted(precisions),
            calibration=dataclasses.replace(wish, data=self.wishes.data),
            max_batch=self.bundle.manifest.max_batch,
            keep_rejected=True,
            gate_faces=7,  # what few faces say of it is not asked here
            console=Console(quiet=True),
        )
        self._compile(built)
        return built

    def _compile(self, built: Bundle) -> None:
        """Have the compilers among those that are planned with build their engines."""
        batches = self.wishes.batches
        settings = BuilderSettings(opt_batch=tuple(sorted(batches)), max_batch=max(batches))
        for engine in self.full.values():
            backend = BACKENDS[engine.backend]
            if backend.built_from == "graph":
                build_engines(built, [backend], [engine.precision], settings, console=self.console)

    def _opened(self, bundle: Bundle, like: Sequence[Engine]) -> dict[str, Engine]:
        """The same runtimes and precisions of another bundle."""
        opened = [
            open_engines(bundle, engines=[one.backend], precisions=[one.precision], threads=self.wishes.threads)
            for one in like
        ]
        return {engine.name: engine for (engine,) in opened}

    def _timed(
        self, engines: Mapping[tuple[Setting, str], Engine], selection: Scored
    ) -> dict[tuple[Setting, str], Samples]:
        rounds = self.wishes.rounds
        with progress_bar(self.console, "timing, all in turn", rounds + 2) as advance:
            return call_samples(engines, selection.faces.images, rounds=rounds, progress=advance)

    def _confirmed(self, engine: Engine, scored: Scored, batch: int) -> Comparison:
        """What an engine decides about the faces that had no part in the choice, against the full vote."""
        faces = scored.faces.take(scored.rows)
        with progress_bar(self.console, f"{engine.name} on the faces that confirm", len(faces)) as advance:
            few = engine.run_all(faces.images, batch_size=batch, progress=advance)
        full = self.bundle.manifest.decision.decide(scored.cube.vote()[scored.rows])
        return Comparison.of(few.label, full.label, faces.labels)


def planned(file: Path, run: Path, console: Console | None = None) -> tuple[Path, Choice, str]:
    """What a plan says of a run: the run to build, the passes, and the precision.

    A plan with a soup makes the run of that soup beside the run, if it is not there yet.

    Args:
        file: the plan.
        run: that it was made for.
        console: where progress is shown.

    Raises:
        BadInput: if the file is no plan, was changed, chose nothing that is to be built, or is of other members.
    """
    plan = Plan.parse_json(file)
    if not plan.is_intact():
        raise BadInput(f"{file} was changed after it was written.", hint="emoexport plan")
    if plan.cascade is not None:
        where = os.path.normpath(file.parent / plan.bundle)
        raise BadInput(
            f"{file} chose a cascade, which is part of {where} already: there is nothing to build.",
            hint=f"emoexport predict photos/ --bundle {where} --cascade {plan.cascade.engine}",
        )
    if plan.choice is None or plan.precision is None:
        raise BadInput(f"{file} chose nothing: {'; '.join(plan.reasons)}.", hint="emoexport plan with other goals")
    files = [run / name for name in read_run(run).members]
    found = {number: MemberRecord.parse_json(path).sha256 for number, path in enumerate(files, start=1)}
    assert plan.chosen is not None
    soup = plan.candidates[plan.chosen].soup
    numbers = plan.members if soup else plan.choice.numbers
    if any(found.get(number) != plan.members[number] for number in numbers):
        raise BadInput(
            f"{file} is a plan for other members than those in {run}.", hint="name the run that it was made for"
        )
    if not soup:
        return run, plan.choice, plan.precision
    out = run.with_name(f"{run.resolve().name}-soup")
    if not (out / "run.json").is_file():
        soup_run_for(run, out, data_of_run(run, read_run(run), None), console or Console(quiet=True))
    return out, plan.choice, plan.precision


def _eligible(bundle: Bundle, opened: Sequence[Engine], console: Console) -> list[Engine]:
    """Of those made of graphs, which few passes have too, the certified; all of them, and a note, where none is.

    Raises:
        MissingRuntime: if there is none.
    """
    graphs = [engine for engine in opened if BACKENDS[engine.backend].built_from != "fold"]
    if not graphs:
        raise MissingRuntime("a plan is made with engines of graphs, and none is here.", hint="emoexport doctor")
    certified = [
        engine
        for engine, (found, stale) in ((one, certificate_here(bundle, one)) for one in graphs)
        if found and not stale and found.verdict == "certified"
    ]
    if not certified:
        noted(console)(
            f"No engine of {bundle.path} is certified here, so all are planned with. "
            f"Next: emoexport verify {bundle.path}"
        )
    return certified or graphs


def _judged(found: Comparison, goals: Goals) -> tuple[Verdict, tuple[str, ...]]:
    """By the bounds on the faces that confirm."""
    anything = 100.0 if goals.max_disagreement_pct is None else goals.max_disagreement_pct
    limits = Limits(max_drop_points=goals.max_drop_points, max_disagreement_pct=anything)
    judgement = judge_counts(found.only_right, found.only_wrong, found.disagreements, found.faces, limits)
    return judgement.verdict, judgement.reasons


def _latency_of(goals: Goals) -> Goals:
    return goals.model_copy(update={"min_throughput": None})


def _passes_of(cascade: Engine) -> float:
    """What a face took on average, of those that a cascade was timed with."""
    assert isinstance(cascade, CascadeEngine)
    left = np.array(cascade.left)
    return round(float(left @ cascade.cascade.sizes / left.sum()), 2)
