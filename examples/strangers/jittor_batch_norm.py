"""Jittor's own BatchNorm, held to the reference."""

from dataclasses import replace

import numpy as np
from findings import Finding, declared

from rbn.conformance.cases import parse
from rbn.conformance.subjects.jittor import JittorModule
from rbn.conformance.suite import DTYPES

# First, because the helper prepares what Jittor reads at its import.
# isort: split
from jittor import nn

from rbn_core.config import Config

ONE_PASS = Finding(
    "the variance is E[X²] - E[X]², which loses its digits where the mean is large compared with the "
    "deviation: for 4096 and 4097 it is 0, and Y is 158 where 1 is right",
    "jittor_one_pass_variance.py",
    ("bn/train/offset1000/*/float32",),
)
ACCEPTED = Finding(
    "trains on one value per channel, which has no variance: Y is beta whatever X is, and the running "
    "variance shrinks",
    "jittor_one_value.py",
    ("bn/train/offset0/1x3*",),
)
CONSTANTS = Finding(
    "eps, momentum and the mean's 1/n are float32 constants in float64 as well, which leaves 8 digits; the "
    "result is right where these are powers of 2",
    "jittor_float64.py",
    (
        "bn/train/*/float64",
        "bn/eval/offset0/*/float64",
        "bn/eval/offset10/*/float64",  # at 1000 they are within what the offset costs
        "bn/eval/[!o]*/float64",
    ),
)
IN_HALF = Finding(
    "in half precision the sums, the parameters' gradients and the running statistics have half precision, "
    "too: in float16 squares overflow from |X| = 256 on, and the running variance becomes infinite",
    "jittor_half.py",
    ("bn/train/*/float16", "bn/train/*/bfloat16"),
)
NAN = Finding(
    "maximum(0) turns a NaN variance into 0, because kernels are compiled with -Ofast, which assumes that "
    "there is no NaN; the dtypes in which this happens depend on the processor",
    "jittor_loses_nan.py",
)
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
    expected_failures=declared((ONE_PASS, ACCEPTED, CONSTANTS, IN_HALF))
    | {"bn/eval/*/float16": PROMOTED, "bn/eval/*/bfloat16": PROMOTED},
)


def loses_nan(dtype: str) -> bool:
    """Whether the kernels compiled here lose a NaN."""
    case = parse(f"bn/train/nan/3x4x2x3/{dtype}")
    subject.build(case.config, case.state(), dtype)
    x, cotangent = next(case.inputs())
    return bool(np.isfinite(subject.run(x, True, cotangent).state["running_var"]).all())


LOST = tuple(f"bn/train/{data}/*/{dtype}" for dtype in DTYPES if loses_nan(dtype) for data in ("nan", "inf"))
NAN_HERE = (replace(NAN, cases=LOST),) if LOST else ()
# The first pattern that matches gives the reason.
subject.expected_failures = declared(NAN_HERE) | subject.expected_failures
FINDINGS = {"subject": (*NAN_HERE, ONE_PASS, ACCEPTED, CONSTANTS, IN_HALF)}
