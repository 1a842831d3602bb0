"""The canonical form of a layer's weights: NumPy arrays under canonical names, and their safetensors file."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from rbn_core.errors import RBNValueError

State = dict[str, NDArray[Any]]
"""A layer's or a network's stored arrays under their canonical names."""


def check_state(state: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> State:
    """The arrays of a state that fits a layer exactly.

    Args:
        state: Arrays under canonical names.
        shapes: What the layer stores: every name with its shape.

    Returns:
        The state with every value as a NumPy array.

    Raises:
        RBNValueError: Names are missing or unexpected, or shapes or kinds are wrong; all are listed at once.
    """
    arrays = {name: np.asarray(value) for name, value in state.items()}
    faults = [f"missing {name}" for name in shapes if name not in arrays]
    faults += [f"unexpected {name}" for name in arrays if name not in shapes]
    for name, shape in shapes.items():
        if name not in arrays:
            continue
        array = arrays[name]
        if array.shape != shape:
            faults.append(f"{name} of shape {array.shape} where {shape} is needed")
        elif array.dtype.kind not in ("iu" if name == "num_batches_tracked" else "fV"):
            faults.append(f"{name} of dtype {array.dtype}")
    if faults:
        raise RBNValueError(
            f"RBN: expected a state of {', '.join(shapes)}, got one with {'; '.join(faults)}. "
            "Nothing was changed; see rbn_core.names for what each framework calls them."
        )
    return arrays


def save(path: str | PathLike[str], state: Mapping[str, Any]) -> None:
    """Write a state as a safetensors file."""
    save_file({name: np.asarray(value, order="C") for name, value in state.items()}, path)


def load(path: str | PathLike[str]) -> State:
    """Read a state from a safetensors file.

    Raises:
        RBNValueError: The file is not a whole safetensors file.
    """
    try:
        return load_file(path)
    except SafetensorError as error:
        raise RBNValueError(
            f"RBN: expected a safetensors file, got {path} ({error}). Write it with rbn_core.weights.save."
        ) from error
