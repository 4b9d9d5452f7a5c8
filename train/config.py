"""What a training run is made of. Presets are TOML files beside this module."""

from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from emoexport.config import Record, read_toml
from emoexport.errors import UsageError
from emoexport.labels import EMOTIONS
from emoexport.views import VIEWS

__all__ = ["ModelConfig", "RunConfig", "TrainingConfig", "load_config", "preset_names"]


class ModelConfig(Record):
    """What it takes to build one member's network."""

    backbone: str = "convnext_atto"
    """A timm model name."""
    backbone_args: dict[str, Any] = Field(default_factory=dict)
    """Passed to `timm.create_model`."""
    image_size: int = Field(default=48, ge=16, le=1024)
    """Height and width of a face in pixels."""
    channels: Literal[1, 3] = 1
    mean: float = 0.5
    """Subtracted from pixels in [0, 1]."""
    std: float = Field(default=0.25, gt=0)
    """What they are divided by then."""
    drop_rate: float = Field(default=0.0, ge=0, lt=1)
    """Dropout before the classifier."""
    drop_path_rate: float = Field(default=0.0, ge=0, lt=1)
    """Stochastic depth."""
    labels: tuple[str, ...] = EMOTIONS
    """Fixed; written down so that a member says what its outputs mean."""

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
    """How a run trains."""

    members: int = Field(default=5, ge=1)
    """How many of the best checkpoints become members."""
    epochs: int = Field(default=10, ge=1)
    warmup_epochs: float = Field(default=1.0, ge=0)
    batch_size: int = Field(default=64, ge=2)
    learning_rate: float = Field(default=2e-3, gt=0)
    weight_decay: float = Field(default=0.05, ge=0)
    label_smoothing: float = Field(default=0.1, ge=0, lt=1)
    augmentation: float = Field(default=1.0, ge=0, le=2)
    """Strength of the augmentation; 0 for none."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """`auto` takes bfloat16 where the device computes in it."""
    validation: float = Field(default=0.1, gt=0, lt=0.5)
    """The share of the training split set aside where the data has no validation split."""
    clean_rows_only: bool = True
    """Leave copies, contradictions and blanks out of training and validation."""
    seed: int = Field(default=0, ge=0, lt=2**32)


class RunConfig(Record):
    """Everything that determines a run, but for its data."""

    model: ModelConfig = ModelConfig()
    training: TrainingConfig = TrainingConfig()
    views: tuple[str, ...] = tuple(VIEWS)


def preset_names() -> list[str]:
    """The names that `--preset` takes."""
    files = resources.files("emoexport.train").joinpath("presets").iterdir()
    return sorted(file.name.removesuffix(".toml") for file in files if file.name.endswith(".toml"))


def load_config(preset: str = "tiny", *, file: Path | None = None, **overrides: Any) -> RunConfig:
    """Read a preset or a file of one's own.

    Args:
        preset: a name from `preset_names()`, used where no file is given.
        file: a TOML file with the tables `[model]` and `[training]` and the list `views`.
        overrides: fields of `TrainingConfig`; None leaves the field as it is.

    Raises:
        UsageError: if there is no such preset, or a setting is unknown or out of range.
    """
    if file is None:
        if preset not in preset_names():
            raise UsageError(f"there is no preset '{preset}'; there are {', '.join(preset_names())}.")
        with resources.as_file(resources.files("emoexport.train") / "presets" / f"{preset}.toml") as path:
            settings = read_toml(path)
    else:
        settings = read_toml(file)
    given = {name: value for name, value in overrides.items() if value is not None}
    training = settings.get("training", {})
    if isinstance(training, dict):
        settings["training"] = {**training, **given}
    return RunConfig.parse(settings, source=str(file or f"preset {preset}"), error=UsageError)
