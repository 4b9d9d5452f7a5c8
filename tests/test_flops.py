"""Counts of the formulas against counts by hand, in operations: 2 a multiply-add."""

import pytest
import torch
from torch import nn

from emoexport.flops import gflop_a_pass, parameters_of
from emoexport.train.config import ModelConfig, load_config
from emoexport.train.emotenet import ConvNeXtEmoteNet

# What layer, and its operations on a picture (3, 8, 8).
LAYERS = {
    "dense convolution": (nn.Conv2d(3, 16, 3, padding=1), 2 * 8 * 8 * 16 * 3 * 9),
    "strided convolution": (nn.Conv2d(3, 16, 2, stride=2), 2 * 4 * 4 * 16 * 3 * 4),
    "depthwise convolution": (nn.Conv2d(3, 3, 3, padding=1, groups=3), 2 * 8 * 8 * 3 * 9),
    "linear layer": (nn.Sequential(nn.Flatten(), nn.Linear(192, 5)), 2 * 192 * 5),
    "elementwise": (nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2), nn.GELU(), nn.Flatten(), nn.Softmax(-1)), 768),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_by_hand(name):
    layer, wanted = LAYERS[name]
    assert gflop_a_pass(layer.eval(), (3, 8, 8)) == pytest.approx(wanted / 1e9, rel=1e-12)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        tokens = pictures.flatten(2) * self.scale  # 3 tokens of 64 numbers
        return nn.functional.scaled_dot_product_attention(tokens, tokens, tokens)


def test_the_products_inside_attention_count():
    assert gflop_a_pass(Attention().eval(), (3, 8, 8)) == pytest.approx(2 * 2 * 3 * 3 * 64 / 1e9)


def test_the_guides_network_is_counted_without_being_computed():
    """ConvNeXt-L at 224 px: 34.4 G multiply-adds for the backbone (Liu et al. 2022, table 1), and the head."""
    model = load_config("guide").model
    with torch.device("meta"):
        network = ConvNeXtEmoteNet(model).eval()
    assert 68.8 < gflop_a_pass(network, (model.channels, model.image_size, model.image_size)) < 72
    assert 196e6 < parameters_of(network) < 202e6  # 198 M with ImageNet's head


def test_the_network_stays_what_it_was(networks):
    network = networks[0]
    before = {name: value.clone() for name, value in network.state_dict().items()}
    assert gflop_a_pass(network, (1, 32, 32)) > 0
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert parameters_of(network) == sum(p.numel() for p in network.parameters())
    assert network(torch.zeros(1, 1, 32, 32)).shape == (1, len(ModelConfig().labels))
