"""A training that has not ended: where it is kept, and what it was begun with."""

import shutil
from pathlib import Path
from typing import Literal

from emoexport.config import Record
from emoexport.errors import BadCheckpoint, UsageError
from emoexport.files import write_text
from emoexport.train.checkpoint import DataRecord
from emoexport.train.config import RunConfig

__all__ = ["REQUEST_FILE", "Request", "begin"]

REQUEST_FILE = "request.json"

# What of the data may differ as long as the faces that it trains and validates on are the same.
_NO_DIFFERENCE = {"source", "splits", "skipped", "outside"}


class Request(Record):
    """What a training was begun with; a resumed one must be the same."""

    schema_version: Literal[1] = 1
    config: RunConfig
    data: DataRecord


def begin(directory: Path, config: RunConfig, data: DataRecord, *, force: bool) -> None:
    """Make the directory of an unfinished run, or see that the one there was begun with the same.

    Args:
        directory: from `files.unfinished_directory`.
        config: the settings of this call.
        data: the faces of this call.
        force: forget what is there.

    Raises:
        UsageError: if settings or faces differ; the first difference is named.
    """
    request = Request(config=config, data=data)
    if force or not (directory / REQUEST_FILE).is_file():  # what is there without one is of another training
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True, exist_ok=True)
        write_text(directory / REQUEST_FILE, request.to_json())
        return
    begun = Request.parse_json(directory / REQUEST_FILE, error=BadCheckpoint)
    for name, found, wanted in _differences(begun, request):
        raise UsageError(
            f"the training in {directory} was begun with {name} = {found}; this call has {wanted}.",
            hint="resume with the same settings and data, or begin anew with --force",
        )


def _differences(begun: Request, now: Request) -> list[tuple[str, object, object]]:
    pairs = (
        (begun.config.model, now.config.model),
        (begun.config.training, now.config.training),
        (begun.config, now.config),
        (begun.data, now.data),
    )
    return [
        (name, getattr(old, name), getattr(new, name))
        for old, new in pairs
        for name in type(old).model_fields
        if getattr(old, name) != getattr(new, name) and name not in _NO_DIFFERENCE
    ]
