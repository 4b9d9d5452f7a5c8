"""Bundles that are broken, or made by somebody who means no good: the seal is no secret, so anybody can make it fit."""

import contextlib
import dataclasses
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
from bundle_mutations import reseal, spoil
from PIL import Image
from rich.console import Console
from targets import TARGETS, seeds_of

import emoexport
from emoexport import cascading, certification, findings
from emoexport.bundle import Bundle
from emoexport.cascade_claim import Claim
from emoexport.engines.certificate import Certificate
from emoexport.engines.passport import Passport, passports_in
from emoexport.errors import BadBundle, BadInput, EmoexportError, EngineFailed, UsageError
from emoexport.external_data import WITHIN, places_of_weights, require_own_weights
from emoexport.files import read_text, sha256_of
from emoexport.manifest import Manifest
from emoexport.outcome import Outcome
from emoexport.summary import summarize

SEVERAL = int(os.environ.get("EMOEXPORT_HOSTILE", "300"))
"""Bundles that are spoiled in the slow test; 10,000 take about an hour."""
LONGEST = 60
"""Seconds after which looking at a bundle counts as hanging."""


@pytest.fixture(scope="module")
def least(bundle, tmp_path_factory) -> Path:
    """The tiny bundle with two of its graphs."""
    bare = shutil.ignore_patterns("cascades", "engines", "reports")  # of other tests
    path = Path(shutil.copytree(bundle.path, tmp_path_factory.mktemp("least") / "bundle", ignore=bare))
    manifest = bundle.manifest
    graphs = {name: manifest.graphs[name] for name in ("fp32", "int8")}
    gone = {entry.file for entry in manifest.graphs.values()} - {entry.file for entry in graphs.values()}
    for name in gone:
        (path / name).unlink()
    files = {name: entry for name, entry in manifest.files.items() if name not in gone}
    kept = manifest.model_copy(update={"graphs": graphs, "files": files, "run": str(bundle.run())}).sealed()
    (path / "manifest.json").write_text(kept.to_json())
    Bundle.open(path)
    return path


@pytest.fixture
def spoiled(least, tmp_path) -> Path:
    """A copy of it that a test may spoil, beside a folder that is none of its business."""
    (tmp_path / "outside").mkdir()
    return Path(shutil.copytree(least, tmp_path / "bundle"))


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest, and make its digest fit."""
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))
    reseal(path, "manifest.json")


# Whatever is done to them


def test_what_is_changed_without_the_seal_is_refused(least, tmp_path):
    """Or it is no part of the manifest: then the bundle opens as before."""
    wanted = Bundle.open(least).manifest
    for number in range(60):
        place = tmp_path / str(number)
        shutil.copytree(least, place / "bundle")
        (place / "outside").mkdir()
        damage = spoil(place / "bundle", number, sealed=False)
        with contextlib.suppress(BadBundle):
            assert Bundle.open(place / "bundle").manifest == wanted, damage
        shutil.rmtree(place)


@pytest.fixture(scope="module")
def everything(least, bundle, tmp_path_factory) -> Path:
    """A folder with a bundle that has passports, an engine that was built, reports and a cascade too."""
    folder, quiet = tmp_path_factory.mktemp("everything"), Console(quiet=True)
    opened = Bundle.open(Path(shutil.copytree(least, folder / "bundle")))
    cascading.make_cascade(
        opened, Claim.of_goals(10.0, None), engine="onnxruntime", precision="fp32", rounds=5, console=quiet
    )
    certification.verify(opened, engines=["onnxruntime"], batches=[1], limit=70, console=quiet)
    built_engine(opened.path)
    return folder


def built_engine(bundle: Path, **changes: Any) -> Path:
    """A file with a passport that says that it was built by TensorRT."""
    engine = bundle / "engines" / "tensorrt-fp32.engine"
    engine.parent.mkdir(exist_ok=True)
    engine.write_bytes(b"x")
    fields = dict.fromkeys(("created", "graph_sha256"), "") | {"file": engine.name, "graph": "model.fp32.onnx"}
    fields |= {"sha256": sha256_of(engine), "bytes": 1, "seconds": 0.5, "backend": "tensorrt", "precision": "fp32"}
    fields |= {"versions": {"tensorrt": "10.1"}, "device": {}, "profiles": [[1, 2, 4]], "settings": {}, "network": {}}
    Passport(**fields | changes).write(engine)
    return engine


def survey(folder: Path, numbers: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Spoil a bundle by each number, in a process that is started again where it dies or hangs."""
    left = list(numbers)
    paths = [str(Path(__file__).parent / "fuzz"), os.environ.get("PYTHONPATH", "")]
    command = [sys.executable, str(Path(__file__).parent / "fuzz" / "bundle_worker.py"), str(folder)]
    while left:
        worker = subprocess.Popen(
            command,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        assert worker.stdin is not None
        assert worker.stdout is not None
        try:
            assert "ready" in worker.stdout.readline()
            while left:
                told: dict[str, Any] = {"number": left.pop(0)}
                with contextlib.suppress(BrokenPipeError):  # it has ended since: that is found below
                    worker.stdin.write(f"{told['number']}\n")
                ends_at = time.monotonic() + LONGEST
                while "end" not in told:
                    if not select.select([worker.stdout], [], [], max(0, ends_at - time.monotonic()))[0]:
                        told["end"] = "hangs"
                    elif line := worker.stdout.readline():
                        told |= json.loads(line)
                    else:
                        told["end"] = f"ends the process, {worker.wait()}"
                yield told
                if told["end"].startswith(("hangs", "ends")):
                    break
        finally:
            worker.kill()
            worker.wait()


@pytest.mark.slow
@pytest.mark.timeout(300 + 2 * SEVERAL)
def test_whatever_is_done_to_a_bundle_ends_in_a_sentence_or_an_answer(everything):
    """Without the seal in the same answer; never in a traceback, and nothing is read from outside or written."""
    ends: Counter[str] = Counter()
    wrong = []
    for told in survey(everything, range(SEVERAL)):
        if told["end"] not in ("refused", "as before", "other answers"):
            wrong.append("\n".join(f"{name}: {value}" for name, value in told.items()))
        ends[f"{told['end']}, {'sealed' if told.get('sealed') else 'not sealed'}"] += 1
    print(dict(ends))
    assert not wrong, "\n\n".join(wrong)
    assert ends["other answers, not sealed"] == 0
    assert ends["refused, not sealed"], ends
    assert ends["refused, sealed"], ends


# Files that are something else


def into_pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def into_folder(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


def into_hole(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**40)


def into_zeros(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")


def into_link(path: Path) -> None:
    """To the same outside."""
    other = path.parents[1 if path.name == "manifest.json" else 2] / "outside" / path.name
    if path.exists():
        path.rename(other)
    else:
        other.write_text("{}")
    path.symlink_to(other)


ODD = [into_pipe, into_folder, into_hole, into_zeros, into_link]


@pytest.mark.parametrize("turn", ODD)
def test_a_manifest_that_is_no_plain_file(turn, spoiled, call):
    turn(spoiled / "manifest.json")
    code, _, err = call("inspect", spoiled)
    assert code == 4
    assert err.startswith("error: ")
    assert "manifest.json" in err


@pytest.mark.parametrize("turn", ODD)
def test_a_passport_and_a_report_that_are_no_plain_files(turn, spoiled):
    for folder, name in (("engines", "x.passport.json"), ("reports", "parity.json"), ("reports", "bench.json")):
        (spoiled / folder).mkdir(exist_ok=True)
        turn(spoiled / folder / name)
    with pytest.raises(BadBundle, match=r"x\.passport\.json"):
        Passport.read(spoiled / "engines" / "x")
    assert not summarize(Bundle.open(spoiled)).certificates
    found = findings.find(Bundle.open(spoiled))
    assert "cannot be read" in found.parity.sentence or "Not verified" in found.parity.sentence
    assert emoexport.load(spoiled).engine == "onnxruntime-fp32"


WRITES = {
    "verify": ["--engine", "onnxruntime", "--data", "synthetic:64"],
    "bench": ["--engine", "onnxruntime", "--no-rivals"],
    "cascade": ["--data", "synthetic:64"],
    "plan": ["--data", "synthetic:64"],
    "report": [],
    "build": ["--engine", "tensorrt-rtx"],
}
"""Commands that write into a bundle."""


@pytest.mark.parametrize("name", ["engines", "cascades", "reports", "reports/parity.json", "reports/report.html"])
@pytest.mark.parametrize("command", WRITES)
def test_nothing_is_written_where_a_link_leads_out(command, name, spoiled, call):
    """`emoexport verify` on a bundle of a stranger must not replace a file of ours."""
    target, place = spoiled.parent / "outside" / "ours", spoiled / name
    place.parent.mkdir(exist_ok=True)
    if "." in name:
        target.write_text("ours")
    else:
        target.mkdir()
        (target / "parity.json").write_text("ours")
        shutil.rmtree(place, ignore_errors=True)
    place.symlink_to(target)
    before = {path: path.read_bytes() for path in spoiled.parent.rglob("*") if path.is_file()}
    code, _, err = call(command, spoiled, *WRITES[command])
    assert code == 4, err
    assert f"{place} leads out of the bundle" in err
    assert "next: remove this link" in err
    assert {path: path.read_bytes() for path in spoiled.parent.rglob("*") if path.is_file()} == before


def test_odd_names_in_a_bundle_are_left_alone(spoiled, call):
    """One that looks like a leftover of nothing, and links in circles."""
    (spoiled / "...abcdefgh.emoexport").mkdir()
    (spoiled / "reports").mkdir()
    for name in ("round", "again"):
        (spoiled / "reports" / name).symlink_to(".")
    code, _, err = call("report", spoiled)
    assert code == 0, err
    assert (spoiled / "reports" / "report.html").exists()
    assert (spoiled / "reports" / "round").is_symlink()
    assert (spoiled / "...abcdefgh.emoexport").exists()


def test_a_link_that_stays_in_its_bundle_is_written_through(spoiled, call):
    (spoiled / "kept").mkdir()
    (spoiled / "reports").symlink_to("kept")
    code, _, err = call("report", spoiled)
    assert code == 0, err
    assert "<html" in (spoiled / "kept" / "report.html").read_text()


@pytest.mark.parametrize(
    "change",
    [{"precision": "fp7"}, {"profiles": []}, {"profiles": [[4, 2, 1]]}, {"profiles": [[1]]}, {"versions": {}}],
    ids=str,
)
def test_a_passport_of_an_engine_that_cannot_be(change, spoiled, call):
    built_engine(spoiled)
    assert call("inspect", spoiled)[0] == 0
    built_engine(spoiled, **change)
    for command in (["inspect"], ["package", "--engine", "tensorrt", "--triton", spoiled.parent / "out"]):
        code, _, err = call(*command, spoiled)
        assert code == 4, err
        assert "error: " in err


def test_text_is_bounded(tmp_path):
    (tmp_path / "x").write_bytes(b"\xff")
    into_hole(tmp_path / "hole")
    for name, said in (("x", "cannot be read as text"), ("hole", "the limit is"), ("none", "cannot be read as text")):
        with pytest.raises(BadInput, match=said):
            read_text(tmp_path / name)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100_000, '{"digest": ' + "9" * 5000 + "}", "[]", '{"a": NaN}']
)
def test_a_passport_that_is_no_record_is_a_sentence(text, spoiled):
    (spoiled / "engines").mkdir()
    (spoiled / "engines" / "x.engine").touch()
    (spoiled / "engines" / "x.passport.json").write_text(text)
    with pytest.raises(BadBundle, match=r"x\.passport\.json"):
        passports_in(spoiled)


@pytest.mark.parametrize(
    "change",
    [{"machine": "/"}, {"machine": {"processor": 1}}, {"batches": [0]}, {"batches": 1}, {"faces": "many"}, {"x": 1}],
    ids=str,
)
def test_a_certificate_whose_fields_make_no_sense_is_none(change, spoiled):
    good = Certificate(
        verdict="certified",
        reasons=[],
        created="",
        engine_sha256=Bundle.open(spoiled).graph_sha256("fp32"),
        machine={},
        batches=[1, 16],
        data="",
        split="test",
        data_sha256="",
        faces=9,
        max_drop_points=0.1,
        max_disagreement_pct=1.0,
        bound_points=0.0,
        disagreement_bound_pct=0.1,
        multiplies_in={},
    )
    fields = dict.fromkeys(("file", "sha256", "backend", "graph", "graph_sha256", "created"), "")
    fields |= {"bytes": 0, "seconds": 0.0, "versions": {}, "device": {}, "settings": {}, "network": {}}
    fields |= {"precision": "fp32", "profiles": [[1, 1, 1]]}
    (spoiled / "engines").mkdir()
    for certificate in (dataclasses.asdict(good), dataclasses.asdict(good) | change):
        Passport(**fields, certificate=certificate).write(spoiled / "engines" / "onnxruntime-fp32")
        session = emoexport.load(spoiled)
        assert (session.certificate == good) == (certificate == dataclasses.asdict(good))
    Passport(**fields | {"profiles": "x"}).write(spoiled / "engines" / "x")
    with pytest.raises(BadBundle, match="other fields"):
        Passport.read(spoiled / "engines" / "x")


def test_reports_that_are_nested_too_deep_are_not_shown(spoiled):
    (spoiled / "reports").mkdir(exist_ok=True)  # others may have verified the bundle
    (spoiled / "reports" / "parity.json").write_text("[" * 100_000)
    assert "cannot be read" in findings.find(Bundle.open(spoiled)).parity.sentence


# Manifests that fit their digest


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("x" * 300, "cannot be read: File name too long"),
        ("x/" * 3000 + "x", "cannot be read: File name too long"),
        (".", "is missing"),
        ("\x1b[2J", r"\\x1b\[2J is missing"),
        *((name, "outside the bundle") for name in ("a\0b", "..\\outside\\x", "../outside/x", "/etc/hostname")),
    ],
)
def test_names_of_files_that_are_none(name, said, spoiled):
    edit(spoiled, lambda manifest: manifest["files"].update({name: {"sha256": "0" * 64, "bytes": 1}}))
    with pytest.raises(BadBundle, match=said) as caught:
        Bundle.open(spoiled)
    assert str(caught.value).isprintable()


def test_no_more_is_hashed_than_a_bundle_can_be(spoiled):
    into_hole(spoiled / "labels.txt")
    edit(spoiled, lambda manifest: manifest["files"]["labels.txt"].update(bytes=2**40))
    with pytest.raises(BadBundle, match="the limit is"):
        Bundle.open(spoiled)


@pytest.mark.parametrize(("record", "field"), [("calibration", "file"), ("provenance", "sbom"), ("", "tuning")])
def test_what_the_manifest_speaks_of_must_be_a_file_of_the_bundle(record, field, spoiled):
    (spoiled.parent / "outside" / "x.json").write_text("{}")
    edit(spoiled, lambda manifest: (manifest[record] if record else manifest).update({field: "../outside/x.json"}))
    with pytest.raises(BadBundle, match=r"lists no hash for \.\./outside/x\.json"):
        Bundle.open(spoiled)


def test_a_run_that_a_link_in_a_circle_leads_to_is_none(spoiled):
    (spoiled / "round").symlink_to("round")
    edit(spoiled, lambda manifest: manifest.update(run="round/run"))
    assert not Bundle.open(spoiled).run().is_dir()
    (spoiled / "labels.txt").write_text("x")
    with pytest.raises(BadBundle, match=r"changed|bytes") as caught:
        Bundle.open(spoiled)
    assert caught.value.hint == "copy it anew from where it was built"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"labels": ["happy"]}, "not those of the decision"),
        ({"members": []}, "members"),
        ({"views": []}, "views"),
        ({"max_batch": 0}, "max_batch"),
        ({"max_batch": 10**30}, "max_batch"),
        ({"face_shape": [0, 32, 1]}, "face_shape"),
        ({"face_shape": [10**9, 10**9, 1]}, "face_shape"),
        *(({"run": run}, "no path can be this") for run in ("\0", "x" * 256, "é" * 128, "x/" * 1025)),
        ({"gate": {"x": {"verdict": "not judged", "reason": ""}}}, "'x' is no precision"),
        ({"choice": {"passes": {"7:identity": 1.0}}}, "not of these members and views"),
        ({"choice": {"passes": {"x:identity": 1.0}}}, "invalid literal"),
    ],
)
def test_a_manifest_whose_fields_make_no_sense(change, said, spoiled):
    manifest = json.loads((spoiled / "manifest.json").read_text()) | change
    (spoiled / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BadBundle, match=said):
        Bundle.open(spoiled)


@pytest.mark.parametrize(
    "change", [{"gflop_a_pass": -1.0}, {"gflop_a_pass": float("inf")}, {"parameters": -1}], ids=str
)
def test_a_member_whose_cost_makes_no_sense(change, spoiled):
    manifest = json.loads((spoiled / "manifest.json").read_text())
    manifest["members"][0] |= change
    (spoiled / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BadBundle, match=rf"members\.0\.{next(iter(change))}"):
        Bundle.open(spoiled)


def test_a_view_can_only_be_the_same_as_an_earlier_one(spoiled):
    manifest = json.loads((spoiled / "manifest.json").read_text())
    manifest["views"][0]["same_as"] = manifest["views"][1]["name"]
    (spoiled / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BadBundle, match="does not come before it"):
        Bundle.open(spoiled)


def test_the_next_command_is_one_command(spoiled):
    """Whatever the manifest says: people copy it."""
    manifest = json.loads((spoiled / "manifest.json").read_text()) | {"run": "x; touch written\n\x1b[2J #"}
    (spoiled / manifest["run"]).mkdir()
    (spoiled / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BadBundle, match="was changed") as caught:
        Bundle.open(spoiled)
    assert "\x1b" not in caught.value.hint
    words = subprocess.run(
        ["/bin/sh", "-c", f"printf '%s|' {caught.value.hint}"], capture_output=True, text=True, check=True, cwd=spoiled
    ).stdout.split("|")
    assert words[:2] == ["emoexport", "build"]
    assert "touch written" in words[2]
    assert words[3] == "-o"


def test_what_is_quoted_moves_no_cursor():
    error = UsageError("a\x1b[2J\ud800\x9bb\nc", hint="\x07")
    assert str(error) == "a\\x1b[2J\\ud800\\x9bb\nc"
    assert error.hint == "\\x07"


# Graphs


def of_weights(spoiled: Path, **told: str) -> Path:
    """Have the FP32 graph say of the weights of one tensor that they are elsewhere."""
    path = spoiled / "model.fp32.onnx"
    model = onnx.load(path)
    tensor = max(model.graph.initializer, key=lambda one: len(one.raw_data))
    (path.parent / f"{path.name}.data").write_bytes(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in told.items():
        tensor.external_data.add(key=key, value=value)
    path.write_bytes(model.SerializeToString())
    reseal(spoiled, path.name)
    return path


@pytest.mark.parametrize(
    "place",
    [
        *("../outside/x", "/etc/hostname", "/dev/zero", "labels.txt", "model.int8.onnx", "model.fp32.onnx", ""),
        *("./model.fp32.onnx.data", "*/_ORT_MEM_ADDR_/*", "\\\\host\\share\\x"),
    ],
)
def test_a_graph_can_name_no_file_but_that_of_its_weights(place, spoiled):
    """CVE-2022-25882, CVE-2024-27318, CVE-2025-51480; and an address in memory that ONNX Runtime would read."""
    of_weights(spoiled, location=place, offset="0")
    with pytest.raises(BadBundle, match=r"has its weights in .*; they may be in model\.fp32\.onnx\.data alone"):
        Bundle.open(spoiled)


def test_its_own_weights_must_be_listed_and_no_link(spoiled):
    of_weights(spoiled, location="model.fp32.onnx.data")
    with pytest.raises(BadBundle, match="if that is listed"):
        Bundle.open(spoiled)
    data = spoiled / "model.fp32.onnx.data"

    def listed(manifest: dict[str, Any]) -> None:
        manifest["files"][data.name] = {"sha256": "", "bytes": 0}

    edit(spoiled, listed)
    reseal(spoiled, data.name)
    wanted = emoexport.load(spoiled).run(np.zeros((1, 32, 32, 1), np.uint8))
    assert wanted.label.shape == (1,)
    data.rename(spoiled.parent / "outside" / data.name)
    data.symlink_to(spoiled.parent / "outside" / data.name)
    with pytest.raises(BadBundle, match="outside the bundle"):
        Bundle.open(spoiled)


@pytest.mark.parametrize("told", [{"offset": "9" * 18}, {"offset": "-1"}, {"length": "1"}, {"offset": "x"}])
@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_weights_that_are_not_where_they_are_said_to_be(told, engine, spoiled):
    of_weights(spoiled, location="model.fp32.onnx.data", **told)
    edit(spoiled, lambda manifest: manifest["files"].update({"model.fp32.onnx.data": {"sha256": "", "bytes": 0}}))
    reseal(spoiled, "model.fp32.onnx.data")
    with pytest.raises(BadBundle, match="cannot load"):
        emoexport.load(spoiled, engine=engine, precision="fp32")


def secret_beside(spoiled: Path, name: str) -> Path:
    """A link beside a file of the bundle to one that is none of its business."""
    secret = spoiled.parent / "outside" / "secret"
    secret.write_bytes(np.ones((1, 4), np.float32).tobytes())
    (spoiled / name).parent.mkdir(exist_ok=True)
    (spoiled / name).symlink_to(secret)
    return secret


def test_weights_that_no_record_lists_are_not_there(spoiled):
    secret_beside(spoiled, "model.fp32.onnx.data")
    with pytest.raises(BadBundle, match=r"model\.fp32\.onnx\.data is listed nowhere"):
        Bundle.open(spoiled)


def test_a_package_takes_no_passport_from_outside(spoiled, call, tmp_path):
    secret = secret_beside(spoiled, "engines/onnxruntime-fp32.passport.json")
    out = tmp_path / "image"
    code, _, err = call("package", spoiled, "--docker", out, "--engine", "onnxruntime", "--precision", "fp32")
    assert code == 0, err
    assert secret.read_bytes() not in [path.read_bytes() for path in out.rglob("*") if path.is_file()]


def test_openvino_takes_a_graph_for_onnx_and_nothing_else(spoiled):
    """Its own format has its weights beside it, where no record lists them."""
    faces = openvino.opset13.parameter([1, 4], np.float32)
    ones = openvino.opset13.constant(np.zeros((1, 4), np.float32))
    model = openvino.Model([openvino.opset13.add(faces, ones)], [faces])
    openvino.save_model(model, spoiled / "x.xml", compress_to_fp16=False)
    (spoiled / "x.xml").replace(spoiled / "model.fp32.onnx")
    (spoiled / "x.bin").unlink()
    secret_beside(spoiled, "model.fp32.bin")
    reseal(spoiled, "model.fp32.onnx")
    assert openvino.Core().read_model(spoiled / "model.fp32.onnx").get_results()  # so it does by itself
    with pytest.raises(BadBundle, match="cannot load"):
        emoexport.load(spoiled, engine="openvino", precision="fp32")


def test_all_places_where_onnx_keeps_weights_are_known():
    """A version of onnx with another one fails here."""
    known: dict[str, dict[int, str]] = {}
    leads = {"StringStringEntryProto"}
    messages = onnx.onnx_pb.DESCRIPTOR.message_types_by_name if hasattr(onnx, "onnx_pb") else {}
    messages = messages or onnx.ModelProto.DESCRIPTOR.file.message_types_by_name
    entries = [("TensorProto", onnx.TensorProto.DESCRIPTOR.fields_by_name["external_data"])]
    while entries:
        found = []
        for owner, field in entries:
            known.setdefault(owner, {})[field.number] = field.message_type.name
            leads.add(owner)
        for name, message in messages.items():
            for field in message.fields:
                kind = field.message_type.name if field.message_type is not None else ""
                if kind in leads - {"StringStringEntryProto"} and field.number not in known.get(name, {}):
                    found.append((name, field))
        entries = found
    reached = {"ModelProto"}
    while (more := reached | {kind for name in reached for kind in known.get(name, {}).values()}) != reached:
        reached = more
    assert {name: fields for name, fields in known.items() if name in reached} == WITHIN


def test_a_graph_that_is_cut_where_places_are_named(tmp_path):
    (tmp_path / "x.onnx").write_bytes(b"\x3a\xff\x01location")
    with pytest.raises(BadBundle, match="cut short"):
        require_own_weights(tmp_path / "x.onnx", listed=True)
    (tmp_path / "x.onnx").write_bytes(b"\x3b\x08location")
    with pytest.raises(BadBundle, match="group"):
        require_own_weights(tmp_path / "x.onnx", listed=True)
    (tmp_path / "x.onnx").write_bytes(b"")
    require_own_weights(tmp_path / "x.onnx", listed=True)
    assert places_of_weights(tmp_path / "x.onnx") == set()


def rewritten(spoiled: Path, change: Callable[[onnx.ModelProto], object], precision: str = "fp32") -> None:
    path = spoiled / f"model.{precision}.onnx"
    model = onnx.load(path)
    change(model)
    path.write_bytes(model.SerializeToString())
    reseal(spoiled, path.name)


def nan(model: onnx.ModelProto) -> None:
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            tensor.raw_data = b"\xff" * len(tensor.raw_data)


def without_scores(model: onnx.ModelProto) -> None:
    del model.graph.output[1]


def of_other_faces(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT


@pytest.mark.parametrize("change", [nan, without_scores, of_other_faces])
def test_a_graph_that_answers_no_outcome_is_not_used(change, spoiled):
    rewritten(spoiled, change)
    with pytest.raises((BadBundle, EngineFailed), match=r"answers no|fails in a call|cannot load"):
        emoexport.load(spoiled, engine="onnxruntime", precision="fp32")


def test_a_graph_of_other_emotions_is_not_used(spoiled):
    def fewer(manifest: dict[str, Any]) -> None:
        manifest["labels"] = manifest["decision"]["labels"] = manifest["labels"][:6]
        manifest["decision"].update(thresholds={}, pairs=[])

    edit(spoiled, fewer)
    with pytest.raises(BadBundle, match="answers no probabilities of 6 emotions"):
        emoexport.load(spoiled, engine="onnxruntime", precision="fp32")


def test_a_graph_that_onnx_runtime_cannot_open_leaves_standard_output_alone(spoiled, call, monkeypatch, tmp_path):
    """By itself it prints there that it tries again, among the lines of JSON of predict."""

    def refuse(self: object, *_: object) -> None:
        raise RuntimeError("no memory is left")

    monkeypatch.setattr(onnxruntime.InferenceSession, "_create_inference_session", refuse)
    Image.new("L", (32, 32)).save(tmp_path / "face.png")
    asked = ("--engine", "onnxruntime", "--precision", "fp32", "--format", "jsonl")
    code, out, err = call("predict", tmp_path / "face.png", "--bundle", spoiled, *asked)
    assert (code, out) == (4, "")
    assert "no memory is left" in err


def test_a_graph_of_unknown_types_is_a_sentence(spoiled, call):
    rewritten(spoiled, lambda model: model.graph.initializer.add(name="x", dims=[2**40], data_type=99))
    code, _, err = call("inspect", spoiled)
    assert code == 4
    assert "cannot be read as ONNX" in err


def node_of(model: onnx.ModelProto, operator: str, within: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.op_type == operator and within in node.name)


def of_absurd_size(model: onnx.ModelProto) -> None:
    """To which something is enlarged, in one of the small constants that the shape is put together from."""
    made = {name: node for node in model.graph.node for name in node.output}
    sizes = made[node_of(model, "Resize", "").input[3]]
    constant = next(tensor for tensor in model.graph.initializer if tensor.name in sizes.input)
    constant.raw_data = b"\x7b" * len(constant.raw_data)


def with_a_scale_that_is_computed(model: onnx.ModelProto) -> None:
    node_of(model, "DequantizeLinear", "downsample").input[1] = node_of(model, "Add", "").output[0]


@pytest.mark.parametrize(
    ("precision", "change"),
    [
        (
            "fp32",
            lambda model: setattr(
                node_of(model, "Transpose", "members.1.backbone.stages_3.downsample.0/permute_14"), "op_type", "Exp"
            ),
        ),
        ("fp32", lambda model: setattr(node_of(model, "Mul", "spatial"), "op_type", "Reshape")),
        ("fp32", lambda model: setattr(node_of(model, "Mul", "spatial"), "domain", "com.microsoft")),
        ("fp32", lambda model: setattr(node_of(model, "Conv", "downsample"), "domain", "com.microsoft")),
        ("fp32", lambda model: setattr(model.opset_import[0], "version", 2**40)),
        ("fp32", of_absurd_size),
        ("int8", with_a_scale_that_is_computed),
    ],
    ids=["attribute", "shape", "domain", "layer", "opset", "size", "scale"],
)
def test_a_graph_that_openvino_cannot_convert_is_a_sentence(precision, change, spoiled):
    """By itself it ends the process, or does not come to an end."""
    rewritten(spoiled, change, precision)
    with pytest.raises(BadBundle, match=rf"OpenVINO .* cannot load model\.{precision}\.onnx: "):
        emoexport.load(spoiled, engine="openvino", precision=precision)


def outcome(**changes: Any) -> Outcome:
    return Outcome(np.full((2, 4), 0.25, np.float32), np.array([0, 3]), np.array([0.25, 0.25], np.float32))._replace(
        **changes
    )


def test_what_can_be_said_of_two_faces_and_four_emotions():
    assert outcome().is_of(2, 4)
    assert not outcome().is_of(3, 4)
    assert not outcome().is_of(2, 5)
    for wrong in (
        {"probabilities": np.full((2, 4), np.nan, np.float32)},
        {"probabilities": np.full((2, 4), 0.5, np.float32)},
        {"probabilities": np.array([[2, -1, 0, 0]] * 2, np.float32)},
        {"probabilities": np.full(4, 0.25, np.float32)},
        {"label": np.array([0, 4])},
        {"label": np.array([-1, 0])},
        {"label": np.array([0.0, 1.0])},
        {"label": np.array([0])},
        {"confidence": np.array([np.inf, 0], np.float32)},
        {"confidence": np.zeros((2, 1), np.float32)},
    ):
        assert not outcome(**wrong).is_of(2, 4), wrong


def test_an_engine_that_fails_in_a_later_call_is_a_sentence(least, monkeypatch):
    def fail(*_: object, **__: object) -> Outcome:
        raise RuntimeError("a runtime's own")

    faces = np.zeros((2, 32, 32, 1), np.uint8)
    session = emoexport.load(least, engine="onnxruntime", precision="fp32")
    monkeypatch.setattr(session._engine, "_run", lambda _: outcome())
    with pytest.raises(BadBundle, match="onnxruntime-fp32 answers no probabilities of 7 emotions"):
        session.run(faces)
    monkeypatch.setattr(session._engine, "_scores", lambda _: np.zeros((2, 1, 1, 7), np.float32))
    with pytest.raises(BadBundle, match=r"answers scores \(2, 1, 1, 7\); needed are \(2, 2, 16, 7\)"):
        session.scores(faces)
    monkeypatch.setattr(session._engine, "_run", fail)
    monkeypatch.setattr(session._engine, "_scores", fail)
    for asked in (session.run, session.scores):
        with pytest.raises(EngineFailed, match="onnxruntime-fp32 fails in a call: a runtime's own"):
            asked(faces)


# What was found by fuzzing


@pytest.mark.parametrize("name", TARGETS)
def test_what_once_was_taken_badly_is_a_sentence_or_an_answer(name):
    ends: Counter[bool] = Counter()
    for seed in seeds_of(name):
        for data in (seed, seed[: len(seed) // 2], seed[::-1]):
            try:
                TARGETS[name].run(data)
                ends[True] += 1
            except EmoexportError:
                ends[False] += 1
    assert ends[True]


def test_a_manifest_is_a_manifest():
    """So that the seeds of its target are what they are said to be."""
    for seed in TARGETS["manifest"].seeds():
        assert Manifest.model_validate_json(seed).passes_a_face
