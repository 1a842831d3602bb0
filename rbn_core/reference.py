"""The reference: Representative Batch Normalization and its relatives as the papers write them, in float64.

Gao et al., "Representative Batch Normalization with Feature Calibration", CVPR 2021. Every step carries the
number of its equation there; IEBN and BNET share the steps that they have in common with it. Nothing here is
fast; everything here is meant to be read beside the papers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rbn_core.config import Config, check_counter, check_input, check_shape, refuse_unknown_options
from rbn_core.matching import State, match
from rbn_core.options import Statistic

Array = NDArray[Any]


@dataclass(frozen=True)
class Steps:
    """What one forward pass computed, under the paper's symbols; the backward pass reads it."""

    batch_statistics: bool
    x: Array
    k_m: Array | None
    x_cm: Array
    mean: Array
    inverse_std: Array
    x_s: Array
    k_s: Array | None
    restriction: Array | None
    x_cs: Array
    y: Array


class Layer:
    """What RBN, IEBN and BNET have in common: every step of eq. 12, as far as the options have it.

    Inputs have the shape (N, C, *spatial) and are taken to float64; parameters and statistics are float64
    under their canonical names. A subclass with a longer `dtype` has the same equations to more digits.

    Args:
        config: The options.

    Attributes:
        parameters: What is learned, under canonical names.
        statistics: What training accumulates, under canonical names.
        steps: What the last forward pass computed.
    """

    dtype: type[np.floating[Any]] = np.float64

    def __init__(self, config: Config) -> None:
        self.config = config
        self.parameters: dict[str, Array] = {
            name: np.full(config.num_features, start, self.dtype) for name, start in config.parameters.items()
        }
        if config.kernel_size is not None:
            self.parameters["conv_weight"] = centre_tap(config).astype(self.dtype)
            self.parameters["conv_bias"] = np.zeros(config.num_features, self.dtype)
        self.statistics: dict[str, Any] = {}
        if config.track_running_stats:
            self.statistics = {
                "running_mean": np.zeros(config.num_features, self.dtype),
                "running_var": np.ones(config.num_features, self.dtype),
                "num_batches_tracked": 0,
            }
        self.steps: Steps | None = None

    def state(self) -> State:
        """Copies of everything the layer stores, under canonical names."""
        return {name: np.array(value) for name, value in (self.parameters | self.statistics).items()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Load a state.

        Raises:
            RBNValueError: Names are missing or unexpected, or shapes are wrong; nothing has changed then.
        """
        arrays, _ = match(state, self.config.state_shapes())
        for name, array in arrays.items():
            if name == "num_batches_tracked":
                self.statistics[name] = int(array)
            else:
                own = self.parameters if name in self.parameters else self.statistics
                own[name] = array.astype(self.dtype)

    def forward(self, x: Any, training: bool) -> Array:
        """Y of eq. 12; in training from batch statistics, which eq. 3 then accumulates.

        Args:
            x: (N, C, *spatial), any floating-point dtype; not changed.
            training: Batch statistics (True) or running statistics (False).

        Returns:
            Y, of the shape of x, in float64.
        """
        x = np.asarray(x)
        batch_statistics = training or not self.config.track_running_stats
        self.check_input(x, batch_statistics)
        x = x.astype(self.dtype)
        k_m, x_cm = self.calibrate_centering(x)
        mean, var = self.statistics_of(x_cm, training)
        x_s, inverse_std = self.standardize(x_cm, mean, var)
        k_s = self.scaling_statistic(x, x_s)
        restriction, x_cs = self.calibrate_scaling(x_s, k_s)
        y = self.transform(x_cs)
        self.steps = Steps(batch_statistics, x, k_m, x_cm, mean, inverse_std, x_s, k_s, restriction, x_cs, y)
        return y

    def check_input(self, x: Array, batch_statistics: bool) -> None:
        """Refuse an input that the layer cannot normalize, and what is stored where it does not fit."""
        check_input(
            x.shape,
            x.dtype.name,
            self.config.num_features,
            training=batch_statistics,
            spatial_dims=None if self.config.kernel_size is None else self.config.spatial_dims,
            layer=self.config.layer,
        )
        stored, due = self.parameters | self.statistics, self.config.state_shapes()
        if due.pop("num_batches_tracked", None) is not None and batch_statistics:
            check_counter(stored.get("num_batches_tracked"), self.config.momentum, self.config.layer)
        for name, shape in due.items():
            found = stored.get(name)
            check_shape(name, None if found is None else np.shape(found), shape, self.config.layer)

    def calibrate_centering(self, x: Array) -> tuple[Array | None, Array]:
        """Eq. 5: X_cm = X + w_m K_m."""
        if self.config.centering is None:
            return None, x
        k_m = statistic(self.config.centering, x, self.config.eps)
        return k_m, x + per_channel(self.parameters["center_weight"], x) * k_m

    def statistics_of(self, x_cm: Array, training: bool) -> tuple[Array, Array]:
        """E and Var of eq. 12, (C,) each: the batch's, accumulated in training, or the running ones."""
        tracked = self.config.track_running_stats
        if not training and tracked:
            mean, var = (self.statistics[name].astype(self.dtype) for name in ("running_mean", "running_var"))
            return mean, var
        mean, var = batch_mean_and_variance(x_cm)
        if tracked:
            self.accumulate(mean, var, values=x_cm.size // x_cm.shape[1])
        return mean, var

    def accumulate(self, mean: Array, var: Array, values: int) -> None:
        """Eq. 3: E <- m E + (1 - m) mu_B and Var <- m Var + (1 - m) sigma_B^2.

        `values` is n of eq. 2, the number of values behind each channel's statistic.
        """
        if self.statistics.get("num_batches_tracked") is not None:
            self.statistics["num_batches_tracked"] += 1
        m = self.config.momentum
        if m is None:
            m = 1.0 - 1.0 / self.statistics["num_batches_tracked"]
        if self.config.running_var == "unbiased":
            var = var * values / (values - 1)
        self.statistics["running_mean"] = m * self.statistics["running_mean"] + (1.0 - m) * mean
        self.statistics["running_var"] = m * self.statistics["running_var"] + (1.0 - m) * var

    def standardize(self, x_cm: Array, mean: Array, var: Array) -> tuple[Array, Array]:
        """Centering and scaling of eq. 12: X_s = (X_cm - E) / sqrt(Var + eps), and 1 / sqrt(Var + eps)."""
        inverse_std = 1.0 / np.sqrt(per_channel(var, x_cm) + self.config.eps)
        return (x_cm - per_channel(mean, x_cm)) * inverse_std, inverse_std

    def scaling_statistic(self, x: Array, x_s: Array) -> Array | None:
        """K_s of eq. 9, a statistic of X_s; IEBN's is one of X."""
        if self.config.scaling is None:
            return None
        source = x if self.config.scaling == "input_mean" else x_s
        return statistic(self.config.scaling, source, self.config.eps)

    def calibrate_scaling(self, x_s: Array, k_s: Array | None) -> tuple[Array | None, Array]:
        """Eq. 9: R(w_v K_s + w_b), and X_cs = X_s times it."""
        if k_s is None:
            return None, x_s
        w_v = per_channel(self.parameters["scale_weight"], x_s)
        w_b = per_channel(self.parameters["scale_bias"], x_s)
        restriction = RESTRICT[self.config.restrict](w_v * k_s + w_b)
        return restriction, x_s * restriction

    def transform(self, x_cs: Array) -> Array:
        """The affine step of eq. 1: Y = X_cs gamma + beta; BNET's convolution in its place."""
        if self.config.kernel_size is not None:
            return depthwise_convolution(x_cs, self.parameters["conv_weight"], self.parameters["conv_bias"])
        y = x_cs
        if self.config.gamma:
            y = y * per_channel(self.parameters["gamma"], y)
        if self.config.beta:
            y = y + per_channel(self.parameters["beta"], y)
        return y

    def backward(self, dy: Any) -> tuple[Array, dict[str, Array]]:
        """The gradient of sum(Y dY) for the last forward pass, through every statistic.

        Args:
            dy: The gradient of Y, of its shape.

        Returns:
            The gradient of X, and of every parameter under its canonical name.
        """
        if self.steps is None:
            raise RuntimeError("RBN: expected a forward pass before backward, got none. Call forward first.")
        s = self.steps
        gradients: dict[str, Array] = {}
        dx_cs = self.transform_backward(np.asarray(dy, dtype=self.dtype), s, gradients)
        dx_s, dx_attention = self.calibrate_scaling_backward(dx_cs, s, gradients)
        dx_cm = self.standardize_backward(dx_s, s)
        return self.calibrate_centering_backward(dx_cm, s, gradients) + dx_attention, gradients

    def transform_backward(self, dy: Array, s: Steps, gradients: dict[str, Array]) -> Array:
        """dX_cs = dY gamma; in BNET the correlation of dY with the kernel."""
        if self.config.kernel_size is not None:
            gradients["conv_bias"] = over_channel(dy)
            dx_cs, gradients["conv_weight"] = depthwise_convolution_backward(
                dy, s.x_cs, self.parameters["conv_weight"]
            )
            return dx_cs
        if self.config.beta:
            gradients["beta"] = over_channel(dy)
        if not self.config.gamma:
            return dy
        gradients["gamma"] = over_channel(dy * s.x_cs)
        return dy * per_channel(self.parameters["gamma"], dy)

    def calibrate_scaling_backward(
        self, dx_cs: Array, s: Steps, gradients: dict[str, Array]
    ) -> tuple[Array, Array | float]:
        """dX_s = dX_cs R + (dK_s/dX_s)^T dK_s, of eq. 9, and what goes to X itself: IEBN's dK_s."""
        scaling = self.config.scaling
        if scaling is None:
            return dx_cs, 0.0
        assert s.k_s is not None
        assert s.restriction is not None
        dz = dx_cs * s.x_s * RESTRICT_SLOPE[self.config.restrict](s.restriction)
        gradients["scale_weight"] = over_channel(dz * s.k_s)
        gradients["scale_bias"] = over_channel(dz)
        dk_s = dz * per_channel(self.parameters["scale_weight"], dz)
        dx_s = dx_cs * s.restriction
        if scaling == "input_mean":
            return dx_s, statistic_backward(scaling, s.x, s.k_s, dk_s)
        return dx_s + statistic_backward(scaling, s.x_s, s.k_s, dk_s), 0.0

    def standardize_backward(self, dx_s: Array, s: Steps) -> Array:
        """dX_cm of X_s = (X_cm - E) / sqrt(Var + eps), E and Var the batch's in training."""
        dx_cm = dx_s * s.inverse_std
        if not s.batch_statistics:
            return dx_cm
        axes = (0, *spatial_axes(dx_s))
        through_mean = dx_cm.mean(axis=axes, keepdims=True)
        through_variance = s.x_s * (dx_cm * s.x_s).mean(axis=axes, keepdims=True)
        return dx_cm - through_mean - through_variance

    def calibrate_centering_backward(self, dx_cm: Array, s: Steps, gradients: dict[str, Array]) -> Array:
        """dX = dX_cm + (dK_m/dX)^T dK_m, of eq. 5."""
        if self.config.centering is None:
            return dx_cm
        assert s.k_m is not None
        k_m = np.broadcast_to(s.k_m, s.x.shape)
        if s.batch_statistics:  # sum dX_cm = 0: the mean of K_m would only multiply rounding errors
            k_m = k_m - k_m.mean(axis=(0, *spatial_axes(k_m)), keepdims=True)
        gradients["center_weight"] = over_channel(dx_cm * k_m)
        dk_m = dx_cm * per_channel(self.parameters["center_weight"], dx_cm)
        return dx_cm + statistic_backward(self.config.centering, s.x, s.k_m, dk_m)


@refuse_unknown_options
class RBN(Layer):
    """Representative Batch Normalization, eq. 12, literally, with a hand-derived gradient.

        X_cm = X + w_m K_m                        centering calibration, eq. 5
        X_m  = X_cm - E(X_cm)                     centering
        X_s  = X_m / sqrt(Var(X_cm) + eps)        scaling
        X_cs = X_s R(w_v K_s + w_b)               scaling calibration, eq. 9
        Y    = X_cs gamma + beta                  affine

    Args:
        num_features: C, the number of channels.
        eps: epsilon of eq. 1.
        momentum: m of eq. 3, the weight of the old value; `None` averages all batches equally.
        centering: The statistic K_m of eq. 5, or `None`.
        scaling: The statistic K_s of eq. 9, or `None`.
        restrict: R of eq. 9, "sigmoid" or "hard_sigmoid".
        running_var: "unbiased" or "biased", the batch variance that eq. 3 accumulates.
        gamma: Whether there is a gamma.
        beta: Whether there is a beta.
        track_running_stats: Whether there are running statistics; without them evaluation uses the batch's.

    Raises:
        RBNError: An option or an input is refused; see `rbn_core.config`.

    Example:
        >>> import numpy as np
        >>> from rbn_core import RBN
        >>> layer, x = RBN(2, scaling="channel_std"), np.random.default_rng(0).normal(size=(4, 2, 3, 3))
        >>> y = layer.forward(x, training=True)
        >>> dx, gradients = layer.backward(np.ones_like(y))
        >>> y.shape, sorted(gradients)
        ((4, 2, 3, 3), ['beta', 'center_weight', 'gamma', 'scale_bias', 'scale_weight'])
    """

    def __init__(
        self,
        num_features: int,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.9,
        centering: Statistic | None = "channel_mean",
        scaling: Statistic | None = "channel_mean",
        restrict: str = "sigmoid",
        running_var: str = "unbiased",
        gamma: bool = True,
        beta: bool = True,
        track_running_stats: bool = True,
    ) -> None:
        super().__init__(
            Config(
                num_features,
                eps,
                momentum,
                centering,
                scaling,
                restrict,
                running_var,
                gamma,
                beta,
                track_running_stats,
            )
        )


@refuse_unknown_options
class IEBN(Layer):
    """Instance Enhancement Batch Normalization (Liang et al., AAAI 2020): BatchNorm times an attention.

        X_s = (X - E(X)) / sqrt(Var(X) + eps)
        Y   = X_s sigmoid(w_v mean_c(X) + w_b) gamma + beta        mean_c over the positions of one channel

    w_v starts at 0 and w_b at -1. Options and errors are those of `RBN`, without `centering`, `scaling` and
    `restrict`.

    Example:
        >>> import numpy as np
        >>> from rbn_core import IEBN
        >>> IEBN(2).forward(np.ones((4, 2, 3)), training=False).shape
        (4, 2, 3)
    """

    def __init__(
        self,
        num_features: int,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.9,
        running_var: str = "unbiased",
        gamma: bool = True,
        beta: bool = True,
        track_running_stats: bool = True,
    ) -> None:
        super().__init__(
            Config.iebn(
                num_features,
                eps=eps,
                momentum=momentum,
                running_var=running_var,
                gamma=gamma,
                beta=beta,
                track_running_stats=track_running_stats,
            )
        )


@refuse_unknown_options
class BNET(Layer):
    """BatchNorm with an enhanced linear transformation (Xu et al., 2020): its affine step is a convolution.

        X_s = (X - E(X)) / sqrt(Var(X) + eps)
        Y   = depthwise convolution of X_s, zero padded, plus a bias

    A new reference layer has 1 at the centre of every kernel and is plain BatchNorm; the frameworks' layers
    start as their own depthwise convolutions do. Options and errors are those of `RBN`, without `centering`,
    `scaling`, `restrict`, `gamma` and `beta`.

    Args:
        kernel_size: The extent of the kernel along every axis; odd.
        spatial_dims: The number of spatial axes: 1, 2 or 3.

    Example:
        >>> import numpy as np
        >>> from rbn_core import BNET
        >>> BNET(2, kernel_size=5).forward(np.ones((4, 2, 8, 8)), training=False).shape
        (4, 2, 8, 8)
    """

    def __init__(
        self,
        num_features: int,
        kernel_size: int = 3,
        *,
        spatial_dims: int = 2,
        eps: float = 1e-5,
        momentum: float | None = 0.9,
        running_var: str = "unbiased",
        track_running_stats: bool = True,
    ) -> None:
        super().__init__(
            Config.bnet(
                num_features,
                kernel_size,
                spatial_dims,
                eps=eps,
                momentum=momentum,
                running_var=running_var,
                track_running_stats=track_running_stats,
            )
        )


def batch_mean_and_variance(x: Array) -> tuple[Array, Array]:
    """Eq. 2: mu_B and sigma_B^2 of every channel, (C,) each; the variance divided by n."""
    axes = (0, *spatial_axes(x))
    mean = x.mean(axis=axes)
    return mean, np.square(x - per_channel(mean, x)).mean(axis=axes)


def statistic(name: Statistic, x: Array, eps: float) -> Array:
    """Eq. 4: an instance statistic, over the positions of a channel or the channels of a position.

    Returns:
        (N, C, 1, ...) for mu_c and sigma_c, (N, 1, *spatial) for mu_s and sigma_s. A standard deviation is
        sqrt(biased variance + eps), whose gradient is finite where x is constant.
    """
    axes = statistic_axes(name, x)
    mean = x.mean(axis=axes, keepdims=True)
    if name.endswith("mean"):
        return mean
    return np.sqrt(np.square(x - mean).mean(axis=axes, keepdims=True) + eps)


def statistic_backward(name: Statistic, x: Array, k: Array, dk: Array) -> Array:
    """The gradient of x through its statistic k; dk has the shape of x and is summed onto k's here."""
    axes = statistic_axes(name, x)
    dk = dk.sum(axis=axes, keepdims=True)
    count = math.prod(x.shape[axis] for axis in axes)
    if name.endswith("mean"):
        return np.broadcast_to(dk / count, x.shape)
    return dk * (x - x.mean(axis=axes, keepdims=True)) / (count * k)


def statistic_axes(name: Statistic, x: Array) -> tuple[int, ...]:
    """The axes that a statistic is over: the channels of a position, or the positions of a channel."""
    return (1,) if name.startswith("spatial") else spatial_axes(x)


def centre_tap(config: Config) -> Array:
    """The depthwise kernels that leave their input as it is: 1 at the centre, 0 elsewhere."""
    weight = np.zeros(config.state_shapes()["conv_weight"])
    weight[(..., *(size // 2 for size in weight.shape[2:]))] = 1.0
    return weight


def depthwise_convolution(x: Array, weight: Array, bias: Array) -> Array:
    """Each channel correlated with its own kernel, zero padded to the same size, plus a bias.

    Args:
        x: (N, C, *spatial).
        weight: (C, 1, *kernel), of odd extents.
        bias: (C,).
    """
    y = np.broadcast_to(per_channel(bias, x), x.shape)
    padded = np.pad(x, [(0, 0), (0, 0), *((size // 2, size // 2) for size in weight.shape[2:])])
    for tap, window in taps(weight, x):
        y = y + padded[window] * per_channel(weight[tap], x)
    return y


def depthwise_convolution_backward(dy: Array, x: Array, weight: Array) -> tuple[Array, Array]:
    """The gradients of x and of the kernels."""
    margins = [(0, 0), (0, 0), *((size // 2, size // 2) for size in weight.shape[2:])]
    padded = np.pad(x, margins)
    dpadded = np.zeros_like(padded)
    dweight = np.empty(weight.shape, np.result_type(dy, padded))
    for tap, window in taps(weight, x):
        dweight[tap] = over_channel(dy * padded[window])
        dpadded[window] += dy * per_channel(weight[tap], x)
    inside = tuple(slice(before, before + size) for (before, _), size in zip(margins, x.shape, strict=True))
    return dpadded[inside], dweight


def taps(weight: Array, x: Array) -> Iterator[tuple[Any, Any]]:
    """The index of every place of the kernels, and of the window of the padded input that it multiplies."""
    for tap in np.ndindex(*weight.shape[2:]):
        moved = (slice(start, start + size) for start, size in zip(tap, x.shape[2:], strict=True))
        yield (slice(None), 0, *tap), (slice(None), slice(None), *moved)


def sigmoid(z: Array) -> Array:
    """1 / (1 + exp(-z)), written so that no z overflows and a small result keeps its digits."""
    small = np.exp(-np.abs(z))
    return np.where(z < 0.0, small, 1.0) / (1.0 + small)


def hard_sigmoid(z: Array) -> Array:
    """The piecewise linear sigmoid: z / 6 + 1 / 2, held within 0 and 1."""
    return np.clip(z / 6.0 + 0.5, 0.0, 1.0)


def sigmoid_slope(r: Array) -> Array:
    """The derivative of the sigmoid where its value is r."""
    return r * (1.0 - r)


def hard_sigmoid_slope(r: Array) -> Array:
    """The derivative of the piecewise linear sigmoid where its value is r; 0 at its corners."""
    slope = (1.0 + 0.0 * r) / 6.0  # 1 / 6 to as many digits as r has
    return np.where((r > 0.0) & (r < 1.0), slope, 0.0)


RESTRICT = {"sigmoid": sigmoid, "hard_sigmoid": hard_sigmoid}
RESTRICT_SLOPE = {"sigmoid": sigmoid_slope, "hard_sigmoid": hard_sigmoid_slope}


def spatial_axes(x: Array) -> tuple[int, ...]:
    """The axes behind the channel axis; none for (N, C), whose planes are single values."""
    return tuple(range(2, x.ndim))


def per_channel(values: Array, x: Array) -> Array:
    """(C,) values shaped to broadcast over (N, C, *spatial)."""
    return np.reshape(values, (1, -1) + (1,) * (x.ndim - 2))


def over_channel(x: Array) -> Array:
    """The sum over everything but the channel axis: (C,)."""
    return x.sum(axis=(0, *spatial_axes(x)))
