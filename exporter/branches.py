"""One subgraph a member, from a graph that has one subgraph an architecture."""

import ast
from collections.abc import Sequence

import onnx_ir as ir
from onnx_ir.tensor_adapters import TorchTensor
from torch import nn

from emoexport.errors import CheckFailed

__all__ = ["repeat_members", "scopes_of"]

_SCOPES = "pkg.torch.onnx.name_scopes"


def scopes_of(node: ir.Node) -> list[str]:
    """Paths of the modules that an exported node came from, outermost first, and its own name."""
    found: list[str] = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))
    return found


def repeat_members(model: ir.Model, members: Sequence[nn.Module], answering: Sequence[int]) -> None:
    """Give members for which another one answers a subgraph of their own: its nodes, with their weights.

    Exporting costs seconds a member; copying nodes does not. The graph must be as exported, before constants are
    folded: what is made of weights is then made of each member's.

    Args:
        model: a fold, exported within `Branches.one_of_each`.
        members: the branches of that fold.
        answering: by member, whose nodes and weights stand for it.

    Raises:
        CheckFailed: if the logits of a member are not read once for each that it stands for.
    """
    graph = model.graph
    for first in dict.fromkeys(answering):
        alike = [number for number, answer in enumerate(answering) if answer == first]
        nodes = [node for node in graph if _is_computed_by(node, first)]
        inside = set(nodes)
        readers = [node for node in graph if scopes_of(node)[1:-1] == ["members"] and _reads(node, inside)]
        if len(readers) != len(alike):
            raise CheckFailed(f"the export of member {first + 1} is read {len(readers)} times; needed: {len(alike)}.")
        last = nodes[-1]
        for number, reader in zip(alike[1:], readers[1:], strict=True):
            copies: dict[ir.Value | None, ir.Value | None] = {None: None}
            for node in nodes:
                for value in node.inputs:
                    if value is not None and value.is_initializer() and _is_of(value.name or "", first):
                        copies[value] = copies.get(value) or _weight(graph, value, members[number], first, number)
                copy = _copy(node, copies, first, number)
                graph.insert_after(last, copy)
                last = copy
            reader.replace_input_with(0, copies[reader.inputs[0]])


def _is_computed_by(node: ir.Node, number: int) -> bool:
    """Whether a node is a member's. Constants stay where they are: others read them too."""
    return node.op_type != "Constant" and any(_is_of(scope, number) for scope in scopes_of(node))


def _is_of(path: str, number: int) -> bool:
    return f"{path}.".startswith(f"members.{number}.")


def _reads(node: ir.Node, others: set[ir.Node]) -> bool:
    return any(value is not None and value.producer() in others for value in node.inputs)


def _moved(path: str, first: int, number: int) -> str:
    return path.replace(f"members.{first}", f"members.{number}", 1) if _is_of(path, first) else path


def _weight(graph: ir.Graph, value: ir.Value, member: nn.Module, first: int, number: int) -> ir.Value:
    """The same weight of another member, as a new initializer."""
    assert value.name is not None
    name = _moved(value.name, first, number)
    weight = member.get_parameter(name.removeprefix(f"members.{number}."))
    own = ir.Value(name=name, type=value.type, shape=value.shape, const_value=TorchTensor(weight.detach(), name=name))
    graph.register_initializer(own)
    return own


def _copy(node: ir.Node, copies: dict[ir.Value | None, ir.Value | None], first: int, number: int) -> ir.Node:
    outputs = [ir.Value(name=f"{value.name}.{number}", type=value.type, shape=value.shape) for value in node.outputs]
    copy = ir.Node(
        node.domain,
        node.op_type,
        [copies.get(value, value) for value in node.inputs],
        node.attributes.values(),
        overload=node.overload,
        outputs=outputs,
        version=node.version,
        name=f"{node.name}.{number}",
        metadata_props={
            **node.metadata_props,
            _SCOPES: repr([_moved(scope, first, number) for scope in scopes_of(node)]),
        },
    )
    copies.update(zip(node.outputs, outputs, strict=True))
    return copy
