"""Draw certificate.png: what certified engines lose of the reference's accuracy, and how many times as fast they are.

.venv/bin/python docs/images/draw_certificate.py docs/results/fer2013-cpu
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt

from emoexport.parity import ParityReport
from emoexport.svg import number_colour
from emoexport.throughput import SpeedReport


def main(results: Path) -> None:
    """Draw the certified engines of parity.json, on its last set of rows, with their best batch in bench.json."""
    parity, speed = (
        record.parse_json(results / name)
        for record, name in ((ParityReport, "parity.json"), (SpeedReport, "bench.json"))
    )
    certified = [engine.engine for engine in parity.engines if engine.verdict == "certified"]
    rows = parity.results[-1].rows
    shown = [result for result in parity.results if result.rows == rows and result.engine in certified]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 0.8 + 0.42 * len(shown)), layout="constrained", sharey=True)
    for height, result in enumerate(shown):
        colour, gain = number_colour(result.precision), result.evidence.gain_points
        left.plot([gain.low, gain.high], [height, height], color=colour, linewidth=2.5)
        left.plot(gain.value, height, "o", color=colour)
        left.plot([result.evidence.bound_points] * 2, [height - 0.2, height + 0.2], color="black", linewidth=1.5)
        tried = [one for one in speed.results if one.engine == result.engine and one.batch in parity.batches]
        best = max(tried, key=lambda one: one.faces_a_second)
        ratio = best.times_reference
        right.barh(height, ratio.value, color=colour, height=0.6)
        right.plot([ratio.low, ratio.high], [height, height], color="black", linewidth=1.5)
        told = (
            f"{ratio.value:.1f} [{ratio.low:.1f}, {ratio.high:.1f}], {best.faces_a_second:.0f} faces/s at {best.batch}"
        )
        right.text(ratio.high, height, f"  {told}", va="center", fontsize=9)
    limit = -parity.limits.max_drop_points
    left.axvline(limit, color="#d55e00", linestyle="--")
    left.axvline(0, color="grey", linewidth=0.8)
    left.set_yticks(range(len(shown)), [result.engine for result in shown])
    left.invert_yaxis()
    left.set_xlabel(f"points of accuracy against the reference, 95 % (n = {shown[0].accuracy.n:,}); dashed: the limit")
    right.axvline(1, color="grey", linewidth=0.8)
    right.set_xlabel("times as fast as the eager loop, 95 %")
    right.set_xlim(0, 1.75 * max(right.get_xlim()))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(Path(__file__).with_name("certificate.png"), dpi=110)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
