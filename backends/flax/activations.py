"""What every layer of a Flax linen model does with an input."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from numpy.typing import NDArray

from rbn_core.activations import Layers, Observed


def activations(model: nn.Module, variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> Layers:
    """Apply a model, operation by operation, and note what its layers do.

    Args:
        model: Any linen module.
        variables: Its variables.
        *args: What `model.apply` takes behind them.
        **kwargs: The same, such as `train=False`.

    Returns:
        By dotted path what went into each layer and what came out; "" is the model itself. Of a layer that
        is called several times, the first; of several results, the first.
    """
    found: Layers = {}

    def note(call: Any, given: Any, options: Any, context: Any) -> Any:
        made = call(*given, **options)
        path, output = ".".join(context.module.path), first_array(made)
        if context.method_name == "__call__" and output is not None and path not in found:
            found[path] = Observed(type(context.module).__name__, first_array(given), output)
        return made

    with nn.intercept_methods(note):
        model.apply(variables, *args, **kwargs)
    return found


def first_array(value: Any) -> NDArray[Any] | None:
    """The first array of what a layer takes or gives."""
    while isinstance(value, tuple | list) and value:
        value = value[0]
    return np.asarray(value, np.float32) if isinstance(value, jax.Array | np.ndarray) else None
