"""Real commands, killed at random moments of their work: what is there is whole, and the same command finishes it.

`EMOEXPORT_KILLS=50 pytest tests/test_kills.py -s` kills each command that many times, and prints what was found.
"""

import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from killing import Commands, killed_at_each_step
from PIL import Image

from emoexport import bundle as bundle_module
from emoexport import runtime
from emoexport.bundle import Bundle
from emoexport.cascade_record import cascades_in, read_cascade
from emoexport.engines.certificate import read_certificate
from emoexport.engines.passport import Passport, passport_of, read_engine
from emoexport.files import new_directory, sha256_of, unfinished_directory
from emoexport.manifest import FileEntry
from emoexport.runtime import load
from emoexport.saved_answers import SavedAnswers
from emoexport.score_record import read_record
from emoexport.shard_scoring import read_tally
from emoexport.storage import Storage
from emoexport.train.synthetic import synthetic_faces

pytest.importorskip("ray")
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes cannot be forked here")
KILLS = int(os.environ.get("EMOEXPORT_KILLS", "1"))
FACES = 120


@pytest.fixture(scope="module")
def commands() -> Iterator[Commands]:
    folder = Path("/tmp").resolve() / f"kills-{os.getpid()}"  # Ray's sockets have short paths
    folder.mkdir()
    found = Commands(folder)
    yield found
    found.close()
    shutil.rmtree(folder)


def test_a_bundle_killed_at_every_step_of_its_publication_is_the_old_or_the_new_one(bundle, tmp_path):
    target = tmp_path / "x"
    newer = bundle.manifest.model_copy(update={"created": "later"}).sealed()

    def publish() -> None:
        with new_directory(target, marker="manifest.json") as directory:
            for name in [*bundle.manifest.files, "labels.txt"]:
                shutil.copyfile(bundle.path / name, directory / name)
            (directory / "manifest.json").write_text(newer.to_json())

    shutil.copytree(bundle.path, target)
    seen = [Bundle.open(target).manifest.created for _ in killed_at_each_step(publish)]
    assert len(seen) > 20
    assert set(seen) == {bundle.manifest.created, "later"}
    publish()
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


CHAIN = 5
"""Kills one after the other, each of what the one before left, until the command may come to its end."""


def moments(usual: float, found: Counter[str]) -> Iterator[tuple[float, bool, bool]]:
    """Random ones, one in each part of the usual time, in random order; whether a chain begins, and whether it ends.

    Where the command was not killed, as it ended before, it is tried again.
    """
    for number, part in enumerate(random.sample(range(KILLS), KILLS)):
        for trial in range(4):
            if kills(found) == number or trial == 0:
                place = number % CHAIN
                is_last = place == CHAIN - 1 or number == KILLS - 1
                yield usual * (part + random.random()) / KILLS, place == 0 and trial == 0, is_last


def kills(found: Counter[str]) -> int:
    return sum(count for state, count in found.items() if state.startswith("killed"))


def tell(command: str, usual: float, found: Counter[str]) -> None:
    print(f"\n{command}: {kills(found)} kills over {usual:.1f} s; found {dict(found)}")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_build(commands, run_dir, tmp_path):
    out, old = tmp_path / "x", tmp_path / "old"
    asked = ("build", run_dir, "-o", out, "--view", "identity", "--member")
    usual = 0.0
    for member in (2, 1):  # the first imports, and becomes the old one
        code, usual = commands.run(*asked, member)
        assert code == 0, commands.log()
        if member == 2:
            out.rename(old)
    new, found = Bundle.open(out).manifest.digest, Counter[str]()
    has_old = False
    for moment, is_first, is_last in moments(usual, found):
        if is_first:
            has_old = not has_old
            shutil.rmtree(out, ignore_errors=True)
            if has_old:
                shutil.copytree(old, out)
        code, _ = commands.run(*asked, 1, seconds=moment)
        now = Bundle.open(out).manifest.digest if out.exists() else "none"
        assert not (has_old and now == "none")
        found[
            f"{'killed' if code == -9 else 'ended'}, {'none' if now == 'none' else 'new' if now == new else 'old'}"
        ] += 1
        assert code == -9 or now == new
        if is_last:
            assert commands.run(*asked, 1)[0] == 0, commands.log()
            assert Bundle.open(out).manifest.digest == new
            assert sorted(path.name for path in tmp_path.iterdir()) == ["old", "x"]
    tell("build", usual, found)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_train(commands, config_file, tmp_path):
    out, old = tmp_path / "run", tmp_path / "old"
    asked = ("train", "--data", "synthetic:210", "--config", config_file, "--epochs", 3, "--out", out)

    def weights(run: Path) -> list[str]:
        members = json.loads((run / "run.json").read_text())["members"]
        return [json.loads((run / name).read_text())["sha256"] for name in members]

    assert commands.run(*asked, "--seed", 1)[0] == 0, commands.log()
    out.rename(old)
    code, usual = commands.run(*asked)
    assert code == 0, commands.log()
    first, unbroken, found = weights(old), weights(out), Counter[str]()
    unfinished = unfinished_directory(out)
    has_old = False

    def again() -> list[str]:
        if (unfinished / "request.json").exists():
            return ["--resume"]
        return ["--force"] if has_old else []

    for moment, is_first, is_last in moments(usual, found):
        if is_first or weights_or_none(out, weights) == unbroken:
            has_old = not has_old
            shutil.rmtree(out, ignore_errors=True)
            shutil.rmtree(unfinished, ignore_errors=True)
            if has_old:
                shutil.copytree(old, out)
        code, _ = commands.run(*asked, *again(), seconds=moment)
        now = weights_or_none(out, weights)
        assert now in ([first, unbroken] if has_old else [None, unbroken])
        state = "new" if now == unbroken else "old" if now else "none"
        begun = (unfinished / "request.json").exists()
        found[f"{'killed' if code == -9 else 'ended'}, {state}{', resumable' if begun else ''}"] += 1
        assert state == "new" or code == -9, commands.log()
        if is_last:
            code, _ = commands.run(*asked, *([] if state == "new" else again()))
            assert code == (2 if state == "new" else 0), commands.log()
            assert weights(out) == unbroken  # bit for bit as if nothing had happened
            assert sorted(path.name for path in tmp_path.iterdir()) == ["old", "run"]
            assert {path.name for path in out.iterdir()} == {path.name for path in old.iterdir()}
    tell("train", usual, found)


def weights_or_none(run: Path, weights: Callable[[Path], list[str]]) -> list[str] | None:
    return weights(run) if run.exists() else None


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for number, face in enumerate(synthetic_faces(FACES, size=32, seed=8)[0]):
        Image.fromarray(face[..., 0]).save(folder / f"{number:03d}.png")
    return folder


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_score(commands, bundle, pictures, tmp_path):
    out = tmp_path / "preds"
    asked = ("score", pictures, "--out", out, "-b", bundle.path, "--part", 2, "--workers", 1, "--threads", 1)
    sign, took = f"{out}/part-*", {}
    for begin in ("", "", sign):  # the first imports
        shutil.rmtree(out, ignore_errors=True)
        code, took[begin] = commands.run(*asked, sign=begin)
        assert code == 0, commands.log()
    found = Counter[str]()
    for share, is_first, is_last in moments(1, found):
        if is_first or len(list(out.glob("part-*"))) == FACES // 2:
            shutil.rmtree(out, ignore_errors=True)
        begin = "" if kills(found) % 2 else sign  # starting takes longer than scoring
        code, _ = commands.run(*asked, seconds=share * took[begin], sign=begin)
        parts = sorted(path.name for path in out.glob("part-*")) if out.exists() else []
        assert all(read_tally(Storage(str(out)), part).faces == 2 for part in parts)
        assert not parts or read_record(Storage(str(out))) is not None
        some = "no part" if not parts else "all parts" if len(parts) == FACES // 2 else "some parts"
        found[f"{'killed' if code == -9 else 'ended'}, {some}"] += 1
        if is_last:
            code, _ = commands.run(*asked)
            assert code == 0, commands.log()
            ids = [name for part in out.glob("part-*") for name in pq.read_table(part)["id"].to_pylist()]
            assert sorted(ids) == [f"{number:03d}.png" for number in range(FACES)]
            assert sorted({path.suffix for path in out.iterdir()}) == [".json", ".parquet"]
            assert [path.name for path in tmp_path.iterdir()] == ["preds"]
            # A Ray outlives its command by seconds, and a command that has nothing left to do starts none.
            assert len(list(commands.folder.glob(".ray.*"))) <= 2
    tell(f"score, every second one in the {took[sign]:.1f} s after the first part", took[""], found)


def kill_in(copy: Path, commands: Commands, asked: tuple[object, ...], state: Callable[[], str]) -> None:
    """Kill a command that writes into a bundle, often; `state` tells what is there, and fails if it is not whole.

    The codes are those of a verdict, whichever it is.
    """
    usual = 0.0
    for _ in range(2):  # the first imports
        code, usual = commands.run(*asked)
        assert code in (0, 1, 6), commands.log()
    found = Counter[str]()
    has_old = False
    for moment, is_first, is_last in moments(usual, found):
        has_old ^= is_first
        if is_first and not has_old:
            for made in ("engines", "reports", "cascades"):
                shutil.rmtree(copy / made, ignore_errors=True)
        before = state()
        code, _ = commands.run(*asked, seconds=moment)
        now = state()
        Bundle.open(copy)
        assert not (before and not now)
        found[f"{'killed' if code == -9 else 'ended'}, {'none' if not now else 'old' if now == before else 'new'}"] += 1
        if is_last:
            assert commands.run(*asked)[0] in (0, 1, 6), commands.log()
            assert state()
            assert [path.name for path in copy.parent.iterdir()] == ["x"]
            assert not list(copy.rglob("*.emoexport"))
    tell(str(asked[0]), usual, found)


@pytest.fixture
def copied(bundle, tmp_path) -> Path:
    bare = shutil.ignore_patterns("cascades", "engines", "reports")  # of other tests
    return Path(shutil.copytree(bundle.path, tmp_path / "build/x", ignore=bare))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_verify(commands, bundle, copied):
    def made() -> str:
        """When the report was made; its three files are of one making."""
        reports = copied / "reports"
        if not reports.exists():
            return ""
        created: str = json.loads((reports / "parity.json").read_text())["created"]
        assert SavedAnswers.read(reports / "answers.npz").facts.created == created
        assert (reports / "parity.md").read_text()
        certificate = read_certificate(copied, "onnxruntime-fp32")
        assert certificate is not None
        assert certificate.created >= created
        return created

    few = ("--engine", "onnxruntime", "--precision", "fp32", "--limit", 20, "--rounds", 1, "--batch", 4)
    kill_in(copied, commands, ("verify", copied, "--run", bundle.run(), *few), made)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_build_of_an_engine(commands, copied):
    pytest.importorskip("tensorrt_rtx")
    engine = copied / "engines" / "tensorrt-rtx-fp32.engine"

    def made() -> str:
        """When it was built; it is the one that its passport is of."""
        if not engine.exists():
            assert not passport_of(engine).exists()
            return ""
        passport = Passport.read(engine)
        assert read_engine(engine, passport)
        return passport.created

    kill_in(copied, commands, ("build", copied, "--engine", "tensorrt-rtx"), made)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_cascade(commands, bundle, copied):
    def made() -> str:
        """When it was made; all its files are there."""
        names = cascades_in(copied)
        return read_cascade(Bundle.open(copied), names[0]).created if names else ""

    few = ("--engine", "onnxruntime", "--precision", "fp32", "--max-disagreement", 10, "--rounds", 5)
    kill_in(copied, commands, ("cascade", copied, "--run", bundle.run(), *few), made)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_builds_at_once(run_dir, tmp_path):
    """Real ones, as two people would start them: one wins, the other is told."""
    words = [sys.executable, "-m", "emoexport", "build", str(run_dir), "-o", "x", "--view", "identity", "--member"]
    both = [
        subprocess.Popen([*words, member], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        for member in ("1", "2")
    ]
    said = [process.communicate()[1] for process in both]
    codes = [process.returncode for process in both]
    assert sorted(codes) == [0, 4], said
    winner = codes.index(0)
    assert "error: another emoexport command is writing x: process" in said[1 - winner]
    assert "next: wait until it has ended, or name another output" in said[1 - winner]
    assert [*Bundle.open(tmp_path / "x").manifest.choice.members] == [winner + 1]
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.fixture
def swapped(bundle, tmp_path) -> tuple[Path, Callable[[], object]]:
    """A bundle of which two kinds take turns."""
    kinds = [Path(shutil.copytree(bundle.path, tmp_path / f"kind-{number}")) for number in range(2)]
    for kind in kinds:
        (kind / "labels.txt").write_text(kind.name)
        entry = FileEntry(sha256=sha256_of(kind / "labels.txt"), bytes=len(kind.name))
        update = {"created": kind.name, "files": {**bundle.manifest.files, "labels.txt": entry}}
        (kind / "manifest.json").write_text(bundle.manifest.model_copy(update=update).sealed().to_json())

    def swap() -> None:
        kinds.reverse()
        with new_directory(tmp_path / "x", marker="manifest.json") as directory:
            shutil.copytree(kinds[0], directory, dirs_exist_ok=True)

    swap()
    return tmp_path / "x", swap


def test_a_bundle_that_is_replaced_while_it_is_opened_is_the_old_or_the_new_one(swapped, monkeypatch):
    path, swap = swapped
    honest, swaps = bundle_module.sha256_of, iter(range(1))

    def swapping(file: Path) -> str:
        if next(swaps, None) is not None:
            swap()
        return honest(file)

    for _ in range(3):
        before, swaps = Bundle.open(path).manifest.created, iter(range(1))
        monkeypatch.setattr(bundle_module, "sha256_of", swapping)
        assert Bundle.open(path).manifest.created != before
        monkeypatch.undo()
    chosen, swaps = runtime.choose, iter(range(1))

    def swapping_choice(*arguments):
        found = chosen(*arguments)  # of the old files
        if next(swaps, None) is not None:
            swap()
        return found

    before = Bundle.open(path).manifest.created
    monkeypatch.setattr(runtime, "choose", swapping_choice)
    with load(path, engine="onnxruntime", precision="fp32") as session:
        assert session.manifest.created != before
