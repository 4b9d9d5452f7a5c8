import json
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from cyclonedx.model.bom import Bom

from emoexport import opening, pipeline, provenance, sessions
from emoexport.bundle import Bundle
from emoexport.calibration import Wish
from emoexport.errors import BadBundle, BadCheckpoint, BadData, BadInput, UsageError
from emoexport.files import new_directory, sha256_of, write_text
from emoexport.precision import PRECISIONS
from emoexport.train.checkpoint import read_run


@pytest.fixture
def spoiled(bundle, tmp_path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(bundle.path, tmp_path / "bundle"))


def test_the_manifest_says_what_is_in_it(bundle):
    manifest = bundle.manifest
    assert set(manifest.graphs) == set(PRECISIONS)
    assert len(manifest.members) == 2
    assert len(manifest.views) == 16
    assert manifest.calibration is not None
    assert manifest.calibration.faces == 35
    on_disk = {path.name for path in bundle.path.iterdir() if path.is_file()}
    assert set(manifest.files) == on_disk - {"manifest.json"}
    assert (bundle.path / "labels.txt").read_text().split() == list(manifest.labels)
    sizes = {name: bundle.size_of(name) for name in PRECISIONS}
    assert max(sizes["int8-fp16"], sizes["fp8"]) < sizes["int8"] < sizes["fp32"]
    assert max(sizes["fp16"], sizes["bf16"]) < sizes["fp32"]
    assert not Path(manifest.run).is_absolute()
    assert bundle.run().is_dir()


@pytest.mark.parametrize(
    "name", ["labels.txt", "model.fp32.onnx", "model.int8.onnx", "calibration.json", "manifest.json"]
)
@pytest.mark.parametrize("how", ["flip", "truncate", "extend", "remove"])
def test_no_file_can_be_changed_unnoticed(name, how, spoiled):
    path = spoiled / name
    data = bytearray(path.read_bytes())
    if how == "remove":
        path.unlink()
    else:
        if how == "flip":
            data[len(data) // 2] ^= 1
        path.write_bytes({"truncate": data[: len(data) // 2], "extend": bytes(data) + b" x"}.get(how, data))
    with pytest.raises(BadBundle, match=name):
        Bundle.open(spoiled)


def edit(path: Path, change) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


def test_an_edited_manifest_is_noticed(spoiled):
    edit(spoiled, lambda manifest: manifest["decision"]["thresholds"].update(happy=0.9))
    with pytest.raises(BadBundle, match="changed after it was written") as caught:
        Bundle.open(spoiled)
    words = caught.value.hint.split()
    assert words[:2] == ["emoexport", "build"]
    precisions = ["--fp16", "--bf16", "--int8", "--int8-fp16", "--fp8"]
    assert words[5:] == [*precisions, "--keep-rejected", "--max-batch", "64", "--calib-size", "35"]


@pytest.mark.parametrize("name", ["../outside.txt", "/etc/hostname", "link.txt"])
def test_a_manifest_cannot_point_outside(name, spoiled):
    (spoiled.parent / "outside.txt").write_text("x")
    (spoiled / "link.txt").symlink_to(spoiled.parent / "outside.txt")
    manifest = Bundle.open(spoiled).manifest
    entry = next(iter(manifest.files.values()))
    forged = manifest.model_copy(update={"files": {**manifest.files, name: entry}}).sealed()
    (spoiled / "manifest.json").write_text(forged.to_json())
    with pytest.raises(BadBundle, match="outside the bundle"):
        Bundle.open(spoiled)


def test_what_is_no_bundle(tmp_path):
    with pytest.raises(BadBundle, match="no bundle"):
        Bundle.open(tmp_path)
    (tmp_path / "manifest.json").write_text('{"schema_version": 2}')
    with pytest.raises(BadBundle, match="schema_version"):
        Bundle.open(tmp_path)


def test_a_precision_that_is_not_there(bundle):
    with pytest.raises(UsageError, match="'bf17' is no precision"):
        bundle.graph("bf17")
    less = Bundle(path=bundle.path, manifest=bundle.manifest.model_copy(update={"graphs": {}}))
    with pytest.raises(BadBundle, match="no int8 graph") as caught:
        less.graph("int8")
    assert "--int8" in caught.value.hint.split()


@pytest.mark.slow
def test_a_build_that_fails_leaves_the_old_bundle(run_dir, spoiled, quiet, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("the disk is full")

    before = sorted((path.name, path.stat().st_mtime_ns) for path in spoiled.iterdir())
    monkeypatch.setattr(pipeline, "graph_entry", fail)
    with pytest.raises(RuntimeError):
        pipeline.build(run_dir, spoiled, console=quiet)
    assert sorted((path.name, path.stat().st_mtime_ns) for path in spoiled.iterdir()) == before
    assert [path.name for path in spoiled.parent.iterdir()] == ["bundle"]


def test_other_peoples_files_are_not_replaced(run_dir, tmp_path, quiet):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="holds other files"):
        pipeline.build(run_dir, tmp_path, console=quiet)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_run_that_is_not_the_bundles(bundle, run_dir, tmp_path, quiet):
    copy = Path(shutil.copytree(run_dir, tmp_path / "run"))
    reference, _, _ = sessions.open_reference(bundle, copy)
    assert len(reference.members) == 2
    record = json.loads((copy / "run.json").read_text())
    first, second = record["members"]
    (copy / "run.json").write_text(json.dumps(record | {"members": [second, first]}))
    again, _, _ = sessions.open_reference(bundle, copy)  # in the bundle's order
    for member, same in zip(reference.members, again.members, strict=True):
        assert torch.equal(member.classifier.output.weight, same.classifier.output.weight)
    (copy / "run.json").write_text(json.dumps(record | {"members": [second, second]}))
    with pytest.raises(BadCheckpoint, match="not those"):
        sessions.open_reference(bundle, copy)
    with pytest.raises(BadCheckpoint, match="is not at"):
        sessions.open_reference(bundle, tmp_path / "nowhere")


def test_files_of_a_run_that_do_not_fit_together(run_dir, tmp_path, quiet):
    run = Path(shutil.copytree(run_dir, tmp_path / "run"))
    record = json.loads((run / "decision.json").read_text())
    record["decision"]["labels"] = record["decision"]["labels"][::-1]
    (run / "decision.json").write_text(json.dumps(record))
    with pytest.raises(BadCheckpoint, match=r"decision\.json has the labels"):
        pipeline.build(run, tmp_path / "x", console=quiet)
    (run / "decision.json").unlink()
    with pytest.raises(BadCheckpoint, match=r"decision\.json"):
        pipeline.build(run, tmp_path / "x", console=quiet)
    assert not (tmp_path / "x").exists()


def test_only_faces_that_were_trained_on_calibrate(run_dir, tmp_path, quiet):
    with pytest.raises(BadData, match="not those that the members were trained on"):
        pipeline.build(
            run_dir, tmp_path / "x", precisions=["int8"], calibration=Wish(data="synthetic:700"), console=quiet
        )
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_a_bundle_for_one_face_at_a_time(run_dir, tmp_path, quiet, faces):
    bundle = pipeline.build(run_dir, tmp_path / "one", max_batch=1, console=quiet)
    for engine in opening.open_engines(bundle):
        assert engine.run(faces[0][:1]).probabilities.shape == (1, 7)
        with pytest.raises(BadInput, match="N from 1 to 1"):
            engine.run(faces[0][:2])


def test_files_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    target = tmp_path / "x.json"
    write_text(target, "old")
    monkeypatch.setattr("emoexport.files.os.fsync", lambda _: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError, match="no space"):
        write_text(target, "new" * 1000)
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_a_new_directory_replaces_only_when_complete(tmp_path):
    target = tmp_path / "out"
    for text in ("first", "second"):
        with new_directory(target, marker="m.txt") as directory:
            (directory / "m.txt").write_text(text)
            assert not target.exists() or (target / "m.txt").read_text() == "first"
    assert (target / "m.txt").read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
def test_two_builds_give_the_same_bytes(run_dir, tmp_path):
    """In two processes, with hashes of strings and dates of their own: all but what was measured is the same."""
    flags = [f"--{name}" for name in PRECISIONS if name != "fp32"]
    some = ["--keep-rejected", "--calib-size", "35", "--max-batch", "64", "--gate-faces", "35"]
    for folder, asked in (("few", ["--fp16", "--bf16", "--calib-size", "35"]), ("all", [*flags, *some])):
        made = []
        for place in ("first", "second"):
            bundle = tmp_path / place / folder
            command = [sys.executable, "-m", "emoexport", "build", run_dir, "-o", bundle, *asked]
            subprocess.run(command, capture_output=True, check=True)
            made.append({file.name: file.read_bytes() for file in bundle.iterdir()})
        manifests = [json.loads(each["manifest.json"]) for each in made]
        if folder == "few":
            assert made[0] == made[1]
        else:  # only the times by which graphs of 8 bits are judged
            for each, manifest in zip(made, manifests, strict=True):
                del each["manifest.json"], manifest["gate"], manifest["digest"]
            assert made[0] == made[1]
            assert manifests[0] == manifests[1]


def test_a_bundle_tells_what_it_was_made_of(bundle, run_dir, tmp_path):
    told = bundle.manifest.provenance
    assert told.materials == {name: sha256_of(run_dir / name) for name in ("run.json", "decision.json")}
    assert told.source_sha256 == provenance._source_sha256()
    bom = Bom.from_json(json.loads((bundle.path / told.sbom).read_text()))
    found = {component.bom_ref.value: component for component in bom.components}
    for number, member in enumerate(bundle.manifest.members, 1):
        ((kept,),) = ([*found[f"member {number}"].hashes],)
        assert kept.content == member.sha256
    for name in ("torch", "onnx", "onnxscript", "numpy", "pydantic-core"):  # and what is needed by these
        assert found[name].version == metadata.version(name).partition("+")[0]
        assert found[name].purl.to_string() == f"pkg:pypi/{name}@{found[name].version}"
    assert {each.id for each in found["timm"].licenses} == {"Apache-2.0"}
    needs = {each.ref.value: {one.ref.value for one in each.dependencies} for each in bom.dependencies}
    assert needs["bundle"] >= {"member 1", "member 2", "torch"}
    assert needs["member 1"] == {"training faces", "validation faces"}
    other = tmp_path / "other.json"
    members = bundle.manifest.members[::-1]
    data = read_run(run_dir).data
    serial = []
    for each in (bundle.manifest.members, members, members):
        provenance.write_sbom(other, "tiny", members=each, data=data, packages=["torch"])
        serial.append(json.loads(other.read_text())["serialNumber"])
    assert serial[0] != serial[1] == serial[2]


def test_an_edited_package_is_another_source(tmp_path, monkeypatch):
    files = provenance.own_files()
    assert {"__init__.py", "bundle.py", "train/ensemble.py", "engines/base.py", "calib/observer.py"} <= files.keys()
    before = provenance._source_sha256()
    edited = tmp_path / "bundle.py"
    edited.write_text(files["bundle.py"].read_text() + "x = 1\n")
    monkeypatch.setattr(provenance, "own_files", lambda: files | {"bundle.py": edited})
    assert provenance._source_sha256() != before
