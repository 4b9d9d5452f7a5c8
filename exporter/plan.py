"""`plan.json`: the cheapest deployment that is shown to decide as well as the full vote, and what it costs here."""

from typing import Literal

from pydantic import Field

from emoexport.cascade_record import CascadeRecord
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
    soup: str = ""
    """Which soup of the members the passes are of, as `train.standing.SoupMethod` has it; empty for the members."""
    soup_sha256: str = ""
    """Of the weights of that soup."""
    selection: Comparison

    @property
    def passes(self) -> int:
        """How many a face takes."""
        return len(self.choice.passes)


class Timing(Record):
    """Calls of an engine with some passes, timed here."""

    engine: str
    """Runtime and precision, or the name of a cascade."""
    passes: float
    """That a face takes; of a cascade on average."""
    batch: int
    latency_ms: float
    """Median of a call, end to end."""
    slow_ms: float
    """The 99th percentile: what a call of a cascade takes depends on the faces."""
    ms_a_face: float
    """Mean of the calls, shared among their faces."""
    times_full: Ratio
    """As fast as the same engine with the full vote, in turn."""


class Plan(SealedRecord):
    """`plan.json`."""

    written_by = "emoexport plan"
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
    best_member: Comparison
    """One pass of the member that is right most often with the face as it is, on the same faces."""
    candidates: tuple[Candidate, ...]
    """From one pass to all."""
    chosen: int | None
    """Index of the candidate that came to the final; None if none is likely to hold."""
    exits: Comparison | None = None
    """A cascade that came to the final, each half of the faces that choose judged by a fit on the other half."""
    winner: Literal["passes", "cascade"] | None = None
    """Of the final: what takes least on the faces that choose; None if nothing came to it."""
    engine: str | None = None
    precision: str | None = None
    batch: int
    """Faces in a call."""
    timings: tuple[Timing, ...]
    confirmation: Comparison | None = None
    """Of the winner's engine itself on the faces that had no part in the choice."""
    cascade: CascadeRecord | None = None
    """The winner as it stands in the bundle, certified on these faces; None unless a cascade won."""
    bundle: str
    """The bundle, relative to the plan."""
    verdict: Verdict
    reasons: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    """What was not tried and why, a sentence each."""
    machine: dict[str, str]

    @property
    def choice(self) -> Choice | None:
        """What is to be built; None if there is nothing, or it is a cascade, which the bundle has."""
        if self.chosen is None or self.winner != "passes":
            return None
        return self.candidates[self.chosen].choice

    @property
    def selection(self) -> Comparison | None:
        """Of the winner, on the faces that chose it."""
        if self.winner == "cascade":
            return self.exits
        return None if self.chosen is None else self.candidates[self.chosen].selection

    @property
    def shrinkage_points(self) -> float | None:
        """By how much the gain is smaller where the winner was confirmed than where it was chosen."""
        if self.selection is None or self.confirmation is None:
            return None
        return round(self.selection.gain_points.value - self.confirmation.gain_points.value, 4)
