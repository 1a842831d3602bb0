"""RBN in MindSpore operations: the two-pass form of `rbn_core.two_pass`, and image statistics around it.

Everything here runs in PyNative and is compiled in graph mode, whose parser takes a part of Python only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from numpy.lib.stride_tricks import sliding_window_view

from rbn.backends.mindspore import internals
from rbn_core.errors import RBNError
from rbn_core.options import IMAGE_STATISTICS, Statistic

Average = Callable[[Tensor], Tensor]
Stored = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]
"""gamma, beta, center_weight, scale_weight and scale_bias, (C,) each, or `None` where the layer lacks one.

No mapping: a gradient's gradient may be compiled when MindSpore no longer resolves one.
"""


def batch_average(values: Tensor) -> Tensor:
    """(N, C) plane values to their mean over the batch, (C,)."""
    return ops.mean(values, 0)


def restriction(name: str, z: Tensor) -> Tensor:
    """R of eq. 9: 1 / (1 + exp(-z)), or z / 6 + 1 / 2 within 0 and 1.

    Not a table: mixed precision at level O1 copies this code without the variables of its module.
    """
    if name == "hard_sigmoid":
        return ops.clamp(z / 6 + 0.5, 0, 1)
    return ops.sigmoid(z)


def rbn(
    x: Tensor,
    parameters: Mapping[str, Tensor],
    running: tuple[Tensor, Tensor] | None,
    *,
    eps: float,
    centering: Statistic | None,
    scaling: Statistic | None,
    restrict: str,
    average: Average = batch_average,
) -> tuple[Tensor, Tensor, Tensor]:
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
        Y, and the E and biased Var it was normalized with, all in at least float32.
    """
    x = x.astype(at_least_float32(x.dtype))
    if centering in IMAGE_STATISTICS:
        x = x + per_channel(parameters["center_weight"], x) * image_statistic(centering, x, eps)
        centering = None
    if scaling in IMAGE_STATISTICS:
        before = {"center_weight": parameters["center_weight"]} if centering is not None else {}
        x_s, mean, var = two_pass(x, in_order(before), running, eps, centering, None, restrict, average)
        y = scale_by_image(x_s, parameters, eps, scaling, restrict)
    else:
        y, mean, var = two_pass(x, in_order(parameters), running, eps, centering, scaling, restrict, average)
    return y, mean, var


def in_order(parameters: Mapping[str, Tensor]) -> Stored:
    """The parameters without their names."""
    return (
        parameters.get("gamma"),
        parameters.get("beta"),
        parameters.get("center_weight"),
        parameters.get("scale_weight"),
        parameters.get("scale_bias"),
    )


def differentiable_once(y: Tensor) -> Tensor:
    """Y, whose second gradients are refused in PyNative.

    There MindSpore's are silently wrong: a reshape behind a product, for one, stops them.
    """
    if ops.isconstant(y):  # as everything is in PyNative, and no result in a graph
        return DifferentiableOnce()(y)
    return y


class DifferentiableOnce(nn.Cell):
    """The identity; see `differentiable_once`."""

    def construct(self, y: Tensor) -> Tensor:
        """Y itself."""
        return y

    def bprop(self, y: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor]:
        """The gradient of Y.

        Raises:
            RBNError: It is to be differentiated in turn.
        """
        refuse_second_gradients()
        return (dout,)


def refuse_second_gradients() -> None:
    """Raise where the gradient that runs in PyNative is part of what another gradient is taken of.

    Raises:
        RBNError: It is.
    """
    if internals.is_recorded():
        raise RBNError(
            "RBN: expected a first gradient in PyNative mode, got the gradient of a gradient, which "
            "MindSpore computes wrongly there. Build the layer with fused=False and compile what is "
            "differentiated twice: ms.grad(ms.jit(loss))."
        )


def two_pass(
    x: Tensor,
    stored: Stored,
    running: tuple[Tensor, Tensor] | None,
    eps: float,
    centering: Statistic | None,
    scaling: Statistic | None,
    restrict: str,
    average: Average,
) -> tuple[Tensor, Tensor, Tensor]:
    """Y, E and Var for channel statistics; only the first and the last step touch the image."""
    mu, v = moments(x)
    a, b, mean, var = calibrate(mu, v, stored, running, eps, centering, scaling, restrict, average)
    return affine(x, a, b), mean, var


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """The mean and biased variance of every plane, (N, C) each."""
    planes = as_planes(x)
    mu = ops.mean(planes, 2, True)
    v = ops.mean(ops.square(planes - mu), 2)
    return mu.reshape(x.shape[:2]), v


def calibrate(
    mu: Tensor,
    v: Tensor,
    stored: Stored,
    running: tuple[Tensor, Tensor] | None,
    eps: float,
    centering: Statistic | None,
    scaling: Statistic | None,
    restrict: str,
    average: Average,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Equations 2 to 9 on (N, C) moments, for channel statistics.

    The batch's plane means are measured from their own mean, as `rbn_core.two_pass.calibrate` explains. Y
    does not depend on that origin, so it needs no gradient.

    Returns:
        a and b of Y = a X + b, (N, C) each, and the E and biased Var they were made with, (C,) each.
    """
    gamma, beta, center_weight, scale_weight, scale_bias = stored
    epsilon = scalar(eps, mu)
    origin = average(ops.stop_gradient(mu)) if running is None else ops.zeros(mu.shape[1], mu.dtype)
    mu_0 = mu - origin
    shift, origin_cm = ops.ZerosLike()(mu), origin  # zeros_like comes too late in a gradient's gradient
    if centering == "channel_mean":
        shift = center_weight * mu_0
        origin_cm = origin + center_weight * origin
    elif centering == "channel_std":
        shift = center_weight * ops.sqrt(v + epsilon)
    shifted = mu_0 + shift  # the plane means of X_cm; its plane variances are those of X

    if running is None:
        mean_0 = average(shifted)
        mean = mean_0 + origin_cm
        var = average(v + ops.square(shifted - mean_0))
    else:
        mean, var = running[0].astype(mu.dtype), running[1].astype(mu.dtype)
        mean_0 = mean
    inverse_std = scalar(1.0, mu) / ops.sqrt(var + epsilon)  # MindSpore writes no ONNX of rsqrt

    a = inverse_std + ops.ZerosLike()(mu)  # broadcast_to refuses an empty batch in graph mode
    if scaling is not None:
        k_s = (shifted - mean_0) * inverse_std
        if scaling == "channel_std":
            k_s = ops.sqrt(v * ops.square(inverse_std) + epsilon)
        elif scaling == "input_mean":
            k_s = mu
        a = a * restriction(restrict, scale_weight * k_s + scale_bias)
    if gamma is not None:
        a = a * gamma
    b = a * (shift - mean_0 - origin)
    if beta is not None:
        b = b + beta
    return a, b, mean, var


def affine(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Y = a X + b, with one a and one b for each plane."""
    plane = (*a.shape, *(1,) * (x.ndim - 2))
    return x * a.reshape(plane) + b.reshape(plane)


def accumulate(
    running: tuple[Parameter, Parameter],
    mean: Tensor,
    var: Tensor,
    new_weight: float | None,
    *,
    count: Any = None,
    values: int | Tensor | None = None,
) -> None:
    """Eq. 3, in place: running <- running + (1 - m) (batch - running), without a gradient.

    Args:
        running: E and Var, (C,) each.
        mean: mu_B, (C,).
        var: sigma_B^2, (C,), biased.
        new_weight: 1 - m, the weight of the batch; `None` takes 1 / count, for the average of all batches.
        count: The number of batches with this one.
        values: n of eq. 2, to take n / (n - 1) sigma_B^2; `None` takes sigma_B^2.
    """
    if values is not None:
        n = scalar(values, var) if isinstance(values, int) else values
        var = var * (n / (n - 1))
    weight = 1 / count.astype(running[0].dtype) if new_weight is None else scalar(new_weight, running[0])
    for old, batch in ((running[0], mean), (running[1], var)):
        ops.assign_add(old, weight * (ops.stop_gradient(batch).astype(old.dtype) - old))


@ops.constexpr
def complement(momentum: float) -> float:
    """1 - m of eq. 3, in double precision in a graph, too, whose own arithmetic on numbers is in float32."""
    return 1.0 - float(momentum)


def image_statistic(name: Statistic, x: Tensor, eps: float) -> Tensor:
    """One of `IMAGE_STATISTICS`, so far over the channels of a position, (N, 1, *spatial): mu_s, sigma_s."""
    mean = ops.mean(x, 1, True)
    if name == "spatial_mean":
        return mean
    return ops.sqrt(ops.mean(ops.square(x - mean), 1, True) + scalar(eps, x))


def scale_by_image(
    x_s: Tensor, parameters: Mapping[str, Tensor], eps: float, scaling: Statistic, restrict: str
) -> Tensor:
    """Eq. 9 and the affine step, for one of `IMAGE_STATISTICS`."""
    k_s = image_statistic(scaling, x_s, eps)
    z = per_channel(parameters["scale_weight"], x_s) * k_s + per_channel(parameters["scale_bias"], x_s)
    y = x_s * restriction(restrict, z)
    if "gamma" in parameters:
        y = y * per_channel(parameters["gamma"], y)
    if "beta" in parameters:
        y = y + per_channel(parameters["beta"], y)
    return y


def depthwise(x: Tensor, weight: Tensor, bias: Tensor, kernel_size: int) -> Tensor:
    """A zero padded depthwise convolution, for the dtypes that MindSpore's own refuses.

    Args:
        x: (N, C, *spatial).
        weight: (C, 1, *kernel).
        bias: (C,).
        kernel_size: The odd extent of the kernel along every axis.
    """
    images, channels = x.shape[:2]
    planes = as_planes(x)
    padded = ops.cat((planes, ops.zeros((images, channels, 1), x.dtype)), 2)
    patches = ops.gather(padded, neighbours(x.shape[2:], kernel_size), 2)
    patches = patches.reshape((images, channels, planes.shape[2], -1))
    kernel = weight.astype(x.dtype).reshape((channels, 1, -1))  # a graph on a CPU cannot reshape bfloat16
    y = ops.sum(patches * kernel, 3).reshape(x.shape)
    return y + per_channel(bias.astype(x.dtype), x)


@ops.constexpr
def neighbours(spatial: tuple[int, ...], kernel_size: int) -> Tensor:
    """Where the values under a kernel are in a plane, position by position; past its end for the padding."""
    size = math.prod(spatial)
    positions = np.pad(np.arange(size).reshape(spatial), kernel_size // 2, constant_values=size)
    windows = sliding_window_view(positions, (kernel_size,) * len(spatial))
    return Tensor(windows.reshape(-1), ms.int32)


def per_channel(values: Tensor, x: Tensor) -> Tensor:
    """(C,) values shaped to broadcast over x, (N, C, *spatial)."""
    return values.reshape((-1, *(1,) * (x.ndim - 2)))


def as_planes(x: Tensor) -> Tensor:
    """x, (N, C, *spatial), seen as (N, C, M)."""
    return x.reshape((x.shape[0], x.shape[1], -1))


@ops.constexpr(check=False)
def is_known(shape: tuple[int | None, ...] | None) -> bool:
    """Whether every extent is known; in a graph for inputs of several shapes some are `None`."""
    return shape is not None and None not in shape


def cast(x: Tensor, dtype: ms.Type) -> Tensor:
    """x in a dtype; without an operation where it has it, which in PyNative costs as much as a real one."""
    return x if x.dtype == dtype else x.astype(dtype)


def scalar(value: float, like: Tensor) -> Tensor:
    """A number in the dtype of `like`.

    MindSpore rounds a Python float beside a float64 tensor to float32, and in a graph also what arithmetic on
    Python floats gives: do the arithmetic on this.
    """
    return Tensor(value, like.dtype)


def at_least_float32(dtype: ms.Type) -> ms.Type:
    """The dtype that statistics of a tensor of this dtype are taken and kept in."""
    return ms.float64 if dtype == ms.float64 else ms.float32
