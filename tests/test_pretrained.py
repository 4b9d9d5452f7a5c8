import time
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from emoexport.errors import BadCheckpoint, MissingRuntime, UsageError
from emoexport.files import sha256_of
from emoexport.train.config import RunConfig
from emoexport.train.emotenet import ConvNeXtEmoteNet
from emoexport.train.pretrained import load_start

LAYERS = {"depths": (1, 1, 1, 1), "dims": (16, 16, 32, 32)}


def config_of(start: object = "", *, pretrained: bool = False, **model: object) -> RunConfig:
    fields = {"backbone": "convnext_atto", "backbone_args": LAYERS, "image_size": 32, "pyramid_channels": 16, **model}
    return RunConfig.model_validate({"model": fields, "training": {"init_from": str(start), "pretrained": pretrained}})


def network_of(config: RunConfig) -> ConvNeXtEmoteNet:
    torch.manual_seed(0)
    return ConvNeXtEmoteNet(config.model)


@pytest.fixture
def published() -> dict[str, torch.Tensor]:
    """What timm would publish: for pictures in colour, with a classifier of 1000 classes."""
    torch.manual_seed(1)
    state = timm.create_model("convnext_atto", **LAYERS).state_dict()
    return {name: value + 0.1 * torch.rand_like(value) for name, value in state.items()}


@pytest.fixture
def file(published, tmp_path) -> Path:
    save_file(published, tmp_path / "timm.safetensors")
    return tmp_path / "timm.safetensors"


def is_loaded(network: ConvNeXtEmoteNet, published: dict[str, torch.Tensor]) -> bool:
    """Whether all that the backbone has was published, but for the first layer."""
    ours = {name.replace("stages_", "stages.").replace("stem_", "stem."): value for name, value in backbone(network)}
    return all(torch.equal(value, published[name]) for name, value in ours.items() if name != "stem.0.weight")


def backbone(network: ConvNeXtEmoteNet) -> list[tuple[str, torch.Tensor]]:
    return list(network.backbone.state_dict().items())


def test_without_either_the_weights_stay_random():
    network = network_of(config_of())
    before = {name: value.clone() for name, value in network.state_dict().items()}
    assert "random" in load_start(network, config_of())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_weights_of_timm_in_colour(file, published):
    config = config_of(file, channels=3)
    network = network_of(config)
    head = network.classifier.output.weight.clone()
    assert not is_loaded(network, published)
    sentence = load_start(network, config)
    assert is_loaded(network, published)
    assert torch.equal(network.backbone.stem_0.weight, published["stem.0.weight"])
    assert torch.equal(network.classifier.output.weight, head)
    weights = [name for name, value in network.backbone.named_parameters() if value.ndim > 1]
    assert f"timm's {len(weights)} weights of the backbone" in sentence
    assert str(file) in sentence
    assert sha256_of(file)[:12] in sentence


def test_weights_in_colour_are_summed_for_grey_faces(file, published):
    config = config_of(file)
    network = network_of(config)
    load_start(network, config)
    assert is_loaded(network, published)
    summed = published["stem.0.weight"].sum(dim=1, keepdim=True)
    assert torch.allclose(network.backbone.stem_0.weight, summed, atol=1e-6)


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "state_dict_ema"])
def test_other_ways_of_publishing(wrapper, published, tmp_path):
    torch.save({wrapper: published, "epoch": 3}, tmp_path / "timm.pth")
    config = config_of(tmp_path / "timm.pth", channels=3)
    network = network_of(config)
    load_start(network, config)
    assert is_loaded(network, published)


def test_the_original_names_of_convnext_go_through_the_filter_of_timm(tmp_path, published):
    """Facebook's files name the layers in another way than timm does."""
    renamed = {}
    for name, value in published.items():
        theirs = name.replace("stem.", "downsample_layers.0.").replace("blocks.", "")
        theirs = theirs.replace("conv_dw", "dwconv").replace("mlp.fc", "pwconv").replace("head.norm.", "norm.")
        if ".downsample." in theirs:
            stage, index, kind = theirs.split(".")[1], theirs.split(".")[3], theirs.split(".")[4]
            theirs = f"downsample_layers.{stage}.{index}.{kind}"
        renamed[theirs.replace("head.fc.", "head.")] = value
    for name in [name for name in renamed if "pwconv" in name and name.endswith("weight")]:
        renamed[name] = renamed[name].flatten(1)
    torch.save({"model": renamed}, tmp_path / "convnext.pth")
    config = config_of(tmp_path / "convnext.pth", channels=3, backbone_args={**LAYERS, "conv_mlp": False})
    network = network_of(config)
    load_start(network, config)
    found = dict(backbone(network))["stages_2.blocks.0.mlp.fc1.weight"]
    assert torch.equal(found, published["stages.2.blocks.0.mlp.fc1.weight"].flatten(1))


def test_positions_of_a_transformer_are_fitted_to_the_size(tmp_path):
    torch.manual_seed(1)
    save_file(timm.create_model("test_vit").state_dict(), tmp_path / "vit.safetensors")
    config = config_of(tmp_path / "vit.safetensors", backbone="test_vit", backbone_args={}, image_size=64)
    network = network_of(config)
    assert "weights of the backbone" in load_start(network, config)
    assert network.backbone.model.pos_embed.shape[1] == (64 // 16) ** 2 + 1


def test_loading_does_not_disturb_the_seed(file):
    config = config_of(file)
    network = network_of(config)
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    load_start(network, config)
    assert torch.equal(torch.rand(3), wanted)


def test_a_member_is_a_beginning_too(tmp_path):
    torch.manual_seed(7)
    member = ConvNeXtEmoteNet(config_of().model)
    save_file(member.state_dict(), tmp_path / "1.safetensors")
    config = config_of(tmp_path / "1.safetensors")
    network = network_of(config)
    sentence = load_start(network, config)
    assert f"a member's {len(member.state_dict())} tensors" in sentence
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in member.state_dict().items())


def test_a_run_can_begin_with_a_member_of_another(run_dir):
    from emoexport.train.checkpoint import load_member

    record, member = load_member(run_dir / "members/1.json")
    config = RunConfig.model_validate(
        {"model": record.model.model_dump(), "training": {"init_from": str(run_dir / "members/1.safetensors")}}
    )
    network = network_of(config).eval()
    load_start(network, config)
    faces = torch.rand(2, 1, 32, 32)
    torch.testing.assert_close(network(faces), member(faces))  # kernels differ by where weights lie in memory


@pytest.mark.parametrize(
    ("fields", "named"),
    [({"hidden": (8,)}, "classifier"), ({"pyramid_channels": 8}, "pyramid"), ({"attention": ()}, "attention")],
)
def test_a_member_of_another_network_is_refused(fields, named, tmp_path):
    member = network_of(config_of(**fields))
    save_file(member.state_dict(), tmp_path / "1.safetensors")
    config = config_of(tmp_path / "1.safetensors")
    with pytest.raises(BadCheckpoint, match="member of another network") as caught:
        load_start(network_of(config), config)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


class Payload:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (Path(self.path),))


def spoil_truncated(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:1000])
    return path


def spoil_missing(path: Path) -> Path:
    return path.with_name("elsewhere.safetensors")


def spoil_nan(path: Path) -> Path:
    state = load_file(path)
    state["stages.1.blocks.0.conv_dw.weight"][0, 0, 0, 0] = float("nan")
    save_file(state, path)
    return path


def spoil_fewer(path: Path) -> Path:
    state = {name: value for name, value in load_file(path).items() if not name.startswith("stages.2")}
    save_file(state, path)
    return path


def spoil_stranger(path: Path) -> Path:
    save_file(timm.create_model("test_resnet").state_dict(), path)
    return path


def spoil_shapes(path: Path) -> Path:
    save_file(timm.create_model("convnext_atto", depths=(1, 1, 1, 1), dims=(16, 16, 32, 64)).state_dict(), path)
    return path


def spoil_code(path: Path) -> Path:
    torch.save({"state_dict": Payload(str(path.with_name("ran")))}, path.with_suffix(".pth"))
    return path.with_suffix(".pth")


def spoil_list(path: Path) -> Path:
    torch.save([torch.zeros(3)], path.with_suffix(".pth"))
    return path.with_suffix(".pth")


def spoil_text(path: Path) -> Path:
    path.with_suffix(".txt").write_text("weights")
    return path.with_suffix(".txt")


SPOILERS = {
    spoil_truncated: "plain tensors",
    spoil_missing: "elsewhere",
    spoil_nan: "not finite, in stages.1.blocks.0.conv_dw.weight",
    spoil_fewer: r"holds \d+ of the \d+ weights .* none for stages_2",
    spoil_stranger: "does not fit the backbone 'convnext_atto' .* there is no",
    spoil_shapes: "does not fit .* size mismatch",
    spoil_code: "plain tensors",
    spoil_list: "holds a list",
    spoil_text: "plain tensors",
}


@pytest.mark.parametrize("spoil", SPOILERS, ids=lambda spoil: spoil.__name__)
def test_wrong_and_damaged_files_are_refused(spoil, file, tmp_path):
    config = config_of(spoil(file))
    network = network_of(config)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(BadCheckpoint, match=SPOILERS[spoil]) as caught:
        load_start(network, config)
    assert "\n" not in str(caught.value)
    assert caught.value.hint
    assert not (tmp_path / "ran").exists()
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


@pytest.fixture
def no_hub(monkeypatch, tmp_path) -> None:
    """An empty cache, and a server at which nobody listens."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)

    def nowhere(repository: str, filename: str) -> str:
        return f"http://127.0.0.1:9/{repository}/resolve/main/{filename}"

    monkeypatch.setattr("emoexport.train.pretrained.hf_hub_url", nowhere)


def test_without_a_network_it_says_at_once_what_to_download(no_hub):
    config = config_of(pretrained=True, backbone_args={})
    started = time.monotonic()
    with pytest.raises(MissingRuntime, match="could not be downloaded") as caught:
        load_start(network_of(config), config)
    assert time.monotonic() - started < 5
    assert "\n" not in str(caught.value)
    assert "timm/convnext_atto.d2_in1k/resolve/main/model.safetensors" in caught.value.hint
    assert "--init-from weights/convnext_atto.d2_in1k.safetensors" in caught.value.hint


def test_the_address_is_that_of_the_hub(monkeypatch):
    def refused(url: str, **_: object) -> None:
        raise OSError(f"no route to {url}")

    monkeypatch.setattr("emoexport.train.pretrained.try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr("emoexport.train.pretrained.get_hf_file_metadata", refused)
    config = config_of(pretrained=True)
    with pytest.raises(MissingRuntime, match="no route") as caught:
        load_start(network_of(config), config)
    assert "https://huggingface.co/timm/convnext_atto.d2_in1k/resolve/main/model.safetensors" in caught.value.hint


def test_weights_published_elsewhere_are_named():
    config = config_of(pretrained=True, backbone="legacy_seresnet18", backbone_args={})
    with pytest.raises(MissingRuntime) as caught:
        load_start(network_of(config), config)
    assert "seresnet18-4bb0ce65.pth" in caught.value.hint
    assert "weights/legacy_seresnet18.pth" in caught.value.hint


def test_what_is_in_the_cache_needs_no_network(no_hub, file, published, tmp_path):
    snapshot = tmp_path / "cache/models--timm--convnext_atto.d2_in1k"
    (snapshot / "snapshots/abc").mkdir(parents=True)
    (snapshot / "refs").mkdir()
    (snapshot / "refs/main").write_text("abc")
    file.rename(snapshot / "snapshots/abc/model.safetensors")
    config = config_of(pretrained=True)
    network = network_of(config)
    assert "snapshots/abc" in load_start(network, config)
    assert is_loaded(network, published)


def test_a_backbone_without_published_weights():
    config = config_of(pretrained=True, backbone="convnext_atto_rms")
    with pytest.raises(UsageError, match=r"convnext_atto\.d2_in1k") as caught:
        load_start(network_of(config), config)
    assert "pretrained = false" in caught.value.hint
