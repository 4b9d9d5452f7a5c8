"""What every engine has in common: what it takes, what it refuses, what it answers."""

import itertools
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from emoexport.engines.number_types import Executed
from emoexport.errors import BadBundle, BadInput, EmoexportError
from emoexport.outcome import Outcome

__all__ = ["Engine", "GraphEngine", "milliseconds_of"]


class Engine(ABC):
    """A loaded session. It takes faces and answers outcomes; it keeps nothing between calls."""

    backend: str
    """Of `engines.BACKENDS`, or `torch`."""
    load_s = 0.0
    """Seconds that it took to open."""

    def __init__(self, *, precision: str, face_shape: tuple[int, int, int], max_batch: int) -> None:
        self.precision = precision
        self.face_shape = face_shape
        self.max_batch = max_batch

    @property
    def name(self) -> str:
        """Runtime and precision, as in `onnxruntime-int8`."""
        return f"{self.backend}-{self.precision}"

    def run(self, faces: NDArray[np.uint8]) -> Outcome:
        """Decide about faces in one call of the runtime.

        Args:
            faces: uint8 `(N, H, W, C)`, 1 <= N <= `max_batch`.

        Raises:
            BadInput: if the type or the shape is another.
        """
        self._refuse(faces)
        return self._run(np.ascontiguousarray(faces))

    def run_all(
        self,
        faces: NDArray[np.uint8],
        *,
        batch_size: int = 16,
        progress: Callable[[int], object] = lambda _: None,
    ) -> Outcome:
        """Decide about any number of faces, batch by batch.

        Args:
            faces: uint8 `(N, H, W, C)`, N >= 1.
            batch_size: faces in a call.
            progress: called with the number of faces done after each batch.
        """
        parts = []
        for start in range(0, max(1, len(faces)), batch_size):
            batch = faces[start : start + batch_size]
            parts.append(self.run(batch))
            progress(len(batch))
        probabilities, label, confidence = (np.concatenate(column) for column in zip(*parts, strict=True))
        return Outcome(probabilities, label, confidence)

    def scores(self, faces: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Probabilities of every pass, in one call of the runtime.

        Args:
            faces: uint8 `(N, H, W, C)`, 1 <= N <= `max_batch`.

        Returns:
            float32 `(N, K, V, L)`.

        Raises:
            BadInput: if the type or the shape is another.
        """
        self._refuse(faces)
        return self._scores(np.ascontiguousarray(faces))

    def split(self, faces: NDArray[np.uint8]) -> tuple[float, float, float] | None:  # noqa: ARG002 (for those that can)
        """Milliseconds of one call before, in and after what the runtime computes; None where an engine cannot tell.

        Before it, faces are put where the runtime reads them, on a GPU or in a tensor of its own; after it, outcomes
        are fetched. Compute alone is what lies between, all of a call is end to end.
        """
        return None

    def executed(self, faces: NDArray[np.uint8]) -> Executed:  # noqa: ARG002 (for those that can)
        """Which types of numbers the runtime computes in; empty where it does not tell, or was not `profiled`."""
        return Executed()

    @abstractmethod
    def _run(self, faces: NDArray[np.uint8]) -> Outcome:
        """Run checked, contiguous faces."""

    @abstractmethod
    def _scores(self, faces: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Score checked, contiguous faces."""

    def _refuse(self, faces: NDArray[np.uint8]) -> None:
        needed = f"uint8 faces (N, {', '.join(map(str, self.face_shape))}), N from 1 to {self.max_batch}"
        if not isinstance(faces, np.ndarray) or faces.dtype != np.uint8:
            found = getattr(faces, "dtype", type(faces).__name__)
            raise BadInput(f"found {found}; needed are {needed}.")
        if faces.ndim != 4 or faces.shape[1:] != self.face_shape:
            raise BadInput(f"found the shape {faces.shape}; needed are {needed}.")
        if not 1 <= len(faces) <= self.max_batch:
            raise BadInput(f"found {len(faces)} faces in a call; needed are {needed}.")


class GraphEngine(Engine):
    """An engine that a runtime compiles from a graph file.

    Args:
        graph: the file.
        precision: of the graph.
        face_shape: `(H, W, C)`.
        max_batch: the largest number of faces in a call.
        threads: how many the runtime may use; None leaves it to the runtime.
        cache: where it keeps what it compiles; None for nowhere.
        profiled: whether it is to tell what it executes, where that must be known when it is opened.
        sizes: the only numbers of faces in a call, where the runtime is to be prepared for each; none for any number.

    Raises:
        BadBundle: if the runtime refuses the graph.
    """

    runtime: ClassVar[str]
    """Name and version, for messages."""

    def __init__(
        self,
        graph: Path,
        *,
        precision: str,
        face_shape: tuple[int, int, int],
        max_batch: int,
        threads: int | None = None,
        cache: Path | None = None,
        profiled: bool = False,
        sizes: Sequence[int] = (),
    ) -> None:
        self._profiled, self._sizes = profiled, tuple(sizes)
        super().__init__(precision=precision, face_shape=face_shape, max_batch=max_batch)
        try:
            self._load(graph, threads, cache)
        except EmoexportError:
            raise
        except Exception as err:  # what runtimes raise shares no base but this
            raise BadBundle(f"{self.runtime} cannot load {graph.name}: {err}") from err

    @abstractmethod
    def _load(self, graph: Path, threads: int | None, cache: Path | None) -> None:
        """Compile the graph for this machine; a runtime that can keeps what it compiled in `cache`."""


def milliseconds_of(*works: Callable[[], object]) -> list[float]:
    """Do works one after the other; how long each took."""
    times = [time.perf_counter_ns()]
    for work in works:
        work()
        times.append(time.perf_counter_ns())
    return [(after - before) / 1e6 for before, after in itertools.pairwise(times)]
