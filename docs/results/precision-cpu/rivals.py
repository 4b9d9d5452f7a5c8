"""Time a bundle's engines and what else one could do with the same members, all in turn: one JSON document.

python docs/results/precision-cpu/rivals.py BUNDLE DATA [BATCH...]

Needs NNCF (`pip install nncf`). The rivals get more than their users would have: emoexport's views as one batch, and
for OpenVINO and NNCF one graph of all passes. They lack the rewrites, the choice of layers and the types in the graph.
"""

import functools
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nncf
import numpy as np
import openvino
import torch
import torch._inductor.config as inductor

from emoexport.bundle import Bundle
from emoexport.calibration import choose_faces
from emoexport.engines.machine import describe_machine, versions_of
from emoexport.engines.timing import interleave, ratio_of
from emoexport.fold import Fold
from emoexport.onnx_graph import export_fold
from emoexport.pipeline import open_engines, open_reference
from emoexport.run_faces import data_of_run
from emoexport.train.checkpoint import load_members

ROUNDS = 12
AGREEMENT_FACES = 512
REFERENCE = "PyTorch, eager loop, FP32"

Call = Callable[[np.ndarray], np.ndarray]


def compiled(model: Any, hint: str) -> Call:
    """OpenVINO, floating point in the precision of the hint."""
    options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": hint}
    request = openvino.Core().compile_model(model, "CPU", options).create_infer_request()
    return lambda faces: np.array(request.infer({"faces": faces})["probabilities"])


def inductor_bf16(fold: Fold) -> Call:
    """`torch.compile` with weights frozen, under autocast to BF16."""
    inductor.freezing = True
    function = torch.compile(fold, dynamic=False)

    def call(faces: np.ndarray) -> np.ndarray:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            return function(torch.from_numpy(faces))[0].float().numpy()

    return call


def everything(bundle: Bundle, data: str) -> tuple[dict[str, Call], np.ndarray]:
    """By name what is to be timed; and faces to run it on."""
    reference, run, record = open_reference(bundle)
    dataset = data_of_run(run, record, data)
    calibration = choose_faces(dataset, record, 128).images
    calls: dict[str, Call] = {REFERENCE: lambda faces: reference.run(faces).probabilities}
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "plain.onnx"
        unchanged = Fold(load_members(run)[1], reference.views, reference.decision)
        export_fold(unchanged, plain, face_shape=bundle.manifest.face_shape, max_batch=bundle.manifest.max_batch)
        calls["OpenVINO BF16, plain export"] = compiled(str(plain), "bf16")
        samples = nncf.Dataset([calibration[row : row + 1] for row in range(128)], lambda faces: {"faces": faces})
        for preset in nncf.QuantizationPreset:
            model = openvino.Core().read_model(str(plain))
            small = nncf.quantize(model, samples, preset=preset, subset_size=128)
            calls[f"NNCF INT8, {preset.value}"] = compiled(small, "f32")
            calls[f"NNCF INT8, {preset.value}, rest BF16"] = compiled(small, "bf16")
    for engine in open_engines(bundle):
        calls[f"emoexport, {engine.name}"] = lambda faces, engine=engine: engine.run(faces).probabilities
    calls["torch.compile BF16"] = inductor_bf16(Fold(load_members(run)[1], reference.views, reference.decision))
    return calls, dataset.split(dataset.evaluation_split()).images


def main(bundle: str, data: str, batches: list[int]) -> None:
    """The last thing printed is JSON; each line before it, one measurement."""
    calls, faces = everything(Bundle.open(Path(bundle)), data)
    report: dict[str, Any] = {"machine": {**describe_machine(), **versions_of("nncf")}, "results": []}
    some = faces[:AGREEMENT_FACES]
    found = {
        name: np.concatenate([call(some[row : row + batches[0]]) for row in range(0, len(some), batches[0])])
        for name, call in calls.items()
    }
    for batch in batches:
        times = interleave(
            {name: functools.partial(call, faces[:batch]) for name, call in calls.items()}, rounds=ROUNDS
        )
        for name, spent in times.items():
            same = found[name].argmax(axis=1) == found[REFERENCE].argmax(axis=1)
            row = {
                "engine": name,
                "batch": batch,
                "ms_a_face": round(float(np.median(spent)) / batch, 3),
                "times_reference": ratio_of(times[REFERENCE], spent).model_dump(),
                "times_as_fast_as": {
                    other: ratio_of(theirs, spent).model_dump()
                    for other, theirs in times.items()
                    if name.startswith("emoexport") and not other.startswith("emoexport")
                },
                "agreement": float(same.mean()),
                "largest_difference": float(np.abs(found[name] - found[REFERENCE]).max()),
            }
            report["results"].append(row)
            print(name, batch, row["ms_a_face"], row["times_reference"], row["agreement"], file=sys.stderr, flush=True)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], [int(word) for word in sys.argv[3:]] or [16, 1])
