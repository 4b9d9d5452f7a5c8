import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from emoexport.errors import BadCheckpoint
from emoexport.files import sha256_of
from emoexport.train.checkpoint import load_member, load_members, read_run


@pytest.fixture
def run(run_dir, tmp_path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(run_dir, tmp_path / "run"))


def rewrite(member: Path, **fields: object) -> None:
    record = json.loads(member.read_text())
    record.update(fields)
    member.write_text(json.dumps(record))


def replace_weights(run: Path, path: Path) -> None:
    rewrite(run / "members/1.json", weights=path.name, sha256=sha256_of(path))


def test_members_are_rebuilt_from_their_files_alone(run):
    records, networks = load_members(run)
    assert len(networks) == 2
    assert records[0].validation_accuracy >= records[1].validation_accuracy
    assert records[0].epoch != records[1].epoch
    assert not networks[0].training
    state = load_file(run / "members/1.safetensors")
    assert all(torch.equal(value, networks[0].state_dict()[name]) for name, value in state.items())


def test_a_foreign_state_dict_is_read_as_plain_tensors(run):
    state = load_file(run / "members/1.safetensors")
    torch.save({"state_dict": state}, run / "members/foreign.pth")
    replace_weights(run, run / "members/foreign.pth")
    _, network = load_member(run / "members/1.json")
    assert torch.equal(network.state_dict()["classifier.output.bias"], state["classifier.output.bias"])


class Payload:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (Path(self.path),))


def test_a_pickle_that_wants_to_run_code_does_not(run, tmp_path):
    torch.save({"state_dict": Payload(str(tmp_path / "ran"))}, run / "members/evil.pth")
    replace_weights(run, run / "members/evil.pth")
    with pytest.raises(BadCheckpoint, match=r"evil\.pth"):
        load_members(run)
    assert not (tmp_path / "ran").exists()


def spoil_truncated(run: Path) -> None:
    path = run / "members/1.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def spoil_header(run: Path) -> None:
    path = run / "members/1.safetensors"
    path.write_bytes(b"\xff" * 64)
    replace_weights(run, path)


def spoil_nan(run: Path) -> None:
    path = run / "members/1.safetensors"
    state = load_file(path)
    state["classifier.output.bias"][2] = float("nan")
    save_file(state, path)
    replace_weights(run, path)


def spoil_fewer(run: Path) -> None:
    (run / "members/2.json").unlink()


def spoil_no_weights(run: Path) -> None:
    (run / "members/2.safetensors").unlink()


def spoil_size(run: Path) -> None:
    model = json.loads((run / "members/2.json").read_text())["model"]
    rewrite(run / "members/2.json", model={**model, "image_size": 48})


def spoil_labels(run: Path) -> None:
    model = json.loads((run / "members/2.json").read_text())["model"]
    rewrite(run / "members/2.json", model={**model, "labels": model["labels"][::-1]})


def spoil_architecture(run: Path) -> None:
    model = json.loads((run / "members/2.json").read_text())["model"]
    model["backbone_args"]["dims"] = [16, 16, 32, 64]
    rewrite(run / "members/2.json", model=model)


def spoil_backbone(run: Path) -> None:
    model = json.loads((run / "members/2.json").read_text())["model"]
    rewrite(run / "members/2.json", model={**model, "backbone": "convnext_colossal"})


def spoil_pretrained(run: Path) -> None:
    model = json.loads((run / "members/2.json").read_text())["model"]
    model["backbone_args"]["checkpoint_path"] = "elsewhere.pth"
    rewrite(run / "members/2.json", model=model)


def spoil_hub(run: Path) -> None:
    model = json.loads((run / "members/2.json").read_text())["model"]
    rewrite(run / "members/2.json", model={**model, "backbone": "hf-hub:someone/something"})


def spoil_outside(run: Path) -> None:
    rewrite(run / "members/2.json", weights="../../elsewhere.safetensors")


def spoil_json(run: Path) -> None:
    (run / "members/2.json").write_text("{")


def spoil_field(run: Path) -> None:
    rewrite(run / "members/2.json", weihgts="2.safetensors")


def spoil_run(run: Path) -> None:
    (run / "run.json").unlink()


SPOILERS = {
    spoil_truncated: "cut short",
    spoil_header: "plain tensors",
    spoil_nan: "not finite",
    spoil_fewer: "1 members; needed are 2",
    spoil_no_weights: "not beside it",
    spoil_size: "image_size 32",
    spoil_labels: "labels",
    spoil_architecture: "does not fit",
    spoil_backbone: "convnext_colossal",
    spoil_pretrained: "checkpoint_path would load",
    spoil_hub: "name of a timm model",
    spoil_outside: "not beside it",
    spoil_json: "JSON",
    spoil_field: "did you mean 'weights'",
    spoil_run: "no training run",
}


@pytest.mark.parametrize("spoil", SPOILERS, ids=lambda spoil: spoil.__name__)
def test_what_cannot_be_a_member_is_refused(spoil, run):
    spoil(run)
    with pytest.raises(BadCheckpoint, match=SPOILERS[spoil]) as caught:
        load_members(run)
    assert "\n" not in str(caught.value).strip()


def test_the_record_says_what_was_trained_on(run):
    data = read_run(run).data
    assert data.train_faces == 980
    assert data.validation_from == "validation"
    assert data.train_sha256 != data.validation_sha256
