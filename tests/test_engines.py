import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from emoexport import opening, sessions
from emoexport.engines import BACKENDS, backends_named, open_engine
from emoexport.engines.base import Engine
from emoexport.engines.passport import passport_of
from emoexport.engines.torch_engine import TorchEngine
from emoexport.errors import BadBundle, BadInput, MissingRuntime, UsageError, WrongMachine
from emoexport.metamorphic import RELATIONS, check_relations
from emoexport.precision import PRECISIONS

CASES = [
    pytest.param(
        (backend, precision),
        marks=[
            *([pytest.mark.gpu] if backend.device == "cuda" else []),
            *([pytest.mark.slow] if backend.built_from == "fold" else []),
        ],
        id=f"{backend.name}-{precision}",
    )
    for backend in BACKENDS.values()
    for precision in backend.precisions
]

BATCHES = (1, 2, 7, 16)


@pytest.fixture(scope="module", params=CASES)
def opened(request, tmp_path_factory) -> tuple[Engine, Path]:
    """An engine, and the file it was opened from."""
    backend, precision = request.param
    if not backend.is_usable():
        pytest.skip(f"{backend.title} is not usable here")
    limits = {"precision": precision, "face_shape": (32, 32, 1), "max_batch": 64}
    bundle = request.getfixturevalue("compiled" if backend.built_from == "fold" else "bundle")
    if backend.built_from == "graph":
        file = built_in_a_process(bundle, backend, precision, tmp_path_factory.mktemp("engines"))
    else:
        entry = bundle.manifest.opened[f"{backend.name}-{precision}" if backend.built_from else precision]
        file = bundle.path / entry.file
    try:
        return open_engine(backend, file, **limits), file
    except WrongMachine as err:
        pytest.skip(str(err))


def built_in_a_process(bundle, backend, precision, folder) -> Path:
    """An engine of a copy of the bundle: a process builds for TensorRT or for TensorRT-RTX."""
    for file in bundle.path.iterdir():
        if file.is_file():
            shutil.copy(file, folder)
    flags = [] if precision == "fp32" else [f"--{precision}"]
    typed = ["build", folder, "--engine", backend.name, *flags, "--opt-batch", "1", "--opt-batch", "16"]
    done = subprocess.run([sys.executable, "-m", "emoexport", *typed], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "engines" / f"{backend.name}-{precision}.engine"


@pytest.fixture(scope="module")
def engine(opened) -> Engine:
    return opened[0]


def test_every_engine_is_within_the_tolerance_of_its_precision(engine, bundle, faces):
    wanted = sessions.open_reference(bundle)[0].run(faces[0])
    found = engine.run_all(faces[0], batch_size=32)
    tolerance = PRECISIONS[engine.precision].tolerance
    difference = np.abs(found.probabilities - wanted.probabilities)
    assert difference.max() <= tolerance.max_difference
    assert difference.mean() <= tolerance.mean_difference
    if engine.precision == "fp32":
        assert difference.max() <= 1e-5
        assert np.array_equal(found.label, wanted.label)


def test_the_passes_of_every_engine_are_those_of_the_reference(engine, bundle, faces):
    """Their mean is what the engine votes, face by face, member by member and view by view."""
    reference = sessions.open_reference(bundle)[0]
    found, wanted = engine.scores(faces[0][:6]), reference.scores(faces[0][:6])
    assert (found.shape, found.dtype) == (wanted.shape, np.float32)
    assert np.abs(found - wanted).mean() <= PRECISIONS[engine.precision].tolerance.mean_difference
    if engine.precision == "fp32":
        assert np.abs(found - wanted).max() <= 1e-5
    calibrated = reference.decision.calibrate(found.mean(axis=(1, 2)))
    assert np.abs(calibrated - engine.run(faces[0][:6]).probabilities).max() <= 2e-3
    with pytest.raises(BadInput, match="needed are uint8 faces"):
        engine.scores(faces[0][:0])


def test_precisions_do_differ(bundle, faces):
    """Or an INT8 engine might be the FP32 graph under another name."""
    opened = opening.open_engines(bundle)
    found = {engine.name: engine.run(faces[0][:16]).probabilities for engine in opened}
    for engine in opened:
        if engine.precision != "fp32":
            assert np.abs(found[engine.name] - found[f"{engine.backend}-fp32"]).max() > 1e-7, engine.name


def slack_of(engine: Engine) -> float:
    return 1e-6 if engine.precision == "fp32" else 2e-3


def test_rows_are_independent_at_every_batch_size(engine, faces):
    checks = check_relations(engine, faces[0], BATCHES, allowed=slack_of(engine), symmetric=True)
    assert {(check.relation, check.batch) for check in checks} == {(name, n) for name in RELATIONS for n in BATCHES}
    assert [check for check in checks if not check.holds] == []


def test_what_a_call_takes_is_split_and_answers_stay_the_same(engine, faces):
    wanted = engine.run(faces[0][:5]).probabilities
    started = time.perf_counter()
    parts = engine.split(faces[0][5:8])
    elapsed_ms = 1000 * (time.perf_counter() - started)
    assert np.abs(engine.run(faces[0][:5]).probabilities - wanted).max() <= slack_of(engine)
    if engine.backend == "inductor":
        assert parts is None
        return
    assert min(parts) > 0
    assert sum(parts) <= elapsed_ms
    with pytest.raises(BadInput, match="needed are uint8 faces"):
        engine.split(faces[0][:0])


def test_sizes_that_alternate_leave_each_other_alone(engine, faces):
    """What is kept for one size of a call, as CUDA graphs are, is not what another one changes."""
    wanted = {count: engine.run(faces[0][count : 2 * count]).probabilities for count in (3, 5)}
    for count in (3, 5, 3, 3, 5, 3, 5, 5):
        found = engine.run(faces[0][count : 2 * count]).probabilities
        assert np.abs(found - wanted[count]).max() <= slack_of(engine)


def test_a_copy_of_the_file_opened_again_gives_the_same(opened, faces, tmp_path):
    engine, file = opened
    copy = Path(shutil.copy(file, tmp_path))
    if passport_of(file).exists():
        shutil.copy(passport_of(file), tmp_path)
    again = open_engine(
        BACKENDS[engine.backend], copy, precision=engine.precision, face_shape=(32, 32, 1), max_batch=64
    )
    for count in BATCHES:
        found, wanted = again.run(faces[0][:count]), engine.run(faces[0][:count])
        assert np.abs(found.probabilities - wanted.probabilities).max() <= 1e-6
        assert np.array_equal(found.label, wanted.label)


@pytest.mark.parametrize(
    "given",
    [
        np.zeros((0, 32, 32, 1), dtype=np.uint8),
        np.zeros((65, 32, 32, 1), dtype=np.uint8),
        np.zeros((2, 32, 32, 3), dtype=np.uint8),
        np.zeros((2, 48, 48, 1), dtype=np.uint8),
        np.zeros((32, 32, 1), dtype=np.uint8),
        np.zeros((2, 32, 32, 1), dtype=np.float32),
        [[0]],
    ],
    ids=["none", "too many", "channels", "size", "no batch", "type", "list"],
)
def test_what_an_engine_refuses(engine, given):
    with pytest.raises(BadInput, match="needed are uint8 faces"):
        engine.run(given)


def test_slices_and_views_of_arrays_are_taken(engine, faces):
    apart = faces[0][:8:2]
    assert np.array_equal(engine.run(apart).label, engine.run(np.ascontiguousarray(apart)).label)


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=lambda row: row.name)
def test_a_file_that_is_no_graph(backend, tmp_path):
    if not backend.is_usable():
        pytest.skip(f"{backend.title} is not usable here")
    (tmp_path / "model.onnx").write_bytes(b"\x08\x07not a graph")
    with pytest.raises(BadBundle, match=r"model\.onnx"):
        open_engine(backend, tmp_path / "model.onnx", precision="fp32", face_shape=(32, 32, 1), max_batch=4)


def test_the_reference_is_an_engine_too(bundle, faces):
    reference, _, _ = sessions.open_reference(bundle)
    engine = TorchEngine(reference, face_shape=(32, 32, 1), max_batch=64)
    assert np.array_equal(engine.run(faces[0][:5]).label, reference.run(faces[0][:5]).label)


def test_names_are_checked(monkeypatch):
    with pytest.raises(UsageError, match="'tpu'"):
        backends_named(["tpu"])
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(MissingRuntime, match="OpenVINO is not installed") as caught:
        backends_named(["openvino"])
    assert "pip install" in caught.value.hint


@pytest.mark.skipif(not BACKENDS["openvino"].is_installed(), reason="openvino is not installed")
def test_signals_reach_a_process_whose_openvino_engines_have_gone(bundle):
    """In another order than they came; a signal on a stack that is freed ends a process."""
    script = """
import os, signal, sys
from pathlib import Path
from emoexport.engines import BACKENDS, open_engine
limits = {"precision": "fp32", "face_shape": tuple(map(int, sys.argv[2:])), "max_batch": 4}
first, second = (open_engine(BACKENDS["openvino"], Path(sys.argv[1]), **limits) for _ in range(2))
del first
del second
signal.signal(signal.SIGINT, lambda *_: print("told"))
os.kill(os.getpid(), signal.SIGINT)
"""
    arguments = [str(bundle.graph("fp32")), *map(str, bundle.manifest.face_shape)]
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "told\n"), done.stderr
