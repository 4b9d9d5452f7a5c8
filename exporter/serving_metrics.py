"""What a server counts, in the format of Prometheus: never a picture, a name or an address."""

import time
from collections.abc import Callable, Collection, Iterator, Sequence

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from emoexport.batching import Call
from emoexport.runtime import Session

__all__ = ["Counted", "Metrics"]

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)


class Metrics:
    """Counters, gauges and histograms of one server.

    Args:
        session: what decides.
        waiting: tells how many faces wait.
    """

    def __init__(self, session: Session, waiting: Callable[[], int]) -> None:
        registry = self._registry = CollectorRegistry()
        self._labels = session.labels
        self._requests = Counter(
            "emoexport_requests", "Requests answered, by route and status.", ["route", "code"], registry=registry
        )
        self._seconds = Histogram(
            "emoexport_request_seconds",
            "From a request's first byte to its answer.",
            ["route"],
            buckets=_SECONDS,
            registry=registry,
        )
        self._queue = Histogram(
            "emoexport_queue_seconds", "What a request waits for its call.", buckets=_SECONDS, registry=registry
        )
        self._engine = Histogram(
            "emoexport_engine_seconds", "A call of the engine.", buckets=_SECONDS, registry=registry
        )
        sizes = [2**power for power in range(11)]
        self._batch = Histogram("emoexport_batch_faces", "Faces in a call.", buckets=sizes, registry=registry)
        self._failed = Counter("emoexport_failed_calls", "Calls in which the engine failed.", registry=registry)
        self._faces = Counter("emoexport_faces", "Faces decided, by label.", ["label"], registry=registry)
        for label in session.labels:
            self._faces.labels(label)
        Gauge("emoexport_queue_faces", "Faces that wait.", registry=registry).set_function(waiting)
        verdict = session.certificate.verdict if session.certificate else "none that holds here"
        Gauge(
            "emoexport_engine_info", "The engine in use.", ["engine", "certificate", "bundle"], registry=registry
        ).labels(session.engine, verdict, session.manifest.digest).set(1)
        if session.left is not None:
            registry.register(_Exits(session))
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)

    def count_call(self, call: Call) -> None:
        """A call of the engine."""
        self._batch.observe(call.faces)
        self._engine.observe(call.engine_s)
        for seconds in call.queue_s:
            self._queue.observe(seconds)
        if not len(call.label):
            self._failed.inc()
        for label in call.label:
            self._faces.labels(self._labels[label]).inc()

    def count_request(self, route: str, code: int, seconds: float) -> None:
        """An answer to a request."""
        self._requests.labels(route, str(code)).inc()
        self._seconds.labels(route).observe(seconds)

    def text(self) -> bytes:
        """All of it."""
        return generate_latest(self._registry)


class Counted:
    """Counts what is answered.

    Args:
        app: what answers.
        metrics: what counts.
        routes: paths that are counted by name; others are `other`.
    """

    def __init__(self, app: ASGIApp, *, metrics: Metrics, routes: Collection[str]) -> None:
        self._app, self._metrics, self._routes = app, metrics, routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and count its answer."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun, code = time.perf_counter(), 500

        async def send_and_note(message: Message) -> None:
            nonlocal code
            code = message.get("status", code)
            await send(message)

        try:
            await self._app(scope, receive, send_and_note)
        finally:
            route = scope["path"] if scope["path"] in self._routes else "other"
            self._metrics.count_request(route, code, time.perf_counter() - begun)


class _Exits(Collector):
    """Where faces leave a cascade, and whether they leave where those that certified it did."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def collect(self) -> Iterator[Metric]:
        left: Sequence[int] = self._session.left or ()
        stages = CounterMetricFamily("emoexport_cascade_left_faces", "Faces that left at a stage.", labels=["stage"])
        shares = GaugeMetricFamily("emoexport_cascade_left_share", "Their part of all faces.", labels=["stage"])
        for number, count in enumerate(left, 1):
            stages.add_metric([str(number)], count)
            shares.add_metric([str(number)], count / max(1, sum(left)))
        yield stages
        yield shares
        drift = self._session.drift()
        if drift is not None:
            yield GaugeMetricFamily(
                "emoexport_cascade_drift_p_value",
                "That faces in use leave as those that certified the cascade did.",
                value=drift.p_value,
            )
