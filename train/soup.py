"""A model soup: the weights of several members averaged into one network, which costs the passes of one.

Averages are good where the members share a start: checkpoints of one training, or trainings that begin with the same
pretrained weights. The average of networks trained from different random weights knows nothing.

Source: Wortsman et al. 2022 (arXiv:2203.05482).
"""

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from rich.console import Console
from torch import Tensor

from emoexport.decision import Decision
from emoexport.errors import BadCheckpoint
from emoexport.labels import EMOTIONS
from emoexport.progress import progress_bar
from emoexport.reference import Reference
from emoexport.train.batch_norm import estimate_statistics
from emoexport.train.batches import shuffled_faces
from emoexport.train.dataset import Faces
from emoexport.train.emotenet import ConvNeXtEmoteNet
from emoexport.train.standing import SoupMethod
from emoexport.views import views_named

__all__ = ["Soups", "average_weights", "find_soups", "greedy_rows", "mix_networks", "single_pass_accuracy"]


def average_weights(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of each weight, summed in float64 and rounded to the weight's own dtype.

    One weight after the other, so that no more than one is held in float64. Integers, such as the counts of batch
    norm, are those of the first.

    Args:
        states: one or more state_dicts of the same names and shapes.

    Raises:
        BadCheckpoint: if names or shapes differ.
    """
    first = states[0]
    shapes = {name: value.shape for name, value in first.items()}
    for number, state in enumerate(states[1:], start=2):
        if {name: value.shape for name, value in state.items()} != shapes:
            raise BadCheckpoint(f"the weights of member {number} have other names or shapes than those of member 1.")
    return {name: _mean([state[name] for state in states]) for name in first}


def _mean(values: Sequence[Tensor]) -> Tensor:
    if not values[0].is_floating_point():
        return values[0].clone()
    total = values[0].to(torch.float64, copy=True)
    for value in values[1:]:
        total += value
    return (total / len(values)).to(values[0].dtype)


def mix_networks(networks: Sequence[ConvNeXtEmoteNet], train: Faces, *, batch_size: int, seed: int) -> ConvNeXtEmoteNet:
    """A network with the mean of the weights, in evaluation mode; of one network it is the network itself.

    Args:
        networks: of one architecture.
        train: where there is batch norm, its statistics are estimated anew from these faces as they are.
        batch_size: of that.
        seed: of the order of these faces, and of the paths that are dropped meanwhile.

    Raises:
        BadCheckpoint: if names or shapes of the weights differ.
    """
    if len(networks) == 1:
        return networks[0]
    mixed = copy.deepcopy(networks[0])
    mixed.load_state_dict(average_weights([network.state_dict() for network in networks]))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # the network that was judged is made again to be saved
        estimate_statistics(mixed, shuffled_faces(train, batch_size, seed=seed))
    return mixed.eval()


def single_pass_accuracy(network: ConvNeXtEmoteNet, faces: Faces) -> float:
    """Accuracy in [0, 1] of one float32 pass over each face as it is, as `train` validates."""
    reference = Reference(members=[network], views=views_named(("identity",)), decision=Decision(labels=EMOTIONS))
    scores = reference.scores(faces.images)[:, 0, 0]
    return round(float((scores.argmax(axis=1) == faces.labels).mean()), 6)


def greedy_rows(ranked: Sequence[int], accuracy: Callable[[tuple[int, ...]], float]) -> tuple[int, ...]:
    """Begin with the best, and keep each further one with which the soup is at least as accurate.

    Args:
        ranked: the rows of all, best first.
        accuracy: of the soup of some rows; that of a single one is the member's.

    Returns:
        The rows that are kept; their soup is at least as accurate as the best member.

    Source: Wortsman et al. 2022 (arXiv:2203.05482), recipe 1.
    """
    kept: tuple[int, ...] = (ranked[0],)
    for row in ranked[1:]:
        if accuracy((*kept, row)) >= accuracy(kept):
            kept = (*kept, row)
    return kept


class Soups(NamedTuple):
    """The soups of some networks, as rows of these, and how accurate they are, in [0, 1]."""

    singles: tuple[float, ...]
    """Of each network alone, in the order in which they were given."""
    uniform: tuple[int, ...]
    """All, best first."""
    greedy: tuple[int, ...]
    uniform_accuracy: float
    greedy_accuracy: float

    def choose(self, method: SoupMethod) -> tuple[SoupMethod, tuple[int, ...], float]:
        """Which soup a method comes to, its rows and its accuracy.

        Of equals `best` is the uniform soup: the validation faces chose nothing of it.
        """
        if method == SoupMethod.BEST:
            gains = self.greedy_accuracy > self.uniform_accuracy
            method = SoupMethod.GREEDY if gains else SoupMethod.UNIFORM
        if method == SoupMethod.GREEDY:
            return method, self.greedy, self.greedy_accuracy
        return method, self.uniform, self.uniform_accuracy


def find_soups(
    networks: Sequence[ConvNeXtEmoteNet],
    validation: Faces,
    *,
    mixed: Callable[[tuple[int, ...]], ConvNeXtEmoteNet],
    console: Console,
) -> Soups:
    """Judge each network, the soup of all, and those on the way to the greedy one.

    Args:
        networks: two or more of one architecture, in evaluation mode.
        validation: the faces that judge.
        mixed: makes the soup of some rows of them.
        console: where progress is shown.
    """
    with progress_bar(console, "judging members and their averages", 2 * len(networks)) as advance:

        @functools.cache
        def accuracy(rows: tuple[int, ...]) -> float:
            found = single_pass_accuracy(mixed(rows), validation)
            advance(1)
            return found

        singles = tuple(accuracy((row,)) for row in range(len(networks)))
        ranked = tuple(sorted(range(len(networks)), key=lambda row: singles[row], reverse=True))
        greedy = greedy_rows(ranked, accuracy)
        return Soups(singles, ranked, greedy, accuracy(ranked), accuracy(greedy))
