"""What every layer of a PyTorch model does with an input."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from rbn.backends.torch.weights import to_array, unwrapped
from rbn_core.activations import Layers, Observed


def activations(model: nn.Module, *args: Any, **kwargs: Any) -> Layers:
    """Run a model, without gradients and in the mode it is in, and note what its layers do.

    Args:
        model: Any module.
        *args: What it is called with.
        **kwargs: The same.

    Returns:
        By dotted path what went into each layer and what came out; "" is the model itself. Of a layer that
        is called several times, the first; of several results, the first.
    """
    model = unwrapped(model)
    found: Layers = {}
    handles = []
    for path, module in model.named_modules():

        def note(layer: nn.Module, given: Any, made: Any, path: str = path) -> None:
            output = _array(made)
            if output is not None and path not in found:
                found[path] = Observed(type(layer).__name__, _array(given), output)

        handles.append(module.register_forward_hook(note))
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _array(value: Any) -> NDArray[Any] | None:
    """The first tensor of what a layer takes or gives."""
    while isinstance(value, tuple | list) and value:
        value = value[0]
    return np.asarray(to_array(value)) if isinstance(value, torch.Tensor) else None
