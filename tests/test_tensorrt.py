"""TensorRT's own parser and builder, which need no GPU in TensorRT-RTX: does it take the graphs, and in which types?

They show what TensorRT refuses. How fast and how right an engine is, only a GPU shows.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from emoexport.bundle import Bundle
from emoexport.engines.machine import memory_bytes
from emoexport.engines.passport import Passport, passports_in
from emoexport.engines.tensorrt_build import BuilderSettings, build_engine
from emoexport.precision import PRECISIONS
from emoexport.summary import summarize

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
pytest.importorskip("polygraphy", reason="Polygraphy is not installed")

BETWEEN = {"fp32": "fp32", "fp16": "fp16", "bf16": "bf16", "int8": "fp32", "int8-fp16": "fp16", "fp8": "fp16"}
"""What the members' layers put out, where it is not of 8 bits."""


def copied(bundle: Bundle, folder: Path) -> Path:
    """The files of a bundle in a folder of their own, without its engines."""
    folder.mkdir()
    for file in bundle.path.iterdir():
        if file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.mark.parametrize("layout", ["bundle", pytest.param("stacked_bundle", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "precision", [pytest.param(name, marks=() if name == "fp32" else pytest.mark.slow) for name in PRECISIONS]
)
def test_tensorrt_builds_every_graph_in_the_types_it_has(precision, layout, request, tmp_path):
    chosen: Bundle = request.getfixturevalue(layout)
    engine = tmp_path / f"tensorrt-rtx-{precision}.engine"
    passport = build_engine(
        "tensorrt-rtx",
        chosen.graph(precision),
        engine,
        precision=precision,
        face_shape=(32, 32, 1),
        settings=BuilderSettings(opt_batch=(4,), max_batch=64),
    )
    assert engine.stat().st_size == passport.bytes > 10_000
    assert passport == Passport.read(engine) or Passport.read(engine).sha256 == passport.sha256
    number, between = PRECISIONS[precision].number, BETWEEN[precision]
    found, whole = passport.network, {"int32", "int64", "bool", "uint8"}
    assert {each for types in found.values() for each in types} - whole == {"fp32", between, number}
    for kind in ("convolution", "matrix_multiply", "normalization"):
        assert set(found[kind]) == {between}, kind
    for kind in ("softmax", "topk"):  # the vote
        assert set(found[kind]) <= {"fp32", "int64"}, kind
    if PRECISIONS[precision].bits == 8:
        assert set(found["quantize"]) == {number}
        assert set(found["dequantize"]) == {between}
        assert passport.asked_share == pytest.approx(0.763, abs=0.01)  # in either layout
    else:
        assert "quantize" not in found
        assert passport.asked_share == 1.0


def test_the_command_builds_them_into_a_bundle(call, bundle, tmp_path):
    """The bundle alone is needed, and stays as it was sealed."""
    mine = copied(bundle, tmp_path / "mine")
    before = (mine / "manifest.json").read_bytes()
    code, out, err = call("build", mine, "--engine", "tensorrt-rtx", "--fp16", "--max-batch", 8, "--opt-batch", 2)
    assert (code, err) == (0, "")
    assert "100% of the members' multiplications in FP16" in out
    opened = Bundle.open(mine)
    assert (mine / "manifest.json").read_bytes() == before
    (passport,) = passports_in(mine).values()
    assert passport.profiles == [[1, 2, 8]]
    assert passport.graph_sha256 == opened.graph_sha256("fp16")
    assert set(summarize(opened).passports) == {"tensorrt-rtx-fp16"}
    _, shown, _ = call("inspect", mine)
    assert "tensorrt-rtx-fp16" in shown


@pytest.mark.slow
def test_it_is_refused_where_there_is_no_gpu_and_the_process_lives(bundle, tmp_path):
    """In a process of its own: TensorRT's Runtime may end one that has no driver."""
    mine = copied(bundle, tmp_path / "mine")
    command = "import sys; from emoexport.cli import main; sys.argv[0] = 'emoexport'; main()"
    typed = [sys.executable, "-c", command]
    subprocess.run([*typed, "build", mine, "--engine", "tensorrt-rtx", "--fp32"], check=True, capture_output=True)
    found = subprocess.run(
        [*typed, "verify", mine, "--engine", "tensorrt-rtx"], capture_output=True, text=True, check=False
    )
    from emoexport.engines.cuda import find_cuda

    if find_cuda().devices:
        pytest.skip("there is a GPU")
    assert found.returncode == 3, found.stderr
    assert "a CUDA device is needed" in found.stderr


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_fold_at_full_size(tmp_path):
    """Five ConvNeXt-Large: in processes of their own, whose memory is given back; 12 GB on disk."""
    root = Path(__file__).parents[1]
    if shutil.disk_usage(tmp_path).free < 16e9 or memory_bytes()[1] < 12e9:
        pytest.skip("16 GB of disk and 12 GB of memory are needed")
    run, bundle = tmp_path / "run", tmp_path / "bundle"
    try:
        for typed in (
            [root / "docs/results/fold-full-size/untrained_run.py", "guide", run],
            ["-m", "emoexport", "build", run, "-o", bundle, "--bf16"],
            [
                "-m",
                "emoexport",
                "build",
                bundle,
                "--engine",
                "tensorrt-rtx",
                "--bf16",
                "--max-batch",
                "8",
                "--opt-batch",
                "1",
            ],
        ):
            done = subprocess.run([sys.executable, *typed], capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr[-2000:]
        (passport,) = passports_in(bundle).values()
        assert passport.bytes > 1.9e9
        assert passport.asked_share == 1.0
        assert set(passport.network["matrix_multiply"]) == set(passport.network["convolution"]) == {"bf16"}
    finally:
        shutil.rmtree(tmp_path, ignore_errors=True)


def test_settings_reach_the_builder(bundle, tmp_path):
    engine = tmp_path / "tensorrt-rtx-fp32.engine"
    settings = BuilderSettings(workspace_gib=1.0, compute_capabilities=("8.9",), max_batch=16)
    passport = build_engine(
        "tensorrt-rtx", bundle.graph("fp32"), engine, precision="fp32", face_shape=(32, 32, 1), settings=settings
    )
    assert json.loads(engine.with_suffix("").with_name("tensorrt-rtx-fp32.passport.json").read_text())["device"] == {
        "compute_capabilities": "8.9"
    }
    assert passport.settings == {"workspace_gib": 1.0, "compute_capabilities": ("8.9",)}
