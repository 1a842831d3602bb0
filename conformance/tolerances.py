"""How far a correct implementation may be from the reference, and why.

A result is a sum of terms. Rounded arithmetic misses it by a few units in the last place of the *terms*,
however much they cancel, and not of the result. So with the dtype's unit eps,

    tolerance(q) = 16 eps kappa(q) scale(q)

    q                scale(q): the largest sum of terms' magnitudes           kappa(q)
    ---------------- ------------------------------------------------------- --------
    y                |X_s R gamma| + |beta|                                   kappa
    dx               the terms of its gradient, each taken absolutely         kappa
    a parameter's    sum over its channel of the terms' magnitudes            kappa
      gradient
    running_mean     |running mean| + |batch mean|                            1
    running_var      |running variance| + |batch variance|                    kappa
    the counter      exact                                                    -

kappa is the root mean square of |X| + |w_m K_m| + |E| in units of sqrt(Var + eps), at least 1: what centering
costs, since X + w_m K_m - E loses as many digits as its terms have more than the deviation. A variance from
X - E costs kappa; one from E[X^2] - E[X]^2 costs kappa^2, which is beyond 16 kappa from a mean of about 16
deviations on. 16 leaves room for the four roundings of Y and for sums in
any order over the suite's planes; nothing grows with the array's size. float16 and bfloat16 results carry
one rounding to their own unit on top, since the work in between is done in float32.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from rbn_core.reference import (
    RESTRICT_SLOPE,
    Array,
    Layer,
    depthwise_convolution,
    depthwise_convolution_backward,
    over_channel,
    per_channel,
    spatial_axes,
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
    unit = FACTOR * float(np.finfo(np.promote_types(dtype, np.float32)).eps)
    stored = 0.0
    if np.dtype(dtype).itemsize < 4:
        stored = float(ml_dtypes.finfo(dtype).eps)  # type: ignore[no-untyped-call]
    kappa = condition(layer)
    scales = {"y": scale_of_y(layer)} | scales_of_gradients(layer, dy)
    result = {name: unit * kappa * scale for name, scale in scales.items()}
    for name in ("y", "dx"):
        result[name] += stored * scales[name]
    for name in layer.statistics:
        if name == "num_batches_tracked":
            result[name] = 0.0
            continue
        size = float(np.max(np.abs(before[name])) + np.max(np.abs(layer.statistics[name])))
        result[name] = unit * size * (kappa if name == "running_var" else 1.0)
    return result


def condition(layer: Layer) -> float:
    """kappa: the size of the terms of X_m = X + w_m K_m - E, in units of the deviation; at least 1."""
    s = layer.steps
    assert s is not None
    terms = np.abs(s.x) + np.abs(s.x_cm - s.x) + np.abs(per_channel(s.mean, s.x))
    size = np.sqrt(np.square(terms).mean(axis=(0, *spatial_axes(s.x)), keepdims=True))
    return max(1.0, float(np.max(size * s.inverse_std)))


def scale_of_y(layer: Layer) -> float:
    """The largest |X_s R gamma| + |beta|; in BNET the sum of |X_s| times the taps, and |bias|."""
    s = layer.steps
    assert s is not None
    if layer.config.kernel_size is not None:
        weight, bias = (np.abs(layer.parameters[name]) for name in ("conv_weight", "conv_bias"))
        return float(np.max(depthwise_convolution(np.abs(s.x_cs) + 1.0, weight, bias)))
    beta = layer.parameters.get("beta", np.zeros(1))
    return float(np.max(np.abs(s.y - per_channel(beta, s.y)) + np.abs(per_channel(beta, s.y))))


def scales_of_gradients(layer: Layer, dy: Array) -> dict[str, float]:
    """The magnitudes that the backward pass adds up: its own equations with every term taken absolutely.

    X_s, and with it K_s, is wrong by kappa eps in units of the deviation however small it is itself, so 1 is
    added to its magnitude.
    """
    s = layer.steps
    assert s is not None
    magnitudes = {name: np.abs(value) for name, value in layer.parameters.items()}
    size_s = np.abs(s.x_s) + 1.0
    scales: dict[str, Array] = {}

    g = np.abs(dy)
    scales["beta"] = over_channel(g)
    restriction = np.ones(1) if s.restriction is None else s.restriction
    scales["gamma"] = over_channel(g * size_s * restriction)
    if "gamma" in magnitudes:
        g = g * per_channel(magnitudes["gamma"], g)
    if layer.config.kernel_size is not None:
        scales["conv_bias"] = over_channel(g)
        g, scales["conv_weight"] = depthwise_convolution_backward(g, size_s, magnitudes["conv_weight"])
    g_s = g * restriction
    if s.k_s is not None and layer.config.scaling is not None:
        dz = g * size_s * RESTRICT_SLOPE[layer.config.restrict](restriction)
        scales["scale_weight"] = over_channel(dz * (np.abs(s.k_s) + 1.0))
        scales["scale_bias"] = over_channel(dz)
        dk_s = dz * per_channel(magnitudes["scale_weight"], dz)
        g_s = g_s + np.abs(statistic_backward(layer.config.scaling, s.x_s, s.k_s, dk_s))
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
        g_cm = g_cm + np.abs(statistic_backward(layer.config.centering, s.x, s.k_m, dk_m))
    result = {"dx": float(np.max(g_cm))}
    return result | {f"d {name}": float(np.max(scales[name])) for name in layer.parameters}
