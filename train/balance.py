"""A balanced set of training faces on disk: equally many of every emotion, made once, reused, resumed after a stop.

An emotion with too many faces keeps some, drawn by the seed; one with too few keeps all and gets augmented copies,
spread evenly over them. The directory holds a Parquet file for each emotion, and `balance.json`: what the set was
made of and every file's SHA-256. A file that is not listed there does not count.

Train on it by `balance` in `[training]`, which sets the validation faces aside first. Named as `--data` the directory
loads too, but a validation share taken out of it would hold changed copies of the faces trained on.
"""

import hashlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field, model_validator
from rich.console import Console

from emoexport.config import Record
from emoexport.errors import BadData, UsageError
from emoexport.files import new_file, sha256_of, write_text, writing
from emoexport.images import decode_face
from emoexport.labels import EMOTIONS, LABEL_ORDERS, to_label
from emoexport.progress import progress_bar
from emoexport.train.audit import face_hashes
from emoexport.train.augment import LIMITS, TABLE, FaceAugmentation
from emoexport.train.dataset import Faces, is_synthetic

__all__ = ["RECORD_FILE", "BalanceRecord", "EmotionRecord", "balanced_directory", "make_balanced", "read_balanced"]

RECORD_FILE = "balance.json"

STRENGTH = 0.5
"""Of the augmentation of copies: half the usual, since training augments them again."""

_CHUNK = 128  # faces in memory as floating point at a time

_SCHEMA = pa.schema(
    {
        "png": pa.binary(),
        "label": pa.string(),
        "split": pa.string(),
        "made": pa.string(),
        "source_row": pa.int64(),
        "source_blake2b": pa.string(),
        "ferplus_votes": pa.list_(pa.float32()),
    }
)

# Which emotion each column of a FER+ vote table counts; None for contempt and the like.
_VOTE_COLUMNS = tuple(to_label(column, order="ferplus") for column in range(len(LABEL_ORDERS["ferplus"])))


class EmotionRecord(Record):
    """The file of one emotion."""

    file: str
    sha256: str
    had: int
    """Training faces there were."""
    copied: int
    """Faces in the file as they are."""
    augmented: int
    """Changed copies in the file."""
    dropped: int
    dropped_rows: tuple[int, ...]
    """Rows of the training faces that the file leaves out."""


class BalanceRecord(Record):
    """What a balanced set is made of, and what is there of it."""

    schema_version: Literal[1] = 1
    faces_sha256: str
    """Of the training faces it was made from."""
    votes_sha256: str | None
    """Of their votes, if they have any."""
    per_emotion: int = Field(ge=1)
    seed: int
    image_size: int
    channels: int
    augmentation_sha256: str
    """Of the strength and the tables that the copies were changed by."""
    emotions: dict[str, EmotionRecord] = Field(default_factory=dict)
    """The finished ones."""

    @model_validator(mode="after")
    def _adds_up(self) -> Self:
        for name, part in self.emotions.items():
            if name not in EMOTIONS or part.file != _file_name(name):
                raise ValueError(f"'{part.file}' is no file of '{name}'")
            if part.copied + part.augmented != self.per_emotion:
                raise ValueError(f"'{name}' has {part.copied + part.augmented} faces, not {self.per_emotion}")
        return self

    def key(self) -> str:
        """SHA-256 of all inputs."""
        return hashlib.sha256(self._inputs().model_dump_json().encode()).hexdigest()

    def differences(self, other: "BalanceRecord") -> list[str]:
        """The inputs that differ, in words."""
        ours, theirs = self._inputs().model_dump(), other._inputs().model_dump()
        return [f"{name} is {ours[name]}, not {theirs[name]}" for name in ours if ours[name] != theirs[name]]

    def _inputs(self) -> "BalanceRecord":
        return self.model_copy(update={"emotions": {}})


class _Plan(NamedTuple):
    """Rows of the training faces."""

    kept: NDArray[np.int64]
    sources: NDArray[np.int64]
    """One entry for each augmented copy."""
    dropped: NDArray[np.int64]


def balanced_directory(source: str, faces: Faces, per_emotion: int, *, seed: int) -> Path:
    """Where the set of these inputs is by default: `balanced/<data>-<8 digits of their hash>`.

    Args:
        source: where the data came from, as `load_data` took it.
        faces: the training faces.
        per_emotion: faces of every emotion.
        seed: as for `make_balanced`.
    """
    name = "synthetic" if is_synthetic(source) else Path(source).stem or "data"
    return Path("balanced") / f"{name}-{_inputs_of(faces, per_emotion, seed).key()[:8]}"


def make_balanced(faces: Faces, per_emotion: int, directory: Path, *, seed: int, console: Console) -> BalanceRecord:
    """Make the balanced set, or what is missing of it; a sound one of the same inputs is reused.

    Every emotion depends on the inputs alone, not on what was made before it. One process at a time does this.

    Args:
        faces: the training faces, square, without those to validate on.
        per_emotion: faces of every emotion, 1 or more.
        directory: where the set is or shall be.
        seed: of what is dropped and how copies are changed.
        console: where progress is shown.

    Raises:
        BadData: if an emotion has no face, or `directory` holds the set of other inputs or a spoilt record.
        UsageError: if `directory` is a file or holds other files.
        Busy: if another process is making it.
    """
    counts = np.bincount(faces.labels, minlength=len(EMOTIONS))
    if not counts.all():
        raise BadData(f"there is no face of '{EMOTIONS[int(counts.argmin())]}' to make {per_emotion:,} of.")
    with writing(directory):
        record = _sound_part(directory, _inputs_of(faces, per_emotion, seed), console)
        there = len(record.emotions)
        if there == len(EMOTIONS):
            _say(console, f"balanced set reused: {directory}")
            return record
        if there:
            _say(
                console, f"the balanced set at {directory} is continued: {there} of {len(EMOTIONS)} emotions are there"
            )
        write_text(directory / RECORD_FILE, record.to_json())  # from here on the directory says whose it is
        with progress_bar(console, "balancing", per_emotion * (len(EMOTIONS) - there)) as advance:
            for label, emotion in enumerate(EMOTIONS):
                if emotion not in record.emotions:
                    made = record.emotions | {
                        emotion: _make_emotion(directory, faces, label, per_emotion, seed, advance)
                    }
                    ordered = {name: made[name] for name in EMOTIONS if name in made}
                    record = record.model_copy(update={"emotions": ordered})
                    write_text(directory / RECORD_FILE, record.to_json())
        return record


def read_balanced(directory: Path) -> tuple[Faces, BalanceRecord]:
    """Read a finished set, emotion by emotion: of each first the faces as they are, then the changed ones.

    Raises:
        BadData: if there is none, it is unfinished, or a file is not the one that was written.
    """
    record = _read_record(directory)
    if len(record.emotions) < len(EMOTIONS):
        raise BadData(
            f"the balanced set at {directory} is unfinished: {len(record.emotions)} of {len(EMOTIONS)} emotions "
            "are there.",
            hint=f"{_command(directory, record.per_emotion)} goes on where it stopped",
        )
    total = record.per_emotion * len(EMOTIONS)
    # Filled in place: faces of 224 x 224 in colour would not be held twice.
    images = np.empty((total, record.image_size, record.image_size, record.channels), dtype=np.uint8)
    votes = np.full((total, len(EMOTIONS)), np.nan, dtype=np.float32)
    for label, emotion in enumerate(EMOTIONS):
        path = directory / record.emotions[emotion].file
        if not _is_sound(path, record.emotions[emotion]):
            raise BadData(
                f"{path} is missing or was changed after it was written.",
                hint=f"{_command(directory, record.per_emotion)} makes it anew",
            )
        rows = slice(label * record.per_emotion, (label + 1) * record.per_emotion)
        _read_emotion(path, images[rows], votes[rows])
    faces = Faces(
        images=images,
        labels=np.repeat(np.arange(len(EMOTIONS), dtype=np.int64), record.per_emotion),
        flagged=np.zeros(total, dtype=bool),
        votes=None if record.votes_sha256 is None else votes,
    )
    return faces, record


def _inputs_of(faces: Faces, per_emotion: int, seed: int) -> BalanceRecord:
    votes = None if faces.votes is None else hashlib.sha256(faces.votes.astype("<f4").tobytes()).hexdigest()
    return BalanceRecord(
        faces_sha256=faces.sha256(),
        votes_sha256=votes,
        per_emotion=per_emotion,
        seed=seed,
        image_size=faces.images.shape[1],
        channels=faces.images.shape[3],
        augmentation_sha256=hashlib.sha256(repr((STRENGTH, LIMITS, TABLE)).encode()).hexdigest(),
    )


def _sound_part(directory: Path, wanted: BalanceRecord, console: Console) -> BalanceRecord:
    """What `directory` holds of the set; what a stopped run left half-written is removed."""
    leftovers = _leftovers(directory, wanted)
    if not (directory / RECORD_FILE).exists():
        record = wanted
    else:
        record = _read_record(directory)
        if differences := record.differences(wanted):
            raise BadData(
                f"{directory} holds the balanced set of other inputs: {'; '.join(differences)}.",
                hint=f"{_command(Path('another directory'), wanted.per_emotion)}, or remove {directory}",
            )
    for path in leftovers:
        path.unlink(missing_ok=True)
    sound = {name: part for name, part in record.emotions.items() if _is_sound(directory / part.file, part)}
    for name, part in record.emotions.items():
        if name not in sound:
            _say(console, f"{directory / part.file} is missing or was changed; it is made anew")
    return record.model_copy(update={"emotions": sound})


def _leftovers(directory: Path, wanted: BalanceRecord) -> list[Path]:
    """Temporary files of ours in `directory`, which may hold nothing but them and the set."""
    if directory.exists() and not directory.is_dir():
        raise UsageError(f"{directory} is a file; needed is a directory.", hint="name another output")
    present = sorted(directory.iterdir()) if directory.exists() else []
    ours = (RECORD_FILE, *map(_file_name, EMOTIONS))
    leftovers = [path for path in present if any(path.name.startswith(f".{name}.") for name in ours)]
    known = ours if (directory / RECORD_FILE).exists() else ()
    foreign = [path.name for path in present if path not in leftovers and path.name not in known]
    if foreign:
        raise UsageError(
            f"{directory} holds other files ({foreign[0]}), so no balanced set is made there.",
            hint=_command(Path("a new directory"), wanted.per_emotion),
        )
    return leftovers


def _read_record(directory: Path) -> BalanceRecord:
    path = directory / RECORD_FILE
    if not path.is_file():
        raise BadData(f"there is no balanced set at {directory} (no {RECORD_FILE}).", hint=_command(directory))
    try:
        return BalanceRecord.parse_json(path, error=BadData)
    except BadData as err:
        raise BadData(str(err), hint=f"remove {directory}, then {_command(directory)}") from err


def _is_sound(path: Path, part: EmotionRecord) -> bool:
    return path.is_file() and sha256_of(path) == part.sha256


def _make_emotion(
    directory: Path, faces: Faces, label: int, per_emotion: int, seed: int, advance: Callable[[int], None]
) -> EmotionRecord:
    rows = np.flatnonzero(faces.labels == label)
    plan = _plan(rows, per_emotion, np.random.default_rng([seed, label]))
    path = directory / _file_name(EMOTIONS[label])
    change = FaceAugmentation(STRENGTH, emotion_specific=True)
    with (
        new_file(path) as file,
        pq.ParquetWriter(file, _SCHEMA, use_dictionary=["label", "split", "made"]) as writer,
        torch.random.fork_rng(devices=[]),
    ):
        # Not torch.manual_seed, which would reseed the generators of devices too.
        torch.default_generator.manual_seed(int(np.random.SeedSequence([seed, label]).generate_state(1)[0]))
        for made, chosen in (("copied", plan.kept), ("augmented", plan.sources)):
            for start in range(0, len(chosen), _CHUNK):
                part = chosen[start : start + _CHUNK]
                sources = faces.take(part)
                images = sources.images if made == "copied" else _changed(sources, change)
                writer.write_table(_table(sources, images, part, made))
                advance(len(part))
    return EmotionRecord(
        file=path.name,
        sha256=sha256_of(path),
        had=len(rows),
        copied=len(plan.kept),
        augmented=len(plan.sources),
        dropped=len(plan.dropped),
        dropped_rows=tuple(plan.dropped.tolist()),
    )


def _plan(rows: NDArray[np.int64], per_emotion: int, rng: np.random.Generator) -> _Plan:
    order = rng.permutation(rows)
    kept = np.sort(order[:per_emotion])
    rounds, rest = divmod(per_emotion - len(kept), len(kept))
    sources = np.concatenate([np.tile(kept, rounds), np.sort(order[:rest])])
    return _Plan(kept, sources, np.sort(order[per_emotion:]))


def _changed(faces: Faces, change: FaceAugmentation) -> NDArray[np.uint8]:
    pictures = torch.from_numpy(faces.images).permute(0, 3, 1, 2).float() / 255
    changed = change(pictures, torch.from_numpy(faces.labels)).mul(255).round().byte()
    images: NDArray[np.uint8] = changed.permute(0, 2, 3, 1).contiguous().numpy()
    return images


def _table(sources: Faces, images: NDArray[np.uint8], rows: NDArray[np.int64], made: str) -> Any:
    columns = {
        "png": [_png(image) for image in images],
        "label": [EMOTIONS[label] for label in sources.labels],  # a name means the same in every label order
        "split": ["train"] * len(rows),
        "made": [made] * len(rows),
        "source_row": rows,
        "source_blake2b": face_hashes(sources.images),
        "ferplus_votes": [None] * len(rows) if sources.votes is None else [_vote_row(row) for row in sources.votes],
    }
    return pa.table(columns, schema=_SCHEMA)


def _png(image: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).save(buffer, format="PNG")
    return buffer.getvalue()


def _vote_row(shares: NDArray[np.float32]) -> list[float] | None:
    """Shares `(L,)` as a row of a FER+ vote table, which `load_data` reads."""
    if np.isnan(shares).any():
        return None
    return [0.0 if label is None else float(shares[label]) for label in _VOTE_COLUMNS]


def _read_emotion(path: Path, images: NDArray[np.uint8], votes: NDArray[np.float32]) -> None:
    """Fill faces `(n, H, W, C)` and votes `(n, L)`, which are views of larger arrays."""
    size, channels = images.shape[2:]
    row = 0
    for batch in pq.ParquetFile(path).iter_batches(batch_size=1024, columns=["png", "ferplus_votes"]):
        for cells in batch.to_pylist():
            images[row] = decode_face(cells["png"], size=size, channels=channels)
            for label, share in zip(_VOTE_COLUMNS, cells["ferplus_votes"] or (), strict=False):
                if label is not None:
                    votes[row, label] = share
            row += 1


def _file_name(emotion: str) -> str:
    return f"train-{emotion}.parquet"


def _command(directory: Path, per_emotion: int = 8000) -> str:
    return f"emoexport data balance D --per-class {per_emotion} --out {directory}"


def _say(console: Console, sentence: str) -> None:
    console.print(sentence)
