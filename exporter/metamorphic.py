"""Metamorphic relations: how answers must go together, whatever is right of them.

An engine that mixes up rows of a batch, or answers by who else is in it, breaks one, on faces that need no labels.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from emoexport.config import Record
from emoexport.engines.base import Engine

__all__ = ["RELATIONS", "RelationCheck", "check_relations"]

Faces = NDArray[np.uint8]
Answers = NDArray[np.float32]
"""`(N, L + 2)`: the probabilities, the confidence, and the probability of the label."""
_Answer = Callable[[Faces], Answers]


class RelationCheck(Record):
    """A relation at one batch size."""

    relation: str
    """Of `RELATIONS`."""
    batch: int
    largest_difference: float
    """Of two probabilities, or confidences, that the relation says are the same."""
    allowed: float

    @property
    def holds(self) -> bool:
        """Whether they are, as far as rounding lets them."""
        return self.largest_difference <= self.allowed  # and not if it is no number


def _identical(answer: _Answer, faces: Faces, found: Answers) -> float:
    """Copies of a face get the answer of the face."""
    return _largest(answer(np.repeat(faces[:1], len(faces), axis=0)), found[:1])


def _permuted(answer: _Answer, faces: Faces, found: Answers) -> float:
    """Faces in another order get their answers in that order."""
    order = np.random.default_rng(0).permutation(len(faces))
    return _largest(answer(faces[order]), found[order])


def _alone(answer: _Answer, faces: Faces, found: Answers) -> float:
    """A face gets the answer in a batch that it gets by itself."""
    return _largest(np.concatenate([answer(face[None]) for face in faces]), found)


def _padded(answer: _Answer, faces: Faces, found: Answers) -> float:
    """Rows that pad a batch leak nothing: the first half gets its answers beside white pictures too."""
    half, padded = (len(faces) + 1) // 2, faces.copy()
    padded[half:] = 255
    return _largest(answer(padded)[:half], found[:half])


def _repeated(answer: _Answer, faces: Faces, found: Answers) -> float:
    """The same call again answers the same; some runtimes record a second call and replay it from the third on."""
    return float(np.max([_largest(answer(faces), found) for _ in range(2)]))  # no number stays no number


def _mirrored(answer: _Answer, faces: Faces, found: Answers) -> float:
    """A mirrored face gets the vote of the face."""
    return _largest(answer(np.ascontiguousarray(faces[:, :, ::-1])), found)


def _consistent(_: _Answer, __: Faces, found: Answers) -> float:
    """The confidence is the probability of the label."""
    return _largest(found[:, -2], found[:, -1])


RELATIONS: Mapping[str, Callable[[_Answer, Faces, Answers], float]] = MappingProxyType(
    {
        "consistent": _consistent,
        "identical": _identical,
        "permuted": _permuted,
        "alone": _alone,
        "padded": _padded,
        "repeated": _repeated,
        "mirrored": _mirrored,
    }
)
"""By name, what gives the largest difference of what must be the same."""


def check_relations(
    engine: Engine, faces: Faces, batches: Sequence[int], *, allowed: float, symmetric: bool
) -> tuple[RelationCheck, ...]:
    """Check every relation at every batch size.

    Args:
        engine: what is checked.
        faces: uint8 `(N, H, W, C)`, N at least the largest batch.
        batches: numbers of faces in a call.
        allowed: the largest difference that rounding explains.
        symmetric: whether the vote is that of the mirrored face, as it is where every view has its mirror image.
    """

    def answer(some: Faces) -> Answers:
        probabilities, label, confidence = engine.run(some)
        return np.column_stack([probabilities, confidence, probabilities[np.arange(len(label)), label]])

    checks = []
    for batch in batches:
        some = faces[:batch]
        found = answer(some)
        checks += [
            RelationCheck(
                relation=name, batch=batch, largest_difference=difference(answer, some, found), allowed=allowed
            )
            for name, difference in RELATIONS.items()
            if symmetric or name != "mirrored"
        ]
    return tuple(checks)


def _largest(found: Answers, wanted: Answers) -> float:
    return float(f"{np.abs(found.astype(np.float64) - wanted).max():.3g}")
