"""What else might make INT8 more exact: methods of calibration, corrected biases, equalised channels.

python docs/results/precision-cpu/trials.py BUNDLE DATA

Each graph is held against the FP32 graph on 1,000 validation faces. The last line is one JSON document.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from emoexport.bundle import Bundle
from emoexport.calib.record import Calibration
from emoexport.calib.sensitivity import cost_of
from emoexport.calib.thresholds import METHODS
from emoexport.calibration import calibrate, choose_faces
from emoexport.cli_options import console_of
from emoexport.engines import BACKENDS, open_engine
from emoexport.outcome import Outcome
from emoexport.quantize import feeds_of, layers_of, to_int8
from emoexport.run_faces import data_of_run
from emoexport.sessions import open_reference

FACES = 1000
SEEN = 32
"""Faces that means and largest values of channels are taken over."""


def seen(graph: Path, names: list[str], faces: np.ndarray, reduction: str) -> dict[str, np.ndarray]:
    """A mean or a largest value of each channel of tensors `(n, C, H, W)`, over faces."""
    model = ir.load(graph)
    values = ir.convenience.create_value_mapping(model.graph)
    for number, name in enumerate(names):
        axes = ir.Value(name=f"axes.{number}", const_value=ir.tensor([0, 2, 3], name=f"axes.{number}"))
        model.graph.register_initializer(axes)
        node = ir.node(reduction, [values[name], axes], {"keepdims": 0})
        model.graph.append(node)
        node.outputs[0].name, node.outputs[0].type = f"seen.{number}", ir.TensorType(ir.DataType.FLOAT)
        model.graph.outputs.append(node.outputs[0])
    with tempfile.NamedTemporaryFile(suffix=".onnx") as file:
        ir.save(model, file.name)
        session = ort.InferenceSession(file.name, providers=["CPUExecutionProvider"])
    outputs = [f"seen.{number}" for number in range(len(names))]
    found = [session.run(outputs, {"faces": faces[row : row + 4]}) for row in range(0, len(faces), 4)]
    merge = np.mean if reduction == "ReduceMean" else np.max
    return {name: merge([part[number] for part in found], axis=0) for number, name in enumerate(names)}


def with_corrected_biases(fp32: Path, int8: Path, out: Path, faces: np.ndarray) -> None:
    """Give each quantised convolution the mean output that it has in FP32 (Nagel et al. 2019, section 4.2)."""
    model = ir.load(int8)
    layers = [node for node in model.graph if node.op_type == "Conv" and str(node.inputs[1].name).endswith(".rounded")]
    names = [str(node.outputs[0].name) for node in layers]
    wanted, found = seen(fp32, names, faces, "ReduceMean"), seen(int8, names, faces, "ReduceMean")
    for node, name in zip(layers, names, strict=True):
        bias = node.inputs[2]
        corrected = ir.tensor(bias.const_value.numpy() + wanted[name] - found[name], name=f"{bias.name}.corrected")
        value = ir.Value(name=corrected.name, const_value=corrected)
        model.graph.register_initializer(value)
        node.replace_input_with(2, value)
    ir.save(model, out)


def with_equal_channels(fp32: Path, out: Path, faces: np.ndarray) -> int:
    """Bring the channels between convolution, ReLU and convolution to one range, which is exact (SmoothQuant's idea).

    Returns:
        How many pairs of convolutions there are.
    """
    model = ir.load(fp32)
    dense = set(layers_of(model.graph))
    pairs = []
    for second in dense:
        relu = second.inputs[0].producer()
        first = None if relu is None or relu.op_type != "Relu" else relu.inputs[0].producer()
        alone = first is not None and len(relu.outputs[0].uses()) == len(first.outputs[0].uses()) == 1
        if alone and first.op_type == second.op_type == "Conv":
            pairs.append((first, relu, second))
    largest = seen(fp32, [str(relu.outputs[0].name) for _, relu, _ in pairs], faces, "ReduceMax")
    for first, relu, second in pairs:
        range_ = np.maximum(largest[str(relu.outputs[0].name)], 1e-6)
        scale = (range_ / range_.max()) ** 0.5  # half of it goes into the weights, as SmoothQuant's alpha of 0.5
        weights = [(first, 1, 1 / scale[:, None, None, None]), (first, 2, 1 / scale), (second, 1, scale[:, None, None])]
        for node, place, factor in weights:
            old = node.inputs[place]
            new = ir.tensor((old.const_value.numpy() * factor).astype(np.float32), name=f"{old.name}.{node.name}.equal")
            value = ir.Value(name=new.name, const_value=new, type=old.type, shape=old.shape)
            model.graph.register_initializer(value)
            node.replace_input_with(place, value)
    ir.save(model, out)
    return len(pairs)


def main(path: str, data: str) -> None:
    """Each line but the last is one trial; the last is JSON."""
    bundle = Bundle.open(Path(path))
    _, run, record = open_reference(bundle)
    chosen = choose_faces(data_of_run(run, record, data), record, 512)
    validation = chosen.validation
    assert validation is not None
    validation = validation.take(np.random.default_rng(0).permutation(len(validation))[::-1][:FACES])
    fp32, results = bundle.graph("fp32"), {}

    def decided(graph: Path, precision: str) -> Outcome:
        shape = bundle.manifest.face_shape
        engine = open_engine(BACKENDS["openvino"], graph, precision=precision, face_shape=shape, max_batch=64)
        return engine.run_all(validation.images)

    before = decided(fp32, "fp32")

    def judge(name: str, graph: Path) -> None:
        now = decided(graph, "int8")
        cost = cost_of(before, now, validation.labels)
        results[name] = cost.model_dump()
        print(name, results[name], flush=True)

    with tempfile.TemporaryDirectory() as folder:
        for method in METHODS:
            found: Calibration = calibrate(fp32, feeds_of(fp32), chosen, method=method, console=console_of())
            graph, corrected = (Path(folder) / f"{method}{ending}.onnx" for ending in ("", ".corrected"))
            to_int8(fp32, graph, found)
            judge(method, graph)
            with_corrected_biases(fp32, graph, corrected, chosen.images[:SEEN])
            judge(f"{method}, biases corrected", corrected)
        equal, graph = Path(folder) / "equal.onnx", Path(folder) / "equal.int8.onnx"
        pairs = with_equal_channels(fp32, equal, chosen.images[:SEEN])
        to_int8(equal, graph, calibrate(equal, feeds_of(equal), chosen, method="min-max", console=console_of()))
        judge(f"min-max, channels equalised in {pairs} pairs of convolutions", graph)
    print(json.dumps({"faces": len(validation), "results": results}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
