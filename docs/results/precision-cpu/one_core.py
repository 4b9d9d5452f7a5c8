"""What takes the time of a bundle's INT8 graph in OpenVINO on one core, and whether smaller calls are faster.

taskset -c 0 python docs/results/precision-cpu/one_core.py BUNDLE
"""

import functools
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import openvino

from emoexport.bundle import Bundle
from emoexport.engines.timing import interleave

CALLS = 5
FACES = 16


def main(path: str) -> None:
    """Milliseconds a face by kind of node, then by faces in a call."""
    bundle = Bundle.open(Path(path))
    shape = (FACES, *bundle.manifest.face_shape)
    faces = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    core, graph = openvino.Core(), str(bundle.graph("int8"))
    request = core.compile_model(graph, "CPU", {**options, "PERF_COUNT": True}).create_infer_request()
    request.infer({"faces": faces})
    spent: Counter[str] = Counter()
    for _ in range(CALLS):
        request.infer({"faces": faces})
        for node in request.profiling_info:
            spent[node.node_type] += node.real_time.total_seconds() * 1000 / CALLS / FACES
    for kind, milliseconds in spent.most_common(12):
        print(f"{milliseconds:8.3f} ms {100 * milliseconds / spent.total():5.1f} %  {kind}")
    request = core.compile_model(graph, "CPU", options).create_infer_request()

    def in_parts(size: int) -> None:
        for start in range(0, FACES, size):
            request.infer({"faces": faces[start : start + size]})

    samples = interleave({f"{size}": functools.partial(in_parts, size) for size in (1, 4, 8, 16)}, rounds=6)
    for size, times in samples.items():
        print(f"{np.median(times) / FACES:8.1f} ms a face, {size} in a call")


if __name__ == "__main__":
    main(sys.argv[1])
