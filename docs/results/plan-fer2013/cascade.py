"""Certifies cascades on two score cubes, for many ways to split the second into selection and confirmation faces.

    python cascade.py cubes/validation cubes/test DATA [splits]

The faces of the first cube and half of the clean rows of the second fit; the other half certifies, and had no part in
the fit. A cube is a directory that `emoexport cube` wrote, and DATA what the second is of.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from emoexport.cascade_certificate import certify
from emoexport.cascade_fit import STAGE_SIZES, fit_cascade
from emoexport.cube import Cube
from emoexport.decision import Decision
from emoexport.table_format import markdown_table
from emoexport.train.audit import clean_rows
from emoexport.train.dataset import load_data

EPSILON, MAX_DROP, DELTA = 0.01, 0.005, 0.05
FEW_STAGES = (1, 2, 4, 8, 16, 40)


class Split(NamedTuple):
    """Scores `(N, K, V, L)` and true labels `(N,)` of the faces that fit, and of those that certify."""

    weights: NDArray[np.float64]
    """Of the full vote, `(K, V)`."""

    fitting: NDArray[np.float32]
    fitting_truth: NDArray[np.int64]
    confirming: NDArray[np.float32]
    confirming_truth: NDArray[np.int64]


def splits(validation: Cube, test: Cube, clean: NDArray[np.int64], count: int) -> Iterator[Split]:
    """Halves of the clean rows of the test cube, drawn at random, the validation faces added to the first."""
    for seed in range(count):
        first, second = np.array_split(np.random.default_rng(seed).permutation(clean), 2)
        yield Split(
            test.weights,
            np.concatenate([validation.scores, test.scores[first]]),
            np.concatenate([validation.labels, test.labels[first]]),
            test.scores[second],
            test.labels[second],
        )


def certified(split: Split, decision: Decision, *, rule: str, offsets: bool, sizes: tuple[int, ...]) -> float:
    """Passes a face on the confirmation half."""
    cascade = fit_cascade(
        split.fitting,
        split.fitting_truth,
        weights=split.weights,
        decision=decision,
        rule=rule,
        sizes=sizes,
        offsets=offsets,
    )
    claim = {"epsilon": EPSILON} if rule == "agreement" else {"max_drop": MAX_DROP}
    return certify(cascade, split.confirming, split.confirming_truth, delta=DELTA, **claim)[1].passes_per_face


def exact(split: Split, decision: Decision) -> float:
    """Passes a face where only faces leave whose decision nothing can turn."""
    cascade = fit_cascade(split.fitting, weights=split.weights, decision=decision, rule="exact")
    return float(cascade.run(split.confirming).passes.mean())


def main() -> None:
    """Read, certify, print a table and one line of JSON."""
    validation, test = (Cube.open(Path(name)) for name in sys.argv[1:3])
    clean = np.flatnonzero(clean_rows(load_data(sys.argv[3], size=48, channels=1))[test.record.split])
    count = int(sys.argv[4]) if len(sys.argv) > 4 else 40
    decision = Decision(labels=test.record.labels)
    found: dict[str, list[float]] = {}
    for split in splits(validation, test, clean, count):
        for sizes in (STAGE_SIZES, FEW_STAGES):
            for rule, offsets in (("agreement", False), ("accuracy", False), ("accuracy", True)):
                name = f"{rule}{', offsets' if offsets else ''}, {len(sizes) + 1} stages"
                passes = certified(split, decision, rule=rule, offsets=offsets, sizes=sizes)
                found.setdefault(name, []).append(passes)
        found.setdefault("exact", []).append(exact(split, decision))
    rows = [
        {
            "rule": name,
            "passes a face": f"{np.mean(passes):.2f}",
            "least": f"{min(passes):.2f}",
            "most": f"{max(passes):.2f}",
            "full vote for all": str(sum(one == test.scores[0, ..., 0].size for one in passes)),
        }
        for name, passes in found.items()
    ]
    print(f"Means over {count} splits of {len(clean):,} clean rows.\n\n{markdown_table(rows)}\n")
    print(json.dumps({name: [round(passes_of, 4) for passes_of in passes] for name, passes in found.items()}))


if __name__ == "__main__":
    main()
