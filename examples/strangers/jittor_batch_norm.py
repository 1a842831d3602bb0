"""Jittor's own BatchNorm, held to the reference.

python examples/own_batch_norm/jittor_batch_norm.py
"""

import numpy as np
from findings import report

from rbn.conformance.cases import parse
from rbn.conformance.subjects.jittor import JittorModule
from rbn.conformance.suite import DTYPES

# First, because the helper prepares what Jittor reads at its import.
# isort: split
from jittor import nn

from rbn_core.config import Config

ONE_PASS = "the variance is E[X²] - E[X]², which cancels where the mean is large against the deviation"
ACCEPTED = "one value per channel is no error: Y is beta"
NAN = (
    "maximum(0) makes 0 of a NaN variance, since kernels are compiled with -Ofast, which assumes no NaN; "
    "in which dtypes depends on the processor"
)
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
    expected_failures={
        "bn/train/offset1000/*/float32": ONE_PASS,
        "bn/train/offset0/1x3*": ACCEPTED,
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


def loses_nan(dtype: str) -> bool:
    """Whether the kernels compiled here lose a NaN."""
    case = parse(f"bn/train/nan/3x4x2x3/{dtype}")
    subject.build(case.config, case.state(), dtype)
    x, cotangent = next(case.inputs())
    return bool(np.isfinite(subject.run(x, True, cotangent).state["running_var"]).all())


LOST = {f"bn/train/{data}/*/{dtype}": NAN for dtype in DTYPES if loses_nan(dtype) for data in ("nan", "inf")}
# The first pattern that matches gives the reason.
subject.expected_failures = LOST | subject.expected_failures


def main() -> int:
    """Print what differs; Jittor compiles for some minutes on first use."""
    return report(subject)


if __name__ == "__main__":
    raise SystemExit(main())
