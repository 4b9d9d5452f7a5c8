"""Dynamic batching: the faces of many requests in one call of an engine, by one thread, from a queue with an end."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from emoexport.errors import EmoexportError, EngineFailed
from emoexport.outcome import Outcome

__all__ = ["Answer", "Batcher", "Call", "EngineFailed", "Overloaded", "ShuttingDown"]

Faces = NDArray[np.uint8]
_log = logging.getLogger(__name__)


class Overloaded(EmoexportError):
    """More is asked for than may wait; `retry_after_s` says when to come again, in whole seconds."""

    def __init__(self, message: str, *, hint: str = "", retry_after_s: int = 1) -> None:
        super().__init__(message, hint=hint)
        self.retry_after_s = retry_after_s


class ShuttingDown(EmoexportError):
    """Nothing new is taken any more; what was taken is finished."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What was decided about the faces of one request, and how long that took."""

    outcome: Outcome
    queue_s: float
    """Seconds from the queue's beginning to the call."""
    engine_s: float
    """Seconds of the call."""
    batch: int
    """Faces in the call, those of other requests among them."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call of the engine, for whoever counts."""

    faces: int
    queue_s: tuple[float, ...]
    """Of each request in it."""
    engine_s: float
    label: NDArray[np.int64]
    """`(faces,)`; empty where the engine failed."""


@dataclass(frozen=True, kw_only=True)
class _Request:
    faces: Faces
    since: float
    answer: "Future[Answer]" = field(default_factory=Future)


class Batcher:
    """Takes requests of some faces each, and calls the engine with as many as fit, in the order in which they came.

    A call starts as soon as it is full, or the next request does not fit into it whole, or its oldest request has
    waited long enough; while the engine is busy requests gather by themselves. A request of more faces than a call
    takes is handed over alone. A future that is cancelled before its call takes no part in one.

    Source: the dynamic batcher of NVIDIA Triton, with its delay counted from the oldest request.

    Args:
        decide: decides about uint8 faces `(N, H, W, C)`; only the batcher's thread calls it.
        batch: faces in a call, at least 1.
        max_delay_s: seconds that a call waits for more faces than there are.
        queue: faces that may wait at most.
        watch: told of every call before its answers are handed out.
    """

    def __init__(
        self,
        decide: Callable[[Faces], Outcome],
        *,
        batch: int,
        max_delay_s: float,
        queue: int,
        watch: Callable[[Call], object] = lambda _: None,
    ) -> None:
        self._decide, self._watch = decide, watch
        self._batch, self._max_delay_s, self._queue = batch, max_delay_s, queue
        self._changed = threading.Condition()
        self._requests: deque[_Request] = deque()
        self._waiting = 0
        self._closed = False
        self._s_a_face = 0.0
        self._thread = threading.Thread(target=self._work, name="emoexport-batcher", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Faces in the queue, those of the call under way not among them."""
        return self._waiting

    @property
    def is_alive(self) -> bool:
        """Whether its thread runs."""
        return self._thread.is_alive()

    def submit(self, faces: Faces) -> "Future[Answer]":
        """Put the faces of a request into the queue.

        Args:
            faces: uint8 `(N, H, W, C)`, N >= 1.

        Returns:
            What becomes the answer. It raises `EngineFailed` where the engine did.

        Raises:
            Overloaded: if they would be more than may wait.
            ShuttingDown: if it was closed.
        """
        with self._changed:
            if self._closed:
                raise ShuttingDown("the server is shutting down.", hint="ask again, or ask another one")
            self.require_room(len(faces))
            request = _Request(faces=faces, since=time.monotonic())
            self._requests.append(request)
            self._waiting += len(faces)
            self._changed.notify()
        return request.answer

    def require_room(self, faces: int = 1) -> None:
        """Refuse what would not find room in the queue now.

        Raises:
            Overloaded: if so many more would be more than may wait.
        """
        if self._waiting + faces > self._queue:
            seconds = max(1, round(self._waiting * self._s_a_face))
            raise Overloaded(
                f"{self._waiting:,} faces wait, and {faces:,} more would be over the limit of {self._queue:,}.",
                hint=f"ask again in {seconds} s" + f", with at most {self._queue:,} faces" * (faces > self._queue),
                retry_after_s=seconds,
            )

    def close(self) -> None:
        """Take no more, finish all that waits, and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while (requests := self._next()) is not None:
            wanted = [one for one in requests if one.answer.set_running_or_notify_cancel()]
            if wanted:
                self._call(wanted)

    def _next(self) -> list[_Request] | None:
        """The requests of the next call; None when it is closed and nothing waits."""
        with self._changed:
            self._changed.wait_for(lambda: self._requests or self._closed)
            if not self._requests:
                return None
            until = self._requests[0].since + self._max_delay_s
            while not (self._closed or self._is_full()) and (left := until - time.monotonic()) > 0:
                self._changed.wait(left)
            taken = [self._requests.popleft() for _ in range(self._fitting())]
            self._waiting -= _faces_of(taken)
        return taken

    def _fitting(self) -> int:
        """How many of the oldest requests make up a call: as many as fit whole, and one in any case."""
        faces = 0
        for number, request in enumerate(self._requests):
            faces += len(request.faces)
            if number and faces > self._batch:
                return number
        return len(self._requests)

    def _is_full(self) -> bool:
        return self._fitting() < len(self._requests) or self._waiting >= self._batch

    def _call(self, requests: Sequence[_Request]) -> None:
        begun = time.monotonic()
        waited = tuple(begun - one.since for one in requests)
        count = _faces_of(requests)
        try:
            outcome = self._decide(np.concatenate([one.faces for one in requests]))
        except Exception as err:  # what runtimes raise in a call shares no base but this
            _log.exception("the engine failed in a call with %d faces", count)
            took, empty = time.monotonic() - begun, np.empty(0, dtype=np.int64)
            self._watch(Call(faces=count, queue_s=waited, engine_s=took, label=empty))
            for one in requests:
                failure = EngineFailed(f"the engine failed in this call: {str(err).partition(chr(10))[0]}")
                failure.__cause__ = err
                one.answer.set_exception(failure)
            return
        took = time.monotonic() - begun
        self._s_a_face += 0.2 * (took / count - self._s_a_face) if self._s_a_face else took / count
        self._watch(Call(faces=count, queue_s=waited, engine_s=took, label=outcome.label))
        start = 0
        for one, seconds in zip(requests, waited, strict=True):
            rows = slice(start, start := start + len(one.faces))
            one.answer.set_result(Answer(outcome=outcome.take(rows), queue_s=seconds, engine_s=took, batch=count))


def _faces_of(requests: Sequence[_Request]) -> int:
    return sum(len(one.faces) for one in requests)
