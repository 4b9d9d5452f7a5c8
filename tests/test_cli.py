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
        assert "bytes; its record says" in err
        assert "next: emoexport build" in err


def test_faces_are_drawn_to_try_commands_on(call, bundle, tmp_path):
    code, out, _ = call("data", "draw", tmp_path / "my photos", "--faces", 8, "--size", 32)
    assert code == 0
    assert f"next: emoexport predict '{tmp_path}/my photos'" in out
    names = sorted(path.name for path in (tmp_path / "my photos").glob("*.png"))
    assert len(names) == 8
    assert names[0] == "00000-angry.png"
    code, out, err = call("predict", tmp_path / "my photos", "-b", bundle.path, "--format", "csv")
    assert code == 0, err
    assert len(out.splitlines()) == 9
    assert call("data", "draw", tmp_path / "my photos", "--faces", 2)[0] == 0
    assert len(list((tmp_path / "my photos").glob("*.png"))) == 2
