"""`emoexport.load`: a bundle opened for use, with the best engine that this machine runs. It needs no torch."""

import threading
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from emoexport.bundle import Bundle, use_unchanged
from emoexport.cascade_drift import ExitDrift, exit_drift
from emoexport.engine_choice import Chosen, choose, choose_cascade, usual_batch
from emoexport.engines import BACKENDS, require_known, require_known_device
from emoexport.engines.base import Engine
from emoexport.engines.checked import outcome_of, telling_failures
from emoexport.errors import BadBundle, BadInput, UsageError
from emoexport.opening import certificate_notes
from emoexport.outcome import Outcome
from emoexport.pass_engine import MOST_FACES, CascadeEngine

__all__ = ["Session", "load"]


def load(
    bundle: str | Path,
    *,
    engine: str | None = None,
    precision: str | None = None,
    device: str | None = None,
    batch: int | None = None,
    cascade: str | None = None,
    threads: int | None = None,
    cache: str | Path | None = None,
) -> "Session":
    """Open a bundle with the best engine that this machine can run, and warm it up.

    Engines whose certificate holds here come first, and of these the one that decides about most faces a second in the
    bundle's `reports/bench.json`, if that was measured on this processor. Without a certificate FP32 comes first.

    Args:
        bundle: the directory that `emoexport build` wrote.
        engine: a runtime, `onnxruntime` for one; the best if none.
        precision: `fp32`, `int8` and so on; the best if none.
        device: only engines that run on it, `cpu` or `cuda`; both if none.
        batch: faces in a call of the runtime; if none the most that the certificate was given for, up to 64.
        cascade: one of the bundle, instead of its whole fold: a rule such as `agreement`, or the whole name; of several
            with the rule, of these engines and precisions, the fastest whose certificate holds here.
        threads: how many the runtime may use; it chooses itself if none.
        cache: a folder where runtimes keep what they compile.

    Raises:
        UsageError: if there is no such engine, precision or device, or the engine runs on the other device.
        BadBundle: if the bundle is incomplete or was changed, or has nothing of what is asked for.
        MissingRuntime: if no engine of it runs here.
        WrongMachine: if the engine that was named was built for another machine.
    """
    if device is not None:
        require_known_device(device)
    if engine:
        require_known([engine])
        if device not in (None, BACKENDS[engine].device):
            raise UsageError(f"{engine} runs on {BACKENDS[engine].device}, and {device} is asked for.")
    if threads is not None and threads < 1:
        raise UsageError(f"found {threads} threads; needed is 1 or more.", hint="leave it out, and the runtime chooses")
    limits = {"threads": threads, "cache": Path(cache) if cache else None}

    def session_of(opened: Bundle) -> Session:
        most = MOST_FACES if cascade else opened.manifest.max_batch
        if batch is not None and not 1 <= batch <= most:
            raise UsageError(
                f"found a batch of {batch}; {bundle} takes from 1 to {most} faces.", hint=f"a batch of {most}"
            )
        if cascade is not None:
            return Session(opened, choose_cascade(opened, cascade, engine, precision, device, limits), batch)
        return Session(opened, choose(opened, engine, precision, device, batch, limits), batch)

    return use_unchanged(Path(bundle), session_of)


class Session:
    """A bundle in use. Threads may share it: they call the runtime one after the other.

    Attributes:
        path: the bundle.
        manifest: what is in it: members, views, the weights of the vote, the decision.
        labels: names of the emotions, in the order of the probabilities.
        face_shape: `(H, W, C)` of the faces it takes.
        max_batch: the largest number of faces in a call of the runtime.
        batch: the number of faces in a call that `run` uses. Its last call takes what is left.
        engine: runtime and precision, as in `openvino-int8`.
        precision: of the graph that the engine was made of.
        device: where it runs, `cpu` or `cuda`.
        certificate: what `verify` has shown of this engine on this machine; None if nothing that holds here.
        why: why this engine was chosen, a sentence.
        notes: what a user must know, a sentence each: above all that a certificate is missing or stale.
    """

    def __init__(self, bundle: Bundle, chosen: Chosen, batch: int | None = None) -> None:
        self.path = bundle.path
        self.manifest = bundle.manifest
        self.labels = bundle.manifest.labels
        self.face_shape = bundle.manifest.face_shape
        self.max_batch = chosen.engine.max_batch
        tried = chosen.certificate.batches if chosen.certificate and chosen.left else []
        self.batch = batch or max(tried, default=usual_batch(chosen.certificate, self.max_batch))
        self.engine = chosen.engine.name
        self.precision = chosen.engine.precision
        self.device = BACKENDS[chosen.engine.backend].device
        self.certificate = chosen.certificate
        self.why = chosen.why
        self.notes = (*chosen.notes, *certificate_notes(bundle, [chosen.engine], [self.batch]))
        self._lock = threading.Lock()
        self._engine: Engine | None = chosen.engine
        self._left = chosen.left

    def run(self, faces: NDArray[np.uint8]) -> Outcome:
        """Decide about faces, `batch` of them in a call of the runtime.

        Args:
            faces: uint8 `(N, H, W, C)`, N >= 1; RGB where C is 3.

        Returns:
            Probabilities float32 `(N, L)`, labels int64 `(N,)`, which index `labels`, and confidences float32 `(N,)`.

        Raises:
            BadInput: if the type or the shape is another, or the session is closed.
            EngineFailed: if the runtime raises an error.
            BadBundle: if it answers with anything but probabilities, as one of 16 bits does after an overflow.
        """
        with self._lock:
            return outcome_of(self._opened_for(faces), faces, batch=self.batch, labels=len(self.labels))

    def scores(self, faces: NDArray[np.uint8]) -> NDArray[np.float32]:
        """What every member says of every view, `batch` faces in a call of the runtime: the votes behind `run`.

        Args:
            faces: uint8 `(N, H, W, C)`, N >= 1; RGB where C is 3.

        Returns:
            Probabilities before the decision's temperature, float32 `(N, K, V, L)`, in the order of the manifest's
            members and views; 0 for passes that have no part in the vote.

        Raises:
            BadInput: if the type or the shape is another, or the session is closed, or it is of a cascade, which
                computes other passes of every face.
            EngineFailed: if the runtime raises an error.
            BadBundle: if it answers with something else.
        """
        with self._lock:
            engine = self._opened_for(faces)
            if isinstance(engine, CascadeEngine):
                raise BadInput(
                    "a cascade computes other passes of every face, and tells none.",
                    hint="open the bundle without a cascade",
                )
            starts = range(0, max(1, len(faces)), self.batch)
            with telling_failures(engine):
                found = np.concatenate([engine.scores(faces[start : start + self.batch]) for start in starts])
            needed = len(faces), len(self.manifest.members), len(self.manifest.views), len(self.labels)
            if found.shape != needed:
                raise BadBundle(f"{engine.name} answers scores {found.shape}; needed are {needed}.")
            return found

    @property
    def left(self) -> tuple[int, ...] | None:
        """How many faces have left a cascade at each stage so far; None without one."""
        engine = self._engine
        return engine.left if isinstance(engine, CascadeEngine) else None

    def drift(self) -> ExitDrift | None:
        """Whether faces so far leave a cascade where those that certified it did; None without one, or without faces.

        Faces are taken for independent, which frames of one video are not.
        """
        with self._lock:
            if self._left is None or not isinstance(self._engine, CascadeEngine) or not sum(self._engine.left):
                return None
            return exit_drift(self._left, self._engine.left)

    def close(self) -> None:
        """Let go of the engine, after the call that is under way."""
        with self._lock:
            self._engine = None

    def _opened_for(self, faces: NDArray[np.uint8]) -> Engine:
        if not isinstance(faces, np.ndarray):
            raise BadInput(f"found {type(faces).__name__}; needed is an array of uint8 faces (N, H, W, C).")
        if self._engine is None:
            raise BadInput("the session is closed.", hint="emoexport.load opens another")
        return self._engine

    def __enter__(self) -> "Session":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
