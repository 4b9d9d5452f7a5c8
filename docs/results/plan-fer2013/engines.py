"""Cascades on an engine: passes a face, and milliseconds against the whole fold on the same engine.

    python engines.py BUNDLE DATA > engines.md

For each claim a cascade is fitted on the validation faces and certified on the clean rows of the public test, as
`emoexport cascade` does, for calls of so many faces. The bundle keeps the last of each kind.
"""

import sys
from pathlib import Path

from rich.console import Console

from emoexport.bundle import Bundle
from emoexport.cascade_claim import Claim
from emoexport.cascade_record import CascadeRecord
from emoexport.cascading import make_cascade
from emoexport.table_format import markdown_table, with_interval

ENGINE = {"engine": "openvino-throughput", "precision": "int8"}
CLAIMS = {
    "exact": (Claim.of_goals(None, None, exact=True), (16,)),
    "0.5 points, no offsets": (Claim.of_goals(None, 0.5, offsets=False), (16,)),
    "0.5 points": (Claim.of_goals(None, 0.5), (256, 16)),
    "1 % of labels": (Claim.of_goals(1.0, None), (256, 16)),
}
"""And the faces in their calls."""


def row(claim: str, found: CascadeRecord) -> dict[str, str]:
    """One cascade."""
    return {
        "may lose": claim,
        "faces a call": str(found.timing.batch),
        "stages": str(len(found.cascade.stages)),
        "passes a face": f"{found.passes_per_face:.2f}",
        "ms a face": f"{found.timing.ms_a_face:.2f}",
        "whole fold": f"{found.timing.full_ms_a_face:.2f}",
        "times as fast": with_interval(found.timing.times_full, 1),
        "accuracy, points": with_interval(found.shown.gain_points, 2, sign=True),
        "other labels %": with_interval(found.shown.disagreement_pct, 2),
        "verdict": found.verdict,
    }


def main() -> None:
    """Make them all, and print a table."""
    bundle, rows = Bundle.open(Path(sys.argv[1])), []
    for name, (claim, batches) in CLAIMS.items():
        for batch in batches:
            settings = {"data": sys.argv[2], "split": "public_test", "batch": batch}
            found = make_cascade(bundle, claim, **ENGINE, **settings, console=Console(stderr=True))
            rows.append(row(name, found))
    about = f"On {found.shown_on}, fitted on {found.fitted_on}."
    print(f"# Cascades on {found.backend}-{found.precision}\n\n{about}\n\n{markdown_table(rows)}")


if __name__ == "__main__":
    main()
