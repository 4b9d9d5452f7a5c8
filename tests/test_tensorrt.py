"""TensorRT's own parser and builder, which need no GPU in TensorRT-RTX: does it take the graphs, and in which types?

They show what TensorRT refuses. How fast and how right an engine is, only a GPU shows.
"""

from collections import Counter

import pytest

from emoexport.bundle import Bundle
from emoexport.precision import PRECISIONS

trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")

LOGGER = trt.Logger(trt.Logger.ERROR)

TYPES = {
    "fp32": {},
    "fp16": {"HALF"},
    "bf16": {"BF16"},
    "int8": {"INT8"},
    "int8-fp16": {"INT8", "HALF"},
    "fp8": {"FP8", "HALF"},
}
"""Of layers, beside FLOAT and those of whole numbers."""


@pytest.mark.parametrize("layout", ["branches", "stacked"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_tensorrt_parses_and_builds_every_graph(precision, layout, bundle: Bundle, stacked_bundle: Bundle):
    chosen = bundle if layout == "branches" else stacked_bundle
    builder = trt.Builder(LOGGER)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, LOGGER)
    parsed = parser.parse_from_file(str(chosen.graph(precision)))
    assert parsed, [parser.get_error(index).desc() for index in range(parser.num_errors)]
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    found = Counter(layer.get_output(0).dtype.name for layer in layers)
    whole = {"INT32", "INT64", "BOOL", "UINT8"}
    assert set(found) - whole == {"FLOAT", *TYPES[precision]}
    products = [
        layer.get_output(0).dtype.name
        for layer in layers
        if layer.type in (trt.LayerType.CONVOLUTION, trt.LayerType.MATRIX_MULTIPLY)
        and layer.name.startswith("members.")
    ]
    assert products
    if "HALF" in TYPES[precision]:
        assert set(products) == {"HALF"}
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    profile.set_shape("faces", (1, 32, 32, 1), (4, 32, 32, 1), (64, 32, 32, 1))
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    assert engine is not None
    assert engine.nbytes > 0
