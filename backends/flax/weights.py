"""A Flax layer's state to and from canonical NumPy arrays."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from rbn.backends.flax import functional, nnx
from rbn.backends.flax.layers import CalibratedNorm
from rbn_core.errors import RBNTypeError, RBNValueError
from rbn_core.matching import State, match
from rbn_core.names import NAMES, PARAMETERS, STATISTICS


def to_numpy(layer: Mapping[str, Any] | nnx.CalibratedNorm) -> State:
    """Copies of everything the layer stores, under canonical names; half precision becomes float32.

    Args:
        layer: The variables of one linen layer, with or without a plain BatchNorm's gaps, or an NNX layer.

    Raises:
        RBNValueError: Variables that are not a layer's are there, such as those of a whole network.
    """
    stored = _stored(layer)
    arrays = {canonical: _array(stored[name]) for canonical, name in NAMES["flax"].items() if name in stored}
    if "conv_weight" in arrays:
        arrays["conv_weight"] = np.moveaxis(arrays["conv_weight"], (-1, -2), (0, 1))
    return arrays


def from_numpy(layer: CalibratedNorm | nnx.CalibratedNorm, state: Mapping[str, Any]) -> Any:
    """Load a state: a linen layer's is returned as its variables, an NNX layer is filled in place.

    Args:
        layer: The layer; the dtypes stay its own.
        state: Arrays under canonical names, exactly those that `to_numpy` has of such a layer.

    Returns:
        The linen layer's variables, a dictionary of `params` and `batch_stats`; `None` for an NNX layer.

    Raises:
        RBNValueError: Names are missing or unexpected, or shapes are wrong; all are listed, nothing changes.
    """
    if isinstance(layer, nnx.CalibratedNorm):
        stored = _stored(layer)
        shapes = {canonical: value.shape for canonical, value in to_numpy(layer).items()}
        for canonical, value in _channels_last(match(state, shapes)[0]).items():
            variable = stored[NAMES["flax"][canonical]]
            variable[...] = jnp.asarray(value, variable.dtype)
        return None
    channels = (len(value) for value in (state.get("running_mean"), *state.values()) if np.ndim(value) == 1)
    arrays = _channels_last(match(state, layer.config(next(channels, 1)).state_shapes())[0])
    dtypes = dict.fromkeys(PARAMETERS, layer.param_dtype)
    dtypes |= dict.fromkeys(STATISTICS, functional.statistics_dtype(layer.param_dtype))
    dtypes["num_batches_tracked"] = jnp.int32
    variables = {NAMES["flax"][name]: jnp.asarray(value, dtypes[name]) for name, value in arrays.items()}
    return traverse_util.unflatten_dict(variables, sep="/")


def _stored(layer: Mapping[str, Any] | nnx.CalibratedNorm) -> dict[str, Any]:
    """The layer's variables under their names of `rbn_core.names`."""
    names = NAMES["flax"].values()
    if isinstance(layer, nnx.CalibratedNorm):
        found = {name: _at(layer, name.split("/")[1:]) for name in names}
        return {name: variable for name, variable in found.items() if variable is not None}
    if not isinstance(layer, Mapping):
        raise RBNTypeError(
            f"RBN: expected an NNX layer or the variables of a linen layer, got {type(layer).__name__}. "
            "Pass what the linen layer's init returned: a linen layer stores nothing itself."
        )
    variables = traverse_util.flatten_dict(nn.unbox(layer), sep="/")
    if unexpected := sorted(set(variables) - set(names)):
        raise RBNValueError(
            f"RBN: expected the variables of one layer, got {', '.join(unexpected)} among them. "
            "Pass the layer's own part of each collection."
        )
    return variables


def _at(layer: Any, path: list[str]) -> Any:
    """The attribute of an attribute, and so on; `None` where there is none."""
    return reduce(lambda owner, name: getattr(owner, name, None), path, layer)


def _channels_last(arrays: State) -> State:
    """The arrays with BNET's kernel as Flax has it, (*kernel, 1, C)."""
    if "conv_weight" not in arrays:
        return arrays
    return arrays | {"conv_weight": np.moveaxis(arrays["conv_weight"], (0, 1), (-1, -2))}


def _array(value: Any) -> Any:
    array = np.array(value[...])
    return array.astype(np.float32) if array.dtype.itemsize == 2 else array
