"""Flax's own BatchNorm, linen's and NNX's, held to the reference."""

from typing import Any

from findings import Finding, declared
from flax import linen, nnx

from rbn.conformance.subjects.flax import FlaxModule, NNXModule
from rbn_core.config import Config

ONE_PASS = Finding(
    "the variance is E[X²] - E[X]², which loses its digits where the mean is large compared with the "
    "deviation: for 4096 and 4097 it is 0, and Y is 158 where 1 is right; use_fast_variance=False is right",
    "flax_one_pass_variance.py",
    ("bn/train/offset1000/*",),
)
ACCEPTED = Finding(
    "trains on one value per channel, which has no variance: Y is beta whatever X is, and the running "
    "variance shrinks",
    "flax_one_value.py",
    ("bn/train/offset0/1x3*",),
)
FINDINGS = dict.fromkeys(("subject", "nnx_subject"), (ONE_PASS, ACCEPTED))
PROMOTED = "Y is float32, because the parameters are; with dtype= these cases pass"
DECLARED = declared((ONE_PASS, ACCEPTED)) | {"bn/*/float16": PROMOTED, "bn/*/bfloat16": PROMOTED}
FIXED = {"running_var": "biased", "track_running_stats": True}
"""What Flax has no option for, and always does."""


def options(config: Config, dtype: Any) -> dict[str, Any]:
    """Both layers' options for a case's."""
    return {
        "momentum": config.momentum,
        "epsilon": config.eps,
        "use_scale": config.gamma,
        "use_bias": config.beta,
        "param_dtype": dtype,
    }


def make(config: Config, dtype: Any) -> linen.BatchNorm:
    """linen's BatchNorm with a case's options."""
    return linen.BatchNorm(**options(config, dtype))


def make_nnx(config: Config, dtype: Any) -> nnx.BatchNorm:
    """NNX's BatchNorm with a case's options."""
    return nnx.BatchNorm(config.num_features, **options(config, dtype), rngs=nnx.Rngs(0))


subject = FlaxModule(
    "flax.linen BatchNorm",
    make,
    {
        "gamma": "params/scale",
        "beta": "params/bias",
        "running_mean": "batch_stats/mean",
        "running_var": "batch_stats/var",
    },
    momentum="old",
    fixed=FIXED,
    expected_failures=DECLARED,
)
nnx_subject = NNXModule(
    "flax.nnx BatchNorm",
    make_nnx,
    {"gamma": "scale", "beta": "bias", "running_mean": "mean", "running_var": "var"},
    momentum="old",
    fixed=FIXED,
    expected_failures=DECLARED,
)
