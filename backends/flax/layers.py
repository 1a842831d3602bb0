"""RBN as a linen module."""

from __future__ import annotations

from dataclasses import KW_ONLY
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen import initializers
from flax.typing import Dtype, Initializer
from jax import Array

from rbn.backends.flax import functional
from rbn_core.config import Config, Statistic, check_input, refuse_unknown_options
from rbn_core.names import NAMES


@refuse_unknown_options
class RBN(nn.Module):
    r"""Representative Batch Normalization (Gao et al., CVPR 2021, eq. 12) in place of `flax.linen.BatchNorm`.

        X_cm = X + w_m K_m
        X_s  = (X_cm - E(X_cm)) / sqrt(Var(X_cm) + eps)
        Y    = X_s R(w_v K_s + w_b) gamma + beta

    Inputs are (N, *spatial, C) with any number of spatial axes, in float64 (where JAX has it enabled),
    float32, bfloat16 or float16; statistics are taken in at least float32. A half-precision input gives an
    output of its own dtype, where BatchNorm promotes it to that of the parameters.
    In training E and Var are the batch's, in evaluation the running ones; K_m and K_s are always the input's.

    Collections: `params` has `scale` (gamma) and `bias` (beta) as in BatchNorm, and `center_weight` (w_m,
    from 0), `scale_weight` (w_v, from 0) and `scale_bias` (w_b, from 1); `batch_stats` has `mean` and `var`
    as in BatchNorm, in at least float32, each of shape (C,), and `num_batches_tracked`, an int32 scalar.
    Initialization fills `batch_stats` and does not update it. Evaluation does without the counter, and
    training starts it at 0 where it is missing, so that BatchNorm's `batch_stats` will do.

    Attributes:
        use_running_average: evaluation (True) or training (False); here or in the call.
        axis: the channel axis; the batch is the first of the others.
        momentum: the weight of the *old* value in the running statistics; `None` averages all batches.
        epsilon: epsilon, added to a variance under its root.
        dtype: the dtype of the output; `None` as said above.
        param_dtype: the dtype of the parameters.
        use_bias: whether there is a beta.
        use_scale: whether there is a gamma.
        bias_init: how beta starts.
        scale_init: how gamma starts.
        centering: K_m, "channel_mean", "channel_std", "spatial_mean", "spatial_std" or `None`.
        scaling: K_s, the same choice, of X_s.
        restrict: R, "sigmoid" or "hard_sigmoid".
        running_var: the batch variance that is accumulated, "unbiased" or "biased" (BatchNorm's in Flax).

    Raises:
        RBNError: An option or an input is refused; no statistic has changed then.
    """

    use_running_average: bool | None = None
    axis: int = -1
    momentum: float | None = 0.9
    epsilon: float = 1e-5
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = initializers.zeros
    scale_init: Initializer = initializers.ones
    _: KW_ONLY
    centering: Statistic | None = "channel_mean"
    scaling: Statistic | None = "channel_mean"
    restrict: str = "sigmoid"
    running_var: str = "unbiased"

    def __post_init__(self) -> None:
        self.config(num_features=1)
        super().__post_init__()

    @nn.nowrap
    def config(self, num_features: int) -> Config:
        """The layer's options in the project's terms; C is known only once there is an input."""
        return Config(
            num_features,
            self.epsilon,
            self.momentum,
            self.centering,
            self.scaling,
            self.restrict,
            self.running_var,
            gamma=self.use_scale,
            beta=self.use_bias,
        )

    @nn.compact
    def __call__(self, x: Array, use_running_average: bool | None = None) -> Array:
        """Y of eq. 12, of the shape of `x`, (N, *spatial, C).

        Args:
            x: The input; not changed.
            use_running_average: Evaluation (True) or training (False), unless the layer already knows.
        """
        use_running_average = nn.merge_param(
            "use_running_average", self.use_running_average, use_running_average
        )
        training = not use_running_average and not self.is_initializing()
        num_features = self._num_features(x)
        check_input(x.shape, x.dtype.name, num_features, training=training, axis=self.axis)
        parameters = self._parameters(num_features)
        dtype = functional.statistics_dtype(self.param_dtype)
        stored_mean = self.variable("batch_stats", "mean", jnp.zeros, (num_features,), dtype)
        stored_var = self.variable("batch_stats", "var", jnp.ones, (num_features,), dtype)
        running = (stored_mean.value, stored_var.value)
        if training or self.is_initializing():
            tracked = self.variable("batch_stats", "num_batches_tracked", jnp.zeros, (), jnp.int32)
        y, mean, var = functional.rbn(
            x,
            parameters,
            running if use_running_average else None,
            axis=self.axis,
            eps=self.epsilon,
            centering=self.centering,
            scaling=self.scaling,
            restrict=self.restrict,
            dtype=self.dtype,
        )
        if training:
            tracked.value += 1
            stored_mean.value, stored_var.value = functional.track(
                running,
                mean,
                var,
                tracked.value,
                momentum=self.momentum,
                running_var=self.running_var,
                values=x.size // num_features,
            )
        return y

    @nn.nowrap
    def _num_features(self, x: Array) -> int:
        """C, as stored; the input's where nothing is stored yet."""
        for collection in ("params", "batch_stats"):
            for leaf in jax.tree.leaves(self.variables.get(collection, {})):
                if leaf.ndim:
                    return leaf.shape[0]
        return x.shape[self.axis % x.ndim] if x.ndim else 1

    @nn.nowrap
    def _parameters(self, num_features: int) -> dict[str, Any]:
        inits = {"gamma": self.scale_init, "beta": self.bias_init}
        return {
            canonical: self.param(
                NAMES["flax"][canonical].removeprefix("params/"),
                inits.get(canonical, initializers.constant(start)),
                (num_features,),
                self.param_dtype,
            )
            for canonical, start in self.config(num_features).parameters.items()
        }
