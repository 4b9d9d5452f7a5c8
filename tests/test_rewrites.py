import pytest
import torch
from torch import nn

from emoexport import rewrites
from emoexport.errors import CheckFailed
from emoexport.member_graph import trace
from emoexport.rewrites import REWRITES, prepare_members, rewrite
from emoexport.train.config import ModelConfig
from emoexport.train.emotenet import ConvNeXtEmoteNet

aten = torch.ops.aten

UNPADDED = ModelConfig(
    image_size=32,
    pyramid_channels=16,
    hidden=(16,),
    backbone_args={"patch_size": 4, "depths": (1, 1, 1, 1), "dims": (16, 16, 32, 32), "conv_mlp": False},
)
"""Layer scale and LayerNorm, and a stem that takes the pictures as they are."""
PADDED = ModelConfig(backbone="resnet10t", image_size=32, channels=3, pyramid_channels=16, hidden=(16,))
"""Batch normalisation, and a stem that pads its input."""


def weathered(network: nn.Module) -> nn.Module:
    """In float64 and evaluation mode, with no weight left at its initial value, nor any statistic."""
    torch.manual_seed(3)
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    for name, buffer in network.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.copy_(0.5 + torch.rand_like(buffer))
    return network.double().eval()


class Scaled(nn.Module):
    """A linear layer between a LayerNorm and a layer scale."""

    def __init__(self, *, bias: bool = True) -> None:
        super().__init__()
        self.norm, self.layer, self.gamma = nn.LayerNorm(8), nn.Linear(8, 6, bias=bias), nn.Parameter(torch.ones(6))

    def forward(self, pictures):
        rows = self.norm(pictures.permute(0, 2, 3, 1))
        return (self.layer(rows) * self.gamma).permute(0, 3, 1, 2)


class Normalised(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.register_buffer("mean", torch.linspace(0.2, 0.6, 8).reshape(-1, 1, 1))
        self.register_buffer("std", torch.linspace(0.1, 0.4, 8).reshape(-1, 1, 1))

    def forward(self, pictures):
        return self.layer((pictures - self.mean) / self.std)


class TwoReaders(Scaled):
    """A LayerNorm that is read twice, once past the layer, and a layer that is read before its scale."""

    def forward(self, pictures):
        rows = self.norm(pictures.permute(0, 2, 3, 1))
        out = self.layer(rows)
        return (out * self.gamma).mean(dim=-1) + out.mean(dim=-1) + rows.mean(dim=-1)


class Shared(Scaled):
    """One layer for two inputs: what one of them needs, the other does not."""

    def forward(self, pictures):
        rows = pictures.permute(0, 2, 3, 1)
        return self.layer(self.norm(rows)) + self.layer(rows) * self.gamma


class Powers(nn.Module):
    """A learned power of what is at least so large, and a square, which runtimes multiply."""

    def __init__(self, least: float) -> None:
        super().__init__()
        self.power, self.least = nn.Parameter(torch.tensor([2.7])), least

    def forward(self, pictures):
        return (pictures.clamp(min=self.least) / 3).pow(self.power) + pictures.clamp(min=1e-3) ** 2


class Tied(Scaled):
    """Two layers with one weight, under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Linear(8, 6)
        self.again.weight = self.layer.weight

    def forward(self, pictures):
        return super().forward(pictures) + self.again(pictures.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@pytest.mark.parametrize(
    ("network", "wanted", "left"),
    [
        (Scaled(), {"layer-scale": 1, "layer-norm": 1}, {aten.mul.Tensor: 0}),
        (Scaled(bias=False), {"layer-scale": 1, "layer-norm": 1}, {aten.mul.Tensor: 0}),
        (TwoReaders(), {}, {aten.mul.Tensor: 1}),
        (Shared(), {}, {aten.mul.Tensor: 1}),
        (Normalised(nn.Conv2d(8, 4, 3)), {"normalisation": 2}, {aten.sub.Tensor: 0, aten.div.Tensor: 0}),
        (Normalised(nn.Conv2d(8, 4, 3, bias=False)), {"normalisation": 2}, {aten.sub.Tensor: 0, aten.div.Tensor: 0}),
        (Normalised(nn.Conv2d(8, 6, 3, groups=2)), {"normalisation": 2}, {aten.sub.Tensor: 0, aten.div.Tensor: 0}),
        # The zeros around the pictures stand for the mean: only the scale can move past them.
        (Normalised(nn.Conv2d(8, 4, 3, padding=1)), {"normalisation": 1}, {aten.sub.Tensor: 1, aten.div.Tensor: 0}),
        (Normalised(nn.Conv2d(8, 8, 3, groups=8)), {"normalisation": 2}, {aten.sub.Tensor: 0}),
        (nn.Sequential(nn.Conv2d(8, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)), {"batch-norm": 1}, {}),
        (nn.Sequential(nn.Conv2d(8, 6, 3, groups=2), nn.BatchNorm2d(6, affine=False)), {"batch-norm": 1}, {}),
        (nn.Sequential(nn.ReLU(), nn.BatchNorm2d(8)), {}, {aten._native_batch_norm_legit_no_training.default: 1}),
        (Tied(), {}, {aten.mul.Tensor: 1}),
        (nn.Sequential(nn.Dropout(0.5), nn.Conv2d(8, 4, 1)), {}, {aten.dropout.default: 0}),
        (Powers(1e-3), {"power": 1}, {aten.exp.default: 1, aten.pow.Tensor_Tensor: 0, aten.pow.Tensor_Scalar: 1}),
        # What may be 0 or less has no logarithm.
        (Powers(0.0), {}, {aten.exp.default: 0, aten.pow.Tensor_Tensor: 1}),
    ],
)
def test_each_rewrite_is_exact_in_float64_and_takes_its_nodes_out(network, wanted, left):
    network = weathered(network)
    pictures = torch.rand(3, 8, 7, 7, dtype=torch.float64)
    traced = trace(network, (8, 7, 7))
    found = rewrite(traced)
    with torch.inference_mode():
        assert (traced(pictures) - network(pictures)).abs().max() < 1e-12
    assert found == wanted
    targets = [node.target for node in traced.graph.nodes]
    assert {target: targets.count(target) for target in left} == left
    norms = [node for node in traced.graph.nodes if node.target is aten.layer_norm.default]
    assert all((node.args[2] is None) == ("layer-norm" in wanted) for node in norms)
    if "batch-norm" in wanted:
        assert aten._native_batch_norm_legit_no_training.default not in targets


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        (UNPADDED, {"idle", "batch-norm", "layer-scale", "normalisation", "layer-norm", "power"}),
        (PADDED, {"idle", "batch-norm", "normalisation", "power"}),
    ],
)
def test_a_rewritten_member_is_the_member_in_float64(config, wanted):
    network = weathered(ConvNeXtEmoteNet(config))
    channels = config.channels
    before = {name: value.clone() for name, value in network.state_dict().items()}
    traced = trace(network, (channels, 32, 32))
    assert set(rewrite(traced)) == wanted
    pictures = torch.rand(5, channels, 32, 32, dtype=torch.float64)
    with torch.inference_mode():
        assert (traced(pictures) - network(pictures)).abs().max() < 1e-12
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


@pytest.mark.slow
def test_members_of_one_configuration_are_traced_once_and_keep_their_own_weights(networks, monkeypatch):
    calls = []
    monkeypatch.setattr(rewrites, "trace", lambda *arguments: calls.append(1) or trace(*arguments))
    given = list(networks)
    ready, found = prepare_members(given, ["same"] * len(networks), (1, 32, 32))
    assert (calls, given) == ([1], [])
    assert set(found) == set(REWRITES)
    assert all(count % len(networks) == 0 for count in found.values())
    pictures = torch.rand(2, 1, 32, 32)
    with torch.inference_mode():
        for network, member in zip(networks, ready, strict=True):
            assert (network(pictures).softmax(dim=1) - member(pictures).softmax(dim=1)).abs().max() < 1e-5


def test_members_with_tied_weights_keep_their_own():
    members = [weathered(Tied()), Tied().double().eval()]
    pictures = torch.rand(2, 8, 7, 7, dtype=torch.float64)
    other = trace(members[0], (8, 7, 7)).with_weights_of(members[1])
    with torch.inference_mode():
        assert (other(pictures) - members[1](pictures)).abs().max() < 1e-12


def test_a_rewrite_that_is_wrong_is_told(networks, monkeypatch):
    def spoil(member):
        member.set_weight("norm.bias", member.weight("norm.bias") + 1)
        return 1

    monkeypatch.setitem(REWRITES, "spoil", spoil)
    with pytest.raises(CheckFailed, match="member 1 gives other probabilities once it is rewritten, by up to 0"):
        prepare_members(list(networks), ["same"] * len(networks), (1, 32, 32))
