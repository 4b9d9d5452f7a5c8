"""The process that serves: a socket, uvicorn, and an end that loses nothing which was accepted."""

import logging
import math
import socket
import time
from collections.abc import Callable
from errno import EADDRNOTAVAIL
from types import FrameType

import uvicorn

from emoexport.errors import UsageError, reason_of
from emoexport.serving import Service

__all__ = ["listen", "serve_until_told"]


def listen(host: str, port: int) -> socket.socket:
    """Open the port; from now on connections wait to be taken.

    Args:
        host: an address, or a name of this machine.
        port: 0 for any that is free.

    Raises:
        UsageError: if that cannot be opened.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family)
    except (OSError, OverflowError) as err:
        is_elsewhere = isinstance(err, socket.gaierror) or getattr(err, "errno", 0) == EADDRNOTAVAIL
        hint = "--host names an address of this machine" if is_elsewhere else "--port 0 takes a free one"
        raise UsageError(f"{host}:{port} cannot be opened: {reason_of(err)}.", hint=hint) from err


def serve_until_told(
    service: Service, opened: socket.socket, *, drain_s: float, note: Callable[[str], object] = lambda _: None
) -> bool:
    """Serve until SIGTERM or Ctrl-C, then finish what was accepted; a second one ends at once.

    After the first, new requests get 503 for `drain_s` seconds, in which a load balancer sees that `/health/ready`
    does. Then the port is closed, and what is under way is finished.

    Args:
        service: what serves; it is closed at the end.
        opened: the port.
        drain_s: see above.
        note: told what happens.

    Returns:
        Whether all that was accepted was finished.
    """
    config = uvicorn.Config(
        service.app,
        log_level="warning",
        access_log=False,
        ws="none",
        server_header=False,
        timeout_graceful_shutdown=math.ceil(service.settings.timeout_s) + 5,
    )
    server = _Server(config, service, drain_s, note)
    server.run(sockets=[opened])
    return not server.force_exit


class _Server(uvicorn.Server):
    """Uvicorn, with a while between the signal and the closing of the port."""

    def __init__(self, config: uvicorn.Config, service: Service, drain_s: float, note: Callable[[str], object]) -> None:
        super().__init__(config)
        self._service, self._drain_s, self._note = service, drain_s, note
        self._closes_at = math.inf

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 (uvicorn's names)
        """At a signal."""
        if self._service.is_closing:
            self.should_exit = self.force_exit = True
            logging.getLogger("uvicorn.error").disabled = True  # it would tell of each request that is cut
            return
        self._service.is_closing = True
        self._closes_at = time.monotonic() + self._drain_s
        self._note("finishing what was accepted; once more ends at once.")

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: whether the port is to be closed."""
        return await super().on_tick(counter) or time.monotonic() >= self._closes_at
