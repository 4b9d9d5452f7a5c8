"""What others make of the same members, each way set up as its own documentation advises: what engines must beat.

They get more than their users would write down: the views as one batch for each member, and from PyTorch the vote on
the device. What they lack is what emoexport does: rewrites, one graph of all passes, chosen layers in few bits.
"""

import contextlib
import importlib.util
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from emoexport.engines.base import Engine
from emoexport.engines.machine import find_compiler
from emoexport.fold import Autocast, Branches, Fold
from emoexport.outcome import Outcome
from emoexport.reference import Reference

__all__ = ["RIVALS", "PlainRival", "Rival", "RivalEngine", "export_plain", "rivals_for"]

_RECOMPILES = 64
"""Of one class, for all of its instances together: PyTorch's 8 are fewer than the batch sizes of two rivals."""

_CUDA_GRAPHS: Mapping[str, Any] = {"mode": "reduce-overhead"}
"""Source: PyTorch, "torch.compile": the mode that launches CUDA graphs, against the overhead of small batches."""

_FREEZING: Mapping[str, Any] = {"options": {"freezing": True}}
"""Weights become constants, which the compiler packs as its kernels read them. Source: PyTorch, "Using Max-Autotune
Compilation on CPU for Better Performance with torch.compile", which sets it for inference; autotuning is left out."""


Session = Callable[[NDArray[np.float32]], NDArray[np.float32]]
"""Pictures `(n, C, H, W)` to logits `(n, L)`."""


def _onnxruntime(files: Sequence[Path], threads: int | None) -> tuple[str, list[Session]]:
    """ONNX Runtime with its default settings, and its precision. Source: its Python API, `InferenceSession`."""
    import onnxruntime  # noqa: PLC0415 (rivals are few people's wish)

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0

    def session(file: Path) -> Session:
        opened: Any = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"], enable_fallback=0)
        name = opened.get_inputs()[0].name
        return lambda pictures: opened.run(None, {name: pictures})[0]

    return "fp32", [session(file) for file in files]


def _openvino(files: Sequence[Path], threads: int | None) -> tuple[str, list[Session]]:
    """OpenVINO with its default settings, and the precision it says it computes in: BF16 where processors have that.

    Source: OpenVINO, "Convert from ONNX" (`compile_model` reads it as it is), "CPU Device", "Precision Control".
    """
    import openvino  # noqa: PLC0415 (not always installed)

    options = {"INFERENCE_NUM_THREADS": str(threads)} if threads else {}
    models: list[Any] = [openvino.compile_model(file, "CPU", options) for file in files]
    found: str = models[0].get_property("INFERENCE_PRECISION_HINT").get_type_name()

    def session(model: Any) -> Session:
        request = model.create_infer_request()
        return lambda pictures: request.infer([pictures])[0]

    return {"f32": "fp32", "f16": "fp16"}.get(found, found), [session(model) for model in models]


@dataclass(frozen=True, kw_only=True)
class Rival:
    """One row of `RIVALS`."""

    name: str
    title: str
    precision: str
    """Empty if the runtime chooses it."""
    device: str
    dtype: torch.dtype | None = None
    """Of automatic mixed precision; None for FP32."""
    compiled: Mapping[str, Any] | None = field(default=None, hash=False)
    """Settings of `torch.compile`; None where nothing is compiled."""
    runtime: Callable[[Sequence[Path], int | None], tuple[str, list[Session]]] | None = None
    """Opens the members' files, with so many threads; None of PyTorch's own ways."""
    package: str = "torch"
    """What must be importable."""

    @property
    def engine(self) -> str:
        """Its name among engines, which has the precision where that is known before it is opened."""
        return f"{self.name}-{self.precision}".rstrip("-")

    @property
    def problem(self) -> str:
        """Why it cannot be timed here; empty if it can."""
        if importlib.util.find_spec(self.package) is None:
            return "not installed"
        compiler, found = find_compiler()
        lacks = self.device == "cpu" and self.compiled is not None and found is None
        return f"there is no {compiler}, which torch.compile needs" if lacks else ""


def _rows() -> Sequence[Rival]:
    fp16: dict[str, Any] = {"precision": "fp16", "dtype": torch.float16}
    bf16: dict[str, Any] = {"precision": "bf16", "dtype": torch.bfloat16}
    batched: dict[str, Any] = {"name": "torch-batched", "title": "PyTorch, views as one batch", "precision": "fp32"}
    cast = "PyTorch, autocast to {}, channels last"
    graphs = "PyTorch, torch.compile and CUDA graphs, autocast to {}, channels last"
    return (
        Rival(device="cpu", **batched),
        Rival(device="cpu", name="torch-autocast", title=cast.format("BF16"), **bf16),
        Rival(
            device="cpu",
            name="torch-compile",
            title="PyTorch, torch.compile with frozen weights",
            precision="fp32",
            compiled=_FREEZING,
        ),
        Rival(
            device="cpu",
            name="torch-compile",
            title="PyTorch, torch.compile with frozen weights, autocast to BF16, channels last",
            compiled=_FREEZING,
            **bf16,
        ),
        Rival(
            device="cpu",
            name="onnxruntime-plain",
            title="ONNX Runtime, each member as torch.onnx.export writes it",
            precision="fp32",
            runtime=_onnxruntime,
            package="onnxruntime",
        ),
        Rival(
            device="cpu",
            name="openvino-plain",
            title="OpenVINO, the same files, its default settings and the precision it chooses",
            precision="",
            runtime=_openvino,
            package="openvino",
        ),
        Rival(device="cuda", **batched),
        Rival(device="cuda", name="torch-autocast", title=cast.format("FP16"), **fp16),
        Rival(device="cuda", name="torch-autocast", title=cast.format("BF16"), **bf16),
        Rival(device="cuda", name="torch-compile", title=graphs.format("FP16"), compiled=_CUDA_GRAPHS, **fp16),
        Rival(device="cuda", name="torch-compile", title=graphs.format("BF16"), compiled=_CUDA_GRAPHS, **bf16),
    )


RIVALS = _rows()


def rivals_for(device: str) -> Sequence[Rival]:
    """The rivals on a kind of device, in the order of the table."""
    return [row for row in RIVALS if row.device == device]


class RivalEngine(Engine):
    """A rival of PyTorch's behind the interface of an engine: uint8 faces in host memory to outcomes there.

    Args:
        rival: a row of `RIVALS`.
        members: as they were trained; they are moved to the device, and those of a rival in fewer bits reordered.
        fold: what makes the fold of them, once they are one module.
        face_shape: `(H, W, C)`.
        max_batch: the largest number of faces in a call.

    Source: PyTorch's "Performance Tuning Guide" (channels last, automatic mixed precision, pinned memory, no gradients)
    and "torch.compile" (a graph for each shape).
    """

    backend = "torch"

    def __init__(
        self,
        rival: Rival,
        members: Sequence[nn.Module],
        fold: Callable[[nn.Module], Fold],
        *,
        face_shape: tuple[int, int, int],
        max_batch: int,
    ) -> None:
        super().__init__(precision=rival.precision, face_shape=face_shape, max_batch=max_batch)
        self._rival, self._device = rival, rival.device
        together: nn.Module = Branches(members)
        if rival.dtype is not None:
            together.to(memory_format=torch.channels_last)
            together = Autocast(Branches(members), device=rival.device, dtype=rival.dtype)
        whole = fold(together).eval().to(rival.device)
        self._call: Callable[[Tensor], Any] = whole
        if rival.compiled is not None:
            # Beyond the limit PyTorch calls what it has not compiled, unasked; that is to be an error.
            strict = torch._dynamo.config.patch(recompile_limit=_RECOMPILES, fail_on_recompile_limit_hit=True)
            self._call = strict(torch.compile(whole, dynamic=False, **rival.compiled))
        self._faces = torch.empty((max_batch, *face_shape), dtype=torch.uint8, pin_memory=rival.device == "cuda")

    @property
    def name(self) -> str:
        """The rival's."""
        return self._rival.engine

    def _run(self, faces: NDArray[np.uint8]) -> Outcome:
        return Outcome(*(result.cpu().numpy() for result in self._infer(faces)[:3]))

    def _scores(self, faces: NDArray[np.uint8]) -> NDArray[np.float32]:
        return self._infer(faces)[3].float().cpu().numpy()

    def _infer(self, faces: NDArray[np.uint8]) -> Sequence[Tensor]:
        some = self._faces[: len(faces)]
        some.copy_(torch.from_numpy(faces))
        with torch.inference_mode():
            found: Sequence[Tensor] = self._call(some.to(self._device, non_blocking=True))
        return found


def export_plain(reference: Reference, folder: Path, *, face_shape: tuple[int, int, int]) -> list[Path]:
    """Export each member as it was trained, pictures `(n, C, H, W)` to logits, by `torch.onnx.export` as it comes.

    Source: PyTorch, "Export a PyTorch model to ONNX" (`dynamo=True`, `dynamic_shapes`), its optimiser left on.
    """
    height, width, channels = face_shape
    pictures = torch.zeros(2, channels, height, width)
    files = [folder / f"{number}.onnx" for number in range(len(reference.members))]
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(None):
        warnings.simplefilter("ignore")  # the exporter warns of its own deprecations
        for member, file in zip(reference.members, files, strict=True):
            torch.onnx.export(
                member, (pictures,), file, dynamo=True, dynamic_shapes=({0: torch.export.Dim("n")},), verbose=False
            )
    return files


class PlainRival(Engine):
    """A session for each member, called one after the other; views, vote and decision are the reference's own code.

    Args:
        rival: a row of `RIVALS` that names a runtime.
        reference: whose views, weights and decision they are.
        files: what `export_plain` wrote of its members.
        face_shape: `(H, W, C)`.
        max_batch: the largest number of faces in a call.
        threads: how many a session may use; None leaves it to the runtime.
    """

    def __init__(
        self,
        rival: Rival,
        reference: Reference,
        files: Sequence[Path],
        *,
        face_shape: tuple[int, int, int],
        max_batch: int,
        threads: int | None = None,
    ) -> None:
        assert rival.runtime is not None
        precision, self._sessions = rival.runtime(files, threads)
        super().__init__(precision=precision, face_shape=face_shape, max_batch=max_batch)
        self._rival, self._reference = rival, reference

    @property
    def name(self) -> str:
        """The rival's, with the precision that was found."""
        return f"{self._rival.name}-{self.precision}"

    def _run(self, faces: NDArray[np.uint8]) -> Outcome:
        scores = self._scores(faces)
        return self._reference.decision.decide(np.average(scores, axis=(1, 2), weights=self._reference.weights))

    def _scores(self, faces: NDArray[np.uint8]) -> NDArray[np.float32]:
        reference, labels = self._reference, len(self._reference.decision.labels)
        shape = len(self._sessions), len(reference.views)
        made = np.ones(shape) if reference.weights is None else reference.weights
        scores = np.zeros((len(faces), *shape, labels), dtype=np.float32)
        with torch.inference_mode():
            pictures = torch.from_numpy(faces).permute(0, 3, 1, 2).float() / 255
            shown = [view(pictures) for view in reference.views]
            for number, session in enumerate(self._sessions):
                seen = np.flatnonzero(made[number])
                logits = torch.from_numpy(session(torch.cat([shown[view] for view in seen]).numpy()))  # (seen*N, L)
                scores[:, number, seen] = logits.softmax(dim=-1).view(len(seen), -1, labels).permute(1, 0, 2)
        return scores
