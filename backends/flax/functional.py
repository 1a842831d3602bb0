"""RBN in JAX operations: the two-pass form of `rbn_core.fused`, and spatial statistics around it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jax import Array

from rbn_core.config import SPATIAL_STATISTICS, Statistic

RESTRICT = {"sigmoid": jax.nn.sigmoid, "hard_sigmoid": jax.nn.hard_sigmoid}

Average = Callable[[Array], Array]


def batch_average(values: Array) -> Array:
    """(N, C) plane values to their mean over the batch, (C,)."""
    return values.mean(axis=0)


def rbn(
    x: Any,
    parameters: Mapping[str, Array],
    running: tuple[Array, Array] | None,
    *,
    axis: int,
    eps: float,
    centering: Statistic | None,
    scaling: Statistic | None,
    restrict: str,
    dtype: Dtype | None,
    average: Average = batch_average,
) -> tuple[Array, Array, Array]:
    """Representative Batch Normalization, eq. 12 of the paper.

    Args:
        x: (N, *spatial) with the channels at `axis`; not changed.
        parameters: gamma, beta, center_weight, scale_weight and scale_bias, (C,) each, where the layer has
            them.
        running: E and Var of eq. 1, (C,) each; `None` takes the batch's.
        axis: The channel axis, negative or not.
        eps: epsilon of eq. 1.
        centering: K_m of eq. 5, or `None`.
        scaling: K_s of eq. 9, or `None`.
        restrict: R of eq. 9.
        dtype: The output dtype that the layer was given; all is computed in at least that.
        average: Takes (N, C) plane values to their mean over the batch, (C,); here or over all devices.

    Returns:
        Y, and the E and biased Var it was normalized with, all in at least float32 and in what x and the
        parameters promote to.
    """
    axis %= x.ndim
    x = jnp.asarray(x, jnp.result_type(x, *parameters.values(), jnp.float32, dtype or jnp.float32))
    if axis == 0:
        # Without a batch axis in front, the one behind the channels is it.
        x = x.swapaxes(0, 1)
    front = max(axis, 1)
    if centering in SPATIAL_STATISTICS:
        k_m = spatial_statistic(centering, x, front, eps)
        x = x + per_channel(parameters["center_weight"], x, front) * k_m
        centering = None
    if scaling in SPATIAL_STATISTICS:
        before = {"center_weight": parameters["center_weight"]} if centering else {}
        x_s, mean, var = two_pass(x, before, running, front, eps, centering, None, restrict, average)
        y = scale_spatially(x_s, parameters, front, eps, scaling, restrict)
    else:
        y, mean, var = two_pass(x, parameters, running, front, eps, centering, scaling, restrict, average)
    if axis == 0:
        y = y.swapaxes(0, 1)
    return y, mean, var


def as_output(y: Array, x: Any, dtype: Dtype | None) -> Array:
    """Y in the dtype that the layer was given, else in x's own in half precision, else as computed."""
    if dtype is None:
        dtype = x.dtype if x.dtype.itemsize == 2 else y.dtype
    return y.astype(dtype)


def statistics_dtype(param_dtype: Dtype) -> Dtype:
    """The dtype of the running statistics: the parameters', float32 where that is half precision.

    It is fixed, so that a step under `jit` or `scan` gives back the dtypes it took.
    """
    return jnp.promote_types(param_dtype, jnp.float32)


def two_pass(
    x: Array,
    parameters: Mapping[str, Array],
    running: tuple[Array, Array] | None,
    axis: int,
    eps: float,
    centering: Statistic | None,
    scaling: Statistic | None,
    restrict: str,
    average: Average,
) -> tuple[Array, Array, Array]:
    """Y, E and Var for channel statistics; only the first and the last step touch the image."""
    mu, v = moments(x, axis)
    a, b, mean, var = calibrate(mu, v, parameters, running, eps, centering, scaling, restrict, average)
    return affine(x, a, b, axis), mean, var


def moments(x: Array, axis: int) -> tuple[Array, Array]:
    """The mean and biased variance of every plane, (N, C) each; the variance from x - mean, never x^2."""
    axes = spatial_axes(x, axis)
    mu = x.mean(axes)
    return mu, jnp.square(x - jnp.expand_dims(mu, axes)).mean(axes)


def calibrate(
    mu: Array,
    v: Array,
    parameters: Mapping[str, Array],
    running: tuple[Array, Array] | None,
    eps: float,
    centering: Statistic | None,
    scaling: Statistic | None,
    restrict: str,
    average: Average,
) -> tuple[Array, Array, Array, Array]:
    """Equations 2 to 9 on (N, C) moments, for channel statistics.

    The batch's plane means are measured from their own mean, as `rbn_core.fused.calibrate` explains; Y does
    not depend on that origin, so it needs no gradient.

    Returns:
        a and b of Y = a X + b, (N, C) each, and the E and biased Var they were made with, (C,) each.
    """
    origin = average(jax.lax.stop_gradient(mu)) if running is None else jnp.zeros(mu.shape[1], mu.dtype)
    mu_0 = mu - origin
    shift, origin_cm = jnp.zeros_like(mu), origin
    if centering == "channel_mean":
        shift = parameters["center_weight"] * mu_0
        origin_cm = origin + parameters["center_weight"] * origin
    elif centering == "channel_std":
        shift = parameters["center_weight"] * jnp.sqrt(v + eps)
    shifted = mu_0 + shift  # the plane means of X_cm; its plane variances are those of X

    if running is None:
        mean_0 = average(shifted)
        mean = mean_0 + origin_cm
        var = average(v + jnp.square(shifted - mean_0))
    else:
        mean, var = (jnp.asarray(statistic, mu.dtype) for statistic in running)
        mean_0 = mean
    inverse_std = jax.lax.rsqrt(var + eps)

    a = jnp.broadcast_to(inverse_std, mu.shape)
    if scaling is not None:
        k_s = (shifted - mean_0) * inverse_std
        if scaling == "channel_std":
            k_s = jnp.sqrt(v * jnp.square(inverse_std) + eps)
        elif scaling == "input_mean":
            k_s = mu
        a = a * RESTRICT[restrict](parameters["scale_weight"] * k_s + parameters["scale_bias"])
    if "gamma" in parameters:
        a = a * parameters["gamma"]
    b = a * (shift - mean_0 - origin)
    if "beta" in parameters:
        b = b + parameters["beta"]
    return a, b, mean, var


def affine(x: Array, a: Array, b: Array, axis: int) -> Array:
    """Y = a X + b, with one a and one b for each plane."""
    axes = spatial_axes(x, axis)
    return x * jnp.expand_dims(a, axes) + jnp.expand_dims(b, axes)


def track(
    running: tuple[Array, Array],
    mean: Array,
    var: Array,
    num_batches_tracked: Array,
    *,
    momentum: float | None,
    running_var: str,
    values: int,
) -> tuple[Array, Array]:
    """The running statistics after one more batch, for the linen and the NNX layer.

    Args:
        running: E and Var, (C,) each.
        mean: mu_B, (C,).
        var: sigma_B^2, (C,), biased.
        num_batches_tracked: How many batches there are with this one.
        momentum: m of eq. 3; `None` averages all batches.
        running_var: Which variance is accumulated, "unbiased" or "biased".
        values: n of eq. 2, the number of values behind each channel's statistic.
    """
    new_weight = 1.0 / num_batches_tracked if momentum is None else 1.0 - momentum
    if running_var == "unbiased":
        var = var * (values / (values - 1))
    return accumulate(running, mean, var, new_weight)


def centre_tap(gamma: Array | None, beta: Array | None, kernel: Array) -> tuple[Array, Array]:
    """The kernel and bias of BNET's convolution that do what BatchNorm's gamma and beta did.

    Args:
        gamma: (C,), or `None` for ones.
        beta: (C,), or `None` for zeros.
        kernel: A kernel of the shape and dtype that is wanted, (*kernel, 1, C).
    """
    centre = tuple(size // 2 for size in kernel.shape[:-2])
    bias = jnp.zeros(kernel.shape[-1], kernel.dtype)
    return (
        jnp.zeros_like(kernel).at[centre].set(1.0 if gamma is None else gamma),
        bias if beta is None else bias + beta,
    )


def channels_last(convolution: Callable[[Array], Array], y: Array, axis: int) -> Array:
    """A convolution of (N, *spatial, C) on y, whose channels are at `axis`."""
    return jnp.moveaxis(convolution(jnp.moveaxis(y, axis, -1)), -1, axis)


def accumulate(
    running: tuple[Array, Array], mean: Array, var: Array, new_weight: float | Array
) -> tuple[Array, Array]:
    """Eq. 3: running + (1 - m) (batch - running), without a gradient, in the dtype of running.

    Args:
        running: E and Var, (C,) each.
        mean: mu_B, (C,).
        var: sigma_B^2, (C,), already divided as the layer wants it.
        new_weight: 1 - m, the weight of the batch.
    """
    mean, var = (
        jax.lax.stop_gradient(old + new_weight * (batch - old)).astype(old.dtype)
        for old, batch in zip(running, (mean, var), strict=True)
    )
    return mean, var


def spatial_statistic(name: Statistic, x: Array, axis: int, eps: float) -> Array:
    """mu_s or sigma_s of Table 3, over the channels of every position: (N, *spatial), 1 at `axis`."""
    if name == "spatial_mean":
        return x.mean(axis, keepdims=True)
    return jnp.sqrt(x.var(axis, keepdims=True) + eps)


def scale_spatially(
    x_s: Array, parameters: Mapping[str, Array], axis: int, eps: float, scaling: Statistic, restrict: str
) -> Array:
    """Eq. 9 and the affine step, for a statistic that differs from position to position."""
    k_s = spatial_statistic(scaling, x_s, axis, eps)
    z = per_channel(parameters["scale_weight"], x_s, axis) * k_s
    y = x_s * RESTRICT[restrict](z + per_channel(parameters["scale_bias"], x_s, axis))
    if "gamma" in parameters:
        y = y * per_channel(parameters["gamma"], y, axis)
    if "beta" in parameters:
        y = y + per_channel(parameters["beta"], y, axis)
    return y


def per_channel(values: Array, x: Array, axis: int) -> Array:
    """(C,) values shaped to broadcast over x, whose channels are at `axis`."""
    return jnp.expand_dims(values, (0, *spatial_axes(x, axis)))


def spatial_axes(x: Array, axis: int) -> tuple[int, ...]:
    """The axes of x that are neither its batch, which is the first, nor its channels; none for (N, C)."""
    return tuple(range(1, axis)) + tuple(range(axis + 1, x.ndim))
