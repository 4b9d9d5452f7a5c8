"""The precisions a graph can have. To add one, write its converter and one row."""

from collections.abc import Mapping
from dataclasses import dataclass

from emoexport.errors import UsageError

__all__ = ["ONNX_NUMBERS", "PRECISIONS", "Precision", "Tolerance", "precision_of", "precisions_named", "size_of"]


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """How far an engine may be from the reference."""

    max_difference: float
    """Largest difference of any probability of any face."""
    mean_difference: float
    """Mean absolute difference of all probabilities."""
    max_drop: float
    """Largest loss of accuracy, as a share of the faces, that choosing among graphs allows."""


@dataclass(frozen=True, kw_only=True)
class Precision:
    """One row of `PRECISIONS`."""

    name: str
    title: str
    converter: str
    """`module:function(source, target, calibration, skip=())`, from the FP32 graph; empty for FP32 itself."""
    bits: int
    """Of the numbers that dense layers multiply."""
    number: str
    """The type of these numbers."""
    min_share: float
    """Of the members' multiplications, the least share in that type: of their count in a network that a compiler has
    read, of their time in an engine that it has made."""
    calibrated: bool = False
    """Whether the converter needs to know what the activations are on real faces."""
    for_gpus: bool = False
    """Whether nobody wants it on a CPU."""
    tolerance: Tolerance


_OF_8_BITS = Tolerance(max_difference=0.25, mean_difference=2e-2, max_drop=0.01)

PRECISIONS: Mapping[str, Precision] = {
    row.name: row
    for row in (
        Precision(
            name="fp32",
            title="FP32",
            converter="",
            bits=32,
            number="fp32",
            min_share=0.5,
            tolerance=Tolerance(max_difference=1e-5, mean_difference=1e-6, max_drop=0.001),
        ),
        Precision(
            name="fp16",
            title="FP16",
            converter="emoexport.half:to_fp16",
            bits=16,
            number="fp16",
            min_share=0.5,
            calibrated=True,
            tolerance=Tolerance(max_difference=2e-2, mean_difference=2e-3, max_drop=0.005),
        ),
        Precision(
            name="bf16",
            title="BF16",
            converter="emoexport.half:to_bf16",
            bits=16,
            number="bf16",
            min_share=0.5,
            tolerance=Tolerance(max_difference=5e-2, mean_difference=5e-3, max_drop=0.005),
        ),
        Precision(
            name="int8",
            title="INT8",
            converter="emoexport.quantize:to_int8",
            bits=8,
            number="int8",
            min_share=0.25,
            calibrated=True,
            tolerance=_OF_8_BITS,
        ),
        Precision(
            name="int8-fp16",
            title="INT8 + FP16",
            converter="emoexport.quantize:to_int8_fp16",
            bits=8,
            number="int8",
            min_share=0.25,
            calibrated=True,
            for_gpus=True,
            tolerance=_OF_8_BITS,
        ),
        Precision(
            name="fp8",
            title="FP8",
            converter="emoexport.quantize:to_fp8",
            bits=8,
            number="fp8",
            min_share=0.25,
            calibrated=True,
            for_gpus=True,
            tolerance=_OF_8_BITS,
        ),
    )
}


ONNX_NUMBERS: Mapping[str, str] = {
    "FLOAT": "fp32",
    "FLOAT16": "fp16",
    "BFLOAT16": "bf16",
    "INT8": "int8",
    "UINT8": "int8",
    "FLOAT8E4M3FN": "fp8",
}
"""ONNX's names of types of numbers, and ours."""


def precision_of(engine: str) -> str:
    """The precision that an engine's name ends with; `fp32` where it names none."""
    return max((name for name in PRECISIONS if engine.endswith(f"-{name}")), key=len, default="fp32")


def size_of(sizes: Mapping[str, int], engine: str) -> int:
    """Bytes of what an engine is opened from: by its own name, or else by the precision of its graph."""
    return sizes[engine] if engine in sizes else sizes[precision_of(engine)]


def precisions_named(names: list[str]) -> list[Precision]:
    """Look up precisions; FP32 comes first, since the others are made from its graph.

    Raises:
        UsageError: if a name is unknown.
    """
    unknown = [name for name in names if name not in PRECISIONS]
    if unknown:
        raise UsageError(f"'{unknown[0]}' is no precision; known are {', '.join(PRECISIONS)}.")
    return [row for row in PRECISIONS.values() if row.name == "fp32" or row.name in names]
