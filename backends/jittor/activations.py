"""What every layer of a Jittor model does with an input."""

from __future__ import annotations

from typing import Any

import jittor as jt
import numpy as np
from jittor import nn
from numpy.typing import NDArray

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
    found: Layers = {}
    modules = {"": model} | dict(model.named_modules())

    def noting(path: str, layer: nn.Module, execute: Any) -> Any:
        def call(*given: Any, **options: Any) -> Any:
            made = execute(*given, **options)
            output = _array(made)
            if output is not None and path not in found:
                found[path] = Observed(type(layer).__name__, _array(given), output)
            return made

        return call

    # A module holds one hook of Jittor's, which may be the user's.
    for path, module in modules.items():
        module.execute = noting(path, module, module.execute)
    try:
        with jt.no_grad():
            model(*args, **kwargs)
    finally:
        for module in modules.values():
            del module.execute
    return found


def _array(value: Any) -> NDArray[Any] | None:
    """The first variable of what a layer takes or gives."""
    while isinstance(value, tuple | list) and value:
        value = value[0]
    return np.asarray(value.float32().numpy()) if isinstance(value, jt.Var) else None
