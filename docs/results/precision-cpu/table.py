"""The document that `rivals.py` prints, as a table.

python docs/results/precision-cpu/table.py rivals.json
"""

import json
import sys
from pathlib import Path


def main(path: str) -> None:
    """Markdown, fastest at 16 faces last."""
    results = json.loads(Path(path).read_text(encoding="utf-8").splitlines()[-1])["results"]
    rows = {batch: {row["engine"]: row for row in results if row["batch"] == batch} for batch in (1, 16)}
    print("| engine | 1 face, ms | times the eager loop | 16 faces, ms a face | times the eager loop | same label |")
    print("|---|---|---|---|---|---|")
    for name in sorted(rows[16], key=lambda name: -rows[16][name]["ms_a_face"]):
        cells = [name]
        for batch in (1, 16):
            row = rows[batch][name]
            ratio = row["times_reference"]
            times = f"{ratio['value']:.1f} [{ratio['low']:.1f}, {ratio['high']:.1f}]"
            cells += [f"{row['ms_a_face']:.1f}", times]
        print("| " + " | ".join([*cells, f"{100 * rows[16][name]['agreement']:.1f} %"]) + " |")
    for batch in (1, 16):
        ours = min((row for name, row in rows[batch].items() if "emoexport" in name), key=lambda row: row["ms_a_face"])
        print(f"\n{ours['engine']}, {batch} faces a call, times as fast as")
        for name, ratio in sorted(ours["times_as_fast_as"].items(), key=lambda item: item[1]["value"]):
            print(f"- {name}: {ratio['value']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]")


if __name__ == "__main__":
    main(*sys.argv[1:])
