"""Which passes a bundle votes with, and how much each of them weighs."""

import math
from collections.abc import Iterator, Sequence
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from emoexport.config import Record
from emoexport.errors import UsageError

__all__ = ["Choice", "Weight", "faces_at_once", "inner_products", "pass_weights", "weighted_vote"]

FloatArray = NDArray[np.floating]

# Bounds the memory of all arithmetic on scores: 4 M probabilities as float64.
_SCORES_AT_ONCE = 4_000_000

Weight = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Choice(Record):
    """The members and views to fold, in this order, each with its weight in the vote."""

    members: dict[int, Weight] = Field(default_factory=dict)
    """By number in the run, from 1; empty for all, weighted equally."""
    views: dict[str, Weight] = Field(default_factory=dict)
    """By name; empty for those that the run votes with, weighted equally."""
    passes: dict[str, Weight] = Field(default_factory=dict)
    """Instead of both, single passes as `NUMBER:NAME`, each with its weight: no others are computed. Empty for all of
    the members on all of the views."""

    @classmethod
    def of_options(cls, members: Sequence[str], views: Sequence[str], passes: Sequence[str] = ()) -> "Choice":
        """Read what `--member NUMBER[=WEIGHT]`, `--view NAME[=WEIGHT]` and `--pass NUMBER:NAME[=WEIGHT]` were given.

        Raises:
            UsageError: if a member is no number, one stands twice, a weight is no finite number above 0, or passes are
                named besides members or views.
        """
        if passes and (members or views):
            raise UsageError(
                "found --pass, and --member or --view; needed is one way to name passes.", hint="name all by --pass"
            )
        if passes:
            return cls(passes={_pass_name(name): weight for name, weight in _weights("--pass", passes).items()})
        numbers = {_number(name, f"--member {name}"): weight for name, weight in _weights("--member", members).items()}
        if len(numbers) < len(members):
            raise UsageError("--member names one member twice; needed is each once.", hint="--member 1 --member 2=0.5")
        return cls(members=numbers, views=_weights("--view", views))

    @property
    def numbers(self) -> list[int]:
        """The members that are named, in order."""
        return [*self.members, *dict.fromkeys(_member_and_view(name)[0] for name in self.passes)]

    def options(self) -> list[str]:
        """The options of `build` that make this choice."""
        return [
            f"{option} {name}" + (f"={weight!r}" if weight != 1 else "")
            for option, chosen in (("--member", self.members), ("--view", self.views), ("--pass", self.passes))
            for name, weight in chosen.items()
        ]

    def among(self, members: int, views: Sequence[str]) -> "Choice":
        """The same choice with every member and view named, of a run with so many members that votes with `views`.

        Those of single passes stand in the order in which these name them first.

        Raises:
            UsageError: if there is no such member.
        """
        unknown = [number for number in self.numbers if not 1 <= number <= members]
        if unknown:
            raise UsageError(
                f"there is no member {unknown[0]}; the run has {members}, counted from 1.",
                hint=f"--member takes 1 to {members}",
            )
        if self.passes:
            seen = dict.fromkeys((_member_and_view(name)[1] for name in self.passes), 1.0)
            return Choice(members=dict.fromkeys(self.numbers, 1.0), views=seen, passes=self.passes)
        everyone = dict.fromkeys(range(1, members + 1), 1.0)
        return Choice(members=self.members or everyone, views=self.views or dict.fromkeys(views, 1.0))

    def is_full_vote(self, members: int, views: Sequence[str]) -> bool:
        """Whether this is the vote of all members on exactly these views, weighted equally."""
        whole = self.among(members, views)
        return len(whole.members) == members and set(whole.views) == set(views) and whole.weights() is None

    def weights(self) -> NDArray[np.float64] | None:
        """The weight of every pass in the vote, of a choice with every member and view named.

        Returns:
            float64 `(K, V)`, sum 1, and 0 for passes that are not computed; None where all weigh the same.
        """
        if not self.passes:
            return pass_weights(list(self.members.values()), list(self.views.values()))
        members, views = list(self.members), list(self.views)
        found = np.zeros((len(members), len(views)))
        for name, weight in self.passes.items():
            member, view = _member_and_view(name)
            found[members.index(member), views.index(view)] = weight
        found /= found.max()
        return None if np.ptp(found) == 0 else found / found.sum()


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


def faces_at_once(faces: int, scores_a_face: int) -> Iterator[slice]:
    """Slices that cover so many faces, each of as many as bounded memory allows."""
    step = max(1, _SCORES_AT_ONCE // scores_a_face)
    return (slice(start, min(start + step, faces)) for start in range(0, faces, step))


def weighted_vote(scores: FloatArray, shares: NDArray[np.float64]) -> NDArray[np.float64]:
    """The weighted sum of the probabilities of passes.

    Args:
        scores: `(N, K, V, L)`, which may be mapped from a file.
        shares: `(K, V)`; passes of share 0 are not read.

    Returns:
        float64 `(N, L)`.
    """
    flat, chosen = shares.ravel(), np.flatnonzero(shares)
    voted = np.empty((len(scores), scores.shape[-1]))
    for rows in faces_at_once(len(scores), int(np.prod(scores.shape[1:]))):
        passes = scores[rows].reshape(-1, flat.size, scores.shape[-1])
        voted[rows] = flat[chosen] @ passes[:, chosen].astype(np.float64)
    return voted


def inner_products(scores: FloatArray) -> NDArray[np.float64]:
    """Of the probabilities of each pair of passes, over faces and emotions.

    Args:
        scores: `(N, K, V, L)`, which may be mapped from a file.

    Returns:
        float64 `(K V, K V)`.
    """
    count = scores.shape[1] * scores.shape[2]
    total = np.zeros((count, count))
    for rows in faces_at_once(len(scores), int(np.prod(scores.shape[1:]))):
        some = scores[rows].reshape(-1, count, scores.shape[-1]).astype(np.float64)
        columns = some.transpose(1, 0, 2).reshape(count, -1)
        total += columns @ columns.T
    return total


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


def _pass_name(name: str) -> str:
    """`NUMBER:NAME` as it is written in a choice.

    Raises:
        UsageError: if it is none.
    """
    number, colon, view = name.partition(":")
    if not colon or not view:
        raise UsageError(f"--pass {name}: needed are a member's number and a view.", hint="--pass 1:identity=2")
    return f"{_number(number, f'--pass {name}')}:{view}"


def _member_and_view(name: str) -> tuple[int, str]:
    number, _, view = name.partition(":")
    return int(number), view


def _number(name: str, option: str) -> int:
    try:
        return int(name)
    except ValueError as err:
        raise UsageError(f"{option}: '{name}' is no number of a member.", hint="--member 1 is the first") from err
