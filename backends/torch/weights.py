"""A PyTorch layer's state to and from canonical NumPy arrays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from rbn.backends.torch.layers import CalibratedNorm
from rbn_core.matching import State, match
from rbn_core.names import NAMES


def to_numpy(layer: CalibratedNorm) -> State:
    """Copies of everything the layer stores, under canonical names; half precision becomes float32."""
    stored = layer.state_dict()
    return {canonical: _array(stored[name]) for canonical, name in NAMES["torch"].items() if name in stored}


def from_numpy(layer: CalibratedNorm, state: Mapping[str, Any]) -> None:
    """Load a state into the layer, in place; dtype and device stay the layer's.

    Args:
        layer: The layer to fill.
        state: Arrays under canonical names, exactly those that `to_numpy(layer)` has.

    Raises:
        RBNValueError: Names are missing or unexpected, or shapes are wrong; all are listed, nothing changes.
    """
    shapes = {name: value.shape for name, value in to_numpy(layer).items()}
    arrays, _ = match(state, shapes)
    layer.load_state_dict({NAMES["torch"][name]: torch.tensor(value) for name, value in arrays.items()})


def _array(tensor: torch.Tensor) -> Any:
    tensor = tensor.detach().cpu()
    if tensor.dtype in (torch.bfloat16, torch.float16):
        tensor = tensor.float()
    return tensor.numpy().copy()
