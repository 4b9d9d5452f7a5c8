"""How inspectors write the types of numbers, and what they come to."""

import json

import pytest

from emoexport.engines.number_types import layers_of, narrowest, share_of_time

VERSION_8 = {
    "Layers": [
        {
            "Name": "members.0.conv + members.0.relu",
            "LayerType": "CaskConvolution",
            "Inputs": [{"Name": "a", "Format/Datatype": "Thirty-two wide channel vectorized row major Int8 format"}],
            "Outputs": [{"Name": "b", "Format/Datatype": "Row major linear FP16 format"}],
        },
        {"Name": "show", "Inputs": [{"Name": "faces", "Format/Datatype": "Row major linear FP32"}], "Outputs": []},
    ],
    "Bindings": ["faces"],
}
VERSION_10 = {
    "Layers": [
        {
            "Name": "__myl_MulAdd_3",
            "LayerType": "kgen",
            "Inputs": [{"Name": "a", "Location": "Device", "Dimensions": [1, 8], "Format/Datatype": "Half"}],
            "Outputs": [{"Name": "b", "Format/Datatype": "Half"}],
            "Metadata": "[ONNX Layer: members.0.stem/conv2d]\x1f[ONNX Layer: members.0.norm]",
        },
        {
            "Name": "__myl_Cast_1",
            "LayerType": "kgen",
            "Inputs": [{"Name": "faces", "Format/Datatype": "UInt8"}],
            "Outputs": [{"Name": "c", "Format/Datatype": "Float"}],
            "Metadata": "[ONNX Layer: show/_to_copy]",
        },
    ],
    "Bindings": ["faces"],
}


@pytest.mark.parametrize(
    ("written", "number"),
    [
        *(
            ("Float", "fp32"),
            ("Row major linear FP32", "fp32"),
            ("Half", "fp16"),
            ("BFloat16", "bf16"),
            ("BF16", "bf16"),
        ),
        *(("Int8", "int8"), ("FP8", "fp8"), ("Channel major FP16 format where channel % 8 == 0", "fp16")),
    ],
)
def test_types_are_read_as_they_are_written(written, number):
    text = json.dumps({"Layers": [{"Name": "x", "Inputs": [], "Outputs": [{"Name": "y", "Format/Datatype": written}]}]})
    assert layers_of(text)[0].numbers == {number}


@pytest.mark.parametrize("written", ["UInt8", "Int64", "Bool", "Int32"])
def test_whole_numbers_are_none_of_them(written):
    text = json.dumps({"Layers": [{"Name": "x", "Inputs": [{"Format/Datatype": written}], "Outputs": []}]})
    assert layers_of(text)[0].numbers == frozenset()


def test_layers_of_members_are_known_by_name_or_metadata():
    assert [layer.is_of_members for layer in layers_of(json.dumps(VERSION_8))] == [True, False]
    assert [layer.is_of_members for layer in layers_of(json.dumps(VERSION_10))] == [True, False]
    first, second = layers_of(json.dumps(VERSION_8))
    assert (narrowest(first.numbers), narrowest(second.numbers)) == ("int8", "fp32")


def test_an_engine_without_details_has_names_only():
    layers = layers_of(json.dumps({"Layers": ["members.0.conv", "vote"], "I/O Tensors": []}))
    assert [layer.numbers for layer in layers] == [frozenset(), frozenset()]
    assert share_of_time(layers, {"members.0.conv": 1.0}) == {}


@pytest.mark.parametrize("text", ["[]", "{}", '{"Layers": 3}', "no JSON"])
def test_what_is_no_answer_of_an_inspector(text):
    with pytest.raises(ValueError, match=r"no layers|Expecting value"):
        layers_of(text)


def test_time_is_that_of_the_members():
    layers = layers_of(json.dumps(VERSION_10))
    assert share_of_time(layers, {"__myl_MulAdd_3": 3.0, "__myl_Cast_1": 2.0}) == {"fp16": 1.0}
    assert share_of_time(layers, {"__myl_MulAdd_3": 1.0, "{ForeignNode[members.0]}": 9.0}) == {}
    assert share_of_time(layers, {}) == {}
