"""Hold engines of bundles of one run against its PyTorch reference: one face a call, all in turn.

python docs/results/fold-full-size/compare.py DATA SPLIT FACES BUNDLE[@ENGINE-PRECISION]...

Prints one JSON document: by engine the largest difference of a probability, and times. Without a name after it a
bundle is run by onnxruntime-fp32.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np

from emoexport.bundle import Bundle
from emoexport.engines.machine import describe_machine
from emoexport.engines.timing import ratio_of
from emoexport.opening import open_engines
from emoexport.run_faces import data_of_run, drawn_faces
from emoexport.sessions import open_judge, open_reference


def main(data: str, split: str, count: int, asked: list[str]) -> None:
    """The first face warms up and is not timed; its probabilities are compared all the same."""
    engines = {}
    for words in asked:
        path, _, name = words.partition("@")
        bundle, (backend, precision) = Bundle.open(Path(path)), (name or "onnxruntime-fp32").rsplit("-", 1)
        if not engines:
            reference, run, record = open_reference(bundle)
            faces, _ = drawn_faces(data_of_run(run, record, data), split, count)
            engines["reference"] = open_judge(bundle, reference)
        (engines[words],) = open_engines(bundle, engines=[backend], precisions=[precision])
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
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4:])
