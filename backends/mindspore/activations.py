"""What every layer of a MindSpore model does with an input."""

from __future__ import annotations

from typing import Any

import mindspore as ms
import numpy as np
from mindspore import nn
from numpy.typing import NDArray

from rbn_core.activations import Layers, Observed
from rbn_core.errors import RBNValueError


def activations(model: nn.Cell, *args: Any, **kwargs: Any) -> Layers:
    """Run a model in PyNative mode, in the mode of training it is in, and note what its layers do.

    Args:
        model: Any cell.
        *args: What it is called with.
        **kwargs: The same.

    Returns:
        By dotted path what went into each layer and what came out; "" is the model itself. Of a layer that
        is called several times, the first; of several results, the first.

    Raises:
        RBNValueError: The model runs as a graph, in which no layer can be looked at.
    """
    if ms.get_context("mode") == ms.GRAPH_MODE:
        raise RBNValueError(
            "activations: expected a model that runs operation by operation, got one that runs as a graph. "
            "Call mindspore.set_context(mode=mindspore.PYNATIVE_MODE) before."
        )
    found: Layers = {}
    handles = []
    for path, cell in model.cells_and_names():

        def note(layer: nn.Cell, given: Any, made: Any, path: str = path) -> None:
            output = _array(made)
            if output is not None and path not in found:
                found[path] = Observed(type(layer).__name__, _array(given), output)

        handles.append(cell.register_forward_hook(note))
    try:
        model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _array(value: Any) -> NDArray[Any] | None:
    """The first tensor of what a layer takes or gives."""
    while isinstance(value, tuple | list) and value:
        value = value[0]
    return np.asarray(value.astype(ms.float32).asnumpy()) if isinstance(value, ms.Tensor) else None
