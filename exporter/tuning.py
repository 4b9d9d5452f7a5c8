"""Which blocks of the members are worth having in few bits on this machine, tried one by one and then together.

tuning/x/
  tuning.json     what was chosen, and every trial; `build --tuning` takes it
  tuning.md       the same for people
  tuning.png      cost and gain of each block
  trials.jsonl    the setting, then a line a trial, as it is made: what was cut off goes on after the last one
"""

from pathlib import Path

import numpy as np
from rich.console import Console

from emoexport.bundle import Bundle
from emoexport.calib.record import Calibration
from emoexport.calib.tuning import Trial, Tuning
from emoexport.calibration import CALIBRATION_FILE
from emoexport.clock import timestamp
from emoexport.engines import BACKENDS, Backend, backends_named
from emoexport.errors import BadBundle, BadInput, CheckFailed, MissingRuntime, UsageError
from emoexport.files import refuse_foreign, write_text, writing
from emoexport.gate import GATE_FACES, fastest
from emoexport.precision import PRECISIONS
from emoexport.run_faces import validation_faces
from emoexport.sessions import run_of
from emoexport.statistics import Estimate, paired_bound
from emoexport.temporaries import sweep_below
from emoexport.trials import TrialLog, Trials, Workshop, nodes_by_block

__all__ = ["TUNING_FILE", "nodes_left", "read_tuning", "tune"]

TUNING_FILE = "tuning.json"
_LOG = "trials.jsonl"

_ROUNDED = "fp16"
"""Its costs are measured too, by a runtime that rounds to FP16 whatever the processor computes in."""


_NEARLY = 0.98
"""A graph this many times as fast is not taken for as fast, however wide the interval."""


def tune(
    bundle: Bundle,
    out: Path,
    *,
    precision: str = "int8",
    engine: str | None = None,
    run: Path | None = None,
    data: str | None = None,
    faces: int = 1000,
    batch: int = 16,
    rounds: int = 12,
    threads: int | None = None,
    max_drop: float | None = None,
    force: bool = False,
    console: Console,
) -> Tuning:
    """Measure what each block costs and gains, and search which ones are to have few bits.

    All begin with few bits. Blocks that are not shown to gain speed on the target go back to FP32, if the whole stays
    as fast. Then, until the accuracy is shown to be as high as is asked for, those that move the votes most for the
    least time. Whether the whole is worth having beside graphs of 16 and 32 bits is for `build` to judge.

    Args:
        bundle: with the FP32 graph, and the calibration of its activations.
        out: where trials are kept as they are made, and `tuning.json` in the end.
        precision: of 8 bits.
        engine: a backend to be fast on; None for the fastest of those installed here.
        run: where the run is now, if it was moved.
        data: where its faces are, if not where the run read them.
        faces: how many of its validation faces to count costs on.
        batch: faces in a call that is timed.
        rounds: counted calls of each graph.
        threads: how many a runtime may use.
        max_drop: the largest loss of accuracy, as a share of the faces; None for that of the precision's tolerance.
        force: forget the trials that `out` holds.
        console: where progress is shown.

    Raises:
        UsageError: if the precision is none of 8 bits, the trials in `out` are of another setting, or there are too
            few faces to show a loss as small as is allowed.
        BadBundle: if the bundle has no calibration for it.
        BadData: if the faces are not those that the members were validated on.
        MissingRuntime: if no engine here runs it.
        CheckFailed: if no block can have few bits.
        Busy: if another command is writing into `out`.
    """
    row = PRECISIONS.get(precision)
    if row is None or row.bits != 8:
        names = ", ".join(name for name, known in PRECISIONS.items() if known.bits == 8)
        raise UsageError(f"'{precision}' cannot be tuned; needed is a precision of 8 bits: {names}.")
    allowed = row.tolerance.max_drop if max_drop is None else max_drop
    fp32, calibration = bundle.graph("fp32"), _calibration_of(bundle, precision)
    refuse_foreign(out, marker=_LOG)
    with writing(out):
        named = engine or (None if force else TrialLog.engine_of(out / _LOG))
        takers = _takers(precision, named)
        validation = validation_faces(*run_of(bundle, run), data)
        chosen = validation.take(np.random.default_rng(0).permutation(len(validation))[::-1][:faces])
        _require_enough(len(chosen), len(validation), allowed)
        shop = Workshop(
            fp32=fp32,
            calibration=calibration,
            precision=precision,
            faces=chosen,
            batch=min(batch, bundle.manifest.max_batch),
            rounds=rounds,
            threads=threads,
            max_batch=bundle.manifest.max_batch,
            scratch=out,
            console=console,
        )
        out.mkdir(parents=True, exist_ok=True)
        (out / _LOG).touch()  # what makes the directory ours, before anything else is in it
        sweep_below(out)
        backend = takers[0] if named else _fastest(shop)
        log = TrialLog(out / _LOG, shop.setting(backend), force=force)
        if log.trials:
            console.print(f"going on after {len(log.trials)} trials, which are kept in {log.path}")
        with Trials(shop, backend, log) as trials:
            _try_blocks(trials)
            steps = _search(trials, allowed)
        tuning = Tuning(
            created=timestamp(),
            bundle_digest=bundle.manifest.digest,
            setting=log.setting,
            max_drop=allowed,
            blocks=tuple(shop.blocks),
            left=steps[-1].left,
            bound=round(_bound(trials, steps[-1]), 6),
            shared_with_gate=max(0, len(chosen) + min(GATE_FACES, len(validation)) - len(validation)),
            calibrated_on_noise=calibration.random,
            trials=(*(trial for trial in log.trials if trial.kind != "search"), *steps),
        ).sealed()
        write_text(out / TUNING_FILE, tuning.to_json())
        return tuning


def read_tuning(file: Path) -> Tuning:
    """Read what was chosen.

    Raises:
        BadInput: if the file cannot be read, or was changed.
    """
    tuning = Tuning.parse_json(file, error=BadInput)
    if not tuning.is_intact():
        raise BadInput(f"{file} was changed after it was written.", hint="emoexport tune")
    return tuning


def nodes_left(tuning: Tuning, graph: Path, sha256: str) -> list[str]:
    """The names of the nodes of a graph that are to stay in FP32.

    Args:
        tuning: what was chosen.
        graph: the FP32 graph.
        sha256: of it, as `files.sha256_of_graph` finds it: the weights may be large, and calibration has read them.

    Raises:
        BadInput: if the tuning is of another graph.
    """
    found = tuning.setting.graph_sha256
    if found != sha256:
        raise BadInput(
            f"the tuning is of another fold: its graph has the SHA-256 {found[:16]}…; needed is {sha256[:16]}….",
            hint="build without --tuning, and tune that bundle",
        )
    return [name for name, block in nodes_by_block(graph).items() if block in tuning.left]


def _calibration_of(bundle: Bundle, precision: str) -> Calibration:
    again = bundle.build_command(precision)
    if bundle.manifest.calibration is None:
        raise BadBundle(f"{bundle.path} has no calibration; needed is one for {precision}.", hint=again)
    calibration = Calibration.parse_json(bundle.path / CALIBRATION_FILE, inside=bundle.path, error=BadBundle)
    if not calibration.ranges:
        raise BadBundle(f"the calibration of {bundle.path} has no ranges for layers of 8 bits.", hint=again)
    return calibration


def _require_enough(faces: int, there: int, allowed: float) -> None:
    best = paired_bound(0, 0, faces)
    if best < -allowed:
        raise UsageError(
            f"{faces:,} of {there:,} validation faces cannot show that at most {100 * allowed:g} points of accuracy "
            f"are lost: even if all were decided alike, it could be {-100 * best:.2f}.",
            hint="--faces with more, or --max-drop with a larger loss",
        )


def _takers(precision: str, name: str | None) -> list[Backend]:
    """The backends that may be tuned for: the one that is named, or all that take the precision."""
    if name is not None:
        found = backends_named([name])[0]
        if not found.takes(precision):
            raise UsageError(f"{found.title} takes no {precision} graph; it takes {', '.join(found.precisions)}.")
        return [found]
    takers = [row for row in BACKENDS.values() if row.takes(precision)]
    if not any(row.is_usable() for row in takers):
        raise MissingRuntime(
            f"no engine here runs {precision} graphs.",
            hint=f"pip install {takers[0].requirement}" if takers else "--precision with another one",
        )
    return takers


def _fastest(shop: Workshop) -> Backend:
    """Of those that take the precision, here."""
    with shop.folder() as folder:
        graph = shop.convert(folder, shop.precision, ())
        best = fastest(lambda backend, _: shop.open(backend, shop.precision, graph), [shop.precision], shop.some)
    assert best is not None
    return best[0]


def _try_blocks(trials: Trials) -> None:
    """Make the trials of single blocks."""
    shop = trials.shop
    rounding = next((row for row in BACKENDS.values() if row.is_usable() and row.takes(_ROUNDED)), None)
    for block in shop.blocks:
        trials.alone(block, shop.precision, trials.backend)
        if rounding is not None:
            trials.alone(block, _ROUNDED, rounding)
        trials.without(block)


def _search(trials: Trials, allowed: float) -> list[Trial]:
    """Search which blocks are to stay in FP32.

    Returns:
        The steps that were made, what was chosen last.
    """
    blocks = trials.shop.blocks
    price = {block: 1 - _speed_of(trials.without(block)).value for block in blocks}
    chosen = trials.together(())
    steps = [chosen]
    idle = sorted((block for block in blocks if _speed_of(trials.without(block)).high >= 1), key=price.__getitem__)
    for more in (idle, *([block] for block in idle)):  # all at once; if that is too many, one by one
        left = {*chosen.left, *more}
        if len(left) < len(blocks) and all(left != set(step.left) for step in steps):
            steps.append(trials.together(left))
            if _is_as_fast(steps[-1]):
                chosen = steps[-1]
    while _bound(trials, chosen) < -allowed:
        rest = [block for block in blocks if block not in chosen.left]
        if len(rest) == 1:
            raise CheckFailed(
                f"no block can have {PRECISIONS[trials.shop.precision].title} without losing more than "
                f"{100 * allowed:g} points of accuracy; the last one tried was {rest[0]}.",
                hint="--max-drop with a larger loss, or another --calib-method for the bundle",
            )
        harm = {block: _harm(trials, block) / max(price[block], 1e-3) for block in rest}
        chosen = trials.together([*chosen.left, max(rest, key=harm.__getitem__)])
        steps.append(chosen)
    return [*(step for step in steps if step is not chosen), chosen]


def _is_as_fast(trial: Trial) -> bool:
    """As the graph with all blocks in few bits: held against the step before, many small losses would add up."""
    speed = _speed_of(trial)
    return speed.high >= 1 and speed.value >= _NEARLY


def _harm(trials: Trials, block: str) -> float:
    cost = trials.alone(block, trials.shop.precision, trials.backend).cost
    assert cost is not None
    return cost.kl


def _speed_of(trial: Trial) -> Estimate:
    assert trial.times_as_fast is not None
    return trial.times_as_fast


def _bound(trials: Trials, trial: Trial) -> float:
    """The lower bound of the accuracy gained, a share of the faces, one-sided at 95 %."""
    assert trial.cost is not None
    return paired_bound(trial.cost.mended, trial.cost.broken, len(trials.shop.faces))
