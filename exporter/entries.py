"""What the manifest says of the parts of a bundle."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import nn

from emoexport.flops import gflop_a_pass, parameters_of
from emoexport.manifest import GraphEntry, MemberEntry, ViewEntry
from emoexport.onnx_graph import operators, opset_of
from emoexport.train.checkpoint import MemberRecord
from emoexport.train.config import ModelConfig
from emoexport.views import View

__all__ = ["graph_entry", "member_entries", "view_entry"]


def member_entries(
    records: Sequence[MemberRecord], members: Sequence[nn.Module], weights: Sequence[float]
) -> tuple[MemberEntry, ...]:
    """What the manifest says of each member: of its weights, of what it costs, and of its weight in the vote."""
    costs: list[tuple[ModelConfig, float]] = []  # of each configuration
    entries = []
    for record, member, weight in zip(records, members, weights, strict=True):
        model = record.model
        gflop = next((cost for known, cost in costs if known == model), None)
        if gflop is None:
            gflop = gflop_a_pass(member, (model.channels, model.image_size, model.image_size))
            costs.append((model, gflop))
        entries.append(
            MemberEntry(
                sha256=record.sha256,
                backbone=model.backbone,
                epoch=record.epoch,
                validation_accuracy=record.validation_accuracy,
                parameters=parameters_of(member),
                gflop_a_pass=gflop,
                weight=weight,
            )
        )
    return tuple(entries)


def view_entry(view: View, first: View, weight: float) -> ViewEntry:
    """What the manifest says of a view, where `first` is the earliest that shows the same picture."""
    return ViewEntry(
        name=view.name,
        function=view.function.__name__,
        parameters=dict(view.parameters),
        mirrored=view.mirrored,
        weight=weight,
        same_as=None if first is view else first.name,
    )


def graph_entry(file: Path, kept: Mapping[str, tuple[str, ...]]) -> GraphEntry:
    """What the manifest says of a graph: of its file, and of what its conversion left as it was and why."""
    return GraphEntry(file=file.name, opset=opset_of(file), operators=operators(file), kept=dict(kept))
