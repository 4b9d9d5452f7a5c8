import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from emoexport import certification, opening, pipeline, sessions
from emoexport.bundle import Bundle
from emoexport.engines import BACKENDS
from emoexport.errors import BadCheckpoint, BadData, UsageError
from emoexport.files import sha256_of
from emoexport.reference import Reference
from emoexport.train.checkpoint import FittedDecision, MemberRecord, load_members, read_run
from emoexport.train.combine import best_members, combine_runs, runs_to_combine
from emoexport.train.config import load_config
from emoexport.train.dataset import DataSet, load_data
from emoexport.train.ensemble import train_ensemble, training_faces
from emoexport.verdict import Limits
from emoexport.views import views_named

CONVNEXT = """
backbone_args = {patch_size = 4, depths = [1, 1, 1, 1], dims = [16, 16, 32, 32], conv_mlp = false, ls_init_value = 1.0}
"""
TOML = """
views = ["identity", "flip"]
[model]
backbone = "%s"
image_size = 32
pyramid_channels = 16
hidden = [16]
%s
[training]
members = 2
epochs = 2
batch_size = 32
learning_rate = 4e-3
"""
BACKBONES = {
    "convnext": ("convnext_atto", CONVNEXT),
    "resnet": ("resnet10t", "backbone_args = {channels = [8, 16, 32, 64]}"),
}


@pytest.fixture(scope="module")
def data() -> DataSet:
    return load_data("synthetic:350", size=32)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data, quiet) -> Path:
    """A folder with a run of two ConvNeXts and a run of two ResNets."""
    folder = tmp_path_factory.mktemp("several") / "runs"
    for name, (backbone, arguments) in BACKBONES.items():
        file = folder.parent / f"{name}.toml"
        file.write_text(TOML % (backbone, arguments))
        train_ensemble(load_config(file=file), data, folder / name, label_order="fer2013", console=quiet)
    return folder


@pytest.fixture
def runs(trained, tmp_path) -> list[Path]:
    """Copies that a test may spoil."""
    folder = Path(shutil.copytree(trained, tmp_path / "runs"))
    return [folder / name for name in BACKBONES]


@pytest.fixture(scope="module")
def combined(trained, data, quiet) -> Path:
    """A run of three members of both."""
    runs = [trained / name for name in BACKBONES]
    combine_runs(runs, data, trained / "both", members=3, console=quiet)
    return trained / "both"


def edit(file: Path, change: Callable[[dict], object]) -> None:
    record = json.loads(file.read_text())
    change(record)
    file.write_text(json.dumps(record))


def set_accuracies(run: Path, *values: float) -> None:
    for rank, value in enumerate(values, start=1):
        edit(run / f"members/{rank}.json", lambda record, value=value: record.update(validation_accuracy=value))


def chosen_of(runs: list[Path], count: int) -> list[str]:
    return [f"{one.run.name}/{one.path.stem}" for one in best_members(runs, [read_run(run) for run in runs], count)]


def test_the_best_members_are_taken_and_one_of_each_run_where_there_is_room(runs):
    set_accuracies(runs[0], 0.9, 0.8)
    set_accuracies(runs[1], 0.7, 0.6)
    assert chosen_of(runs, 4) == ["convnext/1", "convnext/2", "resnet/1", "resnet/2"]
    assert chosen_of(runs, 3) == ["convnext/1", "convnext/2", "resnet/1"]
    assert chosen_of(runs, 2) == ["convnext/1", "resnet/1"]
    assert chosen_of(runs, 1) == ["convnext/1"]
    set_accuracies(runs[1], 0.95, 0.85)
    assert chosen_of(runs, 3) == ["resnet/1", "convnext/1", "resnet/2"]
    with pytest.raises(UsageError, match="4 different members; needed are 5") as refused:
        chosen_of(runs, 5)
    assert refused.value.hint == "--members 4"


def test_a_member_that_stands_in_two_runs_votes_once(runs, tmp_path):
    again = Path(shutil.copytree(runs[0], tmp_path / "runs/again"))
    assert len(chosen_of([*runs, again], 4)) == 4
    with pytest.raises(UsageError, match="4 different members"):
        chosen_of([*runs, again], 5)


def test_a_combined_run_is_a_run(combined, trained, data):
    record = read_run(combined)
    entries, networks = load_members(combined)
    assert sorted(path.name for path in combined.iterdir()) == ["decision.json", "members", "run.json"]
    assert record.config.training.members == len(networks) == len(record.combined_from) == 3
    assert {entry.model.backbone for entry in entries} == {"convnext_atto", "resnet10t"}
    accuracies = [entry.validation_accuracy for entry in entries]
    assert accuracies == sorted(accuracies, reverse=True)
    for entry, name, source in zip(entries, record.members, record.combined_from, strict=True):
        origin = (combined / source).resolve()
        assert origin.is_relative_to(trained.resolve())
        assert MemberRecord.parse_json(origin).sha256 == entry.sha256
        assert sha256_of((combined / name).with_suffix(".safetensors")) == entry.sha256
    assert record.data == read_run(trained / "convnext").data


def test_the_faces_are_found_from_where_the_new_run_is(trained, data, tmp_path, quiet):
    elsewhere = dataclasses.replace(data, source=str(tmp_path / "faces"))
    out = tmp_path / "deeper/both"
    combine_runs([trained / name for name in BACKBONES], elsewhere, out, members=2, console=quiet)
    source = read_run(out).data.source
    assert not Path(source).is_absolute()
    assert (out / source).resolve() == (tmp_path / "faces").resolve()


def test_its_decision_is_fitted_on_the_vote_of_its_own_members(combined, data):
    record = read_run(combined)
    fitted = FittedDecision.parse_json(combined / "decision.json")
    validation = training_faces(data, record.config).validation
    views = views_named(record.config.views)
    vote = Reference(members=load_members(combined)[1], views=views, decision=fitted.decision).run(validation.images)
    accuracy = float((vote.label == validation.labels).mean())
    assert fitted.validation_accuracy["the full vote with its rules"] == pytest.approx(accuracy, abs=1e-6)
    assert fitted.temperature.faces == len(validation) - len(validation) // 2


@pytest.mark.slow
def test_members_of_two_architectures_fold_into_one_graph(combined, tmp_path, data, quiet):
    bundle = pipeline.build(combined, tmp_path / "both", max_batch=64, console=quiet)
    assert {member.backbone for member in bundle.manifest.members} == {"convnext_atto", "resnet10t"}
    faces = data.split("test").images
    wanted = sessions.open_reference(bundle)[0].run(faces)
    opened = opening.open_engines(bundle)
    assert len(opened) == sum(row.is_usable() and row.takes("fp32") for row in BACKENDS.values())
    for engine in opened:
        found = engine.run_all(faces)
        assert np.abs(found.probabilities - wanted.probabilities).max() < 1e-5
        assert np.array_equal(found.label, wanted.label)
    loose = Limits(max_drop_points=10, max_disagreement_pct=10)
    report = certification.verify(Bundle.open(tmp_path / "both"), limits=loose, rounds=1, console=quiet)
    assert report.verdict == "certified", [engine.reasons for engine in report.engines]


DIFFERENCES = [
    (lambda record: record["config"]["model"].update(image_size=48), "image_size 32, .*resnet has 48"),
    (lambda record: record["config"]["model"].update(channels=3), "channels 1, .*resnet has 3"),
    (lambda record: record["config"].update(views=["identity"]), "views identity, flip, .*resnet has identity"),
    (lambda record: record["data"].update(train_sha256="0" * 64), "training faces SHA-256 .*resnet has SHA-256 000000"),
    (lambda record: record["data"].update(validation_sha256="0" * 64), "validation faces SHA-256 "),
]


@pytest.mark.parametrize(("change", "said"), DIFFERENCES, ids=["size", "channels", "views", "train", "validation"])
def test_runs_that_differ_are_refused(change, said, runs, data, tmp_path, quiet):
    edit(runs[1] / "run.json", change)
    with pytest.raises(BadCheckpoint, match=said) as refused:
        combine_runs(runs, data, tmp_path / "out", members=2, console=quiet)
    assert refused.value.hint
    assert not (tmp_path / "out").exists()


def test_other_data_is_refused(runs, tmp_path, quiet):
    with pytest.raises(BadData, match=r"not those of .*convnext"):
        combine_runs(runs, load_data("synthetic:210", size=32), tmp_path / "out", members=2, console=quiet)


def test_requests_that_make_no_sense_are_refused(runs, tmp_path):
    with pytest.raises(UsageError, match="found 1 different of 1 runs"):
        runs_to_combine(runs[:1], tmp_path / "out")
    with pytest.raises(UsageError, match="found 1 different of 2 runs"):
        runs_to_combine([runs[0], runs[0]], tmp_path / "out")
    with pytest.raises(UsageError, match="is one of the runs"):
        runs_to_combine(runs, runs[0], force=True)
    with pytest.raises(BadCheckpoint, match="is no training run"):
        runs_to_combine([runs[0], tmp_path / "nowhere"], tmp_path / "out")


def test_a_damaged_member_is_refused_and_nothing_is_left(runs, data, tmp_path, quiet):
    weights = runs[1] / "members/1.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x00")
    with pytest.raises(BadCheckpoint, match=r"resnet/members/1\.safetensors has the SHA-256"):
        combine_runs(runs, data, tmp_path / "out/both", members=4, console=quiet)
    assert not (tmp_path / "out").exists()


def test_a_run_is_replaced_only_by_force_and_only_by_a_whole_one(combined, runs, data, tmp_path, quiet):
    out = Path(shutil.copytree(combined, tmp_path / "both"))
    with pytest.raises(UsageError, match="holds a run already"):
        combine_runs(runs, data, out, members=2, console=quiet)
    (runs[0] / "members/1.safetensors").unlink()
    with pytest.raises(BadCheckpoint):
        combine_runs(runs, data, out, members=4, console=quiet, force=True)
    assert len(load_members(out)[1]) == 3


def test_the_command(trained, tmp_path, call):
    runs = [trained / name for name in BACKBONES]
    code, out, _ = call("combine", "--help")
    assert code == 0
    assert "Example: emoexport combine" in out
    code, out, err = call("combine", *runs, "-o", tmp_path / "both")
    assert (code, out) == (2, "")
    assert err == "error: the runs have 4 different members; needed are 5.\nnext: --members 4\n"
    code, out, err = call("combine", *runs, "-o", tmp_path / "both", "--members", 2)
    assert code == 0, err
    assert re.search(r"member 1: .*, validation accuracy 0\.\d{3}", out)
    assert "temperature " in out
    assert "points [95 %]" in out
    assert f"next: emoexport build {tmp_path / 'both'}" in out
    assert len(load_members(tmp_path / "both")[1]) == 2
