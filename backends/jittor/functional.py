"""RBN in Jittor operations: the two-pass form of `rbn_core.two_pass`, and image statistics around it.

Images keep their dtype, at least float32, and everything of size (N, C) or less is float64: Jittor adds the
numbers of a sum one after another, and in float32 the mean of a large plane would lose half its digits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import jittor as jt
from jittor import Var

from rbn.backends.jittor import internals
from rbn_core.errors import RBNValueError
from rbn_core.options import IMAGE_STATISTICS, Statistic


def hard_sigmoid(z: Var) -> Var:
    """z / 6 + 1 / 2 within 0 and 1; all its constants are exact in float32, which Jittor makes of them."""
    return (z / 6 + 0.5).minimum(1).maximum(0)


RESTRICT = {"sigmoid": jt.sigmoid, "hard_sigmoid": hard_sigmoid}

Average = Callable[[Var], Var]


def batch_average(values: Var) -> Var:
    """(N, C) plane values to their mean over the batch, (C,)."""
    return mean_over(values, 0)


def rbn(
    x: Var,
    parameters: Mapping[str, Var],
    running: tuple[Var, Var] | None,
    *,
    eps: float,
    centering: Statistic | None,
    scaling: Statistic | None,
    restrict: str,
    average: Average = batch_average,
) -> tuple[Var, Var, Var]:
    """Representative Batch Normalization, eq. 12 of the paper.

    Args:
        x: (N, C, *spatial); not changed.
        parameters: gamma, beta, center_weight, scale_weight and scale_bias, (C,) each, where the layer has
            them.
        running: E and Var of eq. 1, (C,) each; `None` takes the batch's.
        eps: epsilon of eq. 1.
        centering: K_m of eq. 5, or `None`.
        scaling: K_s of eq. 9, or `None`.
        restrict: R of eq. 9.
        average: Takes (N, C) plane values to their mean over the batch, (C,).

    Returns:
        Y in at least float32, and the E and biased Var it was normalized with, in float64.
    """
    shape = x.shape
    x = as_planes(at_least_float32(x))
    parameters = {name: value.float64() for name, value in parameters.items()}
    if centering in IMAGE_STATISTICS:
        x = x + per_channel(parameters["center_weight"], x) * image_statistic(centering, x, eps)
        centering = None
    if scaling in IMAGE_STATISTICS:
        before = {"center_weight": parameters["center_weight"]} if centering else {}
        x_s, mean, var = two_pass(x, before, running, eps, centering, None, restrict, average)
        y = scale_by_image(x_s, parameters, eps, scaling, restrict)
    else:
        y, mean, var = two_pass(x, parameters, running, eps, centering, scaling, restrict, average)
    return y.reshape(shape), mean, var


def two_pass(
    x: Var,
    parameters: Mapping[str, Var],
    running: tuple[Var, Var] | None,
    eps: float,
    centering: Statistic | None,
    scaling: Statistic | None,
    restrict: str,
    average: Average,
) -> tuple[Var, Var, Var]:
    """Y, E and Var for channel statistics; only the first and the last step touch the image."""
    mu, v = moments(x)
    a, b, mean, var = calibrate(mu, v, parameters, running, eps, centering, scaling, restrict, average)
    return affine(x, a, b), mean, var


def moments(x: Var) -> tuple[Var, Var]:
    """The mean and biased variance of every plane, (N, C) each."""
    mean = mean_over(x, 2)
    return mean, mean_over(jt.sqr(x - spread(mean, x, 2)), 2)


def calibrate(
    mu: Var,
    v: Var,
    parameters: Mapping[str, Var],
    running: tuple[Var, Var] | None,
    eps: float,
    centering: Statistic | None,
    scaling: Statistic | None,
    restrict: str,
    average: Average,
) -> tuple[Var, Var, Var, Var]:
    """Equations 2 to 9 on (N, C) moments, for channel statistics.

    The batch's plane means are measured from their own mean, as `rbn_core.two_pass.calibrate` explains. Y
    does not depend on that origin, so it needs no gradient.

    Returns:
        a and b of Y = a X + b, (N, C) each, and the E and biased Var they were made with, (C,) each.
    """
    epsilon = constant(eps)
    origin = average(mu.detach()) if running is None else jt.zeros((mu.shape[1],), dtype="float64")
    mu_0 = mu - origin
    shift, origin_cm = jt.zeros_like(mu), origin
    if centering == "channel_mean":
        shift = parameters["center_weight"] * mu_0
        origin_cm = origin + parameters["center_weight"] * origin
    elif centering == "channel_std":
        shift = parameters["center_weight"] * jt.sqrt(v + epsilon)
    shifted = mu_0 + shift  # the plane means of X_cm; its plane variances are those of X

    if running is None:
        mean_0 = average(shifted)
        mean = mean_0 + origin_cm
        var = average(v + jt.sqr(shifted - mean_0))
    else:
        mean, var = (statistic.float64() for statistic in running)
        mean_0 = mean
    inverse_std = constant(1) / jt.sqrt(var + epsilon)

    a = inverse_std.broadcast(mu, [0])
    if scaling is not None:
        k_s = (shifted - mean_0) * inverse_std
        if scaling == "channel_std":
            k_s = jt.sqrt(v * jt.sqr(inverse_std) + epsilon)
        elif scaling == "input_mean":
            k_s = mu
        a = a * RESTRICT[restrict](parameters["scale_weight"] * k_s + parameters["scale_bias"])
    if "gamma" in parameters:
        a = a * parameters["gamma"]
    b = a * (shift - mean_0 - origin)
    if "beta" in parameters:
        b = b + parameters["beta"]
    return a, b, mean, var


def affine(x: Var, a: Var, b: Var) -> Var:
    """Y = a X + b, with one a and one b for each plane."""
    return x * spread(a, x, 2) + spread(b, x, 2)


def depthwise_convolution(x: Var, weight: Var, bias: Var) -> Var:
    """The convolution of every channel with its own odd kernel, zero padded to the shape of x.

    Jittor's own layers sum the gradients of their parameters in float32, and the three-dimensional one mixes
    up its axes on the processor.

    Args:
        x: (N, C, *spatial), in at least float32.
        weight: (C, 1, *kernel), with as many axes as x.
        bias: (C,).
    """
    kernel, rank = weight.shape[2:], len(x.shape)
    taps = [f"i{axis}+i{rank + axis - 2}-{kernel[axis - 2] // 2}" for axis in range(2, rank)]
    windows = x.reindex([*x.shape, *kernel], ["i0", "i1", *taps])
    positions = (0, *range(2, rank))
    products = windows * spread(weight.float64().squeeze(1), windows, *positions)
    y = products.sum(list(range(rank, len(windows.shape))))
    return y + spread(bias.float64(), y, *positions)


def accumulate(
    running: tuple[Var, Var],
    mean: Var,
    var: Var,
    new_weight: float | Var | None,
    *,
    count: Var | None = None,
    values: int | None = None,
) -> None:
    """Eq. 3, in place and without a gradient: running <- running + (1 - m) (batch - running).

    Args:
        running: E and Var, (C,) each. They keep their dtype, but for half precision, which becomes float32.
        mean: mu_B, (C,).
        var: sigma_B^2, (C,), biased.
        new_weight: 1 - m, the weight of the batch; `None` takes 1 / count, for the average of all batches.
        count: The number of batches with this one, an integer of shape (1,).
        values: n of eq. 2, to accumulate n / (n - 1) sigma_B^2; `None` takes sigma_B^2 as it is.

    Raises:
        RBNValueError: There is neither a weight nor a count.

    Example:
        >>> import jittor as jt
        >>> from rbn.backends.jittor import functional
        >>> running = jt.zeros((1,)), jt.ones((1,))
        >>> functional.accumulate(running, jt.array([3.0]), jt.array([2.0]), 0.5)
        >>> [statistic.item() for statistic in running]
        [1.5, 1.5]
    """
    with jt.no_grad(), internals.full_precision(gradients=False):
        if new_weight is not None:
            weight = constant(new_weight)
        elif count is not None:
            weight = constant(1) / count.float64()
        else:
            raise RBNValueError(
                "accumulate: expected count with new_weight=None, the average of all batches, got None. "
                "Pass the number of batches with this one, or the weight of the batch."
            )
        if values is not None:
            var = var * constant(values / (values - 1))
        for old, batch in zip(running, (mean, var), strict=True):
            exact = old.float64()
            # Not back to half precision, which Module.float16() makes of statistics too.
            old.update((exact + weight * (batch - exact)).cast(at_least_float32(old).dtype))


def image_statistic(name: Statistic, x: Var, eps: float) -> Var:
    """One of `IMAGE_STATISTICS`, in the shape of x; mu_s and sigma_s are over the channels of a position."""
    mean = mean_over(x, 1)
    if name == "spatial_mean":
        return spread(mean, x, 1)
    var = mean_over(jt.sqr(x - spread(mean, x, 1)), 1)
    return spread(jt.sqrt(var + constant(eps)), x, 1)


def scale_by_image(
    x_s: Var, parameters: Mapping[str, Var], eps: float, scaling: Statistic, restrict: str
) -> Var:
    """Eq. 9 and the affine step, for one of `IMAGE_STATISTICS`."""
    k_s = image_statistic(scaling, x_s, eps)
    z = per_channel(parameters["scale_weight"], x_s) * k_s + per_channel(parameters["scale_bias"], x_s)
    y = x_s * RESTRICT[restrict](z)
    if "gamma" in parameters:
        y = y * per_channel(parameters["gamma"], y)
    if "beta" in parameters:
        y = y + per_channel(parameters["beta"], y)
    return y


def mean_over(x: Var, dim: int) -> Var:
    """The float64 mean along an axis; Jittor's own has a gradient with the 1 / n of float32."""
    return x.float64().sum(dim) / constant(x.shape[dim])


def per_channel(values: Var, x: Var) -> Var:
    """(C,) values broadcast to x, (N, C, M)."""
    return spread(values, x, 0, 2)


def spread(values: Var, x: Var, *dims: int) -> Var:
    """float64 values broadcast to x along `dims`, in the dtype of x; their gradient is a float64 sum."""
    return values.broadcast(x, dims).cast(x.dtype)


def as_planes(x: Var) -> Var:
    """x, (N, C, *spatial), seen as (N, C, M): one compiled kernel serves every rank."""
    return x.reshape((*x.shape[:2], math.prod(x.shape[2:])))


def at_least_float32(x: Var) -> Var:
    """x, in float32 if it is in half precision."""
    return x.float32() if x.dtype in ("float16", "bfloat16") else x


def constant(value: float | Var) -> Var:
    """A number in float64, which Jittor would round to float32; so it would 1 / x for an x of one element."""
    return jt.array(value, dtype="float64")
