"""What ONNX Runtime's own profile says it has computed, and in which types of numbers."""

import contextlib
import json
import tempfile
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import onnxruntime as ort

from emoexport.engines.number_types import Executed, RuntimeLayer, executed_of

__all__ = ["Profile"]

_NUMBERS = {
    "float": "fp32",
    "float16": "fp16",
    "bfloat16": "bf16",
    "int8": "int8",
    "uint8": "int8",
    "float8e4m3fn": "fp8",
}
"""ONNX Runtime's names of types, and ours."""

_END = "_kernel_time"


class Profile:
    """The profile of a session, from when it is opened until it is read; nothing is left of it on disk.

    Args:
        options: of the session, which is opened with them afterwards.

    Source: ONNX Runtime's "Profiling tools": events of the category Node, one for each kernel that has run.
    """

    def __init__(self, options: ort.SessionOptions) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="emoexport.")
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(self._folder.name) / "profile")

    def read(self, session: ort.InferenceSession, *, with_times: bool = True) -> Executed:
        """End the profile: calls after this one are not slowed down by it.

        Args:
            session: it has made a call at least.
            with_times: whether the times are those of the kernels; on GPUs they are those of launching them.
        """
        with contextlib.closing(self), Path(session.end_profiling()).open(encoding="utf-8") as file:
            events = json.load(file)
        return executed_of(_layers(events, with_times=with_times))

    def close(self) -> None:
        """Remove what is on disk."""
        self._folder.cleanup()


def _layers(events: Collection[Mapping[str, Any]], *, with_times: bool) -> list[RuntimeLayer]:
    """Each kernel once, with the time of all calls together."""
    kernels = [event for event in events if event.get("cat") == "Node" and event["name"].endswith(_END)]
    times: Counter[str] = Counter()
    for event in kernels:
        times[event["args"]["node_index"]] += event["dur"] if with_times else 0
    once = {event["args"]["node_index"]: event["args"] for event in kernels}
    return [
        RuntimeLayer(kind=told["op_name"], number=_number(told), time=float(times[index]))
        for index, told in once.items()
    ]


def _number(arguments: Mapping[str, Any]) -> str:
    """The type that a kernel computes in: that of its first input, unless it quantises what it reads itself."""
    if arguments["op_name"].startswith("Dynamic"):
        return "int8"
    types = [name for tensor in arguments.get("input_type_shape", ()) for name in tensor]
    return _NUMBERS.get(types[0], "") if types else ""
