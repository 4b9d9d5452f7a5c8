"""A bounded load against the runtime and the server, at once, for as long as is asked; and what grew meanwhile.

    python tests/fakes/soak.py build/x --minutes 60 --out soak.json

The runtime is a process of its own, in which threads share a session that is closed and opened anew now and then. The
server is the command, asked by clients that also send what it must refuse, and that hang up before they are answered.
"""

import argparse
import contextlib
import http.client
import io
import itertools
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
from PIL import Image

import emoexport
from emoexport.engines.machine import describe_processor, versions_of
from emoexport.serving_requests import NPY, packed

CLIENTS = 4
EVERY_S = 0.4
"""Between two calls of a client."""
SAMPLES = 120
WARM_S = 300
"""At the beginning, or half of the time if that is less, nothing is judged: caches and pools fill."""


class Sample(NamedTuple):
    """What a process holds."""

    at_s: float
    mib: float
    """Of memory that is its own: shared libraries are not counted."""
    handles: int
    threads: int


class Soak(NamedTuple):
    """What was seen of one process."""

    name: str
    samples: list[Sample]
    calls: list[tuple[float, float]]
    """When, and how long it took in milliseconds."""
    counts: dict[str, int]
    """By what came of it."""

    @property
    def warm(self) -> list[Sample]:
        """The samples that are judged."""
        end = self.samples[-1].at_s
        return [sample for sample in self.samples if sample.at_s >= min(WARM_S, end / 2)]

    @property
    def thirds_mib(self) -> list[tuple[float, float]]:
        """The median and the most memory in each third of the judged time.

        Allocators keep more or less of what was given back, which the most tells of; what leaks lifts the median.
        """
        thirds = np.array_split([sample.mib for sample in self.warm], 3)
        return [(float(np.median(part)), float(part.max())) for part in thirds]

    def p99_ms(self, part: int, of: int) -> float:
        """Of the calls in one of equal parts of the judged time."""
        begin, end = self.warm[0].at_s, self.calls[-1][0]
        low, high = (begin + (end - begin) * each / of for each in (part, part + 1))
        return float(np.percentile([ms for at, ms in self.calls if low <= at <= high], 99))


def sample_of(process: psutil.Process, began: float) -> Sample:
    with process.oneshot():
        return Sample(
            time.monotonic() - began, process.memory_full_info().uss / 2**20, process.num_fds(), process.num_threads()
        )


def drawn_faces(shape: tuple[int, int, int]) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (64, *shape), dtype=np.uint8)


# The runtime


def use_runtime(bundle: str, seconds: float, reopen: int) -> None:
    """In a process of its own: threads share a session; one JSON document at the end."""
    process, began = psutil.Process(), time.monotonic()
    engines = itertools.cycle(["onnxruntime", "openvino"])
    session = emoexport.load(bundle, engine=next(engines), precision="fp32", threads=1)
    faces = drawn_faces(session.face_shape)
    wanted = session.run(faces).label
    calls: list[tuple[float, float]] = []
    samples: list[Sample] = []

    def call_on(client: int) -> None:
        for number in itertools.count():
            if time.monotonic() - began > seconds:
                return
            start, count = (7 * client + number) % 40, number % 16 + 1
            before = time.perf_counter()
            found = using[0].run(faces[start : start + count]).label
            calls.append((time.monotonic() - began, 1000 * (time.perf_counter() - before)))
            assert np.array_equal(found, wanted[start : start + count])
            time.sleep(EVERY_S)

    using = [session]
    del session  # or the first is never let go
    with ThreadPoolExecutor(CLIENTS) as pool:
        done = [pool.submit(call_on, client) for client in range(CLIENTS)]
        for number in range(1, reopen + 1):
            for _ in range(SAMPLES // reopen):
                time.sleep(seconds / SAMPLES)
                samples.append(sample_of(process, began))
            if number < reopen:  # who still uses the one before finishes with it
                using[0] = emoexport.load(bundle, engine=next(engines), precision="fp32", threads=1)
    for each in done:
        each.result()
    print(json.dumps({"samples": samples, "calls": calls, "counts": {"ok": len(calls), "sessions": reopen}}))


def soak_runtime(bundle: Path, seconds: float, reopen: int) -> Soak:
    command = [sys.executable, __file__, str(bundle), "--runtime", str(seconds), "--reopen", str(reopen)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    told = json.loads(done.stdout)
    return Soak("runtime", [Sample(*one) for one in told["samples"]], told["calls"], told["counts"])


# The server


@contextlib.contextmanager
def serving(bundle: Path) -> Iterator[tuple[psutil.Process, str]]:
    options = ["--port", "0", "--no-detect", "--threads", "1", "--engine", "onnxruntime", "--precision", "fp32"]
    command = [sys.executable, "-m", "emoexport", "serve", str(bundle), *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        address = next(found[1] for line in process.stderr if (found := re.match(r"http://([\d.]+:\d+)/", line)))
        reader = threading.Thread(target=process.stderr.read, daemon=True)
        reader.start()
        yield psutil.Process(process.pid), address
        process.terminate()
        if process.wait(60) != 0:
            raise RuntimeError(f"the server ended with exit code {process.returncode}")
    finally:
        process.kill()
        process.wait()


class Requests:
    """What clients ask of a server, and what it must answer."""

    def __init__(self, bundle: Path) -> None:
        session = emoexport.load(bundle, engine="onnxruntime", precision="fp32", threads=1)
        self.faces = drawn_faces(session.face_shape)
        self.wanted = session.run(self.faces).label
        session.close()
        picture = io.BytesIO()
        Image.fromarray(self.faces[0, ..., 0] if self.faces.shape[-1] == 1 else self.faces[0]).save(picture, "PNG")
        self.picture = picture.getvalue()

    def ask(self, connection: http.client.HTTPConnection, client: int, number: int) -> str:
        """One request; what came of it."""
        if number % 16 == 13:
            return self._refused(connection, number // 16)
        if number % 64 == 37:  # gone before the answer is there
            connection.request("POST", "/v1/faces", packed(self.faces[:16]), {"Content-Type": NPY})
            connection.close()
            return "hung up"
        start, count = (7 * client + number) % 40, number % 16 + 1
        if number % 4 == 0:
            path = "/v1/explain" if number % 32 == 0 else "/v1/predict"
            connection.request("POST", path, self.picture, {"Content-Type": "image/png"})
        else:
            body = packed(self.faces[start : start + count])
            connection.request("POST", "/v1/faces", body, {"Content-Type": NPY, "Accept": NPY})
        answer = connection.getresponse()
        content = answer.read()
        assert answer.status == 200, (answer.status, content)
        if number % 4:
            found = np.load(io.BytesIO(content), allow_pickle=False)["label"]
            assert np.array_equal(found, self.wanted[start : start + count])
        return "ok"

    def _refused(self, connection: http.client.HTTPConnection, number: int) -> str:
        path, body, kind = [
            ("/v1/predict", b"no picture", "image/png"),
            ("/v1/faces", b"no array", NPY),
            ("/v1/faces", packed(self.faces[:, :3]), NPY),
            ("/v1/nothing", b"", "image/png"),
        ][number % 4]
        connection.request("POST", path, body, {"Content-Type": kind})
        answer = connection.getresponse()
        answer.read()
        assert 400 <= answer.status < 500, answer.status
        return "refused"


def soak_server(bundle: Path, seconds: float) -> Soak:
    requests = Requests(bundle)
    samples: list[Sample] = []
    calls: list[tuple[float, float]] = []
    counts: dict[str, int] = {"ok": 0, "refused": 0, "hung up": 0}
    lock = threading.Lock()
    with serving(bundle) as (process, address):
        began = time.monotonic()

        def ask_on(client: int) -> None:
            connection = http.client.HTTPConnection(address, timeout=60)
            for number in itertools.count():
                if time.monotonic() - began > seconds:
                    connection.close()
                    return
                before = time.perf_counter()
                came = requests.ask(connection, client, number)
                with lock:
                    counts[came] += 1
                    if came == "ok":
                        calls.append((time.monotonic() - began, 1000 * (time.perf_counter() - before)))
                if number % 100 == 99:
                    connection.close()  # and the next request opens another
                time.sleep(EVERY_S)

        with ThreadPoolExecutor(CLIENTS) as pool:
            done = [pool.submit(ask_on, client) for client in range(CLIENTS)]
            for _ in range(SAMPLES):
                time.sleep(seconds / SAMPLES)
                samples.append(sample_of(process, began))
            for each in done:
                each.result()
    return Soak("server", samples, calls, counts)


def soak(bundle: Path, minutes: float, *, reopen: int) -> list[Soak]:
    """Both at once."""
    works: list[Callable[[], Soak]] = [
        lambda: soak_runtime(bundle, 60 * minutes, reopen),
        lambda: soak_server(bundle, 60 * minutes),
    ]
    with ThreadPoolExecutor(len(works)) as pool:
        return list(pool.map(lambda work: work(), works))


def table(found: list[Soak]) -> str:
    lines = [
        "| process | calls | memory in each third, median (most), MiB | handles, least to most, at the end | threads | "
        "p99 of each quarter, ms |",
        "|---|---|---|---|---|---|",
    ]
    for one in found:
        handles, threads = ([getattr(sample, name) for sample in one.warm] for name in ("handles", "threads"))
        lines.append(
            f"| {one.name} | {', '.join(f'{count:,} {name}' for name, count in one.counts.items())} "
            f"| {', '.join(f'{median:.0f} ({most:.0f})' for median, most in one.thirds_mib)} "
            f"| {min(handles)} to {max(handles)}, {handles[-1]} | {min(threads)} to {max(threads)}, {threads[-1]} "
            f"| {', '.join(f'{one.p99_ms(part, 4):.1f}' for part in range(4))} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--reopen", type=int, default=60, help="sessions one after the other; divides 120")
    parser.add_argument("--out", type=Path, help="a JSON file for all samples and times")
    parser.add_argument("--runtime", type=float, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.runtime is not None:
        use_runtime(str(given.bundle), given.runtime, given.reopen)
        return
    found = soak(given.bundle, given.minutes, reopen=given.reopen)
    print(f"{given.minutes:g} minutes on {describe_processor()}, {len(os.sched_getaffinity(0))} core(s)")
    print(versions_of("emoexport", "onnxruntime-gpu", "openvino", "uvicorn", "starlette"))
    print(table(found))
    if given.out is not None:
        given.out.write_text(json.dumps([one._asdict() for one in found]))


if __name__ == "__main__":
    main()
