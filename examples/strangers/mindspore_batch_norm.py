"""MindSpore's own BatchNorm, held to the reference."""

from typing import Any

from findings import Finding, declared
from mindspore import nn

from rbn.conformance.subjects.mindspore import MindSporeCell
from rbn_core.config import Config

TOO_MUCH = "still stores what the option should do without"
NAN = Finding(
    "trains on one value per channel, which has no variance: the running variance becomes NaN and stays so",
    "mindspore_one_value.py",
    ("bn/train/offset0/1x3*",),
)
FINDINGS = {"subject": (NAN,)}
NO_DTYPE = "takes float16 and float32 only"


def make(config: Config, dtype: Any) -> nn.Cell:
    """The BatchNorm for a case's shape and options, but for BatchNorm3d, which stores other names."""
    layer = nn.BatchNorm2d if config.spatial_dims == 2 else nn.BatchNorm1d
    return layer(
        config.num_features,
        eps=config.eps,
        momentum=config.momentum,
        affine=config.gamma,
        use_batch_statistics=None if config.track_running_stats else True,
        dtype=dtype,
    )


subject = MindSporeCell(
    "mindspore BatchNorm",
    make,
    {"gamma": "gamma", "beta": "beta", "running_mean": "moving_mean", "running_var": "moving_variance"},
    momentum="old",
    fixed={"running_var": "unbiased"},
    absent={
        "bn/*/float64": NO_DTYPE,
        "bn/*/bfloat16": NO_DTYPE,
        "bn/*/channels_last": "takes NHWC on a GPU only",
        "bn/*/2x3x2x3x2/*": "BatchNorm3d stores other names than BatchNorm2d",
        "bn/*/gamma=False,beta=False/float32": TOO_MUCH,
        "bn/*/track_running_stats=False/float32": TOO_MUCH,
    },
    expected_failures=declared(FINDINGS["subject"]),
)
