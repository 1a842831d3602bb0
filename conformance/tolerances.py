"""How far a correct implementation may be from the reference, and why.

A result is a sum of terms. Rounded arithmetic misses it by a few units in the last place of the *terms*,
however much they cancel, and not of the result. So with the dtype's unit eps,

    tolerance(q) = 16 (eps kappa(q) scale(q) + tiny)

    q                scale(q): the largest sum of terms' magnitudes           kappa(q)
    ---------------- ------------------------------------------------------- --------
    y                (|X_s| + 1) R |gamma| + |beta|                           kappa
    dx               the terms of its gradient, each taken absolutely         kappa
    a parameter's    sum over its channel of the terms' magnitudes            kappa
      gradient
    running_mean     |running mean| + |batch mean|                            1
    running_var      |running variance| + sd^2 + sd T + eps T^2               1
    the counter      exact                                                    -

T is the root mean square of |X| + |w_m K_m| + |E|, the terms of X_m, sd the batch's deviation, and kappa
is T in units of sqrt(Var + eps), at least 1: what centering costs, since X + w_m K_m - E loses as many
digits as its terms have more than the deviation. A variance from X - E costs kappa; one from E[X^2] -
E[X]^2 costs kappa^2, which is beyond 16 kappa from a mean of about 16 deviations on. X_s, and with it K_s,
misses by kappa eps in units of the deviation however small it is itself: so 1 is added to its magnitude,
and a deviation to that of X - mu in the gradient of a standard deviation K, which divides by K: on planes of
one value, by sqrt(eps).
16 leaves room for the four roundings of Y and for sums in any order over the suite's planes; nothing grows
with the array's size. tiny is the dtype's smallest normal number: processors may take what is below for 0.
float16 and bfloat16 results carry one rounding to their own unit on top, since the work in between is done
in float32. In mixed precision so does the gradient of a parameter, which may be of the narrowest type in play
as its parameter may; but no sum is taken in that type: it is a rounding of the gradient itself and not of its
terms. The running statistics are taken and kept in at least float32, unless they were given in half.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import ml_dtypes
import numpy as np

from rbn_core.options import Statistic
from rbn_core.reference import (
    RESTRICT_SLOPE,
    Array,
    Layer,
    depthwise_convolution,
    depthwise_convolution_backward,
    over_channel,
    per_channel,
    spatial_axes,
    statistic_axes,
    statistic_backward,
)

FACTOR = 16.0


def tolerances(layer: Layer, dy: Array, before: dict[str, Array], dtype: str) -> dict[str, float]:
    """The tolerance of every quantity of the reference's last step.

    Args:
        layer: The reference, after forward and backward.
        dy: The cotangent of that step.
        before: The running statistics before it.
        dtype: What the implementation computes in.

    Returns:
        {"y": ..., "dx": ..., "d gamma": ..., ..., "running_mean": ..., ...}.
    """
    assert layer.steps is not None
    if layer.steps.x.size == 0:
        names = ("y", "dx", *(f"d {name}" for name in layer.parameters), *layer.statistics)
        return dict.fromkeys(names, 0.0)
    computed_in = np.finfo(np.promote_types(dtype, np.float32))
    unit, flushed = FACTOR * float(computed_in.eps), FACTOR * float(computed_in.tiny)
    kappa = condition(layer)
    least = float(computed_in.tiny / computed_in.eps)
    scales = {"y": scale_of_y(layer, least)} | scales_of_gradients(layer, dy, least)
    result = {name: unit * kappa * scale + flushed for name, scale in scales.items()}
    if np.dtype(dtype).itemsize < 4:
        for name in ("y", "dx"):
            result[name] += rounding(dtype, scales[name])
    for name in layer.statistics:
        if name == "num_batches_tracked":
            result[name] = 0.0
            continue
        size = largest(before[name]) + largest(layer.statistics[name])
        if name == "running_var":
            t = terms(layer)
            sd = layer.steps.x_cm.std(axis=(0, *spatial_axes(layer.steps.x_cm)))
            size = largest(before[name]) + largest(sd**2 + sd * t + computed_in.eps * t**2)
        result[name] = unit * size + flushed
    return result


def roundings(
    layer: Layer, gradients: Mapping[str, Array], narrower: Mapping[str, str]
) -> Iterator[tuple[str, float]]:
    """What is allowed on top where something that is stored may be of a narrower type.

    Args:
        layer: The reference, after forward and backward.
        gradients: The parameters' gradients of that step.
        narrower: The names of such parameters and statistics, each with that type.

    Yields:
        Every quantity that then carries a rounding more, with its size.
    """
    for name, dtype in narrower.items():
        if name in gradients:
            yield f"d {name}", rounding(dtype, largest(gradients[name]))
        else:
            yield name, rounding(dtype, largest(layer.statistics[name]))


def rounding(dtype: str, size: float) -> float:
    """What one rounding to a dtype may change in a result of a size."""
    kept = ml_dtypes.finfo(dtype)  # type: ignore[no-untyped-call]
    return float(kept.eps) * size + float(kept.smallest_normal)


def condition(layer: Layer) -> float:
    """kappa: what centering costs."""
    assert layer.steps is not None
    return max(1.0, largest(terms(layer) * np.ravel(layer.steps.inverse_std)))


def terms(layer: Layer) -> Array:
    """T: the size of the terms of X_m = X + w_m K_m - E, (C,)."""
    s = layer.steps
    assert s is not None
    sizes = np.abs(s.x) + np.abs(s.x_cm - s.x) + np.abs(per_channel(s.mean, s.x))
    return np.sqrt(np.square(sizes).mean(axis=(0, *spatial_axes(s.x))))


def scale_of_y(layer: Layer, least: float) -> float:
    """The largest (|X_s| + 1) R |gamma| + |beta|; in BNET the sum of |X_s| + 1 times the taps, and |bias|."""
    s = layer.steps
    assert s is not None
    magnitudes = {name: np.abs(value) for name, value in layer.parameters.items()}
    size_s = np.abs(s.x_s) + 1.0
    if layer.config.kernel_size is not None:
        return largest(depthwise_convolution(size_s, magnitudes["conv_weight"], magnitudes["conv_bias"]))
    if s.restriction is not None:
        size_s = size_s * (s.restriction + least)
    gamma, beta = magnitudes.get("gamma", np.ones(1)), magnitudes.get("beta", np.zeros(1))
    return largest(size_s * per_channel(gamma, s.y) + per_channel(beta, s.y))


def scales_of_gradients(layer: Layer, dy: Array, least: float) -> dict[str, float]:
    """The magnitudes that the backward pass adds up: its own equations with every term taken absolutely."""
    s = layer.steps
    assert s is not None
    magnitudes = {name: np.abs(value) for name, value in layer.parameters.items()}
    size_s = np.abs(s.x_s) + 1.0
    scales: dict[str, Array] = {}

    g = np.abs(dy)
    scales["beta"] = over_channel(g)
    # An R below the smallest normal number may be 0: `least` of it is that number, in units of eps.
    restriction = np.ones(1) if s.restriction is None else s.restriction + least
    scales["gamma"] = over_channel(g * size_s * restriction)
    if "gamma" in magnitudes:
        g = g * per_channel(magnitudes["gamma"], g)
    if layer.config.kernel_size is not None:
        scales["conv_bias"] = over_channel(g)
        g, scales["conv_weight"] = depthwise_convolution_backward(g, size_s, magnitudes["conv_weight"])
    g_s = g * restriction
    if s.k_s is not None and s.restriction is not None and layer.config.scaling is not None:
        # R (1 - R), whose 1 - R misses by a unit of R, of which FACTOR are allowed.
        slope = RESTRICT_SLOPE[layer.config.restrict](s.restriction) + restriction / FACTOR + least
        dz = g * size_s * slope
        scales["scale_weight"] = over_channel(dz * (np.abs(s.k_s) + 1.0))
        scales["scale_bias"] = over_channel(dz)
        dk_s = dz * per_channel(magnitudes["scale_weight"], dz)
        g_s = g_s + scale_of_backward(layer.config.scaling, s.x_s, s.k_s, dk_s, deviation=1.0)
    g_cm = g_s * s.inverse_std
    if s.batch_statistics:
        axes = (0, *spatial_axes(dy))
        g_cm = g_cm + g_cm.mean(axis=axes, keepdims=True)
        g_cm = g_cm + size_s * (g_cm * size_s).mean(axis=axes, keepdims=True)
    if s.k_m is not None and layer.config.centering is not None:
        k_m = np.broadcast_to(s.k_m, s.x.shape)
        if s.batch_statistics:  # sum dX_cm = 0, so that only the spread of K_m counts
            k_m = k_m - k_m.mean(axis=(0, *spatial_axes(s.x)), keepdims=True)
        scales["center_weight"] = over_channel(g_cm * (np.abs(k_m) + 1.0 / s.inverse_std))
        dk_m = g_cm * per_channel(magnitudes["center_weight"], g_cm)
        g_cm = g_cm + scale_of_backward(layer.config.centering, s.x, s.k_m, dk_m, 1.0 / s.inverse_std)
    result = {"dx": largest(g_cm)}
    return result | {f"d {name}": largest(scales[name]) for name in layer.parameters}


def scale_of_backward(name: Statistic, x: Array, k: Array, dk: Array, deviation: Array | float) -> Array:
    """The magnitude of the gradient of x through its statistic k, for dk of no sign."""
    if name.endswith("mean"):
        return statistic_backward(name, x, k, dk)
    axes = statistic_axes(name, x)
    size = np.abs(x - x.mean(axis=axes, keepdims=True)) + deviation
    return dk.sum(axis=axes, keepdims=True) * size / (math.prod(x.shape[axis] for axis in axes) * k)


def largest(values: Array) -> float:
    """The largest finite magnitude; what is not finite is compared without a tolerance."""
    magnitudes = np.abs(np.asarray(values))
    return float(np.max(magnitudes, initial=0.0, where=np.isfinite(magnitudes)))
