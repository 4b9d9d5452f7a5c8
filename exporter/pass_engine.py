"""An engine of single passes, and the cascade on it: they look like any engine, and need no torch."""

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emoexport.cascade import Cascade, CascadeRun
from emoexport.cascade_stages import Calls
from emoexport.decision import Decision
from emoexport.engines.base import Engine
from emoexport.engines.number_types import Executed
from emoexport.outcome import Outcome
from emoexport.passes import weighted_vote

__all__ = ["MOST_FACES", "CascadeEngine", "PassEngine", "numbered"]

MOST_FACES = 65_536
"""Faces in a call: any number, as far as memory goes."""


def numbered(faces: NDArray[np.uint8], views: NDArray[np.integer]) -> NDArray[np.uint8]:
    """Faces `(n, H, W, C)` with the number of a view each, `(n,)`, in one more row: `(n, H + 1, W, C)`."""
    count, height, *row = faces.shape
    found = np.zeros((count, height + 1, *row), dtype=np.uint8)
    found[:, :height] = faces
    found[:, height, 0, 0] = views
    return found


class PassEngine(Engine):
    """The graphs of all members, opened by one runtime: whatever passes are asked for, and no others.

    Args:
        members: engines of graphs that `pass_graph.write_pass_graphs` wrote, one a member.
        weights: of the full vote, `(K, V)`, sum 1.
        decision: what decides about it.
        face_shape: `(H, W, C)`.
        calls: how passes of a member are put into calls; None for the usual sizes.
    """

    def __init__(
        self,
        members: Sequence[Engine],
        weights: NDArray[np.float64],
        decision: Decision,
        *,
        face_shape: tuple[int, int, int],
        calls: Calls | None = None,
    ) -> None:
        super().__init__(precision=members[0].precision, face_shape=face_shape, max_batch=MOST_FACES)
        self.backend = members[0].backend
        self.runtime = getattr(members[0], "runtime", "")
        self.version = getattr(members[0], "version", "")
        self.load_s = round(sum(member.load_s for member in members), 3)
        self.decision, self.weights = decision, weights
        self.members = tuple(members)
        self.calls = (calls or Calls()).up_to(members[0].max_batch)

    @property
    def name(self) -> str:
        """As of the engine whose passes they are, with `passes-` before it."""
        return f"passes-{super().name}"

    def passes(self, faces: NDArray[np.uint8], passes: Sequence[tuple[int, int]]) -> NDArray[np.float32]:
        """The probabilities of some passes.

        Args:
            faces: uint8 `(N, H, W, C)`.
            passes: as member and view, counted from 0.

        Returns:
            float32 `(N, passes, L)`.
        """
        found = np.empty((len(faces), len(passes), len(self.decision.labels)), dtype=np.float32)
        members, views = np.array(passes).T
        for member in dict.fromkeys(members.tolist()):
            columns = np.flatnonzero(members == member)
            face, column = np.divmod(np.arange(len(faces) * len(columns)), len(columns))
            start = 0
            for size in self.calls.of(len(face)):
                rows = slice(start, start + size)
                places = face[rows], columns[column[rows]]
                found[places] = self._scored(member, faces[places[0]], views[places[1]], size)
                start += size
        return found

    def _scored(
        self, member: int, faces: NDArray[np.uint8], views: NDArray[np.int64], size: int
    ) -> NDArray[np.float32]:
        """Passes of one member, `(n, L)`, in a call of a size that has room for them."""
        rows = np.minimum(np.arange(size), len(faces) - 1)
        return self.members[member].scores(numbered(faces[rows], views[rows]))[: len(faces), 0, 0]

    def executed(self, faces: NDArray[np.uint8]) -> Executed:
        """What the runtime tells of the first member."""
        return self.members[0].executed(numbered(faces, np.zeros(len(faces), dtype=np.int64)))

    def _run(self, faces: NDArray[np.uint8]) -> Outcome:
        return self.decision.decide(weighted_vote(self._scores(faces), self.weights))

    def _scores(self, faces: NDArray[np.uint8]) -> NDArray[np.float32]:
        every = [(member, view) for member in range(len(self.weights)) for view in range(self.weights.shape[1])]
        return self.passes(faces, every).reshape(len(faces), *self.weights.shape, -1)


class CascadeEngine(PassEngine):
    """A cascade on the passes of a runtime; its arguments are those of `PassEngine`, the cascade for vote and decision.

    It keeps one thing between calls: how many faces have left at each stage, to tell whether they leave where the
    calibration faces did.
    """

    def __init__(self, members: Sequence[Engine], cascade: Cascade, **settings: Any) -> None:
        super().__init__(members, cascade.full, cascade.decision, **settings)
        self.cascade = cascade
        self._left = np.zeros(len(cascade.stages), dtype=np.int64)
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        """`cascade-`, the rule, and the engine whose passes they are."""
        return f"cascade-{self.cascade.rule}-{self.backend}-{self.precision}"

    @property
    def left(self) -> tuple[int, ...]:
        """How many faces have left at each stage since this was opened, those of `walk` not counted."""
        with self._lock:
            return tuple(self._left.tolist())

    def walk(self, faces: NDArray[np.uint8]) -> CascadeRun:
        """Decide about faces, and tell at which stage each left.

        Args:
            faces: uint8 `(N, H, W, C)`, N >= 1.

        Raises:
            BadInput: if the type or the shape is another.
        """
        self._refuse(faces)
        stages = self.cascade.stages
        return self.cascade.walk(len(faces), lambda rows, stage: self.passes(faces[rows], stages[stage].passes))

    def _run(self, faces: NDArray[np.uint8]) -> Outcome:
        found = self.walk(faces)
        with self._lock:
            self._left += np.bincount(found.stage, minlength=len(self._left))
        return found.outcome
