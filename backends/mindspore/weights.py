"""A MindSpore layer's state to and from canonical NumPy arrays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mindspore as ms
from mindspore import Parameter, Tensor

from rbn.backends.mindspore.layers import RBN
from rbn_core.names import NAMES
from rbn_core.weights import State, check_state


def to_numpy(layer: RBN) -> State:
    """Copies of everything the layer stores, under canonical names; half precision becomes float32."""
    return {canonical: _array(stored) for canonical, stored in _stored(layer).items()}


def from_numpy(layer: RBN, state: Mapping[str, Any]) -> None:
    """Load a state into the layer, in place; dtype and device stay the layer's.

    Args:
        layer: The layer to fill.
        state: Arrays under canonical names, exactly those that `to_numpy(layer)` has.

    Raises:
        RBNValueError: Names are missing or unexpected, or shapes are wrong; all are listed, nothing changes.
    """
    stored = _stored(layer)
    arrays = check_state(state, {name: parameter.shape for name, parameter in stored.items()})
    tensors = {name: Tensor(array).astype(stored[name].dtype) for name, array in arrays.items()}
    for name, tensor in tensors.items():
        stored[name].set_data(tensor)


def _stored(layer: RBN) -> dict[str, Parameter]:
    """The layer's parameters and statistics under canonical names."""
    named = {name: getattr(layer, attribute, None) for name, attribute in NAMES["mindspore"].items()}
    return {name: parameter for name, parameter in named.items() if parameter is not None}


def _array(parameter: Parameter) -> Any:
    tensor = parameter
    if tensor.dtype in (ms.bfloat16, ms.float16):
        tensor = tensor.astype(ms.float32)
    return tensor.asnumpy().copy()
