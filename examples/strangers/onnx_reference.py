"""ONNX's reference implementation of BatchNormalization, held to the reference of this project."""

from typing import Any

from findings import Finding, declared
from onnx import ModelProto
from onnx.reference import ReferenceEvaluator
from onnx_node import ATTRIBUTES, DECLARED, FIXED, ONE_VALUE, stepping
from stranger import Stranger

HALF = Finding(
    "in training with X in half precision the statistics are computed in half precision, where the standard "
    "says float32 for float16, and are returned in half precision with any type of input_mean: in float16 "
    "the variance is infinite where the squared deviations add up to more than 65504, and Y is B",
    "onnx_half.py",
    ("bn/train/*/float16", "bn/train/*/bfloat16"),
)
BLENDED = Finding(
    "before opset 14 a node with one output normalizes with running statistics that already contain the "
    "batch's, a tenth with the default momentum; opsets 7 and 8 raise a TypeError",
    "onnx_opset_9.py",
    (
        "bn/eval/[!o]*",
        "bn/eval/offset10*",
        "bn/eval/offset0/[!3]*",
        "bn/eval/offset0/3x4x2x3/[!m]*",
        "bn/eval/offset0/3x4x2x3/momentum=0*",  # with 1 nothing is mixed in
    ),
    "https://github.com/onnx/onnx/pull/8442",
)
FINDINGS = {"subject": (HALF,), "opset9": (BLENDED,)}


def start(model: ModelProto) -> Any:
    """What runs a model."""
    return ReferenceEvaluator(model).run


subject = Stranger(
    "onnx.reference BatchNormalization",
    stepping(start),
    FIXED,
    forward_only=True,
    expected_failures=declared([HALF]) | DECLARED | {"bn/train/offset0/1x3*": ONE_VALUE},
)
opset9 = Stranger(
    "onnx.reference BatchNormalization of opset 9",
    stepping(start, opset=9),
    FIXED,
    forward_only=True,
    absent={"bn/train/*": "has no outputs but Y"},
    expected_failures=declared([BLENDED]) | {"bn/eval/*/momentum=1.0/float64": ATTRIBUTES},
)
