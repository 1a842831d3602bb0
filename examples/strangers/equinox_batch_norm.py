"""Equinox's BatchNorm, held to the reference."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from findings import Finding, declared
from jax.experimental import enable_x64
from stranger import Stranger

from rbn_core.config import Config

IN_HALF = Finding(
    "in half precision the mean and the variance of a batch are computed in half precision, too, although "
    "the running statistics are float32: in float16 squares overflow from a deviation of 256 on, the "
    "running variance becomes infinite, and Y is beta",
    "equinox_half.py",
    ("bn/train/*/float16", "bn/train/*/bfloat16"),
)
ACCEPTED = Finding(
    "trains on one value per channel, which has no variance: Y is beta whatever X is, and the running "
    "variance shrinks",
    "equinox_one_value.py",
    ("bn/train/offset0/1x3*",),
)
DEBIASED = Finding(
    'mode="batch" divides the running variance by 1 - momentum^n in inference. That is right for a variance '
    "that starts at 0, but this one starts at 1. With the default momentum and batches of variance 1 it is "
    "100 after the first batch, and Y is a tenth of the right value; after 100 batches Y is still 0.80 of it",
    "equinox_evaluation.py",
)
UNBIASED = Finding(
    "the documentation says that inference uses the unbiased variance, but the layer stores the biased one, "
    "which is half of it for two values",
    "equinox_biased.py",
)
FINDINGS = {"subject": (DEBIASED, IN_HALF, ACCEPTED, UNBIASED)}
PROMOTED = "Y is float32, because the parameters are"


def step(x: Any, state: Any, config: Config, training: bool, cotangent: Any) -> Any:
    """One step of equinox.nn.BatchNorm under `vmap`; its counter is 0, and so it evaluates what is stored."""
    with enable_x64(x.dtype == np.float64):
        layer, kept = eqx.nn.make_with_state(eqx.nn.BatchNorm)(
            config.num_features,
            "batch",
            config.eps,
            config.gamma,
            config.momentum,
            dtype=state["running_var"].dtype,
            mode="batch",
        )
        stored = {name: jnp.asarray(value) for name, value in state.items()}
        kept = kept.set(layer.batch_state_index, (stored.pop("running_mean"), stored.pop("running_var")))

        def forward(parameters: Any, x: Any) -> Any:
            mine = eqx.nn.inference_mode(layer, not training)
            if parameters:
                mine = eqx.tree_at(
                    lambda own: (own.weight, own.bias), mine, (parameters["gamma"], parameters["beta"])
                )
            return jax.vmap(mine, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(x, kept)

        y, pull, kept = jax.vjp(forward, stored, jnp.asarray(x), has_aux=True)
        gradients, dx = pull(jnp.asarray(cotangent, y.dtype))
        mean, var = kept.get(layer.batch_state_index)
        after = {**stored, "running_mean": mean, "running_var": var}
        found = {name: np.asarray(value) for name, value in after.items()}
        return np.asarray(y), np.asarray(dx), {n: np.asarray(g) for n, g in gradients.items()}, found


subject = Stranger(
    "equinox BatchNorm",
    step,
    {"running_var": "biased", "track_running_stats": True},
    expected_failures=declared((IN_HALF, ACCEPTED))
    | {"bn/eval/*/float16": PROMOTED, "bn/eval/*/bfloat16": PROMOTED},
)
