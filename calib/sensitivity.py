"""The blocks of a graph's members, and what it costs to compute one of them less precisely."""

import re

import numpy as np
from numpy.typing import NDArray
from scipy.special import rel_entr

from emoexport.config import Record
from emoexport.outcome import Outcome
from emoexport.statistics import changed

__all__ = ["Cost", "block_of", "cost_of"]

_BLOCK = re.compile(r"members\.[^./]+\.(?P<modules>[^/]+)/")
"""A node of a member is named for the modules it is in: `members.0.backbone.layer1.0.conv2/conv2d_4`."""

_FIRST_NUMBERS = re.compile(r"^.*?\.\d+(?:\.\d+)*(?=\.|$)")


def block_of(node: str) -> str:
    """The block that a node belongs to, the same for the nodes of all members at the same place.

    That is the modules it is in as far as the first number or numbers: `backbone.layer1.0`, `backbone.blocks.2.1`; all
    of them where there is no number, and nothing for a node in no module of a member.

    Args:
        node: its name in the graph.
    """
    found = _BLOCK.match(node)
    if found is None:
        return ""
    modules = found["modules"]
    numbered = _FIRST_NUMBERS.match(modules)
    return numbered.group() if numbered else modules


class Cost(Record):
    """What faces are decided otherwise, and how far their votes have moved."""

    changed: int
    """Faces with another label."""
    mended: int
    """Faces that are right only now."""
    broken: int
    """Faces that were right only before."""
    kl: float
    """Kullback-Leibler divergence from the votes before to those now, in nats, mean over the faces."""


def cost_of(before: Outcome, now: Outcome, truth: NDArray[np.int64]) -> Cost:
    """Compare what two graphs say of the same faces.

    Args:
        before: of the one that is right by definition, N faces.
        now: of the other.
        truth: `(N,)`, what the faces show.
    """
    mended, broken = changed(before.label == truth, now.label == truth)
    divergences = rel_entr(_normalised(before.probabilities), _normalised(now.probabilities)).sum(axis=1)
    return Cost(
        changed=int((before.label != now.label).sum()),
        mended=mended,
        broken=broken,
        kl=float(divergences.mean()),
    )


def _normalised(probabilities: NDArray[np.float32]) -> NDArray[np.float64]:
    """With a sum that is 1 beyond FP32, or small divergences come out below 0; none is 0."""
    values = np.maximum(probabilities.astype(np.float64), 1e-12)
    shares: NDArray[np.float64] = values / values.sum(axis=1, keepdims=True)
    return shares
