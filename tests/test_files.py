"""What is written whole or not at all: killed at every step, on a full disk, and by several at once."""

import errno
import multiprocessing
import os
import re
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from killing import killed_at_each_step

from emoexport import files, locks
from emoexport.cube import Cube, compute_cube
from emoexport.errors import Busy, DiskFull
from emoexport.files import changed_directory, new_directory, new_file, write_text, writing
from emoexport.temporaries import sweep_below, sweep_beside, temporary_directory, temporary_file

NAMES = ("a.txt", "below/b.txt", "m.txt")
fork = multiprocessing.get_context("fork") if hasattr(os, "fork") else None
pytestmark = pytest.mark.skipif(fork is None, reason="processes cannot be forked here")


@pytest.fixture
def tmp_path(tmp_path) -> Iterator[Path]:
    """In memory where that is possible: every step is awaited on a disk."""
    with tempfile.TemporaryDirectory(dir=next(filter(os.path.isdir, ["/dev/shm", tmp_path]))) as folder:
        yield Path(folder)


def make(target: Path, text: str) -> None:
    with new_directory(target, marker="m.txt") as directory:
        for name in NAMES:
            write_text(directory / name, text)


def read(target: Path) -> str | None:
    """What all files of a directory say; none if it is not there."""
    if not target.exists():
        return None
    found = {str(path.relative_to(target)): path.read_text() for path in target.rglob("*") if path.is_file()}
    assert set(found) == set(NAMES)
    (text,) = set(found.values())
    return text


@pytest.fixture(params=["exchange", pytest.param("two renames", marks=pytest.mark.slow)])
def replacing(request, monkeypatch) -> str:
    """How one directory takes the place of another."""
    if request.param == "two renames":
        monkeypatch.setattr(files, "_exchange", lambda *_: False)
    return request.param


def test_a_directory_killed_at_every_step_is_the_old_or_the_new_one(tmp_path, replacing):
    target, seen = tmp_path / "out", []
    make(target, "old")
    for _ in killed_at_each_step(lambda: make(target, "new")):
        if replacing == "exchange":
            seen.append(read(target))
        with writing(target):  # as the next command does
            seen.append(read(target))
            assert [path.name for path in tmp_path.iterdir() if path != target] == [".out.lock"]
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        make(target, "old")
    assert len(seen) > 15
    assert set(seen) == {"old", "new"}


def test_a_directory_that_is_new_is_there_whole_or_not(tmp_path):
    target, seen = tmp_path / "out", []
    for _ in killed_at_each_step(lambda: make(target, "new")):
        seen.append(read(target))
        make(target, "again")
        assert read(target) == "again"
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        shutil.rmtree(target)
    assert set(seen) == {None, "new"}


def test_a_file_killed_at_every_step_is_the_old_or_the_new_one(tmp_path):
    file, seen = tmp_path / "x.json", []
    write_text(file, "old")
    for _ in killed_at_each_step(lambda: write_text(file, "new" * 10_000)):
        seen.append(file.read_text())
        sweep_beside(file)
        assert [path.name for path in tmp_path.iterdir()] == ["x.json"]
        write_text(file, "old")
    assert set(seen) == {"old", "new" * 10_000}


def test_files_of_a_directory_change_together(tmp_path, replacing):
    target, seen = tmp_path / "out/reports", []

    def change(text: str) -> None:
        with writing(target.parent), changed_directory(target) as copy:
            for name in NAMES[1:]:
                write_text(copy / name, text)

    target.parent.mkdir()
    change("old")
    write_text(target / "other.txt", "stays")
    for _ in killed_at_each_step(lambda: change("new")):
        with writing(target.parent):
            sweep_below(target.parent)
            assert [path.name for path in target.parent.iterdir()] == ["reports"]
        assert (target / "other.txt").read_text() == "stays"
        seen.append((target / NAMES[1]).read_text())
        assert seen[-1] == (target / NAMES[2]).read_text()
        change("old")
    assert set(seen) == {"old", "new"}


@pytest.mark.slow
def test_a_cube_killed_at_every_step_is_the_old_or_the_new_one_and_goes_on(tmp_path, cube_request):
    faces, labels = np.zeros((4, 2, 2, 1), np.uint8), np.zeros(4, np.int64)
    out, seen = tmp_path / "cube", []

    def compute(split: str, *, force: bool = False) -> Cube:
        def score(batch):
            return np.full((len(batch), 1, 1, 7), 1 / 7, np.float32)

        asked = cube_request.model_copy(update={"split": split, "data_sha256": split})
        return compute_cube(score, faces, labels, out, asked, batch_size=2, force=force)

    compute("old")
    for _ in killed_at_each_step(lambda: compute("new", force=True)):
        seen.append(Cube.open(out).record.split)
        assert compute("new", force=True).record.split == "new"
        assert [path.name for path in tmp_path.iterdir()] == ["cube"]
        compute("old", force=True)
    assert set(seen) == {"old", "new"}


@pytest.fixture
def cube_request():
    from emoexport.cube import CubeRequest
    from emoexport.labels import EMOTIONS

    return CubeRequest(
        data="drawn",
        split="test",
        faces=4,
        data_sha256="",
        label_counts={},
        members=("m",),
        views=("identity",),
        labels=EMOTIONS,
        engine="torch",
        precision="fp32",
        bundle_digest="",
    )


def test_what_is_in_use_is_no_leftover(tmp_path):
    ready, gone = fork.Event(), tmp_path / "out"

    def hold() -> None:
        with temporary_directory(gone) as directory, temporary_file(directory / "x"), temporary_file(gone):
            ready.set()
            time.sleep(60)

    process = fork.Process(target=hold)
    process.start()
    assert ready.wait(10)
    (tmp_path / ".out.mine").mkdir()
    (tmp_path / ".out.other.a1b2c3d4.emoexport").mkdir()  # of `out.other`
    for _ in range(2):
        sweep_beside(gone)
        assert len(list(tmp_path.glob(".out.????????.emoexport"))) == 2
        sweep_below(tmp_path / next(tmp_path.glob(".out.????????.emoexport/")))
    assert len(list(tmp_path.rglob("*"))) == 5
    process.kill()
    process.join()
    sweep_beside(gone)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.mine", ".out.other.a1b2c3d4.emoexport"]
    sweep_below(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".out.mine"]


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_in_words(*_: object) -> None:
    raise RuntimeError(f"I/O error: {os.strerror(errno.ENOSPC)} (os error 28)")  # safetensors' words


@pytest.mark.parametrize("full", [full_disk, full_in_words])
def test_a_full_disk_is_told_with_the_path_and_leaves_the_old(tmp_path, monkeypatch, full):
    file, target = tmp_path / "x.json", tmp_path / "out"
    write_text(file, "old")
    make(target, "old")
    monkeypatch.setattr(files.os, "fsync", full)
    for path, write in ((file, lambda: write_text(file, "new")), (target, lambda: make(target, "new"))):
        with pytest.raises(DiskFull, match="MB are free there, and more is needed") as caught:
            write()
        assert str(caught.value).startswith(f"{path} could not be written, as its disk is full: ")
    assert (file.read_text(), read(target)) == ("old", "old")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "x.json"]


def test_another_disk_that_is_full_is_named(tmp_path):
    with pytest.raises(DiskFull, match=r"^/elsewhere/x could not be written"), writing(tmp_path / "out"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/elsewhere/x")


def test_other_errors_stay_as_they_are(tmp_path):
    with pytest.raises(OSError, match="Input/output") as caught, new_file(tmp_path / "x"):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    assert not isinstance(caught.value, DiskFull)


def test_of_processes_that_begin_at_once_one_writes_and_the_others_are_refused(tmp_path):
    target, count = tmp_path / "out", 6
    start, end, said = fork.Barrier(count), fork.Barrier(count), fork.SimpleQueue()

    def write(number: int) -> None:
        start.wait(20)
        try:
            with new_directory(target, marker="m.txt") as directory:
                for name in NAMES:
                    write_text(directory / name, str(number))
                end.wait(20)
            said.put((os.getpid(), number, ""))
        except Busy as err:
            said.put((os.getpid(), None, str(err)))
            end.wait(20)

    processes = [fork.Process(target=write, args=(number,)) for number in range(count)]
    for process in processes:
        process.start()
    found = [said.get() for _ in range(count)]
    for process in processes:
        process.join()
    ((winner, number, _),) = [one for one in found if not one[2]]
    assert read(target) == str(number)
    holder = rf"(: process {winner} on \S+, since \d{{4}}-\d\d-\d\d \d\d:\d\d)?"
    for _, _, sentence in found:
        assert not sentence or re.fullmatch(rf"another emoexport command is writing {target}{holder}\.", sentence)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_of_threads_that_begin_at_once_one_writes(tmp_path):
    target, count = tmp_path / "out", 4
    start, end, found = threading.Barrier(count), threading.Barrier(count), []

    def write(number: int) -> None:
        start.wait(20)
        try:
            with new_directory(target, marker="m.txt") as directory, writing(target):  # a thread may ask again
                for name in NAMES:
                    write_text(directory / name, str(number))
                end.wait(20)
            found.append(number)
        except Busy:
            end.wait(20)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [str(number) for number in found] == [read(target)]


def test_no_two_hold_a_lock_whose_file_comes_and_goes(tmp_path):
    """Each removes the file as it lets go, while others are about to open it."""
    target, inside, went = tmp_path / "out", tmp_path / "inside", tmp_path / "went"

    def ask() -> None:
        for _ in range(150):
            try:
                with locks.lock(target):
                    inside.mkdir()  # fails if another is in here
                    with went.open("a") as file:
                        file.write("x")
                    inside.rmdir()
            except Busy:
                continue

    processes = [fork.Process(target=ask) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert len(went.read_text()) > 300
    assert sorted(path.name for path in tmp_path.iterdir()) == ["went"]


def is_refused(target: Path) -> None:
    with pytest.raises(Busy):
        make(target, "refused")


def test_a_lock_ends_with_its_process_and_forked_ones_neither_keep_nor_break_it(tmp_path):
    target, ready, leave = tmp_path / "out", fork.Event(), fork.Event()

    def hold() -> None:
        with writing(target):
            ready.set()
            time.sleep(60)

    process = fork.Process(target=hold)
    process.start()
    assert ready.wait(10)
    with pytest.raises(Busy, match=rf"process {process.pid} on"):
        make(target, "x")
    assert not target.exists()
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert (tmp_path / ".out.lock").exists()
    make(target, "x")
    with writing(target):
        refused = fork.Process(target=is_refused, args=(target,))
        stays = fork.Process(target=leave.wait)
        for child in (refused, stays):
            child.start()
        refused.join()
        assert refused.exitcode == 0
        again = fork.Process(target=is_refused, args=(target,))  # the first did not unlock it by ending
        again.start()
        again.join()
        assert again.exitcode == 0
    make(target, "after")  # though a child that was forked meanwhile is alive
    leave.set()
    stays.join()
    assert read(target) == "after"


def test_locks_hinder_neither_removal_nor_read_only_folders(tmp_path, monkeypatch):
    target = tmp_path / "out"
    make(target, "old")
    with writing(target):
        shutil.rmtree(target)
        make(target, "new")
    assert read(target) == "new"
    monkeypatch.setattr(locks.os, "access", lambda *_: False)  # for root everything can be written
    with writing(target):
        assert (target / ".lock").exists()
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert read(target) == "new"
