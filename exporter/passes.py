"""Which passes a bundle votes with, and how much each of them weighs."""

import math
from collections.abc import Sequence
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from emoexport.config import Record
from emoexport.errors import UsageError

__all__ = ["Choice", "Weight", "pass_weights"]

Weight = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Choice(Record):
    """The members and views to fold, in this order, each with its weight in the vote."""

    members: dict[int, Weight] = Field(default_factory=dict)
    """By number in the run, from 1; empty for all, weighted equally."""
    views: dict[str, Weight] = Field(default_factory=dict)
    """By name; empty for those that the run votes with, weighted equally."""

    @classmethod
    def of_options(cls, members: Sequence[str], views: Sequence[str]) -> "Choice":
        """Read what `--member NUMBER[=WEIGHT]` and `--view NAME[=WEIGHT]` were given.

        Raises:
            UsageError: if a member is no number, one stands twice, or a weight is no finite number above 0.
        """
        numbers = {_number(name): weight for name, weight in _weights("--member", members).items()}
        if len(numbers) < len(members):
            raise UsageError("--member names one member twice; needed is each once.", hint="--member 1 --member 2=0.5")
        return cls(members=numbers, views=_weights("--view", views))

    def options(self) -> list[str]:
        """The options of `build` that make this choice."""
        return [
            f"{option} {name}" + (f"={weight!r}" if weight != 1 else "")
            for option, chosen in (("--member", self.members), ("--view", self.views))
            for name, weight in chosen.items()
        ]

    def among(self, members: int, views: Sequence[str]) -> "Choice":
        """The same choice with every member and view named, of a run with so many members that votes with `views`.

        Raises:
            UsageError: if there is no such member.
        """
        unknown = [number for number in self.members if not 1 <= number <= members]
        if unknown:
            raise UsageError(
                f"there is no member {unknown[0]}; the run has {members}, counted from 1.",
                hint=f"--member takes 1 to {members}",
            )
        everyone = dict.fromkeys(range(1, members + 1), 1.0)
        return Choice(members=self.members or everyone, views=self.views or dict.fromkeys(views, 1.0))

    def is_full_vote(self, members: int, views: Sequence[str]) -> bool:
        """Whether this is the vote of all members on exactly these views, weighted equally."""
        whole = self.among(members, views)
        return (
            len(whole.members) == members
            and set(whole.views) == set(views)
            and pass_weights(list(whole.members.values()), list(whole.views.values())) is None
        )


def pass_weights(members: Sequence[float], views: Sequence[float]) -> NDArray[np.float64] | None:
    """The weight of every pass in the vote: that of its member times that of its view.

    Args:
        members: of each, K finite numbers above 0.
        views: of each, V of them.

    Returns:
        float64 `(K, V)`, sum 1; None where all passes weigh the same.
    """
    # As shares of the largest, whose product neither overflows nor vanishes.
    of_members, of_views = np.asarray(members) / max(members), np.asarray(views) / max(views)
    weights = np.outer(of_members, of_views)
    return None if np.ptp(weights) == 0 else weights / weights.sum()


def _weights(option: str, words: Sequence[str]) -> dict[str, float]:
    """`NAME[=WEIGHT]` of each word, in order."""
    found: dict[str, float] = {}
    for word in words:
        name, equals, text = word.partition("=")
        try:
            weight = float(text) if equals else 1.0
        except ValueError:
            weight = math.nan
        if not 0 < weight < math.inf:
            raise UsageError(
                f"{option} {word}: the weight is '{text}'; needed is a finite number above 0.",
                hint=f"{option} {name}=2",
            )
        if name in found:
            raise UsageError(f"{option} names '{name}' twice; needed is each once.", hint=f"{option} {name}=2")
        found[name] = weight
    return found


def _number(name: str) -> int:
    try:
        return int(name)
    except ValueError as err:
        raise UsageError(
            f"--member {name}: '{name}' is no number of a member.", hint="--member 1 is the first"
        ) from err
