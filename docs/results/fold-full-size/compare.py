"""Hold bundles of one run against its PyTorch reference: one face a call, all in turn.

python docs/results/fold-full-size/compare.py DATA SPLIT FACES BUNDLE...

Prints one JSON document: by bundle the largest difference of a probability, and times.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np

from emoexport.bundle import Bundle
from emoexport.engines import BACKENDS, open_engine
from emoexport.engines.machine import describe_machine
from emoexport.engines.timing import ratio_of
from emoexport.pipeline import open_judge, open_reference
from emoexport.run_faces import data_of_run, drawn_faces


def main(data: str, split: str, count: int, paths: list[Path]) -> None:
    """The first face warms up and is not timed; its probabilities are compared all the same."""
    bundles = {path.name: Bundle.open(path) for path in paths}
    first = next(iter(bundles.values()))
    reference, run, record = open_reference(first)
    faces, _ = drawn_faces(data_of_run(run, record, data), split, count)
    engines = {"reference": open_judge(first, reference)}
    for name, bundle in bundles.items():
        manifest = bundle.manifest
        engines[name] = open_engine(
            BACKENDS["onnxruntime"],
            bundle.graph("fp32"),
            precision="fp32",
            face_shape=manifest.face_shape,
            max_batch=manifest.max_batch,
        )
    seconds = {name: [] for name in engines}
    found = {name: [] for name in engines}
    for face in faces.images:
        for name, engine in engines.items():
            start = time.perf_counter()
            found[name].append(engine.run(face[None]))
            seconds[name].append(time.perf_counter() - start)
            print(name, round(seconds[name][-1], 1), file=sys.stderr, flush=True)
    wanted = np.concatenate([outcome.probabilities for outcome in found["reference"]])
    report = {"faces": len(wanted), "data_sha256": faces.sha256(), "machine": describe_machine(), "engines": {}}
    for name, outcomes in found.items():
        probabilities = np.concatenate([outcome.probabilities for outcome in outcomes])
        times = np.array(seconds[name][1:])
        report["engines"][name] = {
            "largest_difference": float(np.abs(probabilities - wanted).max()),
            "same_labels": int((probabilities.argmax(axis=1) == wanted.argmax(axis=1)).sum()),
            "seconds_a_face": [round(float(value), 2) for value in times],
            "times_reference": ratio_of(np.array(seconds["reference"][1:]), times).model_dump(),
        }
    report["largest_probability"] = float(wanted.max())
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), [Path(name) for name in sys.argv[4:]])
