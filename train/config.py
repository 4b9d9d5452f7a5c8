"""What a training run is made of. Presets are TOML files beside this module."""

import tomllib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from emoexport.config import Record, read_toml
from emoexport.errors import UsageError
from emoexport.labels import EMOTIONS
from emoexport.views import VIEWS

__all__ = ["ModelConfig", "RunConfig", "TrainingConfig", "load_config", "preset_names"]


class ModelConfig(Record):
    """What it takes to build one member's network. Every part can be switched off by itself."""

    backbone: str = "convnext_large"
    """A timm model name."""
    backbone_args: dict[str, Any] = Field(default_factory=dict)
    """Passed to `timm.create_model`."""
    image_size: int = Field(default=224, ge=16, le=1024)
    """Height and width of a face in pixels."""
    channels: Literal[1, 3] = 1
    mean: float | tuple[float, float, float] = 0.5
    """Subtracted from pixels in [0, 1]: for all channels, or for each."""
    std: float | tuple[float, float, float] = 0.25
    """What they are divided by then."""
    pyramid_channels: int = Field(default=256, ge=0, le=4096)
    """Width of the feature pyramid over the backbone's stages; 0 for the last stage alone."""
    attention: tuple[Literal["se", "eca", "cbam"], ...] = ("se", "eca", "cbam")
    """Attention at each scale, one after the other; () for none."""
    pooling: tuple[Literal["avg", "max", "gem", "attention"], ...] = ("avg", "max", "gem", "attention")
    """What a feature map is pooled with; several are mixed by learned weights."""
    channel_calibration: bool = True
    """A learned gate on every pooled feature."""
    hidden: tuple[int, ...] = (512, 256)
    """Widths of the classifier's hidden layers; () for a linear classifier."""
    feature_dropout: float = Field(default=0.4, ge=0, lt=1)
    """Dropout on the pooled features."""
    head_dropout: float = Field(default=0.6, ge=0, lt=1)
    """Dropout before the last layer of the classifier, where it has hidden layers."""
    drop_path_rate: float = Field(default=0.0, ge=0, lt=1)
    """Stochastic depth of the backbone."""
    labels: tuple[str, ...] = EMOTIONS
    """Fixed; written down so that a member says what its outputs mean."""

    @field_validator("std")
    @classmethod
    def _is_positive(cls, std: float | tuple[float, ...]) -> float | tuple[float, ...]:
        if min(std if isinstance(std, tuple) else (std,)) <= 0:
            raise ValueError("must be above 0")
        return std

    @field_validator("pooling")
    @classmethod
    def _pools_somehow(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if not names or len(set(names)) < len(names):
            raise ValueError("must name avg, max, gem or attention, each at most once")
        return names

    @field_validator("backbone")
    @classmethod
    def _is_a_plain_name(cls, name: str) -> str:
        if ":" in name:
            raise ValueError("must be the name of a timm model; others would be fetched or read from elsewhere")
        return name

    @field_validator("backbone_args")
    @classmethod
    def _load_nothing(cls, given: dict[str, Any]) -> dict[str, Any]:
        loading = sorted(name for name in given if name.startswith(("pretrained", "checkpoint", "cache")))
        if loading:
            raise ValueError(f"{loading[0]} would load weights that are not the member's own")
        return given

    @field_validator("labels")
    @classmethod
    def _are_the_emotions(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if names != EMOTIONS:
            raise ValueError(f"labels must be {', '.join(EMOTIONS)}, in this order")
        return names


class TrainingConfig(Record):
    """How a run trains. Epochs are counted from 1."""

    members: int = Field(default=5, ge=1)
    """How many of the best checkpoints become members."""
    epochs: int = Field(default=10, ge=1)
    batch_size: int = Field(default=64, ge=1)
    """Faces in a batch of one device."""
    accumulate: int = Field(default=1, ge=1)
    """Batches whose gradients are added up for one step."""

    pretrained: bool = False
    """Begin with timm's weights of the backbone."""
    init_from: str = ""
    """Begin with the weights in this local file: timm's for the backbone, or a member's."""

    learning_rate: float = Field(default=2e-3, gt=0)
    weight_decay: float = Field(default=0.05, ge=0)
    warmup_epochs: float = Field(default=1.0, ge=0)
    restart_epochs: float = Field(default=0.0, ge=0)
    """The cosine starts anew every so many epochs; 0 for one cosine over all."""
    label_smoothing: float = Field(default=0.1, ge=0, lt=1)
    soft_labels: float = Field(default=0.0, ge=0, le=1)
    """Weight of the data's votes (FER+) in the target; the rest is the label. Faces without votes keep the label."""

    ema_decay: float = Field(default=0.0, ge=0, lt=1)
    """Exponential moving average of the weights, a step; 0 for none."""
    swa_from: int = Field(default=0, ge=0)
    """From this epoch on weights are averaged once an epoch; 0 for never."""
    distill_from: int = Field(default=0, ge=0)
    """From this epoch on the network also learns from its own averaged weights; 0 for never."""
    distill_weight: float = Field(default=0.5, ge=0, le=1)
    """Share of that in the loss."""
    distill_temperature: float = Field(default=2.0, gt=0)

    balance: int = Field(default=0, ge=0)
    """Faces per emotion in the balanced training set; 0 to train on the faces as they are."""
    augmentation: float = Field(default=1.0, ge=0, le=2)
    """Strength of the augmentation; 0 for none."""
    phases: tuple[float, ...] = (1.0,)
    """Training is cut into as many equal parts; each multiplies the strength of the augmentation."""
    emotion_specific: bool = False
    """Whether what an emotion's faces go through follows the table in `augment.py`."""

    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """`auto` takes bfloat16 where the device computes in it."""
    validation: float = Field(default=0.1, gt=0, lt=0.5)
    """The share of the training split set aside where the data has no validation split."""
    clean_rows_only: bool = True
    """Leave copies, contradictions and blanks out of training and validation."""
    seed: int = Field(default=0, ge=0, lt=2**32)

    @field_validator("phases")
    @classmethod
    def _are_strengths(cls, strengths: tuple[float, ...]) -> tuple[float, ...]:
        if not strengths or min(strengths) < 0:
            raise ValueError("must be one or more strengths of at least 0")
        return strengths

    @model_validator(mode="after")
    def _teacher_exists(self) -> Self:
        averaged = self.ema_decay > 0 or 0 < self.swa_from <= self.distill_from
        if self.distill_from and not averaged:
            raise ValueError("distill_from needs averaged weights: set ema_decay, or swa_from to that epoch or before")
        return self

    @model_validator(mode="after")
    def _one_beginning(self) -> Self:
        if self.pretrained and self.init_from:
            raise ValueError("pretrained and init_from exclude each other: init_from names weights that are here")
        return self


class RunConfig(Record):
    """Everything that determines a run, but for its data."""

    model: ModelConfig = ModelConfig()
    training: TrainingConfig = TrainingConfig()
    views: tuple[str, ...] = tuple(VIEWS)


def preset_names() -> list[str]:
    """The names that `--preset` takes."""
    files = resources.files("emoexport.train").joinpath("presets").iterdir()
    return sorted(file.name.removesuffix(".toml") for file in files if file.name.endswith(".toml"))


def load_config(
    preset: str = "tiny", *, file: Path | None = None, settings: Sequence[str] = (), **overrides: Any
) -> RunConfig:
    """Read a preset or a file of one's own.

    Args:
        preset: a name from `preset_names()`, used where no file is given.
        file: a TOML file with the tables `[model]` and `[training]` and the list `views`.
        settings: single settings as `table.name=value`, the value in TOML.
        overrides: fields of `TrainingConfig`; None leaves the field as it is.

    Raises:
        UsageError: if there is no such preset, or a setting is unknown or out of range.
    """
    if file is None:
        if preset not in preset_names():
            raise UsageError(f"there is no preset '{preset}'; there are {', '.join(preset_names())}.")
        with resources.as_file(resources.files("emoexport.train") / "presets" / f"{preset}.toml") as path:
            tables = read_toml(path)
    else:
        tables = read_toml(file)
    for text in settings:
        _set(tables, text)
    given = {name: value for name, value in overrides.items() if value is not None}
    training = tables.get("training", {})
    if isinstance(training, dict):
        tables["training"] = {**training, **given}
    return RunConfig.parse(tables, source=str(file or f"preset {preset}"), error=UsageError)


def _set(tables: dict[str, Any], text: str) -> None:
    """Put `table.name=value` into tables as TOML reads them; a value that is no TOML is taken as a word."""
    key, equals, value = text.partition("=")
    *path, name = key.strip().split(".")
    if not equals or not path:
        raise UsageError(f"'{text}' is no setting; needed is table.name=value, such as training.ema_decay=0.99.")
    table = tables
    for part in path:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise UsageError(f"'{text}' is no setting: '{part}' is no table.")
    try:
        table[name] = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        table[name] = value.strip()
