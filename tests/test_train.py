import json

import numpy as np
import pytest
from rich.console import Console

from emoexport.errors import UsageError
from emoexport.train.config import RunConfig, load_config, preset_names
from emoexport.train.dataset import load_data
from emoexport.train.ensemble import train_ensemble, training_faces


def test_presets_are_complete_and_differ():
    assert preset_names() == ["cpu", "tiny"]
    assert load_config("cpu") != load_config("tiny")
    assert load_config("tiny", epochs=9, seed=None).training.epochs == 9


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[training]\nepoch = 3", "did you mean"),
        ("[training]\nepochs = 0", "epochs"),
        ("[model]\nchannels = 2", "channels"),
        ("training = 3", "training"),
        ("[training", "TOML"),
    ],
)
def test_wrong_settings_are_refused(text, message, tmp_path):
    (tmp_path / "x.toml").write_text(text)
    with pytest.raises(UsageError, match=message):
        load_config(file=tmp_path / "x.toml")
    with pytest.raises(UsageError, match="there are cpu, tiny"):
        load_config("huge")


def test_a_run_learns(run_dir):
    fitted = json.loads((run_dir / "decision.json").read_text())
    assert fitted["validation_accuracy"]["the full vote"] > 2 / 7
    assert (run_dir / "metrics.csv").is_file()
    assert sorted(path.name for path in run_dir.iterdir()) == ["decision.json", "members", "metrics.csv", "run.json"]


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


def test_ctrl_c_ends_training_and_leaves_nothing(tmp_path, config_file, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("emoexport.train.ensemble.EpochLines.on_train_epoch_end", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train_ensemble(
            load_config(file=config_file),
            load_data("synthetic:140", size=32),
            tmp_path / "runs/x",
            label_order="fer2013",
            console=Console(quiet=True),
        )
    assert list((tmp_path / "runs").iterdir()) == []


def test_more_members_than_epochs(tmp_path, quiet):
    config = load_config("tiny", epochs=3)
    with pytest.raises(UsageError, match="3 epochs cannot give 5"):
        train_ensemble(
            config, load_data("synthetic:140", size=48), tmp_path / "x", label_order="fer2013", console=quiet
        )
