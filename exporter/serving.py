"""A session behind HTTP: a page for people, an API for programs, health and metrics for whoever keeps it running.

The event loop only waits. Pictures are decoded, and faces found, by a few threads; one thread calls the engine with
the faces of all requests (`batching`). Pictures are held in memory until their faces are cut out, and nowhere else.
"""

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from importlib.resources import files
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4
from pydantic import Field
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from emoexport import __version__
from emoexport.batching import Answer, Batcher, EngineFailed, Overloaded, ShuttingDown
from emoexport.config import Record
from emoexport.detection import DetectedFace, Detector
from emoexport.errors import BadBundle, BadInput, EmoexportError
from emoexport.images import open_picture
from emoexport.prediction import face_at
from emoexport.runtime import Session
from emoexport.serving_answers import about_face, about_session, about_votes, as_png_url, as_records
from emoexport.serving_guard import Guard, refusal
from emoexport.serving_metrics import Counted, Metrics
from emoexport.serving_requests import (
    NPY,
    PictureTooLarge,
    WrongMediaType,
    faces_in,
    packed,
    read_array,
    read_picture,
)

__all__ = ["ServeSettings", "Service", "TooSlow"]

_log = logging.getLogger(__name__)
_READERS = max(1, min(4, (os.cpu_count() or 1) // 2))
"""Threads that decode pictures and look for faces; a picture decoded takes up to 200 MB."""
_IN_HAND = 64
"""Pictures that are received, or wait to be decoded, at a time."""
_PAGE = {
    "/": ("web/serve.html", "text/html"),
    "/serve.js": ("web/serve.js", "text/javascript"),
    "/serve.css": ("web/serve.css", "text/css"),
    "/report.css": ("templates/report.css", "text/css"),
}


class TooSlow(EmoexportError):
    """A request was not answered in the time that it may take."""


_STATUS: dict[type[EmoexportError], int] = {
    PictureTooLarge: 413,
    WrongMediaType: 415,
    Overloaded: 429,
    EngineFailed: 500,
    ShuttingDown: 503,
    TooSlow: 503,
}
"""Of errors; all others that are told are 422."""


class ServeSettings(Record):
    """Limits of a server."""

    max_delay_ms: float = Field(default=2.0, ge=0)
    """What a call waits for more faces."""
    queue: int = Field(default=256, ge=1)
    """Faces that may wait."""
    max_faces: int = Field(default=64, ge=1)
    """In one request."""
    max_megabytes: float = Field(default=10.0, gt=0)
    """Of one request."""
    timeout_s: float = Field(default=30.0, gt=0)
    """From a request's beginning to its answer."""
    hosts: tuple[str, ...] = ()
    """Names, besides addresses and localhost, by which the server may be asked."""

    @property
    def max_bytes(self) -> int:
        """Of one request."""
        return int(self.max_megabytes * 1e6)


class _Seen(NamedTuple):
    """A picture, looked at."""

    size: tuple[int, int]
    places: Sequence[DetectedFace | None]
    faces: NDArray[np.uint8]
    """`(N, H, W, C)`, one for each place."""


class Service:
    """What the server does: `app` is it as ASGI.

    Args:
        session: decides; the service closes it with itself.
        settings: the limits.
        detector: finds faces where a request asks for that.
    """

    def __init__(self, session: Session, settings: ServeSettings, *, detector: Detector | None = None) -> None:
        self.session, self.settings, self.detector = session, settings, detector
        self.metrics = Metrics(session, lambda: self.batcher.waiting)
        self.batcher = Batcher(
            session.run,
            batch=session.batch,
            max_delay_s=settings.max_delay_ms / 1000,
            queue=settings.queue,
            watch=self.metrics.count_call,
        )
        self.is_closing = False
        self._is_warm = False
        self._in_hand = 0
        self._readers = ThreadPoolExecutor(_READERS, "emoexport-reader")
        self.app = self._application()

    def _application(self) -> Starlette:
        posts: dict[str, Callable[[Request], Awaitable[Response]]] = {
            "/v1/predict": self.predict,
            "/v1/faces": self.decide,
            "/v1/explain": self.explain,
        }
        gets: dict[str, Callable[[Request], Any]] = {
            "/v1/model": self.model,
            "/health/live": self.live,
            "/health/ready": self.ready,
            "/metrics": self.show_metrics,
            **dict.fromkeys(_PAGE, _page),
        }
        return Starlette(
            routes=[
                *(Route(path, self._within_limits(answer), methods=["POST"]) for path, answer in posts.items()),
                *(Route(path, answer, methods=["GET"]) for path, answer in gets.items()),
            ],
            middleware=[
                Middleware(Counted, metrics=self.metrics, routes={*posts, *gets}),
                Middleware(Guard, hosts=self.settings.hosts, is_closing=lambda: self.is_closing),
            ],
            exception_handlers={EmoexportError: _told, HTTPException: _told_by_starlette, Exception: _not_told},
            lifespan=self._life,
        )

    @asynccontextmanager
    async def _life(self, _: Starlette) -> AsyncIterator[None]:
        warming = asyncio.create_task(asyncio.to_thread(self._warm_up))
        try:
            yield
        finally:
            self.is_closing = True
            await warming
            await asyncio.to_thread(self.close)

    def _warm_up(self) -> None:
        """One call of the largest size; a cascade was called when it was opened, and counts what it is asked."""
        try:
            if self.session.left is None:
                self.session.run(np.zeros((self.session.batch, *self.session.face_shape), dtype=np.uint8))
        except Exception:  # what runtimes raise in a call shares no base but this
            _log.exception("the engine failed on %d faces; the server does not become ready", self.session.batch)
        else:
            self._is_warm = True

    def close(self) -> None:
        """Finish what was accepted, then let go of threads and engine."""
        self.is_closing = True
        self.batcher.close()
        self._readers.shutdown()
        self.session.close()

    async def predict(self, request: Request) -> Response:
        """`POST /v1/predict`: a picture in; where its faces are, and what was decided about each, out.

        `?detect=1` looks for faces, without it the picture is one; `?crop=1` gives back each face as it was decided
        about, a PNG.
        """
        begun, detect, crop = time.perf_counter(), _flag(request, "detect"), _flag(request, "crop")
        with self._one_more_in_hand():
            data = await read_picture(request, self.settings.max_bytes)
            seen = await self._read(self._look, data, detect)
            del data  # is not held while its faces wait
        answer = await self._decided(request, seen.faces) if len(seen.faces) else None
        faces = [
            about_face(self.session, answer.outcome, row, place)
            | ({"crop": as_png_url(seen.faces[row])} if crop else {})
            for row, place in enumerate(seen.places)
            if answer
        ]
        picture = dict(zip(("width", "height"), seen.size, strict=True))
        return JSONResponse({"faces": faces, "picture": picture, **self._about(answer, begun)})

    async def decide(self, request: Request) -> Response:
        """`POST /v1/faces`: faces uint8 `(N, H, W, C)` as numpy saves them in, what was decided about each out.

        As JSON; where `Accept` says so as a numpy array `(N,)` of records `label`, `confidence`, `probabilities`.
        """
        begun = time.perf_counter()
        with self._one_more_in_hand():
            faces = faces_in(await read_array(request, self.settings.max_bytes), self.session.face_shape)
        answer = await self._decided(request, faces)
        if NPY in request.headers.get("accept", ""):
            return Response(packed(as_records(answer.outcome)), media_type=NPY)
        found = [about_face(self.session, answer.outcome, row, None) for row in range(len(faces))]
        return JSONResponse({"faces": found, **self._about(answer, begun)})

    async def explain(self, request: Request) -> Response:
        """`POST /v1/explain`: a picture of one face in; what every pass says of it out.

        `scores` are `[K][V][L]`; null, and `why`, where the engine has none.
        """
        with self._one_more_in_hand():
            data = await read_picture(request, self.settings.max_bytes)
            seen = await self._read(self._look, data, False)
            try:
                scores = (await self._read(self.session.scores, seen.faces))[0]
            except BadBundle as err:
                raise EngineFailed(f"the engine failed in this call: {str(err).partition(chr(10))[0]}") from err
            except BadInput as err:
                return JSONResponse({"scores": None, "why": f"{err}"})
        return JSONResponse(about_votes(self.session, scores))

    async def model(self, _: Request) -> Response:
        """`GET /v1/model`: the engine, what is certified of it, and the limits."""
        return JSONResponse(
            {
                **about_session(self.session),
                "emoexport": __version__,
                "detects": self.detector is not None,
                "limits": self.settings.model_dump(mode="json", exclude={"hosts"}),
            }
        )

    async def live(self, _: Request) -> Response:
        """`GET /health/live`: whether the process is worth keeping."""
        return _health(None if self.batcher.is_alive or self.is_closing else "the thread that calls the engine ended.")

    async def ready(self, _: Request) -> Response:
        """`GET /health/ready`: whether it takes requests now."""
        if self.is_closing:
            return _health("the server is shutting down.")
        return _health(None if self._is_warm else "the engine is warming up.")

    def show_metrics(self, _: Request) -> Response:
        """`GET /metrics`; in a thread, as a cascade is asked between its calls."""
        return Response(self.metrics.text(), media_type=CONTENT_TYPE_PLAIN_0_0_4)

    def _within_limits(self, answer: Callable[[Request], Awaitable[Response]]) -> Callable[..., Awaitable[Response]]:
        """Answer if there is room, and in time."""

        async def limited(request: Request) -> Response:
            self.batcher.require_room()
            try:
                async with asyncio.timeout(self.settings.timeout_s):
                    return await answer(request)
            except TimeoutError as err:
                raise TooSlow(
                    f"this was not done within {self.settings.timeout_s:g} s.", hint="ask again later, or with less"
                ) from err
            except asyncio.CancelledError as err:  # a second signal ends all that is under way
                raise ShuttingDown("the server was ended.", hint="ask again, or another one") from err
            except ClientDisconnect:
                return Response(status_code=499)  # which nobody reads

        return limited

    @contextmanager
    def _one_more_in_hand(self) -> Iterator[None]:
        """Bound how many bodies are held: the queue bounds only faces."""
        if self._in_hand >= _IN_HAND:
            raise Overloaded(f"{_IN_HAND} pictures are being read already.", hint="ask again in 1 s")
        self._in_hand += 1
        try:
            yield
        finally:
            self._in_hand -= 1

    async def _read(self, work: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._readers, work, *arguments)

    async def _decided(self, request: Request, faces: NDArray[np.uint8]) -> Answer:
        """Wait for a call of the engine; who waits no more, or whose client has gone, takes no part in one."""
        if len(faces) > self.settings.max_faces:
            raise BadInput(
                f"found {len(faces):,} faces; the limit in one request is {self.settings.max_faces:,}.",
                hint="send them in several requests",
            )
        answer = asyncio.wrap_future(self.batcher.submit(faces))
        gone: asyncio.Future[Any] = asyncio.ensure_future(_until_gone(request))
        try:
            await asyncio.wait([answer, gone], return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                raise ClientDisconnect
            return answer.result()
        finally:
            answer.cancel()
            gone.cancel()

    def _look(self, data: bytes, detect: bool) -> _Seen:
        if detect and self.detector is None:
            raise BadInput("faces cannot be found here.", hint="emoexport serve --detect, or ask without detect=1")
        picture = open_picture(data)
        places = self.detector.find(picture) if detect and self.detector else [None]
        height, _, channels = self.session.face_shape
        cut = [face_at(picture, place, size=height, channels=channels) for place in places]
        return _Seen(picture.size, places, np.array(cut, dtype=np.uint8).reshape(-1, *self.session.face_shape))

    def _about(self, answer: Answer | None, begun: float) -> dict[str, Any]:
        total = time.perf_counter() - begun
        queue, engine = (answer.queue_s, answer.engine_s) if answer else (0.0, 0.0)
        seconds = {"total": total, "read": total - queue - engine, "queue": queue, "engine": engine}
        return {
            "engine": self.session.engine,
            "precision": self.session.precision,
            "is_certified": self.session.certificate is not None and self.session.certificate.verdict == "certified",
            "batch": answer.batch if answer else 0,
            "latency_ms": {name: round(1000 * value, 3) for name, value in seconds.items()},
        }


async def _until_gone(request: Request) -> None:
    """Wait until the client of a request, whose body was read, closes the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _flag(request: Request, name: str) -> bool:
    value = request.query_params.get(name, "0")
    if value not in {"0", "1"}:
        raise BadInput(f"found {name}={value}; needed is 0 or 1.", hint=f"{name}=1")
    return value == "1"


def _health(problem: str | None) -> Response:
    return refusal(503, problem, retry_after_s=1) if problem else JSONResponse({"status": "ok"})


def _page(request: Request) -> Response:  # in a thread, as it reads a file
    file, kind = _PAGE[request.url.path]
    return Response(files("emoexport").joinpath(file).read_bytes(), media_type=kind)


async def _told(_: Request, err: Exception) -> Response:
    """An error as `{"error", "next"}` with its status."""
    assert isinstance(err, EmoexportError)
    status = _STATUS.get(type(err), 422)
    wait = err.retry_after_s if isinstance(err, Overloaded) else 1 if status == 503 else None
    return refusal(status, str(err), err.hint or "GET /v1/model says what is taken", retry_after_s=wait)


async def _told_by_starlette(request: Request, err: Exception) -> Response:
    assert isinstance(err, HTTPException)
    if err.status_code == 405:
        takes = (err.headers or {}).get("Allow", "GET").partition(",")[0]
        found = refusal(405, f"{request.method} is not for {request.url.path}.", f"{takes} {request.url.path}")
        found.headers.update(err.headers or {})
        return found
    return refusal(err.status_code, f"there is nothing at {request.url.path}.", "GET / is the page")


async def _not_told(_: Request, __: Exception) -> Response:
    """What nobody foresaw: uvicorn writes it to the log."""
    return refusal(500, "the server failed at this request.", "its log says why")
