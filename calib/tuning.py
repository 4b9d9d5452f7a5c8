"""`tuning.json`: which blocks of the members a graph of few bits leaves in FP32, and the trials that chose them."""

from typing import Literal

from emoexport.calib.sensitivity import Cost
from emoexport.config import Record, SealedRecord
from emoexport.statistics import Estimate

__all__ = ["Kind", "Setting", "Trial", "Tuning"]


Kind = Literal["alone", "without", "search"]


class Setting(Record):
    """What trials were made with; those of two different settings cannot be compared."""

    graph_sha256: str
    """Of the FP32 graph, with its weights."""
    calibration_sha256: str
    precision: str
    engine: str
    """Of `engines.BACKENDS`: the target."""
    faces_sha256: str
    """Of the faces that costs are counted on, with their labels."""
    faces: int
    batch: int
    """Faces in a call that is timed."""
    rounds: int
    threads: int | None
    machine: dict[str, str]
    """Processor and versions."""


class Trial(Record):
    """One graph that was made and measured."""

    kind: Kind
    """One block alone in few bits, all but one, or a step of the search."""
    precision: str
    left: tuple[str, ...]
    """The blocks that were left in FP32."""
    cost: Cost | None = None
    """Against the FP32 graph; None where only speed was measured."""
    times_as_fast: Estimate | None = None
    """As the graph with all blocks in few bits, in turn, 95 % interval; None where only the cost was measured."""
    ms_a_face: float | None = None


class Tuning(SealedRecord):
    """`tuning.json`."""

    written_by = "emoexport tune"
    schema_version: Literal[1] = 1
    created: str
    """UTC, ISO 8601."""
    bundle_digest: str
    setting: Setting
    max_drop: float
    """The largest loss of accuracy, as a share of the faces, that the search allows."""
    blocks: tuple[str, ...]
    """All that can be in few bits, in the order of the graph."""
    left: tuple[str, ...]
    """Those that are to stay in FP32."""
    bound: float
    """Gain of accuracy over the FP32 graph, a share: the lower bound of what was chosen, one-sided at 95 %. The search
    was made with the same faces."""
    shared_with_gate: int
    """How many of the faces `build` compares engines on too, as it usually does, where the run has few."""
    calibrated_on_noise: bool
    """Whether the calibration tells nothing of real faces, and so neither do these costs."""
    trials: tuple[Trial, ...]
    """Of single blocks, then the steps of the search; the last one was chosen."""
