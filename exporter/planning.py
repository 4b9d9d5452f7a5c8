"""Where a plan is made: passes chosen on validation faces, engines timed here, the winner confirmed on other faces."""

import functools
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console

from emoexport.bundle import Bundle
from emoexport.calibration import Wish
from emoexport.clock import timestamp
from emoexport.comparison import Comparison
from emoexport.cube import Cube
from emoexport.engines import BACKENDS
from emoexport.engines.base import Engine
from emoexport.engines.machine import describe_machine
from emoexport.engines.timing import Samples, interleave, latency_of, ratio_of
from emoexport.errors import BadInput, MissingRuntime, UsageError
from emoexport.files import new_directory, write_bytes, write_text
from emoexport.opening import certificate_here, noted, open_engines
from emoexport.passes import Choice
from emoexport.pipeline import build
from emoexport.plan import PLAN_FILE, Goals, Plan, Timing
from emoexport.plan_search import candidates_of, likeliest
from emoexport.plan_tables import plan_markdown, plan_plot
from emoexport.progress import progress_bar
from emoexport.scoring import Scored, score_split
from emoexport.sessions import run_of
from emoexport.train.checkpoint import MemberRecord, read_run
from emoexport.verdict import Limits, Verdict, judge_counts

__all__ = ["make_plan", "planned"]

_SECONDS = 60.0
"""That the calls of one comparison may take, all together; there are at least five of each."""


class _Costs(NamedTuple):
    """What calls take, by engine, as a line through one pass and the full vote."""

    lines: Mapping[str, tuple[float, float]]
    """Milliseconds of a call without any pass, and for each pass."""

    def milliseconds(self, passes: int) -> tuple[str, float]:
        """Of the engine that is fastest with so many passes: its name, and a call."""
        name = min(self.lines, key=lambda engine: self._at(engine, passes))
        return name, self._at(name, passes)

    def _at(self, engine: str, passes: int) -> float:
        start, slope = self.lines[engine]
        return start + slope * passes


def make_plan(
    bundle: Bundle,
    out: Path,
    goals: Goals,
    *,
    data: str | None = None,
    split: str | None = None,
    run: Path | None = None,
    engines: list[str] | None = None,
    precisions: list[str] | None = None,
    batch: int = 16,
    rounds: int = 20,
    threads: int | None = None,
    console: Console,
) -> Plan:
    """Find the fewest passes that are shown to decide as well as the full vote, and what they cost here.

    The score cubes of the validation faces and of the faces that confirm are computed once and kept under `cubes/`.

    Args:
        bundle: with the full vote.
        out: the directory that gets `plan.json`, `plan.md` and `plan.png`.
        goals: what the deployment must do.
        data: where the faces that confirm are; None for where the run read them.
        split: which split; None for the one meant for testing.
        run: where the run is now, if it was moved.
        engines: names of backends that open graphs; None for all of the CPU that are usable here.
        precisions: None for all of the bundle.
        batch: faces in a call.
        rounds: counted calls of each engine, at most.
        threads: how many a runtime may use.
        console: where progress is shown.

    Raises:
        UsageError: if the bundle leaves passes out, or takes fewer faces in a call.
        BadCheckpoint: if the run is not there or not the one that was folded.
        BadData: if the faces cannot be read.
        MissingRuntime: if no engine runs here.
    """
    if batch > bundle.manifest.max_batch:
        raise UsageError(
            f"found --batch {batch}; {bundle.path} takes up to {bundle.manifest.max_batch} faces in a call."
        )
    where = run_of(bundle, run)[0]
    full = _eligible(
        bundle,
        open_engines(
            bundle, engines=engines, precisions=precisions, device="cpu", threads=threads, note=noted(console)
        ),
        console,
    )
    scorer = next((one for one in full if one.precision == "fp32"), None)
    settings: dict[str, Any] = {
        "run": run,
        "threads": threads,
        "console": console,
        "engine": scorer.backend if scorer else "torch",
    }
    selection = score_split(bundle, data=data, split="validation", **settings).cube
    scored = score_split(bundle, data=data, split=split, **settings)
    numbers = bundle.manifest.choice.numbers or list(range(1, len(bundle.manifest.members) + 1))
    candidates = candidates_of(selection, bundle.manifest.decision, numbers)
    kept = {one.precision for one in full}
    with _built(bundle, where, candidates[0].choice, kept, console) as single:
        least = _opened_like(full, single, threads)
        samples = _timed({"full": full, "one": least}, batch, rounds, console)
    costs = _costs(samples, bundle.manifest.passes_a_face, candidates[0].passes)
    faces = int(scored.rows.sum())
    wanted = _per_call(goals, batch)
    chosen, why = likeliest(candidates, wanted, faces, lambda passes: costs.milliseconds(passes)[1])
    timings = [_timing(samples, one, "one", candidates[0].passes, batch) for one in full]
    timings += [_timing(samples, one, "full", bundle.manifest.passes_a_face, batch) for one in full]
    verdict: Verdict = "not enough evidence"
    confirmation, best = None, None
    reasons: tuple[str, ...] = (why,) if why else ()
    if chosen is not None:
        found = candidates[chosen]
        with _built(bundle, where, found.choice, kept, console) as few:
            opened = _opened_like(full, few, threads)
            again = _timed({"full": full, "few": opened}, batch, rounds, console)
            timings += [_timing(again, one, "few", found.passes, batch) for one in full]
            best = min(opened, key=lambda one: float(np.median(again[f"{one.name} few"])))
            confirmation = _confirmed(bundle, best, scored, batch, console)
        verdict, reasons = _judged(confirmation, goals)
    plan = Plan(
        created=timestamp(),
        bundle_digest=bundle.manifest.digest,
        members={number: member.sha256 for number, member in zip(numbers, bundle.manifest.members, strict=True)},
        goals=goals,
        selected_on=f"{selection.record.data}, validation, {selection.record.faces:,} faces",
        confirmed_on=f"{scored.cube.record.data}, {scored.cube.record.split}, {faces:,} clean rows",
        selection_sha256=selection.record.data_sha256,
        confirmation_sha256=scored.cube.record.data_sha256,
        full_accuracy=_accuracy(selection, bundle),
        candidates=tuple(candidates),
        chosen=chosen,
        engine=best.backend if best else None,
        precision=best.precision if best else None,
        batch=batch,
        timings=tuple(timings),
        confirmation=confirmation,
        verdict=verdict,
        reasons=reasons,
        machine=describe_machine(),
    ).sealed()
    with new_directory(out, marker=PLAN_FILE) as directory:
        write_text(directory / PLAN_FILE, plan.to_json())
        write_text(directory / "plan.md", plan_markdown(plan))
        write_bytes(directory / "plan.png", plan_plot(plan))
    return plan


def planned(file: Path, run: Path) -> tuple[Choice, str]:
    """What a plan says of a run: the passes to build, and the precision.

    Raises:
        BadInput: if the file is no plan, was changed, chose nothing, or is of other members.
    """
    plan = Plan.parse_json(file)
    if not plan.is_intact():
        raise BadInput(f"{file} was changed after it was written.", hint="emoexport plan")
    if plan.choice is None or plan.precision is None:
        raise BadInput(f"{file} chose nothing: {'; '.join(plan.reasons)}.", hint="emoexport plan with other goals")
    files = [run / name for name in read_run(run).members]
    found = {number: MemberRecord.parse_json(path).sha256 for number, path in enumerate(files, start=1)}
    if any(found.get(number) != plan.members[number] for number in plan.choice.numbers):
        raise BadInput(
            f"{file} is a plan for other members than those in {run}.", hint="name the run that it was made for"
        )
    return plan.choice, plan.precision


def _eligible(bundle: Bundle, opened: Sequence[Engine], console: Console) -> list[Engine]:
    """Of those that open graphs, which few passes have too, the certified; all of them, and a note, where none is.

    Raises:
        MissingRuntime: if there is none.
    """
    graphs = [engine for engine in opened if not BACKENDS[engine.backend].built_from]
    if not graphs:
        raise MissingRuntime("a plan is made with engines that open graphs, and none is here.", hint="emoexport doctor")
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


@contextmanager
def _built(bundle: Bundle, run: Path, choice: Choice, precisions: set[str], console: Console) -> Iterator[Bundle]:
    """A bundle of some passes, as long as the block lasts, calibrated as the one with all is."""
    known = bundle.manifest.calibration
    wish = Wish() if known is None else Wish(faces=known.faces, method=known.method, random=known.random)
    console.print(f"building with {len(choice.passes)} of {bundle.manifest.passes_a_face} passes ...", highlight=False)
    with tempfile.TemporaryDirectory() as folder:
        yield build(
            run,
            Path(folder) / "few",
            choice=choice,
            precisions=sorted(precisions - {"fp32"}),
            calibration=wish,
            max_batch=bundle.manifest.max_batch,
            keep_rejected=True,
            gate_faces=7,  # what few faces say of it is not asked here
            console=Console(quiet=True),
        )


def _opened_like(full: Sequence[Engine], bundle: Bundle, threads: int | None) -> list[Engine]:
    """The same runtimes and precisions of another bundle."""
    return [open_engines(bundle, engines=[one.backend], precisions=[one.precision], threads=threads)[0] for one in full]


def _timed(opened: Mapping[str, Sequence[Engine]], batch: int, rounds: int, console: Console) -> dict[str, Samples]:
    """Milliseconds of calls by `<engine> <which>`, all in turn."""
    shape = next(iter(opened.values()))[0].face_shape
    faces = np.random.default_rng(0).integers(0, 256, (batch, *shape), dtype=np.uint8)
    calls = {f"{one.name} {which}": functools.partial(one.run, faces) for which, some in opened.items() for one in some}
    with progress_bar(console, "timing, all in turn", rounds + 2) as advance:
        return interleave(calls, rounds=rounds, seconds=_SECONDS, progress=advance)


def _costs(samples: Mapping[str, Samples], all_passes: int, few: int) -> _Costs:
    lines = {}
    for name in (key.removesuffix(" full") for key in samples if key.endswith(" full")):
        most, least = (float(np.median(samples[f"{name} {which}"])) for which in ("full", "one"))
        slope = max(most - least, 0.0) / max(all_passes - few, 1)
        lines[name] = (least - slope * few, slope)
    return _Costs(lines)


def _per_call(goals: Goals, batch: int) -> Goals:
    """The goals with throughput as the time that a call may take."""
    if goals.min_throughput is None:
        return goals
    allowed = min(1000 * batch / goals.min_throughput, goals.max_latency_ms or np.inf)
    return goals.model_copy(update={"max_latency_ms": float(allowed)})


def _timing(samples: Mapping[str, Samples], engine: Engine, which: str, passes: int, batch: int) -> Timing:
    full, some = samples[f"{engine.name} full"], samples[f"{engine.name} {which}"]
    return Timing(
        engine=engine.name,
        passes=passes,
        batch=batch,
        latency_ms=latency_of(some).p50_ms,
        times_full=ratio_of(full, some),
    )


def _confirmed(bundle: Bundle, engine: Engine, scored: Scored, batch: int, console: Console) -> Comparison:
    """What an engine of few passes decides about the faces that had no part in the choice, against the full vote."""
    faces = scored.faces.take(scored.rows)
    with progress_bar(console, f"{engine.name} on the faces that confirm", len(faces)) as advance:
        few = engine.run_all(faces.images, batch_size=batch, progress=advance)
    full = bundle.manifest.decision.decide(scored.cube.vote()[scored.rows])
    return Comparison.of(few.label, full.label, faces.labels)


def _judged(found: Comparison, goals: Goals) -> tuple[Verdict, tuple[str, ...]]:
    """By the bounds on the faces that confirm."""
    anything = 100.0 if goals.max_disagreement_pct is None else goals.max_disagreement_pct
    limits = Limits(max_drop_points=goals.max_drop_points, max_disagreement_pct=anything)
    judgement = judge_counts(found.only_right, found.only_wrong, found.disagreements, found.faces, limits)
    return judgement.verdict, judgement.reasons


def _accuracy(cube: Cube, bundle: Bundle) -> float:
    return round(float((bundle.manifest.decision.decide(cube.vote()).label == cube.labels).mean()), 6)
