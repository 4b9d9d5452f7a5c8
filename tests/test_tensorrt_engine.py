"""Engines of TensorRT 10, 11 and RTX, built and run through the names that each version has, on a fake device."""

import ctypes
import dataclasses
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from fake_tensorrt import VERSIONS, FakeDevice, FakeDriver, make_8_6, make_module

from emoexport import certification, opening, prebuilt
from emoexport.bundle import Bundle
from emoexport.engines import BACKENDS, backends_named, cuda, open_engine, tensorrt_engine
from emoexport.engines.certificate import read_certificate
from emoexport.engines.passport import Passport, passport_of, passports_in
from emoexport.engines.tensorrt_build import BuilderSettings, build_engine
from emoexport.engines.tensorrt_engine import TensorRtEngine
from emoexport.errors import BadBundle, BadInput, CheckFailed, MissingRuntime, UsageError, WrongMachine
from emoexport.verdict import Limits

SHAPE = (32, 32, 1)
FULL = "tensorrt-11.4.0"


def with_driver(monkeypatch, driver: FakeDriver) -> None:
    """Give the process a driver."""
    proxy = SimpleNamespace(
        **{name: getattr(ctypes, name) for name in ("byref", "c_int", "c_size_t", "create_string_buffer")},
        CDLL=lambda _: driver,
    )
    monkeypatch.setattr(cuda, "ctypes", proxy)
    cuda.find_cuda.cache_clear()


@pytest.fixture
def gpu(monkeypatch):
    """A machine with a GPU."""
    with_driver(monkeypatch, FakeDriver())
    yield
    cuda.find_cuda.cache_clear()


@pytest.fixture
def device(monkeypatch, gpu) -> FakeDevice:
    made = FakeDevice()
    monkeypatch.setattr(tensorrt_engine, "open_device_memory", lambda: made)
    return made


@pytest.fixture
def runtime(request, monkeypatch, device):
    """The module of a version in place, and Polygraphy as a process has it that has built nothing yet."""
    api = getattr(request, "param", FULL)
    module = make_8_6(device) if api == "8.6" else make_module(api, device)
    for name in [name for name in sys.modules if name.split(".")[0] == "polygraphy"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    tensorrt_engine._logger.cache_clear()
    yield module
    for name in [name for name in sys.modules if name.split(".")[0] == "polygraphy"]:
        del sys.modules[name]


def backend_of(module) -> str:
    return module.__name__.replace("_", "-")


def built(bundle: Bundle, module, folder: Path, precision: str = "fp32", **settings) -> Path:
    """An engine of a bundle's graph."""
    settings = {"opt_batch": (16,), "max_batch": 64, **settings}
    engine = folder / "engines" / f"{backend_of(module)}-{precision}.engine"
    build_engine(
        backend_of(module),
        bundle.graph(precision),
        engine,
        precision=precision,
        face_shape=SHAPE,
        settings=BuilderSettings(**settings),
    )
    return engine


def opened(engine: Path, precision: str = "fp32", max_batch: int = 64) -> TensorRtEngine:
    backend = BACKENDS[engine.stem.removesuffix(f"-{precision}")]
    session = open_engine(backend, engine, precision=precision, face_shape=SHAPE, max_batch=max_batch)
    assert isinstance(session, TensorRtEngine)
    return session


@pytest.fixture
def wanted(bundle):
    """What ONNX Runtime answers by itself."""
    return open_engine(BACKENDS["onnxruntime"], bundle.graph("fp32"), precision="fp32", face_shape=SHAPE, max_batch=64)


@pytest.mark.parametrize("runtime", VERSIONS, indirect=True)
def test_every_version_builds_and_runs_with_the_names_it_has(runtime, bundle, wanted, faces, tmp_path):
    seen = []
    engine = tmp_path / "engines" / f"{backend_of(runtime)}-fp32.engine"
    passport = build_engine(
        backend_of(runtime),
        bundle.graph("fp32"),
        engine,
        precision="fp32",
        face_shape=SHAPE,
        settings=BuilderSettings(workspace_gib=2, optimization_level=4),
        progress=lambda *step: seen.append(step),
    )
    assert seen == [("Building engine", 0, 2), ("Building engine", 1, 2), ("Building engine", 2, 2)]
    assert passport == dataclasses.replace(Passport.read(engine), digest="")
    assert passport.versions[backend_of(runtime)] == runtime.__version__
    assert passport.settings == {"workspace_gib": 2, "optimization_level": 4}
    assert (passport.asked_share, passport.profiles) == (1.0, [[1, 16, 64]])
    session = opened(engine)
    for count in (1, 2, 7, 16):
        for _ in range(3):  # by itself, captured, launched
            for found, right in zip(session.run(faces[0][:count]), wanted.run(faces[0][:count]), strict=True):
                assert np.array_equal(found, right)
        assert np.array_equal(session.scores(faces[0][:count]), wanted.scores(faces[0][:count]))
    by_itself = "rtx" in backend_of(runtime)
    assert session.uncaptured == ("TensorRT-RTX captures by itself" if by_itself else "")
    assert session._memory.captures == (0 if by_itself else 4)


def test_tf32_is_off_and_hardware_is_as_asked_for(runtime, bundle, tmp_path):
    plan = built(bundle, runtime, tmp_path, hardware_compatible="ampere-plus").read_text()
    assert '"no TF32"' in plan
    assert "AMPERE_PLUS" in plan


def test_the_largest_call_is_the_engines(runtime, bundle, faces, tmp_path):
    session = opened(built(bundle, runtime, tmp_path, max_batch=16))
    with pytest.raises(BadInput, match="N from 1 to 16"):
        session.run(faces[0][:17])


def test_a_call_below_the_least_is_filled_up(runtime, bundle, faces, wanted, tmp_path):
    session = opened(built(bundle, runtime, tmp_path, min_batch=4, opt_batch=(8,)))
    session.run(faces[0][:9])
    assert np.array_equal(session.run(faces[0][20:22]).label, wanted.run(faces[0][20:22]).label)
    assert session.run(faces[0][:2]).probabilities.shape == (2, 7)


def test_each_call_goes_to_the_profile_made_for_it(runtime, bundle, faces, wanted, tmp_path):
    session = opened(built(bundle, runtime, tmp_path, opt_batch=(1, 16)))
    assert [session._place(count)[0] for count in (1, 2, 16, 17, 64)] == [0, 1, 1, 1, 1]
    for count in (1, 16, 1, 3, 16, 1):
        assert np.array_equal(session.run(faces[0][:count]).label, wanted.run(faces[0][:count]).label)
    assert len(session._contexts) == 2


def test_only_what_is_asked_for_comes_back(runtime, bundle, device, faces, tmp_path):
    session = opened(built(bundle, runtime, tmp_path))
    session.run(faces[0][:5])
    assert sorted(device.copied_out) == [(5,), (5,), (5, 7)]
    device.copied_out.clear()
    session.scores(faces[0][:5])
    assert device.copied_out == [(5, 2, 16, 7)]


def test_answers_are_not_the_buffers(runtime, bundle, faces, tmp_path):
    session = opened(built(bundle, runtime, tmp_path))
    first = session.run(faces[0][:4])
    kept = first.probabilities.copy()
    session.run(faces[0][4:8])
    assert np.array_equal(first.probabilities, kept)


def test_few_sizes_are_kept_as_graphs(runtime, bundle, device, faces, tmp_path, monkeypatch):
    monkeypatch.setattr(tensorrt_engine, "_SIZES_KEPT", 2)
    session = opened(built(bundle, runtime, tmp_path))
    for count in (1, 2, 3, 1):
        session.run(faces[0][:count])
        session.run(faces[0][:count])
    assert len(session._captured) == len(device.graphs) == 2
    assert device.captures == 4


def test_without_graphs_it_runs_all_the_same_and_says_why(
    runtime, bundle, device, faces, wanted, tmp_path, monkeypatch
):
    def refuse(_):
        raise CheckFailed("CUDA refused cudaStreamBeginCapture: no.")

    monkeypatch.setattr(device, "capture", refuse)
    session = opened(built(bundle, runtime, tmp_path))
    for _ in range(3):
        assert np.array_equal(session.run(faces[0][:3]).label, wanted.run(faces[0][:3]).label)
    assert "cudaStreamBeginCapture" in session.uncaptured
    monkeypatch.setattr(device, "has_graphs", False)
    assert "no CUDA graphs" in opened(built(bundle, runtime, tmp_path)).uncaptured


def test_threads_take_turns(runtime, bundle, faces, wanted, tmp_path):
    session = opened(built(bundle, runtime, tmp_path))
    parts = [faces[0][start : start + 1 + start % 3] for start in range(40)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(session.run, parts))
    for part, outcome in zip(parts, found, strict=True):
        assert np.array_equal(outcome.label, wanted.run(part).label)


def test_sizes_that_alternate_leave_each_other_alone(runtime, bundle, device, faces, wanted, tmp_path):
    """A context that was captured is not changed afterwards."""
    session = opened(built(bundle, runtime, tmp_path))
    for count in (5, 3, 5, 3, 7, 5, 3, 5, 7, 7, 3):
        found, right = session.run(faces[0][count : 2 * count]), wanted.run(faces[0][count : 2 * count])
        assert np.array_equal(found.probabilities, right.probabilities)
    assert device.captures == 3
    assert device.contexts == 4
    assert device.launches > 0


def test_a_closed_session_answers_nothing(runtime, bundle, faces, tmp_path):
    session = opened(built(bundle, runtime, tmp_path))
    session.close()
    with pytest.raises(CheckFailed, match="the session is closed"):
        session.run(faces[0][:2])


@pytest.mark.parametrize("name", ["set_input_shape", "set_tensor_address", "set_optimization_profile_async"])
def test_what_a_context_refuses_is_told(name, runtime, bundle, faces, tmp_path, monkeypatch):
    session = opened(built(bundle, runtime, tmp_path))
    monkeypatch.setattr(runtime.IExecutionContext, name, lambda *_: False)
    with pytest.raises(CheckFailed, match=r"TensorRT cannot take"):
        session.run(faces[0][:2])


def test_a_session_that_does_not_load_gives_its_memory_back(runtime, bundle, device, tmp_path, monkeypatch):
    engine = built(bundle, runtime, tmp_path)
    monkeypatch.setattr(runtime.Runtime, "deserialize_cuda_engine", lambda *_: None)
    with pytest.raises(BadBundle):
        opened(engine)
    assert device.is_closed


@pytest.mark.parametrize("runtime", ["tensorrt-rtx-1.7.1"], indirect=True)
def test_kernels_that_were_compiled_are_kept(runtime, bundle, faces, tmp_path):
    engine, cache = built(bundle, runtime, tmp_path), tmp_path / "cache"
    limits = {"precision": "fp32", "face_shape": SHAPE, "max_batch": 64, "cache": cache}
    for expected in (b"compiled now!", b"compiled now!!"):
        session = open_engine(BACKENDS["tensorrt-rtx"], engine, **limits)
        session.run(faces[0][:2])
        session.close()
        assert next(cache.rglob("*.kernels")).read_bytes() == expected


def test_an_interrupt_stops_the_build(runtime, bundle, tmp_path):
    def interrupt(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_engine(
            "tensorrt",
            bundle.graph("fp32"),
            tmp_path / "x.engine",
            precision="fp32",
            face_shape=SHAPE,
            settings=BuilderSettings(),
            progress=interrupt,
        )
    assert not list(tmp_path.iterdir())


def test_time_is_split_and_memory_given_back(runtime, bundle, device, faces, tmp_path):
    session = opened(built(bundle, runtime, tmp_path))
    assert session.split(faces[0][:2]) == (0.5, 0.5, 0.5)
    session.close()
    assert device.is_closed


def test_an_enqueue_that_fails_is_told(runtime, bundle, faces, tmp_path):
    session = opened(built(bundle, runtime, tmp_path))
    session._context(0, 3).fake_addresses.clear()
    with pytest.raises(CheckFailed, match="cannot run the engine"):
        session.run(faces[0][:3])


def test_a_stripped_engine_takes_its_weights_from_the_graph(runtime, bundle, faces, wanted, tmp_path):
    engine = built(bundle, runtime, tmp_path, strip=True)
    with pytest.raises(BadBundle, match=r"has no weights, and .* is not the graph that has them"):
        opened(engine)
    (tmp_path / "model.fp32.onnx").symlink_to(bundle.graph("fp32"))
    assert np.array_equal(opened(engine).run(faces[0][:3]).label, wanted.run(faces[0][:3]).label)


@pytest.mark.parametrize(
    ("driver", "settings", "said"),
    [
        ({"name": "NVIDIA A100"}, {}, "the GPU here is NVIDIA A100; needed is NVIDIA H100 80GB HBM3"),
        ({"name": "NVIDIA A100", "capability": "8.0"}, {}, "has compute capability 8.0; needed is 9.0"),
        ({"version": 12080}, {}, "the driver here runs CUDA 12.8; needed is 13 or later"),
        ({"capability": "8.9"}, {"hardware_compatible": "same-compute-capability"}, "8.9; needed is 9.0"),
        ({"capability": "7.5"}, {"hardware_compatible": "ampere-plus"}, "7.5; needed is 8.0 or more"),
    ],
)
def test_an_engine_for_another_machine_is_refused_before_it_is_loaded(
    driver, settings, said, runtime, bundle, device, tmp_path, monkeypatch
):
    engine = built(bundle, runtime, tmp_path, **settings)
    with_driver(monkeypatch, FakeDriver(**driver))
    with pytest.raises(WrongMachine, match=said) as caught:
        opened(engine)
    assert caught.value.exit_code == 5
    assert caught.value.hint.startswith(f"emoexport build {tmp_path} --engine tensorrt --fp32 --opt-batch 16 ")
    assert device.deserialized == 0


@pytest.mark.parametrize(
    ("version", "settings", "fits"),
    [
        ("11.4.0.106", {}, True),
        ("11.5.0", {}, False),
        ("11.5.0", {"version_compatible": True}, True),
        ("11.3.0", {"version_compatible": True}, False),
        ("12.0.0", {"version_compatible": True}, False),
    ],
)
def test_an_engine_of_another_version(version, settings, fits, runtime, bundle, device, tmp_path):
    engine = built(bundle, runtime, tmp_path, **settings)
    runtime.__version__ = version
    if fits:
        opened(engine)
        return
    with pytest.raises(WrongMachine, match=f"tensorrt here is {version}; needed is 11.4.0.106"):
        opened(engine)
    assert device.deserialized == 0


def test_compatible_engines_run_on_other_cards(runtime, bundle, tmp_path, monkeypatch):
    engine = built(bundle, runtime, tmp_path, hardware_compatible="ampere-plus")
    with_driver(monkeypatch, FakeDriver(name="NVIDIA L4", capability="8.9"))
    opened(engine)


@pytest.mark.parametrize("runtime", ["tensorrt-rtx-1.7.1"], indirect=True)
def test_an_engine_for_some_cards_runs_on_these(runtime, bundle, tmp_path, monkeypatch):
    engine = built(bundle, runtime, tmp_path, compute_capabilities=("8.6", "8.9"))
    assert Passport.read(engine).device == {"compute_capabilities": "8.6 8.9"}
    with pytest.raises(WrongMachine, match=r"has compute capability 9.0; needed is 8.6 or 8.9"):
        opened(engine)
    with_driver(monkeypatch, FakeDriver(name="NVIDIA GeForce RTX 4090", capability="8.9"))
    opened(engine)


@pytest.mark.parametrize("runtime", ["tensorrt-rtx-1.7.1"], indirect=True)
def test_what_the_runtime_says_of_an_engine_is_told(runtime, bundle, device, tmp_path, monkeypatch):
    engine = built(bundle, runtime, tmp_path)
    bit = int(runtime.EngineInvalidityDiagnostics.UNSUPPORTED_CC)
    monkeypatch.setattr(runtime.Runtime, "fake_validity", ("INVALID", bit))
    with pytest.raises(WrongMachine, match=r"cannot run tensorrt-rtx-fp32.engine on this machine: .*unsupported cc"):
        opened(engine)
    assert device.deserialized == 0


@pytest.mark.parametrize("harm", ["cut", "edited", "missing", "no passport", "edited passport", "no engine"])
def test_a_harmed_engine_is_refused_before_it_is_loaded(harm, runtime, bundle, device, tmp_path):
    engine = built(bundle, runtime, tmp_path)
    content, passport = engine.read_bytes(), passport_of(engine)
    if harm == "cut":
        engine.write_bytes(content[:-7])
    elif harm == "edited":
        engine.write_bytes(content[:-1] + b"?")
    elif harm == "missing":
        engine.unlink()
    elif harm == "no passport":
        passport.unlink()
    elif harm == "edited passport":
        passport.write_text(passport.read_text().replace("11.4.0.106", "11.4.0.107"))
    else:
        engine.write_bytes(b"no engine")
        dataclasses.replace(Passport.read(engine), sha256="0" * 64, bytes=9).write(engine)
    said = {
        "cut": r"has [\d,]+ bytes; needed are",
        "edited": "its SHA-256 is another",
        "missing": "is missing",
        "no passport": "has no passport",
        "edited passport": "was changed after it was written",
        "no engine": "SHA-256 is another",
    }
    with pytest.raises(BadBundle, match=said[harm]) as caught:
        opened(engine)
    assert caught.value.exit_code == 4
    assert caught.value.hint.startswith(f"emoexport build {tmp_path} --engine tensorrt")
    assert device.deserialized == 0


def test_an_engine_that_the_runtime_refuses_is_told_in_its_words(runtime, bundle, tmp_path):
    engine = built(bundle, runtime, tmp_path)
    from emoexport.files import sha256_of

    passport = Passport.read(engine)
    engine.write_bytes(b"{" * passport.bytes)
    dataclasses.replace(passport, sha256=sha256_of(engine)).write(engine)
    with pytest.raises(BadBundle, match="magic tag does not match"):
        opened(engine)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"min_batch": 4, "opt_batch": (2,)}, "1 <= min <= opt <= max"),
        ({"opt_batch": (16, 100)}, "1 <= min <= opt <= max"),
        ({"opt_batch": ()}, "1 <= min <= opt <= max"),
        ({"hardware_compatible": "hopper"}, "'hopper' is no compatibility"),
        ({"compute_capabilities": ("8.9",)}, "is of TensorRT-RTX"),
        ({"optimization_level": 6}, "needed is 0 to 5"),
        ({"workspace_gib": 0.0}, "needed is more than 0 GiB"),
        ({"timing_cache": Path("no/such/folder/cache")}, "there is no folder for --timing-cache"),
    ],
)
def test_settings_that_make_no_sense(settings, said, runtime, bundle, tmp_path):
    with pytest.raises(UsageError, match=said):
        built(bundle, runtime, tmp_path, **settings)
    assert not list(tmp_path.iterdir())


def test_a_builder_that_fails_is_told_and_nothing_is_written(runtime, bundle, tmp_path, monkeypatch):
    def fail(builder, *_):
        builder.fake_logger.log(1, "Error Code 10: could not find any implementation")

    monkeypatch.setattr(runtime.Builder, "build_serialized_network", fail)
    with pytest.raises(CheckFailed, match=r"11.4.0.106 cannot build .* could not find any implementation"):
        built(bundle, runtime, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_graph_that_the_parser_refuses(runtime, bundle, tmp_path, monkeypatch):
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(b"\x08\x07not a graph")
    monkeypatch.setattr(Bundle, "graph", lambda *_: bad)
    with pytest.raises(CheckFailed, match="In node -1"):
        built(bundle, runtime, tmp_path)


def test_a_graph_that_is_not_of_the_precision_is_refused(runtime, bundle, tmp_path, monkeypatch):
    """As where a compiler, told to build FP16, builds FP32 and says nothing."""
    fp32 = bundle.graph("fp32")
    monkeypatch.setattr(Bundle, "graph", lambda *_: fp32)
    with pytest.raises(CheckFailed, match="0% of the members' multiplications are in fp16; needed are 50%"):
        built(bundle, runtime, tmp_path, "fp16")
    assert not list(tmp_path.iterdir())


def linked(bundle: Bundle, folder: Path) -> Bundle:
    """A bundle of its own with the same graphs."""
    folder.mkdir()
    for file in bundle.path.iterdir():
        if file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())
    return Bundle.open(folder)


def test_engines_are_built_into_a_bundle_and_prove_their_types(runtime, bundle, faces, quiet, tmp_path):
    mine = linked(bundle, tmp_path / "x")
    rows = prebuilt.require_buildable(["tensorrt"], BuilderSettings())
    asked = ["fp32", "fp16", "int8-fp16"]
    found = prebuilt.build_engines(mine, rows, asked, BuilderSettings(), console=quiet)
    assert list(found) == [f"tensorrt-{name}" for name in asked]
    assert found == passports_in(mine.path) or list(passports_in(mine.path)) == sorted(found)
    assert found["tensorrt-fp32"].time_share == {"fp32": 1.0}
    assert found["tensorrt-fp16"].time_share["fp16"] > 0.9
    assert found["tensorrt-int8-fp16"].time_share["int8"] >= 0.25
    assert found["tensorrt-int8-fp16"].engine["int8"] > 0
    engines = opening.open_engines(Bundle.open(mine.path), engines=["tensorrt"])
    assert [engine.name for engine in engines] == list(found)


@pytest.mark.parametrize("runtime", ["8.6"], indirect=True)
def test_version_8_takes_types_as_flags_and_the_graph_in_opset_17(runtime, bundle, wanted, faces, quiet, tmp_path):
    """Of a bundle without graphs of these types: they are flags there."""
    mine = linked(bundle, tmp_path / "x")
    rows = prebuilt.require_buildable(["tensorrt"], BuilderSettings())
    found = prebuilt.build_engines(mine, rows, ["fp32", "fp16", "int8-fp16"], BuilderSettings(), console=quiet)
    assert [passport.graph for passport in found.values()] == ["model.fp32.onnx", "model.fp32.onnx", "model.int8.onnx"]
    assert found["tensorrt-fp16"].asked_share is None
    plans = [json.loads((mine.path / "engines" / f"{name}.engine").read_bytes()) for name in found]
    assert [{"FP16", "INT8", "OBEY_PRECISION_CONSTRAINTS"} & set(plan["flags"]) for plan in plans] == [
        {"OBEY_PRECISION_CONSTRAINTS"},
        {"OBEY_PRECISION_CONSTRAINTS", "FP16"},
        {"OBEY_PRECISION_CONSTRAINTS", "FP16", "INT8"},
    ]
    held = plans[1]["held in FP32"]
    assert any("LayerNorm" in name or "norm" in name for name in held)
    assert not any("mlp.fc1" in name for name in held)
    engine = opening.open_engines(Bundle.open(mine.path), engines=["tensorrt"], precisions=["fp32"])[0]
    assert np.array_equal(engine.run(faces[0][:5]).label, wanted.run(faces[0][:5]).label)
    with pytest.raises(UsageError, match=r"TensorRT 8.6.0 has no bf16"):
        prebuilt.build_engines(mine, rows, ["bf16"], BuilderSettings(), console=quiet)


def test_an_engine_that_fell_back_is_refused_and_removed(runtime, bundle, quiet, tmp_path, monkeypatch):
    mine = linked(bundle, tmp_path / "x")
    information = runtime.EngineInspector.get_engine_information
    monkeypatch.setattr(
        runtime.EngineInspector,
        "get_engine_information",
        lambda self, kind: information(self, kind).replace('"Half"', '"Float"'),
    )
    with pytest.raises(CheckFailed, match="is no FP16 engine: 0% of the members' time is in fp16"):
        prebuilt.build_engines(mine, [BACKENDS["tensorrt"]], ["fp16"], BuilderSettings(), console=quiet)
    assert not list(mine.path.glob("**/*.engine"))
    assert not list(mine.path.glob(".engines*"))


def test_an_engine_whose_time_cannot_be_told_apart_stays(runtime, bundle, quiet, tmp_path, monkeypatch):
    """Profilers and inspectors have different names for some layers."""
    mine = linked(bundle, tmp_path / "x")
    monkeypatch.setattr(prebuilt.TensorRtEngine, "layers", lambda *_: ([], {"{ForeignNode[...]}": 3.0}))
    found = prebuilt.build_engines(mine, [BACKENDS["tensorrt"]], ["fp16"], BuilderSettings(), console=quiet)
    assert found["tensorrt-fp16"].time_share == {}
    assert (mine.path / "engines/tensorrt-fp16.engine").is_file()


def test_a_rebuild_that_fails_leaves_the_engine_that_worked(runtime, bundle, quiet, tmp_path, monkeypatch):
    mine = linked(bundle, tmp_path / "x")
    prebuilt.build_engines(mine, [BACKENDS["tensorrt"]], ["fp16"], BuilderSettings(), console=quiet)
    before = (mine.path / "engines/tensorrt-fp16.engine").read_bytes()
    monkeypatch.setattr(tensorrt_engine, "share_of_time", lambda *_: {"fp32": 1.0})
    with pytest.raises(CheckFailed):
        prebuilt.build_engines(mine, [BACKENDS["tensorrt"]], ["fp16"], BuilderSettings(max_batch=32), console=quiet)
    assert (mine.path / "engines/tensorrt-fp16.engine").read_bytes() == before
    opening.open_engines(mine, engines=["tensorrt"])


def test_an_engine_for_another_card_stays_and_is_left_out(runtime, bundle, quiet, tmp_path, monkeypatch):
    mine = linked(bundle, tmp_path / "x")
    prebuilt.build_engines(mine, [BACKENDS["tensorrt"]], ["fp32"], BuilderSettings(), console=quiet)
    with_driver(monkeypatch, FakeDriver(name="NVIDIA L4", capability="8.9"))
    monkeypatch.setattr(type(BACKENDS["tensorrt"]), "is_usable", lambda self: self.name in {"tensorrt", "onnxruntime"})
    said = []
    found = opening.open_engines(mine, precisions=["fp32"], note=said.append)
    assert [engine.name for engine in found] == ["onnxruntime-fp32"]
    assert said
    assert "tensorrt-fp32 is left out" in said[0]
    with pytest.raises(WrongMachine):
        opening.open_engines(mine, engines=["tensorrt"])


def test_an_engine_of_another_graph_is_refused(runtime, bundle, quiet, tmp_path):
    mine = linked(bundle, tmp_path / "x")
    prebuilt.build_engines(mine, [BACKENDS["tensorrt"]], ["fp32"], BuilderSettings(), console=quiet)
    engine = mine.path / "engines" / "tensorrt-fp32.engine"
    dataclasses.replace(Passport.read(engine), graph_sha256="0" * 64).write(engine)
    with pytest.raises(BadBundle, match="was built from another graph"):
        opening.open_engines(mine, engines=["tensorrt"])


def test_verify_takes_them_like_any_other(runtime, bundle, run_dir, quiet, tmp_path):
    mine = linked(bundle, tmp_path / "x")
    prebuilt.build_engines(mine, [BACKENDS["tensorrt"]], ["fp32"], BuilderSettings(), console=quiet)
    loose = Limits(max_drop_points=20, max_disagreement_pct=20)
    report = certification.verify(
        mine, data="synthetic:140", run=run_dir, engines=["tensorrt"], limits=loose, rounds=2, limit=20, console=quiet
    )
    assert {result.engine for result in report.results} == {"tensorrt-fp32"}
    assert report.verdict == "certified", [engine.reasons for engine in report.engines]
    certificate = read_certificate(mine.path, "tensorrt-fp32")
    assert certificate.verdict == "certified"
    assert certificate.engine_sha256 == Passport.read(mine.path / "engines" / "tensorrt-fp32.engine").sha256
    assert certificate.machine["gpu"] == "NVIDIA H100 80GB HBM3"
    assert opening.certificate_notes(mine, opening.open_engines(mine, engines=["tensorrt"]), [1]) == []


def test_without_a_device_nothing_of_the_runtime_is_touched(bundle, tmp_path, monkeypatch):
    """TensorRT's Runtime may end a process that has no driver."""
    cuda.find_cuda.cache_clear()
    monkeypatch.setattr(cuda, "_LIBRARY", "libno-such-driver.so.1")
    monkeypatch.setattr(tensorrt_engine, "import_runtime", lambda *_: pytest.fail("it was imported"))
    engine = tmp_path / "engines" / "tensorrt-fp32.engine"
    engine.parent.mkdir()
    engine.write_bytes(b"plan")
    Passport(
        file=engine.name,
        sha256="",
        bytes=4,
        backend="tensorrt",
        precision="fp32",
        graph="model.fp32.onnx",
        graph_sha256="",
        created="",
        seconds=1.0,
        versions={"tensorrt": "11.4.0.106"},
        device={},
        profiles=[[1, 16, 64]],
        settings={},
        network={},
    ).write(engine)
    with pytest.raises(MissingRuntime, match="no NVIDIA driver here") as caught:
        opened(engine)
    assert caught.value.exit_code == 3
    with pytest.raises(MissingRuntime):
        build_engine(
            "tensorrt", bundle.graph("fp32"), engine, precision="fp32", face_shape=SHAPE, settings=BuilderSettings()
        )
    monkeypatch.setattr("importlib.util.find_spec", lambda _: SimpleNamespace(origin="here"))
    with pytest.raises(MissingRuntime, match="a CUDA device is needed"):
        backends_named(["tensorrt"])
    cuda.find_cuda.cache_clear()


def test_a_process_builds_for_one_runtime(runtime, bundle, device, tmp_path, monkeypatch):
    built(bundle, runtime, tmp_path)
    other = make_module("tensorrt-rtx-1.7.1", device)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", other)
    with pytest.raises(UsageError, match="not built in one process"):
        built(bundle, other, tmp_path)


def test_the_driver_is_asked_for_its_devices(gpu):
    found = cuda.find_cuda()
    assert found.version == "13.0"
    assert found.devices == (
        cuda.Device(index=0, name="NVIDIA H100 80GB HBM3", compute_capability="9.0", memory_bytes=80 * 2**30),
    )


@pytest.mark.parametrize(
    ("call", "answer", "said"), [("cuInit", 100, "its error 100"), ("cuDeviceGetCount", 0, "lists no")]
)
def test_a_driver_without_a_device(call, answer, said, monkeypatch):
    driver = FakeDriver()
    monkeypatch.setattr(driver, call, lambda *_: answer, raising=True)
    with_driver(monkeypatch, driver)
    if call == "cuDeviceGetCount":
        monkeypatch.setattr(driver, call, lambda number: setattr(number._obj, "value", 0) or 0)
    assert said in cuda.find_cuda().problem
    cuda.find_cuda.cache_clear()


def test_engines_are_built_and_run_where_little_is_installed():
    """numpy, the runtime and a binding of CUDA; to build, Polygraphy too."""
    code = """
import subprocess
import sys
for name in ("torch", "pydantic", "onnx", "onnx_ir", "onnxruntime", "scipy", "rich", "typer", "timm", "lightning"):
    sys.modules[name] = None
import emoexport.engines.tensorrt_engine, emoexport.engines.tensorrt_build, emoexport.engines.device_memory
from emoexport.engines import BACKENDS
assert not {"tensorrt", "tensorrt_rtx", "polygraphy", "cuda.bindings.runtime", "pycuda"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
