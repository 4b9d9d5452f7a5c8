"""Where a plan is made: passes chosen on validation faces, engines timed here, the winner confirmed on other faces."""

import dataclasses
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from emoexport.bundle import Bundle, writes_bundle
from emoexport.calibration import Wish
from emoexport.cascade_claim import Claim
from emoexport.cascade_record import read_cascade
from emoexport.cascading import Prepared, finish_cascade, prepare_cascade, require_batch
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
from emoexport.plan_soups import soup_candidates, soup_run_of
from emoexport.plan_tables import plan_markdown, plan_plot
from emoexport.prebuilt import build_engines
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
from emoexport.sessions import run_of
from emoexport.train.checkpoint import MemberRecord, read_run
from emoexport.verdict import Limits, Verdict, judge_counts

__all__ = ["Wishes", "cascade_of_plan", "make_plan", "planned"]


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


@writes_bundle
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
    require_batch(bundle, max(wishes.batches))
    if bundle.manifest.passes_a_face < 2:
        raise UsageError(f"{bundle.path} computes one pass a face: there is nothing to leave out.")
    with new_directory(out, marker=PLAN_FILE) as directory:
        with tempfile.TemporaryDirectory() as scratch:
            plan = _Planner(bundle, goals, wishes, Path(scratch), console).plan(out)
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
    prepared: Prepared | None
    exits: Comparison | None

    def winner(self, goals: Goals) -> Literal["passes", "cascade"] | None:
        """What takes least a face on average, and less than the full vote, if its slow calls reach the goals."""
        able: dict[Literal["passes", "cascade"], float] = {}
        for name in ("passes", "cascade"):
            samples = self.samples.get(name)
            if samples is None or samples.mean() >= self.samples["full"].mean():
                continue
            slow, mean = float(np.percentile(samples, 99)), float(samples.mean())
            if is_fast_enough(slow, mean, self.setting.batch, goals):
                able[name] = mean
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
        sources: dict[str, Any] = {"data": self.wishes.data, "run": self.wishes.run, "console": self.console}
        choosing = read_choosing_faces(bundle, **sources)
        confirming = read_split(bundle, split=self.wishes.split, **sources)
        scorer = open_scorer(bundle, reference_engine(), threads=self.wishes.threads, run=self.wishes.run)
        selection, scored = (
            score_faces(bundle, scorer, read, replace=True, console=self.console) for read in (choosing, confirming)
        )
        scored = apart(scored, selection)
        decision, faces = bundle.manifest.decision, int(scored.rows.sum())
        vote = decision.decide(selection.cube.vote()).label
        candidates = self._candidates(selection, vote)
        costs, timings = self._costs(choosing, candidates[0])
        chosen, why = likeliest(candidates, goals, faces, lambda passes: costs.why_slow(passes, goals))
        about = bundle.manifest.passes_a_face if chosen is None else candidates[chosen].passes
        setting = costs.fastest(about, goals) or costs.fastest(about, Goals())
        assert setting is not None
        final = self._final(setting, None if chosen is None else candidates[chosen], choosing, vote)
        winner = final.winner(goals)
        confirmation, cascade = None, None
        verdict: Verdict = "not enough evidence"
        reasons: tuple[str, ...] = (why or "nothing that was timed reaches the goals of speed, or is faster than all",)
        if winner == "passes":
            confirmation = self._confirmed(final.engines["passes"], scored, setting.batch)
            verdict, reasons = _judged(confirmation, goals)
            if scored.unfit and verdict != "failed":
                verdict, reasons = "not enough evidence", (scored.unfit,)
        elif winner == "cascade":
            assert final.prepared is not None
            cascade = finish_cascade(bundle, final.prepared, confirming, scored, console=self.console)
            confirmation, verdict = cascade.shown, cascade.verdict
            reasons = () if verdict == "certified" else cascade.reasons
        engine = self.full[setting.engine]
        return Plan(
            created=timestamp(),
            bundle_digest=bundle.manifest.digest,
            bundle=os.path.relpath(bundle.path.resolve(), out.resolve()),
            members={
                number: member.sha256 for number, member in zip(self._numbers, bundle.manifest.members, strict=True)
            },
            goals=goals,
            selected_on=selection.title,
            confirmed_on=scored.clean_title,
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
                engine=reference_engine(),
                threads=self.wishes.threads,
                console=self.console,
            )
            self.notes.append(soups.note)
            found += soups.candidates
        return sorted(found, key=lambda one: (one.passes, one.selection.disagreements))

    def _costs(self, choosing: SplitFaces, one: Candidate) -> tuple[Costs, list[Timing]]:
        """Lines of all engines at all batches, through one pass and the full vote."""
        least = self._opened(one, "one", list(self.full.values()))
        everyone = {
            (Setting(name, batch), which): engine
            for which, some in (("full", self.full), ("one", least))
            for name, engine in some.items()
            for batch in self.wishes.batches
        }
        samples = self._timed(everyone, choosing)
        counts = {"full": self.bundle.manifest.passes_a_face, "one": one.passes}
        timings = [
            timing_of(setting.engine, counts[which], setting.batch, times, samples[setting, "full"])
            for (setting, which), times in samples.items()
        ]
        return Costs.of(samples, counts["full"], counts["one"]), timings

    def _final(
        self, setting: Setting, chosen: Candidate | None, choosing: SplitFaces, vote: NDArray[np.int64]
    ) -> _Final:
        """Build what came to the final for one engine, and time it with the full vote on the faces that choose."""
        full = self.full[setting.engine]
        engines, passes = {"full": full}, {"full": float(self.bundle.manifest.passes_a_face)}
        if chosen is not None:
            engines |= {"passes": self._opened(chosen, "few", [full])[full.name]}
            passes["passes"] = float(chosen.passes)
        prepared = self._prepared(setting, choosing)
        exits = None
        if prepared is not None:
            engines["cascade"] = prepared.opened(prepared.fit.cascade)
            exits = Comparison.of(prepared.fit.labels, vote, choosing.faces.labels)
        timed = self._timed({(setting, which): engine for which, engine in engines.items()}, choosing)
        samples = {which: timed[setting, which] for which in engines}
        if "cascade" in engines:
            passes["cascade"] = _passes_of(engines["cascade"])
        timings = tuple(
            timing_of(engines[which].name, passes[which], setting.batch, samples[which], samples["full"])
            for which in engines
            if which != "full"
        )
        return _Final(setting, engines, samples, timings, prepared, exits)

    def _prepared(self, setting: Setting, choosing: SplitFaces) -> Prepared | None:
        """A cascade for the final; None, and a note, where there can be none or no face would leave early."""
        if not self.wishes.exits or self.goals.max_passes is not None:
            return None
        full, folder = self.full[setting.engine], self.scratch / "cascade"
        folder.mkdir()
        try:
            found = prepare_cascade(
                self.bundle,
                self._claim,
                folder,
                full.backend,
                full.precision,
                choosing,
                batch=setting.batch,
                threads=self.wishes.threads,
                console=self.console,
            )
        except UsageError as err:  # stacked members, or limits that no faces can show
            self.notes.append(f"Cascades were not tried: {err}")
            return None
        if found.fit.cascade.threshold is None:
            self.notes.append("In a cascade no face would leave early within these limits.")
            return None
        return found

    @property
    def _claim(self) -> Claim:
        return Claim.of_goals(self.goals.max_disagreement_pct, self.goals.max_drop_points)

    def _opened(self, candidate: Candidate, name: str, like: Sequence[Engine]) -> dict[str, Engine]:
        """The same runtimes and precisions of a bundle of some passes, calibrated as the one with all is."""
        known = self.bundle.manifest.calibration
        wish = Wish() if known is None else Wish(faces=known.faces, method=known.method, random=known.random)
        passes = f"{candidate.passes} of {self.bundle.manifest.passes_a_face} passes"
        self.console.print(f"building with {passes} ...")
        bundle = build(
            self.scratch / "soup" if candidate.soup else self.run,
            self.scratch / name,
            choice=candidate.choice,
            precisions=sorted({engine.precision for engine in like} - {"fp32"}),
            calibration=wish,
            max_batch=self.bundle.manifest.max_batch,
            keep_rejected=True,
            gate_faces=7,  # what few faces say of it is not asked here
            console=Console(quiet=True),
        )
        self._compile(bundle, like)
        opened = [
            open_engines(bundle, engines=[one.backend], precisions=[one.precision], threads=self.wishes.threads)
            for one in like
        ]
        return {engine.name: engine for (engine,) in opened}

    def _compile(self, bundle: Bundle, like: Sequence[Engine]) -> None:
        """Have the compilers among some engines build theirs."""
        batches = self.wishes.batches
        settings = BuilderSettings(opt_batch=tuple(sorted(batches)), max_batch=max(batches))
        for engine in like:
            backend = BACKENDS[engine.backend]
            if backend.built_from == "graph":
                build_engines(bundle, [backend], [engine.precision], settings, console=self.console)

    def _timed(
        self, engines: Mapping[tuple[Setting, str], Engine], choosing: SplitFaces
    ) -> dict[tuple[Setting, str], Samples]:
        rounds = self.wishes.rounds
        with progress_bar(self.console, "timing, all in turn", rounds + 2) as advance:
            return call_samples(engines, choosing.faces.images, rounds=rounds, progress=advance)

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
        BadInput: if the file is no plan, was changed, chose nothing that is to be built, failed, or is of others.
    """
    plan = _read_plan(file)
    if plan.cascade is not None:
        raise BadInput(
            f"{file} chose a cascade, which is part of {_bundle_of(plan, file)} already: there is nothing to build.",
            hint=f"emoexport predict photos/ --bundle {_bundle_of(plan, file)} --cascade {plan.cascade.engine}",
        )
    if plan.choice is None or plan.precision is None:
        raise BadInput(f"{file} chose nothing: {'; '.join(plan.reasons)}.", hint="emoexport plan with other goals")
    if plan.verdict == "failed":
        raise BadInput(
            f"{file} chose passes that failed on other faces: {'; '.join(plan.reasons)}.",
            hint="emoexport plan with other goals",
        )
    files = [run / name for name in read_run(run).members]
    found = {number: MemberRecord.parse_json(path).sha256 for number, path in enumerate(files, start=1)}
    assert plan.chosen is not None
    candidate = plan.candidates[plan.chosen]
    numbers = plan.members if candidate.soup else candidate.choice.numbers
    if any(found.get(number) != plan.members[number] for number in numbers):
        raise BadInput(
            f"{file} is a plan for other members than those in {run}.", hint="name the run that it was made for"
        )
    if candidate.soup:
        run = soup_run_of(run, candidate.soup_sha256, console or Console(quiet=True))
    return run, plan.choice, plan.precision


def cascade_of_plan(file: Path) -> tuple[Path, str] | None:
    """The bundle and the name of the cascade that a plan chose, as they stand now; None if it chose passes, or nothing.

    Raises:
        BadInput: if the file is no plan or was changed, or the bundle has another cascade by now.
        BadBundle: if the bundle or its cascade is not there, or was changed.
    """
    plan = _read_plan(file)
    if plan.cascade is None:
        return None
    where = Path(_bundle_of(plan, file))
    if read_cascade(Bundle.open(where), plan.cascade.engine).digest != plan.cascade.digest:
        raise BadInput(f"{where} has another {plan.cascade.engine} by now than {file}.", hint=f"emoexport plan {where}")
    return where, plan.cascade.engine


def _read_plan(file: Path) -> Plan:
    plan = Plan.parse_json(file)
    if not plan.is_intact():
        raise BadInput(f"{file} was changed after it was written.", hint="emoexport plan")
    return plan


def _bundle_of(plan: Plan, file: Path) -> str:
    return os.path.relpath((file.parent / plan.bundle).resolve())


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


def _passes_of(cascade: Engine) -> float:
    """What a face took on average, of those that a cascade was timed with."""
    assert isinstance(cascade, CascadeEngine)
    left = np.array(cascade.left)
    return round(float(left @ cascade.cascade.sizes / left.sum()), 2)
