import numpy as np
import onnx
import onnxruntime as ort
import pytest

from emoexport.errors import CheckFailed
from emoexport.opset17 import to_opset_17


@pytest.mark.parametrize("layout", ["bundle", pytest.param("stacked_bundle", marks=pytest.mark.slow)])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_it_says_the_same_in_opset_17(precision, layout, request, faces, tmp_path):
    source = request.getfixturevalue(layout).graph(precision)
    target = tmp_path / "model.onnx"
    to_opset_17(source, target)
    model = onnx.load(target)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 17)]
    operators = {node.op_type for node in model.graph.node}
    assert "Gelu" not in operators
    assert "Erf" in operators
    assert all(node.name for node in model.graph.node)
    sessions = [ort.InferenceSession(path, providers=["CPUExecutionProvider"]) for path in (source, target)]
    for count in (1, 5):
        wanted, found = (session.run(None, {"faces": faces[0][:count]}) for session in sessions)
        for right, answer in zip(wanted, found, strict=True):
            assert (right.shape, right.dtype) == (answer.shape, answer.dtype)
            assert np.abs(right.astype(float) - answer).max() <= 1e-5
    assert np.array_equal(wanted[1], found[1])


def test_an_operator_that_17_lacks_is_named(bundle, tmp_path):
    with pytest.raises(CheckFailed, match=r"model\.bf16\.onnx cannot be said in opset 17"):
        to_opset_17(bundle.graph("bf16"), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())
