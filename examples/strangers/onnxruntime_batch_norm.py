"""onnxruntime's BatchNormalization on a CPU, held to the reference."""

from typing import Any

import onnxruntime
from onnx import ModelProto
from onnx_node import DECLARED, FIXED, ONE_VALUE, stepping
from stranger import Stranger


def start(model: ModelProto) -> Any:
    """What runs a model."""
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run


subject = Stranger(
    "onnxruntime BatchNormalization",
    stepping(start),
    FIXED,
    forward_only=True,
    absent={"bn/*/bfloat16": "on a CPU: 'Could not find an implementation'"},
    expected_failures=DECLARED | {"bn/train/offset0/1x3*": ONE_VALUE},
)
