"""The stacked layout: members of one architecture run as one network, each operator once for all K of them.

K linear layers become one batched matrix product; K convolutions become one, over K times the channels in K times
the groups. A value in the graph is either the same for all members or has an axis K. `RULES` says what an operator
does with that axis; what has no rule is computed member by member.
"""

# ruff: noqa: ARG001 (all rules take the same arguments)

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from emoexport.errors import UsageError
from emoexport.member_graph import MemberGraph, interpret

__all__ = ["RULES", "Stacked", "one_architecture"]

aten = torch.ops.aten


class Stacked(nn.Module):
    """All members as one: pictures `(n, C, H, W)` to logits `(K, n, L)`.

    Args:
        members: traced networks of one architecture. They are used up: their weights move here.

    Raises:
        UsageError: if the members differ in more than the values of their weights.
    """

    def __init__(self, members: Sequence[MemberGraph]) -> None:
        super().__init__()
        if not one_architecture(members):
            raise UsageError(
                "the members differ in architecture: they cannot be stacked.",
                hint="--layout branches",
            )
        self.count = len(members)
        self.per_member = _stack_weights(members)
        self.graph_module = members[0].graph_module
        members[0].place("members.stacked")

    def __len__(self) -> int:
        return self.count

    def forward(self, pictures: Tensor) -> Tensor:
        """Pictures `(n, C, H, W)` in [0, 1] to logits `(K, n, L)`."""
        logits: PerMember = interpret(_StackedRun(self), pictures)
        return logits.at(0)


@dataclass(frozen=True)
class PerMember:
    """A value of which each member has its own."""

    tensor: Tensor
    axis: int
    """Of the members in `tensor`; the others are the axes of one member's value, in their order."""

    @property
    def rank(self) -> int:
        """How many axes one member's value has."""
        return self.tensor.dim() - 1

    def at(self, axis: int, rank: int | None = None) -> Tensor:
        """The tensor with the members at `axis`, and with axes of size 1 put in front of one member's up to `rank`."""
        added = 0 if rank is None else rank - self.rank
        if not added:
            return self.tensor.movedim(self.axis, axis)
        first = self.tensor.movedim(self.axis, 0)
        if axis <= added:
            return first.reshape(*(1,) * axis, len(first), *(1,) * (added - axis), *first.shape[1:])
        return first.reshape(len(first), *(1,) * added, *first.shape[1:]).movedim(0, axis)

    def place(self, axis: int) -> int:
        """Where in `tensor` an axis of one member's value is, counted from either end."""
        axis %= self.rank
        return axis + (axis >= self.axis)

    def before(self, axes: Iterable[int]) -> int:
        """How many of these axes of one member's value come before that of the members."""
        return sum(axis % self.rank < self.axis for axis in axes)


def one_architecture(members: Sequence[MemberGraph]) -> bool:
    """Whether traced networks differ in nothing but the values of their weights."""
    first = _structure(members[0])
    return all(_structure(member) == first for member in members[1:])


def _structure(member: MemberGraph) -> list[Any]:
    return [
        (str(node.format_node()), member.weight(node.target).shape if node.op == "get_attr" else None)
        for node in member.graph.nodes
    ]


def _stack_weights(members: Sequence[MemberGraph]) -> frozenset[str]:
    """Move the weights of all members into the first: each once, in the form in which it is used.

    Returns:
        The targets that are stacked with the axis K in front. Others are the same for all members, or belong to
        layers and are in the form that the rule of the layer wants.
    """
    first = members[0]
    uses: dict[str, set[tuple[Any, int]]] = {}
    for node in first.graph.nodes:
        if node.op == "get_attr":
            where = {(user.target, user.args.index(node) if node in user.args else 0) for user in node.users}
            uses.setdefault(node.target, set()).update(where)
    stacked = set()
    for target, where in uses.items():
        values = [member.weight(target) for member in members]
        forms = {LAYER_FORMS.get(one) for one in where}
        form = next(iter(forms)) if len(forms) == 1 else None
        if form is not None:
            first.set_weight(target, form(values))
        elif len(forms) > 1 or not all(torch.equal(one, values[0]) for one in values[1:]):
            first.set_weight(target, torch.stack(values))
            stacked.add(target)
        for member in members[1:]:
            member.drop_weight(target)
    return frozenset(stacked)


def _products(weights: Sequence[Tensor]) -> Tensor:
    """K weights `(D, C)` of linear layers to `(K, C, D)`, as a matrix product from the left takes them."""
    return torch.stack([weight.T for weight in weights])


def _rows(biases: Sequence[Tensor]) -> Tensor:
    """K biases `(D,)` of linear layers to `(K, 1, D)`."""
    return torch.stack(list(biases)).unsqueeze(1)


LAYER_FORMS: Mapping[tuple[Any, int], Callable[[Sequence[Tensor]], Tensor]] = {
    (aten.linear.default, 1): _products,
    (aten.linear.default, 2): _rows,
    **dict.fromkeys(
        [(layer, place) for layer in (aten.conv1d.default, aten.conv2d.default) for place in (1, 2)],
        lambda weights: torch.cat(list(weights)),
    ),
}
"""By layer and place among its arguments, how the weights of K members are put together."""


class _StackedRun(fx.Interpreter):
    """Runs the graph of one member for all: by the rules, or else member by member."""

    def __init__(self, stacked: Stacked) -> None:
        super().__init__(stacked.graph_module)
        self.count, self.per_member = stacked.count, stacked.per_member

    def run_node(self, n: fx.Node) -> Any:
        self.node = n
        return super().run_node(n)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        return PerMember(value, 0) if target in self.per_member else value

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        own = any(isinstance(leaf, PerMember) for leaf in pytree.tree_leaves((args, kwargs)))
        if not own and (target, 1) not in LAYER_FORMS:
            return super().call_function(target, args, kwargs)
        rule = RULES.get(target) or (_pointwise if torch.Tag.pointwise in getattr(target, "tags", ()) else None)
        found = NotImplemented if rule is None else rule(self, target, *args, **kwargs)
        return self.one_by_one(target, args, kwargs) if found is NotImplemented else found

    def one_by_one(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Compute a function for each member and stack what it returns."""
        results = []
        for member in range(self.count):
            own = pytree.tree_map_only(PerMember, lambda value: value.tensor.select(value.axis, member), (args, kwargs))  # noqa: B023
            results.append(pytree.tree_flatten(target(*own[0], **own[1])))
        leaves = [
            PerMember(torch.stack(same), 0) if isinstance(same[0], Tensor) else same[0]
            for same in zip(*(leaves for leaves, _ in results), strict=True)
        ]
        return pytree.tree_unflatten(leaves, results[0][1])


# In each rule `run` has the number of members and the node; the arguments after `target` are those of the operator.
# NotImplemented leaves the case to `one_by_one`.


def _pointwise(run: _StackedRun, target: Any, *args: Any, **kwargs: Any) -> PerMember:
    leaves = pytree.tree_leaves((args, kwargs))
    owned = [leaf for leaf in leaves if isinstance(leaf, PerMember)]
    rank = max(leaf.rank if isinstance(leaf, PerMember) else leaf.dim() for leaf in leaves if _is_value(leaf))
    axis = max(owned, key=lambda value: value.rank).axis

    def align(value: Any) -> Any:
        if isinstance(value, PerMember):
            return value.at(axis, rank)
        if isinstance(value, Tensor) and value.dim() > rank - axis:
            return value.unsqueeze(value.dim() - (rank - axis))
        return value

    args, kwargs = pytree.tree_map(align, (args, kwargs))
    return PerMember(target(*args, **kwargs), axis)


def _is_value(leaf: Any) -> bool:
    return isinstance(leaf, Tensor | PerMember)


def _linear(run: _StackedRun, target: Any, x: Any, weight: Any, bias: Any = None) -> PerMember:
    weight = weight.at(0).mT if isinstance(weight, PerMember) else weight  # (K, C, D)
    bias = bias.at(0).unsqueeze(1) if isinstance(bias, PerMember) else bias  # (K, 1, D)
    rows = x.at(0) if isinstance(x, PerMember) else x.unsqueeze(0)  # (K or 1, n, ..., C)
    places = rows.shape[2:-1]
    product = torch.matmul(rows.flatten(1, -2) if places else rows, weight)
    if bias is not None:
        product = product + bias
    return PerMember(product.view(run.count, -1, *places, product.shape[-1]) if places else product, 0)


def _convolution(run: _StackedRun, target: Any, x: Any, weight: Any, bias: Any = None, *settings: Any) -> PerMember:
    weight = weight.at(0).flatten(0, 1) if isinstance(weight, PerMember) else weight  # (K * out, in / groups, ...)
    bias = bias.at(0).flatten(0, 1) if isinstance(bias, PerMember) else bias
    ones, zeros = [1] * (weight.dim() - 2), [0] * (weight.dim() - 2)
    defaults: tuple[Any, ...] = (ones, zeros, ones, 1)
    stride, padding, dilation, groups = settings + defaults[len(settings) :]
    if isinstance(x, Tensor) and groups > 1:
        x = PerMember(torch.stack([x] * run.count, dim=1), 1)
    if isinstance(x, PerMember):  # (n, K, C, ...): the channels of all members side by side
        x, groups = x.at(1).flatten(1, 2), groups * run.count
    return _unmerged(run, target(x, weight, bias, stride, padding, dilation, groups))


def _by_channel(run: _StackedRun, target: Any, x: Any, *args: Any, **kwargs: Any) -> PerMember:
    """What treats each channel alone: of all members side by side."""
    return _unmerged(run, target(x.at(1).flatten(1, 2), *args, **kwargs))


def _unmerged(run: _StackedRun, merged: Tensor) -> PerMember:
    """`(n, K * C, ...)` to `(n, K, C, ...)`."""
    return PerMember(merged.view(-1, run.count, merged.shape[1] // run.count, *merged.shape[2:]), 1)


def _by_row(run: _StackedRun, target: Any, *args: Any, **kwargs: Any) -> Any:
    """What treats each row of the batch alone: the rows of all members one after the other."""
    if not all(isinstance(arg, PerMember) for arg in args) or any(_is_value(value) for value in kwargs.values()):
        return NotImplemented
    found: Tensor = target(*(arg.at(0).flatten(0, 1) for arg in args), **kwargs)
    return PerMember(found.view(run.count, -1, *found.shape[1:]), 0)


def _layer_norm(
    run: _StackedRun, target: Any, x: Any, shape: Any, weight: Any = None, bias: Any = None, *settings: Any
) -> Any:
    if isinstance(x, PerMember):
        axis = min(x.axis, 1)
        x = PerMember(target(x.at(axis), shape, None, None, *settings), axis)
    else:
        x = target(x, shape, None, None, *settings)
    for function, values in ((aten.mul.Tensor, weight), (aten.add.Tensor, bias)):
        x = x if values is None else _pointwise(run, function, x, values)
    return x


def _reduction(run: _StackedRun, target: Any, x: Any, axes: Any = None, keepdim: bool = False, **kwargs: Any) -> Any:
    if not axes:
        return NotImplemented
    found = target(x.tensor, [x.place(axis) for axis in axes], keepdim, **kwargs)
    return PerMember(found, x.axis - (0 if keepdim else x.before(axes)))


def _along(run: _StackedRun, target: Any, x: Any, axis: int, *args: Any, **kwargs: Any) -> PerMember:
    """What works along one axis and keeps all of them."""
    return PerMember(target(x.tensor, x.place(axis), *args, **kwargs), x.axis)


def _select(run: _StackedRun, target: Any, x: Any, axis: int, index: Any) -> PerMember:
    return PerMember(target(x.tensor, x.place(axis), index), x.axis - x.before([axis]))


def _unsqueeze(run: _StackedRun, target: Any, x: Any, axis: int) -> PerMember:
    axis %= x.rank + 1
    return PerMember(target(x.tensor, axis + (axis >= x.axis)), x.axis + (axis < x.axis))


def _transpose(run: _StackedRun, target: Any, x: Any, one: int, other: int) -> PerMember:
    return PerMember(target(x.tensor, x.place(one), x.place(other)), x.axis)


def _permute(run: _StackedRun, target: Any, x: Any, axes: Sequence[int]) -> PerMember:
    """One transposition also moves the members where the next layer wants them.

    Layers over channels that come last are matrix products, K first; convolutions want K beside the channels.
    """
    convolved = axes[0] % x.rank == 0 and axes[-1] % x.rank != 1
    order = [x.place(axis) for axis in axes]
    order.insert(int(convolved), x.axis)
    return PerMember(target(x.tensor, order), int(convolved))


def _reshape(run: _StackedRun, target: Any, x: Any, sizes: Sequence[Any]) -> PerMember:
    source: Any = run.node.args[0]
    before, after = (node.meta["val"].shape[:1] for node in (source, run.node))
    if x.axis == 1 and str(before) == str(after):  # text: comparing sizes would make assumptions about them
        return PerMember(aten.reshape.default(x.tensor, [sizes[0], run.count, *sizes[1:]]), 1)
    return PerMember(aten.reshape.default(x.at(0), [run.count, *sizes]), 0)


def _concatenate(run: _StackedRun, target: Any, values: Sequence[Any], axis: int = 0) -> PerMember:
    first = next(value for value in values if isinstance(value, PerMember))
    aligned = [
        value.at(first.axis) if isinstance(value, PerMember) else torch.stack([value] * run.count, dim=first.axis)
        for value in values
    ]
    return PerMember(target(aligned, first.place(axis)), first.axis)


def _matmul(run: _StackedRun, target: Any, x: Any, y: Any) -> Any:
    if not isinstance(y, PerMember) or y.rank < 2 or (isinstance(x, PerMember) and x.rank < 2):
        return NotImplemented
    if y.rank == 2:  # a weight: one product a member over all rows
        return _linear(run, target, x, y.at(0))
    if not isinstance(x, PerMember):
        return NotImplemented
    rank = max(x.rank, y.rank)
    return PerMember(torch.matmul(x.at(0, rank), y.at(0, rank)), 0)


def _item(run: _StackedRun, target: Any, values: Any, index: Any) -> Any:
    return values[index]


RULES: Mapping[Any, Callable[..., Any]] = {
    operator.getitem: _item,
    aten.hardswish.default: _pointwise,
    aten.linear.default: _linear,
    **dict.fromkeys((aten.conv1d.default, aten.conv2d.default), _convolution),
    **dict.fromkeys((aten.matmul.default, aten.bmm.default), _matmul),
    aten.scaled_dot_product_attention.default: _by_row,
    aten.layer_norm.default: _layer_norm,
    **dict.fromkeys((aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.amin.default), _reduction),
    **dict.fromkeys((aten.softmax.int, aten.slice.Tensor), _along),
    **dict.fromkeys(
        (
            aten.upsample_nearest2d.vec,
            aten.upsample_bilinear2d.vec,
            aten.max_pool2d.default,
            aten.avg_pool2d.default,
            aten.adaptive_avg_pool2d.default,
        ),
        _by_channel,
    ),
    aten.select.int: _select,
    aten.unsqueeze.default: _unsqueeze,
    aten.transpose.int: _transpose,
    aten.permute.default: _permute,
    aten.reshape.default: _reshape,
    aten.cat.default: _concatenate,
}
"""What each operator does with the axis of the members; those that PyTorch calls pointwise need no row."""
