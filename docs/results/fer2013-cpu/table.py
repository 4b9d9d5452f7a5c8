"""Print the table of this page: certificates beside times of calls with 16 faces; and the best engine against rivals.

python docs/results/fer2013-cpu/table.py
"""

from pathlib import Path

import numpy as np

from emoexport.engines.timing import ratio_of
from emoexport.parity import EngineParity, ParityReport
from emoexport.table_format import percent, with_interval
from emoexport.throughput import EngineSpeed, SpeedReport

HERE, BATCH = Path(__file__).parent, 16
COLUMNS = (
    "engine",
    "precision",
    "accuracy % [95 %]",
    "no worse than",
    "other labels",
    "multiplies in",
    "times the loop",
)


def main() -> None:
    """Rows in Markdown, of clean rows; then how many times as fast the fastest is as each rival."""
    parity = ParityReport.parse_json(HERE / "parity.json")
    speeds = [one for name in ("bench", "rivals") for one in SpeedReport.parse_json(HERE / f"{name}.json").results]
    timed = {one.engine: one for one in speeds if one.batch == BATCH}
    clean = [result for result in parity.results if result.rows == "clean"]
    print_row(*COLUMNS, "MB", "verdict")
    print_row(*["---"] * (len(COLUMNS) + 2))
    print_row("PyTorch", "fp32", percent(clean[0].reference_accuracy, 1), "", "", "fp32", "1", "", "reference")
    for result in clean:
        print_engine(parity, result, timed[result.engine])
    best = max((timed[result.engine] for result in clean), key=lambda one: one.faces_a_second)
    for rival in (one for one in timed.values() if one.engine not in {result.engine for result in clean}):
        ratio = ratio_of(np.array(rival.samples_ms), np.array(best.samples_ms))
        print(f"{best.engine} against {rival.engine}: {with_interval(ratio, 2)}")


def print_engine(parity: ParityReport, result: EngineParity, speed: EngineSpeed) -> None:
    """One engine."""
    engine = next(one for one in parity.engines if one.engine == result.engine)
    evidence = result.evidence
    print_row(
        result.engine.removesuffix(f"-{result.precision}"),
        result.precision,
        percent(result.accuracy, 1),
        f"{evidence.bound_points:+.2f}",
        f"at most {100 * evidence.disagreement_bound:.2f} %",
        ", ".join(f"{number} {100 * part:.0f} %" for number, part in engine.time_share.items()),
        with_interval(speed.times_reference, 1),
        f"{parity.size_bytes[result.precision] / 1e6:.1f}",
        engine.verdict,
    )


def print_row(*cells: str) -> None:
    """A row in Markdown."""
    print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
