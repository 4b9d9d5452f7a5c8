"""The decision of a run: its members score the validation faces, and the rules are fitted on their vote."""

from pathlib import Path

import numpy as np
from rich.console import Console

from emoexport.decision import Decision, fit_decision
from emoexport.progress import progress_bar
from emoexport.reference import Reference
from emoexport.train.checkpoint import FittedDecision, load_members
from emoexport.train.config import RunConfig
from emoexport.train.dataset import Faces
from emoexport.views import views_named

__all__ = ["fit_rules"]


def fit_rules(run_directory: Path, config: RunConfig, faces: Faces, console: Console) -> FittedDecision:
    """Score every pass of the validation faces, fit the decision of the full vote, and say what each step gains.

    Args:
        run_directory: a run with its `run.json` and its members.
        config: the run's, for its views, labels and seed.
        faces: the validation faces; no others may be used here.
        console: where progress and the accuracy of each step are shown.

    Raises:
        BadCheckpoint: if the members cannot be rebuilt.
    """
    _, members = load_members(run_directory)
    labels = config.model.labels
    reference = Reference(members=members, views=views_named(config.views), decision=Decision(labels=labels))
    with progress_bar(console, "scoring the validation faces", len(faces)) as advance:
        scores = reference.scores(faces.images, progress=advance)
    vote = scores.mean(axis=(1, 2))
    fit = fit_decision(vote, faces.labels, labels=labels, seed=config.training.seed)
    right = {
        "one member, one view": scores[:, 0, 0].argmax(axis=1),
        "one member, all views": scores[:, 0].mean(axis=1).argmax(axis=1),
        "all members, one view": scores[:, :, 0].mean(axis=1).argmax(axis=1),
        "the full vote": vote.argmax(axis=1),
        "the full vote with its rules": fit.decision.decide(vote).label,
    }
    accuracy = {name: round(float(np.mean(label == faces.labels)), 6) for name, label in right.items()}
    for name, value in accuracy.items():
        console.print(f"validation accuracy of {name}: {value:.3f}")
    return FittedDecision(
        decision=fit.decision,
        validation_accuracy=accuracy,
        temperature=fit.temperature,
        candidates=fit.rules,
        together=fit.together,
    )
