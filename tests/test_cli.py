import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from emoexport.precision import PRECISIONS

ROOT = Path(__file__).parents[1]


def test_without_arguments_the_map_is_shown(call):
    code, out, _ = call()
    assert code == 0
    for command in ("train", "evaluate", "build", "verify", "bench", "predict"):
        assert f"emoexport {command}" in out


@pytest.mark.parametrize(
    "command",
    [
        "train",
        "evaluate",
        "combine",
        "data audit",
        "data balance",
        "build",
        "inspect",
        "verify",
        "bench",
        "predict",
        "score",
        "package",
        "cube",
    ],
)
def test_help_has_an_example(command, call):
    code, out, _ = call(*command.split(), "--help")
    assert code == 0
    assert f"Example: emoexport {command}" in out


def test_the_map_loads_no_heavy_package():
    script = (
        "import sys; import emoexport.cli as cli\n"
        "try:\n    cli.app(['--help'], standalone_mode=False)\n"
        "finally:\n    print(sorted({'torch', 'onnx', 'onnxruntime', 'openvino', 'timm', 'scipy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip().endswith("[]")


def test_engines_load_no_torch():
    script = (
        "import sys\nfrom emoexport.engines import onnxruntime_engine, openvino_engine, timing\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.slow
def test_bare_commands_find_the_last_run_and_bundle(call, config_file, tmp_path, monkeypatch):
    """The whole way, in an empty directory, naming nothing."""
    monkeypatch.chdir(tmp_path)
    code, out, err = call("train", "--data", "synthetic:350", "--config", config_file)
    assert code == 0, err
    assert "runs/synthetic-tiny" in out
    code, out, err = call("build", "--int8", "--keep-rejected", "--calib-size", "14", "--max-batch", "32")
    assert code == 0, err
    assert "build/synthetic-tiny/model.int8.onnx" in out
    code, out, err = call("verify", "--rounds", "2", "--max-drop", "9", "--max-disagreement", "9")
    assert code == 0, out + err
    assert "verdict: certified" in out
    assert "PyTorch" in out
    code, out, err = call("bench", "--rounds", "2", "--batch", "2", "--engine", "onnxruntime")
    assert code == 0, err
    last = json.loads(out.strip().splitlines()[-1])
    assert {result["engine"] for result in last["results"]} == {"torch-fp32", "onnxruntime-fp32", "onnxruntime-int8"}
    assert sorted(path.name for path in (tmp_path / "build").iterdir()) == ["synthetic-tiny"]
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["synthetic-tiny"]


def test_inspect_shows_tables_or_one_json_document(call, bundle):
    code, out, _ = call("inspect", bundle.path)
    assert code == 0
    assert "32 (2 members x 16 views)" in out
    code, out, err = call("inspect", bundle.path, "--json")
    assert (code, err) == (0, "")
    assert set(json.loads(out)["graphs"]) == set(PRECISIONS)


def test_bench_py_is_the_same_command():
    done = subprocess.run(
        [sys.executable, ROOT / "bench.py", "no/such/bundle"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 4
    assert "no/such/bundle is no bundle" in done.stderr


def make_evil(tmp_path: Path, run_dir: Path) -> Path:
    run = Path(shutil.copytree(run_dir, tmp_path / "evil"))
    (run / "members/1.safetensors").write_bytes(b"\x80\x04cposix\nsystem\n")
    return run


# What is typed, the exit code, and the start of what is said. {…} are fixtures' paths.
MISTAKES = [
    ("train --data no/such/data", 4, "error: there is no data at no/such/data"),
    ("train --data synthetic:7", 2, "error: 'synthetic:7' needs a number"),
    ("train --preset huge", 2, "error: there is no preset 'huge'; there are cpu, guide, tiny"),
    ("train --epochs 2 --data synthetic:140", 2, "error: 2 epochs cannot give 5 checkpoints"),
    ("train --label-order klingon --data {empty_class}", 2, "error: 'klingon' is no known label order"),
    ("train --data {empty_class}", 4, "error: {empty_class}: the split 'train' has no face of 'fear'"),
    ("train --data {unknown_class}", 4, "error: {unknown_class}/train/furious/1.png: 'furious' is no label"),
    ("train --data {unreadable}", 4, "error: {unreadable}/train/angry/1.png: this is no picture"),
    ("train --init-from no.safetensors", 4, "error: there are no weights at no.safetensors"),
    ("train --resume", 2, "error: there is no unfinished training of runs/synthetic-tiny"),
    ("train --set training.swa=3", 2, "error: preset tiny: there is no setting 'training.swa'"),
    ("train --config no.toml", 2, "error: no.toml cannot be read as TOML"),
    ("build", 2, "error: nothing is named, and there is no runs/*/run.json"),
    ("build no/such/run", 4, "error: no/such/run is no training run"),
    ("build {evil}", 4, "error: {evil}/members/1.safetensors has the SHA-256"),
    ("build {run} --view nose -o {new}", 2, "error: 'nose' is no view; known are identity, flip, "),
    ("build {run} --view zoom --view zoom=2", 2, "error: --view names 'zoom' twice"),
    ("build {run} --view zoom=-1", 2, "error: --view zoom=-1: the weight is '-1'; needed is a finite number above 0."),
    ("build {run} --member 1 --member 01", 2, "error: --member names one member twice"),
    ("build {run} --member 3 -o {new}", 2, "error: there is no member 3; the run has 2, counted from 1."),
    ("build {run} --member first", 2, "error: --member first: 'first' is no number of a member."),
    ("build {run} --member 1=nan", 2, "error: --member 1=nan: the weight is 'nan'"),
    ("build {run} -o {full}", 2, "error: {full} holds other files"),
    ("build {run} --int8 --calib-data no/such/data -o {new}", 4, "error: there is no data at no/such/data"),
    ("build {bundle}", 2, "error: {bundle} is a bundle; what can be built into it are engines of tensorrt, "),
    ("build {bundle} --engine inductor", 2, "error: {bundle} is a bundle; what can be built into it are engines of "),
    ("build {bundle} --engine tensorrt-rtx --layout auto", 2, "error: {bundle} is a bundle, which is folded already; "),
    ("build {bundle} --engine tpu", 2, "error: 'tpu' is no engine that is built; known are inductor, tensorrt, "),
    ("build {bundle} --engine tensorrt-rtx --max-batch 65", 2, "error: found --max-batch 65; {bundle} takes up to 64 "),
    ("build {bundle} --engine tensorrt-rtx --opt-batch 99", 2, "error: found --min-batch 1, --opt-batch 99, "),
    ("build {bundle} --engine tensorrt --compute-capability 8.9", 2, "error: --compute-capability is of TensorRT-RTX"),
    (
        "build {bundle} --engine tensorrt-rtx --compute-capability new",
        2,
        "error: 'new' is no compute capability of its cards; known are 7.5, ",
    ),
    ("inspect", 2, "error: nothing is named, and there is no build/*/manifest.json"),
    ("inspect no/such/bundle --json", 4, "error: no/such/bundle is no bundle"),
    ("verify", 2, "error: nothing is named, and there is no build/*/manifest.json"),
    ("verify no/such/bundle", 4, "error: no/such/bundle is no bundle"),
    ("verify {bundle} --engine tpu", 2, "error: 'tpu' is no engine"),
    ("verify {bundle} --precision bf17", 2, "error: 'bf17' is no precision"),
    ("verify {bundle} --engine inductor", 4, "error: {bundle} has no engine for inductor, which takes fp32, bf16."),
    ("verify {bundle} --split holdout", 2, "error: synthetic:1400 has no split 'holdout'"),
    ("verify {bundle} --run no/such/run", 4, "error: the training run of {bundle} is not at no/such/run"),
    ("bench {bundle} --batch 1000", 2, "error: found batches of 1000; {bundle} takes 1 to 64 faces in a call."),
    ("bench {bundle} --device tpu", 2, "error: 'tpu' is no device; known are cpu, cuda."),
    ("bench {bundle} --device cuda --engine openvino", 2, "error: OpenVINO runs on cpu, and the reference was to run"),
    ("cube no/such/bundle", 4, "error: no/such/bundle is no bundle"),
    ("cube {bundle} --engine tpu", 2, "error: 'tpu' is no engine; known are torch, "),
    ("cube {bundle} --precision int8", 2, "error: torch is the reference, which computes in fp32; found is int8"),
    ("cube {bundle} --split holdout", 2, "error: synthetic:1400 has no split 'holdout'"),
    ("cube {bundle} -o {full}", 2, "error: {full} holds other files"),
    ("train --epochs none", 2, ""),
    ("fly", 2, ""),
]


@pytest.fixture
def places(tmp_path, run_dir, bundle, faces):
    from PIL import Image

    from emoexport.labels import EMOTIONS

    for name in ("empty_class", "unknown_class", "unreadable"):
        for label, emotion in enumerate(EMOTIONS):
            folder = tmp_path / name / "train" / emotion
            folder.mkdir(parents=True)
            row = int((faces[1] == label).argmax())
            Image.fromarray(faces[0][row, ..., 0]).save(folder / "1.png")
    (tmp_path / "empty_class/train/fear/1.png").unlink()
    (tmp_path / "unknown_class/train/fear").rename(tmp_path / "unknown_class/train/furious")
    (tmp_path / "unreadable/train/angry/1.png").write_text("not a picture")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.txt").write_text("years of work")
    return {
        "run": run_dir,
        "bundle": bundle.path,
        "evil": make_evil(tmp_path, run_dir),
        "new": tmp_path / "new",
        **{name: tmp_path / name for name in ("empty_class", "unknown_class", "unreadable", "full")},
    }


@pytest.mark.parametrize(("typed", "code", "said"), MISTAKES, ids=[row[0] for row in MISTAKES])
def test_mistakes_get_a_sentence_and_leave_nothing(typed, code, said, call, places, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    found, _, err = call(*typed.format(**places).split())
    assert found == code, err
    assert err.startswith(said.format(**places)), err
    assert "Traceback" not in err
    assert not said or len(err.strip().splitlines()) <= 2
    assert list((tmp_path / "here").rglob("*")) == []
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("precision", [name for name in PRECISIONS if name != "fp32"])
def test_every_precision_has_its_flag(precision, call):
    _, out, _ = call("build", "--help")
    assert f"--{precision}" in out


def test_a_run_that_is_no_directory_to_write_in(call, config_file, tmp_path):
    (tmp_path / "file").write_text("x")
    code, _, err = call("train", "--data", "synthetic:140", "--config", config_file, "--out", tmp_path / "file/x")
    assert code == 4
    assert err.startswith("error: ")
    assert "Traceback" not in err


def test_missing_weights_are_told_before_data_is_read(call, monkeypatch, tmp_path):
    from emoexport.train import pretrained

    def offline(*_, **__):
        raise ConnectionError("no route to host")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pretrained, "try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr(pretrained, "get_hf_file_metadata", offline)
    code, out, err = call("train", "--preset", "guide", "--data", "no/such/data")
    assert code == 3
    assert out == ""
    assert err.startswith("error: the weights of 'convnext_large' are not on this machine")
    assert "--init-from" in err
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_setting_names_the_nearest(call, tmp_path):
    (tmp_path / "x.toml").write_text("[training]\nlearnig_rate = 0.1\n")
    code, _, err = call("train", "--config", tmp_path / "x.toml")
    assert code == 2
    assert "learning_rate" in err


@pytest.mark.slow
def test_a_failed_verdict_is_exit_code_1(call, bundle, monkeypatch):
    from emoexport.engines.onnxruntime_engine import OnnxRuntimeEngine
    from emoexport.outcome import Outcome

    honest = OnnxRuntimeEngine._run
    monkeypatch.setattr(
        OnnxRuntimeEngine, "_run", lambda self, faces: Outcome(*(column[::-1] for column in honest(self, faces)))
    )
    code, out, _ = call("verify", bundle.path, "--engine", "onnxruntime", "--limit", "40", "--rounds", "1")
    assert code == 1
    assert "verdict: failed" in out
    assert "its answers do not go together" in out


def test_a_tampered_bundle_is_exit_code_4(call, bundle, tmp_path):
    copy = Path(shutil.copytree(bundle.path, tmp_path / "copy"))
    path = copy / "model.fp32.onnx"
    path.write_bytes(path.read_bytes()[:-100])
    for command in ("verify", "inspect"):
        code, out, err = call(command, copy)
        assert (code, out) == (4, "")
        assert "bytes; the manifest says" in err
        assert "next: emoexport build" in err
