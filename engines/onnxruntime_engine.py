"""ONNX Runtime, on the CPU."""

from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from emoexport.engines.base import GraphEngine, milliseconds_of
from emoexport.engines.number_types import Executed
from emoexport.engines.onnxruntime_profile import Profile
from emoexport.outcome import Outcome

__all__ = ["OnnxRuntimeEngine", "session_options"]

_PROVIDER = "CPUExecutionProvider"


def session_options(threads: int | None) -> ort.SessionOptions:
    """What sessions on any device have in common: errors are logged, warnings are not.

    Args:
        threads: how many an operator on the CPU may use; None leaves it to ONNX Runtime.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or 0
    return options


class OnnxRuntimeEngine(GraphEngine):
    """The CPU provider. Other providers fall back to it without a word, so it is the only one asked for.

    `enable_fallback=0`: what fails is not tried again, of which ONNX Runtime tells on standard output.
    """

    backend = "onnxruntime"
    runtime = f"ONNX Runtime {ort.__version__}"

    def _load(self, graph: Path, threads: int | None, cache: Path | None) -> None:  # noqa: ARG002 (it keeps none)
        options = session_options(threads)
        self._profile = Profile(options) if self._profiled else None
        self._session = ort.InferenceSession(graph, options, providers=[_PROVIDER], enable_fallback=0)
        assert self._session.get_providers() == [_PROVIDER]

    def executed(self, faces: NDArray[np.uint8]) -> Executed:
        """What the session has computed from its first call on to one with these faces; it tells once."""
        if self._profile is None:
            return Executed()
        self.run(faces)
        profile, self._profile = self._profile, None
        return profile.read(self._session)

    def _run(self, faces: NDArray[np.uint8]) -> Outcome:
        return Outcome(*self._session.run(list(Outcome._fields), {"faces": faces}))

    def _scores(self, faces: NDArray[np.uint8]) -> NDArray[np.float32]:
        scores: NDArray[np.float32] = self._session.run(["scores"], {"faces": faces})[0]
        return scores

    def split(self, faces: NDArray[np.uint8]) -> tuple[float, float, float]:
        """Milliseconds to bind what goes in and comes out, of the run, and to fetch the outcome."""
        self._refuse(faces)
        binding = self._session.io_binding()

        def bind() -> None:
            binding.bind_cpu_input("faces", np.ascontiguousarray(faces))
            for name in Outcome._fields:
                binding.bind_output(name)

        before, within, after = milliseconds_of(
            bind, lambda: self._session.run_with_iobinding(binding), binding.copy_outputs_to_cpu
        )
        return before, within, after
