import json

import numpy as np
import pytest
from rich.console import Console

from emoexport.errors import BadData, UsageError
from emoexport.train.config import RunConfig, load_config, preset_names
from emoexport.train.dataset import Faces, load_data
from emoexport.train.ensemble import check_request, train_ensemble, training_faces


def test_presets_are_complete_and_differ():
    assert {"cpu", "tiny"} <= set(preset_names())
    assert load_config("cpu") != load_config("tiny")
    assert load_config("tiny", epochs=9, seed=None).training.epochs == 9


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[training]\nepoch = 3", "did you mean"),
        ("[training]\nepochs = 0", "epochs"),
        ("[model]\nchannels = 2", "channels"),
        ("training = 3", "training"),
        ("[model]\nlabels = ['happy', 'sad']", "in this order"),
        ("[model]\nbackbone_args = {pretrained = true}", "would load weights"),
        ("[training]\nseed = -1", "seed"),
        ("[training", "TOML"),
    ],
)
def test_wrong_settings_are_refused(text, message, tmp_path):
    (tmp_path / "x.toml").write_text(text)
    with pytest.raises(UsageError, match=message):
        load_config(file=tmp_path / "x.toml")
    with pytest.raises(UsageError, match="no preset 'huge'"):
        load_config("huge")


def test_a_run_learns(run_dir):
    fitted = json.loads((run_dir / "decision.json").read_text())
    assert fitted["validation_accuracy"]["the full vote"] > 2 / 7
    assert (run_dir / "metrics.csv").is_file()
    assert sorted(path.name for path in run_dir.iterdir()) == [
        "decision.json",
        "members",
        "metrics.csv",
        "run.json",
        "tensorboard",
        "training.png",
    ]


def test_validation_is_set_aside_from_train_where_there_is_none(tmp_path):
    data = load_data("synthetic:1000", size=32)
    config = RunConfig()
    assert training_faces(data, config).validation_from == "validation"
    without = type(data)(source="x", splits={name: data.splits[name] for name in ("train", "test")})
    chosen = training_faces(without, config)
    assert chosen.validation_from == "10% of train"
    assert (len(chosen.train), len(chosen.validation)) == (630, 70)
    assert np.bincount(chosen.validation.labels).tolist() == [10] * 7
    rows = {image.tobytes() for image in chosen.train.images}
    assert not rows & {image.tobytes() for image in chosen.validation.images}


@pytest.mark.slow
def test_the_tiny_preset_learns_drawn_faces_but_not_to_the_full(tmp_path, quiet):
    config = load_config("tiny", members=1)
    train_ensemble(config, load_data("synthetic:5600", size=48), tmp_path / "x", label_order="fer2013", console=quiet)
    fitted = json.loads((tmp_path / "x/decision.json").read_text())
    assert 0.75 <= fitted["validation_accuracy"]["one member, one view"] <= 0.95


def test_every_emotion_is_left_to_train_and_to_validate_on():
    data = load_data("synthetic:140", size=32)
    train = data.splits["train"]
    few = {label: np.flatnonzero(train.labels == label)[:2] for label in range(7)}
    rows = np.concatenate(list(few.values()))
    chosen = training_faces(type(data)(source="x", splits={"train": train.take(rows)}), RunConfig())
    assert (len(chosen.train), len(chosen.validation)) == (7, 7)
    copies = np.concatenate([rows, few[3]])
    labels = np.concatenate([train.labels[rows], [4, 4]])  # every happy face stands there as sad too
    conflicting = Faces(images=train.images[copies], labels=labels, flagged=np.zeros(len(copies), dtype=bool))
    with pytest.raises(BadData, match="'happy' is left to train on"):
        training_faces(type(data)(source="x", splits={"train": conflicting}), RunConfig())


def test_unknown_views_are_told_before_training(tmp_path):
    with pytest.raises(UsageError, match="'nose' is no view"):
        check_request(RunConfig(views=("identity", "nose")), tmp_path / "x", force=False)


def test_a_run_is_not_overwritten_by_accident(run_dir, config_file, quiet):
    before = (run_dir / "run.json").read_text()
    with pytest.raises(UsageError, match="holds a run"):
        train_ensemble(
            load_config(file=config_file),
            load_data("synthetic:140", size=32),
            run_dir,
            label_order="fer2013",
            console=quiet,
        )
    assert (run_dir / "run.json").read_text() == before


def test_ctrl_c_keeps_the_epochs_that_ended(tmp_path, config_file, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("emoexport.train.callbacks.EpochLines.on_train_epoch_end", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train_ensemble(
            load_config(file=config_file),
            load_data("synthetic:140", size=32),
            tmp_path / "runs/x",
            label_order="fer2013",
            console=Console(quiet=True),
        )
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [".x.unfinished"]


def test_more_members_than_epochs(tmp_path, quiet):
    config = load_config("tiny", epochs=3)
    with pytest.raises(UsageError, match="3 epochs cannot give 5"):
        train_ensemble(
            config, load_data("synthetic:140", size=48), tmp_path / "x", label_order="fer2013", console=quiet
        )
