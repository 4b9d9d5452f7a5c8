import time
from pathlib import Path

import numpy as np
import pytest

from emoexport import gate
from emoexport.bundle import Bundle
from emoexport.engines import BACKENDS
from emoexport.engines.base import Engine
from emoexport.gate import judge_graphs
from emoexport.outcome import Outcome
from emoexport.train.dataset import Faces

COUNT = 900
TRUTH = np.arange(COUNT) % 7


class Scripted(Engine):
    """Says what it is told about a face, whose number is written in its first pixels, and takes as long."""

    backend = "onnxruntime"

    def __init__(self, precision: str, seconds: float, wrong: int) -> None:
        super().__init__(precision=precision, face_shape=(2, 2, 1), max_batch=64)
        self.seconds, self.wrong = seconds, wrong

    def _run(self, faces):
        time.sleep(self.seconds)
        number = faces[:, 0, 0, 0] + 256 * faces[:, 0, 1, 0].astype(np.int64)
        label = np.where(number < self.wrong, (TRUTH[number] + 1) % 7, TRUTH[number])
        return Outcome(np.eye(7, dtype=np.float32)[label], label, np.ones(len(label), np.float32))

    def _scores(self, faces):
        raise AssertionError("the gate asks for decisions only")


@pytest.fixture
def judged(monkeypatch, quiet):
    def on(count: int = COUNT, **engines: tuple[float, int]):
        numbers = np.arange(COUNT)
        images = np.zeros((COUNT, 2, 2, 1), np.uint8)
        images[:, 0, 0, 0], images[:, 0, 1, 0] = numbers % 256, numbers // 256
        faces = Faces(images=images, labels=TRUTH, flagged=np.zeros(COUNT, bool))
        monkeypatch.setattr(gate, "backends_named", lambda _: [BACKENDS["onnxruntime"]])
        monkeypatch.setattr(
            gate, "open_engine", lambda backend, graph, *, precision, **_: Scripted(precision, *engines[precision])
        )
        graphs = {name: Path(name) for name in engines}
        return judge_graphs(graphs, faces, max_batch=64, count=count, console=quiet)

    return on


def test_faster_and_as_often_right_is_recommended(judged):
    found = judged(fp32=(0.006, 100), fp16=(0.004, 100), int8=(0.002, 101))["int8"]
    assert (found.verdict, found.engine, found.rival) == ("recommended", "onnxruntime-int8", "onnxruntime-fp16")
    assert found.times_as_fast.low > 1.2
    assert found.gain_points.value == pytest.approx(-100 / COUNT, abs=1e-3)
    assert found.faces == COUNT
    assert -1 < found.bound_points < found.gain_points.value


@pytest.mark.parametrize(
    ("int8", "points"),
    [((0.004, 0), 0.0), ((0.001, 60), -6000 / COUNT)],
    ids=["slower", "wrong more often"],
)
def test_what_is_slower_or_more_often_wrong_is_not(judged, int8, points):
    found = judged(fp32=(0.002, 0), int8=int8)["int8"]
    assert found.verdict == "not recommended"
    assert "times as fast as onnxruntime-fp32" in found.reason
    assert f"{points:+.2f} points" in found.reason


def test_too_few_faces_show_nothing(judged):
    found = judged(40, fp32=(0.004, 0), int8=(0.001, 0))["int8"]
    assert (found.verdict, found.faces, found.gain_points.value) == ("not recommended", 40, 0.0)


def test_what_is_meant_for_gpus_is_not_judged_here(bundle, judged):
    assert judged(fp32=(0.0, 0)) == {}
    for name in ("int8-fp16", "fp8"):
        assert bundle.manifest.gate[name].verdict == "not judged"


@pytest.mark.slow
def test_a_rejected_graph_is_left_out_unless_it_is_asked_to_be_kept(run_dir, tmp_path, call, int8_is_slower):
    out, options = tmp_path / "x", ("--int8", "--fp16", "--calib-size", 14)
    with int8_is_slower():
        code, said, _ = call("build", run_dir, "-o", out, *options)
    assert (code, "INT8 not recommended here: " in said) == (0, True)
    assert "it is not kept, --keep-rejected would" in said
    left = Bundle.open(out)
    assert set(left.manifest.graphs) == {"fp32", "fp16"}
    assert not list(out.glob("*int8*"))
    assert left.manifest.gate["int8"].verdict == "not recommended"
    assert left.build_command().endswith("--fp16 --int8 --calib-size 14")
    assert "not recommended" not in call("verify", out, "--limit", 14, "--rounds", 1)[1]
    with int8_is_slower():
        code, said, _ = call("build", run_dir, "-o", out, *options, "--keep-rejected")
    assert (code, "--keep-rejected would" in said) == (0, False)
    code, said, _ = call("verify", out, "--limit", 14, "--rounds", 1)
    assert "INT8 is not recommended where this was built: " in said
    assert "times as fast as" in (out / "reports" / "parity.md").read_text()


def test_where_a_face_takes_seconds_faces_are_timed_one_by_one(judged, monkeypatch):
    called = []
    monkeypatch.setattr(gate, "_SLOW", 0.003)
    monkeypatch.setattr(gate, "_SECONDS", 0.01)
    plain = Scripted._run
    monkeypatch.setattr(Scripted, "_run", lambda engine, faces: (called.append(len(faces)), plain(engine, faces))[1])
    found = judged(32, fp32=(0.006, 0), int8=(0.002, 0))["int8"]
    assert set(called) == {1}
    assert found.times_as_fast.low > 1.2
