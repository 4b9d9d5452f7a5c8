"""Processes that are killed: at every step that they take in the file system, or at a moment in time."""

import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_STEPS = {"os.chmod", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate"}
"""Audit events of Python (PEP 578) that change what is on a disk, each told before it is done."""


def _is_step(event: str, arguments: Any) -> bool:
    return event in _STEPS or (event == "open" and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)))


def killed_at_each_step(work: Callable[[], object], *, most: int = 2000) -> Iterator[int]:
    """Do some work in forks, of which the first is killed before its first step, the next before its second and so on.

    The last one comes to its end.
    """
    for step in range(1, most):
        child = os.fork()
        if child == 0:
            left = step

            def count(event: str, arguments: Any) -> None:
                nonlocal left
                is_step = _is_step(event, arguments)
                left -= is_step
                if is_step and not left:
                    os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(count)
            try:
                work()
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        assert status in {0, signal.SIGKILL}, "the work failed by itself"
        yield step
        if status == 0:
            return
    raise AssertionError(f"it does not end within {most} steps")


_READY = """
import contextlib, glob, importlib, json, os, signal, subprocess, sys, time
import lightning, onnx, onnxruntime, ray.data, torch
from emoexport import cascading, certification, cli, cluster, mass_scoring, pipeline, planning
from emoexport.train import ensemble

torch.set_num_threads(1)
for line in sys.stdin:
    words, seconds, sign = json.loads(line)
    begun = time.monotonic()
    known = set(glob.glob(sign))
    child = os.fork()
    if child == 0:
        log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.argv = ["emoexport", *words]
        code = 0
        try:
            cli.main()
        except SystemExit as err:
            code = int(err.code or 0)
        sys.stdout.flush()
        sys.stderr.flush()
        with open("modules.txt", "w") as file:
            file.write("\\n".join(sys.modules))
        os._exit(code)
    status = None
    while status is None:
        pid, found = os.waitpid(child, os.WNOHANG)
        if pid:
            status = os.waitstatus_to_exitcode(found)
        elif sign and known >= set(glob.glob(sign)):
            begun = time.monotonic()
        elif time.monotonic() - begun > seconds:
            os.kill(child, signal.SIGKILL)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        else:
            time.sleep(0.001)
    took = time.monotonic() - begun
    if status == 0:
        for name in open("modules.txt").read().split("\\n"):  # what it imported while it was at work
            with contextlib.suppress(BaseException):
                if not name.startswith("polygraphy"):  # which settles at its import for one kind of TensorRT
                    importlib.import_module(name)
    print(json.dumps([status, took]), flush=True)
"""


class Commands:
    """The command line in processes of their own, forked where all is imported: what is killed is at work."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        variables = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)}
        self._process = subprocess.Popen(
            [sys.executable, "-c", _READY],
            cwd=folder,
            env=variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, *words: object, seconds: float = 600, sign: str = "") -> tuple[int, float]:
        """Run a command and kill it after a time: its exit code, -9 if it was killed, and the seconds it ran.

        The seconds are counted from its start, or from when the first new file matches a pattern.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps([[*map(str, words)], seconds, sign]), file=self._process.stdin, flush=True)
        code, took = json.loads(self._process.stdout.readline())
        return code, took

    def log(self) -> str:
        """What the last command printed."""
        return (self.folder / "log.txt").read_text()

    def close(self) -> None:
        """End."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
