"""An RBN of one's own in Flax, held to the suite.

In this folder:

    rbn conform --subject flax_rbn:subject
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen

from rbn.conformance.subjects.flax import FlaxModule
from rbn_core.config import Config


class OwnRBN(linen.Module):
    """RBN with channel means; the gradients are JAX's."""

    epsilon: float = 1e-5
    momentum: float = 0.9
    param_dtype: Any = jnp.float32

    @linen.compact
    def __call__(self, x: jax.Array, use_running_average: bool) -> jax.Array:
        """Y of X, (N, *spatial, C)."""
        C = x.shape[-1]
        starts = {"scale": 1.0, "bias": 0.0, "center_weight": 0.0, "scale_weight": 0.0, "scale_bias": 1.0}
        own = {
            name: self.param(name, linen.initializers.constant(start), (C,), self.param_dtype)
            for name, start in starts.items()
        }
        mean = self.variable("batch_stats", "mean", jnp.zeros, C, self.param_dtype)
        var = self.variable("batch_stats", "var", jnp.ones, C, self.param_dtype)

        training, positions = not use_running_average, x.size // max(x.shape[0] * C, 1)
        values = x.shape[0] * positions
        if training and values <= 1:
            raise ValueError(f"expected more than one value per channel, got an input of shape {x.shape}")
        X = x.reshape(x.shape[0], positions, C).astype(self.param_dtype)
        # X_cm = X + w_m K_m, less its mean: the batch's is (1 + w_m) E(X), and is taken off first.
        E = X.mean((0, 1)) if training else jnp.zeros_like(mean.value)
        K_m = (X - E).mean(1, keepdims=True)
        X_m = X - E + own["center_weight"] * K_m - (0.0 if training else mean.value)
        Var = (X_m**2).mean((0, 1)) if training else var.value
        X_s = X_m / jnp.sqrt(Var + self.epsilon)
        R = jax.nn.sigmoid(own["scale_weight"] * X_s.mean(1, keepdims=True) + own["scale_bias"])
        Y = X_s * R * own["scale"] + own["bias"]
        if training and not self.is_initializing():
            m = self.momentum
            mean.value = m * mean.value + (1 - m) * (1 + own["center_weight"]) * E
            var.value = m * var.value + (1 - m) * Var * values / (values - 1)
        return Y.astype(x.dtype).reshape(x.shape)


def make(config: Config, dtype: Any) -> linen.Module:
    """The layer for a case's options."""
    return OwnRBN(epsilon=config.eps, momentum=config.momentum, param_dtype=dtype)


subject = FlaxModule(
    "RBN in Flax",
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
    momentum="old",  # its momentum weighs the old running value
    layers=("rbn",),
    fixed={  # what it has no option for, and always does
        "centering": "channel_mean",
        "scaling": "channel_mean",
        "restrict": "sigmoid",
        "running_var": "unbiased",
        "gamma": True,
        "beta": True,
        "track_running_stats": True,
    },
)
