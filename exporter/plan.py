"""`plan.json`: the fewest passes that are shown to decide as well as the full vote, and what they cost here."""

from typing import Literal

from pydantic import Field

from emoexport.comparison import Comparison
from emoexport.config import Record, SealedRecord
from emoexport.engines.timing import Ratio
from emoexport.passes import Choice
from emoexport.verdict import Verdict

__all__ = ["PLAN_FILE", "Candidate", "Goals", "Plan", "Timing"]

PLAN_FILE = "plan.json"


class Goals(Record):
    """What a deployment must do; None for what nobody asked for."""

    max_drop_points: float = Field(default=0.5, ge=0, le=100)
    """Accuracy below the full vote, in percentage points."""
    max_disagreement_pct: float | None = Field(default=None, ge=0, le=100)
    """Faces on which it decides otherwise than the full vote."""
    max_passes: int | None = Field(default=None, ge=1)
    max_latency_ms: float | None = Field(default=None, gt=0)
    """Of a call."""
    min_throughput: float | None = Field(default=None, gt=0)
    """Faces a second."""


class Candidate(Record):
    """Some passes, each with its weight, and what the faces that choose say of them."""

    choice: Choice
    """As `build` takes it."""
    selection: Comparison

    @property
    def passes(self) -> int:
        """How many a face takes."""
        return len(self.choice.passes)


class Timing(Record):
    """An engine with some number of passes, timed here."""

    engine: str
    """Runtime and precision."""
    passes: int
    batch: int
    latency_ms: float
    """Median of a call, end to end."""
    times_full: Ratio
    """As fast as the same engine with the full vote, in turn."""

    @property
    def ms_a_face(self) -> float:
        """Median of a call, shared among its faces."""
        return self.latency_ms / self.batch


class Plan(SealedRecord):
    """`plan.json`."""

    schema_version: Literal[1] = 1
    created: str
    bundle_digest: str
    """Of the bundle with the full vote."""
    members: dict[int, str]
    """SHA-256 of the weights of each, by its number in the run."""
    goals: Goals
    selected_on: str
    """The faces that chose, and in the next those that confirm, as people name them."""
    confirmed_on: str
    selection_sha256: str
    confirmation_sha256: str
    full_accuracy: float
    """Of the full vote on the faces that choose."""
    candidates: tuple[Candidate, ...]
    """From one pass to all."""
    chosen: int | None
    """Index of the candidate; None if none is likely to hold."""
    engine: str | None = None
    precision: str | None = None
    batch: int
    timings: tuple[Timing, ...]
    confirmation: Comparison | None = None
    """Of that engine itself on the faces that had no part in the choice."""
    verdict: Verdict
    reasons: tuple[str, ...] = ()
    machine: dict[str, str]

    @property
    def choice(self) -> Choice | None:
        """What is to be built."""
        return None if self.chosen is None else self.candidates[self.chosen].choice

    @property
    def shrinkage_points(self) -> float | None:
        """By how much the gain is smaller where the choice was confirmed than where it was made."""
        if self.chosen is None or self.confirmation is None:
            return None
        selection = self.candidates[self.chosen].selection
        return round(selection.gain_points.value - self.confirmation.gain_points.value, 4)
