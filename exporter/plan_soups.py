"""The soup of a run's members as candidates of a plan: one network with the mean of their weights."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from emoexport.bundle import Bundle
from emoexport.errors import BadInput, EmoexportError
from emoexport.pipeline import build
from emoexport.plan import Candidate
from emoexport.plan_search import candidates_of
from emoexport.run_faces import data_of_run
from emoexport.scoring import score_split
from emoexport.train.checkpoint import RUN_FILE, MemberRecord, RunRecord, read_run
from emoexport.train.dataset import DataSet
from emoexport.train.soup_run import make_soup
from emoexport.train.standing import SoupMethod

__all__ = ["SoupCandidates", "soup_candidates", "soup_run_of"]

_WORSE = 0.02
"""How much less accurate than the best member a soup may be in one pass to be looked at."""


class SoupCandidates(NamedTuple):
    """What the soup of a run comes to."""

    candidates: Sequence[Candidate]
    note: str
    """A sentence on what was found, or why there is no candidate."""


def soup_candidates(
    bundle: Bundle,
    run: Path,
    record: RunRecord,
    folder: Path,
    vote: NDArray[np.int64],
    *,
    data: str | None,
    engine: str,
    threads: int | None,
    console: Console,
) -> SoupCandidates:
    """Make the better of the uniform and the greedy soup, and choose passes of it.

    Args:
        bundle: of the run.
        run: its directory.
        record: its record.
        folder: a scratch directory.
        vote: labels of the full vote of the members on their validation faces, `(N,)`.
        data: where the faces are; None for where the run read them.
        engine: what computes the soup's passes.
        threads: how many it may use.
        console: where progress is shown.
    """
    quiet = Console(quiet=True)
    console.print("averaging the members' weights ...")
    try:
        made = soup_run_for(run, folder / "soup", data_of_run(run, record, data), quiet)
        member = _member_of(made)
        soup = member.soup
        assert soup is not None
        kept = sum(one.kept for one in soup.ingredients)
        accuracy = soup.uniform if soup.chosen == SoupMethod.UNIFORM else soup.greedy
        found = (
            f"of one pass the uniform soup is right on {100 * soup.uniform:.1f} % of the validation faces, the greedy "
            f"one on {100 * soup.greedy:.1f} %, the best member on {100 * soup.best_member:.1f} %"
        )
        if kept == 1 or accuracy < soup.best_member - _WORSE:
            return SoupCandidates((), f"Soups are no candidates: {found}.")
        views = [view.name for view in bundle.manifest.views]
        mixed = build(made, folder / "bundle", max_batch=bundle.manifest.max_batch, console=quiet)
        settings: dict[str, Any] = {"data": data, "engine": engine, "threads": threads, "console": quiet}
        cube = score_split(mixed, folder / "cube", split="validation", **settings).cube
        sizes = range(1, len(views) + 1)
        return SoupCandidates(
            candidates_of(
                cube, mixed.manifest.decision, [1], sizes=sizes, vote=vote, soup=(soup.chosen, member.sha256)
            ),
            f"The {soup.chosen} soup of {kept} members is a candidate: {found}.",
        )
    except EmoexportError as err:  # whatever members, or faces, do not allow
        return SoupCandidates((), f"Soups were not tried: {err}")


def soup_run_for(run: Path, out: Path, data: DataSet, console: Console) -> Path:
    """Make the run of a plan's soup: the better of the uniform and the greedy one of all members of a run."""
    make_soup([run], data, out, method=SoupMethod.BEST, console=console)
    return out


def soup_run_of(run: Path, sha256: str, console: Console) -> Path:
    """The run of a plan's soup beside the run of its members; it is made if it is not there.

    Args:
        run: of the members.
        sha256: of the soup's weights, as the plan has it.
        console: where progress is shown.

    Raises:
        BadInput: if what stands there, or what is made of the members now, is another soup.
    """
    out = run.with_name(f"{run.resolve().name}-soup")
    if not (out / RUN_FILE).is_file():
        soup_run_for(run, out, data_of_run(run, read_run(run), None), console)
    if _member_of(out).sha256 != sha256:
        raise BadInput(f"{out} is another soup than the plan's.", hint=f"move {out} away, or emoexport plan again")
    return out


def _member_of(soup: Path) -> MemberRecord:
    return MemberRecord.parse_json(soup / read_run(soup).members[0])
