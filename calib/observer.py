"""What the tensors of a graph hold while its members look at faces: extremes, histograms, what a limit cuts off."""

import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

from emoexport.errors import BadData, BadInput
from emoexport.member_graph import in_member

__all__ = ["Observer", "refuse_quantised"]

Progress = Callable[[int], object]

_Tap = Callable[[ir.Value], list[ir.Node]]
"""Nodes that read a tensor; the output of the last one is what is seen of it."""

_FACES = 4
"""Faces whose views are made at a time."""

_ROOM = 3_000_000_000
"""Bytes that all tensors of all members may take at a time: runtimes may keep what is seen until the end."""

_KEEP_VALUES = frozenset({"Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})
"""Operators that move numbers about: what goes in tells all of what comes out."""


class Observer:
    """Runs faces through an FP32 graph and sees what is inside its members.

    The graph runs in two pieces, cut at the pictures: views on one side, members on the other. The members see a few
    pictures at a time, so memory is bounded whatever the number of faces and views. Where each member sees views of its
    own, they see those of one face at a time.

    Args:
        graph: the FP32 graph of a fold. While something runs, a file stands beside it: weights are read by place.
        pictures: how many at a time, at most; fewer where their tensors would take too much memory.
        threads: how many the runtime may use; None leaves it to the runtime.

    Raises:
        BadInput: if the graph is quantised, or not that of a fold.
    """

    def __init__(self, graph: Path, *, pictures: int = 64, threads: int | None = None) -> None:
        self._path, self._threads = graph, threads
        whole = ir.load(graph).graph
        nodes, self._faces = list(whole), str(whole.inputs[0].name)
        refuse_quantised(nodes, name=graph.name)
        members = [node for node in nodes if in_member(node.name)]
        inside = set(members)
        self._entrances = list(
            dict.fromkeys(
                str(value.name)
                for node in members
                for value in node.inputs
                if value is not None and value.producer() not in inside and _is_float(value)
            )
        )
        if not self._entrances:
            raise BadInput(
                f"{graph.name} is no graph of a fold: no tensor enters its members, needed are pictures.",
                hint="emoexport build",
            )
        self._source = {name: name for name in self._entrances}
        bytes_a_picture = 0
        for node in members:
            for value in node.outputs:
                if _is_float(value):
                    bytes_a_picture += _bytes_a_picture(value)
                    moved = node.inputs[0] if node.op_type in _KEEP_VALUES else None
                    name = str(value.name)
                    self._source[name] = name if moved is None else self._source.get(str(moved.name), name)

        self._pictures = int(np.clip(_ROOM // max(bytes_a_picture, 1), 1, pictures))

    @property
    def tensors(self) -> list[str]:
        """The floating-point tensors of all members, the pictures first."""
        return list(self._source)

    def extremes(
        self, faces: NDArray[np.uint8], *, progress: Progress = lambda _: None
    ) -> dict[str, tuple[float, float]]:
        """Find the lowest and highest value of every tensor.

        Args:
            faces: uint8 `(N, H, W, C)`.
            progress: called with the number of faces done.

        Raises:
            BadData: if a tensor holds something that is not finite.
        """
        sources = list(dict.fromkeys(self._source.values()))
        taps = [(name, _reduction(operator)) for name in sources for operator in ("ReduceMin", "ReduceMax")]
        low, high = np.full(len(sources), np.inf), np.full(len(sources), -np.inf)
        for found, _ in self._run(faces, taps, progress):
            pairs = np.array(found, dtype=np.float64).reshape(-1, 2)
            bad = np.flatnonzero(~np.isfinite(pairs).all(axis=1))
            if len(bad):
                raise BadData(
                    f"the activation '{sources[bad[0]]}' is {pairs[bad[0], 0]:g} to {pairs[bad[0], 1]:g} on the "
                    f"calibration faces; needed are finite values in all {len(sources)} tensors.",
                    hint="train again: a member computes nonsense on these faces",
                )
            low, high = np.minimum(low, pairs[:, 0]), np.maximum(high, pairs[:, 1])
        found_by_source = {name: (float(low[i]), float(high[i])) for i, name in enumerate(sources)}
        return {name: found_by_source[source] for name, source in self._source.items()}

    def histograms(
        self,
        faces: NDArray[np.uint8],
        limits: Mapping[str, float],
        *,
        bins: int = 2048,
        progress: Progress = lambda _: None,
    ) -> dict[str, NDArray[np.float64]]:
        """Count the absolute values of tensors.

        Args:
            faces: uint8 `(N, H, W, C)`.
            limits: name to where its last bin ends, above 0; what lies beyond is counted in that bin.
            bins: how many, all of one width, from 0.
            progress: called with the number of faces done.

        Returns:
            Name to float64 `(bins,)`.
        """
        counts = {name: np.zeros(bins) for name in limits}
        for found, _ in self._run(faces, [(name, _whole) for name in limits], progress):
            for (name, limit), values in zip(limits.items(), found, strict=True):
                place = np.minimum(np.abs(values.ravel()) * np.float32(bins / limit), bins - 1).astype(np.int32)
                counts[name] += np.bincount(place, minlength=bins)
        return counts

    def clipped(
        self,
        faces: NDArray[np.uint8],
        limits: Mapping[str, float],
        *,
        progress: Progress = lambda _: None,
    ) -> dict[str, float]:
        """Find which share of a tensor's values lies beyond a limit on either side.

        Args:
            faces: uint8 `(N, H, W, C)`.
            limits: name to the largest absolute value that is represented.
            progress: called with the number of faces done.

        Returns:
            Name to a share, 0 to 1.
        """
        taps = [(name, _share_beyond(limit)) for name, limit in limits.items()]
        total, shares = 0, np.zeros(len(limits))
        for found, pictures in self._run(faces, taps, progress):
            shares += np.array(found, dtype=np.float64) * pictures
            total += pictures
        return dict(zip(limits, (shares / max(total, 1)).tolist(), strict=True))

    def _run(
        self, faces: NDArray[np.uint8], taps: Sequence[tuple[str, _Tap]], progress: Progress
    ) -> Iterator[tuple[list[NDArray[np.float32]], int]]:
        """What taps on tensors give for each handful of pictures, and how many pictures these are."""
        model = ir.load(self._path)
        views = self._open(ir.convenience.extract(model.graph, [self._faces], self._entrances), model.ir_version)
        read = list(dict.fromkeys(name for name, _ in taps))
        members = ir.convenience.extract(model.graph, self._entrances, read)
        values = ir.convenience.create_value_mapping(members)
        members.outputs.clear()
        for number, (name, tap) in enumerate(taps):
            nodes = tap(values[name])
            members.extend(nodes)
            seen = nodes[-1].outputs[0]
            seen.name, seen.type = f"tap.{number}", ir.TensorType(ir.DataType.FLOAT)
            members.outputs.append(seen)
        tapped = self._open(members, model.ir_version)
        taken = {str(value.name) for value in members.inputs}
        step = _FACES if len(self._entrances) == 1 else 1
        for start in range(0, len(faces), step):
            some = faces[start : start + step]
            shown = dict(zip(self._entrances, views.run(None, {self._faces: some}), strict=True))
            for pictures in self._handfuls(shown):
                feeds = {name: part for name, part in pictures.items() if name in taken}
                yield tapped.run(None, feeds), len(next(iter(pictures.values())))
            progress(len(some))

    def _handfuls(self, shown: dict[str, NDArray[np.float32]]) -> Iterator[dict[str, NDArray[np.float32]]]:
        """Pictures by entrance, few at a time; all at once where there are several entrances, of one face then."""
        if len(shown) > 1:
            yield shown
            return
        ((name, pictures),) = shown.items()
        for first in range(0, len(pictures), self._pictures):
            yield {name: pictures[first : first + self._pictures]}

    def _open(self, graph: ir.Graph, ir_version: int) -> ort.InferenceSession:
        """Compile a piece of the graph."""
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = self._threads or 0
        with tempfile.NamedTemporaryFile(dir=self._path.parent, suffix=".onnx") as file:
            ir.save(ir.Model(graph, ir_version=ir_version), file.name)
            return ort.InferenceSession(file.name, options, providers=["CPUExecutionProvider"], enable_fallback=0)


def refuse_quantised(nodes: Iterable[ir.Node], *, name: str = "the graph") -> None:
    """Refuse a graph with 8-bit layers.

    Raises:
        BadInput: if it has any.
    """
    if any(node.op_type == "DequantizeLinear" for node in nodes):
        raise BadInput(f"{name} is quantised already; needed is an FP32 graph.", hint="emoexport build")


def _bytes_a_picture(value: ir.Value) -> int:
    """Of a tensor in FP32, whose dimensions but that of the pictures are numbers."""
    return 4 * math.prod(size for size in value.shape or () if isinstance(size, int))


def _is_float(value: ir.Value) -> bool:
    return value.dtype == ir.DataType.FLOAT and value.const_value is None


def _whole(value: ir.Value) -> list[ir.Node]:
    return [ir.node("Identity", [value])]


def _reduction(operator: str) -> _Tap:
    return lambda value: [ir.node(operator, [value], {"keepdims": 0})]


def _share_beyond(limit: float) -> _Tap:
    def tap(value: ir.Value) -> list[ir.Node]:
        nodes = [ir.node("Constant", [], {"value_float": limit}), ir.node("Abs", [value])]
        nodes.append(ir.node("Greater", [nodes[1].outputs[0], nodes[0].outputs[0]]))
        nodes.append(ir.node("Cast", nodes[2].outputs, {"to": ir.DataType.FLOAT}))
        return [*nodes, ir.node("ReduceMean", nodes[3].outputs, {"keepdims": 0})]

    return tap
