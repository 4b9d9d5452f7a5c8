import copy
import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn

from emoexport import opening, pipeline, sessions
from emoexport.engines import BACKENDS
from emoexport.errors import BadCheckpoint, BadData, UsageError
from emoexport.files import sha256_of
from emoexport.train.batches import shuffled_faces
from emoexport.train.checkpoint import FittedDecision, MemberRecord, load_members, read_run
from emoexport.train.config import ModelConfig
from emoexport.train.dataset import DataSet, Faces, load_data
from emoexport.train.emotenet import ConvNeXtEmoteNet
from emoexport.train.ensemble import training_faces
from emoexport.train.soup import Soups, average_weights, find_soups, greedy_rows, mix_networks, single_pass_accuracy
from emoexport.train.soup_run import make_soup
from emoexport.train.standing import SoupMethod

# Layer norm only; with CBAM there is batch norm too.
PLAIN = ModelConfig(
    backbone="convnext_atto",
    image_size=32,
    pyramid_channels=16,
    attention=(),
    hidden=(16,),
    backbone_args={"patch_size": 4, "depths": (1, 1, 1, 1), "dims": (16, 16, 32, 32), "conv_mlp": False},
)
CBAM = PLAIN.model_copy(update={"attention": ("cbam",), "drop_path_rate": 0.3})


def network_of(model: ModelConfig, seed: int) -> ConvNeXtEmoteNet:
    """Untrained, but of large weights, so that faces differ to it."""
    torch.manual_seed(seed)
    network = ConvNeXtEmoteNet(model).eval()
    for name, parameter in network.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.kaiming_normal_(parameter)
        elif name.endswith("gamma"):
            torch.nn.init.ones_(parameter)
    return network


@pytest.fixture(scope="module")
def some_faces(faces) -> Faces:
    images, labels = faces
    return Faces(images=images, labels=labels, flagged=np.zeros(len(labels), dtype=bool))


@pytest.fixture(scope="module")
def data() -> DataSet:
    """Of the session's run."""
    return load_data("synthetic:1400", size=32)


@pytest.fixture
def run(run_dir, tmp_path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(run_dir, tmp_path / "runs/tiny"))


def edit(file: Path, change: Callable[[dict], object]) -> None:
    record = json.loads(file.read_text())
    change(record)
    file.write_text(json.dumps(record))


def plant_noise(run: Path) -> None:
    """Give the second member weights that know nothing."""
    weights = run / "members/2.safetensors"
    torch.manual_seed(0)
    noise = {name: torch.randn_like(value) if value.ndim > 1 else value for name, value in load_file(weights).items()}
    save_file(noise, weights)
    edit(run / "members/2.json", lambda record: record.update(sha256=sha256_of(weights)))


def test_the_mean_is_that_of_float64():
    # In float32 the ones are lost: 1e8 + 1 is 1e8.
    first = {"weight": torch.tensor([1e8, 0.25]), "half": torch.tensor([1.0]).half(), "seen": torch.tensor(7)}
    second = {"weight": torch.tensor([1.0, 0.5]), "half": torch.tensor([2.0]).half(), "seen": torch.tensor(9)}
    third = {"weight": torch.tensor([-1e8, 0.75]), "half": torch.tensor([6.0]).half(), "seen": torch.tensor(1)}
    kept = copy.deepcopy(first)
    mean = average_weights([first, second, third])
    assert torch.equal(mean["weight"], torch.tensor([1 / 3, 0.5], dtype=torch.float64).float())
    assert torch.equal(mean["half"], torch.tensor([3.0]).half())
    assert (mean["half"].dtype, mean["seen"].dtype) == (torch.float16, torch.int64)
    assert mean["seen"] == 7
    mean["seen"] += 1
    assert all(torch.equal(first[name], kept[name]) for name in kept)


def test_the_mean_of_float64_weights_leaves_them_as_they_are():
    states = [{"weight": torch.tensor([value], dtype=torch.float64)} for value in (1.0, 3.0)]
    assert average_weights(states)["weight"] == 2
    assert states[0]["weight"] == 1


@pytest.mark.parametrize(
    "other", [{"other": torch.ones(2)}, {"weight": torch.ones(3)}, {"weight": torch.ones(2), "more": torch.ones(1)}]
)
def test_weights_of_other_names_or_shapes_have_no_mean(other):
    with pytest.raises(BadCheckpoint, match="member 2 have other names or shapes"):
        average_weights([{"weight": torch.ones(2)}, other])


def test_copies_of_a_network_give_that_network(some_faces):
    network = network_of(PLAIN, 0)
    mixed = mix_networks([copy.deepcopy(network) for _ in range(3)], some_faces, batch_size=8, seed=0)
    assert mixed is not network
    assert not mixed.training
    state = mixed.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


def test_faces_come_once_in_full_batches_in_an_order_of_the_seed(some_faces):
    def shown(seed: int, batch_size: int) -> list[Tensor]:
        return list(shuffled_faces(some_faces, batch_size, seed=seed))

    batches = shown(1, 16)
    assert [tuple(batch.shape) for batch in batches] == [(16, 1, 32, 32)] * 4  # 6 of 70 are left over
    rows = [image.tobytes() for image in some_faces.images]
    found = [face.permute(1, 2, 0).contiguous().numpy().tobytes() for batch in batches for face in batch]
    assert len(set(found)) == 64
    assert set(found) <= set(rows)
    assert found != rows[:64]
    assert torch.equal(torch.cat(batches), torch.cat(shown(1, 16)))
    assert not torch.equal(torch.cat(batches), torch.cat(shown(2, 16)))
    assert [len(batch) for batch in shown(1, 35)] == [35, 35]
    assert [len(batch) for batch in shown(1, 100)] == [70]


def test_batch_norm_is_that_of_the_averaged_network_on_training_faces(some_faces):
    model = CBAM.model_copy(update={"drop_path_rate": 0.0, "feature_dropout": 0.0, "head_dropout": 0.0})
    networks = [network_of(model, seed) for seed in range(2)]
    mixed = mix_networks(networks, some_faces, batch_size=16, seed=3)
    by_hand = ConvNeXtEmoteNet(model)
    by_hand.load_state_dict(average_weights([network.state_dict() for network in networks]))
    before = {name: value.clone() for name, value in by_hand.named_buffers()}
    rows = np.random.default_rng(3).permutation(70)[:64].reshape(4, 16)
    pictures = [torch.from_numpy(some_faces.images[batch]).permute(0, 3, 1, 2) / 255 for batch in rows]
    update_bn(pictures, by_hand)
    wanted = by_hand.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in mixed.state_dict().items())
    changed = [name for name, value in mixed.named_buffers() if not torch.equal(value, before[name])]
    norms = sum(isinstance(module, _BatchNorm) for module in mixed.modules())
    assert sum(name.endswith("running_var") for name in changed) == norms == 3
    assert not any(module.training for module in mixed.modules())


def test_what_is_judged_can_be_made_again(some_faces):
    networks = [network_of(CBAM, seed) for seed in range(2)]
    torch.manual_seed(5)
    first = mix_networks(networks, some_faces, batch_size=16, seed=3).state_dict()
    after = torch.rand(1)
    second = mix_networks(networks, some_faces, batch_size=16, seed=3).state_dict()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), after)  # no random number of anybody else was drawn


def subsets(count: int) -> list[tuple[int, ...]]:
    return [rows for size in range(1, count + 1) for rows in combinations(range(count), size)]


@given(
    st.integers(1, 5).flatmap(lambda count: st.lists(st.integers(0, 9), min_size=2**count - 1, max_size=2**count - 1))
)
def test_a_greedy_soup_is_no_worse_than_its_best_member(values):
    count = len(values).bit_length()
    table = dict(zip(subsets(count), (value / 9 for value in values), strict=True))

    def accuracy(rows: tuple[int, ...]) -> float:
        return table[tuple(sorted(rows))]

    ranked = sorted(range(count), key=lambda row: accuracy((row,)), reverse=True)
    kept = greedy_rows(ranked, accuracy)
    assert accuracy(kept) >= max(accuracy((row,)) for row in range(count))
    assert list(kept) == [row for row in ranked if row in kept]
    for place, row in enumerate(ranked[1:], start=1):  # whoever was left out would have lowered it, at its turn
        so_far = tuple(one for one in ranked[:place] if one in kept)
        assert (row in kept) == (accuracy((*so_far, row)) >= accuracy(so_far))


def test_greedy_keeps_a_copy_and_leaves_noise_out(some_faces, quiet):
    right, noise = network_of(PLAIN, 0), network_of(PLAIN, 1)
    networks = [noise, right, copy.deepcopy(right)]
    with torch.inference_mode():
        pictures = torch.from_numpy(some_faces.images).permute(0, 3, 1, 2) / 255
        known = dataclasses.replace(some_faces, labels=right(pictures).argmax(dim=1).numpy())

    def mixed(rows: tuple[int, ...]) -> ConvNeXtEmoteNet:
        return mix_networks([networks[row] for row in rows], known, batch_size=16, seed=0)

    soups = find_soups(networks, known, mixed=mixed, console=quiet)
    assert soups.singles[1:] == (1, 1)
    assert soups.singles[0] < 0.9
    assert (soups.uniform, soups.greedy) == ((1, 2, 0), (1, 2))
    assert soups.greedy_accuracy == 1 > soups.uniform_accuracy == single_pass_accuracy(mixed((0, 1, 2)), known)
    assert soups.choose(SoupMethod.BEST) == (SoupMethod.GREEDY, (1, 2), 1)
    assert soups.choose(SoupMethod.UNIFORM) == (SoupMethod.UNIFORM, (1, 2, 0), soups.uniform_accuracy)


def test_of_equals_the_uniform_soup_is_the_best():
    soups = Soups((0.5, 0.6), (1, 0), (1,), 0.6, 0.6)
    assert soups.choose(SoupMethod.BEST)[0] == SoupMethod.UNIFORM
    assert soups._replace(uniform_accuracy=0.7).choose(SoupMethod.BEST)[0] == SoupMethod.UNIFORM
    assert soups._replace(greedy_accuracy=0.7).choose(SoupMethod.BEST) == (SoupMethod.GREEDY, (1,), 0.7)


@pytest.fixture(scope="module")
def soup_dir(run_dir, data, tmp_path_factory, quiet) -> Path:
    out = tmp_path_factory.mktemp("soup") / "runs/soup"
    make_soup([run_dir], data, out, method=SoupMethod.UNIFORM, console=quiet)
    return out


def test_a_soup_is_a_run_of_one_member(soup_dir, run_dir, data):
    record, (entry,), (network,) = read_run(soup_dir), *load_members(soup_dir)
    origins, members = load_members(run_dir)
    assert sorted(path.name for path in soup_dir.iterdir()) == ["decision.json", "members", "run.json"]
    assert record.config.training.members == 1
    assert record.data == read_run(run_dir).data
    assert [(soup_dir / path).resolve() for path in record.combined_from] == [
        run_dir / f"members/{rank}.json" for rank in (1, 2)
    ]
    for parameter, first, second in zip(*(one.parameters() for one in (network, *members)), strict=True):
        assert torch.equal(parameter, ((first.double() + second.double()) / 2).float())
    validation = training_faces(data, record.config).validation
    assert entry.validation_accuracy == single_pass_accuracy(network, validation)
    fitted = FittedDecision.parse_json(soup_dir / "decision.json")
    assert fitted.validation_accuracy["one member, one view"] == pytest.approx(entry.validation_accuracy, abs=1e-6)
    assert fitted.temperature.faces == len(validation) - len(validation) // 2
    assert (entry.weights_of, entry.epoch, entry.model) == ("soup", 0, origins[0].model)


def test_the_record_says_what_a_soup_is_made_of(soup_dir, run_dir, data):
    entry = MemberRecord.parse_json(soup_dir / "members/1.json")
    origins, members = load_members(run_dir)
    validation = training_faces(data, read_run(run_dir).config).validation
    accuracies = [single_pass_accuracy(member, validation) for member in members]
    assert (entry.soup.method, entry.soup.chosen) == (SoupMethod.UNIFORM, SoupMethod.UNIFORM)
    assert entry.soup.best_member == max(accuracies)
    assert entry.soup.uniform == entry.validation_accuracy
    assert entry.soup.greedy >= entry.soup.best_member
    found = {one.sha256: one.validation_accuracy for one in entry.soup.ingredients}
    assert found == {one.sha256: value for one, value in zip(origins, accuracies, strict=True)}
    assert all(one.kept for one in entry.soup.ingredients)
    for one in entry.soup.ingredients:
        assert MemberRecord.parse_json(soup_dir / one.member).sha256 == one.sha256
    assert MemberRecord.model_validate_json(entry.to_json()) == entry


def test_records_from_before_soups_are_read(run):
    for path in (run / "members").glob("*.json"):
        edit(path, lambda record: record.pop("soup"))
    assert [entry.soup for entry in load_members(run)[0]] == [None, None]


@pytest.mark.slow
def test_a_soup_folds_and_decides_like_its_reference(soup_dir, tmp_path, data, quiet):
    run = Path(shutil.copytree(soup_dir, tmp_path / "run"))
    edit(run / "run.json", lambda record: record["config"].update(views=["identity"]))  # folds in less time
    bundle = pipeline.build(run, tmp_path / "soup", max_batch=64, console=quiet)
    (entry,) = bundle.manifest.members
    assert entry.sha256 == sha256_of(soup_dir / "members/1.safetensors")
    faces = data.split("test").images[:40]
    wanted = sessions.open_reference(bundle)[0].run(faces)
    opened = opening.open_engines(bundle)
    assert len(opened) == sum(row.is_usable() and row.takes("fp32") for row in BACKENDS.values())
    for engine in opened:
        assert np.abs(engine.run_all(faces).probabilities - wanted.probabilities).max() < 1e-5


def test_the_command_leaves_a_planted_bad_member_out(run, tmp_path, call):
    plant_noise(run)
    out = tmp_path / "soup"
    code, said, err = call("combine", run, "--soup", "best", "-o", out)
    assert code == 0, err
    assert re.search(r"best of 2 members, one pass, \d+ faces: 0\.\d{3}\n.*uniform soup.*\n.*greedy soup", said)
    assert "chosen: the greedy soup, of 1 of 2 members" in said
    assert "the soup is that member alone. Members that do not share a start average badly" in said
    assert f"next: emoexport build {out}" in said
    entry = MemberRecord.parse_json(out / "members/1.json")
    assert [one.kept for one in entry.soup.ingredients] == [True, False]
    assert entry.soup.uniform < entry.soup.best_member == entry.soup.greedy == entry.validation_accuracy
    alone = load_file(run / "members/1.safetensors")
    assert all(torch.equal(value, alone[name]) for name, value in load_file(out / "members/1.safetensors").items())
    code, said, err = call("evaluate", "--model-path", out, "--limit", 35)
    assert code == 0, err
    assert "1 x 1 passes each (35)" in said


def test_the_command_says_so_where_a_soup_is_worse(run, tmp_path, call):
    plant_noise(run)
    code, said, err = call("combine", run, "--soup", "uniform", "-o", tmp_path / "soup")
    assert code == 0, err
    soup = MemberRecord.parse_json(tmp_path / "soup/members/1.json").soup
    assert soup.uniform < soup.best_member
    lost = f"{100 * (soup.best_member - soup.uniform):.1f}"
    assert f"the soup is worse than its best member, by {lost} points. Members that do not share" in said


def test_the_command_refuses_what_has_no_average(run, tmp_path, call):
    edit(run / "members/2.json", lambda record: record["model"].update(head_dropout=0.0, pooling=["avg"]))
    code, said, err = call("combine", run, "--soup", "best", "-o", tmp_path / "out/soup")
    assert (code, said) == (BadCheckpoint.exit_code, "")
    assert re.match(
        r"error: different networks have no average: .*members/1\.json has pooling .*'attention'\), "
        r".*members/2\.json has \('avg',\)\.\nnext: without --soup",
        err,
    )
    assert not (tmp_path / "out").exists()
    assert call("combine", run, "--soup", "fewest", "-o", tmp_path / "out/soup")[0] == UsageError.exit_code


def test_rates_of_training_do_not_matter(run, data, tmp_path, quiet):
    edit(run / "members/2.json", lambda record: record["model"].update(head_dropout=0.5, feature_dropout=0.0))
    make_soup([run], data, tmp_path / "soup", method=SoupMethod.UNIFORM, console=quiet)
    (entry,), _ = load_members(tmp_path / "soup")
    assert entry.model == MemberRecord.parse_json(run / "members/1.json").model


def test_one_member_is_no_soup(run, data, tmp_path, quiet):
    with pytest.raises(UsageError, match="a soup of 1 member averages nothing"):
        make_soup([run], data, tmp_path / "soup", method=SoupMethod.BEST, members=1, console=quiet)
    copied = Path(shutil.copytree(run, tmp_path / "runs/again"))
    for place in (run, copied):
        edit(place / "run.json", lambda record: record.update(members=["members/1.json"]))
    with pytest.raises(UsageError, match="a soup of 1 member averages nothing"):  # the same one twice
        make_soup([run, copied], data, tmp_path / "soup", method=SoupMethod.BEST, console=quiet)


def test_other_training_faces_are_refused_and_nothing_is_left(run, data, tmp_path, quiet):
    others = {**data.splits, "train": data.split("train").take(np.arange(600))}
    with pytest.raises(BadData, match=r"the training faces .* are not those of .*tiny"):
        make_soup(
            [run],
            dataclasses.replace(data, splits=others),
            tmp_path / "out/soup",
            method=SoupMethod.BEST,
            console=quiet,
        )
    assert not (tmp_path / "out").exists()


def test_a_damaged_member_is_refused_and_nothing_is_left(run, data, tmp_path, quiet):
    weights = run / "members/2.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x00")
    with pytest.raises(BadCheckpoint, match=r"2\.safetensors has the SHA-256"):
        make_soup([run], data, tmp_path / "out/soup", method=SoupMethod.BEST, console=quiet)
    assert not (tmp_path / "out").exists()
