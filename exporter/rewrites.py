"""Exact rewrites of a traced member: what can be computed once, into the weights, is not computed for every face.

A scale or a shift of each channel before or after a linear layer (a convolution or a matrix product) is part of
that layer; in real arithmetic nothing changes. What is summed is summed in float64.

To add a rewrite, write one function and one row.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, MutableSequence, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from emoexport.errors import CheckFailed
from emoexport.member_graph import MemberGraph, trace

__all__ = ["REWRITES", "prepare_members", "rewrite"]

aten = torch.ops.aten

LINEAR = {aten.linear.default, aten.conv1d.default, aten.conv2d.default}
"""Layers: `(input, weight, bias, ...)`, the weight `(out, in / groups, ...)`."""


def prepare_members(
    members: MutableSequence[Any], configurations: Sequence[object], picture_shape: tuple[int, int, int]
) -> tuple[list[MemberGraph], dict[str, int]]:
    """Trace and rewrite the members of an ensemble, and hold each against what it was.

    Args:
        members: `nn.Module` each, in evaluation mode, pictures `(n, C, H, W)` to logits `(n, L)`. The list is
            emptied, so that no weight is kept twice.
        configurations: of each member; those that are equal are traced once.
        picture_shape: `(C, H, W)`.

    Returns:
        The rewritten members, and as `rewrite` how many nodes were taken out of all of them together.

    Raises:
        CheckFailed: if a rewritten member is not what it was.
    """
    traced: list[tuple[object, MemberGraph]] = []
    ready: list[MemberGraph] = []
    found: Counter[str] = Counter()
    for configuration in configurations:
        member = members.pop(0)
        original = next((graph for known, graph in traced if known == configuration), None)
        if original is None:
            original = trace(member, picture_shape)
            traced.append((configuration, original))
        rewritten = original.with_weights_of(member)
        found.update(rewrite(rewritten))
        _require_the_same(member, rewritten, picture_shape, number=len(ready) + 1)
        ready.append(rewritten)
    return ready, {name: found[name] for name in REWRITES if found[name]}


_LARGEST_DIFFERENCE = 1e-4
"""Of a probability, between a member and its rewriting: FP32 rounds far less, and a wrong rewrite errs far more."""


@torch.inference_mode()
def _require_the_same(
    member: nn.Module, rewritten: MemberGraph, picture_shape: tuple[int, int, int], *, number: int
) -> None:
    pictures = torch.rand(1, *picture_shape, generator=torch.Generator().manual_seed(0))
    pictures = pictures.to(next(member.parameters()).dtype)
    before, after = member(pictures).softmax(dim=1), rewritten(pictures).softmax(dim=1)
    difference = float((before - after).abs().max())
    if not difference <= _LARGEST_DIFFERENCE:
        raise CheckFailed(
            f"member {number} gives other probabilities once it is rewritten, by up to {difference:.2g}; needed is "
            f"less than {_LARGEST_DIFFERENCE:g}."
        )


def rewrite(member: MemberGraph) -> dict[str, int]:
    """Rewrite a member in place, by all rows of `REWRITES` in their order; then linear layers to matrix products.

    Its weights are replaced, not written into: the network that was traced keeps its own.

    Returns:
        By name, how many nodes each took out; rows that found nothing are left out.
    """
    found = {name: apply(member) for name, apply in REWRITES.items()}
    _store_transposed(member)
    member.graph.eliminate_dead_code()
    member.settle()
    return {name: count for name, count in found.items() if count}


def _drop_idle(member: MemberGraph) -> int:
    """Take out what does nothing once training is over: dropout, assertions, detachments, casts to the same type."""
    count = 0
    for node in list(member.graph.nodes):
        if node.target is aten._assert_tensor_metadata.default:
            member.graph.erase_node(node)
            count += 1
        elif node.target in IDLE or (node.target in CASTS and _same_type(node)):
            node.replace_all_uses_with(node.args[0])
            member.graph.erase_node(node)
            count += 1
    return count


IDLE = {aten.dropout.default, aten.detach.default, aten.alias.default, aten.clone.default}
CASTS = {aten.to.dtype, aten._to_copy.default}


def _same_type(node: Any) -> bool:
    return bool(node.meta["val"].dtype == node.args[0].meta["val"].dtype)


def _fold_batch_norm(member: MemberGraph) -> int:
    """Batch normalisation after a linear layer: at inference a scale and a shift of each channel."""
    count = 0
    for node in _nodes(member, aten._native_batch_norm_legit_no_training.default):
        source, weight, bias, mean, variance, _, epsilon = node.args
        results = list(node.users)  # item 0; the statistics after it have no readers
        if len(results) != 1:
            continue
        scale = (_tensor(member, variance).double() + epsilon).rsqrt()
        if weight is not None:
            scale = scale * _tensor(member, weight).double()
        shift = -_tensor(member, mean).double() * scale
        if bias is not None:
            shift = shift + _tensor(member, bias).double()
        if _into_previous(member, source, 1, Affine(scale, shift), reader=node):
            _replace(member, results[0], source)
            member.graph.erase_node(node)
            count += 1
    return count


def _fold_layer_scale(member: MemberGraph) -> int:
    """A learned scale of each channel after a linear layer, as the blocks of ConvNeXt have it."""
    count = 0
    for node in _nodes(member, aten.mul.Tensor):
        operands = _with_constant(member, node)
        if operands is None:
            continue
        source, axis, values = operands
        if _into_previous(member, source, axis, Affine(values, None), reader=node):
            _replace(member, node, source)
            count += 1
    return count


def _fold_normalisation(member: MemberGraph) -> int:
    """Mean and standard deviation of the pictures, and all else that scales or shifts channels before a layer."""
    count = 0
    for node in reversed(_nodes(member, *ARITHMETIC)):  # the last first: it stands next to the layer
        operands = _with_constant(member, node)
        if operands is None:
            continue
        source, axis, values = operands
        if _into_next(member, node, axis, ARITHMETIC[node.target](values)):
            _replace(member, node, source)
            count += 1
    return count


def _fold_layer_norm(member: MemberGraph) -> int:
    """Weight and bias of a LayerNorm over the channels; the normalisation itself stays."""
    count = 0
    for node in _nodes(member, aten.layer_norm.default):
        source, shape, weight, bias, *rest = (*node.args, None, None) if len(node.args) < 4 else node.args
        if weight is None or len(shape) != 1:
            continue
        scale = _tensor(member, weight).double()
        shift = None if bias is None else _tensor(member, bias).double()
        if _into_next(member, node, node.meta["val"].dim() - 1, Affine(scale, shift)):
            node.args = (source, shape, None, None, *rest)
            count += 1
    return count


def _power_by_logarithm(member: MemberGraph) -> int:
    """A power of positive numbers as exp(p log x): runtimes have fast kernels for these two, and none for powers."""
    count = 0
    for node in _nodes(member, aten.pow.Tensor_Tensor, aten.pow.Tensor_Scalar):
        base, power = node.args
        if not _is_positive(base) or (not isinstance(power, fx.Node) and float(power).is_integer()):
            continue
        with member.graph.inserting_before(node):
            result = base
            for target, rest in ((aten.log.default, ()), (aten.mul.Tensor, (power,)), (aten.exp.default, ())):
                result = member.graph.call_function(target, (result, *rest))
                result.meta = dict(node.meta)
        _replace(member, node, result)
        count += 1
    return count


POSITIVE = {aten.exp.default, aten.sigmoid.default}
"""What gives positive numbers whatever goes in."""
KEEP_POSITIVE = {
    aten.amax.default,
    aten.div.Tensor,
    aten.expand.default,
    aten.mean.dim,
    aten.mul.Tensor,
    aten.pow.Tensor_Tensor,
    aten.reshape.default,
    aten.sqrt.default,
    aten.view.default,
}
"""What makes positive numbers of positive numbers."""


def _is_positive(node: Any) -> bool:
    """Whether a value is above 0 wherever it is finite, as far as its operators tell."""
    if not isinstance(node, fx.Node):
        return isinstance(node, int | float) and node > 0
    if node.target is aten.clamp.default:
        return len(node.args) > 1 and isinstance(node.args[1], int | float) and node.args[1] > 0
    if node.target in KEEP_POSITIVE:
        count = 2 if node.target in {aten.div.Tensor, aten.mul.Tensor} else 1
        return all(_is_positive(argument) for argument in node.args[:count])
    return node.target in POSITIVE


REWRITES: Mapping[str, Callable[[MemberGraph], int]] = {
    "idle": _drop_idle,
    "batch-norm": _fold_batch_norm,
    "layer-scale": _fold_layer_scale,
    "normalisation": _fold_normalisation,
    "layer-norm": _fold_layer_norm,
    "power": _power_by_logarithm,
}
"""In the order in which they are applied. Each returns how many nodes it took out, or replaced."""


@dataclass(frozen=True)
class Affine:
    """Of each channel a scale and a shift, float64 `(C,)` both.

    Where there is a shift it is kept even if it is 0, so that members whose weights differ keep the same operators.
    """

    scale: Tensor
    shift: Tensor | None


ARITHMETIC: Mapping[Any, Callable[[Tensor], Affine]] = {
    aten.add.Tensor: lambda values: Affine(torch.ones_like(values), values),
    aten.sub.Tensor: lambda values: Affine(torch.ones_like(values), -values),
    aten.mul.Tensor: lambda values: Affine(values, None),
    aten.div.Tensor: lambda values: Affine(1 / values, None),
}
"""What an operator with a constant on its right does to each channel."""

COMMUTATIVE = {aten.add.Tensor, aten.mul.Tensor}


def _with_constant(member: MemberGraph, node: fx.Node) -> tuple[fx.Node, int, Tensor] | None:
    """The operand that is computed, its axis of channels, and of the constant one float64 `(C,)`; None if not so."""
    if node.kwargs or len(node.args) != 2:
        return None
    source, constant = node.args
    if node.target in COMMUTATIVE and _is_constant(source):
        source, constant = constant, source
    if not isinstance(source, fx.Node) or _is_constant(source) or not _is_constant(constant):
        return None
    shape = source.meta["val"].shape
    values = _tensor(member, constant)
    sizes = (1,) * (len(shape) - values.dim()) + tuple(values.shape)
    axes = [axis for axis, size in enumerate(sizes) if size > 1] or [1]
    axis = axes[0]
    if len(sizes) > len(shape) or len(axes) > 1 or axis == 0 or sizes[axis] not in {1, shape[axis]}:
        return None
    return source, axis, values.double().reshape(-1).expand(shape[axis])


def _is_constant(argument: Any) -> bool:
    if not isinstance(argument, fx.Node):
        return False
    return argument.op == "get_attr" or (argument.target in MOVES and _is_constant(argument.args[0]))


MOVES = {aten.reshape.default, aten.unsqueeze.default}
"""What may be done to a weight before it is used."""


def _tensor(member: MemberGraph, node: Any) -> Tensor:
    """What a constant node holds."""
    if node.op == "get_attr":
        return member.weight(node.target)
    moved: Tensor = node.target(_tensor(member, node.args[0]), *node.args[1:])
    return moved


def _into_previous(member: MemberGraph, value: Any, axis: int, affine: Affine, *, reader: fx.Node) -> bool:
    """Scale and shift the output of the layer that `value` is from, if nothing but `reader` reads it."""
    while set(value.users) == {reader} and value.target is aten.permute.default:
        axis = value.args[1][axis]
        value, reader = value.args[0], value
    layer = value
    if set(layer.users) != {reader} or layer.target not in LINEAR or axis != _channels(layer):
        return False
    if not _has_own_weights(member, layer):
        return False
    weight, bias = _weights(member, layer)
    scale = affine.scale.reshape(-1, *(1,) * (weight.dim() - 1)).to(weight.dtype)
    _set_weights(member, layer, weight * scale, _sum(None if bias is None else bias * affine.scale, affine.shift))
    return True


def _into_next(member: MemberGraph, value: fx.Node, axis: int, affine: Affine) -> bool:
    """Have all readers of `value` scale and shift it themselves, if all of them are layers that can."""
    layers = list(_layers_after(value, axis))
    if not layers or not all(layer is not None and _can_take(member, layer, affine) for layer in layers):
        return False
    for layer in layers:
        assert layer is not None
        weight, bias = _weights(member, layer)
        groups = _groups(layer)
        grouped = weight.reshape(groups, -1, *weight.shape[1:])  # (groups, out, in, ...)
        scale = affine.scale.reshape(groups, 1, -1, *(1,) * (weight.dim() - 2)).to(weight.dtype)
        added = None
        if affine.shift is not None:
            kernels = grouped.flatten(3).sum(dim=3, dtype=torch.float64) if weight.dim() > 2 else grouped.double()
            added = torch.bmm(kernels, affine.shift.reshape(groups, -1, 1)).flatten()
        _set_weights(member, layer, (grouped * scale).reshape(weight.shape), _sum(bias, added))
    return True


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return one if other is None else other
    return one + other


def _layers_after(value: fx.Node, axis: int) -> Iterator[fx.Node | None]:
    """The layers that read a value, through permutations; None for every other reader."""
    for user in value.users:
        if user.target is aten.permute.default:
            yield from _layers_after(user, list(user.args[1]).index(axis))  # type: ignore[arg-type]
        else:
            reads = user.target in LINEAR and user.args[0] is value and value not in user.args[1:]
            yield user if reads and axis == _channels(user) else None


def _can_take(member: MemberGraph, layer: fx.Node, affine: Affine) -> bool:
    """Zeros that a convolution adds around its input are not shifted."""
    padding: Any = layer.args[4] if len(layer.args) > 4 else ()
    return _has_own_weights(member, layer) and not (any(padding) and affine.shift is not None)


def _channels(layer: fx.Node) -> int:
    """The axis of the channels, of the input as of the output."""
    return int(layer.meta["val"].dim()) - 1 if layer.target is aten.linear.default else 1


def _groups(layer: fx.Node) -> int:
    return layer.args[6] if len(layer.args) > 6 else 1  # type: ignore[return-value]


def _has_own_weights(member: MemberGraph, layer: fx.Node) -> bool:
    """Whether weight and bias are parameters that nothing else reads."""
    for argument in layer.args[1:3]:
        if argument is None:
            continue
        if not isinstance(argument, fx.Node) or argument.op != "get_attr":
            return False
        same = [node for node in member.graph.nodes if node.op == "get_attr" and node.target == argument.target]
        if sum(len(node.users) for node in same) != 1:
            return False
    return True


def _weights(member: MemberGraph, layer: fx.Node) -> tuple[Tensor, Tensor | None]:
    """Weight, and bias in float64."""
    bias = layer.args[2] if len(layer.args) > 2 else None
    return _tensor(member, layer.args[1]), None if bias is None else _tensor(member, bias).double()


def _set_weights(member: MemberGraph, layer: Any, weight: Tensor, bias: Tensor | None) -> None:
    """Give a layer another weight, and a bias in its type; one too where it had none."""
    kernel = layer.args[1]
    member.set_weight(kernel.target, weight)
    if bias is None:
        return
    if len(layer.args) > 2 and layer.args[2] is not None:
        member.set_weight(layer.args[2].target, bias.to(weight.dtype))
        return
    target = f"{kernel.target}_shift"
    member.set_weight(target, bias.to(weight.dtype))
    with member.graph.inserting_before(layer):
        layer.args = (*layer.args[:2], member.graph.get_attr(target), *layer.args[3:])


def _store_transposed(member: MemberGraph) -> None:
    """Linear layers as the product and the sum that they are, with the weight `(in, out)` that a product reads.

    An exporter would transpose it in the graph, which holds the largest weights twice for a while.
    """
    for node in _nodes(member, aten.linear.default):
        source, kernel, *bias = node.args
        if not _has_own_weights(member, node):
            continue
        member.set_weight(kernel.target, member.weight(kernel.target).T.contiguous())
        with member.graph.inserting_before(node):
            result = member.graph.call_function(aten.matmul.default, (source, kernel))
            result.meta = dict(node.meta)
            if bias and bias[0] is not None:
                result = member.graph.call_function(aten.add.Tensor, (result, bias[0]))
                result.meta = dict(node.meta)
        _replace(member, node, result)


def _nodes(member: MemberGraph, *targets: Any) -> list[Any]:
    """In their order; as Any, since what their arguments are is known by their operator."""
    return [node for node in member.graph.nodes if node.target in targets]


def _replace(member: MemberGraph, node: fx.Node, by: Any) -> None:
    node.replace_all_uses_with(by)
    member.graph.erase_node(node)
