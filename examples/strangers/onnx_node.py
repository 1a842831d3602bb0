"""ONNX's BatchNormalization as a model of one node, forward only, whatever runs it."""

from collections.abc import Callable
from typing import Any

import numpy as np
from onnx import ModelProto, helper

from rbn_core.config import Config

NAMES = ("X", "scale", "B", "input_mean", "input_var")
FIXED = {"running_var": "biased", "track_running_stats": True}
ATTRIBUTES = (
    "epsilon and momentum are attributes in float32: with powers of 2, which are exact in float32, these "
    "cases pass"
)
DECLARED = {
    "bn/train/*/float64": ATTRIBUTES,
    "bn/eval/offset0/*/float64": ATTRIBUTES,
    "bn/eval/offset10/*/float64": ATTRIBUTES,  # at 1000 they are within what the offset costs
    "bn/eval/[!o]*/float64": ATTRIBUTES,
}
ONE_VALUE = "the standard uses the population variance, which is 0 for one value"


def model(config: Config, training: bool, dtype: str, stored: str, opset: int) -> ModelProto:
    """A model of one node; before opset 14 training is what has more than one output."""
    outputs = ["Y", "running_mean", "running_var"] if training else ["Y"]
    options = {"epsilon": config.eps, "momentum": config.momentum}
    if opset >= 14:
        options["training_mode"] = int(training)
    node = helper.make_node("BatchNormalization", NAMES, outputs, **options)

    def value(name: str) -> Any:
        kind = dtype if name in ("X", "Y") else stored
        return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(kind)), None)

    graph = helper.make_graph([node], "batch_norm", [value(n) for n in NAMES], [value(n) for n in outputs])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def stepping(start: Callable[[ModelProto], Any], opset: int = 15) -> Any:
    """A step as a subject takes it, of what makes a runner of a model."""

    def step(x: Any, state: Any, config: Config, training: bool, cotangent: Any) -> Any:
        made = model(config, training, x.dtype.name, state["running_var"].dtype.name, opset)
        ones = np.ones_like(state["running_mean"])
        affine = state.get("gamma", ones), state.get("beta", 0 * ones)
        given = (x, *affine, state["running_mean"], state["running_var"])
        y, *statistics = start(made)(None, dict(zip(NAMES, given, strict=True)))
        kept = dict(zip(("running_mean", "running_var"), statistics, strict=False))
        return y, np.full_like(x, np.nan), {}, state | kept

    return step
