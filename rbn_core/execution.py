"""Networks run in NumPy: what the executors of the four frameworks are held to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from rbn_core import reference
from rbn_core.matching import State, match
from rbn_core.networks import (
    INPUT,
    Activation,
    Add,
    Concatenate,
    Convolution,
    Linear,
    Network,
    Norm,
    Pooling,
    Split,
)

Array = NDArray[np.floating[Any]]


def run(
    network: Network, state: Mapping[str, Any], images: Any, *, training: bool = False
) -> tuple[Array, State]:
    """A network's result, and its state afterwards.

    Args:
        network: What to run.
        state: Its arrays under canonical names.
        images: (N, C, H, W); everything is computed in their dtype.
        training: Whether the normalizations take the batch's statistics, and accumulate them.

    Returns:
        The last node's result, and the state with the running statistics as training leaves them.

    Raises:
        RBNValueError: The state is not this network's.
    """
    images = np.asarray(images)
    stored, _ = match(state, network.state_shapes())
    results = {INPUT: images}
    for node, unneeded in network.steps():
        prefix = f"{node.name}."
        own = {
            name: stored[prefix + name]
            if name == "num_batches_tracked"
            else stored[prefix + name].astype(images.dtype)
            for name in node.state_shapes()
            if prefix + name in stored  # a count of batches may lack
        }
        inputs = [results[name] for name in node.inputs]
        match node:
            case Norm():
                layer = reference.Layer(node.config)
                layer.load(own)
                result = layer.forward(inputs[0], training).astype(images.dtype, copy=False)
                stored |= {prefix + name: value for name, value in layer.state().items()}
            case Convolution():
                result = convolution(node, inputs[0], own["weight"], own.get("bias"))
            case Pooling():
                result = pooling(node, inputs[0])
            case Activation():
                result = np.clip(inputs[0], 0, node.limit)
            case Add():
                result = sum(inputs[1:], start=inputs[0])
            case Concatenate():
                result = np.concatenate(inputs, axis=1)
            case Split():
                result = inputs[0][:, node.start : node.stop]
            case Linear():
                result = inputs[0] @ own["weight"].T + own["bias"]
            case _:
                raise NotImplementedError(node.op)
        results[node.name] = result
        for name in unneeded:
            del results[name]
    return results[network.nodes[-1].name], stored


def initial_state(network: Network, seed: int = 0) -> State:
    """Weights to start training from, in float32: what each backend's `network` draws with its own generator.

    Convolutions are normal of variance 2 / (out_channels kernel_size^2) (He et al. 2015, fan-out), linear
    layers uniform within 1 / sqrt(in_features), and the normalizations start where their papers say,
    BNET at 0.
    """
    rng = np.random.default_rng(seed)
    state: State = {}
    for node in network.nodes:
        match node:
            case Convolution():
                own = node.state_shapes()
                deviation = np.sqrt(2 / (node.out_channels * node.kernel_size**2))
                arrays = {"weight": rng.normal(0, deviation, own["weight"])}
                arrays |= {"bias": np.zeros(node.out_channels)} if node.bias else {}
            case Linear():
                bound = node.in_features**-0.5
                arrays = {
                    name: rng.uniform(-bound, bound, shape) for name, shape in node.state_shapes().items()
                }
            case Norm():
                arrays = reference.Layer(node.config).state()
                if node.starts_at_zero:
                    arrays |= {name: 0 * arrays[name] for name in ("conv_weight", "conv_bias")}
            case _:
                arrays = {}
        for name, array in arrays.items():
            state[f"{node.name}.{name}"] = array if array.dtype.kind == "i" else array.astype(np.float32)
    return state


def convolution(node: Convolution, x: Array, weight: Array, bias: Array | None) -> Array:
    """Y[n,o,i,j] = sum_cpq weight[o,c,p,q] X[n, c, i stride + p - padding, j stride + q - padding]."""
    windows = _windows(_padded(x, node.padding), node.kernel_size, node.stride)
    n, _, height, width = windows.shape[:4]
    grouped = windows.reshape(n, node.groups, -1, height, width, node.kernel_size, node.kernel_size)
    kernels = weight.reshape(node.groups, -1, *weight.shape[1:])
    y = np.stack(
        [np.tensordot(grouped[:, g], kernels[g], ((1, 4, 5), (1, 2, 3))) for g in range(node.groups)], axis=1
    )
    y = np.moveaxis(y, -1, 2).reshape(n, node.out_channels, height, width)
    return y if bias is None else y + bias[:, None, None]


def pooling(node: Pooling, x: Array) -> Array:
    """The maximum or the average of windows, or of whole planes."""
    reduce = np.max if node.kind == "max" else np.mean
    if node.kernel_size is None:
        return reduce(x, axis=(2, 3))
    outside = -np.inf if node.kind == "max" else 0.0
    return reduce(_windows(_padded(x, node.padding, outside), node.kernel_size, node.stride), axis=(-2, -1))


def _padded(x: Array, padding: int, value: float = 0.0) -> Array:
    return np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)), constant_values=value)


def _windows(x: Array, size: int, stride: int) -> Array:
    """(N, C, H', W', size, size), without a copy."""
    return sliding_window_view(x, (1, 1, size, size))[:, :, ::stride, ::stride, 0, 0]
