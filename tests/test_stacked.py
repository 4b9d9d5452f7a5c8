import copy
import operator

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from emoexport.decision import Decision
from emoexport.engines import BACKENDS, open_engine
from emoexport.errors import UsageError
from emoexport.fold import LAYOUTS, Fold
from emoexport.member_graph import trace
from emoexport.onnx_graph import export_fold
from emoexport.reference import Reference
from emoexport.rewrites import prepare_members, rewrite
from emoexport.stacked import RULES, Stacked, _StackedRun
from emoexport.train.config import ModelConfig
from emoexport.train.emotenet import ConvNeXtEmoteNet
from emoexport.views import VIEWS

ALL = tuple(VIEWS.values())
SOME = ALL[:4]
aten = torch.ops.aten

BATCH_NORM = ModelConfig(backbone="resnet10t", image_size=32, channels=3, pyramid_channels=16, hidden=(16,))
TRANSFORMER = ModelConfig(
    backbone="vit_tiny_patch16_224",
    image_size=32,
    pyramid_channels=0,
    hidden=(),
    attention=(),
    backbone_args={"depth": 2, "embed_dim": 32, "num_heads": 2, "patch_size": 8},
)


def members_of(make, count=3):
    """Different members in float64."""
    torch.manual_seed(2)
    members = [make().double().eval() for _ in range(count)]
    for member in members:
        for parameter in member.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        for name, buffer in member.named_buffers():
            if name.endswith("running_var"):
                buffer.copy_(0.5 + torch.rand_like(buffer))
    return members


@pytest.fixture
def alone(monkeypatch):
    """Names of the operators that had to be computed member by member."""
    found = []
    honest = _StackedRun.one_by_one
    monkeypatch.setattr(
        _StackedRun,
        "one_by_one",
        lambda self, target, *others: found.append(str(target)) or honest(self, target, *others),
    )
    return found


def largest_difference(members, traced, pictures):
    with torch.inference_mode():
        wanted = torch.stack([member(pictures) for member in members])
        found = Stacked(traced)(pictures)
    assert found.shape == wanted.shape
    return (found - wanted).abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("rewritten", [False, True])
@pytest.mark.parametrize("config", [BATCH_NORM, TRANSFORMER], ids=["batch-norm", "transformer"])
def test_stacked_members_are_the_members_in_float64(config, rewritten, alone):
    members = members_of(lambda: ConvNeXtEmoteNet(config))
    first = trace(members[0], (config.channels, 32, 32))
    traced = [first.with_weights_of(member) for member in members]
    if rewritten:
        assert all(rewrite(one) for one in traced)
    pictures = torch.rand(4, config.channels, 32, 32, dtype=torch.float64)
    assert largest_difference(members, traced, pictures) < 1e-12
    assert not rewritten or set(alone) <= {"aten.expand.default", "aten.unbind.int"}  # of the transformer's first token


class Every(nn.Module):
    """Each rule at least once, in places where the axis of the members is now here, now there."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Parameter(torch.randn(6))
        self.other = nn.Parameter(torch.randn(2, 3, 5))
        self.first, self.deep = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, groups=6, padding=1)
        self.line, self.row, self.norm = nn.Conv1d(6, 6, 3), nn.Linear(6, 6), nn.LayerNorm(6)
        self.seen = nn.Conv2d(3, 3, 1, groups=3)

    def forward(self, x):
        maps = self.deep(self.first(x)) + self.own[:, None, None]
        last = self.norm(self.row(maps.permute(0, 2, 3, 1)))  # (n, h, w, 6)
        tokens = last.flatten(1, 2)  # (n, places, 6)
        seen = nn.functional.scaled_dot_product_attention(tokens, tokens, tokens)
        pairs = torch.matmul(tokens, seen.transpose(1, 2)).softmax(dim=-1)
        kept = torch.cat([maps, last.permute(0, 3, 1, 2), self.seen(x), x], dim=1)
        pooled = nn.functional.max_pool2d(nn.functional.interpolate(kept, scale_factor=2.0), 2)
        mixed = torch.einsum("ncp,c->np", maps.flatten(2), self.own).cumsum(dim=1)
        spread = maps.amax(dim=(2, 3)).unsqueeze(0).squeeze(0) * self.own
        wide = torch.where(spread > 0, spread, nn.functional.hardswish(spread)).reshape(-1, 2, 3).unsqueeze(-1)
        rows = [
            self.line(maps.flatten(2))[..., 0],
            pairs[:, :, 0],
            pooled.mean(dim=(-2, -1)),
            mixed.sum(dim=1, keepdim=True),
            (wide * self.other).amin(dim=-1).flatten(1),
            last[:, 0, 0],
            x.mean(dim=(2, 3)) - maps.std(),
            x.mean(dim=(1, 2, 3)).unsqueeze(1) * maps[:, 1:3].sum(dim=(0, 2)).transpose(0, 1).flatten(),
            self.norm(x[:, :, 0, :6]).flatten(1),
        ]
        return torch.cat(rows, dim=1)


def test_each_rule_agrees_with_computing_member_by_member(alone):
    members = members_of(Every, count=2)
    pictures = torch.rand(5, 3, 8, 8, dtype=torch.float64)
    traced = [trace(member, (3, 8, 8)) for member in members]
    used = {node.target for node in traced[0].graph.nodes}
    assert largest_difference(members, traced, pictures) < 1e-12
    assert {"aten.cumsum.default"} <= set(alone)  # no rule, and no harm
    unused = {
        operator.getitem,  # of batch normalisation and the transformer above
        aten.upsample_bilinear2d.vec,
        aten.avg_pool2d.default,  # of the ResNet above
        aten.adaptive_avg_pool2d.default,
        aten.bmm.default,
    }
    assert set(RULES) - used <= unused


def test_what_all_members_share_is_computed_once():
    members = members_of(lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten()))
    for member in members:
        member.register_buffer("mean", torch.tensor(0.5, dtype=torch.float64))
        member.forward = lambda x, member=member: nn.Sequential.forward(member, (x - member.mean).abs())
    stacked = Stacked([trace(member, (3, 4, 4)) for member in members])
    assert not stacked.per_member
    program = torch.export.export(stacked, (torch.rand(2, 3, 4, 4, dtype=torch.float64),))
    shapes = {node.target: tuple(node.meta["val"].shape) for node in program.graph.nodes if node.op == "call_function"}
    assert shapes[aten.abs.default] == (2, 3, 4, 4)
    assert shapes[aten.conv2d.default] == (2, 12, 4, 4)


def test_members_of_different_architecture_are_refused():
    layers = [nn.Conv2d(3, 4, 1), nn.Conv2d(3, 5, 1), nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())]
    traced = [trace(layer.eval(), (3, 8, 8)) for layer in layers]
    for other in traced[1:]:
        with pytest.raises(UsageError, match="differ in architecture"):
            Stacked([traced[0], other])


@pytest.fixture(scope="module")
def graphs(networks, rules, tmp_path_factory):
    """The same ensemble in every layout."""
    found = {}
    ready, _ = prepare_members(list(networks), ["same"] * len(networks), (1, 32, 32))
    for layout, together in LAYOUTS.items():  # stacked, which uses the members up, is the last
        found[layout] = tmp_path_factory.mktemp(layout) / "model.onnx"
        export_fold(Fold(together(ready), SOME, rules), found[layout], face_shape=(32, 32, 1), max_batch=64)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("backend", [name for name, row in BACKENDS.items() if row.takes("fp32")])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("count", [1, 7])
def test_every_layout_decides_like_the_reference(layout, backend, count, graphs, networks, rules, faces):
    if not BACKENDS[backend].is_usable():
        pytest.skip(f"{backend} is not installed")
    wanted = Reference(members=networks, views=SOME, decision=rules).run(faces[0][:count])
    engine = open_engine(BACKENDS[backend], graphs[layout], precision="fp32", face_shape=(32, 32, 1), max_batch=64)
    found = engine.run(faces[0][:count])
    assert np.abs(found.probabilities - wanted.probabilities).max() < 1e-5
    assert np.array_equal(found.label, wanted.label)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_the_reference_in_float64(layout, networks, rules, faces):
    members = [copy.deepcopy(network).double() for network in networks]
    wanted = Reference(members=members, views=ALL, decision=Decision()).scores(faces[0][:3])
    ready, _ = prepare_members(list(members), ["same"] * len(members), (1, 32, 32))
    with torch.inference_mode():
        *_, scores = Fold(LAYOUTS[layout](ready), ALL, rules)(torch.from_numpy(faces[0][:3]))
    assert np.abs(scores.numpy() - wanted).max() < 1e-10


@pytest.mark.slow
def test_stacked_has_one_layer_where_branches_have_one_a_member(graphs):
    counts = {}
    for layout, path in graphs.items():
        nodes = onnx.load(path).graph.node
        counts[layout] = {kind: sum(node.op_type == kind for node in nodes) for kind in ("Conv", "LayerNormalization")}
        assert not [node.name for node in nodes if node.op_type == "Conv" and not node.name.startswith("members.")]
    assert counts["branches"] == {kind: 3 * count for kind, count in counts["stacked"].items()}
    assert counts["stacked"]["Conv"] > 10
