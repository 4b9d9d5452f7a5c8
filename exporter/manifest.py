"""`manifest.json`: what a bundle is made of, how it decides, and the SHA-256 of each of its files."""

import os
from typing import Annotated, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator, model_validator

from emoexport.config import Record, SealedRecord
from emoexport.decision import Decision
from emoexport.passes import Choice, Weight, pass_weights
from emoexport.precision import PRECISIONS
from emoexport.statistics import Estimate

__all__ = [
    "MANIFEST_FILE",
    "CalibrationEntry",
    "FileEntry",
    "GateEntry",
    "GraphEntry",
    "LayoutEntry",
    "Manifest",
    "MemberEntry",
    "PackageEntry",
    "ProvenanceEntry",
    "ViewEntry",
]

MANIFEST_FILE = "manifest.json"
_LONGEST_PATH, _LONGEST_NAME = 2048, 255
"""Characters and bytes; longer ones are refused by systems, each in its own way."""
_Side = Annotated[int, Field(ge=1, le=4096)]


class MemberEntry(Record):
    """A member that was folded."""

    sha256: str
    """Of its weights."""
    backbone: str
    epoch: int
    validation_accuracy: float
    parameters: int | None = Field(default=None, ge=0)
    """How many; None in a manifest from before they were counted, as in the next field."""
    gflop_a_pass: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """10^9 floating-point operations on one picture, as `flops.gflop_a_pass` counts them."""
    weight: Weight = 1.0
    """In the vote, beside those of the other members."""


class ViewEntry(Record):
    """A view that was folded."""

    name: str
    function: str
    parameters: dict[str, float]
    mirrored: bool
    weight: Weight = 1.0
    """In the vote, beside those of the other views."""
    same_as: str | None = None
    """The earlier view that shows the same picture: its passes are computed, and their scores given to both."""


class LayoutEntry(Record):
    """How the members stand in the graphs."""

    name: str
    """Of `fold.LAYOUTS`: `branches`, one subgraph a member; `stacked`, each operator once for all members."""
    reason: str
    """Why: it was asked for, or what was measured."""
    median_ms: dict[str, float] | None = None
    """By layout, of a call with one face; None where nothing was measured."""


class GraphEntry(Record):
    """A graph of the bundle."""

    file: str = Field(pattern=r"\.onnx$")
    opset: int
    operators: dict[str, int]
    kept: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """By reason, the nodes of members that its conversion left in FP32, or unquantised."""


class PackageEntry(Record):
    """The fold compiled ahead of time, and the machine that it needs."""

    file: str
    backend: str
    """Of `engines.BACKENDS`."""
    precision: str
    torch: str
    """The version that compiled it, which alone loads it."""
    instruction_sets: tuple[str, ...] = Field(min_length=1)
    """Of the processor, as `engines.machine.instruction_sets` names them."""
    seconds: float
    """How long it took."""


class FileEntry(Record):
    """A file of the bundle."""

    sha256: str
    bytes: int = Field(ge=0)


class CalibrationEntry(Record):
    """Where the ranges of the activations are from."""

    file: str
    method: str
    faces: int
    data: str
    split: str
    random: bool = False
    """Whether it is noise, not faces."""

    def options(self) -> list[str]:
        """The options of `build` that calibrate like this, as far as they are not the usual ones."""
        method = [] if self.method == "min-max" else ["--calib-method", self.method]
        size = [] if self.faces == 512 else ["--calib-size", str(self.faces)]
        return [*method, *size, *(["--calib-random"] if self.random else [])]


class GateEntry(Record):
    """Whether a graph of 8 bits is worth having on the machine that built it."""

    verdict: Literal["recommended", "not recommended", "not judged"]
    reason: str
    engine: str | None = None
    """The fastest of its graph."""
    rival: str | None = None
    """The fastest of a graph of 16 or 32 bits."""
    times_as_fast: Estimate | None = None
    """As the rival, in turn, 95 % interval."""
    gain_points: Estimate | None = None
    """Accuracy of the engine less that of the rival on the same faces, paired 95 % interval."""
    bound_points: float | None = None
    """Its lower bound, one-sided at 95 %."""
    faces: int | None = None


class ProvenanceEntry(Record):
    """What made a bundle, and what it was made of besides what the manifest says already."""

    source_sha256: str
    """Of emoexport's own files: one that was edited is another package under the same version."""
    python: str
    platform: str
    processor: str
    materials: dict[str, str]
    """By path, relative to the run, SHA-256 of what was read besides the members' weights."""
    sbom: str
    """The file with the bill of materials, in CycloneDX 1.6: members, faces, and packages with what they need."""


class Manifest(SealedRecord):
    """`manifest.json`."""

    schema_version: Literal[1] = 1
    created: str | None = None
    """UTC, ISO 8601, in a manifest of before the same inputs gave the same bytes."""
    face_shape: tuple[_Side, _Side, Literal[1, 3]]
    """`(H, W, C)` of the uint8 faces."""
    max_batch: int = Field(ge=1, le=2**16)
    labels: tuple[str, ...]
    run: str
    """The training run, relative to the bundle where that is possible: the reference is rebuilt from it."""
    members: tuple[MemberEntry, ...] = Field(min_length=1)
    views: tuple[ViewEntry, ...] = Field(min_length=1)
    choice: Choice = Choice()
    """What of the run was asked for."""
    vote: Literal["prob-mean"] = "prob-mean"
    decision: Decision
    layout: LayoutEntry = LayoutEntry(name="branches", reason="the only layout there was")
    rewrites: dict[str, int] | None = None
    """By name in `rewrites.REWRITES`, how many nodes each took out of all members together; None in a manifest from
    before there were any."""
    graphs: dict[str, GraphEntry]
    """By precision."""
    gate: dict[str, GateEntry] = Field(default_factory=dict)
    """By precision of 8 bits; those that are not recommended have no graph unless it was asked to be kept."""
    engines: dict[str, PackageEntry] = Field(default_factory=dict)
    """What was compiled ahead of time, by name of the engine."""
    calibration: CalibrationEntry | None = None
    tuning: str | None = None
    """The file with the trials by which a graph of 8 bits leaves blocks in FP32; None where it leaves none."""
    data: dict[str, Any]
    """What the run says of its faces."""
    versions: dict[str, str]
    provenance: ProvenanceEntry | None = None
    """None in a manifest from before it was recorded."""
    files: dict[str, FileEntry]
    """Every file but the manifest, the reports, and engines with a passport."""

    @field_validator("run")
    @classmethod
    def _is_a_path(cls, run: str) -> str:
        parts = os.fsencode(run).split(b"/")
        if "\0" in run or len(run) > _LONGEST_PATH or max(map(len, parts)) > _LONGEST_NAME:
            raise ValueError("no path can be this")
        return run

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.labels != self.decision.labels:
            raise ValueError("the labels are not those of the decision")
        if unknown := {*self.graphs, *self.gate} - {*PRECISIONS}:
            raise ValueError(f"{min(unknown)!r} is no precision; known are {', '.join(PRECISIONS)}")
        names = [view.name for view in self.views]
        if any(view.same_as not in (None, *names[:number]) for number, view in enumerate(self.views)):
            raise ValueError("a view is the same as one that does not come before it")
        if self.choice.passes:
            chosen = self.choice.among(max(self.choice.numbers), ())
            if (len(chosen.members), len(chosen.views)) != (len(self.members), len(self.views)):
                raise ValueError("the passes that are chosen are not of these members and views")
        return self

    @property
    def opened(self) -> dict[str, GraphEntry | PackageEntry]:
        """What engines are opened from: the graphs, by precision, and the packages, by name of the engine."""
        return {**self.graphs, **self.engines}

    @property
    def named(self) -> set[str]:
        """The files that something in it speaks of."""
        records = {
            self.calibration.file if self.calibration else None,
            self.provenance.sbom if self.provenance else None,
            self.tuning,
        }
        return {entry.file for entry in self.opened.values()} | {name for name in records if name is not None}

    @property
    def kept_rejected(self) -> list[str]:
        """The precisions that are not recommended and have a graph all the same."""
        return [name for name in self.graphs if name in self.gate and self.gate[name].verdict == "not recommended"]

    @property
    def weights(self) -> NDArray[np.float64] | None:
        """Of every pass in the vote, `(K, V)`, sum 1, and 0 for passes left out; None for equal ones of all."""
        if self.choice.passes:  # in their order members and views were folded
            return self.choice.among(max(self.choice.numbers), ()).weights()
        return pass_weights([member.weight for member in self.members], [view.weight for view in self.views])

    @property
    def merged_weights(self) -> NDArray[np.float64]:
        """Of every pass that is computed, in the vote, `(K, V)`, sum 1.

        Those of a view that shows what an earlier one does have 0, and the earlier one has their weight too.
        """
        shape = len(self.members), len(self.views)
        voting = np.full(shape, 1 / np.prod(shape)) if self.weights is None else self.weights
        place = {view.name: number for number, view in enumerate(self.views)}
        found = np.zeros(shape)
        for number, view in enumerate(self.views):
            found[:, place[view.same_as or view.name]] += voting[:, number]
        return found

    @property
    def computed(self) -> NDArray[np.bool_]:
        """Which passes are computed, `(K, V)`: not those left out, nor those of a view that shows what another does."""
        return self.merged_weights > 0

    @property
    def gflop_a_face(self) -> float | None:
        """10^9 floating-point operations of all passes that are computed; None where they were not counted."""
        counted = [member.gflop_a_pass for member in self.members if member.gflop_a_pass is not None]
        if len(counted) < len(self.members):
            return None
        return float(self.computed.sum(axis=1) @ counted)

    @property
    def passes_a_face(self) -> int:
        """How many are computed."""
        return int(self.computed.sum())
