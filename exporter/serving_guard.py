"""What a server on a person's machine refuses: other sites, other hosts' names, and all that comes while it closes."""

import ipaddress
from collections.abc import Callable, Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["Guard", "refusal"]

_SAFE = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' blob: data:; "
        "media-src blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(self), microphone=(), geolocation=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
"""Headers of every answer. None of them lets another site read it: there is no CORS."""


def refusal(status: int, sentence: str, hint: str = "", *, retry_after_s: int | None = None) -> JSONResponse:
    """What a client is told that gets nothing: `{"error", "next"}`."""
    headers = {} if retry_after_s is None else {"Retry-After": str(retry_after_s)}
    return JSONResponse({"error": sentence, "next": hint}, status, headers)


class Guard:
    """Refuses before anything is read, and puts the headers of safety on every answer.

    The name in `Host` must be an address, `localhost` or one that was allowed: a foreign page whose name is made to
    point here (DNS rebinding) is not served. What changes or computes something must not come from another site's
    page (CSRF), by `Sec-Fetch-Site` or, in old browsers, `Origin`.

    Args:
        app: what is guarded.
        hosts: further names, or `*` for any.
        is_closing: whether only what was accepted before is served.
    """

    def __init__(self, app: ASGIApp, *, hosts: Collection[str], is_closing: Callable[[], bool]) -> None:
        self._app, self._is_closing = app, is_closing
        self._hosts = {"localhost", *(host.lower() for host in hosts)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_safely(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(_SAFE)
                if self._is_closing():
                    headers["Connection"] = "close"
            await send(message)

        app: ASGIApp = self._refused(scope["method"], Headers(scope=scope)) or self._app
        await app(scope, receive, send_safely)

    def _refused(self, method: str, headers: Headers) -> JSONResponse | None:
        host = headers.get("host", "")
        if not ("*" in self._hosts or _name_of(host) in self._hosts or _is_address(_name_of(host))):
            return refusal(421, f"this server is not known as '{host}'.", "emoexport serve --allow-host NAME")
        if method in {"GET", "HEAD"}:
            return None
        if _is_foreign(headers, host):
            return refusal(403, "pages of other sites are not served.", "ask from a program, or from the page at /")
        if self._is_closing():
            return refusal(503, "the server is shutting down.", "ask again, or ask another one", retry_after_s=1)
        return None


def _name_of(host: str) -> str:
    try:
        return (urlsplit(f"//{host}").hostname or "").rstrip(".")
    except ValueError:
        return ""


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _is_foreign(headers: Headers, host: str) -> bool:
    """Whether a browser says that a page of another site asks."""
    if "sec-fetch-site" in headers:
        return headers["sec-fetch-site"] not in {"same-origin", "none"}
    return "origin" in headers and urlsplit(headers["origin"]).netloc.lower() != host.lower()
