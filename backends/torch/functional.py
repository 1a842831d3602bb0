"""RBN in PyTorch operations: the two-pass form of `rbn_core.two_pass`, and image statistics around it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from rbn.backends.torch import internals
from rbn_core.options import IMAGE_STATISTICS, Statistic


def hard_sigmoid(z: Tensor) -> Tensor:
    """z / 6 + 1 / 2 within 0 and 1; torch's own has a float32 slope in float64 too."""
    return (z / 6 + 0.5).clamp(0, 1)


RESTRICT = {"sigmoid": torch.sigmoid, "hard_sigmoid": hard_sigmoid}

Average = Callable[[Tensor], Tensor]


def batch_average(values: Tensor) -> Tensor:
    """(N, C) plane values to their mean over the batch, (C,)."""
    return values.mean(dim=0)


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
        x: (N, C, *spatial), any memory format; not changed.
        parameters: gamma, beta, center_weight, scale_weight and scale_bias, (C,) each, where the layer has
            them.
        running: E and Var of eq. 1, (C,) each; `None` takes the batch's.
        eps: epsilon of eq. 1.
        centering: K_m of eq. 5, or `None`.
        scaling: K_s of eq. 9, or `None`.
        restrict: R of eq. 9.
        average: Takes (N, C) plane values to their mean over the batch, (C,); here or over all processes.

    Returns:
        Y, and the E and biased Var it was normalized with, all in at least float32.
    """
    x = dense(x)[0].to(torch.promote_types(x.dtype, torch.float32))
    if centering in IMAGE_STATISTICS:
        x = x + per_channel(parameters["center_weight"], x) * image_statistic(centering, x, eps)
        centering = None
    if scaling in IMAGE_STATISTICS:
        before = {"center_weight": parameters["center_weight"]} if centering else {}
        x_s, mean, var = two_pass(x, before, running, eps, centering, None, restrict, average)
        y = scale_by_image(x_s, parameters, eps, scaling, restrict)
    else:
        y, mean, var = two_pass(x, parameters, running, eps, centering, scaling, restrict, average)
    return y, mean, var


def two_pass(
    x: Tensor,
    parameters: Mapping[str, Tensor],
    running: tuple[Tensor, Tensor] | None,
    eps: float,
    centering: Statistic | None,
    scaling: Statistic | None,
    restrict: str,
    average: Average,
) -> tuple[Tensor, Tensor, Tensor]:
    """Y, E and Var for channel statistics; only the first and the last step touch the image."""
    mu, v = moments(x)
    a, b, mean, var = calibrate(mu, v, parameters, running, eps, centering, scaling, restrict, average)
    return affine(x, a, b), mean, var


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """The mean and biased variance of every plane, (N, C) each."""
    planes = as_planes(x)
    if x.numel() == 0:  # var_mean warns; an empty share still takes its part in the group's backward pass
        return planes.sum(dim=2), planes.sum(dim=2)
    var, mean = torch.var_mean(planes, dim=2, correction=0)
    return mean, var


def calibrate(
    mu: Tensor,
    v: Tensor,
    parameters: Mapping[str, Tensor],
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
    origin = average(mu.detach()) if running is None else mu.new_zeros(mu.shape[1])
    mu_0 = mu - origin
    shift, origin_cm = torch.zeros_like(mu), origin
    if centering == "channel_mean":
        shift = parameters["center_weight"] * mu_0
        origin_cm = origin + parameters["center_weight"] * origin
    elif centering == "channel_std":
        shift = parameters["center_weight"] * torch.sqrt(v + eps)
    shifted = mu_0 + shift  # the plane means of X_cm; its plane variances are those of X

    if running is None:
        mean_0 = average(shifted)
        mean = mean_0 + origin_cm
        var = average(v + (shifted - mean_0).square())
    else:
        mean, var = (statistic.to(mu.dtype) for statistic in running)
        mean_0 = mean
    inverse_std = torch.rsqrt(var + eps)

    a = inverse_std.expand_as(mu)
    if scaling is not None:
        k_s = (shifted - mean_0) * inverse_std
        if scaling == "channel_std":
            k_s = torch.sqrt(v * inverse_std.square() + eps)
        elif scaling == "input_mean":
            k_s = mu
        a = a * RESTRICT[restrict](parameters["scale_weight"] * k_s + parameters["scale_bias"])
    if "gamma" in parameters:
        a = a * parameters["gamma"]
    b = a * (shift - mean_0 - origin)
    if "beta" in parameters:
        b = b + parameters["beta"]
    return a, b, mean, var


def affine(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Y = a X + b, with one a and one b for each plane."""
    plane = (*a.shape, *(1,) * (x.dim() - 2))
    return x * a.reshape(plane) + b.reshape(plane)


def accumulate(
    running: tuple[Tensor, Tensor],
    mean: Tensor,
    var: Tensor,
    new_weight: float | None,
    *,
    count: Tensor | None = None,
    values: int | None = None,
) -> None:
    """Eq. 3, in place: running <- running + (1 - m) (batch - running), without a gradient.

    Detached and not in `torch.no_grad()`, which an exported program cannot be saved with.

    Args:
        running: E and Var, (C,) each.
        mean: mu_B, (C,).
        var: sigma_B^2, (C,), biased.
        new_weight: 1 - m, the weight of the batch; `None` takes 1 / count, for the average of all batches.
        count: The number of batches with this one.
        values: n of eq. 2, to accumulate n / (n - 1) sigma_B^2; `None` takes sigma_B^2 as it is.
    """
    weight: Any = new_weight
    if weight is None and count is not None:
        weight = count.to(running[0]).reciprocal()  # in their dtype: 1 / an integer tensor is float32
    if not torch.compiler.is_compiling() and internals.functorch_is_active():
        mean, var, weight = (internals.as_written_to(running[0], value) for value in (mean, var, weight))
    correction = 1.0 if values is None else values / (values - 1)
    for old, batch in zip(running, (mean.detach(), var.detach() * correction), strict=True):
        old.detach().lerp_(batch.to(old.dtype), weight)


def image_statistic(name: Statistic, x: Tensor, eps: float) -> Tensor:
    """One of `IMAGE_STATISTICS`, so far over the channels of a position, (N, 1, *spatial): mu_s, sigma_s."""
    if name == "spatial_mean":
        return x.mean(dim=1, keepdim=True)
    return torch.sqrt(x.var(dim=1, correction=0, keepdim=True) + eps)


def scale_by_image(
    x_s: Tensor, parameters: Mapping[str, Tensor], eps: float, scaling: Statistic, restrict: str
) -> Tensor:
    """Eq. 9 and the affine step, for one of `IMAGE_STATISTICS`."""
    k_s = image_statistic(scaling, x_s, eps)
    z = per_channel(parameters["scale_weight"], x_s) * k_s + per_channel(parameters["scale_bias"], x_s)
    y = x_s * RESTRICT[restrict](z)
    if "gamma" in parameters:
        y = y * per_channel(parameters["gamma"], y)
    if "beta" in parameters:
        y = y + per_channel(parameters["beta"], y)
    return y


def per_channel(values: Tensor, x: Tensor) -> Tensor:
    """(C,) values shaped to broadcast over x, (N, C, *spatial)."""
    return values.reshape(-1, *(1,) * (x.dim() - 2))


def dense(x: Tensor) -> tuple[Tensor, bool]:
    """x without gaps in memory, copied only if need be, and whether its channels lie last."""
    if x.is_contiguous():
        return x, False
    last = x.movedim(1, -1)
    if last.is_contiguous():
        return x, True
    if _has_channels_last(x):
        return last.contiguous().movedim(-1, 1), True
    return x.contiguous(), False


def _has_channels_last(x: Tensor) -> bool:
    """Whether an image with gaps is a part of one with channels last, as PyTorch's own layers see it."""
    if x.dim() not in (4, 5) or x.stride(1) == 0:
        return False
    least = 0
    for axis in (1, *range(x.dim() - 1, 1, -1), 0):
        if x.stride(axis) < least or (axis == 0 and least == x.stride(1)):
            return False
        least = x.stride(axis) * max(x.shape[axis], 1)
    return True


def as_planes(x: Tensor) -> Tensor:
    """x, (N, C, *spatial), seen as (N, C, M)."""
    return x.flatten(2) if x.dim() > 2 else x.unsqueeze(2)
