"""The faces that judge a run or a bundle: read as the run read them, drawn, described."""

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from emoexport.errors import BadData
from emoexport.train.audit import clean_rows
from emoexport.train.checkpoint import RunRecord
from emoexport.train.dataset import DataSet, Faces, is_synthetic, load_data
from emoexport.train.ensemble import training_faces

__all__ = ["data_name", "data_of_run", "describe_faces", "drawn_faces", "validation_faces", "validation_in"]


def data_of_run(
    run: Path,
    record: RunRecord,
    source: str | None = None,
    *,
    label_order: str | None = None,
    skip_bad: bool = False,
) -> DataSet:
    """Read faces as a run did.

    Args:
        run: the run's directory.
        record: its record.
        source: where the faces are; None for where the run read them.
        label_order: what numbered labels mean; None for what they meant to the run.
        skip_bad: leave out what cannot be read, as is done where the run did.

    Raises:
        BadData: if they cannot be read.
    """
    if source is None:
        source = record.data.source
        if not is_synthetic(source):
            source = str((run.resolve() / source).resolve())
    model = record.config.model
    return load_data(
        source,
        size=model.image_size,
        channels=model.channels,
        label_order=label_order or record.data.label_order,
        seed=record.data.seed,
        skip_bad=skip_bad or record.data.skipped > 0,
    )


def validation_faces(run: Path, record: RunRecord, source: str | None = None) -> Faces:
    """Read the faces that the members of a run were validated on.

    Args:
        run: the run's directory.
        record: its record.
        source: where the faces are; None for where the run read them.

    Raises:
        BadData: if they cannot be read, or are others.
    """
    return validation_in(data_of_run(run, record, source), record)


def validation_in(data: DataSet, record: RunRecord) -> Faces:
    """The faces that the members of a run were validated on, in data that was read as the run read it.

    Raises:
        BadData: if they are others.
    """
    found, needed = training_faces(data, record.config).validation, record.data.validation_sha256
    if needed and found.sha256() != needed:
        raise BadData(
            f"the validation faces in {data_name(data.source)} have the SHA-256 {found.sha256()[:16]}…; those that the "
            f"members were validated on have {needed[:16]}….",
            hint="name where those are: others may be faces that the members were trained on",
        )
    return found


def drawn_faces(dataset: DataSet, split: str, limit: int | None = None) -> tuple[Faces, dict[str, NDArray[np.bool_]]]:
    """Faces of a split, and the sets of rows to report on, each a mask `(N,)`.

    They are `all`, and `clean` where that is neither all nor none: no copies, leaks, contradictions or blanks.

    Args:
        dataset: the data.
        split: which split.
        limit: draw this many of its faces at random, always the same ones; None for all.

    Raises:
        UsageError: if there is no such split.
    """
    faces, clean = dataset.split(split), clean_rows(dataset)[split]
    if limit is not None and limit < len(faces):
        rows = np.sort(np.random.default_rng(0).permutation(len(faces))[:limit])
        faces, clean = faces.take(rows), clean[rows]
    row_sets = {"all": np.ones(len(faces), dtype=bool)}
    if clean.any() and not clean.all():
        row_sets["clean"] = clean
    return faces, row_sets


def data_name(source: str) -> str:
    """How reports name data: without the folders of the machine it lies on."""
    return source if is_synthetic(source) else Path(os.path.abspath(source)).name  # noqa: PTH100 (a link keeps its name)


def describe_faces(dataset: DataSet, split: str, record: RunRecord, console: Console) -> str:
    """Say what was read; and, as is returned too, why it can show nothing of how members do on new faces, if so."""
    for line in dataset.summary():
        console.print(line)
    unfit = _unfit_because(dataset, split, record)
    if unfit:
        console.print(f"{unfit[0].upper()}{unfit[1:]}.", style="yellow")
    return unfit


def _unfit_because(data: DataSet, split: str, record: RunRecord) -> str:
    made_with = {record.data.train_sha256, record.data.validation_sha256}
    if data.split(split).sha256() in made_with or (
        split in ("train", "validation") and _is_training_data(data, record)
    ):
        return f"the members were made with the split '{split}': its accuracy says nothing of new faces"
    if is_synthetic(data.source) and not is_synthetic(record.data.source):
        return "these faces are drawn, and the members were trained on others: they say nothing of those"
    if not clean_rows(data)[split].any():
        return "not one of these faces is clean: all are copies of others, as of training faces, contradicting or blank"
    return ""


def _is_training_data(data: DataSet, record: RunRecord) -> bool:
    return "train" in data.splits and training_faces(data, record.config).train.sha256() == record.data.train_sha256
