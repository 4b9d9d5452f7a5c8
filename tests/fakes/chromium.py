"""A headless Chromium, spoken to through two pipes: the DevTools protocol without a port, a driver or a package."""

import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-sync", "--disable-dev-shm-usage"),
    *("--disable-background-networking", "--disable-component-update", "--no-first-run", "--remote-debugging-pipe"),
)


def find_chromium() -> str | None:
    """The browser, if there is one."""
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Chromium:
    """One browser with one page."""

    def __init__(self, program: str, profile: Path, *flags: str) -> None:
        self.events: list[dict[str, Any]] = []
        self._rest, self._number, self._session = b"", 0, {}
        (commands, self._to), (self._back, answers) = os.pipe(), os.pipe()
        # It reads its commands at 3 and writes its answers at 4.
        self._process = subprocess.Popen(
            [
                *("bash", "-c", f'exec "$@" 3<&{commands} 4>&{answers}', "bash"),
                *(program, *FLAGS, *flags, f"--user-data-dir={profile}"),
            ],
            pass_fds=(commands, answers),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(commands)
        os.close(answers)
        page = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=page, flatten=True)
        self._session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> Any:
        """Do something; what happens meanwhile is put to the events."""
        self._number += 1
        said = {"id": self._number, "method": method, "params": parameters, **self._session}
        os.write(self._to, json.dumps(said).encode() + b"\0")
        while (found := self._message()).get("id") != self._number:
            self.events.append(found)
        assert "error" not in found, found
        return found["result"]

    def open(self, page: Path | str, *, width: int) -> None:
        """Load a file or an address anew in a window so wide, in pixels."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=width < 500
        )
        self.events.clear()
        self.call("Page.navigate", url=page if isinstance(page, str) else page.resolve().as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self._message())

    def show(self, *, dark: bool, media: str = "screen") -> None:
        """Show what is loaded to people who like it dark or light, on a medium."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", media=media, features=[scheme])

    def requests(self) -> list[str]:
        """What was asked for since the last page was opened."""
        events = (event for event in self.events if event["method"] == "Network.requestWillBeSent")
        return [event["params"]["request"]["url"] for event in events]

    def complaints(self) -> list[str]:
        """What the console says since then."""
        return [event["params"]["entry"]["text"] for event in self.events if event["method"] == "Log.entryAdded"]

    def value(self, expression: str) -> Any:
        """What JavaScript says of the page."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait_for(self, expression: str, *, seconds: float = 20) -> Any:
        """What JavaScript says, as soon as that is true."""
        end = time.monotonic() + seconds
        while not (found := self.value(expression)):
            assert time.monotonic() < end, f"this did not become true: {expression}"
            time.sleep(0.02)
        return found

    def close(self) -> None:
        """End it."""
        try:
            self.call("Browser.close")
            self._process.wait(10)
        finally:
            self._process.kill()
            self._process.wait()
            os.close(self._to)
            os.close(self._back)

    def _message(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._back], [], [], 30)
            more = os.read(self._back, 1 << 20) if ready else b""
            if not more:
                raise TimeoutError("Chromium says nothing any more")
            self._rest += more
        found, _, self._rest = self._rest.partition(b"\0")
        return json.loads(found)
