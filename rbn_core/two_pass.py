"""The two-pass form: a layer as one multiply-add per plane, which is what the fast layers compute.

With channel statistics every (n, c) plane is only shifted and scaled, so a layer reads the image twice, as
BatchNorm does, and everything in between happens on (N, C) numbers:

    1. moments(x)                         the mean and biased variance of every plane
    2. calibrate(mu, v, ...) -> a, b      equations 2 to 9 on those numbers
    3. affine(x, a, b)                    Y = a X + b

The functions keep the dtype they are given.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rbn_core import reference
from rbn_core.config import Config
from rbn_core.errors import RBNValueError
from rbn_core.options import MOMENT_STATISTICS
from rbn_core.reference import RESTRICT, RESTRICT_SLOPE

Array = NDArray[Any]


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` computed from the (N, C) moments; `calibrate_backward` reads it."""

    batch_statistics: bool
    mu: Array
    v: Array
    mu_0: Array
    deviation: Array
    translation: Array
    mean: Array
    var: Array
    inverse_std: Array
    k: Array | None
    restriction: Array | None
    a: Array
    b: Array


class TwoPass(reference.Layer):
    """`reference.Layer` with channel statistics, computed in the input's dtype, at least float32.

    Same options, names and results. `reference` says what is computed, this says how cheaply.

    Raises:
        RBNValueError: A statistic does not follow from the moments of a plane.
    """

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if not config.has_two_pass_form:
            raise RBNValueError(
                "TwoPass: expected statistics that follow from a plane's moments, "
                f"{', '.join(MOMENT_STATISTICS)}, got centering={config.centering!r}, "
                f"scaling={config.scaling!r}. Use rbn_core.RBN for the others."
            )

    def forward(self, x: Any, training: bool) -> Array:
        """As `reference.Layer.forward`; Y has the dtype of x."""
        x = np.asarray(x)
        batch_statistics = training or not self.config.track_running_stats
        self.check_input(x, batch_statistics)
        dtype, x = x.dtype, x.astype(np.promote_types(x.dtype, np.float32))
        mu, v = moments(x)
        c = calibrate(self, mu, v, batch_statistics)
        if training and self.config.track_running_stats:
            self.accumulate(c.mean, c.var, values=x.size // x.shape[1])
        self.x, self.calibration, self.x_s = x, c, None
        y = affine(x, c.a, c.b)
        if self.config.kernel_size is not None:
            self.x_s = y
            weight, bias = (self.parameters[name].astype(x.dtype) for name in ("conv_weight", "conv_bias"))
            y = reference.depthwise_convolution(y, weight, bias)
        return y.astype(dtype)

    def backward(self, dy: Any) -> tuple[Array, dict[str, Array]]:
        """As `reference.Layer.backward`, in one reading and one writing pass."""
        x, c = self.x, self.calibration
        dy = np.asarray(dy, dtype=x.dtype)
        convolution: dict[str, Array] = {}
        if self.x_s is not None:
            convolution["conv_bias"] = reference.over_channel(dy)
            weight = self.parameters["conv_weight"].astype(x.dtype)
            dy, convolution["conv_weight"] = reference.depthwise_convolution_backward(dy, self.x_s, weight)
        s0, s1 = backward_sums(dy, x, c.mu)
        dmu, dv, gradients = calibrate_backward(self, c, da=s1 + c.mu * s0, db=s0)
        gradients |= convolution
        if not c.batch_statistics and self.config.centering is None and self.config.scaling is None:
            return (c.a[..., None] * as_planes(dy)).reshape(x.shape), gradients  # no statistic of X is in Y
        return backward_affine(dy, x, c, dmu, dv), gradients


def moments(x: Array) -> tuple[Array, Array]:
    """The mean and biased variance of every plane, (N, C) each; the variance from x - mean, never x^2."""
    planes = as_planes(x)
    positions = planes.shape[2]
    mu = planes.sum(axis=2) / positions  # mean() warns of an empty batch
    return mu, np.square(planes - mu[..., None]).sum(axis=2) / positions


def calibrate(layer: reference.Layer, mu: Array, v: Array, batch_statistics: bool) -> Calibration:
    """Equations 2 to 9 on (N, C) moments: the a and b of Y = a X + b.

    With batch statistics Y does not change when all of X is shifted. So plane means are taken from their own
    mean, the origin: their differences are then exact, and the gradient of w_m, which sums plane means times
    gradients that add up to zero, does not multiply rounding errors by the offset of the data.
    """
    config, dtype = layer.config, mu.dtype
    parameters = {name: value.astype(dtype) for name, value in layer.parameters.items()}
    eps = dtype.type(config.eps)

    origin = mu.mean(axis=0) if batch_statistics else np.zeros(mu.shape[1], dtype)
    mu_0 = mu - origin
    shift, origin_cm = np.zeros_like(mu), origin  # of X_cm - X, and where X_cm has the origin of X
    if config.centering == "channel_mean":
        shift = parameters["center_weight"] * mu_0
        origin_cm = origin + parameters["center_weight"] * origin
    elif config.centering == "channel_std":
        shift = parameters["center_weight"] * np.sqrt(v + eps)
    shifted = mu_0 + shift

    if batch_statistics:
        mean_0 = shifted.mean(axis=0)
        mean = mean_0 + origin_cm
        var = v.mean(axis=0) + np.square(shifted - mean_0).mean(axis=0)
    else:
        mean = mean_0 = layer.statistics["running_mean"].astype(dtype)
        var = layer.statistics["running_var"].astype(dtype)
    inverse_std = 1 / np.sqrt(var + eps)
    deviation = shifted - mean_0

    k = None
    if config.scaling == "channel_mean":
        k = deviation * inverse_std
    elif config.scaling == "channel_std":
        k = np.sqrt(v * np.square(inverse_std) + eps)
    elif config.scaling == "input_mean":
        k = mu
    restriction = None
    a = np.broadcast_to(inverse_std, mu.shape)
    if k is not None:
        restriction = RESTRICT[config.restrict](parameters["scale_weight"] * k + parameters["scale_bias"])
        a = a * restriction
    if config.gamma:
        a = a * parameters["gamma"]
    translation = shift - mean_0 - origin  # of X_m - X
    b = a * translation
    if config.beta:
        b = b + parameters["beta"]
    return Calibration(
        batch_statistics, mu, v, mu_0, deviation, translation, mean, var, inverse_std, k, restriction, a, b
    )


def affine(x: Array, a: Array, b: Array) -> Array:
    """Y = a X + b, with one a and b for each plane."""
    return (a[..., None] * as_planes(x) + b[..., None]).reshape(x.shape)


def backward_sums(dy: Array, x: Array, mu: Array) -> tuple[Array, Array]:
    """S0 = sum dY and S1 = sum dY (X - mu) of every plane, (N, C) each: the first backward pass."""
    dy_planes = as_planes(dy)
    return dy_planes.sum(axis=2), (dy_planes * (as_planes(x) - mu[..., None])).sum(axis=2)


def calibrate_backward(
    layer: reference.Layer, c: Calibration, da: Array, db: Array
) -> tuple[Array, Array, dict[str, Array]]:
    """The gradients of mu, v and the parameters, from those of a and b."""
    config, dtype = layer.config, c.mu.dtype
    parameters = {name: value.astype(dtype) for name, value in layer.parameters.items()}
    eps = dtype.type(config.eps)
    gradients: dict[str, Array] = {}
    gamma = parameters["gamma"] if config.gamma else dtype.type(1)
    restriction = c.restriction if c.restriction is not None else dtype.type(1)

    # b = beta + a translation
    if config.beta:
        gradients["beta"] = db.sum(axis=0)
    da = da + db * c.translation
    dshift = db * c.a
    dmean = -dshift.sum(axis=0)

    # a = gamma R inverse_std
    if config.gamma:
        gradients["gamma"] = (da * restriction * c.inverse_std).sum(axis=0)
    dinverse_std = (da * gamma * restriction).sum(axis=0)

    dshifted = np.zeros_like(c.mu)
    dmu = np.zeros_like(c.mu)
    dv = np.zeros_like(c.v)
    if c.k is not None and c.restriction is not None:
        dz = da * gamma * c.inverse_std * RESTRICT_SLOPE[config.restrict](c.restriction)
        gradients["scale_weight"] = (dz * c.k).sum(axis=0)
        gradients["scale_bias"] = dz.sum(axis=0)
        dk = dz * parameters["scale_weight"]
        if config.scaling == "channel_mean":
            dshifted = dshifted + dk * c.inverse_std
            dmean = dmean - (dk * c.inverse_std).sum(axis=0)
            dinverse_std = dinverse_std + (dk * c.deviation).sum(axis=0)
        elif config.scaling == "input_mean":
            dmu = dmu + dk
        else:
            dv = dv + dk * np.square(c.inverse_std) / (2 * c.k)
            dinverse_std = dinverse_std + (dk * c.v * c.inverse_std / c.k).sum(axis=0)

    if c.batch_statistics:
        # V = mean_n v + mean_n deviation^2, whose own mean term cancels
        dvar = -0.5 * dinverse_std * c.inverse_std**3 / len(c.mu)
        dv = dv + dvar
        dshifted = dshifted + 2 * dvar * c.deviation + dmean / len(c.mu)

    dshift = dshift + dshifted
    dmu = dmu + dshifted
    if config.centering == "channel_mean":
        gradients["center_weight"] = (dshift * c.mu_0).sum(axis=0)
        dmu = dmu + dshift * parameters["center_weight"]
    elif config.centering == "channel_std":
        deviation = np.sqrt(c.v + eps)
        gradients["center_weight"] = (dshift * deviation).sum(axis=0)
        dv = dv + dshift * parameters["center_weight"] / (2 * deviation)
    return dmu, dv, gradients


def backward_affine(dy: Array, x: Array, c: Calibration, dmu: Array, dv: Array) -> Array:
    """dX = a dY + e (X - mu) + f with e = 2 dv / M and f = dmu / M: the second backward pass.

    With e X and f - e mu instead, the two would cancel where mu is large against the plane's deviation.
    """
    planes = as_planes(x)
    e, f = 2 * dv / planes.shape[2], dmu / planes.shape[2]
    dx = c.a[..., None] * as_planes(dy) + e[..., None] * (planes - c.mu[..., None]) + f[..., None]
    return dx.reshape(x.shape)


def as_planes(x: Array) -> Array:
    """(N, C, *spatial) as (N, C, M)."""
    return x.reshape(*x.shape[:2], -1) if x.size else x.reshape(*x.shape[:2], 0)
