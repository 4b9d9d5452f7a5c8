"""All that is known of a bundle, as far as it is there: what it holds, its reports, its tuning, its training."""

import json
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from emoexport.bundle import Bundle
from emoexport.calib.tuning import Tuning
from emoexport.certification import ANSWERS
from emoexport.engines.passport import passports_in
from emoexport.errors import BadData, BadInput, UsageError
from emoexport.files import lies_inside, read_text
from emoexport.page import Missing
from emoexport.parity import ParityReport
from emoexport.saved_answers import SavedAnswers
from emoexport.summary import BundleSummary, summarize
from emoexport.throughput import SpeedReport
from emoexport.train.callbacks import History, read_history
from emoexport.train.checkpoint import MemberRecord, RunRecord, read_run
from emoexport.train.config import TrainingConfig
from emoexport.train.standing import Candidate
from emoexport.tuning import read_tuning

__all__ = ["Findings", "Training", "find"]

_Report = TypeVar("_Report", ParityReport, SpeedReport)
_CURVES = ("epoch", "train_accuracy", "train_loss", "validation_loss")


@dataclass(frozen=True, kw_only=True)
class Training:
    """The course of a training."""

    backbone: str
    settings: TrainingConfig
    epochs: Sequence[dict[str, float]]
    """The figures of each."""
    members: Sequence[Candidate]


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What is known of a bundle; and of what is not, why."""

    bundle: Bundle
    summary: BundleSummary
    parity: ParityReport | Missing
    answers: SavedAnswers | Missing
    """Those that the parity was judged by."""
    speed: SpeedReport | Missing
    tuning: Tuning | Missing
    training: Training | Missing


def find(bundle: Bundle, run: Path | None = None) -> Findings:
    """Read all that there is.

    Args:
        bundle: the bundle.
        run: where the training run is now, if it was moved.

    Raises:
        BadCheckpoint: if the run that is named is none.
        UsageError: if it is not the one that the bundle was built from.
        BadBundle: if a graph or a passport cannot be read.
    """
    training = _training(bundle, run)
    parity = _of_these_engines(bundle, _report(bundle, "parity.json", ParityReport, "Not verified", "verify"))
    return Findings(
        bundle=bundle,
        summary=summarize(bundle),
        parity=parity,
        answers=parity if isinstance(parity, Missing) else _answers(bundle, parity),
        speed=_report(bundle, "bench.json", SpeedReport, "Not timed", "bench"),
        tuning=_tuning(bundle),
        training=training,
    )


def _command(bundle: Bundle, name: str, *more: str) -> str:
    return shlex.join(["emoexport", name, os.path.relpath(bundle.path), *more])


def _report(bundle: Bundle, name: str, kind: type[_Report], without: str, command: str) -> _Report | Missing:
    """A report of this bundle, in the form that we read."""
    path, again = bundle.path / "reports" / name, _command(bundle, command)
    if not path.is_file():
        return Missing(sentence=f"{without}.", command=again)
    try:
        version = _schema_version(path, bundle.path)
        needed = kind.model_fields["schema_version"].default
        if version != needed:
            told = f"reports/{name} is of schema version {version}, and {needed} is read here: it is not shown."
            return Missing(sentence=told, command=again)
        report = kind.parse_json(path)
    except (ValueError, RecursionError) as err:
        told = str(err).replace(str(path), f"reports/{name}")
        return Missing(sentence=f"{without}: what there is cannot be read. {told.rstrip('.')}.", command=again)
    if report.bundle_digest != bundle.manifest.digest:
        told = (
            f"reports/{name} is of another bundle ({report.bundle_digest[:16]}…, this one is "
            f"{bundle.manifest.digest[:16]}…): it is not shown."
        )
        return Missing(sentence=told, command=again)
    return report


def _of_these_engines(bundle: Bundle, parity: ParityReport | Missing) -> ParityReport | Missing:
    """Engines beside the bundle are no part of its digest: one may have been built again since it was verified."""
    if isinstance(parity, Missing):
        return parity
    built = {name: passport.sha256 for name, passport in passports_in(bundle.path).items()}
    others = [
        one.engine for one in parity.engines if one.file.endswith(".engine") and built.get(one.engine) != one.sha256
    ]
    if not others:
        return parity
    told = f"reports/parity.json is of other files of {', '.join(others)} than stand here now: it is not shown."
    return Missing(sentence=told, command=_command(bundle, "verify"))


def _schema_version(path: Path, bundle: Path) -> object:
    found = json.loads(read_text(path, inside=bundle))
    return found.get("schema_version") if isinstance(found, dict) else None


def _answers(bundle: Bundle, parity: ParityReport) -> SavedAnswers | Missing:
    again = _command(bundle, "verify")
    if not (bundle.path / ANSWERS).is_file() or not lies_inside(bundle.path / ANSWERS, bundle.path):
        return Missing(sentence="The answers of engines and reference were not kept.", command=again)
    try:
        saved = SavedAnswers.read(bundle.path / ANSWERS)
    except BadInput:
        return Missing(sentence=f"{ANSWERS} cannot be read.", command=again)
    facts = saved.facts
    if (facts.bundle_digest, facts.created, facts.faces) != (parity.bundle_digest, parity.created, parity.faces):
        return Missing(sentence=f"{ANSWERS} is not of the verify that reports/parity.json is of.", command=again)
    return saved


def _tuning(bundle: Bundle) -> Tuning | Missing:
    command = _command(bundle, "tune")
    if bundle.manifest.tuning is None:
        return Missing(sentence="No block was tried by itself: the bundle was built without a tuning.", command=command)
    try:
        return read_tuning(bundle.path / bundle.manifest.tuning)
    except BadInput as err:
        return Missing(sentence=f"{bundle.manifest.tuning} cannot be read here: {err}", command=command)


def _training(bundle: Bundle, run: Path | None) -> Training | Missing:
    if run is not None:
        return _curves(bundle, run)
    elsewhere = "The training run is not at hand."
    try:
        return _curves(bundle, bundle.run())
    except (BadInput, UsageError, OSError):  # it may lie where others may not look
        return Missing(sentence=elsewhere, command=_command(bundle, "report", "--run", "runs/x"))


def _curves(bundle: Bundle, run: Path) -> Training | Missing:
    record = read_run(run)
    members = [MemberRecord.parse_json(run / name) for name in record.members]
    if not {member.sha256 for member in bundle.manifest.members} <= {member.sha256 for member in members}:
        raise UsageError(f"{run} is not the run that {bundle.path} was built from: its members are others.")
    if record.combined_from:
        return Missing(sentence="The members are of several runs: there is no one training of theirs.")
    return _course(run, record, members)


def _course(run: Path, record: RunRecord, members: Sequence[MemberRecord]) -> Training | Missing:
    try:
        epochs = read_history(run / History.FILE)
    except BadData:
        epochs = []
    if not epochs or any(name not in epoch for epoch in epochs for name in _CURVES):
        return Missing(sentence=f"The training run has no {History.FILE} that can be read.")
    return Training(
        backbone=record.config.model.backbone,
        settings=record.config.training,
        epochs=epochs,
        members=[
            Candidate(epoch=one.epoch, weights=one.weights_of, accuracy=one.validation_accuracy)
            for one in members
            if one.weights_of != "soup"
        ],
    )
