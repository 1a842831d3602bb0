"""A plain NumPy function held to the reference, with a mistake that the suite names."""

from typing import Any

import numpy as np

from rbn.conformance.subjects.numpy import NumpyFunction
from rbn_core.config import Config

Arrays = dict[str, Any]


def batch_norm(
    x: Any, state: Arrays, config: Config, training: bool, cotangent: Any
) -> tuple[Any, Any, Arrays, Arrays]:
    """One step of a BatchNorm forward and backward, which forgets Bessel's correction."""
    due = config.state_shapes()
    for name in due.keys() - {"num_batches_tracked"}:
        if name not in state or state[name].shape != due[name]:
            raise ValueError(f"expected {name} of shape {due[name]}, got {state.get(name)}")
    axes = (0, *range(2, x.ndim))
    shape = (1, -1, *(1,) * (x.ndim - 2))
    values, dy = x.astype(float), cotangent.astype(float)
    state = {name: value.astype(float) for name, value in state.items()}
    batch = training or not config.track_running_stats
    if batch and x.size <= x.shape[1]:
        raise ValueError(f"expected more than one value per channel, got an input of shape {x.shape}")
    mean = values.mean(axes) if batch else state["running_mean"]
    var = values.var(axes) if batch else state["running_var"]
    if training and config.track_running_stats:
        if "num_batches_tracked" in state:
            state["num_batches_tracked"] += 1
        old = config.momentum if config.momentum is not None else 1.0 - 1.0 / state["num_batches_tracked"]
        state["running_mean"] = old * state["running_mean"] + (1.0 - old) * mean
        state["running_var"] = old * state["running_var"] + (1.0 - old) * var  # the mistake: not n / (n - 1)
    inverse_std = (1.0 / np.sqrt(var + config.eps)).reshape(shape)
    normalized = (values - mean.reshape(shape)) * inverse_std
    gamma = state["gamma"].reshape(shape) if config.gamma else 1.0
    beta = state["beta"].reshape(shape) if config.beta else 0.0
    y, dx = gamma * normalized + beta, gamma * dy * inverse_std
    if batch:
        dx = dx - dx.mean(axes, keepdims=True) - normalized * (dx * normalized).mean(axes, keepdims=True)
    gradients = {"gamma": (dy * normalized).sum(axes), "beta": dy.sum(axes)} if config.gamma else {}
    return y.astype(x.dtype), dx.astype(x.dtype), gradients, state


subject = NumpyFunction("a NumPy function", batch_norm, layers=("bn",))
