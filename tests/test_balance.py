import io
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from rich.console import Console

from emoexport.errors import BadData, UsageError
from emoexport.labels import EMOTIONS
from emoexport.train.audit import face_hashes
from emoexport.train.balance import balanced_directory, make_balanced, read_balanced
from emoexport.train.config import load_config
from emoexport.train.dataset import Faces, load_data
from emoexport.train.ensemble import training_faces
from emoexport.train.synthetic import synthetic_faces

DISGUST, HAPPY = EMOTIONS.index("disgust"), EMOTIONS.index("happy")


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image[..., 0]).save(buffer, format="PNG")
    return buffer.getvalue()


def uneven_faces(channels: int = 1) -> Faces:
    """3 faces of disgust, 10 of every other emotion; votes for all but some."""
    images, labels = synthetic_faces(70, size=16, seed=6)
    votes = np.random.default_rng(0).dirichlet(np.ones(7), size=70).astype(np.float32)
    votes[::9] = np.nan
    keep = np.ones(70, dtype=bool)
    keep[np.flatnonzero(labels == DISGUST)[3:]] = False
    images = np.concatenate([images, 255 - images, images // 2], axis=3)[..., :channels]
    return Faces(images=images, labels=labels, flagged=np.zeros(70, dtype=bool), votes=votes).take(keep)


@pytest.fixture(scope="module")
def uneven() -> Faces:
    return uneven_faces()


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, uneven, quiet) -> Path:
    """A set of 7 faces an emotion."""
    directory = tmp_path_factory.mktemp("balanced") / "x"
    make_balanced(uneven, 7, directory, seed=3, console=quiet)
    return directory


def files_in(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture
def copy(unbroken, tmp_path) -> Path:
    directory = tmp_path / "copy"
    directory.mkdir()
    for name, data in files_in(unbroken).items():
        (directory / name).write_bytes(data)
    return directory


def test_every_emotion_has_as_many(unbroken, uneven):
    faces, record = read_balanced(unbroken)
    assert np.bincount(faces.labels).tolist() == [7] * 7
    assert faces.images.shape == (49, 16, 16, 1)
    counts = {name: (part.had, part.copied, part.augmented, part.dropped) for name, part in record.emotions.items()}
    assert counts == {name: (3, 3, 4, 0) if name == "disgust" else (10, 7, 0, 3) for name in EMOTIONS}
    assert record.faces_sha256 == uneven.sha256()


def test_rows_say_where_they_come_from(unbroken, uneven):
    faces, record = read_balanced(unbroken)
    hashes = face_hashes(uneven.images)
    for label, emotion in enumerate(EMOTIONS):
        table = pq.read_table(unbroken / f"train-{emotion}.parquet").to_pylist()
        images, votes = faces.images[faces.labels == label], faces.votes[faces.labels == label]
        for cells, image, vote in zip(table, images, votes, strict=True):
            source = cells["source_row"]
            assert cells["source_blake2b"] == hashes[source]
            assert (cells["label"], cells["split"], uneven.labels[source]) == (emotion, "train", label)
            assert np.array_equal(image, uneven.images[source]) is (cells["made"] == "copied")
            assert np.array_equal(vote, uneven.votes[source], equal_nan=True)
        copied = {cells["source_row"] for cells in table if cells["made"] == "copied"}
        own = set(np.flatnonzero(uneven.labels == label).tolist())
        assert copied | set(record.emotions[emotion].dropped_rows) == own
        assert not copied & set(record.emotions[emotion].dropped_rows)


@pytest.mark.parametrize("channels", [1, 3])
def test_copies_are_spread_evenly_and_differ(channels, tmp_path, quiet):
    faces = uneven_faces(channels)
    make_balanced(faces, 23, tmp_path / "x", seed=0, console=quiet)
    read, _ = read_balanced(tmp_path / "x")
    assert read.images.shape == (7 * 23, 16, 16, channels)
    assert len(set(face_hashes(read.images))) == 7 * 23
    for emotion in ("disgust", "happy"):
        table = pq.read_table(tmp_path / "x" / f"train-{emotion}.parquet").to_pylist()
        times = Counter(cells["source_row"] for cells in table if cells["made"] == "augmented")
        assert max(times.values()) - min(times.values()) <= 1
        assert sum(times.values()) == (20 if emotion == "disgust" else 13)


def test_the_directory_is_data_like_any_other(unbroken):
    data = load_data(str(unbroken), size=16, label_order="affectnet")  # labels are names
    assert list(data.splits) == ["train"]
    read, loaded = read_balanced(unbroken)[0], data.splits["train"]
    rows = np.argsort(loaded.labels, kind="stable")  # files come by name there, by emotion here
    assert np.array_equal(loaded.images[rows], read.images)
    assert np.allclose(loaded.votes[rows], read.votes, atol=1e-6, equal_nan=True)


def test_an_emotion_depends_on_the_inputs_alone(unbroken, uneven, tmp_path, quiet):
    np.random.default_rng().random()
    make_balanced(uneven, 7, tmp_path / "again", seed=3, console=quiet)
    assert files_in(tmp_path / "again") == files_in(unbroken)
    make_balanced(uneven, 7, tmp_path / "other", seed=4, console=quiet)
    assert not set(files_in(tmp_path / "other").values()) & set(files_in(unbroken).values())


def test_random_numbers_of_the_caller_are_left_alone(uneven, tmp_path, quiet):
    import torch

    torch.manual_seed(0)
    before = torch.get_rng_state()
    make_balanced(uneven, 4, tmp_path / "x", seed=0, console=quiet)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_sound_set_is_reused(copy, uneven, capsys):
    before = {path: path.stat().st_mtime_ns for path in copy.iterdir()}
    make_balanced(uneven, 7, copy, seed=3, console=Console(width=200))
    assert "balanced set reused" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in copy.iterdir()} == before


# Where a run is killed: at the n-th call of a function that balance.py uses; and what stands there then.
KILLS = [("os.fsync", 1, None), ("FaceAugmentation.forward", 1, 1), ("write_text", 4, 2)]

SCRIPT = """
import os, signal, sys
from pathlib import Path
from rich.console import Console
from emoexport.train import balance
from emoexport.train.dataset import load_data

calls = 0
def killed(honest):
    def call(*arguments):
        global calls
        calls += 1
        if calls == int(sys.argv[3]):
            os.kill(os.getpid(), signal.SIGKILL)
        return honest(*arguments)
    return call

*owner, name = sys.argv[2].split(".")
owner = {"os": os, "": balance}.get("".join(owner)) or getattr(balance, owner[0])
setattr(owner, name, killed(getattr(owner, name)))
faces = load_data(sys.argv[1] + "/train.parquet", size=16).splits["train"]
balance.make_balanced(faces, 7, Path(sys.argv[1]) / "x", seed=3, console=Console(quiet=True))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
@pytest.mark.parametrize(("function", "call", "finished"), KILLS)
def test_a_killed_run_goes_on_where_it_stopped(function, call, finished, uneven, unbroken, tmp_path, capsys):
    cells = [{"bytes": png(image), "path": None} for image in uneven.images]
    pq.write_table(pa.table({"png": cells, "label": uneven.labels}), tmp_path / "train.parquet")
    faces = load_data(str(tmp_path / "train.parquet"), size=16).splits["train"]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, tmp_path, function, str(call)], timeout=120, check=False, env=os.environ
    )
    assert done.returncode == -9
    half_written = [path.name for path in (tmp_path / "x").iterdir() if path.name.startswith(".")]
    assert bool(half_written) is (function != "write_text")
    if finished is None:
        with pytest.raises(BadData, match="no balanced set at"):
            read_balanced(tmp_path / "x")
    else:
        with pytest.raises(BadData, match=f"is unfinished: {finished} of 7 emotions are there") as raised:
            read_balanced(tmp_path / "x")
        assert f"emoexport data balance D --per-class 7 --out {tmp_path / 'x'}" in raised.value.hint
    make_balanced(faces, 7, tmp_path / "x", seed=3, console=Console(width=200))
    assert ("is continued" in capsys.readouterr().out) is bool(finished)
    make_balanced(faces, 7, tmp_path / "unbroken", seed=3, console=Console(quiet=True))
    assert files_in(tmp_path / "x") == files_in(tmp_path / "unbroken")
    assert np.array_equal(read_balanced(tmp_path / "x")[0].images, read_balanced(unbroken)[0].images)


@pytest.mark.parametrize("damage", ["cut", "flipped", "missing"])
def test_a_damaged_file_is_never_used(damage, copy, unbroken, uneven, capsys):
    path = copy / "train-sad.parquet"
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(data[:-9] if damage == "cut" else data[:99] + bytes([data[99] ^ 1]) + data[100:])
    with pytest.raises(BadData, match=r"train-sad\.parquet is missing or was changed"):
        read_balanced(copy)
    make_balanced(uneven, 7, copy, seed=3, console=Console(width=200))
    assert "train-sad.parquet is missing or was changed; it is made anew" in capsys.readouterr().out.replace("\n", "")
    assert files_in(copy) == files_in(unbroken)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "balance.json"),
        ('{"schema_version": 2}', "schema_version"),
        (None, "'angry' has 7 faces, not 8"),
    ],
)
def test_a_spoilt_record_is_refused(text, message, copy, uneven, quiet):
    path = copy / "balance.json"
    path.write_text(text or json.dumps({**json.loads(path.read_text()), "per_emotion": 8}))
    for call in (lambda: read_balanced(copy), lambda: make_balanced(uneven, 7, copy, seed=3, console=quiet)):
        with pytest.raises(BadData, match=message) as raised:
            call()
        assert "emoexport data balance" in raised.value.hint


def test_a_set_of_other_inputs_is_refused(copy, uneven, quiet):
    before = files_in(copy)
    other = uneven.take(np.arange(len(uneven))[::-1])
    unvoted = Faces(images=uneven.images, labels=uneven.labels, flagged=uneven.flagged)
    for faces, count, seed, differing in (
        (uneven, 8, 3, "per_emotion is 7, not 8"),
        (uneven, 7, 4, "seed is 3, not 4"),
        (other, 7, 3, f"faces_sha256 is {uneven.sha256()}, not {other.sha256()}"),
        (unvoted, 7, 3, "votes_sha256 is .*, not None"),
    ):
        with pytest.raises(BadData, match=differing) as raised:
            make_balanced(faces, count, copy, seed=seed, console=quiet)
        assert f"emoexport data balance D --per-class {count}" in raised.value.hint
        assert balanced_directory("x", faces, count, seed=seed) != balanced_directory("x", uneven, 7, seed=3)
    assert files_in(copy) == before


@pytest.mark.parametrize("with_record", [True, False])
@pytest.mark.parametrize("name", ["thesis.txt", "train-joy.parquet"])
def test_other_files_are_left_alone(name, with_record, copy, uneven, quiet):
    for path in copy.iterdir():
        if not with_record:
            path.unlink()
    (copy / name).write_text("years of work")
    before = files_in(copy)
    with pytest.raises(UsageError, match=f"holds other files .{name}"):
        make_balanced(uneven, 7, copy, seed=3, console=quiet)
    assert files_in(copy) == before


def test_a_file_in_the_way_and_an_absent_emotion(uneven, tmp_path, quiet):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="is a file; needed is a directory"):
        make_balanced(uneven, 7, tmp_path / "file", seed=3, console=quiet)
    with pytest.raises(BadData, match="no face of 'happy'"):
        make_balanced(uneven.take(uneven.labels != HAPPY), 7, tmp_path / "x", seed=3, console=quiet)
    assert not (tmp_path / "x").exists()


def test_the_default_directory_is_named_for_data_and_inputs(uneven):
    assert balanced_directory("a/fer2013.csv", uneven, 7, seed=0).as_posix().startswith("balanced/fer2013-")
    name = balanced_directory("synthetic:5600", uneven, 7, seed=0).name
    assert name.startswith("synthetic-")
    assert len(name) == len("synthetic-") + 8


def test_the_command_balances_what_train_trains_on(config_file, tmp_path, monkeypatch, call):
    monkeypatch.chdir(tmp_path)
    images, labels = synthetic_faces(140, size=32, seed=8)
    pq.write_table(pa.table({"png": [png(image) for image in images], "label": labels}), "train.parquet")
    typed = ("data", "balance", "train.parquet", "--per-class", 25, "--config", config_file, "--seed", 5)
    code, out, err = call(*typed)
    assert code == 0, err
    assert [line.split() for line in out.splitlines() if line.strip().startswith("sad ")] == [
        ["sad", "18", "18", "7", "0"]
    ]
    (directory,) = Path("balanced").iterdir()
    assert f"balanced set: {directory}" in out
    assert f"emoexport train --data train.parquet --config {config_file} --seed 5" in out
    chosen = training_faces(load_data("train.parquet", size=32), load_config(file=config_file, seed=5))
    assert directory == balanced_directory("train.parquet", chosen.train, 25, seed=5)
    table = pa.concat_tables(pq.read_table(path) for path in directory.glob("*.parquet"))
    sources = set(table["source_blake2b"].to_pylist())
    assert sources == set(face_hashes(chosen.train.images))
    assert not sources & set(face_hashes(chosen.validation.images))
    code, out, _ = call(*typed)
    assert code == 0
    assert "balanced set reused" in out
    code, _, err = call(*typed, "--out", tmp_path)
    assert code == 2
    assert "holds other files" in err


def test_help_has_an_example(call):
    code, out, _ = call("data", "balance", "--help")
    assert code == 0
    assert "Example: emoexport data balance" in out
