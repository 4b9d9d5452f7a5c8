"""How fast matrix products of a ConvNeXt-Large at 224 px are here, alone and in turn: GFLOP/s by runtime.

python docs/results/fold-full-size/peak.py
"""

import functools

import numpy as np
import onnx
import onnxruntime
import openvino
import torch
from onnx import TensorProto, helper

from emoexport.engines.timing import interleave

SIZES = ((3136, 768, 3072), (3136, 3072, 768), (12544, 384, 1536), (784, 1536, 6144), (3136, 1536, 1536))
"""Rows, inputs and outputs of layers in the 16 pictures of one face."""


def product(inputs: int, outputs: int) -> bytes:
    """One matrix product as an ONNX graph."""
    rng = np.random.default_rng(0)
    weight = onnx.numpy_helper.from_array(rng.normal(0, 0.01, (inputs, outputs)).astype(np.float32), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", inputs])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", outputs])],
        [weight],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9).SerializeToString()


def main() -> None:
    """Print a line a size: the median of seven calls each."""
    for rows, inputs, outputs in SIZES:
        x = np.random.default_rng(1).normal(size=(rows, inputs)).astype(np.float32)
        graph = product(inputs, outputs)
        session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
        core = openvino.Core()
        request = core.compile_model(
            core.read_model(graph), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
        ).create_infer_request()
        rows_of, weight = torch.from_numpy(x), torch.randn(outputs, inputs) * 0.01
        calls = {
            "ONNX Runtime": functools.partial(session.run, None, {"x": x}),
            "OpenVINO": functools.partial(request.infer, {0: x}),
            "PyTorch": functools.partial(torch.nn.functional.linear, rows_of, weight),
            "PyTorch BF16": functools.partial(torch.nn.functional.linear, rows_of.bfloat16(), weight.bfloat16()),
        }
        times = interleave(calls, rounds=7, warmup=1)
        work = 2 * rows * inputs * outputs / 1e6
        print((rows, inputs, outputs), {name: round(work / float(np.median(spent))) for name, spent in times.items()})


if __name__ == "__main__":
    main()
