"""A Jittor layer's state to and from canonical NumPy arrays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jittor as jt

from rbn.backends.jittor.functional import at_least_float32
from rbn.backends.jittor.layers import CalibratedNorm
from rbn_core.matching import State, match
from rbn_core.names import NAMES


def to_numpy(layer: CalibratedNorm) -> State:
    """Copies of everything the layer stores, under canonical names; half precision becomes float32."""
    stored = layer.state_dict()
    return {
        canonical: _array(stored[name], canonical)
        for canonical, name in NAMES["jittor"].items()
        if name in stored
    }


def from_numpy(layer: CalibratedNorm, state: Mapping[str, Any]) -> None:
    """Load a state into the layer, in place; dtype stays the layer's.

    Args:
        layer: The layer to fill.
        state: Arrays under canonical names, exactly those that `to_numpy(layer)` has.

    Raises:
        RBNValueError: Names are missing or unexpected, or shapes are wrong; all are listed, nothing changes.
    """
    shapes = {name: value.shape for name, value in to_numpy(layer).items()}
    arrays, _ = match(state, shapes)
    stored = layer.state_dict()
    for name, value in arrays.items():
        old = stored[NAMES["jittor"][name]]
        host = "float64" if old.dtype.is_float() else "int32"
        old.update(jt.array(value, dtype=host).cast(old.dtype))
        old.sync()  # broadcasting an array of one element that is still lazy gives C++ that does not compile


def _array(var: jt.Var, canonical: str) -> Any:
    array = at_least_float32(var).numpy().copy()
    # Jittor has no 0-dimensional variables.
    return array.reshape(()) if canonical == "num_batches_tracked" else array
