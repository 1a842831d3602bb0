"""RBN as an NNX module."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from flax.nnx import initializers, rnglib
from flax.nnx.module import first_from
from flax.typing import Dtype, Initializer
from jax import Array

from rbn.backends.flax import functional
from rbn_core.config import CALIBRATION_STARTS, Config, Statistic, check_input, refuse_unknown_options
from rbn_core.names import NAMES


@refuse_unknown_options
class RBN(nnx.Module):
    r"""Representative Batch Normalization (Gao et al., CVPR 2021, eq. 12) in place of `flax.nnx.BatchNorm`.

        X_cm = X + w_m K_m
        X_s  = (X_cm - E(X_cm)) / sqrt(Var(X_cm) + eps)
        Y    = X_s R(w_v K_s + w_b) gamma + beta

    Inputs are (N, *spatial, C) with any number of spatial axes, in float64 (where JAX has it enabled),
    float32, bfloat16 or float16; statistics are taken in at least float32. A half-precision input gives an
    output of its own dtype, where BatchNorm promotes it to that of the parameters.
    In training E and Var are the batch's, in evaluation the running ones; K_m and K_s are always the input's.

    State: `scale` (gamma) and `bias` (beta) as in BatchNorm, and `center_weight` (w_m, from 0),
    `scale_weight` (w_v, from 0) and `scale_bias` (w_b, from 1) are each an `nnx.Param` of shape (C,); `mean`
    and `var` as in BatchNorm, in at least float32, and the int32 scalar `num_batches_tracked` are each an
    `nnx.BatchStat`.

    Args:
        num_features: C, the number of channels.
        use_running_average: evaluation (True) or training (False); `train()` and `eval()` set it.
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
        rngs: the random keys that `bias_init` and `scale_init` draw from.

    Raises:
        RBNError: An option or an input is refused; no statistic has changed then.
    """

    def __init__(
        self,
        num_features: int,
        *,
        use_running_average: bool = False,
        axis: int = -1,
        momentum: float | None = 0.9,
        epsilon: float = 1e-5,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = initializers.zeros,
        scale_init: Initializer = initializers.ones,
        centering: Statistic | None = "channel_mean",
        scaling: Statistic | None = "channel_mean",
        restrict: str = "sigmoid",
        running_var: str = "unbiased",
        rngs: rnglib.Rngs,
    ) -> None:
        config = Config(
            num_features,
            epsilon,
            momentum,
            centering,
            scaling,
            restrict,
            running_var,
            gamma=use_scale,
            beta=use_bias,
        )
        shape = (num_features,)
        self.mean = nnx.BatchStat(jnp.zeros(shape, functional.statistics_dtype(param_dtype)))
        self.var = nnx.BatchStat(jnp.ones(shape, functional.statistics_dtype(param_dtype)))
        self.num_batches_tracked = nnx.BatchStat(jnp.zeros((), jnp.int32))
        self.scale = nnx.data(nnx.Param(scale_init(rngs.params(), shape, param_dtype)) if use_scale else None)
        self.bias = nnx.data(nnx.Param(bias_init(rngs.params(), shape, param_dtype)) if use_bias else None)
        for name, start in CALIBRATION_STARTS.items():
            there = name in config.parameters
            setattr(self, name, nnx.data(nnx.Param(jnp.full(shape, start, param_dtype)) if there else None))
        self.num_features = num_features
        self.use_running_average = use_running_average
        self.axis = axis
        self.momentum = momentum
        self.epsilon = epsilon
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.use_bias = use_bias
        self.use_scale = use_scale
        self.bias_init = bias_init
        self.scale_init = scale_init
        self.centering = centering
        self.scaling = scaling
        self.restrict = restrict
        self.running_var = running_var

    def __call__(self, x: Array, use_running_average: bool | None = None) -> Array:
        """Y of eq. 12, of the shape of `x`, (N, *spatial, C).

        Args:
            x: The input; not changed.
            use_running_average: Evaluation (True) or training (False); `None` as the layer is set.
        """
        use_running_average = first_from(
            use_running_average,
            self.use_running_average,
            error_msg="RBN: expected use_running_average in the call or in the layer, got None in both.",
        )
        training = not use_running_average
        check_input(x.shape, x.dtype.name, self.num_features, training=training, axis=self.axis)
        running = (self.mean[...], self.var[...])
        y, mean, var = functional.rbn(
            x,
            self._parameters(),
            None if training else running,
            axis=self.axis,
            eps=self.epsilon,
            centering=self.centering,
            scaling=self.scaling,
            restrict=self.restrict,
            dtype=self.dtype,
        )
        if training:
            self.num_batches_tracked[...] += 1
            self.mean[...], self.var[...] = functional.track(
                running,
                mean,
                var,
                self.num_batches_tracked[...],
                momentum=self.momentum,
                running_var=self.running_var,
                values=x.size // self.num_features,
            )
        return y

    def _parameters(self) -> dict[str, Array]:
        stored = {
            canonical: getattr(self, name.removeprefix("params/"), None)
            for canonical, name in NAMES["flax"].items()
            if name.startswith("params/")
        }
        return {canonical: param[...] for canonical, param in stored.items() if param is not None}
