"""A member as a graph of tensor operations, which can be read, rewritten and stacked whatever its architecture."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import traceback

__all__ = ["MemberGraph", "in_member", "trace"]


def in_member(name: str | None) -> bool:
    """Whether an exported node with this name belongs to a member, as `MemberGraph.place` names them."""
    return (name or "").startswith("members.")


class MemberGraph(nn.Module):
    """Runs a traced member, node after node: pictures `(n, C, H, W)` to logits `(n, L)`.

    What is exported from it names its nodes for the modules of the member that they were traced from.
    """

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__()
        self.graph_module = graph_module
        self.replaced: set[str] = set()
        """Targets of weights that are no longer those of the traced network."""

    @property
    def graph(self) -> fx.Graph:
        """The nodes: ATen operators without side effects, and `get_attr` nodes that name the weights."""
        return self.graph_module.graph

    def weight(self, target: str) -> Tensor:
        """The weight that `get_attr` nodes with this target read."""
        owner, _, name = target.rpartition(".")
        found: Tensor = getattr(self.graph_module.get_submodule(owner), name)
        return found.detach()

    def set_weight(self, target: str, values: Tensor) -> None:
        """Replace a weight, or add one."""
        self.replaced.add(target)
        owner, _, name = target.rpartition(".")
        setattr(self.graph_module.get_submodule(owner), name, nn.Parameter(values, requires_grad=False))

    def settle(self) -> None:
        """Once the graph was changed: let go of weights that nothing reads, and of the traced network's.

        Those read from safetensors are pieces of the file as it lies in memory; one of them holds all of it there.
        """
        targets = {node.target for node in self.graph.nodes if node.op == "get_attr"}
        weights = {name: self.weight(name) for name in targets}
        own = {name: values if name in self.replaced else values.clone() for name, values in weights.items()}
        self.graph_module = fx.GraphModule(_parameters(own), self.graph)

    def drop_weight(self, target: str) -> None:
        """Let go of a weight."""
        owner, _, name = target.rpartition(".")
        delattr(self.graph_module.get_submodule(owner), name)

    def with_weights_of(self, member: nn.Module) -> "MemberGraph":
        """The same graph, with the weights of another network of the same configuration."""
        weights: dict[str, Tensor] = dict(member.named_buffers(remove_duplicate=False))
        weights |= dict(member.named_parameters(remove_duplicate=False))
        targets = {node.target for node in self.graph.nodes if node.op == "get_attr"}
        graph = fx.Graph()
        graph.output(graph.graph_copy(self.graph, {}))
        # What is no weight of the network is a constant of its code.
        own = {name: weights.get(name, self.weight(name)).detach() for name in targets}
        return MemberGraph(fx.GraphModule(_parameters(own), graph))

    def place(self, path: str) -> None:
        """Say where the member stands in the module that will be exported, such as `members.0`."""
        for node in self.graph.nodes:
            stack = node.meta.setdefault("modules_traced", node.meta.get("nn_module_stack") or {})
            node.meta["nn_module_stack"] = {
                key: (f"{path}.{name}".rstrip("."), kind) for key, (name, kind) in stack.items()
            }

    def forward(self, pictures: Tensor) -> Tensor:
        """Pictures `(n, C, H, W)` in [0, 1] to logits `(n, L)`."""
        logits: Tensor = interpret(fx.Interpreter(self.graph_module), pictures)
        return logits


def _parameters(weights: Mapping[str, Tensor]) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(values, requires_grad=False) for name, values in weights.items()}


def interpret(interpreter: fx.Interpreter, pictures: Tensor) -> Any:
    """Run a graph so that an export of it keeps what each node says of the modules it came from."""
    with traceback.preserve_node_meta():
        return interpreter.run(pictures)


def trace(member: nn.Module, picture_shape: tuple[int, int, int]) -> MemberGraph:
    """Write down what a member computes: ATen operators without side effects, on any number of pictures.

    Args:
        member: a network in evaluation mode, pictures `(n, C, H, W)` to logits `(n, L)`. It stays as it is; the
            graph holds its weights, not copies of them, under its names.
        picture_shape: `(C, H, W)`.
    """
    parameter = next(member.parameters())
    pictures = torch.zeros(2, *picture_shape, dtype=parameter.dtype)
    many = torch.export.Dim("n", min=1, max=1 << 20)
    program = torch.export.export(member, (pictures,), dynamic_shapes=({0: many},), strict=False)
    module = program.run_decompositions({}).module(check_guards=False)
    graph = fx.Graph()
    outputs: Any = graph.graph_copy(module.graph, {})
    graph.output(outputs[0])
    for node in graph.nodes:
        if node.target in VIEWS_OF_MEMORY:
            node.target = torch.ops.aten.reshape.default
    return MemberGraph(fx.GraphModule(module, graph))


VIEWS_OF_MEMORY = {torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default}
"""They ask more of the order of their input in memory than the nodes of a graph that is rewritten can promise."""
