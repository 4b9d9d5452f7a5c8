"""`emoexport package`: what Triton's own schema takes, and what a container needs, which is no PyTorch."""

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import venv
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from google.protobuf import text_format
from PIL import Image

import emoexport
from emoexport import runtime
from emoexport.bundle import Bundle
from emoexport.dockerfile import _RUNTIMES, DOCKER, requirements_for, write_context
from emoexport.engines import BACKENDS
from emoexport.engines.certificate import Certificate
from emoexport.engines.passport import Passport, passport_of
from emoexport.errors import BadBundle, UsageError
from emoexport.files import sha256_of
from emoexport.images import decode_face
from emoexport.opening import file_for
from emoexport.packaging import PackageRecord, Packed, choose_engine
from emoexport.triton import TRITON, ServerSettings, notes_for_triton, write_repository
from emoexport.triton_config import SERVED, Model, model_config, to_text

SHAPE = (32, 32, 1)
TYPES = {1: "TYPE_FP32", 2: "TYPE_UINT8", 6: "TYPE_INT32", 7: "TYPE_INT64"}
"""ONNX's numbers of types, and Triton's names."""


def _schema() -> ModuleType:
    """Triton's schema as its client has it, without gRPC, which the rest of that package imports."""
    package = pytest.importorskip("tritonclient", reason="it is not published for this platform")
    file = Path(package.__path__[0], "grpc", "model_config_pb2.py")
    spec = importlib.util.spec_from_file_location("model_config_pb2", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SCHEMA = _schema()


def parsed(text: str):
    """A configuration as Triton reads it; unknown fields and wrong types fail."""
    return text_format.Parse(text, SCHEMA.ModelConfig())


def model_of(backend: str, **changes) -> Model:
    fields = {
        "name": "faces",
        "precision": "fp32",
        "face_shape": SHAPE,
        "scores_shape": (2, 16, 7),
        "max_batch": 64,
        "parameters": {"note": 'a "quoted" line\nand \\ another, ö'},
    }
    return Model(backend=backend, **(fields | changes))


@pytest.fixture
def copy(bundle, tmp_path) -> Bundle:
    """The bundle alone, whatever other tests have done to its engines."""
    target = tmp_path / "tiny"
    shutil.copytree(bundle.path, target, ignore=shutil.ignore_patterns("engines", "reports", "cascades"))
    return Bundle.open(target)


def passport(bundle: Bundle, backend: str, precision: str, **changes) -> Passport:
    graph = bundle.manifest.graphs[precision].file
    fields = {
        "file": f"{backend}-{precision}.engine",
        "sha256": "",
        "bytes": 0,
        "backend": backend,
        "precision": precision,
        "graph": graph,
        "graph_sha256": bundle.graph_sha256(precision),
        "created": "",
        "seconds": 0.0,
        "versions": {backend: "10.16.1.11"},
        "device": {"name": "NVIDIA H100", "compute_capability": "9.0", "cuda": "13.0"},
        "profiles": [[1, 1, 8], [1, 16, 48]],
        "settings": {},
        "network": {},
    }
    return Passport(**(fields | changes))


def with_engine(bundle: Bundle, backend: str = "tensorrt", precision: str = "fp16", **changes) -> Bundle:
    """A bundle with an engine that no runtime has made, and its passport."""
    engine = bundle.path / "engines" / f"{backend}-{precision}.engine"
    engine.parent.mkdir(exist_ok=True)
    engine.write_bytes(b"a plan")
    found = {"sha256": sha256_of(engine), "bytes": engine.stat().st_size}
    passport(bundle, backend, precision, **(found | changes)).write(engine)
    return bundle


def certify(bundle: Bundle, name: str, **changes) -> None:
    """Give an engine that opens a graph a certificate."""
    backend, precision = name.rsplit("-", 1)
    fields = {
        "verdict": "certified",
        "reasons": [],
        "created": "",
        "engine_sha256": bundle.graph_sha256(precision),
        "machine": {"runtime": "ONNX Runtime 1", "processor": "elsewhere"},
        "batches": [1, 8],
        "data": "synthetic",
        "split": "test",
        "data_sha256": "0" * 64,
        "faces": 1234,
        "max_drop_points": 0.5,
        "max_disagreement_pct": 1.0,
        "bound_points": 0.1,
        "disagreement_bound_pct": 0.1,
        "multiplies_in": {},
    }
    certificate = dataclasses.asdict(Certificate(**(fields | changes)))
    (bundle.path / "engines").mkdir(exist_ok=True)
    passport(bundle, backend, precision, profiles=[[1, 8, 8]], certificate=certificate).write(
        bundle.path / "engines" / name
    )


def packed_for(target, bundle: Bundle, engine: str = "onnxruntime", precision: str = "fp32") -> Packed:
    return choose_engine(bundle, target, engine=engine, precision=precision)


def shown_in(folder: Path) -> str:
    """All text of a package but that of its code."""
    files = [file for file in folder.rglob("*") if file.suffix not in {".onnx", ".plan", ".engine", ".data"}]
    return "\n".join(file.read_text() for file in files if file.is_file() and "emoexport" not in file.parent.parts)


# What Triton is told.


def test_every_runtime_is_served_or_refused():
    for target, known in ((TRITON, SERVED), (DOCKER, _RUNTIMES)):
        assert set(known) | set(target.refused) == set(BACKENDS)
        assert not set(known) & set(target.refused)
        assert set(target.runs) <= set(known)


@pytest.mark.parametrize("backend", SERVED)
def test_tritons_schema_takes_every_configuration(backend):
    profiles = ((1, 1, 8), (1, 16, 64)) if backend == "tensorrt" else ()
    config = parsed(to_text(model_config(model_of(backend, profiles=profiles))))
    row = SERVED[backend]
    assert (config.name, config.backend, config.platform) == ("faces", row.backend, row.platform)
    assert config.default_model_filename == row.file
    assert config.parameters["note"].string_value == 'a "quoted" line\nand \\ another, ö'
    assert config.version_policy.latest.num_versions == 1
    assert not config.response_cache.enable
    assert [(group.count, group.Kind.Name(group.kind)) for group in config.instance_group] == [(1, row.kind)]
    assert (row.kind == "KIND_GPU") == (BACKENDS[backend].device == "cuda")
    first, *others = config.model_warmup
    assert (first.batch_size, others[-1].batch_size) == ((1, 16) if row.batches else (1, 1))
    if row.batches:
        assert config.max_batch_size == 64
        assert config.dynamic_batching.max_queue_delay_microseconds == 1000
        assert list(others[-1].inputs["faces"].dims) == [32, 32, 1]
    else:
        assert config.max_batch_size == 0
        assert not config.HasField("dynamic_batching")
        assert list(others[-1].inputs["faces"].dims) == [16, 32, 32, 1]


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_inputs_and_outputs_are_those_of_the_graph(backend, copy, tmp_path):
    write_repository(packed_for(TRITON, copy, backend), tmp_path / "out", ServerSettings())
    (file,) = (tmp_path / "out").rglob("config.pbtxt")
    config = parsed(file.read_text())
    graph = onnx.load(file.parent / "1" / "model.onnx").graph
    wanted = {
        value.name: (
            TYPES[value.type.tensor_type.elem_type],
            [dim.dim_value or -1 for dim in value.type.tensor_type.shape.dim],
        )
        for value in (*graph.input, *graph.output)
    }
    found = {}
    for tensor in (*config.input, *config.output):
        assert list(tensor.dims)  # Triton takes no empty shape
        inside = tensor.reshape.shape if tensor.HasField("reshape") else tensor.dims
        batch = [-1] if config.max_batch_size else []
        found[tensor.name] = SCHEMA.DataType.Name(tensor.data_type), [*batch, *inside]
    assert found == wanted
    labelled = {tensor.name: tensor.label_filename for tensor in config.output if tensor.label_filename}
    assert labelled == ({"probabilities": "labels.txt"} if backend == "onnxruntime" else {})


def test_gpu_providers_are_set_as_the_engines_set_them():
    cuda = parsed(to_text(model_config(model_of("onnxruntime-cuda"))))
    (accelerator,) = cuda.optimization.execution_accelerators.gpu_execution_accelerator
    assert (accelerator.name, dict(accelerator.parameters)) == ("cuda", {"use_tf32": "0"})
    tensorrt = parsed(to_text(model_config(model_of("onnxruntime-tensorrt", precision="fp16", max_batch=8))))
    (accelerator,) = tensorrt.optimization.execution_accelerators.gpu_execution_accelerator
    assert accelerator.parameters["precision_mode"] == "FP16"
    assert accelerator.parameters["trt_profile_opt_shapes"] == "faces:8x32x32x1"
    assert tensorrt.optimization.graph.level == 2


# A package for Triton.


def test_a_package_has_all_and_names_no_file_of_this_machine(call, copy, tmp_path):
    for name in ("cascades/agreement", "reports"):
        (copy.path / name).mkdir(parents=True)
        (copy.path / name / "x.json").write_text("{}")
    out = tmp_path / "triton"
    code, printed, err = call("package", copy.path, "--triton", out, "--engine", "onnxruntime", "--precision", "int8")
    assert code == 0, err
    assert f"No certificate: onnxruntime-int8. Next: emoexport verify {copy.path} --engine onnxruntime" in printed
    home = out / "model_repository" / "tiny"
    assert sorted(file.relative_to(out).as_posix() for file in out.rglob("*") if file.is_file()) == [
        "README.md", "client.py", "emoexport.json", "model_repository/tiny/1/model.onnx",
        "model_repository/tiny/config.pbtxt", "model_repository/tiny/labels.txt",
    ]  # fmt: skip
    assert sha256_of(home / "1/model.onnx") == copy.graph_sha256("int8")
    assert (home / "labels.txt").read_text().split() == list(copy.manifest.labels)
    parameters = parsed((home / "config.pbtxt").read_text()).parameters
    assert parameters["emoexport.bundle_digest"].string_value == copy.manifest.digest
    assert parameters["emoexport.certificate"].string_value == "No certificate: onnxruntime-int8."
    record = PackageRecord.parse_json(out / "emoexport.json")
    assert record.engine == "onnxruntime-int8"
    assert {name: sha256_of(out / name) for name in record.files} == {
        name: entry.sha256 for name, entry in record.files.items()
    }
    assert len(record.files) == 5
    assert str(tmp_path) not in shown_in(out)
    again = ["--name", "faces", "--max-batch", 7, "--queue-delay", 250, "--instances", 3]
    code, _, err = call("package", copy.path, "--triton", out, *again)
    assert code == 0, err
    (home,) = (out / "model_repository").iterdir()
    config = parsed((home / "config.pbtxt").read_text())
    assert (home.name, config.name, config.max_batch_size) == ("faces", "faces", 7)
    assert (config.dynamic_batching.max_queue_delay_microseconds, config.instance_group[0].count) == (250, 3)


def test_weights_beside_the_graph_keep_their_name(copy, faces, tmp_path):
    source = tmp_path / "large" / "model.fp32.onnx"
    source.parent.mkdir()
    whole = onnx.load(copy.graph("fp32"))
    onnx.save(whole, source, save_as_external_data=True, location=f"{source.name}.data", size_threshold=1024)
    packed = Packed(bundle=copy, backend="onnxruntime", precision="fp32", file=source)
    write_repository(packed, tmp_path / "out", ServerSettings(name="x"))
    served = ort.InferenceSession(tmp_path / "out/model_repository/x/1/model.onnx", providers=["CPUExecutionProvider"])
    wanted = emoexport.load(copy.path, engine="onnxruntime", precision="fp32").run(faces[0][:3])
    assert np.array_equal(served.run(["label"], {"faces": faces[0][:3]})[0], wanted.label)


def test_a_plan_goes_by_its_passport(copy, tmp_path):
    packed = packed_for(TRITON, with_engine(copy), "tensorrt", "fp16")
    model = write_repository(packed, tmp_path / "out", ServerSettings())
    (file,) = (tmp_path / "out").rglob("config.pbtxt")
    config = parsed(file.read_text())
    assert (file.parent / "1/model.plan").read_bytes() == b"a plan"
    assert (config.platform, config.max_batch_size, model.max_batch) == ("tensorrt_plan", 48, 48)
    assert list(config.dynamic_batching.preferred_batch_size) == [16]  # one would keep requests apart
    assert [warm.batch_size for warm in config.model_warmup] == [1, 16]
    assert list(config.instance_group[0].profile) == ["0", "1"]
    assert {out.name: out.data_type for out in config.output}["label"] == SCHEMA.TYPE_INT64
    readme = (tmp_path / "out/README.md").read_text()
    assert "runs on NVIDIA H100 (compute capability 9.0) with TensorRT 10.16.1.11:" in readme
    assert "--gpus all" in readme
    assert "No certificate: tensorrt-fp16." in readme


def test_plans_of_other_kinds_are_told_apart(copy, tmp_path):
    packed = packed_for(TRITON, with_engine(copy, versions={"tensorrt": "8.6.1"}), "tensorrt", "fp16")
    write_repository(packed, tmp_path / "out", ServerSettings())
    (file,) = (tmp_path / "out").rglob("config.pbtxt")
    assert {out.name: out.data_type for out in parsed(file.read_text()).output}["label"] == SCHEMA.TYPE_INT32
    settings = {"version_compatible": True, "hardware_compatible": "ampere-plus"}
    packed = packed_for(TRITON, with_engine(copy, settings=settings), "tensorrt", "fp16")
    assert "8.0 or more with TensorRT 10.16.1.11 or a later 10:" in notes_for_triton(packed)[0]
    write_repository(packed, tmp_path / "out", ServerSettings())
    assert "--backend-config=tensorrt,version-compatible=true" in (tmp_path / "out/README.md").read_text()
    for changes, said in (
        ({"profiles": [[4, 8, 8]]}, "no fewer than 4"),
        ({"settings": {"strip": True}}, "no weights"),
    ):
        packed = packed_for(TRITON, with_engine(copy, **changes), "tensorrt", "fp16")
        with pytest.raises(UsageError, match=said):
            write_repository(packed, tmp_path / "new", ServerSettings())
    assert not (tmp_path / "new").exists()


def test_a_plan_that_is_not_as_it_was_built_is_not_packed(copy):
    engine = with_engine(copy).path / "engines/tensorrt-fp16.engine"
    engine.write_bytes(b"a plot")
    with pytest.raises(BadBundle, match="its SHA-256 is another"):
        choose_engine(copy, TRITON, engine="tensorrt")
    with_engine(copy, graph_sha256="0" * 64)
    for precision in (None, "fp16"):
        with pytest.raises(BadBundle, match="was built from another graph"):
            choose_engine(copy, TRITON, engine="tensorrt", precision=precision)
    assert choose_engine(copy, TRITON).name == "onnxruntime-fp32"


def test_the_best_certified_engine_is_taken(copy, monkeypatch):
    certify(copy, "onnxruntime-int8")
    found = choose_engine(copy, TRITON)
    assert (found.name, found.is_certified) == ("onnxruntime-int8", True)
    assert found.standing == (
        "onnxruntime-int8 is certified on 1,234 faces of synthetic (test), in calls of 1, 8, "
        "with the runtime ONNX Runtime 1, the processor elsewhere."
    )
    certify(copy, "onnxruntime-fp16")
    assert choose_engine(copy, TRITON).name == "onnxruntime-fp16"
    certify(copy, "openvino-fp32")
    assert choose_engine(copy, TRITON).name == "onnxruntime-fp16"  # Triton's backend of it computes otherwise
    assert choose_engine(copy, DOCKER).name == "openvino-fp32"
    monkeypatch.setattr("emoexport.packaging.speeds_of", lambda _: {"onnxruntime-int8": 9.0, "onnxruntime-fp16": 2.0})
    assert choose_engine(copy, TRITON).name == "onnxruntime-int8"


def test_where_nothing_is_certified_it_is_said(copy):
    certify(copy, "onnxruntime-int8", engine_sha256="0" * 64)
    certify(copy, "onnxruntime-fp16", verdict="failed", reasons=["it answers otherwise"])
    assert choose_engine(copy, TRITON).standing == "No certificate: onnxruntime-fp32."
    stale, failed = (packed_for(TRITON, copy, precision=name) for name in ("int8", "fp16"))
    assert stale.standing == "The certificate of onnxruntime-int8 is stale: it is of another file."
    assert failed.standing == "Not certified: onnxruntime-fp16 (failed): it answers otherwise."


def test_what_was_changed_in_a_package_is_not_lost(call, copy, tmp_path):
    """Docker's requirements are there to be added to."""
    triton, image = tmp_path / "triton", tmp_path / "image"
    for option, out in (("--triton", triton), ("--docker", image), ("--triton", triton), ("--docker", image)):
        code, _, err = call("package", copy.path, option, out)
        assert code == 0, err
    (image / "emoexport/__pycache__").mkdir()
    (image / "emoexport/__pycache__/x.pyc").write_bytes(b"of no matter")
    assert call("package", copy.path, "--docker", image)[0] == 0
    with (image / "requirements.txt").open("a") as file:
        file.write("pyarrow\n")
    (triton / "mine.txt").write_text("mine")
    for option, out, said in (
        ("--docker", image, f"{image}/requirements.txt was changed after the package was written, and would be lost."),
        ("--triton", triton, f"{triton}/mine.txt is no part of the package, and would be lost."),
        ("--triton", image, f"{image} is a package for Docker, not for Triton."),
    ):
        code, _, err = call("package", copy.path, option, out)
        assert (code, said in err, "next: --force replaces it" in err) == (2, True, True), err
    assert "pyarrow" in (image / "requirements.txt").read_text()
    assert call("package", copy.path, "--docker", image, "--force")[0] == 0
    assert "pyarrow" not in (image / "requirements.txt").read_text()


# The client.


@pytest.fixture
def client(copy, tmp_path) -> Path:
    write_repository(packed_for(TRITON, copy), tmp_path / "out", ServerSettings())
    return tmp_path / "out" / "client.py"


def test_the_client_reads_pictures_as_training_does(client, tmp_path):
    spec = importlib.util.spec_from_file_location("client", client)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    pixels = np.random.default_rng(1).integers(0, 256, (50, 40, 4), dtype=np.uint8)
    turned = Image.Exif()
    turned[0x0112] = 6
    pictures = {
        "grey.png": (Image.fromarray(pixels[..., 0]), {}),
        "same.png": (Image.fromarray(pixels[:32, :32, 0]), {}),
        "colours.png": (Image.fromarray(pixels[..., :3]), {}),
        "clear.png": (Image.fromarray(pixels), {}),
        "black.png": (Image.fromarray(pixels[..., 0] > 128), {}),
        "palette.png": (Image.fromarray(pixels[..., :3]).convert("P"), {"transparency": 3}),
        "wide.png": (Image.fromarray(pixels[..., 0].astype(np.uint16) * 250), {}),
        "turned.jpg": (Image.fromarray(pixels[..., :3]), {"exif": turned}),
    }
    for name, (picture, settings) in pictures.items():
        file = tmp_path / name
        picture.save(file, **settings)
        assert np.array_equal(module.read_face(file), decode_face(file.read_bytes(), size=32, channels=1)), name


class _Server(BaseHTTPRequestHandler):
    """Inference as Triton's HTTP protocol has it, binary tensors after the JSON."""

    session: ort.InferenceSession
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        split = int(self.headers["Inference-Header-Content-Length"])
        asked = json.loads(body[:split])
        (given,) = asked["inputs"]
        assert (self.path, given["name"], given["datatype"]) == ("/v2/models/tiny/infer", "faces", "UINT8")
        faces = np.frombuffer(body[split:], dtype=np.uint8).reshape(given["shape"])
        names = [output["name"] for output in asked["outputs"]]
        found = [each.reshape(len(faces), -1) for each in self.session.run(names, {"faces": faces})]
        outputs = [
            {
                "name": name,
                "datatype": {"int64": "INT64", "float32": "FP32"}[each.dtype.name],
                "shape": list(each.shape),
                "parameters": {"binary_data_size": each.nbytes},
            }
            for name, each in zip(names, found, strict=True)
        ]
        head = json.dumps({"model_name": "tiny", "model_version": "1", "outputs": outputs}).encode()
        content = head + b"".join(each.tobytes() for each in found)
        self.send_response(200)
        self.send_header("Inference-Header-Content-Length", str(len(head)))
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_) -> None:
        """Nothing."""


@pytest.fixture
def server(copy) -> Iterator[str]:
    _Server.session = ort.InferenceSession(copy.graph("fp32"), providers=["CPUExecutionProvider"])
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), _Server)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{httpd.server_port}"
    httpd.shutdown()
    httpd.server_close()


def test_the_client_prints_what_the_bundle_decides(client, server, copy, faces, tmp_path):
    files = [tmp_path / f"{number}.png" for number in range(20)]  # more than a request holds
    for file, face in zip(files, faces[0], strict=False):
        Image.fromarray(face[..., 0]).save(file)
    typed = [sys.executable, client, *files, "--url", server]
    done = subprocess.run(typed, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    wanted = runtime.load(copy.path, engine="onnxruntime", precision="fp32").run(faces[0][:20])
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    assert [line[:2] for line in lines] == [
        [str(file), copy.manifest.labels[label]] for file, label in zip(files, wanted.label, strict=True)
    ]
    assert [float(line[2]) for line in lines] == pytest.approx(wanted.confidence, abs=1e-4)
    typed = [sys.executable, client, files[0], "--url", "127.0.0.1:1"]
    done = subprocess.run(typed, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (1, "error: no server answers at 127.0.0.1:1\n")


# A package for Docker.


def test_the_dockerfile_says_what_it_should(copy, tmp_path):
    out = tmp_path / "image"
    write_context(packed_for(DOCKER, copy, precision="int8"), out)
    lines = [line for line in (out / "Dockerfile").read_text().splitlines() if line and not line.startswith("#")]
    steps = [line.split(" ", 1) for line in lines]
    assert [name for name, _ in steps] == [
        "FROM", "COPY", "RUN", "COPY", "COPY", "ENV", "RUN", "USER", "WORKDIR", "RUN", "ENTRYPOINT", "CMD"
    ]  # fmt: skip
    for _, said in (step for step in steps if step[0] == "COPY"):
        assert (out / said.split()[0]).exists()
    said = dict(steps)
    assert said["USER"] != "root"
    typed = json.loads(said["ENTRYPOINT"])
    assert typed[:4] == ["python", "-m", "emoexport", "predict"]
    assert typed[-4:] == ["--engine", "onnxruntime", "--precision", "int8"]
    small = Bundle.open(out / "bundle")
    assert set(small.manifest.files) == {"labels.txt", "model.int8.onnx", "calibration.json", "sbom.cdx.json"}
    assert set(small.manifest.graphs) == {"int8"}
    assert {path.name for path in small.path.rglob("*")} == {"manifest.json", *small.manifest.files}
    assert str(tmp_path) not in shown_in(out)


def test_a_built_engine_keeps_the_graph_that_it_is_of(copy, tmp_path):
    write_context(packed_for(DOCKER, with_engine(copy), "tensorrt", "fp16"), tmp_path / "image")
    small = Bundle.open(tmp_path / "image/bundle")
    assert file_for(small, BACKENDS["tensorrt"], "fp16").read_bytes() == b"a plan"
    assert passport_of(small.path / "engines/tensorrt-fp16.engine").exists()
    needed = (tmp_path / "image/requirements.txt").read_text()
    assert "tensorrt==10.16.1.11\n" in needed
    assert "RUN python -c" not in (tmp_path / "image/Dockerfile").read_text()


@pytest.mark.parametrize("backend", _RUNTIMES)
def test_requirements_are_exact_and_have_no_pytorch(backend, copy):
    packed = Packed(bundle=copy, backend=backend, precision="fp16", file=copy.graph("fp16"))
    if BACKENDS[backend].built_from:
        packed = packed_for(DOCKER, with_engine(copy, backend), backend, "fp16")
    found = requirements_for(packed)
    assert not [line for line in found if re.match(r"(torch|onnx|timm|lightning)\b(?!runtime)", line)]
    loose = [line for line in found if "==" not in line]
    assert set(loose) <= {"tensorrt-cu13<11"}  # it is not installed where the tests run
    assert {"numpy", "pydantic-core"} <= {line.split("==")[0] for line in found}


_AS_IF_NOT_INSTALLED = """
import sys
class Visible:
    finders = list(sys.meta_path)
    def find_spec(self, name, *where):
        if name.partition(".")[0] not in hidden:
            return next(filter(None, (finder.find_spec(name, *where) for finder in self.finders)), None)
sys.meta_path[:] = [Visible()]
import emoexport; print(emoexport.__file__, file=sys.stderr)
from emoexport.cli import main; main()
"""


def test_predict_runs_on_what_is_required_alone(copy, faces, tmp_path):
    """Of what is installed here, all that the requirements do not name is hidden."""
    certify(copy, "onnxruntime-fp32")
    out = tmp_path / "image"
    packed = packed_for(DOCKER, copy)
    write_context(packed, out)
    Image.fromarray(faces[0][0, ..., 0]).save(tmp_path / "face.png")
    allowed = {line.split("==")[0] for line in requirements_for(packed)} | {"onnxruntime-gpu"}
    hidden = sorted(
        module
        for module, owners in importlib.metadata.packages_distributions().items()
        if not {re.sub(r"[-_.]+", "-", owner).lower() for owner in owners} & allowed and module != "emoexport"
    )
    assert {"torch", "onnx", "pyarrow"} <= set(hidden)
    script = f"hidden = {hidden!r}\n{_AS_IF_NOT_INSTALLED}"
    typed = ["predict", "--bundle", out / "bundle", "--engine", "onnxruntime", "--precision", "fp32", "--format"]
    environment = {**os.environ, "PYTHONPATH": str(out)}
    for form, code in (("csv", 0), ("parquet", 3)):
        command = [sys.executable, "-c", script, *typed, form, tmp_path / "face.png"]
        command += ["-o", tmp_path / "x.parquet"] * (form == "parquet")
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)
        assert done.returncode == code, done.stderr
        assert done.stderr.startswith(str(out / "emoexport"))
        if form == "csv":
            wanted = runtime.load(copy.path, engine="onnxruntime", precision="fp32").run(faces[0][:1])
            assert copy.manifest.labels[wanted.label[0]] in done.stdout
        else:
            assert "error: pyarrow is not installed here, which Parquet needs." in done.stderr


@pytest.mark.slow
def test_predict_runs_where_pip_has_installed_the_requirements(copy, faces, tmp_path):
    """The steps of the Dockerfile, in a virtual environment."""
    out = tmp_path / "image"
    write_context(packed_for(DOCKER, copy), out)
    Image.fromarray(faces[0][0, ..., 0]).save(tmp_path / "face.png")
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv/bin/python"
    quiet = ["--quiet", "--disable-pip-version-check"]
    subprocess.run([python, "-m", "pip", "install", *quiet, "--requirement", out / "requirements.txt"], check=True)
    assert subprocess.run([python, "-c", "import torch"], capture_output=True, check=False).returncode == 1
    entry = next(line for line in (out / "Dockerfile").read_text().splitlines() if line.startswith("ENTRYPOINT"))
    typed = [word.replace("/opt/emoexport", str(out)) for word in json.loads(entry.removeprefix("ENTRYPOINT"))]
    done = subprocess.run(
        [python, *typed[1:], tmp_path / "face.png", "--format", "csv"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(out)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    wanted = runtime.load(copy.path, engine="onnxruntime", precision="fp32").run(faces[0][:1])
    assert copy.manifest.labels[wanted.label[0]] in done.stdout
