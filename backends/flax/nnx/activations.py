"""What every layer of an NNX model does with an input."""

from __future__ import annotations

from typing import Any

from flax import nnx

from rbn.backends.flax.activations import first_array
from rbn_core.activations import Layers, Observed


def activations(model: nnx.Module, *args: Any, **kwargs: Any) -> Layers:
    """Call a model, operation by operation and in the mode it is in, and note what its layers do.

    Args:
        model: Any NNX module.
        *args: What it is called with.
        **kwargs: The same.

    Returns:
        By dotted path what went into each layer and what came out; "" is the model itself. Of a layer that
        is called several times, the first; of several results, the first.
    """
    found: Layers = {}
    paths = {
        id(module): ".".join(map(str, path))
        for path, module in nnx.iter_graph(model)
        if isinstance(module, nnx.Module)
    }
    modules = [module for _, module in nnx.iter_graph(model) if isinstance(module, nnx.Module)]
    # NNX has no hooks: the classes of the layers note what goes through, for as long as this takes.
    classes: set[Any] = {
        next(base for base in type(module).__mro__ if "__call__" in base.__dict__)
        for module in modules
        if callable(module)
    }
    originals = {kind: kind.__dict__["__call__"] for kind in classes}

    def noting(original: Any) -> Any:
        def call(self: Any, *given: Any, **options: Any) -> Any:
            made = original(self, *given, **options)
            path, output = paths.get(id(self)), first_array(made)
            if path is not None and output is not None and path not in found:
                found[path] = Observed(type(self).__name__, first_array(given), output)
            return made

        return call

    try:
        for kind, original in originals.items():
            kind.__call__ = noting(original)
        model(*args, **kwargs)
    finally:
        for kind, original in originals.items():
            kind.__call__ = original
    return found
