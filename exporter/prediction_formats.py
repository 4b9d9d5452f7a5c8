"""Predictions written down: JSON lines, CSV, Parquet, a table for people, and pictures with boxes."""

import csv
import io
import json
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import IO, Any

from PIL import Image, ImageDraw, ImageFont
from rich.console import Console

from emoexport.errors import MissingRuntime, UsageError
from emoexport.files import new_file
from emoexport.pictures import BOXED
from emoexport.prediction import JudgedPicture
from emoexport.table_format import Row, terminal_table

__all__ = [
    "FORMATS",
    "PredictionWriter",
    "annotate",
    "columns_of",
    "format_of",
    "open_writer",
    "require_writable",
    "rows_of",
]

_DIGITS = 6
"""Of probabilities: FP32 has seven."""


def rows_of(judged: JudgedPicture) -> list[dict[str, Any]]:
    """A row for each face: where it is, what was decided, and the probability of each emotion; None where not known."""
    rows = []
    for number, face in enumerate(judged.faces):
        box = face.place.box if face.place else (None,) * 4
        rows.append(
            {
                "source": judged.picture.source,
                "frame": judged.picture.frame,
                "time_s": judged.picture.time_s,
                "face": number,
                **dict(zip(("left", "top", "right", "bottom"), box, strict=True)),
                "detection": round(face.place.score, _DIGITS) if face.place else None,
                "label": face.label,
                "confidence": round(face.confidence, _DIGITS),
                **{f"p_{name}": round(value, _DIGITS) for name, value in face.probabilities.items()},
            }
        )
    return rows


def columns_of(labels: Sequence[str]) -> dict[str, str]:
    """The columns of `rows_of` and the types that Arrow knows them by."""
    places = dict.fromkeys(("left", "top", "right", "bottom"), "int32")
    numbers = dict.fromkeys(("confidence", *(f"p_{name}" for name in labels)), "float32")
    return {
        "source": "string",
        "frame": "int64",
        "time_s": "float64",
        "face": "int32",
        **places,
        "detection": "float32",
        "label": "string",
        **numbers,
    }


class PredictionWriter(ABC):
    """Takes judged pictures one after the other."""

    def __init__(self, file: IO[bytes], labels: Sequence[str]) -> None:
        self._file = file
        self._labels = labels

    @abstractmethod
    def write(self, judged: JudgedPicture) -> None:
        """Write what was decided about a picture."""

    def close(self) -> None:  # noqa: B027 (most have nothing left)
        """Write what is left to be written; the file stays open."""


class _JsonLines(PredictionWriter):
    """A document for each picture, also where no face was found in it."""

    def write(self, judged: JudgedPicture) -> None:
        faces = [
            {
                **({"box": face.place.box, "detection": round(face.place.score, _DIGITS)} if face.place else {}),
                "label": face.label,
                "confidence": round(face.confidence, _DIGITS),
                "probabilities": {name: round(value, _DIGITS) for name, value in face.probabilities.items()},
            }
            for face in judged.faces
        ]
        picture = judged.picture
        moment = {} if picture.frame is None else {"frame": picture.frame, "time_s": picture.time_s}
        self._file.write(json.dumps({"source": picture.source, **moment, "faces": faces}).encode() + b"\n")
        self._file.flush()


class _Csv(PredictionWriter):
    """A line for each face."""

    def __init__(self, file: IO[bytes], labels: Sequence[str]) -> None:
        super().__init__(file, labels)
        self._put([*columns_of(labels)])

    def write(self, judged: JudgedPicture) -> None:
        for row in rows_of(judged):
            self._put(list(row.values()))
        self._file.flush()

    def _put(self, cells: list[Any]) -> None:
        line = io.StringIO()
        csv.writer(line, lineterminator="\n").writerow(cells)
        self._file.write(line.getvalue().encode())


class _Parquet(PredictionWriter):
    """A row for each face, in groups of rows as they fill."""

    _GROUP = 16_384

    def __init__(self, file: IO[bytes], labels: Sequence[str]) -> None:
        try:
            import pyarrow as pa  # noqa: PLC0415 (slow to load)
            import pyarrow.parquet as pq  # noqa: PLC0415
        except ImportError as err:  # as in a container for the runtime alone
            raise MissingRuntime("pyarrow is not installed here, which Parquet needs.", hint="--format csv") from err

        super().__init__(file, labels)
        self._schema = pa.schema([(name, pa.type_for_alias(kind)) for name, kind in columns_of(labels).items()])
        self._table = pa.Table
        self._target = pq.ParquetWriter(file, self._schema)
        self._rows: list[dict[str, Any]] = []

    def write(self, judged: JudgedPicture) -> None:
        self._rows += rows_of(judged)
        if len(self._rows) >= self._GROUP:
            self._put()

    def close(self) -> None:
        self._put()
        self._target.close()

    def _put(self) -> None:
        if self._rows:
            self._target.write_table(self._table.from_pylist(self._rows, schema=self._schema))
        self._rows = []


class _Table(PredictionWriter):
    """A row for each face, for people: shown when all is done, and cut where it gets long."""

    _SHOWN = 100
    _TEXTS = ("picture", "face at", "emotion", "next")

    def __init__(self, file: IO[bytes], labels: Sequence[str]) -> None:
        super().__init__(file, labels)
        self._rows: list[Row] = []
        self._total = 0

    def write(self, judged: JudgedPicture) -> None:
        self._total += len(judged.faces)
        self._rows += [self._row(row) for row in rows_of(judged)[: self._SHOWN - len(self._rows)]]

    def close(self) -> None:
        if not self._rows:
            return
        every = ("picture", "frame", "face at", "emotion", "confidence", "next")
        columns = [name for name in every if any(name in row for row in self._rows)]
        text = io.StringIO()
        Console(file=text, width=10_000, markup=False).print(terminal_table(columns, self._rows, texts=self._TEXTS))
        lines = [line.rstrip() for line in text.getvalue().splitlines()]
        if self._total > len(self._rows):
            lines.append(f"... and {self._total - len(self._rows):,} more; -o faces.csv has them all")
        self._file.write("\n".join([*lines, ""]).encode())

    def _row(self, row: dict[str, Any]) -> Row:
        others = [(row[f"p_{name}"], name) for name in self._labels if name != row["label"]]
        value, name = max(others, default=(0.0, "-"))
        return {
            "picture": row["source"] if row["source"].isprintable() else repr(row["source"]),
            **({} if row["frame"] is None else {"frame": str(row["frame"])}),
            **({} if row["left"] is None else {"face at": "{left}, {top} to {right}, {bottom}".format_map(row)}),
            "emotion": row["label"],
            "confidence": f"{100 * row['confidence']:.0f} %",
            "next": f"{name} {100 * value:.0f} %",
        }


FORMATS: Mapping[str, type[PredictionWriter]] = {"table": _Table, "jsonl": _JsonLines, "csv": _Csv, "parquet": _Parquet}


def format_of(name: str, out: Path | None) -> type[PredictionWriter]:
    """The format that is named, or that of the ending of a file, or a table.

    Raises:
        UsageError: if there is no such format, or it does not go there.
    """
    ending = out.suffix.removeprefix(".").lower() if out else ""
    if out and not ending and not name:
        raise UsageError(f"{out} has no ending that tells the format.", hint=f"-o {out}.csv, or --format csv")
    name = name.lower() or ending or "table"
    if name not in FORMATS:
        raise UsageError(f"found the format '{name}'; known are {', '.join(FORMATS)}.", hint="-o faces.csv")
    if name == "parquet" and out is None:
        raise UsageError("Parquet is no text, and standard output is for text.", hint="-o faces.parquet")
    if ending in FORMATS and ending != name:
        raise UsageError(f"found --format {name} and a file that ends in .{ending}.", hint=f"-o faces.{name}")
    return FORMATS[name]


def require_writable(out: Path | None, folder: Path | None, files: Sequence[Path]) -> None:
    """Before anything slow is done.

    Args:
        out: the file for the answers.
        folder: that for annotated pictures.
        files: what is read.

    Raises:
        UsageError: if they cannot be written, or one of the files that are read would be replaced.
    """
    if folder is not None and folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file; needed is a directory.", hint="name another --annotate")
    if out is not None:
        if str(out) == "-":
            raise UsageError("found -o -; answers go to standard output without it.", hint="--format csv, without -o")
        if out.is_dir():
            raise UsageError(f"{out} is a directory; needed is a file.", hint=f"-o {out / 'faces.csv'}")
        if out.exists() and any(file.exists() and file.samefile(out) for file in files):
            raise UsageError(f"{out} is one of the files that are read, so it is not replaced.", hint="name another -o")
        _require_room(out.absolute().parent)
    if folder is not None:
        _require_room(folder.absolute())


def _require_room(folder: Path) -> None:
    above = next(one for one in (folder, *folder.parents) if one.exists())
    if not os.access(above, os.W_OK):
        raise UsageError(f"nothing can be written to {above}.", hint="name another output")


@contextmanager
def open_writer(form: type[PredictionWriter], out: Path | None, labels: Sequence[str]) -> Iterator[PredictionWriter]:
    """A writer to a file, which is written whole or not at all, or to standard output, a device or a pipe.

    Raises:
        UsageError: if there is no standard output.
    """
    target: AbstractContextManager[IO[bytes]]
    if out is None:
        if sys.stdout is None:
            raise UsageError("standard output is closed.", hint="-o faces.csv")
        target = nullcontext(sys.stdout.buffer)
    elif out.exists() and not out.is_file():
        target = out.open("wb")
    else:
        out.parent.mkdir(parents=True, exist_ok=True)
        target = new_file(out)
    with target as file:
        writer = form(file, labels)
        yield writer
        writer.close()


def annotate(judged: JudgedPicture, folder: Path, root: Path | None) -> Path:
    """Write a picture with its faces boxed and named, as PNG.

    Args:
        judged: the picture, and what was decided about it.
        folder: where it is written, as `<name>.predicted.png`, frames as `<name>.<frame>.predicted.png`.
        root: the folder that all files lie in, absolute: names are relative to it, so that two of one name stay two.
            None for a camera.
    """
    source = judged.picture.source
    name = Path(source) if root is None else Path(os.path.abspath(source)).relative_to(root)  # noqa: PTH100 (links stay)
    frame = "" if judged.picture.frame is None else f".{judged.picture.frame:06d}"
    target = folder / name.with_name(f"{name.name}{frame}{BOXED}")
    target.parent.mkdir(parents=True, exist_ok=True)
    with new_file(target) as file:
        _drawn(judged).save(file, "PNG")
    return target


def _drawn(judged: JudgedPicture) -> Image.Image:
    picture = judged.picture.image.convert("RGB")
    grown = max(1, min(-(-240 // min(picture.size)), 2000 // max(picture.size)))  # 48 pixels have no room for a name
    picture = picture.resize((picture.width * grown, picture.height * grown), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(picture)
    line = max(2, min(picture.size) // 200)
    for face in judged.faces:
        box = [side * grown for side in face.place.box] if face.place else [0, 0, picture.width - 1, picture.height - 1]
        font = ImageFont.load_default(max(12, min(picture.height // 20, (box[2] - box[0]) // 6)))
        draw.rectangle(box, outline="#ffd400", width=line)
        text = f"{face.label} {100 * face.confidence:.0f} %"
        _, _, right, bottom = draw.textbbox((0, 0), text, font=font)
        height = bottom + 2 * line
        above = box[1] - height if box[1] >= height else box[1]
        draw.rectangle((box[0], above, box[0] + right + 2 * line, above + height), fill="#ffd400")
        draw.text((box[0] + line, above + line), text, fill="black", font=font)
    return picture
