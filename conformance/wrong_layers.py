"""Wrong layers: the reference with one plausible mistake each in its formulas, gradients, state or mode.

A mutant's docstring says the mistake, as somebody might make it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from rbn_core.config import Config
from rbn_core.options import Statistic
from rbn_core.reference import (
    Array,
    Layer,
    Steps,
    batch_mean_and_variance,
    depthwise_convolution,
    over_channel,
    per_channel,
    sigmoid,
    spatial_axes,
    statistic_axes,
)


class OtherRunningVariance(Layer):
    """The running variance has the other estimator: n for n - 1, or n - 1 for n."""

    def accumulate(self, mean: Array, var: Array, values: int) -> None:
        bessel = values / (values - 1)
        super().accumulate(
            mean, var / bessel if self.config.running_var == "unbiased" else var * bessel, values
        )


class BiasedRunningVariance(Layer):
    """The running variance has no Bessel's correction, whatever the option says."""

    def __init__(self, config: Config) -> None:
        super().__init__(replace(config, running_var="biased"))


class UnbiasedRunningVariance(Layer):
    """The running variance has Bessel's correction, whatever the option says."""

    def __init__(self, config: Config) -> None:
        super().__init__(replace(config, running_var="unbiased"))


class UnbiasedNormalization(Layer):
    """X is normalized with the unbiased variance."""

    def standardize(self, x_cm: Array, mean: Array, var: Array) -> tuple[Array, Array]:
        values = x_cm.size // x_cm.shape[1]
        return super().standardize(x_cm, mean, var * values / (values - 1) if values > 1 else var)


class FlippedMomentum(Layer):
    """The momentum weighs the new value instead of the old."""

    def accumulate(self, mean: Array, var: Array, values: int) -> None:
        config = self.config
        if config.momentum is not None:
            self.config = replace(config, momentum=1.0 - config.momentum)
        super().accumulate(mean, var, values)
        self.config = config


class OneValueAccepted(Layer):
    """Training on one value per channel gives beta, and a variance of 0 / 0, instead of an error."""

    def check_input(self, x: Array, batch_statistics: bool) -> None:
        super().check_input(x, batch_statistics=False)


class OnePassVariance(Layer):
    """The variance is E[X^2] - E[X]^2, which cancels where the mean is large."""

    def forward(self, x: Any, training: bool) -> Array:
        self.computed_in = np.promote_types(x.dtype, np.float32)
        return super().forward(x, training)

    def statistics_of(self, x_cm: Array, training: bool) -> tuple[Array, Array]:
        if not training and self.config.track_running_stats:
            return super().statistics_of(x_cm, training)
        rounded = x_cm.astype(self.computed_in)
        axes = (0, *spatial_axes(x_cm))
        mean = rounded.mean(axis=axes)
        var = np.maximum(np.square(rounded).mean(axis=axes) - np.square(mean), 0.0)
        if self.config.track_running_stats:
            self.accumulate(mean, var, values=x_cm.size // x_cm.shape[1])
        return mean, var


class EpsOutsideTheRoot(Layer):
    """X is divided by sqrt(Var) + eps."""

    def standardize(self, x_cm: Array, mean: Array, var: Array) -> tuple[Array, Array]:
        inverse_std = 1.0 / (np.sqrt(per_channel(var, x_cm)) + self.config.eps)
        return (x_cm - per_channel(mean, x_cm)) * inverse_std, inverse_std


class CenteringWithoutGradient(Layer):
    """No gradient flows through K_m."""

    def calibrate_centering_backward(self, dx_cm: Array, s: Steps, gradients: dict[str, Array]) -> Array:
        super().calibrate_centering_backward(dx_cm, s, gradients)
        return dx_cm


class ScalingWithoutGradient(Layer):
    """No gradient flows through K_s."""

    def calibrate_scaling_backward(
        self, dx_cs: Array, s: Steps, gradients: dict[str, Array]
    ) -> tuple[Array, Array | float]:
        super().calibrate_scaling_backward(dx_cs, s, gradients)
        return dx_cs if s.restriction is None else dx_cs * s.restriction, 0.0


class StatisticsWithoutGradient(Layer):
    """No gradient flows through the batch's E and Var."""

    def standardize_backward(self, dx_s: Array, s: Steps) -> Array:
        return dx_s * s.inverse_std

    def calibrate_centering_backward(self, dx_cm: Array, s: Steps, gradients: dict[str, Array]) -> Array:
        # Without that gradient sum dX_cm is not 0, and all of K_m counts.
        constant = replace(s, batch_statistics=False)
        return super().calibrate_centering_backward(dx_cm, constant, gradients)


class VarianceWithoutGradient(Layer):
    """The gradient flows through the batch's E but not through its Var."""

    def standardize_backward(self, dx_s: Array, s: Steps) -> Array:
        dx_cm = dx_s * s.inverse_std
        if not s.batch_statistics:
            return dx_cm
        return dx_cm - dx_cm.mean(axis=(0, *spatial_axes(dx_cm)), keepdims=True)


class RunningStatisticsWithBatchGradient(Layer):
    """In evaluation the gradient flows through E and Var as if they were the batch's."""

    def standardize_backward(self, dx_s: Array, s: Steps) -> Array:
        dx_cm = dx_s * s.inverse_std
        axes = (0, *spatial_axes(dx_s))
        through_variance = s.x_s * (dx_cm * s.x_s).mean(axis=axes, keepdims=True)
        return dx_cm - dx_cm.mean(axis=axes, keepdims=True) - through_variance


class ScalingStatisticOfX(Layer):
    """K_s is taken from X instead of X_s."""

    def scaling_statistic(self, x: Array, x_s: Array) -> Array | None:
        return super().scaling_statistic(x, x)


class NoRestriction(Layer):
    """R is left out: X_s is multiplied by w_v K_s + w_b itself."""

    def calibrate_scaling(self, x_s: Array, k_s: Array | None) -> tuple[Array | None, Array]:
        if k_s is None:
            return None, x_s
        w_v = per_channel(self.parameters["scale_weight"], x_s)
        scale = w_v * k_s + per_channel(self.parameters["scale_bias"], x_s)
        return scale, x_s * scale


class NoScaleBias(Layer):
    """w_b is left out of R(w_v K_s + w_b)."""

    def calibrate_scaling(self, x_s: Array, k_s: Array | None) -> tuple[Array | None, Array]:
        kept = dict(self.parameters)
        if k_s is not None:
            self.parameters = kept | {"scale_bias": np.zeros_like(kept["scale_bias"])}
        result = super().calibrate_scaling(x_s, k_s)
        self.parameters = kept
        return result


class BatchStatisticsInEvaluation(Layer):
    """Evaluation normalizes with the batch's statistics."""

    def statistics_of(self, x_cm: Array, training: bool) -> tuple[Array, Array]:
        return super().statistics_of(x_cm, training) if training else batch_mean_and_variance(x_cm)


class ModeIgnored(Layer):
    """Evaluation does what training does: it normalizes with the batch's statistics and accumulates them."""

    def forward(self, x: Any, training: bool) -> Array:
        return super().forward(x, training or x.size > x.shape[1])  # training refuses one value per channel


class EvaluationAccumulates(Layer):
    """Evaluation updates the running statistics too."""

    def statistics_of(self, x_cm: Array, training: bool) -> tuple[Array, Array]:
        result = super().statistics_of(x_cm, training)
        if not training and self.config.track_running_stats and x_cm.size > x_cm.shape[1]:
            self.accumulate(*batch_mean_and_variance(x_cm), values=x_cm.size // x_cm.shape[1])
        return result


class TrainingDoesNotAccumulate(Layer):
    """Training leaves the running statistics as they are."""

    def accumulate(self, mean: Array, var: Array, values: int) -> None:
        pass


class CounterStandsStill(Layer):
    """num_batches_tracked is never counted up."""

    def accumulate(self, mean: Array, var: Array, values: int) -> None:
        before = self.statistics.get("num_batches_tracked")
        super().accumulate(mean, var, values)
        if before is not None:
            self.statistics["num_batches_tracked"] = before


class RunningMeanOfX(Layer):
    """The running mean follows X, as before the centering calibration, and not X_cm."""

    def calibrate_centering(self, x: Array) -> tuple[Array | None, Array]:
        self.x_mean, _ = batch_mean_and_variance(x)
        return super().calibrate_centering(x)

    def accumulate(self, mean: Array, var: Array, values: int) -> None:
        super().accumulate(self.x_mean, var, values)


class RunningDeviation(Layer):
    """The running variance accumulates standard deviations."""

    def accumulate(self, mean: Array, var: Array, values: int) -> None:
        bessel = values / (values - 1) if self.config.running_var == "unbiased" else 1.0
        super().accumulate(mean, np.sqrt(var * bessel) / bessel, values)


class InputModified(Layer):
    """X_s is written over the caller's X."""

    def forward(self, x: Any, training: bool) -> Array:
        y = super().forward(x, training)
        assert self.steps is not None
        x[...] = self.steps.x_s
        return y


class CotangentModified(Layer):
    """dX is written over the caller's dY."""

    def backward(self, dy: Any) -> tuple[Array, dict[str, Array]]:
        result = super().backward(dy)
        dy[...] = result[0]
        return result


class StateNotCopied(Layer):
    """The running statistics accumulate in the arrays that they were loaded from."""

    def load(self, state: Mapping[str, Any]) -> None:
        super().load(state)
        self.loaded = state

    def accumulate(self, mean: Array, var: Array, values: int) -> None:
        super().accumulate(mean, var, values)
        for name in ("running_mean", "running_var"):
            self.loaded[name][...] = self.statistics[name]


class CenteringSubtracts(Layer):
    """w_m K_m is subtracted from X."""

    def calibrate_centering(self, x: Array) -> tuple[Array | None, Array]:
        k_m, x_cm = super().calibrate_centering(x)
        return k_m, 2.0 * x - x_cm


class CenteringAfterwards(Layer):
    """w_m K_m is added behind the centering, so that E and Var are those of X."""

    def calibrate_centering(self, x: Array) -> tuple[Array | None, Array]:
        self.x = x
        return super().calibrate_centering(x)

    def statistics_of(self, x_cm: Array, training: bool) -> tuple[Array, Array]:
        return super().statistics_of(self.x, training)


class PlaneVariance(Layer):
    """Var is the mean of the planes' variances and leaves out the spread between their means."""

    def statistics_of(self, x_cm: Array, training: bool) -> tuple[Array, Array]:
        mean, var = super().statistics_of(x_cm, training)
        if training and x_cm.ndim > 2 and x_cm[0, 0].size > 1:
            var = x_cm.var(axis=spatial_axes(x_cm)).mean(axis=0)
        return mean, var


class BetaInsideTheRestriction(Layer):
    """The affine step comes before the scaling calibration, so that R multiplies beta too."""

    def calibrate_scaling(self, x_s: Array, k_s: Array | None) -> tuple[Array | None, Array]:
        self.restriction, x_cs = super().calibrate_scaling(x_s, k_s)
        return self.restriction, x_cs

    def transform(self, x_cs: Array) -> Array:
        y = super().transform(x_cs)
        if self.restriction is None or not self.config.beta:
            return y
        return y + (self.restriction - 1.0) * per_channel(self.parameters["beta"], y)


class GammaGradientOfXs(Layer):
    """The gradient of gamma is summed over X_s instead of X_cs."""

    def transform_backward(self, dy: Array, s: Steps, gradients: dict[str, Array]) -> Array:
        result = super().transform_backward(dy, s, gradients)
        if "gamma" in gradients:
            gradients["gamma"] = over_channel(dy * s.x_s)
        return result


class CenterWeightGradientOfTheMean(Layer):
    """The gradient of w_m is averaged over the positions instead of summed."""

    def calibrate_centering_backward(self, dx_cm: Array, s: Steps, gradients: dict[str, Array]) -> Array:
        result = super().calibrate_centering_backward(dx_cm, s, gradients)
        if "center_weight" in gradients:
            gradients["center_weight"] /= np.prod(dx_cm.shape[2:])
        return result


class AttentionOfXs(Layer):
    """IEBN's attention looks at X_s instead of X."""

    def scaling_statistic(self, x: Array, x_s: Array) -> Array | None:
        return super().scaling_statistic(x_s if self.config.scaling == "input_mean" else x, x_s)


class AttentionWithoutGradient(Layer):
    """No gradient flows through IEBN's attention to X."""

    def calibrate_scaling_backward(
        self, dx_cs: Array, s: Steps, gradients: dict[str, Array]
    ) -> tuple[Array, Array | float]:
        dx_s, _ = super().calibrate_scaling_backward(dx_cs, s, gradients)
        return dx_s, 0.0


class FlippedKernel(Layer):
    """BNET convolves, with its kernels flipped, where deep learning correlates."""

    def transform(self, x_cs: Array) -> Array:
        if self.config.kernel_size is None:
            return super().transform(x_cs)
        weight = self.parameters["conv_weight"]
        axes = tuple(range(2, weight.ndim))
        return depthwise_convolution(x_cs, np.flip(weight, axes), self.parameters["conv_bias"])


class PaddedBeforeNormalization(Layer):
    """BNET pads X with zeros instead of X_s, so that the border of X_s is -E / sqrt(Var + eps)."""

    def standardize(self, x_cm: Array, mean: Array, var: Array) -> tuple[Array, Array]:
        x_s, inverse_std = super().standardize(x_cm, mean, var)
        self.border = -per_channel(mean, x_s) * inverse_std
        return x_s, inverse_std

    def transform(self, x_cs: Array) -> Array:
        if self.config.kernel_size is None:
            return super().transform(x_cs)
        inside: Array = x_cs - self.border
        weight, none = self.parameters["conv_weight"], np.zeros(self.config.num_features)
        constant = per_channel(weight.sum(axis=tuple(range(1, weight.ndim))), x_cs) * self.border
        bias = per_channel(self.parameters["conv_bias"], x_cs)
        return depthwise_convolution(inside, weight, none) + constant + bias


class NoConvolutionBias(Layer):
    """BNET's convolution has no bias."""

    def transform(self, x_cs: Array) -> Array:
        y = super().transform(x_cs)
        return y - per_channel(self.parameters["conv_bias"], y) if self.config.kernel_size is not None else y


class HardcodedEps(Layer):
    """eps is 1e-5 whatever the option says."""

    def __init__(self, config: Config) -> None:
        super().__init__(replace(config, eps=1e-5))


class DeviationWithoutEps(Layer):
    """sigma_c and sigma_s are taken without eps under their root."""

    def calibrate_centering(self, x: Array) -> tuple[Array | None, Array]:
        k_m, x_cm = super().calibrate_centering(x)
        if self.config.centering is None or k_m is None or self.config.centering.endswith("mean"):
            return k_m, x_cm
        exact = np.sqrt(np.square(k_m) - self.config.eps)
        return exact, x + per_channel(self.parameters["center_weight"], x) * exact

    def scaling_statistic(self, x: Array, x_s: Array) -> Array | None:
        k_s = super().scaling_statistic(x, x_s)
        if self.config.scaling is None or k_s is None or self.config.scaling.endswith("mean"):
            return k_s
        return np.sqrt(np.square(k_s) - self.config.eps)


class UnbiasedDeviation(Layer):
    """sigma_c and sigma_s divide by one less than the number of values."""

    def scaling_statistic(self, x: Array, x_s: Array) -> Array | None:
        k_s = super().scaling_statistic(x, x_s)
        if self.config.scaling is None or k_s is None or self.config.scaling.endswith("mean"):
            return k_s
        values = math.prod(x.shape[axis] for axis in statistic_axes(self.config.scaling, x))
        return k_s * np.sqrt(values / (values - 1)) if values > 1 else k_s


class CenteringStatisticOfTheBatch(Layer):
    """K_m is averaged over the batch too, and one value per channel."""

    def calibrate_centering(self, x: Array) -> tuple[Array | None, Array]:
        k_m, x_cm = super().calibrate_centering(x)
        if k_m is None:
            return k_m, x_cm
        k_m = np.broadcast_to(k_m.mean(axis=0, keepdims=True), k_m.shape)
        return k_m, x + per_channel(self.parameters["center_weight"], x) * k_m


class HardSigmoidSlopeBeyondItsEnds(Layer):
    """The slope of the hard sigmoid is 1 / 6 beyond its ends, too."""

    def calibrate_scaling_backward(
        self, dx_cs: Array, s: Steps, gradients: dict[str, Array]
    ) -> tuple[Array, Array | float]:
        if self.config.restrict != "hard_sigmoid" or s.restriction is None:
            return super().calibrate_scaling_backward(dx_cs, s, gradients)
        # At any value within the ends the slope is 1 / 6, and R itself is only multiplied with dX_cs.
        inside = replace(s, restriction=np.clip(s.restriction, 0.25, 0.75))
        dx_s, dx_attention = super().calibrate_scaling_backward(dx_cs, inside, gradients)
        return dx_s + dx_cs * (s.restriction - inside.restriction), dx_attention


class ScaleWeightAndBiasSwapped(Layer):
    """w_v and w_b are taken for each other."""

    def load(self, state: Mapping[str, Any]) -> None:
        super().load(state)
        self.swap()

    def state(self) -> dict[str, Array]:
        self.swap()
        state = super().state()
        self.swap()
        return state

    def swap(self) -> None:
        """Exchange the two, where they are there."""
        if self.config.scaling is not None:
            weight, bias = self.parameters["scale_weight"], self.parameters["scale_bias"]
            self.parameters |= {"scale_weight": bias, "scale_bias": weight}


class CumulativeAverageOffByOne(Layer):
    """The average of all batches gives the new one the weight 1 / (n + 1) of the batch after it."""

    def accumulate(self, mean: Array, var: Array, values: int) -> None:
        if self.config.momentum is None:
            self.statistics["num_batches_tracked"] += 1
        super().accumulate(mean, var, values)
        if self.config.momentum is None:
            self.statistics["num_batches_tracked"] -= 1


class VarianceAboutTheRunningMean(Layer):
    """The running variance is that of X_cm about the running mean and not about the batch's."""

    def accumulate(self, mean: Array, var: Array, values: int) -> None:
        var = var + np.square(mean - self.statistics["running_mean"])
        super().accumulate(mean, var, values)


class GradientsAveraged(Layer):
    """The parameters' gradients are averaged over the images instead of summed."""

    def backward(self, dy: Any) -> tuple[Array, dict[str, Array]]:
        dx, gradients = super().backward(dy)
        return dx, {name: value / max(len(dx), 1) for name, value in gradients.items()}


class EvaluationWithoutCentering(Layer):
    """Evaluation leaves the centering calibration out, as if it were folded into the running statistics."""

    def calibrate_centering(self, x: Array) -> tuple[Array | None, Array]:
        k_m, x_cm = super().calibrate_centering(x)
        return k_m, x_cm if self.training else x

    def forward(self, x: Any, training: bool) -> Array:
        self.training = training
        return super().forward(x, training)


class TrainingWithRunningStatistics(Layer):
    """Training normalizes with the running statistics that it has just updated."""

    def statistics_of(self, x_cm: Array, training: bool) -> tuple[Array, Array]:
        batch = super().statistics_of(x_cm, training)
        if not self.config.track_running_stats:
            return batch
        return self.statistics["running_mean"], self.statistics["running_var"]


class EvaluationCounts(Layer):
    """Evaluation counts up num_batches_tracked."""

    def forward(self, x: Any, training: bool) -> Array:
        y = super().forward(x, training)
        if not training and self.config.track_running_stats:
            self.statistics["num_batches_tracked"] += 1
        return y


class NaNSwallowed(Layer):
    """NaN and infinity in Y become 0, so that a broken image passes unseen."""

    def transform(self, x_cs: Array) -> Array:
        return np.nan_to_num(super().transform(x_cs), nan=0.0, posinf=0.0, neginf=0.0)


class BorderRepeated(Layer):
    """BNET pads with the values at the border instead of zeros."""

    def transform(self, x_cs: Array) -> Array:
        if self.config.kernel_size is None:
            return super().transform(x_cs)
        margin = self.config.kernel_size // 2
        spatial = [(margin, margin)] * (x_cs.ndim - 2)
        y = super().transform(np.pad(x_cs, [(0, 0), (0, 0), *spatial], mode="edge"))
        inside: Any = (..., *(slice(margin, -margin) for _ in spatial))
        return y[inside]


class ReversedKernelAxes(Layer):
    """BNET's kernels have their spatial axes in the reverse order."""

    def transform(self, x_cs: Array) -> Array:
        if self.config.kernel_size is None:
            return super().transform(x_cs)
        weight = self.parameters["conv_weight"]
        reverse = np.transpose(weight, (0, 1, *reversed(range(2, weight.ndim))))
        return depthwise_convolution(x_cs, reverse, self.parameters["conv_bias"])


class OneKernelForAll(Layer):
    """BNET convolves every channel with the first channel's kernel."""

    def transform(self, x_cs: Array) -> Array:
        if self.config.kernel_size is None:
            return super().transform(x_cs)
        weight = self.parameters["conv_weight"]
        same = np.broadcast_to(weight[:1], weight.shape)
        return depthwise_convolution(x_cs, same, self.parameters["conv_bias"])


class CenteringByMaxPooling(Layer):
    """K_m is the maximum over its values instead of their mean."""

    def calibrate_centering(self, x: Array) -> tuple[Array | None, Array]:
        if not is_mean(self.config.centering):
            return super().calibrate_centering(x)
        k_m = maximum(self.config.centering, x)
        return k_m, x + per_channel(self.parameters["center_weight"], x) * k_m


class ScalingByMaxPooling(Layer):
    """K_s is the maximum over its values instead of their mean."""

    def scaling_statistic(self, x: Array, x_s: Array) -> Array | None:
        if not is_mean(self.config.scaling):
            return super().scaling_statistic(x, x_s)
        return maximum(self.config.scaling, x if self.config.scaling == "input_mean" else x_s)


class MaxPooling(CenteringByMaxPooling, ScalingByMaxPooling):
    """K_m and K_s both are maxima instead of means."""


class CenteringOfXItself(Layer):
    """K_m is X itself, so that X_cm = (1 + w_m) X."""

    def calibrate_centering(self, x: Array) -> tuple[Array | None, Array]:
        k_m, x_cm = super().calibrate_centering(x)
        return (k_m, x_cm) if k_m is None else (x, x + per_channel(self.parameters["center_weight"], x) * x)


class FirstValueForAll(Layer):
    """A mistake about a parameter `name`, of which every channel takes the first channel's value."""

    name: str

    def forward(self, x: Any, training: bool) -> Array:
        own = self.parameters
        if self.name in own:
            self.parameters = own | {self.name: np.resize(own[self.name][:1], np.shape(own[self.name]))}
        try:
            return super().forward(x, training)
        finally:
            self.parameters = own


class OneCenterWeight(FirstValueForAll):
    """w_m is one scalar for all channels."""

    name = "center_weight"


class OneScaleWeight(FirstValueForAll):
    """w_v is one scalar for all channels."""

    name = "scale_weight"


class OtherRestriction(Layer):
    """A mistake about R, where that is `instead_of`: `restrict` gives another one of z."""

    instead_of = "sigmoid"

    def restrict(self, z: Array) -> Array:
        """What is taken for R."""
        raise NotImplementedError

    def calibrate_scaling(self, x_s: Array, k_s: Array | None) -> tuple[Array | None, Array]:
        if k_s is None or self.config.restrict != self.instead_of:
            return super().calibrate_scaling(x_s, k_s)
        w_v = per_channel(self.parameters["scale_weight"], x_s)
        restriction = self.restrict(w_v * k_s + per_channel(self.parameters["scale_bias"], x_s))
        return restriction, x_s * restriction


class TwiceTheSigmoid(OtherRestriction):
    """R is 2 sigmoid, so that it is 1 at 0."""

    def restrict(self, z: Array) -> Array:
        return 2.0 * sigmoid(z)


class HyperbolicTangent(OtherRestriction):
    """R is tanh instead of the sigmoid."""

    def restrict(self, z: Array) -> Array:
        return np.tanh(z)


class SoftmaxOverChannels(OtherRestriction):
    """R is the softmax over the channels instead of the sigmoid."""

    def restrict(self, z: Array) -> Array:
        powers = np.exp(z - z.max(axis=1, keepdims=True))
        return powers / powers.sum(axis=1, keepdims=True)


class OtherHardSigmoid(OtherRestriction):
    """The hard sigmoid is z / 5 + 1 / 2 within 0 and 1, with the slope of another library."""

    instead_of = "hard_sigmoid"

    def restrict(self, z: Array) -> Array:
        return np.clip(0.2 * z + 0.5, 0.0, 1.0)


class HardSigmoidWithoutEnds(OtherRestriction):
    """The hard sigmoid is not held within 0 and 1."""

    instead_of = "hard_sigmoid"

    def restrict(self, z: Array) -> Array:
        return z / 6.0 + 0.5


class RestrictIgnored(Layer):
    """R is the sigmoid whatever the option says."""

    def __init__(self, config: Config) -> None:
        super().__init__(replace(config, restrict="sigmoid"))


class BiasInsideTheProduct(Layer):
    """R is taken of w_v (K_s + w_b): the bracket is in the wrong place."""

    def calibrate_scaling(self, x_s: Array, k_s: Array | None) -> tuple[Array | None, Array]:
        own = self.parameters
        if k_s is not None:
            self.parameters = own | {"scale_bias": own["scale_weight"] * own["scale_bias"]}
        result = super().calibrate_scaling(x_s, k_s)
        self.parameters = own
        return result


class ScalingStatisticOfY(Layer):
    """K_s is taken behind the affine step, from X_s gamma + beta."""

    def scaling_statistic(self, x: Array, x_s: Array) -> Array | None:
        affine = super().transform(x_s) if self.config.kernel_size is None else x_s
        return super().scaling_statistic(x, affine)


class ScalingStatisticOfXm(Layer):
    """K_s is taken from X_m, before it is divided by the deviation."""

    def standardize(self, x_cm: Array, mean: Array, var: Array) -> tuple[Array, Array]:
        self.x_m = x_cm - per_channel(mean, x_cm)
        return super().standardize(x_cm, mean, var)

    def scaling_statistic(self, x: Array, x_s: Array) -> Array | None:
        return super().scaling_statistic(x, self.x_m)


class ScalingStatisticOfTheBatch(Layer):
    """K_s is averaged over the batch too, and one value per channel."""

    def scaling_statistic(self, x: Array, x_s: Array) -> Array | None:
        k_s = super().scaling_statistic(x, x_s)
        return k_s if k_s is None else np.broadcast_to(k_s.mean(axis=0, keepdims=True), k_s.shape)


class VarianceForDeviation(Layer):
    """sigma_c and sigma_s are variances: the root is forgotten."""

    def calibrate_centering(self, x: Array) -> tuple[Array | None, Array]:
        k_m, x_cm = super().calibrate_centering(x)
        if k_m is None or is_mean(self.config.centering):
            return k_m, x_cm
        return np.square(k_m), x + per_channel(self.parameters["center_weight"], x) * np.square(k_m)

    def scaling_statistic(self, x: Array, x_s: Array) -> Array | None:
        k_s = super().scaling_statistic(x, x_s)
        return k_s if k_s is None or is_mean(self.config.scaling) else np.square(k_s)


class StatisticsIgnored(Layer):
    """K_m and K_s are means over the positions whatever the options say."""

    def __init__(self, config: Config) -> None:
        own = {name: getattr(config, name) for name in ("centering", "scaling")}
        means: dict[str, Any] = {name: "channel_mean" for name, value in own.items() if value is not None}
        super().__init__(replace(config, **means) if config.layer == "RBN" else config)


class GammaFromOne(Layer):
    """gamma is taken for what it differs from 1 by: Y = X_cs (1 + gamma) + beta."""

    def transform(self, x_cs: Array) -> Array:
        return super().transform(x_cs) + x_cs if self.config.gamma else super().transform(x_cs)


class KernelOffCentre(Layer):
    """BNET pads all its zeros in front of every axis, so that the kernels stand off their centre."""

    def transform(self, x_cs: Array) -> Array:
        if self.config.kernel_size is None:
            return super().transform(x_cs)
        margin = self.config.kernel_size // 2
        before = np.pad(x_cs, [(0, 0), (0, 0), *[(margin, 0)] * (x_cs.ndim - 2)])
        inside: Any = (..., *(slice(0, size) for size in x_cs.shape[2:]))
        return super().transform(before)[inside]


class RunningVarianceOfX(Layer):
    """The running variance follows X, as before the centering calibration, and not X_cm."""

    def calibrate_centering(self, x: Array) -> tuple[Array | None, Array]:
        _, self.x_var = batch_mean_and_variance(x)
        return super().calibrate_centering(x)

    def accumulate(self, mean: Array, var: Array, values: int) -> None:
        super().accumulate(mean, self.x_var, values)


class RunningVarianceWithEps(Layer):
    """The running variance accumulates Var + eps."""

    def accumulate(self, mean: Array, var: Array, values: int) -> None:
        super().accumulate(mean, var + self.config.eps, values)


class BesselOfTheImages(Layer):
    """The running variance is made unbiased with N / (N - 1) instead of N H W / (N H W - 1)."""

    def forward(self, x: Any, training: bool) -> Array:
        self.images = len(x)
        return super().forward(x, training)

    def accumulate(self, mean: Array, var: Array, values: int) -> None:
        super().accumulate(mean, var, self.images if self.images > 1 else values)


class DebiasedMomentum(Layer):
    """The running statistics are divided by 1 - m^t, as Adam's moments are."""

    def accumulate(self, mean: Array, var: Array, values: int) -> None:
        super().accumulate(mean, var, values)
        m, t = self.config.momentum, self.statistics.get("num_batches_tracked")
        if m is not None and m < 1.0 and t is not None:
            for name in ("running_mean", "running_var"):
                self.statistics[name] = self.statistics[name] / (1.0 - m**t)


class AccumulatedTwice(Layer):
    """Every batch is accumulated twice, as where the forward pass is computed again."""

    def accumulate(self, mean: Array, var: Array, values: int) -> None:
        super().accumulate(mean, var, values)
        super().accumulate(mean, var, values)


class ScaleBiasGradientTimesTen(Layer):
    """The gradient of w_b is ten times what is due."""

    def backward(self, dy: Any) -> tuple[Array, dict[str, Array]]:
        dx, gradients = super().backward(dy)
        tenfold = {name: 10.0 * value for name, value in gradients.items() if name == "scale_bias"}
        return dx, gradients | tenfold


class InputGradientAveraged(Layer):
    """dX is divided by the number of images."""

    def backward(self, dy: Any) -> tuple[Array, dict[str, Array]]:
        dx, gradients = super().backward(dy)
        return dx / max(len(dx), 1), gradients


def is_mean(statistic: Statistic | None) -> bool:
    """Whether a statistic is a mean, and is there."""
    return statistic is not None and statistic.endswith("mean")


def maximum(statistic: Statistic | None, x: Array) -> Array:
    """The maximum over what a statistic averages."""
    assert statistic is not None
    axes = statistic_axes(statistic, x)
    if not axes:
        return x
    return x.max(axis=axes, keepdims=True) if x.size else x.sum(axis=axes, keepdims=True)


WRONG_LAYERS: dict[str, tuple[type[Layer], ...]] = {
    "formula": (
        EpsOutsideTheRoot,
        HardcodedEps,
        DeviationWithoutEps,
        CenteringSubtracts,
        CenteringAfterwards,
        NoRestriction,
        OtherHardSigmoid,
        HardSigmoidWithoutEnds,
        HardSigmoidSlopeBeyondItsEnds,
        NoScaleBias,
        ScaleWeightAndBiasSwapped,
        BetaInsideTheRestriction,
        FlippedKernel,
        ReversedKernelAxes,
        OneKernelForAll,
        PaddedBeforeNormalization,
        BorderRepeated,
        NoConvolutionBias,
        NaNSwallowed,
        CenteringByMaxPooling,
        ScalingByMaxPooling,
        MaxPooling,
        CenteringOfXItself,
        OneCenterWeight,
        OneScaleWeight,
        TwiceTheSigmoid,
        HyperbolicTangent,
        SoftmaxOverChannels,
        RestrictIgnored,
        BiasInsideTheProduct,
        GammaFromOne,
        KernelOffCentre,
    ),
    "gradient": (
        CenteringWithoutGradient,
        ScalingWithoutGradient,
        AttentionWithoutGradient,
        StatisticsWithoutGradient,
        VarianceWithoutGradient,
        GammaGradientOfXs,
        CenterWeightGradientOfTheMean,
        GradientsAveraged,
        ScaleBiasGradientTimesTen,
        InputGradientAveraged,
    ),
    "statistics": (
        OnePassVariance,
        UnbiasedNormalization,
        PlaneVariance,
        UnbiasedDeviation,
        ScalingStatisticOfX,
        AttentionOfXs,
        CenteringStatisticOfTheBatch,
        ScalingStatisticOfY,
        ScalingStatisticOfXm,
        ScalingStatisticOfTheBatch,
        VarianceForDeviation,
        StatisticsIgnored,
    ),
    "state": (
        OtherRunningVariance,
        BiasedRunningVariance,
        UnbiasedRunningVariance,
        FlippedMomentum,
        CumulativeAverageOffByOne,
        RunningMeanOfX,
        RunningDeviation,
        VarianceAboutTheRunningMean,
        TrainingDoesNotAccumulate,
        CounterStandsStill,
        RunningVarianceOfX,
        RunningVarianceWithEps,
        BesselOfTheImages,
        DebiasedMomentum,
        AccumulatedTwice,
    ),
    "mode": (
        ModeIgnored,
        BatchStatisticsInEvaluation,
        RunningStatisticsWithBatchGradient,
        EvaluationAccumulates,
        EvaluationCounts,
        EvaluationWithoutCentering,
        TrainingWithRunningStatistics,
        OneValueAccepted,
    ),
    "aliasing": (
        InputModified,
        CotangentModified,
        StateNotCopied,
    ),
}
"""Every wrong layer, by what its mistake is about."""
