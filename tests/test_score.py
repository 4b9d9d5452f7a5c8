"""`emoexport score`: shards planned, scored and written, each face once, whoever is killed meanwhile."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pyarrow._fs import _MockFileSystem

from emoexport import cluster, mass_scoring
from emoexport.cluster import Division, divide
from emoexport.errors import BadBundle, BadData, UsageError
from emoexport.images import decode_face
from emoexport.labels import EMOTIONS
from emoexport.prediction_formats import columns_of
from emoexport.runtime import load
from emoexport.score_record import ScoreRecord, begin, read_record
from emoexport.shard_scoring import Tally, answer_columns, read_tally, score_shard, tally_of, write_part
from emoexport.shards import Columns, Plan, plan_shards
from emoexport.storage import Storage
from emoexport.train.synthetic import synthetic_faces

FACES = 28
SHORT = Path("/tmp") / f"score-{os.getpid()}"  # for Ray's sockets, whose paths have at most 107 characters


@pytest.fixture(scope="module")
def encoded() -> list[bytes]:
    """Drawn faces as PNG."""
    files = [io.BytesIO() for _ in range(FACES)]
    for file, face in zip(files, synthetic_faces(FACES, size=32, seed=8)[0], strict=True):
        Image.fromarray(face[..., 0]).save(file, "PNG")
    return [file.getvalue() for file in files]


@pytest.fixture
def folder(encoded, tmp_path) -> Path:
    """Pictures in a folder and one below it; one that is none, a dead link, a hidden file and a text."""
    inside = tmp_path / "faces"
    (inside / "more").mkdir(parents=True)
    for number, data in enumerate(encoded):
        (inside / ("more" if number % 2 else "") / f"{number:02d}.png").write_bytes(data)
    (inside / "broken.jpg").write_bytes(b"no picture")
    (inside / "gone.png").symlink_to("nowhere.png")
    (inside / ".hidden.png").write_bytes(b"no picture")
    (inside / "notes.txt").write_text("not looked at")
    (inside / "round").symlink_to(inside, target_is_directory=True)
    return inside


@pytest.fixture
def tables(encoded, tmp_path) -> Path:
    """Parquet files as Hugging Face writes them, of small row groups; one row has no picture."""
    inside = tmp_path / "tables"
    inside.mkdir()
    rows = [
        {"image": {"bytes": data, "path": f"{number}.png"}, "label": number % 7, "name": f"face {number}"}
        for number, data in enumerate(encoded)
    ]
    rows[17]["image"] = None
    pq.write_table(pa.Table.from_pylist(rows[:18]), inside / "one.parquet", row_group_size=7)
    pq.write_table(pa.Table.from_pylist(rows[18:]), inside / "two.parquet")
    return inside


@pytest.fixture
def without_ray(monkeypatch) -> list[str]:
    """Shards are scored here, in their order, as workers do; what is listed are the parts that were."""
    scored: list[str] = []

    def score_here(division, shards, work):
        with load(work.bundle, **work.settings) as session:
            for shard in shards:
                table = score_shard(session, work.source, shard)
                write_part(work.out, shard.part, table, tally_of(table))
                scored.append(shard.part)
                yield tally_of(table), ""

    @contextmanager
    def connect(address, cores=0):
        yield [{"CPU": 2.0}]

    monkeypatch.setattr(mass_scoring, "score_on", score_here)
    monkeypatch.setattr(mass_scoring, "connect", connect)
    return scored


def plan(data: object, size: int = 8, out: object = "", **columns: object) -> Plan:
    kept = Columns.parse(columns, source="a test")
    return plan_shards(str(data), size=size, columns=kept, taken=answer_columns(EMOTIONS), out=str(out))


def answers(out: Path) -> pa.Table:
    return pa.concat_tables([pq.read_table(file) for file in sorted(out.glob("part-*.parquet"))])


def assert_scored_once(found: pa.Table, bundle, encoded: list[bytes], name: Callable[[int], str]) -> None:
    """Every face has one row, with what a session says of it."""
    ids = Counter(found["id"].to_pylist())
    assert set(ids.values()) == {1}
    size, _, channels = bundle.manifest.face_shape
    faces = np.stack([decode_face(data, size=size, channels=channels) for data in encoded])
    with load(bundle.path) as session:
        wanted = session.run(faces)
    rows = {row["id"]: row for row in found.to_pylist()}
    for number in range(len(encoded)):
        row = rows[name(number)]
        assert row["label"] == EMOTIONS[wanted.label[number]]
        assert row["confidence"] == pytest.approx(wanted.confidence[number], abs=1e-5)
        assert [row[f"p_{one}"] for one in EMOTIONS] == pytest.approx(wanted.probabilities[number], abs=1e-5)
        assert row["error"] is None


def name_in_folder(number: int) -> str:
    return f"more/{number:02d}.png" if number % 2 else f"{number:02d}.png"


def test_the_plan_has_every_face_once_and_is_the_same_again(folder, tables):
    found = plan(folder)
    files = [file for shard in found.shards for file in shard.files]
    assert sorted(files) == sorted([*map(name_in_folder, range(FACES)), "broken.jpg", "gone.png"])
    assert [shard.faces for shard in found.shards] == [8, 8, 8, 6]
    assert plan(folder) == found
    assert len({shard.part for shard in found.shards}) == 4

    rows = plan(tables, 8)
    assert [(*shard.files, shard.first, shard.faces) for shard in rows.shards] == [
        ("one.parquet", 0, 8),
        ("one.parquet", 8, 8),
        ("one.parquet", 16, 2),
        ("two.parquet", 0, 8),
        ("two.parquet", 8, 2),
    ]
    assert plan(tables / "*.parquet").shards == rows.shards
    assert plan(tables / "two.parquet").faces == 10


def test_what_changes_changes_the_names(folder):
    before = plan(folder)
    (folder / "04.png").write_bytes(b"x")
    after = plan(folder)
    assert before.digest != after.digest
    differ = [one.part != other.part for one, other in zip(before.shards, after.shards, strict=True)]
    assert differ == [True, False, False, False]
    assert {one.part for one in plan(folder, 5).shards}.isdisjoint({one.part for one in after.shards})


@pytest.mark.parametrize(
    ("columns", "error", "said"),
    [
        ({"image": "photo"}, BadData, "no column 'photo'; it has image, label, name"),
        ({"image": "label"}, BadData, "the column 'label' has int64; needed are the bytes"),
        ({"id": "key"}, BadData, "no column 'key'"),
        ({"keep": {"label": "label"}}, UsageError, "the answer has a column 'label' of its own"),
        ({"keep": {"label": "truth", "name": "truth"}}, UsageError, "a column 'truth' of its own"),
    ],
)
def test_columns_that_make_no_sense_are_told_before_anything_is_scored(tables, columns, error, said):
    with pytest.raises(error, match=said):
        plan(tables, **columns)


def test_inputs_that_make_no_sense_are_told(folder, tables, tmp_path):
    for data, said in (
        (tmp_path / "nothing", "there is no file, folder or match"),
        (folder / "notes.txt", "no picture and no Parquet"),
        ("ftp://somewhere/faces", "cannot be opened"),
    ):
        with pytest.raises(UsageError, match=said):
            plan(data)
    with pytest.raises(UsageError, match="lies in"):
        plan(folder, out=folder / "preds")
    with pytest.raises(UsageError, match="columns are named"):
        plan(folder, image="png")
    shutil.copy(tables / "one.parquet", folder)
    with pytest.raises(UsageError, match="1 Parquet files and 30 pictures"):
        plan(folder)
    (tables / "one.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(BadData, match=r"one\.parquet cannot be read as Parquet"):
        plan(tables)


def test_answers_have_the_columns_of_predict():
    wanted = columns_of(EMOTIONS)
    found = answer_columns(EMOTIONS)
    assert {name: kind for name, kind in found.items() if name not in ("id", "error")} == {
        name: kind for name, kind in wanted.items() if name in ("label", "confidence") or name.startswith("p_")
    }


def test_a_folder_is_scored_and_a_second_run_scores_nothing(call, bundle, folder, encoded, tmp_path, without_ray):
    out = tmp_path / "preds"
    code, printed, err = call("score", folder, "--out", out, "-b", bundle.path, "--part", 8)
    assert (code, printed) == (4, "")
    assert "broken.jpg: this is no picture of a known kind (10 bytes)." in err
    assert "gone.png: it cannot be read: No such file or directory." in err
    assert "2 of 30 pictures could not be read" in err
    assert "28 faces: " in err
    assert re.search(r"30 pictures in \d+ s, \d+ a second; 30 in all\.", err)
    found = answers(out)
    assert_scored_once(found, bundle, encoded, name_in_folder)
    bad = found.filter(found["error"].is_valid()).to_pylist()
    assert [row["id"] for row in bad] == ["broken.jpg", "gone.png"]
    assert all(row["label"] is row["confidence"] is row["p_sad"] is None for row in bad)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["total"]["faces"] == 30
    assert sum(summary["total"]["labels"].values()) == FACES
    assert len(without_ray) == 4

    code, _, err = call("score", folder, "--out", out, "-b", bundle.path, "--part", 8)
    assert code == 4
    assert "2 of 30 pictures could not be read" in err
    assert len(without_ray) == 4


def test_only_what_has_no_part_is_scored(call, bundle, tables, encoded, tmp_path, without_ray):
    out = tmp_path / "preds"
    asked = ("score", tables, "--out", out, "-b", bundle.path, "--part", 8, "--keep", "label=truth", "--keep", "name")
    assert call(*asked)[0] == 4
    before = {file.name: file.stat().st_mtime_ns for file in out.glob("part-*")}
    lost = sorted(before)[1]
    (out / lost).unlink()
    (out / f".{lost}.a1b2c3d4.emoexport").write_bytes(b"half of it")
    without_ray.clear()
    assert call(*(str(word).replace(str(out), f"file://{out}") for word in asked))[0] == 4
    assert without_ray == [lost]
    assert {file.name for file in out.glob("*")} == {*before, "score.json", "summary.json"}
    assert not list(out.glob(".part*"))
    assert all((out / name).stat().st_mtime_ns == time for name, time in before.items() if name != lost)
    found = answers(out)
    faces = found.to_pylist()
    assert [row["id"] for row in faces] == [name_in_tables(number) for number in range(FACES)]
    assert [row["truth"] for row in faces] == [number % 7 for number in range(FACES)]
    assert [row["name"] for row in faces] == [f"face {number}" for number in range(FACES)]
    assert_scored_once(found, bundle, encoded[:17], name_in_tables)
    assert faces[17]["error"] == "this is no picture of a known kind (0 bytes)."


def name_in_tables(number: int) -> str:
    return f"one.parquet:{number}" if number < 18 else f"two.parquet:{number - 18}"


def test_shards_of_any_size_read_the_same_rows(bundle, tables, encoded):
    """Shards begin and end within row groups, and calls within shards."""
    for size, batch in ((5, 4), (4096, 3)):
        planned = plan(tables, size, id="name")
        with load(bundle.path, batch=batch) as session:
            found = pa.concat_tables([score_shard(session, planned.source, shard) for shard in planned.shards])
        assert found["id"].to_pylist() == [f"face {number}" for number in range(FACES)]
        assert_scored_once(found, bundle, encoded[:17], lambda number: f"face {number}")


def test_a_file_that_changed_meanwhile_is_told(bundle, tables):
    planned = plan(tables)
    pq.write_table(pq.read_table(tables / "one.parquet").slice(0, 9), tables / "one.parquet")
    with load(bundle.path) as session, pytest.raises(BadData, match="other rows than when the work was planned"):
        score_shard(session, planned.source, planned.shards[1])


def test_another_scoring_is_refused_unless_forced(call, bundle, folder, tables, tmp_path, without_ray):
    out = tmp_path / "preds"
    asked = ("score", folder, "--out", out, "-b", bundle.path, "--part", 8, "--engine", "onnxruntime")
    assert call(*asked, "--precision", "fp32")[0] == 4
    first = {file.name for file in out.glob("part-*")}
    for changed, said in (
        ((*asked, "--precision", "int8"), "another engine"),
        ((*asked, "--precision", "fp32", "--part", 9), "parts of another size"),
        (("score", tables, *asked[2:], "--precision", "fp32"), "another input"),
    ):
        code, _, err = call(*changed)
        assert code == 2
        assert f"{out} has scores of {said}" in err
        assert "30 faces of" in err
        assert {file.name for file in out.glob("part-*")} == first
    (folder / "00.png").touch()
    assert "another input" in call(*asked, "--precision", "fp32")[2]
    assert call(*asked, "--precision", "int8", "--force")[0] == 4
    assert read_record(Storage(str(out))).engine == "onnxruntime-int8"
    assert len(answers(out)) == 30
    assert len(list(out.glob("part-*"))) == 4
    without_ray.clear()
    assert call("score", folder, "--out", out, "-b", bundle.path, "--part", 8)[0] == 4  # the engine that it began with
    assert without_ray == []


RECORD = ScoreRecord(
    data="x",
    input_digest="1",
    bundle="b",
    bundle_digest="2",
    engine="onnxruntime-fp32",
    labels=EMOTIONS,
    columns=None,
    faces=1,
    shards=1,
    faces_a_part=1,
)


def test_another_bundle_is_refused(tmp_path):
    out = Storage(str(tmp_path / "preds"))
    assert begin(out, RECORD, force=False) == RECORD
    assert begin(out, RECORD.model_copy(update={"data": "moved/x"}), force=False) == RECORD
    with pytest.raises(UsageError, match="another bundle"):
        begin(out, RECORD.model_copy(update={"bundle_digest": "3"}), force=False)


def test_a_worker_that_outlives_its_command_spoils_no_later_scoring(bundle, folder, tmp_path, monkeypatch):
    """Its part would have a name of the new scoring, and answers of the old engine."""
    context = SimpleNamespace(get_node_id=lambda: "here", was_current_actor_reconstructed=False)
    monkeypatch.setattr(cluster, "import_ray", lambda: SimpleNamespace(get_runtime_context=lambda: context))
    planned, out = plan(folder), Storage(str(tmp_path / "preds"))
    first, second = ({"shard": [shard.model_dump_json()]} for shard in planned.shards[:2])
    mine = RECORD.model_copy(update={"bundle_digest": bundle.manifest.digest})
    begin(out, mine, force=False)
    settings = {"engine": "onnxruntime", "precision": "fp32"}
    with pytest.raises(BadBundle, match="was replaced since the work was planned"):
        cluster._Worker(str(bundle.path), settings, planned.source, out.root, RECORD.to_json())
    worker = cluster._Worker(str(bundle.path), settings, planned.source, out.root, mine.to_json())
    assert worker(first)["error"] == [""]
    assert [path.name for path in (tmp_path / "preds").glob("part-*")] == [planned.shards[0].part]
    begin(out, mine.model_copy(update={"engine": "onnxruntime-int8"}), force=True)
    assert "another scoring was begun" in worker(second)["error"][0]
    assert [path.name for path in (tmp_path / "preds").iterdir()] == ["score.json"]


def test_folders_of_others_are_left_alone(call, bundle, folder, tmp_path, without_ray):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/part-000000.parquet").write_bytes(b"theirs")
    for force in ((), ("--force",)):
        code, _, err = call("score", folder, "--out", tmp_path / "theirs", "-b", bundle.path, *force)
        assert code == 2
        assert "holds other files (there is no score.json in it)" in err
    assert (tmp_path / "theirs/part-000000.parquet").read_bytes() == b"theirs"
    (tmp_path / "theirs/score.json").write_text("{}")
    code, _, err = call("score", folder, "--out", tmp_path / "theirs", "-b", bundle.path)
    assert code == 4
    assert "is no record of a scoring" in err


def test_a_part_that_is_none_is_told(call, bundle, folder, tmp_path, without_ray):
    out = tmp_path / "preds"
    call("score", folder, "--out", out, "-b", bundle.path)
    (part,) = out.glob("part-*")
    part.write_bytes(part.read_bytes()[:-9])
    code, _, err = call("score", folder, "--out", out, "-b", bundle.path)
    assert code == 4
    assert "is no part that was written whole" in err
    assert f"next: remove {part.name}" in err


def test_ctrl_c_leaves_whole_parts_and_says_how_it_goes_on(call, bundle, folder, tmp_path, without_ray, monkeypatch):
    out = tmp_path / "preds"
    asked = ("score", folder, "--out", out, "-b", bundle.path, "--part", 8)
    score_here = mass_scoring.score_on

    def stopped(division, shards, work):
        yield from score_here(division, shards[:2], work)
        raise KeyboardInterrupt

    out.mkdir()
    monkeypatch.setattr(mass_scoring, "score_on", stopped)
    code, _, err = call(*asked)
    assert code == 130
    assert f"Parts that are done stay in {out}; the same command goes on." in err
    assert sorted(file.suffix for file in out.iterdir()) == [".json", ".parquet", ".parquet"]
    monkeypatch.setattr(mass_scoring, "score_on", score_here)
    assert call(*asked)[0] == 4
    assert len(without_ray) == len(set(without_ray)) == 4
    assert len(answers(out)) == 30


def test_parts_are_put_into_object_stores_as_they_are(bundle, tables):
    """Where nothing is renamed: pyarrow's own store in memory stands for one."""
    store = Storage.of(_MockFileSystem(), "bucket/preds")
    store._files.create_dir("bucket/preds")
    planned = plan(tables)
    with load(bundle.path) as session:
        table = score_shard(session, planned.source, planned.shards[2])
    write_part(store, planned.shards[2].part, table, tally_of(table))
    store.sweep()
    assert [one.path for one in store.files()] == [planned.shards[2].part]
    tally = read_tally(store, planned.shards[2].part)
    assert (tally.faces, tally.errors) == (2, 1)
    assert tally.examples == ("one.parquet:17: this is no picture of a known kind (0 bytes).",)
    store.remove(planned.shards[2].part)
    assert store.files() == []


def test_tallies_add_up():
    one = Tally(faces=3, labels={"sad": 2}, errors=1, examples=("a: b",))
    two = Tally(faces=2, labels={"sad": 1, "fear": 1})
    assert one + two == Tally(faces=5, labels={"sad": 3, "fear": 1}, errors=1, examples=("a: b",))
    many = Tally(faces=30, errors=30, examples=tuple(map(str, range(15))))
    assert (many + many).errors == 60
    assert len((many + many).examples) == 20


@pytest.mark.parametrize(
    ("machines", "asked", "wanted"),
    [
        ([{"CPU": 2}], {}, Division(1, 2, 0)),
        ([{"CPU": 16}], {}, Division(4, 4, 0)),
        ([{"CPU": 1}], {"workers": 2}, Division(2, 1, 0)),
        ([{"CPU": 8}, {"CPU": 8}], {"workers": 1}, Division(1, 8, 0)),
        ([{"CPU": 8}], {"workers": 2, "threads": 3}, Division(2, 3, 0)),
        ([{"CPU": 8}, {"CPU": 32, "GPU": 4}], {"on_gpu": True}, Division(4, 10, 1)),
    ],
)
def test_cores_are_divided_among_workers(machines, asked, wanted):
    assert divide(machines, **{"workers": None, "threads": None, "on_gpu": False, **asked}) == wanted


def test_an_engine_for_gpus_needs_one():
    with pytest.raises(UsageError, match="Ray finds none"):
        divide([{"CPU": 8}], workers=None, threads=None, on_gpu=True)


def test_without_ray_the_command_that_adds_it_is_told(call, bundle, folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    code, _, err = call("score", folder, "--out", tmp_path / "preds", "-b", bundle.path)
    assert code == 3
    assert "next: pip install 'emoexport[score]'" in err
    assert not (tmp_path / "preds").exists()


def test_workers_need_no_torch():
    script = "import sys, emoexport.cluster; print({'torch', 'onnx', 'ray'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "set()"


DRIVER = """
import os, sys, time
from emoexport import cli, cluster

class Slow(cluster._Worker):
    def _score(self, shard):
        with open(os.environ["CALLS"], "a") as calls:
            print(shard.part, os.getpid(), file=calls)
        time.sleep(0.4)
        if os.environ.get("DEADLY", "?") in shard.part:
            os.kill(os.getpid(), 9)
        if os.environ.get("FULL", "?") in shard.part:
            raise OSError(28, "No space left on device", "preds/" + shard.part)
        return super()._score(shard)

cluster._Worker, cluster._RETRIES = Slow, int(os.environ.get("RETRIES", 5))
if __name__ == "__main__":
    cli.main()
"""


@pytest.fixture
def start(tmp_path, bundle, folder):
    """Starts the command on two workers that take their time and note, a line each, which shard they begin with."""
    pytest.importorskip("ray")
    (tmp_path / "driver.py").write_text(DRIVER)
    begun = []

    def run(**environment: str) -> subprocess.Popen[str]:
        words = [
            sys.executable,
            "-u",
            tmp_path / "driver.py",
            "score",
            folder,
            "--out",
            tmp_path / "preds",
            "-b",
            bundle.path,
        ]
        variables = {**os.environ, "CALLS": str(tmp_path / "calls"), "TMPDIR": str(SHORT), **environment}
        process = subprocess.Popen(
            [*map(str, words), "--part", "1", "--workers", "2", "--threads", "1"],
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        begun.append(process)
        return process

    SHORT.mkdir()
    yield run
    for process in begun:
        process.kill()
        process.wait()
    shutil.rmtree(SHORT)


def wait_for(condition: Callable[[], object], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def calls_in(tmp_path: Path) -> list[tuple[str, int]]:
    file = tmp_path / "calls"
    lines = file.read_text().splitlines() if file.exists() else []
    return [(line.split()[0], int(line.split()[1])) for line in lines]


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_of_two_workers_one_is_killed_and_every_face_is_scored_once(start, bundle, encoded, tmp_path):
    out = tmp_path / "preds"
    process = start()

    def is_half_way() -> bool:
        begun = calls_in(tmp_path)
        both = len({pid for _, pid in begun}) == 2 and len(list(out.glob("part-*"))) >= 2
        return both and not (out / begun[-1][0]).exists()

    wait_for(is_half_way)
    shard, pid = calls_in(tmp_path)[-1]
    os.kill(pid, signal.SIGKILL)
    at_kill = len(list(out.glob("part-*")))
    assert not (out / shard).exists()
    printed, err = process.communicate(timeout=120)
    assert process.returncode == 4, err
    assert printed == ""
    assert 0 < at_kill < 30
    begun = Counter(part for part, _ in calls_in(tmp_path))
    assert begun[shard] == 2  # begun again
    assert len(begun) == len(list(out.glob("part-*"))) == 30
    found = answers(out)
    assert len(found) == 30
    assert_scored_once(found, bundle, encoded, name_in_folder)
    assert json.loads((out / "summary.json").read_text())["workers_replaced"] == 1
    assert "Workers that died and were replaced: 1." in err
    lines = [line for line in err.splitlines() if "ray" in line.lower()]
    assert lines == []
    assert list(SHORT.glob(".ray.*")) == []


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_command_that_is_killed_goes_on_where_it_was(start, bundle, encoded, tmp_path):
    out = tmp_path / "preds"
    process = start()
    wait_for(lambda: len(list(out.glob("part-*"))) >= 4)
    workers = {pid for _, pid in calls_in(tmp_path)}
    process.kill()
    process.wait()
    wait_for(lambda: not any(psutil.pid_exists(pid) for pid in workers))
    done = {file.name for file in out.glob("part-*")}
    assert 4 <= len(done) < 30
    assert all(pq.read_table(out / name).num_rows == 1 for name in done)
    assert not (out / "summary.json").exists()
    (tmp_path / "calls").unlink()
    process = start()
    _, err = process.communicate(timeout=120)
    assert process.returncode == 4, err
    assert {part for part, _ in calls_in(tmp_path)} == {file.name for file in out.glob("part-*")} - done
    assert len(calls_in(tmp_path)) == 30 - len(done)
    assert_scored_once(answers(out), bundle, encoded, name_in_folder)
    assert sorted(file.suffix for file in out.iterdir()) == [".json"] * 2 + [".parquet"] * 30


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_ctrl_c_stops_ray_too_and_a_deadly_shard_ends_the_command(start, tmp_path):
    out = tmp_path / "preds"
    process = start()
    wait_for(lambda: list(out.glob("part-*")))
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "the same command goes on" in err
    wait_for(lambda: not any(psutil.pid_exists(pid) for _, pid in calls_in(tmp_path)), seconds=20)
    process = start(DEADLY="part-000029", RETRIES="1")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 3, err
    assert "error: 2 workers died, one after the other, with the same shard" in err
    assert "Traceback" not in err
    assert not list(out.glob("part-000029*"))


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_what_a_worker_cannot_do_is_told_in_a_sentence(start):
    process = start(FULL="part-000001")
    printed, err = process.communicate(timeout=120)
    assert (process.returncode, printed) == (4, "")
    assert re.search(
        r"^error: \S*preds\S* could not be written, as its disk is full: .* MB are free", err, re.MULTILINE
    )
    assert "Traceback" not in err
