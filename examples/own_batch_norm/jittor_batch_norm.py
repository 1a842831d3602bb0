"""Jittor's own BatchNorm, held to the reference.

python examples/own_batch_norm/jittor_batch_norm.py
"""

from findings import report

from rbn.conformance.subjects.jittor import JittorModule

# First, because the helper prepares what Jittor reads at its import.
# isort: split
from jittor import nn

from rbn_core.config import Config

ONE_PASS = "the variance is E[X²] - E[X]², which cancels where the mean is large against the deviation"
NAN = "maximum(0) makes 0 of a NaN variance, since kernels are compiled with -Ofast, which assumes no NaN"
CONSTANTS = (
    "eps, momentum and the mean's 1/n are float32 constants in float64 as well; where these are powers of 2, "
    "it is right"
)
IN_HALF = "sums and the parameters' gradients are in half precision, and so become the running statistics"
PROMOTED = "Y and dX are float32 where the running statistics are"


def make(config: Config, dtype: str) -> nn.BatchNorm:
    """The BatchNorm with a case's options."""
    layer = nn.BatchNorm(config.num_features, eps=config.eps, momentum=config.momentum, affine=config.gamma)
    if dtype == "float64":
        layer.float64()
    return layer


subject = JittorModule(
    "jittor BatchNorm",
    make,
    {"gamma": "weight", "beta": "bias", "running_mean": "running_mean", "running_var": "running_var"},
    momentum="new",
    fixed={"running_var": "biased", "track_running_stats": True},
    absent={"bn/*/channels_last": "has no channels-last layout"},
    expected_failures={
        "bn/train/offset1000/*/float32": ONE_PASS,
        "bn/train/nan/*": NAN,  # the first pattern that matches gives the reason
        "bn/train/inf/*": NAN,
        "bn/train/*/float64": CONSTANTS,
        "bn/eval/offset0/*/float64": CONSTANTS,
        "bn/eval/offset10/*/float64": CONSTANTS,  # at 1000 they are within what the offset costs
        "bn/eval/[!o]*/float64": CONSTANTS,
        "bn/train/*/float16": IN_HALF,
        "bn/train/*/bfloat16": IN_HALF,
        "bn/eval/*/float16": PROMOTED,
        "bn/eval/*/bfloat16": PROMOTED,
    },
)


def main() -> int:
    """Print what differs; Jittor compiles for some minutes on first use."""
    return report(subject)


if __name__ == "__main__":
    raise SystemExit(main())
