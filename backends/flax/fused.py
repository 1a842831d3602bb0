"""RBN as one custom call forward and one backward: the compiled loops, where XLA computes on the CPU.

Of the image only X is kept for the backward pass, as in BatchNorm. Gradients of gradients go through the
plain form, and so does everything on other devices.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import Dtype
from jax import Array
from numpy.typing import NDArray

from rbn import kernels
from rbn.backends.flax import functional
from rbn.kernels.library import DTYPES, PARAMETERS, address
from rbn_core.config import SPATIAL_STATISTICS, Statistic

AVAILABLE = not kernels.problem()
"""Whether there are compiled loops."""

FORWARD, BACKWARD = "rbn_xla_forward", "rbn_xla_backward"
if AVAILABLE:
    for name in (FORWARD, BACKWARD):
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(ctypes.c_void_p(address(name))), platform="cpu")

GRAIN = 32768
"""Values that make it worth waking another thread."""

Parameters = dict[str, Array]
"""gamma, beta, center_weight, scale_weight and scale_bias, (C,) each, as far as the layer has them."""

Running = tuple[Array, Array] | None
"""E and Var, (C,) each; `None` for the batch's."""


def takes(
    x: Array,
    parameters: Mapping[str, Array],
    *,
    axis: int,
    centering: Statistic | None,
    scaling: Statistic | None,
    average: functional.Average,
) -> bool:
    """Whether the fast form can compute this input; else it is for `functional.rbn`.

    It is for inputs with the channels last or behind the batch, whose statistics are this device's alone.
    """
    return (
        AVAILABLE
        and x.dtype.name in DTYPES
        and x.size > 0
        and axis % x.ndim in (1, x.ndim - 1)
        and centering not in SPATIAL_STATISTICS
        and scaling not in SPATIAL_STATISTICS
        and average is functional.batch_average
        and jnp.result_type(x, *parameters.values(), jnp.float32) == computed_in(x)
    )


def rbn(
    x: Array,
    parameters: Mapping[str, Array],
    running: tuple[Array, Array] | None,
    *,
    axis: int,
    eps: float,
    centering: Statistic | None,
    scaling: Statistic | None,
    restrict: str,
    dtype: Dtype | None,
) -> tuple[Array, Array, Array]:
    """`functional.rbn` for what `takes` accepts.

    Returns:
        Y, in the dtype of x or, where another output dtype was asked for, in what it is computed in, and the
        E and biased Var it was normalized with, in at least float32 and without a gradient.
    """
    if dtype is not None and dtype != x.dtype:
        x = x.astype(jnp.result_type(computed_in(x), dtype))
    wide = computed_in(x)
    stored = {name: parameters[name].astype(wide) for name in PARAMETERS if name in parameters}
    if running is not None:
        running = (running[0].astype(wide), running[1].astype(wide))
    layer = Layer(axis % x.ndim, eps, centering, scaling, restrict)
    y, _, _, mean, var = _forward(layer, x, stored, running)
    return y, mean, var


class Layer(NamedTuple):
    """What a layer is but for its arrays."""

    axis: int
    eps: float
    centering: Statistic | None
    scaling: Statistic | None
    restrict: str

    def plain(self, x: Array, stored: Parameters, running: Running) -> tuple[Array, Array, Array]:
        """Y, E and Var in JAX's operations, Y in the dtype of x."""
        y, mean, var = functional.rbn(x, stored, running, dtype=None, **self._asdict())
        return y.astype(x.dtype), mean, var

    def plan(self, x: Array, stored: Parameters, running: Running) -> NDArray[np.int64]:
        """As the custom calls of kernels/xla.cpp take it."""
        images, channels = x.shape[0], x.shape[self.axis]
        plan = kernels.Plan(
            images,
            channels,
            x.size // (images * channels),
            x.dtype.name,
            self.axis == x.ndim - 1,
            self.centering,
            self.scaling,
            self.restrict,
            running is None,
            min(1 + x.size // (GRAIN + 1), os.cpu_count() or 1),
            self.eps,
        )
        present = [*(name in stored for name in PARAMETERS), *(running is not None,) * 2]
        bits = sum(is_there << place for place, is_there in enumerate(present))
        return np.array([bits, *np.frombuffer(bytes(plan.structure), np.int64)])


# ---- Y ----


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _forward(layer: Layer, x: Array, stored: Parameters, running: Running) -> tuple[Array, ...]:
    """Y, mu, v, E and Var; only Y has a gradient."""
    return jax.lax.platform_dependent(
        x,
        stored,
        running,
        cpu=functools.partial(_forward_in_loops, layer),
        default=functools.partial(_forward_in_operations, layer),
    )


def _forward_in_loops(layer: Layer, x: Array, stored: Parameters, running: Running) -> tuple[Array, ...]:
    wide, channels = computed_in(x), x.shape[layer.axis]
    planes, vector = (jax.ShapeDtypeStruct(shape, wide) for shape in ((x.shape[0], channels), (channels,)))
    image = jax.ShapeDtypeStruct(x.shape, x.dtype)
    call = jax.ffi.ffi_call(
        FORWARD,
        (image, planes, planes, vector, vector),
        vmap_method="sequential",
    )
    y, mu, v, mean, var = call(x, *vectors(stored, running), plan=layer.plan(x, stored, running))
    return (y, mu, v, *((mean, var) if running is None else running))


def _forward_in_operations(layer: Layer, x: Array, stored: Parameters, running: Running) -> tuple[Array, ...]:
    y, mean, var = layer.plain(x, stored, running)
    return y, *functional.moments(x.astype(computed_in(x)), layer.axis), mean, var


def _remember(layer: Layer, x: Array, stored: Parameters, running: Running) -> tuple[Any, Any]:
    outputs = _forward(layer, x, stored, running)
    _, mu, v, _, _ = outputs
    return outputs, (x, stored, running, mu, v)


def _differentiate(layer: Layer, kept: Any, cotangents: Any) -> tuple[Any, ...]:
    return _gradients(layer, cotangents[0], *kept)


_forward.defvjp(_remember, _differentiate)


# ---- the gradients of X, the parameters, and E and Var where they are given ----


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gradients(
    layer: Layer, dy: Array, x: Array, stored: Parameters, running: Running, mu: Array, v: Array
) -> tuple[Array, Parameters, Running]:
    dx, gradients = jax.lax.platform_dependent(
        dy,
        x,
        stored,
        running,
        mu,
        v,
        cpu=functools.partial(_backward_in_loops, layer),
        default=lambda dy, x, stored, running, *_: _backward(layer, dy, x, stored, running)[:2],
    )
    # Rarely wanted: `jit` leaves it out.
    statistics = None if running is None else _backward(layer, dy, x, stored, running)[2]
    return dx, gradients, statistics


def _backward(
    layer: Layer, dy: Array, x: Array, stored: Parameters, running: Running
) -> tuple[Array, Parameters, Running]:
    """The gradients in JAX's operations."""
    _, pull = jax.vjp(lambda *arguments: layer.plain(*arguments)[0], x, stored, running)
    return pull(dy)


def _backward_in_loops(
    layer: Layer, dy: Array, x: Array, stored: Parameters, running: Running, mu: Array, v: Array
) -> tuple[Array, Parameters]:
    image = jax.ShapeDtypeStruct(x.shape, x.dtype)
    vector = jax.ShapeDtypeStruct(mu.shape[1:], mu.dtype)
    call = jax.ffi.ffi_call(
        BACKWARD,
        (image, *(vector,) * len(PARAMETERS)),
        vmap_method="sequential",
    )
    dx, *gradients = call(dy, x, mu, v, *vectors(stored, running), plan=layer.plan(x, stored, running))
    return dx, {
        name: gradient for name, gradient in zip(PARAMETERS, gradients, strict=True) if name in stored
    }


def _remember_inputs(layer: Layer, *inputs: Any) -> tuple[Any, Any]:
    return _gradients(layer, *inputs), inputs


def _differentiate_again(layer: Layer, inputs: Any, cotangents: Any) -> tuple[Any, ...]:
    *differentiable, mu, v = inputs  # as functions of X, mu and v are part of its gradient
    _, pull = jax.vjp(functools.partial(_backward, layer), *differentiable)
    return (*pull(cotangents), jnp.zeros_like(mu), jnp.zeros_like(v))


_gradients.defvjp(_remember_inputs, _differentiate_again)


# ---- arrays ----


def computed_in(x: Array) -> Any:
    """What statistics, parameters and their gradients are computed in: at least float32."""
    return jnp.promote_types(x.dtype, jnp.float32)


def vectors(stored: Parameters, running: Running) -> list[Array]:
    """The layer's numbers that are there, in the order in which the custom calls take them."""
    return [*(stored[name] for name in PARAMETERS if name in stored), *(running or ())]
