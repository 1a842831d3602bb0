"""Flax's own BatchNorm, linen's and NNX's, held to the reference.

python examples/own_batch_norm/flax_batch_norm.py
"""

from typing import Any

from findings import report
from flax import linen, nnx

from rbn.conformance.subjects.flax import FlaxModule, NNXModule
from rbn_core.config import Config

ONE_PASS = (
    "the variance is E[X²] - E[X]², which cancels where the mean is large against the deviation; "
    "with use_fast_variance=False these cases pass"
)
ACCEPTED = "one value per channel is no error: Y is beta"
PROMOTED = "Y is float32, because the parameters are; with dtype= these cases pass"
FINDINGS = {
    "bn/train/offset1000/*": ONE_PASS,
    "bn/train/offset0/1x3*": ACCEPTED,
    "bn/*/float16": PROMOTED,
    "bn/*/bfloat16": PROMOTED,
}
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
    expected_failures=FINDINGS,
)
nnx_subject = NNXModule(
    "flax.nnx BatchNorm",
    make_nnx,
    {"gamma": "scale", "beta": "bias", "running_mean": "mean", "running_var": "var"},
    momentum="old",
    fixed=FIXED,
    expected_failures=FINDINGS,
)


def main() -> int:
    """Print what differs."""
    return max(report(subject), report(nnx_subject))


if __name__ == "__main__":
    raise SystemExit(main())
