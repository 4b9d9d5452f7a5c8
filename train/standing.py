"""Who becomes a member: the best weights of distinct epochs, or an average of members."""

from collections.abc import Iterable
from enum import StrEnum
from typing import Literal, NamedTuple

__all__ = ["Candidate", "SoupMethod", "WeightsName", "podium"]


WeightsName = Literal["network", "ema", "swa"]


class SoupMethod(StrEnum):
    """Which members go into a soup: all, those that do not lower its validation accuracy, or the better of both."""

    UNIFORM = "uniform"
    GREEDY = "greedy"
    BEST = "best"


class Candidate(NamedTuple):
    """Weights that compete for a place."""

    epoch: int
    """From 1."""
    weights: WeightsName
    accuracy: float
    """On the validation faces, in [0, 1]."""

    @property
    def file(self) -> str:
        """The name of the file they are kept in meanwhile."""
        return f"epoch-{self.epoch}-{self.weights}.safetensors"


def podium(candidates: Iterable[Candidate], count: int) -> list[Candidate]:
    """The places, best first.

    An epoch holds one place, and the SWA model, an average over epochs that barely changes from one to the
    next, holds one at most. Of equals the earlier epoch is taken: it has been fitted less.

    Args:
        candidates: all that compete.
        count: how many places there are.
    """
    places: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda one: (-one.accuracy, one.epoch, one.weights)):
        taken = {place.epoch for place in places}
        averaged = candidate.weights == "swa" and any(place.weights == "swa" for place in places)
        if candidate.epoch not in taken and not averaged:
            places.append(candidate)
    return places[:count]
