"""Spoils a bundle in one way after the other, and tells what came of each, a line of JSON a number.

    python bundle_worker.py FOLDER < numbers

`FOLDER/bundle` is left as it is. It runs in a process of its own: what is spoiled may end it.
"""

import ctypes
import io
import json
import os
import random
import resource
import shutil
import struct
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from bundle_mutations import Damage, spoil

import emoexport
from emoexport import cli
from emoexport.bundle import Bundle
from emoexport.calib.record import Calibration
from emoexport.cascade_record import cascades_in
from emoexport.errors import EmoexportError
from emoexport.outcome import Outcome
from emoexport.train.synthetic import synthetic_faces

SECRETS = {"secret.json": b'{"secret": 42}', "weights.bin": bytes(2**17)}
"""By name, files outside of the bundle."""
MEMORY = 3 * 2**30
"""Bytes that the process may take more than at its start, as by `ulimit -v`: a graph is a program, and may ask for
any number of them."""


def answers(bundle: Path, faces: np.ndarray, **asked: str) -> Outcome | str:
    """What a bundle decides, or the sentence that it is refused with."""
    try:
        with emoexport.load(bundle, threads=1, **asked) as session:
            found = session.run(faces)
            assert session.labels[found.label[0]]
            return found
    except EmoexportError as err:
        return sentence(str(err))


def inspected(*words: object) -> tuple[int, str]:
    """The exit code of a command and what it prints, or the sentence that it ends with."""
    out, err = io.StringIO(), io.StringIO()
    with mock.patch.object(sys, "argv", ["emoexport", *map(str, words)]), redirect_stdout(out), redirect_stderr(err):
        try:
            cli.main()
        except SystemExit as ended:
            code = int(ended.code or 0)
    if code:
        told = err.getvalue()
        assert code == 4, f"exit code {code}: {told}"
        assert told.startswith("error: "), told
        return code, sentence(told.splitlines()[0])
    return code, out.getvalue()


def without_time(told: str) -> str:
    """What is told of a bundle, but when its manifest was written."""
    return "\n".join(line for line in told.splitlines() if '"created"' not in line)


def sentence(text: str) -> str:
    """The same text, if it can be shown."""
    assert text.strip()
    bad = [one for one in text if not one.isprintable() and one != "\n"]
    assert not bad, f"unprintable {bad[:3]}: {text!r}"
    return text


def require_well_formed(found: Outcome, faces: int) -> None:
    probabilities, label, confidence = found
    assert probabilities.shape == (faces, 7), probabilities.shape
    assert label.shape == confidence.shape == (faces,), label.shape
    assert ((label >= 0) & (label < 7)).all(), label
    assert np.isfinite(confidence).all()
    assert (probabilities >= 0).all()
    assert np.allclose(probabilities.sum(axis=1), 1, atol=0.05)


def same(found: Outcome | str, wanted: Outcome) -> bool:
    return isinstance(found, str) or all(np.array_equal(a, b) for a, b in zip(found, wanted, strict=True))


def pack(bundle: Path, rng: random.Random) -> None:
    """Pack it at times: nothing of what lies outside may get into a package."""
    out = bundle.parent / "out"
    for kind in ("--triton", "--docker"):
        if rng.random() < 0.15:
            code, _ = inspected("package", bundle, kind, out, "--engine", "onnxruntime", "--precision", "fp32")
            taken = [path for path in out.rglob("*") if path.is_file() and path.read_bytes() in SECRETS.values()]
            assert not taken, f"packed from outside: {taken}"
            assert not code or not out.exists(), "half a package"
            shutil.rmtree(out, ignore_errors=True)


def judge(bundle: Path, damage: Damage, faces: np.ndarray, whole: dict[str, Any], rng: random.Random) -> str:
    """Look at a spoiled bundle from all sides; `refused`, `as before` or `other answers`."""
    ends: dict[str, Outcome | str] = {}
    if damage.sealed and damage.file.startswith("model"):  # each other engine would be tried in turn, which takes long
        asked = {
            "engine": rng.choice(["onnxruntime", "onnxruntime", "openvino"]),
            "precision": damage.file.split(".")[1],
        }
        ends["named"] = answers(bundle, faces, **asked)
    if not ends or rng.random() < 0.1:
        ends[""] = answers(bundle, faces)
    if damage.file.startswith("cascades") or damage.file == "manifest.json":
        ends["cascade"] = answers(bundle, faces, cascade=whole["name"])
    code, told = inspected("inspect", bundle, "--json")
    told = without_time(told)
    if rng.random() < 0.3:
        inspected("inspect", bundle)
    asks_for_page = {"reports": 1.0, "engines": 0.25, "cascades": 0.1}.get(damage.file.partition("/")[0], 0.0)
    if rng.random() < asks_for_page:  # which takes seconds
        inspected("report", bundle)
    pack(bundle, rng)
    if damage.file in ("calibration.json", "manifest.json"):
        try:
            Calibration.parse_json(bundle / "calibration.json", inside=bundle)
        except EmoexportError as err:
            sentence(str(err))
    if not damage.sealed:
        for name, found in ends.items():
            assert same(found, whole[name]), f"{name} other answers than before"
        is_of_bundle = damage.file in whole["files"]
        assert code or not is_of_bundle or told == whole["told"], "inspect tells something else"
    for found in ends.values():
        if not isinstance(found, str):
            require_well_formed(found, len(faces))
    if all(isinstance(found, str) for found in ends.values()):
        return "refused"
    return "as before" if all(same(found, whole.get(name, found)) for name, found in ends.items()) else "other answers"


class Watch:
    """What is opened in a folder and below, whoever opens it."""

    def __init__(self, folder: Path) -> None:
        libc = ctypes.CDLL(None)
        self._handle = libc.inotify_init1(os.O_NONBLOCK)
        for one in [folder, *(path for path in folder.rglob("*") if path.is_dir() and not path.is_symlink())]:
            libc.inotify_add_watch(self._handle, os.fsencode(one), 0x20 | 0x1 | 0x2)  # open, access, modify

    def close(self) -> None:
        os.close(self._handle)

    def seen(self) -> list[str]:
        try:
            data, found = os.read(self._handle, 2**16), []
        except BlockingIOError:
            return []
        while data:
            _, mask, _, size = struct.unpack_from("iIII", data)
            if not mask & 0x40000000:  # folders may be listed
                found.append(data[16 : 16 + size].rstrip(b"\0").decode(errors="replace"))
            data = data[16 + size :]
        return sorted(set(found))


def listing(folder: Path) -> dict[str, Any]:
    found = {}
    for path in sorted(folder.rglob("*")):
        told = path.lstat()
        found[str(path.relative_to(folder))] = told.st_size, told.st_mtime_ns if path.is_file() else 0
    return found


@contextmanager
def fresh(folder: Path) -> Iterator[Path]:
    """A copy to spoil, and a folder beside it that nothing may read."""
    place = folder / "spoiled"
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(folder / "bundle", place / "bundle")
    (place / "outside").mkdir()
    for name, content in SECRETS.items():
        (place / "outside" / name).write_bytes(content)
    yield place
    shutil.rmtree(place, ignore_errors=True)


def main() -> None:
    tells = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # runtimes print there too
    folder = Path(sys.argv[1])
    os.chdir(folder)
    faces, _ = synthetic_faces(3, size=32, seed=5)
    with fresh(folder) as place:
        bundle = place / "bundle"
        whole: dict[str, Any] = {
            "": answers(bundle, faces),
            "told": without_time(inspected("inspect", bundle, "--json")[1]),
        }
        whole["name"] = cascades_in(bundle)[0]
        whole["cascade"] = answers(bundle, faces, cascade=whole["name"])
        whole["files"] = {*Bundle.open(bundle).manifest.files, "manifest.json"}
        inspected("report", bundle)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    print(json.dumps({"ready": True}), file=tells)
    for line in sys.stdin:
        told: dict[str, Any] = {"number": int(line)}
        with fresh(folder) as place:
            try:
                damage = spoil(place / "bundle", int(line))
                told |= damage._asdict()
                print(json.dumps(told), file=tells)
                before, started = listing(place), time.monotonic()
                watch = Watch(place / "outside")
                try:
                    told["end"] = judge(place / "bundle", damage, faces, whole, random.Random(int(line)))
                    seen = watch.seen()
                finally:
                    watch.close()
                    told["seconds"] = round(time.monotonic() - started, 2)
                after = listing(place)
                for name in ("bundle/reports/report.html", "bundle/reports"):  # what `report` is for
                    before.pop(name, None)
                    after.pop(name, None)
                assert after == before, f"written: {set(after.items()) ^ set(before.items())}"
                assert not seen, f"read from outside: {seen}"
            except BaseException as err:
                told["end"] = "wrong"
                told["why"] = f"{type(err).__name__}: {err}"[:600]
                told["trace"] = traceback.format_exc()[-1500:]
        print(json.dumps(told), file=tells)


if __name__ == "__main__":
    main()
