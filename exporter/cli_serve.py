"""`emoexport serve`."""

import ipaddress
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated

import typer

from emoexport.cli_options import (
    BundleDir,
    Cache,
    CascadeName,
    OneEngine,
    OnePrecision,
    Threads,
    console_of,
    newest_bundle,
)
from emoexport.errors import MissingRuntime

if TYPE_CHECKING:
    from emoexport.detection import Detector

__all__ = ["serve"]

_NEEDED = ("starlette", "uvicorn", "prometheus_client", "python_multipart")


def serve(
    bundle: BundleDir = None,
    host: Annotated[
        str, typer.Option(help="The address to be reached at; 0.0.0.0 is the whole network.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any that is free.")] = 8000,
    allowed: Annotated[
        list[str] | None,
        typer.Option("--allow-host", help="A name that clients may ask for, besides addresses; repeatable, * for any."),
    ] = None,
    detect: Annotated[
        bool | None,
        typer.Option("--detect/--no-detect", help="Whether faces can be found; by itself where that is installed."),
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Faces in a call; what the engine is certified for, up to 64, if none.")
    ] = None,
    max_delay_ms: Annotated[float, typer.Option(min=0, help="What a call waits for faces of more requests.")] = 2.0,
    queue: Annotated[int, typer.Option(min=1, help="Faces that may wait; past it clients get 429.")] = 256,
    max_faces: Annotated[int, typer.Option(min=1, help="Faces in one request.")] = 64,
    max_megabytes: Annotated[float, typer.Option(min=0.01, help="Of one request; past it clients get 413.")] = 10.0,
    timeout_s: Annotated[float, typer.Option(min=0.1, help="Seconds that a request may take.")] = 30.0,
    drain_s: Annotated[
        float, typer.Option(min=0, help="Seconds in which new requests get 503 before the port is closed at the end.")
    ] = 1.0,
    engine: OneEngine = None,
    precision: OnePrecision = None,
    cascade: CascadeName = None,
    threads: Threads = None,
    cache: Cache = None,
) -> None:
    """Serve a bundle over HTTP: a page for people, an API with dynamic batching, health and metrics.

    No picture is stored or logged. SIGTERM or Ctrl-C finish what was accepted first.

    Example: [bold]emoexport serve build/mine --port 8000[/bold]
    """
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise MissingRuntime(f"{missing[0]} is not installed here.", hint="pip install 'emoexport[serve]'")
    from emoexport.runtime import load  # noqa: PLC0415
    from emoexport.serving import ServeSettings, Service  # noqa: PLC0415
    from emoexport.serving_process import listen, serve_until_told  # noqa: PLC0415

    console = console_of(stderr=True)
    settings = ServeSettings(
        max_delay_ms=max_delay_ms,
        queue=queue,
        max_faces=max_faces,
        max_megabytes=max_megabytes,
        timeout_s=timeout_s,
        hosts=tuple(allowed or ()),
    )
    where = bundle or newest_bundle()
    detector, told = _detector(detect)
    with listen(host, port) as opened:
        session = load(
            where, engine=engine, precision=precision, batch=batch, cascade=cascade, threads=threads, cache=cache
        )
        service = Service(session, settings, detector=detector)
        console.print(f"{where}, {session.why}")
        for note in (*session.notes, *told, *_openness(host)):
            console.print(note, style="yellow")
        console.print(f"{_address(host, opened.getsockname()[1])}  (Ctrl-C ends it)")
        finished = serve_until_told(service, opened, drain_s=drain_s, note=console.print)
    console.print("all that was accepted is answered." if finished else "ended at once; what was under way is lost.")
    raise typer.Exit(0 if finished else 130)


def _detector(wanted: bool | None) -> "tuple[Detector | None, list[str]]":
    """What finds faces, and a sentence where it is not there and nobody said that it need not be."""
    from emoexport.detection import Detector  # noqa: PLC0415

    if wanted is False:
        return None, []
    try:
        return Detector(), []
    except MissingRuntime as err:
        if wanted:
            raise
        return None, [f"Each picture is taken as one face: {err} Next: {err.hint}"]


def _openness(host: str) -> list[str]:
    """What is to be known where others than this machine can ask."""
    return [] if _is_loopback(host) else ["Whoever reaches this machine can ask it: there is no password and no TLS."]


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _address(host: str, port: int) -> str:
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"
