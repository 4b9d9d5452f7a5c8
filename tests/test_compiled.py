"""Packages of PyTorch's compiler: only those marked slow compile any. `test_engines.py` judges what they answer."""

import zipfile
from pathlib import Path

import numpy as np
import pytest

from emoexport import benchmark, certification, opening, pipeline
from emoexport import compiled as compiling
from emoexport.bundle import Bundle
from emoexport.engines.machine import instruction_sets, versions_of
from emoexport.errors import CheckFailed, MissingRuntime, WrongMachine
from emoexport.files import sha256_of, write_text
from emoexport.manifest import MANIFEST_FILE, FileEntry, PackageEntry
from emoexport.summary import summarize
from emoexport.verdict import Limits


def with_package(bundle: Bundle, folder: Path, **changes: object) -> Bundle:
    """A bundle of the manifest alone that has a package too, which is none."""
    file = folder / "engines/inductor-fp32.pt2"
    file.parent.mkdir()
    file.write_bytes(b"no package")
    entry = PackageEntry(
        file="engines/inductor-fp32.pt2",
        backend="inductor",
        precision="fp32",
        torch=versions_of("torch")["torch"],
        instruction_sets=instruction_sets(),
        seconds=1.0,
    ).model_copy(update=changes)
    files = {entry.file: FileEntry(sha256=sha256_of(file), bytes=file.stat().st_size)}
    for name in ("model.fp32.onnx",):
        (folder / name).symlink_to(bundle.path / name)
    manifest = bundle.manifest.model_copy(
        update={
            "graphs": {"fp32": bundle.manifest.graphs["fp32"]},
            "files": {**bundle.manifest.files, **files},
            "engines": {"inductor-fp32": entry},
        }
    ).sealed()
    write_text(folder / MANIFEST_FILE, manifest.to_json())
    return Bundle(path=folder, manifest=manifest)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"instruction_sets": ("x86_64", "avx9000")}, "this processor lacks .*avx9000"),
        ({"instruction_sets": ("s390x",)}, "this processor lacks s390x"),
        ({"torch": "1.0"}, "PyTorch here is .*; needed is 1.0"),
    ],
)
def test_a_package_for_another_machine_is_not_loaded(changes, said, bundle, tmp_path, monkeypatch):
    monkeypatch.setattr("torch._inductor.aoti_load_package", lambda _: pytest.fail("it was loaded"))
    other = with_package(bundle, tmp_path, **changes)
    with pytest.raises(WrongMachine, match=f"compiled for another machine: {said}") as caught:
        opening.open_engines(other, engines=["inductor"])
    assert caught.value.exit_code == 5
    assert "--engine inductor; or name other engines with --engine" in caught.value.hint
    notes: list[str] = []
    found = opening.open_engines(other, note=notes.append)
    assert "inductor" not in {engine.backend for engine in found}
    assert "inductor-fp32 is left out" in notes[0]
    assert [engine.name for engine in opening.open_engines(other, engines=["onnxruntime"])] == ["onnxruntime-fp32"]


def test_inspect_and_sizes_know_packages(bundle, tmp_path):
    found = with_package(bundle, tmp_path)
    assert found.sizes() == {"fp32": bundle.size_of("fp32"), "inductor-fp32": 10}
    assert summarize(found).engines["inductor-fp32"].bytes == 10
    assert found.build_command().endswith("--engine inductor")


def test_without_a_compiler_nothing_is_begun(call, run_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    code, _, err = call("build", run_dir, "-o", tmp_path / "x", "--engine", "inductor")
    assert code == MissingRuntime.exit_code
    assert err.startswith("error: AOTInductor needs a C++ compiler; there is no no-such-compiler here.")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("how", ["breaks", "errs"])
def test_a_compiler_that_fails_or_errs_leaves_no_bundle(how, run_dir, tmp_path, quiet, monkeypatch):
    class Erring:
        name = "inductor-fp32"

        def scores(self, faces: np.ndarray) -> np.ndarray:
            return np.full((len(faces), 2, 16, 7), 1 / 7, dtype=np.float32)

    def compile_nothing(*_: object, **__: object) -> None:
        if how == "breaks":
            raise RuntimeError("internal compiler error\nof many lines")

    monkeypatch.setattr(compiling, "_compile", compile_nothing)
    monkeypatch.setattr(compiling, "open_engine", lambda *_, **__: Erring())
    said = {"breaks": "at FP32 cannot compile the fold: internal compiler error$", "errs": "differs from the fold"}
    with pytest.raises(CheckFailed, match=said[how]):
        pipeline.build(run_dir, tmp_path / "x", compiled=True, console=quiet)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_bundle_with_packages_is_verified_like_any_other(compiled, quiet):
    again = Bundle.open(compiled.path)
    loose = Limits(max_drop_points=5, max_disagreement_pct=5)
    report = certification.verify(again, limits=loose, rounds=2, threads=1, console=quiet)
    assert report.verdict == "certified", [engine.reasons for engine in report.engines]
    engines = {result.engine for result in report.results}
    assert {"inductor-fp32", "inductor-bf16", "onnxruntime-fp32"} <= engines
    assert report.size_bytes == again.sizes()
    speed = benchmark.bench(again, engines=["inductor"], batches=(1, 3), rounds=2, threads=1, console=quiet)
    assert {result.engine for result in speed.results} == {"torch-fp32", "inductor-fp32", "inductor-bf16"}
    fp32, bf16 = (again.sizes()[f"inductor-{name}"] for name in ("fp32", "bf16"))
    assert bf16 < fp32  # the weights of its layers are BF16


@pytest.mark.slow
def test_a_package_tells_nothing_of_the_folders_it_was_made_in(compiled):
    for entry in compiled.manifest.engines.values():
        with zipfile.ZipFile(compiled.path / entry.file) as package:
            assert [name for name in package.namelist() if name.endswith(".so")]
            for name in package.namelist():
                assert str(compiled.path.parent).encode() not in package.read(name), name
                assert not name.endswith(".cpp")
