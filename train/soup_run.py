"""A run of one member: a soup of the members of other runs."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from emoexport.errors import BadCheckpoint, UsageError
from emoexport.files import new_directory
from emoexport.train.checkpoint import (
    RUN_FILE,
    FittedDecision,
    Ingredient,
    RunRecord,
    SoupRecord,
    load_member,
    save_member,
)
from emoexport.train.combine import (
    Candidate,
    best_members,
    combined_record,
    different_members,
    faces_of_run,
    relative_path,
    runs_to_combine,
)
from emoexport.train.config import ModelConfig
from emoexport.train.dataset import DataSet
from emoexport.train.decision_fit import fit_rules
from emoexport.train.emotenet import ConvNeXtEmoteNet
from emoexport.train.soup import find_soups, mix_networks
from emoexport.train.standing import SoupMethod

__all__ = ["make_soup", "soup_ingredients"]

_RATES = {"feature_dropout", "head_dropout", "drop_path_rate"}
"""What of a `ModelConfig` matters in training alone."""

_ADVICE = "Members that do not share a start average badly; without --soup they vote."


def soup_ingredients(runs: Sequence[Path], records: Sequence[RunRecord], members: int | None = None) -> list[Candidate]:
    """Choose the members that a soup is made of.

    Args:
        runs: their directories.
        records: what `runs_to_combine` read of them.
        members: how many, as `best_members` chooses them; None for all.

    Returns:
        The chosen, best first.

    Raises:
        UsageError: if there are fewer than two, or than asked for.
        BadCheckpoint: if they differ in architecture, or a member's record cannot be read.
    """
    chosen = best_members(runs, records, members) if members else different_members(runs, records)
    if len(chosen) < 2:
        raise UsageError(
            f"a soup of {len(chosen)} member averages nothing; needed are two or more.",
            hint="--members 2 or more, or name another run on the same faces",
        )
    first = chosen[0]
    for other in chosen[1:]:
        for name in ModelConfig.model_fields:
            ours, theirs = getattr(first.record.model, name), getattr(other.record.model, name)
            if name not in _RATES and ours != theirs:
                raise BadCheckpoint(
                    f"different networks have no average: {first.path} has {name} {ours}, {other.path} has {theirs}.",
                    hint="without --soup they vote, whatever their architectures",
                )
    return chosen


def make_soup(
    runs: Sequence[Path],
    data: DataSet,
    out: Path,
    *,
    method: SoupMethod,
    members: int | None = None,
    console: Console,
    force: bool = False,
) -> FittedDecision:
    """Make a run of one member whose weights are the mean of members' weights, and fit its decision anew.

    Its settings are those of the first run.

    Args:
        runs: one or more directories that `train` or `combine` wrote.
        data: the data of the runs, read as the first one did.
        out: the new run's directory; it appears when the run is complete.
        method: which members go into it.
        members: how many of the best may go into it; None for all.
        console: where progress is shown.
        force: replace a run that stands at `out`.

    Raises:
        UsageError: as `runs_to_combine` and `soup_ingredients`.
        BadCheckpoint: if the runs do not fit together, or a member is damaged or of another architecture.
        BadData: if the training or validation faces in `data` are not those of the runs.
    """
    with new_directory(out, marker=RUN_FILE) as directory:
        records = runs_to_combine(runs, out, least=1, force=force)
        first = records[0]
        chosen = soup_ingredients(runs, records, members)
        faces = faces_of_run(runs[0], first, data, train=True)
        networks = [load_member(one.path)[1] for one in chosen]

        def mixed(rows: tuple[int, ...]) -> ConvNeXtEmoteNet:
            seed = first.config.training.seed
            return mix_networks([networks[row] for row in rows], faces.train, batch_size=first.batch_size, seed=seed)

        soups = find_soups(networks, faces.validation, mixed=mixed, console=console)
        is_what, rows, accuracy = soups.choose(method)
        soup = SoupRecord(
            method=method,
            chosen=is_what,
            ingredients=tuple(
                Ingredient(
                    member=relative_path(out, chosen[row].path),
                    sha256=chosen[row].record.sha256,
                    validation_accuracy=soups.singles[row],
                    kept=row in rows,
                )
                for row in soups.uniform
            ),
            best_member=max(soups.singles),
            uniform=soups.uniform_accuracy,
            greedy=soups.greedy_accuracy,
        )
        _show(soup, len(faces.validation), console)
        name = save_member(
            directory / "members",
            "1",
            mixed(rows),
            model=chosen[rows[0]].record.model,
            epoch=0,
            accuracy=accuracy,
            weights_of="soup",
            soup=soup,
        )
        record = combined_record(records, [chosen[row].path for row in rows], [name], source=data.source, out=out)
        (directory / RUN_FILE).write_text(record.to_json(), encoding="utf-8")
        fitted = fit_rules(directory, record.config, faces.validation, console)
        (directory / "decision.json").write_text(fitted.to_json(), encoding="utf-8")
    return fitted


def _show(soup: SoupRecord, faces: int, console: Console) -> None:
    """The accuracies side by side, and a plain word where averaging lost or found nothing to average."""
    count, kept = len(soup.ingredients), sum(one.kept for one in soup.ingredients)
    best, accuracy = soup.best_member, soup.uniform if soup.chosen == SoupMethod.UNIFORM else soup.greedy
    for name, value in (
        (f"the best of {count} members", best),
        ("the uniform soup", soup.uniform),
        ("the greedy soup", soup.greedy),
    ):
        console.print(f"validation accuracy of {name}, one pass, {faces} faces: {value:.3f}")
    console.print(f"chosen: the {soup.chosen} soup, of {kept} of {count} members")
    if accuracy < best:
        found = f"On these faces the soup is worse than its best member, by {100 * (best - accuracy):.1f} points."
    elif kept == 1:
        found = "No average is as good as the best member; the soup is that member alone."
    else:
        return
    console.print(f"{found} {_ADVICE}", style="yellow")
