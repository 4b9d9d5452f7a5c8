"""Real commands onto a disk that is full: a small one in memory, mounted where nobody else sees it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from emoexport.train.synthetic import synthetic_faces

SCRIPT = """
import ctypes, hashlib, io, json, os, shutil, subprocess, sys, traceback
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

disk, cases = Path(sys.argv[1]), json.loads(sys.argv[2])

def contents():
    return {str(path.relative_to(disk)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
            for path in sorted(disk.rglob("*")) if path.name != "filler"}

def fill(free):
    with (disk / "filler").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass
        file.truncate(max(0, file.tell() - free))

from emoexport import cli

found = []
for words, old, free in cases:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "none", disk], check=True)
    if old:
        shutil.copytree(old, disk / "old", symlinks=True)
    fill(free)
    before = contents()
    out, err, code = io.StringIO(), io.StringIO(), 0
    sys.argv = ["emoexport", *words]
    with redirect_stdout(out), redirect_stderr(err):
        try:
            cli.main()
        except SystemExit as ended:
            code = ended.code or 0
        except BaseException:
            code = traceback.format_exc()
    after = contents()
    found.append([code, err.getvalue(), sorted(set(before.items()) ^ set(after.items())), [*after]])
    subprocess.run(["umount", "-l", disk], check=True)
print(json.dumps(found))
"""


def can_mount(folder: Path) -> bool:
    """Whether a disk can be mounted in a namespace of its own."""
    if sys.platform != "linux" or shutil.which("unshare") is None:
        return False
    words = ["unshare", "-rm", "mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder)]
    return subprocess.run(words, capture_output=True, check=False).returncode == 0


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_commands_end_with_a_sentence_and_leave_what_was_there(bundle, run_dir, config_file, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if not can_mount(disk):
        pytest.skip("no disk can be mounted here: unshare -rm mount does not work")
    pictures = tmp_path / "faces"
    pictures.mkdir()
    for number, face in enumerate(synthetic_faces(80, size=32, seed=8)[0]):
        Image.fromarray(face[..., 0]).save(pictures / f"{number}.png")
    small = tmp_path / "bundle"
    shutil.copytree(bundle.path, small)
    shutil.rmtree(small / "reports", ignore_errors=True)
    one = ("--engine", "onnxruntime", "--precision", "fp32")
    few = ("--workers", 1, "--threads", 1)
    train = ("train", "--data", "synthetic:210", "--config", config_file, "--epochs", 2, "--force", "--out")
    verify = ("verify", disk / "old", "--run", run_dir, *one, "--limit", 20, "--rounds", 1, "--batch", 4)
    cases = {
        "build": (("build", run_dir, "-o", disk / "old", "--member", 1, "--view", "identity"), small, 60_000),
        "train": ((*train, disk / "old"), run_dir, 60_000),
        "verify": (verify, small, 4096),
        "package": (("package", small, "--triton", disk / "triton", *one), None, 60_000),
        "score": (("score", pictures, "-b", small, "--out", disk / "preds", *one, *few), None, 12288),
        "predict": (("predict", pictures, "-b", small, "-o", disk / "faces.csv"), None, 4096),
    }
    words = [[[*map(str, words)], old and str(old), free] for words, old, free in cases.values()]
    done = subprocess.run(
        ["unshare", "-rm", sys.executable, "-c", SCRIPT, str(disk), json.dumps(words)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": "/tmp"},  # Ray's sockets have short paths
    )
    assert done.returncode == 0, done.stderr
    for name, (code, err, changed, there) in zip(cases, json.loads(done.stdout.splitlines()[-1]), strict=True):
        assert code == 4, (name, code, err)
        assert err.count("error: ") == 1, (name, err)
        assert f"error: {disk}" in err, (name, err)
        assert "could not be written, as its disk is full: " in err, (name, err)
        assert "Traceback" not in err, (name, err)
        if name == "train":  # the epochs that ended are kept; what stood there is as it was
            changed = [path for path, _ in changed if not path.startswith(".old.unfinished")]  # noqa: PLW2901
        if name == "score":  # what was begun is kept
            assert {path for path, _ in changed} == {"preds", "preds/score.json"}
            continue
        assert not changed, (name, changed)
        assert not any(path.endswith(".emoexport") for path in there), (name, there)
