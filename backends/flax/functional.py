"""RBN in JAX operations: the two-pass form of `rbn_core.two_pass`, and image statistics around it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import Dtype
from jax import Array

from rbn_core.config import IEBN_STARTS
from rbn_core.errors import RBNTypeError, RBNValueError
from rbn_core.options import IMAGE_STATISTICS, Statistic

RESTRICT = {"sigmoid": jax.nn.sigmoid, "hard_sigmoid": jax.nn.hard_sigmoid}

Average = Callable[[Array, Array | None], Array]
Whole = Callable[[Array], Array]


def batch_average(values: Array, counts: Array | None = None) -> Array:
    """(N, C) plane values to their mean over the batch, (C,), weighed by how many numbers each is of."""
    if counts is None:
        return values.mean(axis=0)
    return ratio((values * counts).sum(axis=0), counts.sum(axis=0))


def whole_plane(values: Array) -> Array:
    """Means over a device's part of every plane to those over the planes: here a device has all of them."""
    return values


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
    mask: Any = None,
    average: Average = batch_average,
    whole: Whole = whole_plane,
) -> tuple[Array, Array, Array]:
    """Representative Batch Normalization, eq. 12 of the paper: a pure function, also for Equinox and Haiku.

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
        mask: Which values count, of a shape that broadcasts to that of x; all of them by default. K_m, K_s, E
            and Var are of those alone; a plane that has none counts for nothing in E and Var, and its own
            mean and variance are 0.
        average: Takes (N, C) plane values, and how many numbers each is of, to their mean over the batch,
            (C,); here or over all devices.
        whole: Takes the means over parts of planes to those over whole ones, where devices share them.

    Returns:
        Y, and the E and biased Var it was normalized with, all in at least float32 and in what x and the
        parameters promote to.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from rbn.backends.flax import functional
        >>> options = dict(axis=-1, eps=1e-5, restrict="sigmoid", dtype=None)
        >>> options |= dict(centering="channel_mean", scaling="channel_mean")
        >>> zeros, ones, x = jnp.zeros(3), jnp.ones(3), jax.random.normal(jax.random.key(0), (4, 8, 8, 3))
        >>> parameters = dict(gamma=ones, beta=zeros, center_weight=zeros)
        >>> parameters |= dict(scale_weight=zeros, scale_bias=ones)
        >>> @jax.jit
        ... def loss(parameters, x):
        ...     y, mean, var = functional.rbn(x, parameters, None, **options)
        ...     return jnp.square(y - 1).mean(), (mean, var)
        >>> gradients, (mean, var) = jax.grad(loss, has_aux=True)(parameters, x)
        >>> running = functional.accumulate((zeros, ones), mean, var, 0.1)
        >>> y, _, _ = functional.rbn(x, parameters, running, **options)
        >>> y.shape, sorted(gradients)
        ((4, 8, 8, 3), ['beta', 'center_weight', 'gamma', 'scale_bias', 'scale_weight'])
    """
    axis %= x.ndim
    x = jnp.asarray(x, widest(x, *parameters.values(), jnp.float32, dtype or jnp.float32))
    parameters = {name: jnp.asarray(parameter, x.dtype) for name, parameter in parameters.items()}
    if mask is not None:
        mask = jnp.broadcast_to(jnp.asarray(mask, bool), x.shape)
    if axis == 0:
        # Without a batch axis in front, the one behind the channels is it.
        x, mask = (None if array is None else array.swapaxes(0, 1) for array in (x, mask))
    front = max(axis, 1)
    if centering in IMAGE_STATISTICS:
        k_m = image_statistic(centering, x, front, eps, mask)
        x = x + per_channel(parameters["center_weight"], x, front) * k_m
        centering = None
    mu, v, counts = moments(x, front, mask, whole)
    known: Any = parameters
    if scaling in IMAGE_STATISTICS:
        known = {"center_weight": parameters["center_weight"]} if centering else {}
    a, b, mean, var = calibrate(
        mu,
        v,
        known,
        running,
        eps,
        centering,
        None if scaling in IMAGE_STATISTICS else scaling,
        restrict,
        lambda values: average(values, counts),
    )
    y = affine(x, a, b, front)
    if scaling in IMAGE_STATISTICS:
        y = scale_by_image(y, parameters, front, eps, scaling, restrict, mask)
    if axis == 0:
        y = y.swapaxes(0, 1)
    return y, mean, var


def channel_axis(axis: Any, layer: str = "RBN") -> int:
    """The channel axis, which BatchNorm takes as a tuple, too.

    Raises:
        RBNError: There are several, or something else.
    """
    axes = tuple(axis) if isinstance(axis, tuple | list) else (axis,)
    if len(axes) == 1 and isinstance(axes[0], int | np.integer) and not isinstance(axes[0], bool):
        return int(axes[0])
    wrong = RBNValueError if len(axes) > 1 else RBNTypeError
    raise wrong(
        f"{layer}: expected one channel axis, got axis={axis!r}. "
        "Pass an int, and reshape the input where its channels lie on several axes."
    )


def with_a_batch(x: Any, vectors: Sequence[Array], *, shared: bool) -> Array:
    """x, if `vmap` has not taken its batch axis.

    Args:
        x: Of any rank: from four axes on the first is the batch.
        vectors: All (C,) arrays that the layer has.
        shared: Whether the batch is spread over a named axis: then (N, C) is a part of it.

    Raises:
        RBNValueError: (H, W, C) or (L, C) under `vmap` over x alone.
    """
    if x.ndim > 3 or (shared and x.ndim == 2):
        return x
    return refuse_unbatched(jnp.asarray(x), *vectors)


@jax.custom_batching.custom_vmap
def _mapped(x: Array, *vectors: Array) -> Array:
    return x


@_mapped.def_vmap
def _mapped_along(size: int, mapped: list[bool], x: Array, *vectors: Array) -> tuple[Array, bool]:
    if mapped[0] and not any(mapped[1:]):
        shape = x.shape[1:]
        raise RBNValueError(
            f"RBN: expected an input whose batch axis can be told under vmap, got shape {shape} for each, "
            "which is one image or a batch of fewer axes. "
            "Give one image its batch axis, x[None], or the batch one more spatial axis, of length 1."
        )
    return x, mapped[0]


@jax.custom_jvp
def refuse_unbatched(x: Array, *vectors: Array) -> Array:
    """x, unless `vmap` goes over it and over none of the layer's vectors, whatever else is around that.

    (H, W, C) under `vmap` cannot be told from a batch of sequences, which the layer takes it for outside.
    An ensemble maps its parameters, too.

    Raises:
        RBNValueError: It does so.
    """
    return _mapped(x, *vectors)


@refuse_unbatched.defjvp
def _derivative(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Array, Array]:
    return refuse_unbatched(*primals), tangents[0]


def as_output(y: Array, x: Any, dtype: Dtype | None) -> Array:
    """Y in the dtype that the layer was given, else in x's own in half precision, else as computed."""
    if dtype is None:
        dtype = x.dtype if x.dtype.itemsize == 2 else y.dtype
    return y.astype(dtype)


def iebn_bias(key: Any, shape: Sequence[int], dtype: Dtype = jnp.float32) -> Array:
    """How IEBN's w_b starts; a function that can be pickled, unlike those that make initializers."""
    return jnp.full(shape, IEBN_STARTS["scale_bias"], dtype)


def statistics_dtype(param_dtype: Dtype) -> Dtype:
    """The dtype of the running statistics: the parameters', float32 where that is half precision.

    It is fixed, so that a step under `jit` or `scan` gives back the dtypes it took.
    """
    return widest(param_dtype, jnp.float32)


def widest(*arrays: Any) -> Dtype:
    """The dtype that arrays and dtypes promote to, also where `jax_numpy_dtype_promotion` is "strict"."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*arrays)


def moments(
    x: Array, axis: int, mask: Array | None = None, whole: Whole = whole_plane
) -> tuple[Array, Array, Array | None]:
    """The mean and biased variance of every plane, (N, C) each; the variance from x - mean, never x^2.

    Returns:
        These two, and with a mask how many values each is of.
    """
    axes = spatial_axes(x, axis)
    if mask is None:
        mu = whole(x.mean(axes))
        return mu, whole(jnp.square(x - jnp.expand_dims(mu, axes)).mean(axes)), None
    counts = whole(mask.sum(axes, dtype=x.dtype))
    mu = ratio(whole(jnp.where(mask, x, 0).sum(axes)), counts)
    v = ratio(whole(jnp.square(jnp.where(mask, x - jnp.expand_dims(mu, axes), 0)).sum(axes)), counts)
    return mu, v, counts


def ratio(total: Array, counts: Array) -> Array:
    """A mean, or 0 where it is of nothing."""
    return total / jnp.where(counts > 0, counts, 1)


def calibrate(
    mu: Array,
    v: Array,
    parameters: Mapping[str, Array],
    running: tuple[Array, Array] | None,
    eps: float,
    centering: Statistic | None,
    scaling: Statistic | None,
    restrict: str,
    average: Callable[[Array], Array],
) -> tuple[Array, Array, Array, Array]:
    """Equations 2 to 9 on (N, C) moments, for channel statistics.

    The batch's plane means are measured from their own mean, as `rbn_core.two_pass.calibrate` explains. Y
    does not depend on that origin, so it needs no gradient.

    Returns:
        a and b of Y = a X + b, (N, C) each, and the E and biased Var they were made with, (C,) each.
    """
    origin = average(jax.lax.stop_gradient(mu)) if running is None else jnp.zeros(mu.shape[1], mu.dtype)
    mu_0 = mu - origin[None]
    shift, origin_cm = jnp.zeros_like(mu), origin
    if centering == "channel_mean":
        shift = parameters["center_weight"][None] * mu_0
        origin_cm = origin + parameters["center_weight"] * origin
    elif centering == "channel_std":
        shift = parameters["center_weight"][None] * jnp.sqrt(v + eps)
    shifted = mu_0 + shift  # the plane means of X_cm; its plane variances are those of X

    if running is None:
        mean_0 = average(shifted)
        mean = mean_0 + origin_cm
        var = average(v + jnp.square(shifted - mean_0[None]))
    else:
        mean, var = (jnp.asarray(statistic, mu.dtype) for statistic in running)
        mean_0 = mean
    inverse_std = jax.lax.rsqrt(var + eps)

    a = jnp.broadcast_to(inverse_std[None], mu.shape)
    if scaling is not None:
        k_s = (shifted - mean_0[None]) * inverse_std[None]
        if scaling == "channel_std":
            k_s = jnp.sqrt(v * jnp.square(inverse_std)[None] + eps)
        elif scaling == "input_mean":
            k_s = mu
        z = parameters["scale_weight"][None] * k_s + parameters["scale_bias"][None]
        a = a * RESTRICT[restrict](z)
    if "gamma" in parameters:
        a = a * parameters["gamma"][None]
    b = a * (shift - mean_0[None] - origin[None])
    if "beta" in parameters:
        b = b + parameters["beta"][None]
    return a, b, mean, var


def affine(x: Array, a: Array, b: Array, axis: int) -> Array:
    """Y = a X + b, with one a and one b for each plane."""
    axes = spatial_axes(x, axis)
    return x * jnp.expand_dims(a, axes) + jnp.expand_dims(b, axes)


def one_more(num_batches_tracked: Any) -> Array:
    """The counter after one more batch.

    `lax.pmean` and the averages of optax make floats of integers: such a count is rounded to whole batches,
    and stays a float, of at least 32 bits, so that a step gives back the dtype it took.
    """
    count = jnp.asarray(num_batches_tracked)
    if jnp.issubdtype(count.dtype, jnp.floating):
        count = jnp.round(count).astype(statistics_dtype(count.dtype))
    return count + jnp.ones((), count.dtype)


def channels_last(convolution: Callable[[Array], Array], y: Array, axis: int) -> Array:
    """A convolution of (N, *spatial, C) on y, whose channels are at `axis`."""
    return jnp.moveaxis(convolution(jnp.moveaxis(y, axis, -1)), -1, axis)


def accumulate(
    running: tuple[Array, Array],
    mean: Array,
    var: Array,
    new_weight: float | Array | None,
    *,
    count: Any = None,
    values: Any = None,
) -> tuple[Array, Array]:
    """Eq. 3: running + (1 - m) (batch - running), without a gradient, in the dtype of running or float32.

    Args:
        running: E and Var, (C,) each; not changed.
        mean: mu_B, (C,).
        var: sigma_B^2, (C,), biased.
        new_weight: 1 - m, the weight of the batch; `None` is 1 / count, the average of all batches.
        count: How many batches there are with this one; a scalar.
        values: n of eq. 2, to take n / (n - 1) sigma_B^2; a number, or an array, (C,), where a mask leaves
            each channel another n, and one of a single value has the variance 0. `None` takes sigma_B^2.

    Returns:
        The new E and Var.
    """
    if new_weight is None:
        new_weight = 1.0 / jnp.asarray(count, var.dtype)
    if values is not None:
        others = jnp.maximum(values - 1, 1) if isinstance(values, Array) else values - 1
        var = var * (values / others)
    new = []
    for old, batch in zip(running, (mean, var), strict=True):
        batch = batch.astype(widest(old, batch))
        start = old.astype(batch.dtype)
        new.append(jax.lax.stop_gradient(start + new_weight * (batch - start)).astype(statistics_dtype(old)))
    return new[0], new[1]


def where_any(counts: Any, new: tuple[Array, Array], old: tuple[Array, Array]) -> tuple[Array, Array]:
    """Running statistics after a batch: a channel of which a mask has left nothing keeps its old ones.

    Args:
        counts: How many values the batch has for each channel; without a mask a number, else (C,).
        new: E and Var with this batch, (C,) each.
        old: E and Var before it.
    """
    if not isinstance(counts, Array):
        return new
    mean, var = (
        jnp.where(counts > 0, after, jax.lax.stop_gradient(before.astype(after.dtype)))
        for before, after in zip(old, new, strict=True)
    )
    return mean, var


def image_statistic(name: Statistic, x: Array, axis: int, eps: float, mask: Array | None) -> Array:
    """One of `IMAGE_STATISTICS`, of a shape that broadcasts to that of x: mu_s, sigma_s, with 1 at `axis`."""
    if mask is None:
        return (
            x.mean(axis, keepdims=True)
            if name == "spatial_mean"
            else jnp.sqrt(x.var(axis, keepdims=True) + eps)
        )
    counts = mask.sum(axis, keepdims=True, dtype=x.dtype)
    mean = ratio(jnp.where(mask, x, 0).sum(axis, keepdims=True), counts)
    if name == "spatial_mean":
        return mean
    return jnp.sqrt(ratio(jnp.square(jnp.where(mask, x - mean, 0)).sum(axis, keepdims=True), counts) + eps)


def scale_by_image(
    x_s: Array,
    parameters: Mapping[str, Array],
    axis: int,
    eps: float,
    scaling: Statistic,
    restrict: str,
    mask: Array | None,
) -> Array:
    """Eq. 9 and the affine step, for one of `IMAGE_STATISTICS`."""
    k_s = image_statistic(scaling, x_s, axis, eps, mask)
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
