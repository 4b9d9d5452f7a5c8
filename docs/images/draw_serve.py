"""Draw serve.png: the page of `emoexport serve`, with two drawn faces that are found, decided and voted on.

make demo && .venv/bin/python docs/images/draw_serve.py build/demo
"""

import base64
import io
import sys
import tempfile
import threading
from pathlib import Path

import uvicorn
from PIL import Image

import emoexport
from emoexport.detection import Detector
from emoexport.serving import ServeSettings, Service
from emoexport.serving_process import listen
from emoexport.train.synthetic import synthetic_faces

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "fakes"))
from chromium import Chromium, find_chromium

WIDTH = 1100
DROP = """(() => {
  const bytes = Uint8Array.from(atob("%s"), one => one.charCodeAt(0))
  const carried = new DataTransfer()
  carried.items.add(new File([bytes], "faces.png", { type: "image/png" }))
  dispatchEvent(new DragEvent("drop", { dataTransfer: carried, cancelable: true }))
})()"""


def main(bundle: Path, seed: int) -> None:
    """Open the page of a bundle, drop a picture on it, and keep what is seen."""
    program = find_chromium()
    if program is None:
        sys.exit("there is no Chromium here: apt-get install chromium")
    service = Service(emoexport.load(bundle), ServeSettings(), detector=Detector())
    server = uvicorn.Server(uvicorn.Config(service.app, log_level="error", ws="none"))
    with listen("127.0.0.1", 0) as opened, tempfile.TemporaryDirectory() as profile:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [opened]})
        thread.start()
        browser = Chromium(program, Path(profile))
        try:
            Path(__file__).with_name("serve.png").write_bytes(
                seen(browser, f"http://127.0.0.1:{opened.getsockname()[1]}/", picture(seed))
            )
        finally:
            browser.close()
            server.should_exit = True
            thread.join()


def picture(seed: int) -> bytes:
    """Two drawn faces beside each other, a PNG."""
    faces = synthetic_faces(2, size=200, seed=seed, difficulty=0.5)[0].reshape(2, 200, 200)
    wall = Image.new("RGB", (640, 400), (96, 112, 128))
    for number, face in enumerate(faces):
        wall.paste(Image.fromarray(face).convert("RGB"), (80 + 280 * number, 100))
    file = io.BytesIO()
    wall.save(file, "PNG")
    return file.getvalue()


def seen(browser: Chromium, address: str, dropped: bytes) -> bytes:
    """The page, down to the votes, when all of it stands there."""
    browser.show(dark=False)
    browser.open(address, width=WIDTH)
    browser.wait_for("document.querySelectorAll('#bars li').length > 0")
    browser.value(DROP % base64.b64encode(dropped).decode())
    browser.wait_for("!document.getElementById('votes').hidden")
    bottom = browser.value("document.getElementById('votes').getBoundingClientRect().bottom + scrollY")
    area = {"x": 0, "y": 0, "width": WIDTH, "height": bottom, "scale": 1}
    browser.call("Runtime.evaluate", expression="new Promise(done => setTimeout(done, 500))", awaitPromise=True)
    shot = browser.call("Page.captureScreenshot", format="png", clip=area, captureBeyondViewport=True)
    return base64.b64decode(shot["data"])


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 5)
