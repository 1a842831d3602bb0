"""A layer of your own in Flax, held to the reference: rbn conform --subject MODULE:subject.

As it stands it is a BatchNorm that conforms. TO DO, to make it RBN:

1. write the two calibrations, where it says so below, or put your own module in the place of this one;
2. take out the line that raises NotImplementedError, and `absent`, which says that this is still to be done;
3. take out of `fixed` what your layer has an option for.

A module of NNX has its subject in NNXModule, of the same file as FlaxModule.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen

from rbn.conformance.subjects.flax import FlaxModule
from rbn_core.config import Config


class MyLayer(linen.Module):
    """Takes (N, *spatial, C)."""

    epsilon: float
    momentum: float
    calibrated: bool
    param_dtype: Any

    @linen.compact
    def __call__(self, x: jax.Array, use_running_average: bool) -> jax.Array:
        """Y of X."""
        channels = x.shape[-1]
        scale = self.param("scale", linen.initializers.ones, (channels,), self.param_dtype)
        bias = self.param("bias", linen.initializers.zeros, (channels,), self.param_dtype)
        if self.calibrated:  # w_m, w_v and w_b
            self.param("center_weight", linen.initializers.zeros, (channels,), self.param_dtype)
            self.param("scale_weight", linen.initializers.zeros, (channels,), self.param_dtype)
            self.param("scale_bias", linen.initializers.ones, (channels,), self.param_dtype)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, channels, self.param_dtype)
        running_var = self.variable("batch_stats", "var", jnp.ones, channels, self.param_dtype)
        if self.calibrated and not self.is_initializing():
            raise NotImplementedError("the calibrations are still to be written")  # TO DO

        training, positions = not use_running_average, x.size // max(x.shape[0] * channels, 1)
        values = x.shape[0] * positions
        if training and values <= 1:
            raise ValueError(f"expected more than one value per channel, got an input of shape {x.shape}")
        X = x.reshape(x.shape[0], positions, channels).astype(self.param_dtype)
        # TO DO: the centering calibration X_cm = X + w_m K_m, K_m the plane means of X.
        mean = X.mean((0, 1)) if training else running_mean.value
        X_m = X - mean
        var = (X_m**2).mean((0, 1)) if training else running_var.value
        X_s = X_m / jnp.sqrt(var + self.epsilon)
        # TO DO: the scaling calibration X_cs = X_s sigmoid(w_v K_s + w_b), K_s the plane means of X_s.
        Y = X_s * scale + bias
        if training and not self.is_initializing():
            m = self.momentum
            running_mean.value = m * running_mean.value + (1.0 - m) * mean
            running_var.value = m * running_var.value + (1.0 - m) * var * values / (values - 1)
        return Y.astype(x.dtype).reshape(x.shape)


def make(config: Config, dtype: Any) -> linen.Module:
    """The layer for a case's options."""
    return MyLayer(config.eps, config.momentum, config.centering is not None, dtype)


subject = FlaxModule(
    "my layer",
    make,
    {  # the canonical names of what it stores, and its own with their collections
        "gamma": "params/scale",
        "beta": "params/bias",
        "center_weight": "params/center_weight",
        "scale_weight": "params/scale_weight",
        "scale_bias": "params/scale_bias",
        "running_mean": "batch_stats/mean",
        "running_var": "batch_stats/var",
    },
    momentum="old",  # the momentum above weighs the old running value; "new" is the batch's, as in PyTorch
    layers=("bn", "rbn"),  # what it is held to; there are "iebn" and "bnet", too
    fixed={  # what it has no option for, and always does
        "centering": "channel_mean",
        "scaling": "channel_mean",
        "restrict": "sigmoid",
        "running_var": "unbiased",
        "gamma": True,
        "beta": True,
        "track_running_stats": True,
    },
    absent={"rbn/*": "TO DO: the calibrations of RBN"},
)
