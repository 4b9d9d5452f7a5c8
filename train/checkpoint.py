"""Members on disk: safetensors, and beside each a JSON file with all that rebuilds it.

runs/x/
  run.json                  configuration, data, versions, accuracy
  decision.json             the rules fitted on validation faces, and what each candidate did
  members/1.safetensors     the weights
  members/1.json            the configuration, the epoch, the hash of the weights
  metrics.csv               the figures of every epoch
  training.png              these as curves
  tensorboard/              these for TensorBoard
"""

from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor, nn

from emoexport.config import Record
from emoexport.decision import Decision, Gain, RuleReport, TemperatureReport
from emoexport.errors import BadCheckpoint, UsageError
from emoexport.files import sha256_of
from emoexport.train.config import ModelConfig, RunConfig
from emoexport.train.emotenet import ConvNeXtEmoteNet
from emoexport.train.standing import SoupMethod
from emoexport.train.weights import parameters_on_meta, read_weights

__all__ = [
    "RUN_FILE",
    "DataRecord",
    "FittedDecision",
    "Ingredient",
    "MemberRecord",
    "RunRecord",
    "SoupRecord",
    "load_member",
    "load_members",
    "read_run",
    "require_alike",
    "save_member",
]

RUN_FILE = "run.json"


class Ingredient(Record):
    """A member that could go into a soup."""

    member: str
    """Its JSON file, relative to the run that the soup was made as."""
    sha256: str
    """Of its weights."""
    validation_accuracy: float
    """Of one pass, computed in float32 as for the soups it is compared with."""
    kept: bool
    """Whether its weights are in the average."""


class SoupRecord(Record):
    """How averaged weights came about, and what averaging gained or lost on the validation faces."""

    method: SoupMethod
    """As asked for."""
    chosen: SoupMethod
    """`uniform` or `greedy`: which of them the weights are."""
    ingredients: tuple[Ingredient, ...]
    """Best first."""
    best_member: float
    """Validation accuracy of one pass of the best ingredient, in [0, 1]."""
    uniform: float
    """Likewise of the average of all."""
    greedy: float
    """Likewise of the average of those that do not lower its accuracy."""


class MemberRecord(Record):
    """The JSON file beside a member's weights."""

    schema_version: Literal[1] = 1
    weights: str
    """The name of the file with the weights, in the same directory."""
    sha256: str
    epoch: int
    """From 1; 0 of a soup."""
    weights_of: Literal["network", "ema", "swa", "soup"] = "network"
    """The network as trained, its exponential moving average, its stochastic weight average, or several members'."""
    validation_accuracy: float
    model: ModelConfig
    soup: SoupRecord | None = None
    """What it was averaged from, where its weights are a soup."""


class DataRecord(Record):
    """Which faces a run has seen."""

    source: str
    label_order: str
    seed: int
    splits: dict[str, int]
    """Faces of each split as read."""
    skipped: int
    outside: int
    train_faces: int
    train_sha256: str
    validation_faces: int
    validation_sha256: str
    validation_from: str


class RunRecord(Record):
    """`run.json`: what the run was made of, and its members, best first."""

    schema_version: Literal[1] = 1
    config: RunConfig
    data: DataRecord
    members: tuple[str, ...]
    """Names of the members' JSON files, relative to the run."""
    batch_size: int
    """Of the training as it ended: smaller than asked for where memory did not suffice."""
    accumulate: int
    """Batches a step, likewise."""
    seconds: float
    """That the epochs took."""
    versions: dict[str, str]
    combined_from: tuple[str, ...] = ()
    """Of a run that `combine` made: which files its members were copied or averaged from, relative to the run."""


class FittedDecision(Record):
    """`decision.json`."""

    decision: Decision
    validation_accuracy: dict[str, float] = Field(default_factory=dict)
    """Of each step: best single pass of one member, a member's vote, the full vote, with the rules."""
    temperature: TemperatureReport | None = None
    """What the temperature does on held-out faces; None where nothing was fitted."""
    candidates: tuple[RuleReport, ...] = ()
    together: Gain | None = None
    """Of the candidates that pass alone, applied together."""


def save_member(
    directory: Path,
    name: str,
    network: nn.Module,
    *,
    model: ModelConfig,
    epoch: int,
    accuracy: float,
    weights_of: Literal["network", "ema", "swa", "soup"] = "network",
    soup: SoupRecord | None = None,
) -> str:
    """Write a member's two files.

    Returns:
        The name of the JSON file.
    """
    directory.mkdir(parents=True, exist_ok=True)
    weights = directory / f"{name}.safetensors"
    save_file({key: value.contiguous() for key, value in network.state_dict().items()}, weights)
    record = MemberRecord(
        weights=weights.name,
        sha256=sha256_of(weights),
        epoch=epoch,
        weights_of=weights_of,
        validation_accuracy=accuracy,
        model=model,
        soup=soup,
    )
    (directory / f"{name}.json").write_text(record.to_json(), encoding="utf-8")
    return f"{name}.json"


def read_run(run: Path) -> RunRecord:
    """Read `run.json`.

    Raises:
        BadCheckpoint: if the directory is no run, or the file is damaged.
    """
    if not (run / RUN_FILE).is_file():
        raise BadCheckpoint(
            f"{run} is no training run: there is no {RUN_FILE} in it.",
            hint="emoexport train --data synthetic:5600 --out runs/x",
        )
    return RunRecord.parse_json(run / RUN_FILE, error=BadCheckpoint)


def load_members(run: Path) -> tuple[list[MemberRecord], list[ConvNeXtEmoteNet]]:
    """Rebuild the members of a run from their files alone.

    Args:
        run: directory of the run.

    Returns:
        Their records, and the networks in evaluation mode.

    Raises:
        BadCheckpoint: if there are fewer, one cannot be rebuilt, or they do not fit together.
    """
    record = read_run(run)
    needed = record.config.training.members
    files = [run / name for name in record.members if (run / name).is_file()]
    if len(files) < needed:
        raise BadCheckpoint(
            f"{run} has {len(files)} members; needed are {needed}.",
            hint="restore the missing files of members/, or train again",
        )
    pairs = [load_member(path) for path in files]
    records = [member for member, _ in pairs]
    require_alike(records, files)
    return records, [network for _, network in pairs]


def load_member(path: Path) -> tuple[MemberRecord, ConvNeXtEmoteNet]:
    """Rebuild one member.

    Args:
        path: its JSON file. The weights beside it are safetensors, or a foreign `.pth`, `.pt` or `.ckpt`, which
            is read as plain tensors only: nothing in it can run.

    Raises:
        BadCheckpoint: if a file is missing, damaged or changed, does not fit the configuration, holds code, or
            holds weights that are not finite.
    """
    record = MemberRecord.parse_json(path, error=BadCheckpoint)
    weights = path.parent / record.weights
    if weights.resolve().parent != path.parent.resolve() or not weights.is_file():
        raise BadCheckpoint(f"{path} names the weights '{record.weights}', which are not beside it.")
    found = sha256_of(weights)
    if found != record.sha256:
        raise BadCheckpoint(
            f"{weights} has the SHA-256 {found[:12]}…; {path.name} says {record.sha256[:12]}…: it is cut short "
            "or was changed.",
            hint="restore the file, or train again",
        )
    state = read_weights(weights)
    try:
        with parameters_on_meta():  # neither drawn at random first nor kept twice
            network = ConvNeXtEmoteNet(record.model)
        network.load_state_dict({name: _as_computed(value) for name, value in state.items()}, assign=True)
    except (RuntimeError, UsageError) as err:
        raise BadCheckpoint(
            f"{weights} does not fit the network of {path.name}: {_first_lines(err)}",
            hint="restore the pair of files, or train again",
        ) from err
    # In float64 finite numbers of a lower precision have a finite sum.
    broken = [name for name, value in state.items() if not torch.isfinite(value.sum(dtype=torch.float64))]
    if broken:
        raise BadCheckpoint(
            f"{weights} holds values that are not finite, in {broken[0]} and {len(broken) - 1} other tensors.",
            hint="leave this checkpoint out; a lower learning rate keeps training from diverging",
        )
    return record, network.eval()


def _as_computed(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value


def require_alike(records: list[MemberRecord], files: list[Path]) -> None:
    """Hold members against the first: they may differ in architecture, not in what they see and what they name.

    Raises:
        BadCheckpoint: if they do; `files` are named in the message.
    """
    first = records[0].model
    for record, path in zip(records, files, strict=True):
        for field in ("labels", "image_size", "channels"):
            ours, theirs = getattr(first, field), getattr(record.model, field)
            if ours != theirs:
                raise BadCheckpoint(
                    f"members do not fit together: {files[0]} has {field} {ours}, {path} has {theirs}.",
                    hint="take members of one data set and one size",
                )


def _first_lines(err: Exception) -> str:
    """What PyTorch says over several lines, on one, up to its first complaint."""
    lines = [line.strip() for line in str(err).splitlines() if line.strip()]
    return " ".join(lines[:2])
