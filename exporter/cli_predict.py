"""`emoexport predict`."""

import os
import signal
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from emoexport.cli_options import (
    BundleOption,
    Cache,
    CascadeName,
    OneEngine,
    OnePrecision,
    Threads,
    console_of,
    newest_bundle,
)
from emoexport.errors import UsageError

if TYPE_CHECKING:
    from emoexport.detection import Detector
    from emoexport.pictures import Unreadable
    from emoexport.prediction import JudgedPicture
    from emoexport.runtime import Session

__all__ = ["predict"]

_NAMED = 20
"""Files that are named of those that cannot be read."""


def predict(
    paths: Annotated[
        list[str] | None, typer.Argument(help="Pictures, videos, folders of them, and patterns in quotes.")
    ] = None,
    bundle: BundleOption = None,
    camera: Annotated[
        int | None, typer.Option(min=0, help="A camera instead of files, until Ctrl-C; 0 is the first.")
    ] = None,
    detect: Annotated[
        bool, typer.Option("--detect", help="Find the faces in the pictures; without it each picture is a face.")
    ] = False,
    every: Annotated[int, typer.Option(min=1, help="Of videos and cameras each n-th frame.")] = 1,
    form: Annotated[
        str, typer.Option("--format", help="table, jsonl, csv or parquet; as --output ends if none, or a table.")
    ] = "",
    out: Annotated[
        Path | None, typer.Option("-o", "--output", "--out", help="A file to write; standard output if none.")
    ] = None,
    annotated: Annotated[
        Path | None, typer.Option("--annotate", help="A folder for the pictures with their faces boxed and named.")
    ] = None,
    engine: OneEngine = None,
    precision: OnePrecision = None,
    cascade: CascadeName = None,
    threads: Threads = None,
    cache: Cache = None,
) -> None:
    """Tell the emotion of faces: pictures, videos or a camera in; a table, JSON lines, CSV or Parquet out.

    Files that cannot be read are named and passed over; the exit code is 4 then.

    Example: [bold]emoexport predict photos/ --detect -o emotions.csv --annotate boxed/[/bold]
    """
    if not paths and camera is None:
        raise UsageError("nothing is named to look at.", hint="emoexport predict photos/, or --camera 0")
    if paths and camera is not None:
        raise UsageError("found paths and a camera; needed is one of them.", hint="leave out --camera")
    from emoexport.detection import Detector  # noqa: PLC0415
    from emoexport.pictures import find_files, require_readers  # noqa: PLC0415
    from emoexport.prediction_formats import annotate, format_of, open_writer, require_writable  # noqa: PLC0415
    from emoexport.runtime import load  # noqa: PLC0415

    files = find_files(paths or ())
    require_readers(files)
    require_writable(out, annotated, files)
    writer_type = format_of(form, out)
    detector = Detector() if detect else None
    where = bundle or newest_bundle()
    batch = None if camera is None or detect else 1
    console = console_of(stderr=True)
    tally = _Tally(console)
    root = Path(os.path.commonpath([os.path.abspath(file.parent) for file in files])) if files else None  # noqa: PTH100
    chosen: dict[str, Any] = {"engine": engine, "precision": precision, "batch": batch, "cascade": cascade}
    with (
        load(where, **chosen, threads=threads, cache=cache) as session,
        open_writer(writer_type, out, session.labels) as writer,
    ):
        tally.say(f"{where}, {session.why}")
        for note in session.notes:
            tally.say(note, "yellow")
        for judged in tally.count(_judged(session, files, camera, every, detector, console)):
            writer.write(judged)
            if annotated is not None:
                annotate(judged, annotated, root)
        drift = session.drift()
    tally.tell(detect=detect)
    if drift is not None and drift.drifted:
        tally.say(drift.sentence, "yellow")
    if out is not None:
        tally.say(f"written: {out}")
    raise typer.Exit(4 if tally.unreadable else 0)


def _judged(
    session: "Session", files: list[Path], camera: int | None, every: int, detector: "Detector | None", console: Console
) -> "Iterator[JudgedPicture | Unreadable]":
    """What is decided, file by file behind a bar, or frame by frame of a camera until Ctrl-C."""
    from emoexport.pictures import pictures_in, pictures_of_camera  # noqa: PLC0415
    from emoexport.prediction import predict as judge  # noqa: PLC0415
    from emoexport.progress import progress_bar  # noqa: PLC0415

    if camera is None:
        with progress_bar(console, "looking at files", len(files)) as done:
            yield from judge(session, pictures_in(files, every=every, done=done), detector=detector)
        return
    enough = threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: enough.set())  # what is begun is written whole
    try:
        yield from judge(
            session, pictures_of_camera(camera, every=every, stop=enough.is_set), detector=detector, live=True
        )
    finally:
        signal.signal(signal.SIGINT, before)


class _Tally:
    """What went in and came out, for the last lines."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._pictures = self._without_face = self._oblong = 0
        self._labels: Counter[str] = Counter()
        self.unreadable: list[Unreadable] = []

    def count(self, found: "Iterable[JudgedPicture | Unreadable]") -> "Iterator[JudgedPicture]":
        """Count all that comes, and hand on what was judged."""
        from emoexport.pictures import Unreadable  # noqa: PLC0415

        for one in found:
            if isinstance(one, Unreadable):
                self.unreadable.append(one)
                continue
            self._pictures += 1
            self._labels.update(face.label for face in one.faces)
            self._without_face += not one.faces
            self._oblong += max(one.picture.image.size) > 1.3 * min(one.picture.image.size)
            yield one

    def tell(self, *, detect: bool) -> None:
        """The last lines."""
        for one in self.unreadable[:_NAMED]:
            self.say(f"{one.source}: {one.reason}", "red")
        if self.unreadable:
            self.say(f"{_many(len(self.unreadable), 'file')} could not be read, or not to the end.", "red")
        counts = ", ".join(f"{count:,} {name}" for name, count in self._labels.most_common())
        faces = f"{_many(self._labels.total(), 'face')} in {_many(self._pictures, 'picture')}"
        self.say(f"{faces}: {counts}" if counts else f"{faces}.")
        if self._without_face:
            self.say(f"No face was found in {_many(self._without_face, 'picture')}.")
        if self._oblong and not detect:
            self.say(
                f"Far from square, and taken as a face: {_many(self._oblong, 'picture')}. --detect finds faces.",
                "yellow",
            )

    def say(self, text: str, style: str = "") -> None:
        """A line on standard error."""
        self._console.print(text, style=style)


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count != 1)}"
