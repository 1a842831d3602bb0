"""Haiku's BatchNorm, held to the reference."""

from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from findings import Finding, declared
from jax.experimental import enable_x64
from stranger import Stranger

from rbn_core.config import Config

ONE_PASS = Finding(
    "the variance is E[X²] - E[X]², which loses its digits where the mean is large compared with the "
    "deviation, and can become negative: for 4096 and 4097 it is 0, and Y is 158 where 1 is right; three "
    "values of 1000.4 give NaN",
    "haiku_one_pass_variance.py",
    ("bn/train/offset1000/*",),
)
IN_HALF = Finding(
    "in half precision the sums and the running statistics have half precision, too: in float16 squares "
    "overflow from |X| = 256 on, the running variance becomes infinite, and Y is the offset",
    "haiku_half.py",
    ("bn/train/*/float16", "bn/train/*/bfloat16"),
)
ROUNDED = Finding(
    "evaluation rounds running statistics of float32 to the type of X: in float16 a variance from 65520 on "
    "is infinite, and Y is the offset",
    "haiku_half_evaluation.py",
    ("bn/eval/*/float16", "bn/eval/*/bfloat16"),
)
ACCEPTED = Finding(
    "trains on one value per channel, which has no variance: Y is beta whatever X is, and the running "
    "variance shrinks",
    "haiku_one_value.py",
    ("bn/train/offset0/1x3*",),
)
FINDINGS = {"subject": (ONE_PASS, IN_HALF, ROUNDED, ACCEPTED)}
DEBIASED = "averages are divided by 1 - decay_rate^n, which is 0 for a decay_rate of 1"

MANY = 10**6
"""So many batches that the averages are divided by 1 - momentum^n = 1."""


def step(x: Any, state: Any, config: Config, training: bool, cotangent: Any) -> Any:
    """One step of hk.BatchNorm, its averages as after very many batches."""
    with enable_x64(x.dtype == np.float64):
        layer = hk.without_apply_rng(
            hk.transform_with_state(
                lambda x, training: hk.BatchNorm(
                    config.gamma, config.beta, config.momentum, config.eps, data_format="channels_first"
                )(x, training)
            )
        )
        wide = {
            name: jnp.asarray(value).reshape(1, -1, *(1,) * (x.ndim - 2)) for name, value in state.items()
        }
        names = {"gamma": "scale", "beta": "offset"}
        params = {"batch_norm": {own: wide[name] for name, own in names.items() if name in wide}}
        kept = {
            f"batch_norm/~/{name}_ema": {"average": value, "hidden": value, "counter": jnp.array(MANY)}
            for name, value in (("mean", wide["running_mean"]), ("var", wide["running_var"]))
        }
        y, pull, kept = jax.vjp(
            lambda params, x: layer.apply(params, kept, x, training), params, jnp.asarray(x), has_aux=True
        )
        gradients, dx = pull(jnp.asarray(cotangent, y.dtype))
        after = state | {
            f"running_{name}": np.asarray(kept[f"batch_norm/~/{name}_ema"]["average"]).ravel()
            for name in ("mean", "var")
        }
        found = {
            n: np.asarray(gradients["batch_norm"][own]).ravel() for n, own in names.items() if n in state
        }
        return np.asarray(y), np.asarray(dx), found, after


subject = Stranger(
    "haiku BatchNorm",
    step,
    {"running_var": "biased", "track_running_stats": True},
    expected_failures=declared(FINDINGS["subject"]) | {"bn/train/*/momentum=1.0/*": DEBIASED},
)
