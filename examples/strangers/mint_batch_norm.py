"""MindSpore's mint.nn.BatchNorm, held to the reference, which a CPU cannot run."""

from typing import Any

from mindspore import mint, nn

from rbn.conformance.subjects.mindspore import MindSporeCell
from rbn_core.config import Config

NOT_HERE = "on a CPU: 'The kernel BatchNormExt unregistered'"
KEPT = ("running_mean", "running_var", "num_batches_tracked")


def make(config: Config, dtype: Any) -> nn.Cell:
    """The BatchNorm for a case's shape and options."""
    layer = {2: mint.nn.BatchNorm2d, 3: mint.nn.BatchNorm3d}.get(config.spatial_dims, mint.nn.BatchNorm1d)
    return layer(
        config.num_features,
        eps=config.eps,
        momentum=config.momentum,
        affine=config.gamma,
        track_running_stats=config.track_running_stats,
        dtype=dtype,
    )


subject = MindSporeCell(
    "mindspore mint BatchNorm",
    make,
    {"gamma": "weight", "beta": "bias", **{name: name for name in KEPT}},
    momentum="new",
    fixed={"running_var": "unbiased"},
    absent={"bn/*": NOT_HERE},
)
