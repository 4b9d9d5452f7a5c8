"""`reports/bench.json`: how fast every engine of a bundle is, and what changed since an earlier one."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from emoexport.config import Record
from emoexport.engines.memory_probe import Memory
from emoexport.engines.others import BUSY_CORES
from emoexport.engines.timing import (
    UNSTABLE_PCT,
    Latency,
    Ratio,
)

__all__ = [
    "REFERENCE",
    "Change",
    "EngineSpeed",
    "Planned",
    "SpeedReport",
    "best_of",
    "changes",
    "lost_engines",
    "unlike",
]

REFERENCE = "torch-fp32"
"""What the loop of `TorchEngine` is called."""


@dataclass(frozen=True, kw_only=True)
class Planned:
    """Something that a bench times, or would."""

    name: str
    title: str
    problem: str = ""
    """Why it is skipped; empty if it is not."""


class EngineSpeed(Record):
    """One engine at one batch size."""

    engine: str
    batch: int
    latency_ms: Latency
    """Of a call, end to end from uint8 faces in memory to outcomes."""
    ms_a_face: float
    """Median."""
    faces_a_second: float
    passes_a_second: float
    times_reference: Ratio
    share_of_peak: float | None = None
    """Of the operations a second that a large matrix product reaches here at this precision; None where not known."""
    split_ms: tuple[float, float, float] | None = None
    """Of a call before, in and after what the runtime computes, medians; None where the engine cannot tell."""
    cores: float | None = None
    """How many were busy during the call: processor time of all threads over its own, those included with which another
    engine waits in a loop. None in older reports."""
    others_cores: float | None = None
    """How many other processes kept busy meanwhile; None where that was too short to tell, and in older reports."""
    uncaptured: str | None = None
    """Why calls are not replayed as CUDA graphs; empty where they are, None of engines that have none to replay."""
    samples_ms: tuple[float, ...]

    @property
    def unstable(self) -> bool:
        """Whether the calls vary so much, or others worked so much, that their median says little."""
        return self.latency_ms.spread_pct > UNSTABLE_PCT or (self.others_cores or 0.0) > BUSY_CORES

    @property
    def compute_ms(self) -> float | None:
        """What the runtime computes alone takes, without what goes in and comes out; None where it cannot tell."""
        return None if self.split_ms is None else self.split_ms[1]


class SpeedReport(Record):
    """`reports/bench.json`."""

    written_by = "emoexport bench"
    schema_version: Literal[1] = 1
    created: str
    bundle_digest: str
    passes_a_face: int
    results: tuple[EngineSpeed, ...]
    gemm_peak_tops: dict[str, float] = Field(default_factory=dict)
    """By type of number, 10^12 operations a second of a large matrix product here."""
    size_bytes: dict[str, int]
    """Of a graph, by precision; of a package, by engine."""
    load_s: dict[str, float] = Field(default_factory=dict)
    """Seconds that each engine took to open."""
    memory: dict[str, Memory] = Field(default_factory=dict)
    """Of each engine in a process of its own."""
    threads: int | None = None
    """That each runtime was told to use; None where it chose itself: then `cores` of the results tells."""
    states: dict[str, dict[str, str]] = Field(default_factory=dict)
    """Clocks, governor and load of the machine, `before` and `after` all was timed."""
    failures: dict[str, str] = Field(default_factory=dict)
    """By engine and batch size that it failed at, the first line of why; it was not called from there on."""
    notes: tuple[str, ...] = ()
    """What a reader of the figures must know."""
    machine: dict[str, str]


class Change(Record):
    """An engine at a batch size, now and in an earlier report."""

    engine: str
    batch: int
    before: Ratio
    now: Ratio
    """Times the reference, each in its own run."""

    @property
    def is_slower(self) -> bool:
        """Whether the intervals lie apart, and now lower."""
        return self.now.high < self.before.low

    @property
    def is_faster(self) -> bool:
        """The other way round."""
        return self.now.low > self.before.high


def unlike(now: SpeedReport, before: SpeedReport) -> list[str]:
    """What else differs between two reports than time, a sentence each: ratios then compare other things."""
    found = []
    if now.bundle_digest != before.bundle_digest:
        found.append("The earlier report is of another bundle.")
    for name in ("processor", "gpu"):
        here, there = now.machine.get(name, "none"), before.machine.get(name, "none")
        if here != there:
            found.append(f"The earlier report is of another machine: its {name} was {there}; here is {here}.")
    return found


def lost_engines(now: SpeedReport, before: SpeedReport) -> list[str]:
    """Engines that an earlier report has at a batch size at which this one has none of them."""
    timed = {(result.engine, result.batch) for result in now.results}
    batches = {result.batch for result in now.results}
    lost = [one.engine for one in before.results if one.batch in batches and (one.engine, one.batch) not in timed]
    return list(dict.fromkeys(lost))


def changes(now: SpeedReport, before: SpeedReport) -> list[Change]:
    """Hold a report against an earlier one, by the ratio to the reference of each run: machines have slow days.

    Engines and batch sizes that only one of them has are left out.
    """
    earlier = {(result.engine, result.batch): result.times_reference for result in before.results}
    return [
        Change(engine=result.engine, batch=result.batch, before=earlier[key], now=result.times_reference)
        for result in now.results
        if (key := (result.engine, result.batch)) in earlier and result.engine != REFERENCE
    ]


def best_of(results: Sequence[EngineSpeed]) -> list[EngineSpeed]:
    """Of each engine the batch size at which it decides about most faces a second, in the order of the results."""
    best: dict[str, EngineSpeed] = {}
    for row in results:
        if row.engine not in best or row.faces_a_second > best[row.engine].faces_a_second:
            best[row.engine] = row
    return list(best.values())
