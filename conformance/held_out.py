"""Mistakes that are not among the mutants: the diagnosis is scored on them.

A class's docstring says the mistake, as somebody who ports the layer might make it; `HELD_OUT` says beside
each what the facts have to tell him. Those from `SequencesUncalibrated` on were written when the diagnosis
was finished.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from rbn_core.config import Config
from rbn_core.reference import (
    Array,
    Layer,
    Steps,
    batch_mean_and_variance,
    depthwise_convolution,
    over_channel,
    per_channel,
    spatial_axes,
)


class MomentumHardcoded(Layer):
    """The momentum is 0.99 whatever the option says."""

    def __init__(self, config: Config) -> None:
        super().__init__(replace(config, momentum=0.99))


class BetaSubtracted(Layer):
    """beta is subtracted."""

    def transform(self, x_cs: Array) -> Array:
        y = super().transform(x_cs)
        return y - 2.0 * per_channel(self.parameters["beta"], y) if self.config.beta else y


class GammaMadePositive(Layer):
    """The magnitude of gamma is taken, as if it were a deviation."""

    def transform(self, x_cs: Array) -> Array:
        own = self.parameters
        if self.config.gamma:
            self.parameters = own | {"gamma": np.abs(own["gamma"])}
        y = super().transform(x_cs)
        self.parameters = own
        return y


class OneAxisPooled(Layer):
    """K_m is pooled over the last axis alone."""

    def calibrate_centering(self, x: Array) -> tuple[Array | None, Array]:
        if self.config.centering != "channel_mean" or x.ndim < 3:
            return super().calibrate_centering(x)
        k_m = x.mean(axis=-1, keepdims=True)
        return k_m, x + per_channel(self.parameters["center_weight"], x) * k_m


class StatisticsOfTheFirstImage(Layer):
    """In training the first image's statistics normalize all images."""

    def statistics_of(self, x_cm: Array, training: bool) -> tuple[Array, Array]:
        mean, var = super().statistics_of(x_cm, training)
        return batch_mean_and_variance(x_cm[:1]) if training and x_cm[0, 0].size > 1 else (mean, var)


class GradientsAccumulate(Layer):
    """The parameters' gradients are added to those of the steps before."""

    def backward(self, dy: Any) -> tuple[Array, dict[str, Array]]:
        dx, gradients = super().backward(dy)
        earlier: Mapping[str, Array] = getattr(self, "earlier", {})
        self.earlier = {name: value + earlier.get(name, 0.0) for name, value in gradients.items()}
        return dx, self.earlier


class NoInputGradientInEvaluation(Layer):
    """In evaluation X gets no gradient."""

    def backward(self, dy: Any) -> tuple[Array, dict[str, Array]]:
        dx, gradients = super().backward(dy)
        assert self.steps is not None
        return dx if self.steps.batch_statistics else np.zeros_like(dx), gradients


class AverageOfAllUnknown(Layer):
    """momentum=None is taken for the default, 0.9."""

    def __init__(self, config: Config) -> None:
        super().__init__(replace(config, momentum=0.9) if config.momentum is None else config)


class LastImageDropped(Layer):
    """The batch's statistics leave the last image out."""

    def statistics_of(self, x_cm: Array, training: bool) -> tuple[Array, Array]:
        return super().statistics_of(x_cm[:-1] if training and x_cm[:-1, 0].size > 1 else x_cm, training)


class GammaGradientNegated(Layer):
    """The gradient of gamma has the wrong sign."""

    def transform_backward(self, dy: Array, s: Steps, gradients: dict[str, Array]) -> Array:
        result = super().transform_backward(dy, s, gradients)
        if "gamma" in gradients:
            gradients["gamma"] = -gradients["gamma"]
        return result


class VarianceHeldUp(Layer):
    """Var is held at 0.01 at least where X is normalized."""

    def standardize(self, x_cm: Array, mean: Array, var: Array) -> tuple[Array, Array]:
        return super().standardize(x_cm, mean, np.maximum(var, 0.01))


class DilatedKernel(Layer):
    """BNET's kernels are dilated by 2."""

    def transform(self, x_cs: Array) -> Array:
        if self.config.kernel_size is None:
            return super().transform(x_cs)
        weight = self.parameters["conv_weight"]
        wide = np.zeros((*weight.shape[:2], *(2 * size - 1 for size in weight.shape[2:])))
        wide[(..., *(slice(None, None, 2) for _ in weight.shape[2:]))] = weight
        return depthwise_convolution(x_cs, wide, self.parameters["conv_bias"])


class NoVolumes(Layer):
    """Three spatial axes were never tried, and raise an error."""

    def forward(self, x: Any, training: bool) -> Array:
        if np.ndim(x) == 5:
            raise IndexError("tuple index out of range")
        return super().forward(x, training)


class StatisticInHalf(Layer):
    """K_m is rounded to half precision where the input is of it."""

    def forward(self, x: Any, training: bool) -> Array:
        self.narrow = x.dtype.itemsize == 2
        return super().forward(x, training)

    def calibrate_centering(self, x: Array) -> tuple[Array | None, Array]:
        k_m, x_cm = super().calibrate_centering(x)
        if k_m is None or not self.narrow:
            return k_m, x_cm
        k_m = k_m.astype(np.float16).astype(float)
        return k_m, x + per_channel(self.parameters["center_weight"], x) * k_m


class RunningMeanCorrected(Layer):
    """Bessel's correction is applied to the running mean, too."""

    def accumulate(self, mean: Array, var: Array, values: int) -> None:
        super().accumulate(mean * values / (values - 1), var, values)


class ScaleWeightGradientWithoutStatistic(Layer):
    """The gradient of w_v leaves K_s out, and is that of w_b."""

    def backward(self, dy: Any) -> tuple[Array, dict[str, Array]]:
        dx, gradients = super().backward(dy)
        if "scale_weight" in gradients:
            gradients["scale_weight"] = gradients["scale_bias"]
        return dx, gradients


class FirstStatisticKept(Layer):
    """K_s of the first batch is kept for all later ones of its shape."""

    kept: Array | None = None

    def scaling_statistic(self, x: Array, x_s: Array) -> Array | None:
        if self.kept is None or np.shape(self.kept)[0] != len(x):
            self.kept = super().scaling_statistic(x, x_s)
        return self.kept


class BetaGradientOfOneImage(Layer):
    """The gradient of beta is summed over the first image alone."""

    def transform_backward(self, dy: Array, s: Steps, gradients: dict[str, Array]) -> Array:
        result = super().transform_backward(dy, s, gradients)
        if "beta" in gradients:
            gradients["beta"] = over_channel(dy[:1])
        return result


class SpatialMeanOfTheImage(Layer):
    """What is due over the channels of a position is taken over positions, too: one value per image."""

    def calibrate_centering(self, x: Array) -> tuple[Array | None, Array]:
        k_m, x_cm = super().calibrate_centering(x)
        if k_m is None or self.config.centering != "spatial_mean":
            return k_m, x_cm
        k_m = np.broadcast_to(k_m.mean(axis=spatial_axes(x), keepdims=True), k_m.shape)
        return k_m, x + per_channel(self.parameters["center_weight"], x) * k_m


class SequencesUncalibrated(Layer):
    """K_m is left out of sequences."""

    def calibrate_centering(self, x: Array) -> tuple[Array | None, Array]:
        k_m, x_cm = super().calibrate_centering(x)
        return k_m, x if x.ndim == 3 else x_cm


class CenterWeightGradientHalved(Layer):
    """The gradient of w_m is half of what it should be."""

    def backward(self, dy: Any) -> tuple[Array, dict[str, Array]]:
        dx, gradients = super().backward(dy)
        if "center_weight" in gradients:
            gradients["center_weight"] = gradients["center_weight"] / 2.0
        return dx, gradients


class ConvBiasGradientDoubled(Layer):
    """The gradient of BNET's bias is doubled."""

    def backward(self, dy: Any) -> tuple[Array, dict[str, Array]]:
        dx, gradients = super().backward(dy)
        if "conv_bias" in gradients:
            gradients["conv_bias"] = 2.0 * gradients["conv_bias"]
        return dx, gradients


class RunningMeanForCentering(Layer):
    """In evaluation K_m is the running mean."""

    def forward(self, x: Any, training: bool) -> Array:
        self.running = not training and self.config.track_running_stats
        return super().forward(x, training)

    def calibrate_centering(self, x: Array) -> tuple[Array | None, Array]:
        k_m, x_cm = super().calibrate_centering(x)
        if k_m is None or not self.running or self.config.centering != "channel_mean":
            return k_m, x_cm
        k_m = np.broadcast_to(per_channel(self.statistics["running_mean"], x), k_m.shape)
        return k_m, x + per_channel(self.parameters["center_weight"], x) * k_m


class LastChannelLeft(Layer):
    """The last channel is not normalized."""

    def standardize(self, x_cm: Array, mean: Array, var: Array) -> tuple[Array, Array]:
        x_s, inverse_std = super().standardize(x_cm, mean, var)
        return np.concatenate([x_s[:, :-1], x_cm[:, -1:]], axis=1), inverse_std


class VarianceMomentumFlipped(Layer):
    """The running variance takes the momentum the other way round, the running mean does not."""

    def accumulate(self, mean: Array, var: Array, values: int) -> None:
        old, m = self.statistics["running_var"], self.config.momentum
        super().accumulate(mean, var, values)
        if m is not None and 0.0 < m < 1.0:
            batch = (self.statistics["running_var"] - m * old) / (1.0 - m)
            self.statistics["running_var"] = (1.0 - m) * old + m * batch


class ScalingStatisticClipped(Layer):
    """K_s is kept within -1 and 1."""

    def scaling_statistic(self, x: Array, x_s: Array) -> Array | None:
        k_s = super().scaling_statistic(x, x_s)
        return None if k_s is None else np.clip(k_s, -1.0, 1.0)


class GammaSquared(Layer):
    """gamma is squared."""

    def transform(self, x_cs: Array) -> Array:
        own = self.parameters
        if self.config.gamma:
            self.parameters = own | {"gamma": own["gamma"] ** 2}
        y = super().transform(x_cs)
        self.parameters = own
        return y


class StatisticInSingle(Layer):
    """K_s is rounded to float32."""

    def scaling_statistic(self, x: Array, x_s: Array) -> Array | None:
        k_s = super().scaling_statistic(x, x_s)
        return None if k_s is None else k_s.astype(np.float32).astype(float)


class OneImageByRunningStatistics(Layer):
    """A training batch of one image is normalized with the running statistics."""

    def statistics_of(self, x_cm: Array, training: bool) -> tuple[Array, Array]:
        mean, var = super().statistics_of(x_cm, training)
        if training and len(x_cm) == 1 and self.config.track_running_stats:
            return self.statistics["running_mean"], self.statistics["running_var"]
        return mean, var


class RunningVarianceHeldUp(Layer):
    """The running variance is kept above 0.5."""

    def accumulate(self, mean: Array, var: Array, values: int) -> None:
        super().accumulate(mean, var, values)
        self.statistics["running_var"] = np.maximum(self.statistics["running_var"], 0.5)


HELD_OUT: dict[type[Layer], tuple[str, ...]] = {
    MomentumHardcoded: ("running_mean", "0.99 times"),
    BetaSubtracted: ("y is what is due less 2 times beta",),
    GammaMadePositive: ("gamma is negative",),
    OneAxisPooled: ("centering channel_mean",),
    StatisticsOfTheFirstImage: ("in training", "more than one image"),
    GradientsAccumulate: ("right in the first step", "d gamma"),
    NoInputGradientInEvaluation: ("dx is 0", "in evaluation"),
    AverageOfAllUnknown: ("running_mean", "momentum=None"),
    LastImageDropped: ("in training", "more than one image"),
    GammaGradientNegated: ("d gamma is the negative",),
    VarianceHeldUp: ("data",),
    DilatedKernel: ("layer bnet",),
    NoVolumes: ("raises", "IndexError", "spatial axes 3"),
    StatisticInHalf: ("off by at most", "float16"),
    RunningMeanCorrected: (r"adds to running_mean is n / \(n - 1\)",),
    ScaleWeightGradientWithoutStatistic: (
        "Wrong: d scale_weight in [0-9]+ of [0-9]+ cases[.]",
        "due as d scale_bias",
    ),
    FirstStatisticKept: ("right in the first step", "with scaling"),
    BetaGradientOfOneImage: ("d beta", "more than one image"),
    SpatialMeanOfTheImage: ("centering spatial_mean",),
    SequencesUncalibrated: ("spatial axes 1",),
    CenterWeightGradientHalved: ("d center_weight is 0.5",),
    ConvBiasGradientDoubled: ("d conv_bias is 2 times",),
    RunningMeanForCentering: ("in evaluation",),
    LastChannelLeft: ("last channel",),
    VarianceMomentumFlipped: ("running_var",),
    ScalingStatisticClipped: ("scaling",),
    GammaSquared: ("y less its beta", "one factor per channel"),
    StatisticInSingle: ("float64",),
    OneImageByRunningStatistics: ("one image",),
    RunningVarianceHeldUp: ("running_var",),
}
"""Every mistake, with what the facts have to say of it, as patterns."""
