import numpy as np
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from timm.layers import EcaModule, SEModule
from timm.layers.cbam import CbamModule
from timm.optim import create_optimizer_v2

from emoexport.decision import Decision
from emoexport.errors import UsageError
from emoexport.fold import Fold
from emoexport.onnx_graph import export_fold
from emoexport.reference import Reference
from emoexport.train.config import ModelConfig
from emoexport.train.emotenet import (
    SCALES,
    AttentionPooling,
    ChannelAttention,
    ConvNeXtEmoteNet,
    GeneralizedMeanPooling,
    MixedPooling,
)
from emoexport.train.synthetic import synthetic_faces
from emoexport.views import views_named

FULL = ModelConfig(
    backbone="convnext_atto",
    image_size=64,
    pyramid_channels=16,
    hidden=(24, 16),
    backbone_args={"patch_size": 4, "depths": (1, 1, 1, 1), "dims": (16, 16, 32, 40), "ls_init_value": 1.0},
)
OFF = {"pyramid_channels": 0, "attention": (), "pooling": ("avg",), "channel_calibration": False, "hidden": ()}

SWITCHES = {
    "full": {},
    "all off": OFF,
    **{f"without {name}": {name: value} for name, value in OFF.items()},
    **{f"{name} alone": {"attention": (name,)} for name in ("se", "eca", "cbam")},
    **{f"{name} pooling": {"pooling": (name,)} for name in ("avg", "max", "gem", "attention")},
    "no dropout": {"feature_dropout": 0.0, "head_dropout": 0.0, "drop_path_rate": 0.0},
    "drop path": {"drop_path_rate": 0.2},
}


def configured(**fields: object) -> ModelConfig:
    return ModelConfig.model_validate({**FULL.model_dump(), **fields})


def network_of(**fields: object) -> ConvNeXtEmoteNet:
    torch.manual_seed(0)
    return ConvNeXtEmoteNet(configured(**fields))


def pictures(count: int = 4, *, size: int = 64, channels: int = 1) -> torch.Tensor:
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(3))


def train_a_step(network: ConvNeXtEmoteNet, shown: torch.Tensor) -> None:
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    F.cross_entropy(network.train()(shown), torch.arange(len(shown)) % 7).backward()
    optimizer.step()


@pytest.mark.parametrize("fields", SWITCHES.values(), ids=SWITCHES)
def test_every_parameter_of_every_switch_is_trained(fields):
    network = network_of(**fields, **({} if "feature_dropout" in fields else {"feature_dropout": 0.0}))
    shown = pictures(7)
    before = network.eval()(shown)
    train_a_step(network, shown)
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name
    after = network.eval()(shown)
    assert after.shape == (7, 7)
    assert torch.isfinite(after).all()
    assert (after - before).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["attention", "pooling", "channel_calibration"])
def test_a_part_that_is_switched_off_changes_what_is_said(name):
    full, without = network_of().eval(), network_of(**{name: OFF[name]}).eval()
    fits = without.load_state_dict(full.state_dict(), strict=False)
    assert fits.missing_keys == []
    assert {key.partition(".")[0] for key in fits.unexpected_keys} <= {"attention", "pooling", "calibration"}
    assert (full(pictures()) - without(pictures())).abs().max() > 1e-4


def test_dropout_is_drawn_in_training_alone():
    network = network_of(feature_dropout=0.5)
    shown = pictures()
    assert not torch.equal(network.train()(shown), network(shown))
    assert torch.equal(network.eval()(shown), network(shown))


def test_a_row_does_not_depend_on_its_neighbours():
    network = network_of().double().eval()
    shown = pictures(5).double()
    together = network(shown)
    assert (together - torch.cat([network(one[None]) for one in shown])).abs().max() < 1e-12
    assert (together.flip(0) - network(shown.flip(0))).abs().max() < 1e-12


def test_the_memory_layout_does_not_matter():
    network = network_of().double().eval()
    shown = pictures().double()
    wanted = network(shown)
    laid_out = network.to(memory_format=torch.channels_last)(shown.contiguous(memory_format=torch.channels_last))
    assert (laid_out - wanted).abs().max() < 1e-12


def test_under_autocast_it_says_nearly_the_same():
    network = network_of().eval()
    wanted = network(pictures())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = network(pictures()).float()
        assert network.pooling[0](torch.rand(2, 16, 3, 3, dtype=torch.bfloat16)).dtype == torch.float32
    assert 0 < (found - wanted).abs().max() < 0.05


def test_pictures_are_normalised_inside_for_each_channel():
    mean, std = (0.1, 0.5, 0.7), (0.2, 0.3, 0.4)
    ours = network_of(channels=3, mean=mean, std=std).eval()
    plain = network_of(channels=3, mean=0.0, std=1.0).eval()
    shown = pictures(channels=3)
    by_hand = (shown - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    assert (ours(shown) - plain(by_hand)).abs().max() < 1e-5


def count(network: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def test_the_parameters_are_counted_by_hand():
    linear = network_of(**OFF)
    assert count(linear) - count(linear.backbone) == 2 * 40 + 7 * 40 + 7
    full = network_of()
    width = 16 * SCALES
    assert count(full.pyramid) == sum(16 * (c + 1) for c in (16, 32, 40)) + SCALES * 16 * (9 * 16 + 1)
    assert count(full.attention) == SCALES * ((8 * 16 + 8 + 16 * 8 + 16) + 3 + (2 * 16 + 2 * 49 + 2))
    assert count(full.pooling) == SCALES * (4 + 1 + 16)
    assert count(full.norm) + count(full.calibration) == 2 * width + width * (width + 1)
    assert count(full.classifier) == 24 * (width + 3) + 16 * (24 + 3) + 7 * 17


def test_the_names_of_the_weights_begin_with_their_part():
    parts = {name.partition(".")[0] for name in network_of().state_dict()}
    assert parts == {"backbone", "pyramid", "attention", "pooling", "norm", "calibration", "classifier"}


def test_attention_of_each_kind_stands_at_each_scale_in_the_order_named():
    network = network_of(attention=("cbam", "eca", "se"))
    assert len(network.attention) == SCALES
    for scale in network.attention:
        assert [type(one) for one in scale] == [CbamModule, ChannelAttention, SEModule]
    assert [len(scale) for scale in network_of(attention=()).attention] == [0] * SCALES


def test_our_channel_attention_is_that_of_timm():
    ours, theirs = ChannelAttention(16).double(), EcaModule(16).double()
    theirs.load_state_dict(ours.state_dict())
    features = torch.randn(3, 16, 5, 4, dtype=torch.float64)
    assert (ours(features) - theirs(features)).abs().max() < 1e-14


def features(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 0.01


def pooled(pooling: torch.nn.Module, places: torch.Tensor) -> torch.Tensor:
    return pooling(places).squeeze(-1)


def test_the_mixture_is_a_weighted_mean_of_the_poolings():
    mixed = MixedPooling(("avg", "max", "gem", "attention"), 6).double()
    given = features(2, 6, 3, 4)
    each = torch.cat([pool(given.flatten(2)) for pool in mixed.pools.values()], dim=-1)
    assert (mixed(given) - each.mean(dim=-1)).abs().max() < 1e-12  # they begin alike
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    mixed.mixture.data = weights.log() + 3  # softmax takes the 3 out again: the weights sum to 1
    assert (mixed(given) - each @ weights).abs().max() < 1e-12
    constant = torch.full((2, 6, 3, 4), 0.7, dtype=torch.float64)
    assert (mixed(constant) - 0.7).abs().max() < 1e-12


def test_a_single_pooling_is_not_mixed():
    given = features(2, 6, 3, 4)
    assert MixedPooling(("max",), 6).mixture is None
    assert torch.equal(MixedPooling(("max",), 6)(given), given.amax(dim=(2, 3)))
    assert torch.allclose(MixedPooling(("avg",), 6)(given), given.mean(dim=(2, 3)), atol=1e-14, rtol=0)


def test_the_generalised_mean_lies_between_the_average_and_the_maximum():
    gem, given = GeneralizedMeanPooling().double(), features(3, 5, 12)
    assert (pooled(gem, given) - given.pow(3).mean(dim=-1).pow(1 / 3)).abs().max() < 1e-14
    gem.power.data.fill_(1.0)
    assert (pooled(gem, given) - given.mean(dim=-1)).abs().max() < 1e-14
    gem.power.data.fill_(2000.0)
    assert (pooled(gem, given) - given.amax(dim=-1)).abs().max() < 2e-3
    gem.power.data.fill_(-5.0)
    assert (pooled(gem, given) - given.mean(dim=-1)).abs().max() < 1e-14  # never below the average


def test_the_generalised_mean_has_the_gradient_of_its_formula():
    """The largest value is taken for a constant, which must not show."""
    gem, given = GeneralizedMeanPooling().double(), features(2, 3, 5).requires_grad_()
    assert torch.autograd.gradcheck(gem, (given,))
    ours = torch.autograd.grad(gem(given).sum(), gem.power)[0]
    power = torch.tensor([3.0], dtype=torch.float64, requires_grad=True)
    theirs = torch.autograd.grad(given.pow(power).mean(dim=-1).pow(1 / power).sum(), power)[0]
    assert (ours - theirs).abs().max() < 1e-12


@pytest.mark.parametrize("largest", [1e-5, 1.0, 300.0, 6e4])
def test_the_generalised_mean_stays_within_fp16(largest):
    gem, given = GeneralizedMeanPooling(), features(3, 5, 36) * largest
    wanted = gem.double()(given)
    found = gem.half()(given.half())
    assert ((found - wanted) / wanted).abs().max() < 5e-3


def test_attention_pooling_is_an_average_weighted_by_the_query():
    pooling, given = AttentionPooling(4).double(), features(2, 4, 9)
    pooling.query.weight.data.zero_()
    assert (pooled(pooling, given) - given.mean(dim=-1)).abs().max() < 1e-14
    pooling.query.weight.data[0, 1] = 1e4  # all attention is where channel 1 is largest
    where = given[:, 1].argmax(dim=-1)
    assert (pooled(pooling, given) - given[torch.arange(2), :, where]).abs().max() < 1e-12


def test_only_weights_of_several_dimensions_decay():
    network = network_of()
    optimizer = create_optimizer_v2(network, opt="adamw", lr=1e-3, weight_decay=0.1)
    decays = {id(one) for group in optimizer.param_groups if group["weight_decay"] for one in group["params"]}
    free = {name for name, parameter in network.named_parameters() if id(parameter) not in decays}
    assert {"pooling.0.mixture", "pooling.0.pools.gem.power", "norm.weight", "classifier.output.bias"} <= free
    assert "classifier.output.weight" not in free
    assert all(parameter.ndim == 1 for name, parameter in network.named_parameters() if name in free)


BACKBONES = {
    "resnet10t": {},
    "regnetx_002": {},
    "test_efficientnet": {},
    "test_convnext": {},
    "ghostnet_050": {},  # has no drop path
    "test_vit": {},
    "vit_tiny_patch16_224": {"depth": 4},
    "deit_tiny_patch16_224": {"depth": 3},
    "swin_tiny_patch4_window7_224": {"depths": (1, 1, 2, 1), "embed_dim": 24, "num_heads": (1, 2, 4, 8)},
}


@pytest.mark.parametrize("pyramid_channels", [16, 0])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_other_backbones(backbone, pyramid_channels):
    network = network_of(
        backbone=backbone, backbone_args=BACKBONES[backbone], image_size=48, pyramid_channels=pyramid_channels
    )
    assert len(network.pooling) == (SCALES if pyramid_channels else 1)
    shown = pictures(7, size=48)
    train_a_step(network, shown)
    assert all(torch.isfinite(one.grad).all() for one in network.parameters() if one.grad is not None)
    logits = network.eval()(shown)
    assert torch.isfinite(logits).all()
    assert (logits[0] - logits[1]).abs().max() > 1e-6


def test_stochastic_depth_is_what_was_asked_for():
    """Also where timm would have another rate by default, as for Swin."""
    fields = {"backbone": "swin_tiny_patch4_window7_224", "image_size": 48}
    args = BACKBONES["swin_tiny_patch4_window7_224"]
    assert "DropPath" not in str(network_of(**fields, backbone_args=args, drop_path_rate=0.0))
    assert "drop_prob=0.300" in str(network_of(**fields, backbone_args=args, drop_path_rate=0.3))
    with pytest.raises(UsageError, match="drop_path_rate"):
        network_of(backbone="ghostnet_050", backbone_args={}, drop_path_rate=0.3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"backbone": "convnext_colossal"}, "convnext_colossal"),
        ({"backbone": "convnext_atto.unheard_of"}, "unheard_of"),
        ({"backbone_args": {"wings": 2}}, "wings"),
        ({"backbone_args": {"depths": (1, 1), "dims": (16, 32)}}, r"last 3 feature maps \(features_only\)"),
        ({"backbone": "test_vit", "backbone_args": {"depth": 2}}, "last 3 feature maps"),
    ],
)
def test_backbones_that_cannot_be_made(fields, message):
    with pytest.raises(UsageError, match=message) as caught:
        network_of(**fields)
    assert "pyramid_channels" in caught.value.hint


@pytest.mark.slow
def test_a_size_that_strides_do_not_divide_is_exported_faithfully(tmp_path):
    """Maps of 5, 2 and 1 pixels: the pyramid's enlargements are no whole numbers."""
    network = network_of(image_size=40).eval()
    faces, views = synthetic_faces(7, size=40, seed=5)[0], views_named(["identity", "zoom"])
    export_fold(Fold([network], views, Decision()), tmp_path / "m.onnx", face_shape=(40, 40, 1), max_batch=8)
    session = ort.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    wanted = Reference(members=[network], views=views, decision=Decision()).run(faces)
    assert np.abs(session.run(None, {"faces": faces})[0] - wanted.probabilities).max() < 1e-5
