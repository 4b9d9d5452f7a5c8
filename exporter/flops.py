"""What a forward pass costs, counted rather than measured."""

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["gflop_a_pass", "parameters_of"]


def gflop_a_pass(member: nn.Module, picture_shape: tuple[int, int, int]) -> float:
    """Floating-point operations of one member on one picture.

    Counted are convolutions and matrix products, those of attention among them, at 2 operations a multiply-add.
    Not counted are biases, normalisation, activations, pooling, softmax and all else that is elementwise, nor the
    views. Nothing is computed: only shapes go through the network.

    Args:
        member: a network in evaluation mode.
        picture_shape: `(C, H, W)`.

    Returns:
        10^9 operations.
    """
    parameter = next(member.parameters())
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        sdpa_kernel(SDPBackend.MATH),  # the CPU's fused attention is a kernel that the counter does not know
        FlopCounterMode(display=False) as counter,
        torch.inference_mode(),
    ):
        member(torch.zeros(1, *picture_shape, dtype=parameter.dtype, device=parameter.device))
    return float(counter.get_total_flops()) / 1e9


def parameters_of(member: nn.Module) -> int:
    """How many numbers training has set: the parameters of all layers, without buffers."""
    return sum(parameter.numel() for parameter in member.parameters())
