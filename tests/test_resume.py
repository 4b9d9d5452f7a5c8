"""Trainings that are cut off, run out of memory, or run on several devices: through the real command line."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from emoexport.errors import MissingRuntime, UsageError
from emoexport.files import unfinished_directory
from emoexport.train import fitting
from emoexport.train.config import load_config
from emoexport.train.dataset import load_data
from emoexport.train.ensemble import check_request, train_ensemble
from emoexport.train.lightning_module import MemberTraining

EPOCHS = 6
COURSE = (
    "training.epochs=6",
    "training.phases=[0.5, 1.0]",
    "training.ema_decay=0.9",
    "training.swa_from=4",
    "training.distill_from=3",
    "training.restart_epochs=2",
    "training.accumulate=2",
)


def command(config_file: Path, out: Path, *more: str) -> list[str]:
    script = "import sys; from emoexport.cli import main; main()"
    settings = [word for setting in COURSE for word in ("--set", setting)]
    arguments = ["train", "--data", "synthetic:420", "--config", str(config_file), "--out", str(out)]
    return [sys.executable, "-c", script, *arguments, *settings, *more]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}  # as many threads each time, so that sums are the same


def finish(arguments: list[str]) -> str:
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=240, env=environment(), check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def hashes(run: Path) -> list[tuple[str, str]]:
    members = [json.loads(path.read_text()) for path in sorted((run / "members").glob("*.json"))]
    return [(f"epoch {member['epoch']} {member['weights_of']}", member["sha256"]) for member in members]


@pytest.fixture(scope="module")
def unbroken(config_file, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("unbroken") / "run"
    finish(command(config_file, out))
    return out


def kill_when(arguments: list[str], ready) -> None:
    """Start a training and kill it, as a power cut would, as soon as `ready()`."""
    with subprocess.Popen(
        arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment()
    ) as process:
        while process.poll() is None and not ready():
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it ended before it was killed"


def epochs_in(directory: Path) -> int:
    path = directory / "metrics.csv"
    return len(path.read_text().splitlines()) - 1 if path.exists() else 0


@pytest.mark.slow
def test_a_training_killed_at_several_moments_ends_with_the_same_weights(unbroken, config_file, tmp_path):
    out = tmp_path / "run"
    kept = unfinished_directory(out)
    resume: list[str] = []
    # Before the first epoch ended; right where one is written down, before its checkpoint is; in the midst of one.
    for epochs, delay in ((0, 0.0), (1, 0.0), (3, 0.15), (5, 0.02)):
        began = time.monotonic()

        def ready(epochs=epochs, delay=delay, began=began) -> bool:
            if not (kept / "request.json").exists() or epochs_in(kept) < epochs:
                return False
            time.sleep(delay)
            return True

        kill_when(command(config_file, out, *resume), ready)
        assert not out.exists()
        resume = ["--resume"]
    finish(command(config_file, out, "--resume"))
    assert hashes(out) == hashes(unbroken)
    assert (out / "metrics.csv").read_text() == (unbroken / "metrics.csv").read_text()
    assert not kept.exists()
    seconds = json.loads((out / "run.json").read_text())["seconds"]
    assert seconds > 0.3 * json.loads((unbroken / "run.json").read_text())["seconds"]  # of all epochs, not the last


@pytest.mark.slow
def test_the_history_has_each_epoch_once_and_every_weight(unbroken):
    with (unbroken / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == [str(number) for number in range(1, EPOCHS + 1)]
    assert [row["phase"] for row in rows] == ["1"] * 3 + ["2"] * 3
    assert [bool(row["validation_accuracy_swa"]) for row in rows] == [False] * 3 + [True] * 3
    assert all(float(row["validation_accuracy_ema"]) > 0 for row in rows)
    assert (unbroken / "training.png").read_bytes().startswith(b"\x89PNG")
    assert list((unbroken / "tensorboard").glob("events.*"))
    assert not (unbroken / "checkpoints").exists()


def test_members_are_of_distinct_epochs_and_at_most_one_is_swa(unbroken):
    members = [name for name, _ in hashes(unbroken)]
    assert len({name.split()[1] for name in members}) == len(members) == 2
    assert sum(name.endswith("swa") for name in members) <= 1


def test_an_unfinished_training_is_neither_lost_nor_mixed_up(config_file, tmp_path, quiet, monkeypatch):
    out = tmp_path / "run"
    config = load_config(file=config_file, epochs=2)
    data = load_data("synthetic:420", size=32)

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(MemberTraining, "on_validation_epoch_start", stop)
    with pytest.raises(KeyboardInterrupt):
        train_ensemble(config, data, out, label_order="fer2013", console=quiet)
    assert unfinished_directory(out).is_dir()
    with pytest.raises(UsageError, match="begun and not finished") as caught:
        check_request(config, out)
    assert "--resume" in caught.value.hint
    other = load_config(file=config_file, epochs=2, settings=["training.learning_rate=0.001"])
    with pytest.raises(UsageError, match=r"begun with learning_rate = 0\.004; this call has 0\.001"):
        train_ensemble(other, data, out, label_order="fer2013", console=quiet, resume=True)
    with pytest.raises(UsageError, match="begun with train_faces = 294; this call has 490"):
        train_ensemble(
            config, load_data("synthetic:700", size=32), out, label_order="fer2013", console=quiet, resume=True
        )


def test_what_is_left_of_a_removal_is_not_gone_on_with(config_file, tmp_path):
    """Another training's checkpoint, without what that was begun with."""
    kept = unfinished_directory(tmp_path / "run")
    (kept / "checkpoints").mkdir(parents=True)
    (kept / "checkpoints" / "last.ckpt").write_text("of another")
    with pytest.raises(UsageError, match="no unfinished training"):
        check_request(load_config(file=config_file), tmp_path / "run", resume=True)
    assert not kept.exists()


def test_there_is_nothing_to_resume(config_file, tmp_path):
    with pytest.raises(UsageError, match="no unfinished training"):
        check_request(load_config(file=config_file), tmp_path / "run", resume=True)


@pytest.mark.slow
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), None])
def test_out_of_memory_halves_the_batch_and_doubles_accumulation(error, config_file, tmp_path, monkeypatch, capsys):
    from rich.console import Console

    honest, seen = MemberTraining.training_step, []

    def small_memory(self, batch, number):
        seen.append(len(batch[0]))
        if len(batch[0]) > 8:
            raise error or RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")
        return honest(self, batch, number)

    monkeypatch.setattr(MemberTraining, "training_step", small_memory)
    config = load_config(file=config_file, epochs=2)
    data = load_data("synthetic:420", size=32)
    record = train_ensemble(config, data, tmp_path / "run", label_order="fer2013", console=Console())
    assert record is not None
    assert (record.batch_size, record.accumulate) == (8, 4)
    assert seen[:3] == [32, 16, 8]
    out = capsys.readouterr().out
    assert "out of memory: going on with batches of 16, 2 of them a step" in out
    assert "out of memory: going on with batches of 8, 4 of them a step" in out


def test_memory_that_never_suffices_is_a_sentence(config_file, tmp_path, monkeypatch, quiet):
    def no_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(MemberTraining, "training_step", no_memory)
    with pytest.raises(MissingRuntime, match="does not suffice for batches of 2 faces") as caught:
        train_ensemble(
            load_config(file=config_file),
            load_data("synthetic:420", size=32),
            tmp_path / "run",
            label_order="fer2013",
            console=quiet,
        )
    assert "--batch-size" in caught.value.hint


def test_an_error_that_is_not_of_memory_is_not_swallowed(config_file, tmp_path, monkeypatch, quiet):
    def broken(*_):
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(fitting, "_fit_once", broken)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        train_ensemble(
            load_config(file=config_file),
            load_data("synthetic:420", size=32),
            tmp_path / "run",
            label_order="fer2013",
            console=quiet,
        )


@pytest.mark.slow
def test_two_processes_share_the_faces(config_file, tmp_path):
    """Each takes half of every epoch; one writes."""
    out = tmp_path / "run"
    script = tmp_path / "train_here.py"
    script.write_text("from emoexport.cli import main\nmain()\n")
    arguments = command(config_file, out, "--devices", "2", "--strategy", "ddp")
    printed = finish([sys.executable, str(script), *arguments[3:]])
    assert printed.count("epoch 6/6") == 1
    assert len(hashes(out)) == 2
    assert epochs_in(out) == EPOCHS


@pytest.mark.slow
def test_an_unknown_strategy_is_a_sentence(config_file, tmp_path):
    done = subprocess.run(
        command(config_file, tmp_path / "run", "--strategy", "magic"),
        capture_output=True,
        text=True,
        timeout=120,
        env=environment(),
        check=False,
    )
    assert done.returncode == 2
    assert "'magic'" in done.stderr
    assert "Traceback" not in done.stderr
