"""Graphs of single passes: one a member, which takes faces with the number of a view each.

A cascade asks for other passes of other faces at every stage. A graph for each stage would hold the weights of most
members again; this way each stands once, and whatever a stage asks is one call a member. The member's part is cut out
of a graph of the bundle, with its weights and its types of numbers as they are, so every precision that a bundle has
needs no conversion and no calibration of its own.

The number of the view stands in one more row of pixels below the face. So such a graph has the inputs and outputs of a
fold of one member and one view, and whatever opens, compiles or keeps folds takes it as it is.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from emoexport.decision import Decision
from emoexport.errors import CheckFailed, UsageError
from emoexport.fold import Fold
from emoexport.onnx_graph import check_graph, export_fold, save_graph
from emoexport.views import VIEWS, View

__all__ = ["NumberedShow", "write_pass_graphs"]

_ROUNDING = 1e-6
"""Of a pixel in [0, 1] that is sampled from four, by the order of sums."""


class NumberedShow(nn.Module):
    """The view that each face asks for, by tables: what becomes of each level, and which pixels are read.

    Args:
        views: at most 256.
        face_shape: `(H, W, C)`.

    Raises:
        UsageError: if there are more views, or one is not as its tables have it.
    """

    levels: Tensor
    taps: Tensor
    shares: Tensor

    def __init__(self, views: Sequence[View], face_shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.height, self.width, self.channels = face_shape
        if len(views) > 256:
            raise UsageError(f"found {len(views)} views; numbers in a pixel end at 256.")
        tables = [view.taps(self.height, self.width) for view in views]
        self.register_buffer("levels", torch.from_numpy(np.concatenate([view.levels() for view in views])))
        self.register_buffer("taps", torch.from_numpy(np.stack([taps.ravel() for taps, _ in tables])))
        self.register_buffer("shares", torch.from_numpy(np.stack([share.ravel() for _, share in tables])).float())
        self._check(views)

    def forward(self, faces: Tensor, dtype: torch.dtype) -> Tensor:
        """Faces uint8 `(N, H + 1, W, C)` to pictures `(N, C, H, W)` in [0, 1]."""
        values = faces.to(dtype)  # in this order: TensorRT cuts and transposes no uint8
        number = values[:, self.height, 0, 0].to(torch.int64)
        pixels = values[:, : self.height].to(torch.int64).permute(0, 3, 1, 2).flatten(2)
        light = self.levels[pixels + 256 * number[:, None, None]]
        read = light.gather(2, self.taps[number][:, None].expand(-1, self.channels, -1))
        four = (read * self.shares[number][:, None]).view(-1, self.channels, 4, self.height, self.width)
        return four[:, :, 0] + four[:, :, 1] + four[:, :, 2] + four[:, :, 3]

    def _check(self, views: Sequence[View]) -> None:
        """Hold the tables against the views themselves, on faces of random pixels."""
        shape = (1, self.height, self.width, self.channels)
        face = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        pictures = torch.from_numpy(face).float().permute(0, 3, 1, 2) / 255
        for number, view in enumerate(views):
            below = np.full((1, 1, *shape[2:]), number, dtype=np.uint8)
            shown = self(torch.from_numpy(np.concatenate([face, below], axis=1)), torch.float32)
            if not torch.allclose(shown, view(pictures), rtol=0, atol=_ROUNDING):
                raise UsageError(
                    f"the view {view.name} both moves pixels and changes their light, or moves them in a way that "
                    "`views.MOVES` does not tell; a cascade cannot show it.",
                    hint="emoexport build --view leaves views out",
                )


class _Slot(nn.Module):
    """Stands in the exported graph where a member will."""

    def __init__(self, labels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, labels))

    def forward(self, pictures: Tensor) -> Tensor:
        return pictures.mean(dim=(1, 2, 3))[:, None] * self.weight


def write_pass_graphs(
    graph: Path,
    folder: Path,
    *,
    members: int,
    views: Sequence[View],
    labels: tuple[str, ...],
    face_shape: tuple[int, int, int],
    max_batch: int,
) -> list[Path]:
    """Write a graph for each member of a fold.

    Args:
        graph: of a bundle, in any precision, with members as branches.
        folder: that gets `member-1.onnx` and so on.
        members: how many the fold has.
        views: in the order in which they are numbered.
        labels: the emotions.
        face_shape: `(H, W, C)`.
        max_batch: the largest number of rows in a call.

    Returns:
        The files, member by member. Each takes uint8 `(n, H + 1, W, C)` with the number of a view in the first pixel of
        the last row, and answers like a fold of one pass, scores `(n, 1, 1, L)`.

    Raises:
        UsageError: if the members of the graph are stacked, or a view cannot be numbered.
        CheckFailed: if what was written is no valid graph.
    """
    height, width, channels = face_shape
    fold = Fold([_Slot(len(labels))], [VIEWS["identity"]], Decision(labels=labels))
    show: nn.Module = NumberedShow(views, face_shape)
    fold.show = show  # type: ignore[assignment]
    fold.eval()
    files = []
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        frame = Path(scratch) / "frame.onnx"
        export_fold(fold, frame, face_shape=(height + 1, width, channels), max_batch=max_batch)
        for number in range(members):
            files.append(folder / f"member-{number + 1}.onnx")
            save_graph(_put_in(ir.load(frame), ir.load(graph), number), files[-1])
            check_graph(files[-1], face_shape=(height + 1, width, channels))
    return files


def _logits(graph: ir.Graph) -> list[ir.Value]:
    """What each member of a fold puts out, in FP32."""
    softmax = next(node for node in graph if node.op_type == "Softmax" and str(node.name).startswith("score/"))
    stack = softmax.inputs[0]
    producer = stack.producer() if stack is not None else None
    each = [stack] if producer is None or producer.op_type != "Concat" else list(producer.inputs)
    found = [value.producer() for value in each if value is not None]
    if any(node is None or node.op_type != "Unsqueeze" for node in found):
        raise UsageError(
            "the members are stacked; a cascade calls each alone.", hint="emoexport build --layout branches"
        )
    return [node.inputs[0] for node in found if node is not None and node.inputs[0] is not None]


def _put_in(frame: ir.Model, fold: ir.Model, number: int) -> ir.Model:
    """A frame with the nodes of a member of a fold in its slot; both graphs are used up."""
    logits = _logits(fold.graph)[number]
    nodes, weights, shown = _behind(logits)
    if len(shown) != 1:
        raise CheckFailed(f"member {number + 1} reads {len(shown)} pictures; needed is one.")
    graph = frame.graph
    slot = [node for node in graph if str(node.name).startswith("members.0")]
    (pictures,) = (value for node in slot for value in node.inputs if value is not None and _is_shown(value))
    for node in nodes:
        for index, value in enumerate(node.inputs):
            if value in shown:
                node.replace_input_with(index, pictures)
    for use in [use for use in logits.uses() if use.node not in nodes]:
        use.node.replace_input_with(use.idx, None)
    placed = [node for node in fold.graph if node in nodes]
    fold.graph.remove(placed)
    for weight in weights:
        del fold.graph.initializers[str(weight.name)]
        weight.name = f"member.{weight.name}"
        graph.register_initializer(weight)
    for node in placed:
        for value in node.outputs:
            value.name = f"member.{value.name}"
    graph.insert_before(slot[0], placed)
    for use in list(slot[-1].outputs[0].uses()):
        use.node.replace_input_with(use.idx, logits)
    graph.remove(slot, safe=True)
    frame.opset_imports[""] = fold.opset_imports[""]
    for name in [name for name, value in graph.initializers.items() if not value.uses()]:
        del graph.initializers[name]
    return frame


def _behind(logits: ir.Value) -> tuple[set[ir.Node], list[ir.Value], set[ir.Value]]:
    """All that computes logits from pictures: nodes and weights; and the pictures."""
    nodes: set[ir.Node] = set()
    weights: dict[ir.Value, None] = {}
    shown: set[ir.Value] = set()
    waiting = [logits]
    while waiting:
        value = waiting.pop()
        producer = value.producer()
        if value.is_initializer():
            weights[value] = None
        elif producer is None or _is_shown(value):
            shown.add(value)
        elif producer not in nodes:
            nodes.add(producer)
            waiting += [each for each in producer.inputs if each is not None]
    return nodes, list(weights), shown


def _is_shown(value: ir.Value) -> bool:
    producer = value.producer()
    return producer is not None and str(producer.name).startswith("show/")
