"""A MindSpore layer's state to and from canonical NumPy arrays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mindspore as ms
from mindspore import Parameter, Tensor

from rbn.backends.mindspore.layers import CalibratedNorm
from rbn_core.matching import State, match
from rbn_core.names import NAMES


def to_numpy(layer: CalibratedNorm) -> State:
    """Copies of everything the layer stores, under canonical names; half precision becomes float32."""
    arrays = {canonical: _array(parameter) for canonical, parameter in stored(layer).items()}
    if "conv_weight" in arrays:  # MindSpore's own kernel of one axis has a second one of extent 1
        arrays["conv_weight"] = arrays["conv_weight"].reshape(layer.conv_shape)
    return arrays


def from_numpy(layer: CalibratedNorm, state: Mapping[str, Any]) -> None:
    """Load a state into the layer, in place; dtype and device stay the layer's.

    Args:
        layer: The layer to fill.
        state: Arrays under canonical names, exactly those that `to_numpy(layer)` has.

    Raises:
        RBNValueError: Names are missing or unexpected, or shapes are wrong; all are listed, nothing changes.
    """
    arrays, _ = match(state, {name: value.shape for name, value in to_numpy(layer).items()})
    tensors = {
        parameter: Tensor(arrays[name].reshape(parameter.shape)).astype(parameter.dtype)
        for name, parameter in stored(layer).items()
        if name in arrays
    }
    for parameter, tensor in tensors.items():
        parameter.set_data(tensor)


def stored(layer: CalibratedNorm) -> dict[str, Parameter]:
    """The layer's parameters and statistics under canonical names."""
    named = {canonical: _attribute(layer, path) for canonical, path in NAMES["mindspore"].items()}
    return {name: parameter for name, parameter in named.items() if parameter is not None}


def _attribute(cell: Any, path: str) -> Any:
    """What is at a dotted path below the cell, or `None`."""
    for part in path.split("."):
        cell = getattr(cell, part, None)
    return cell


def _array(parameter: Parameter) -> Any:
    tensor = parameter
    if tensor.dtype in (ms.bfloat16, ms.float16):
        tensor = tensor.astype(ms.float32)
    return tensor.asnumpy().copy()
