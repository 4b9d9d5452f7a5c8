"""Time a bundle's engines and what else one could do with the same members, all in turn: one JSON document.

python docs/results/precision-cpu/rivals.py BUNDLE DATA [BATCH...]

Needs NNCF (`pip install nncf`). The rivals get more than their users would have: emoexport's views as one batch, and
for OpenVINO and NNCF one graph of all passes. They lack the rewrites, the choice of layers and the types in the graph.
"""

import functools
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
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
from emoexport.opening import open_engines
from emoexport.run_faces import data_of_run
from emoexport.sessions import open_reference
from emoexport.train.checkpoint import load_members
from emoexport.train.dataset import Faces

ROUNDS = 15
AGREEMENT_FACES = 1000
CALIBRATION_FACES = 128
REFERENCE = "PyTorch, eager loop, FP32"

Call = Callable[[np.ndarray], np.ndarray]


def openvino_call(model: Any, precision: str, mode: str) -> Call:
    """OpenVINO in one of its two modes, floating point in the precision of the hint.

    Faces go in as many requests as it has streams, as its documentation advises for throughput.
    """
    options = {"PERFORMANCE_HINT": mode, "INFERENCE_PRECISION_HINT": precision}
    compiled = openvino.Core().compile_model(model, "CPU", options)
    requests = [compiled.create_infer_request() for _ in range(compiled.get_property("NUM_STREAMS"))]

    def call(faces: np.ndarray) -> np.ndarray:
        parts = np.array_split(faces, min(len(requests), len(faces)))
        for request, part in zip(requests, parts, strict=False):
            request.start_async({"faces": part})
        found = []
        for request, _ in zip(requests, parts, strict=False):
            request.wait()
            found.append(np.array(request.get_tensor("probabilities").data))
        return np.concatenate(found)

    return call


def inductor_bf16(fold: Fold) -> Call:
    """`torch.compile` with weights frozen, under autocast to BF16."""
    inductor.freezing = True
    function = torch.compile(fold, dynamic=False)

    def call(faces: np.ndarray) -> np.ndarray:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            return function(torch.from_numpy(faces))[0].float().numpy()

    return call


def by_nncf(plain: Path, calibration: Faces, validation: Faces) -> Iterator[tuple[str, Any]]:
    """NNCF's INT8 models of the plain export: its fastest preset, and that held to its usual accuracy."""
    count = min(CALIBRATION_FACES, len(calibration))
    samples = nncf.Dataset([calibration.images[row : row + 1] for row in range(count)], lambda faces: {"faces": faces})
    preset = nncf.QuantizationPreset.PERFORMANCE
    model = openvino.Core().read_model(str(plain))
    yield "NNCF INT8, performance", nncf.quantize(model, samples, preset=preset, subset_size=count)

    def accuracy(model: Any, items: Any) -> float:
        right = [int(model({"faces": faces})["label"][0]) == truth for faces, truth in items]
        return float(np.mean(right))

    judged = [(validation.images[row : row + 1], int(validation.labels[row])) for row in range(len(validation))]
    yield (
        "NNCF INT8, accuracy control",
        nncf.quantize_with_accuracy_control(
            openvino.Core().read_model(str(plain)),
            calibration_dataset=samples,
            validation_dataset=nncf.Dataset(judged, lambda item: {"faces": item[0]}),
            validation_fn=accuracy,
            max_drop=0.01,
            preset=preset,
            subset_size=count,
        ),
    )


def everything(bundle: Bundle, data: str) -> tuple[dict[str, Call], np.ndarray]:
    """By name what is to be timed; and faces to run it on."""
    reference, run, record = open_reference(bundle)
    dataset = data_of_run(run, record, data)
    chosen = choose_faces(dataset, record, CALIBRATION_FACES)
    assert chosen.validation is not None
    validation = chosen.validation.take(np.arange(min(500, len(chosen.validation))))
    calibration = Faces(
        images=chosen.images, labels=np.zeros(len(chosen.images), int), flagged=np.zeros(len(chosen.images), bool)
    )
    calls: dict[str, Call] = {REFERENCE: lambda faces: reference.run(faces).probabilities}
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "plain.onnx"
        unchanged = Fold(load_members(run)[1], reference.views, reference.decision)
        export_fold(unchanged, plain, face_shape=bundle.manifest.face_shape, max_batch=bundle.manifest.max_batch)
        for mode in ("LATENCY", "THROUGHPUT"):
            calls[f"OpenVINO BF16, plain export, {mode.lower()}"] = openvino_call(str(plain), "bf16", mode)
        for name, model in by_nncf(plain, calibration, validation):
            for mode in ("LATENCY", "THROUGHPUT"):
                calls[f"{name}, {mode.lower()}"] = openvino_call(model, "f32", mode)
            if "performance" in name:
                calls[f"{name}, rest BF16, throughput"] = openvino_call(model, "bf16", "THROUGHPUT")
    for engine in open_engines(bundle):
        calls[f"emoexport, {engine.name}"] = lambda faces, engine=engine: engine.run(faces).probabilities
    calls["torch.compile BF16"] = inductor_bf16(Fold(load_members(run)[1], reference.views, reference.decision))
    return calls, dataset.split(dataset.evaluation_split()).images


def main(bundle: str, data: str, batches: list[int]) -> None:
    """The last thing printed is JSON; each line before it, one measurement."""
    calls, faces = everything(Bundle.open(Path(bundle)), data)
    report: dict[str, Any] = {"machine": {**describe_machine(), **versions_of("nncf")}, "results": []}
    some = faces[:AGREEMENT_FACES]
    steps = range(0, len(some) - len(some) % batches[0], batches[0])
    found = {
        name: np.concatenate([call(some[row : row + batches[0]]) for row in steps]) for name, call in calls.items()
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
                "samples_ms": [round(value, 3) for value in spent.tolist()],
                "times_reference": ratio_of(times[REFERENCE], spent).model_dump(),
                "times_as_fast_as": {
                    other: ratio_of(theirs, spent).model_dump()
                    for other, theirs in times.items()
                    if name.startswith("emoexport") and not other.startswith("emoexport")
                },
                "faces": len(same),
                "agreement": float(same.mean()),
                "largest_difference": float(np.abs(found[name] - found[REFERENCE]).max()),
            }
            report["results"].append(row)
            print(name, batch, row["ms_a_face"], row["times_reference"], row["agreement"], file=sys.stderr, flush=True)
    print(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], [int(word) for word in sys.argv[3:]] or [16, 1])
