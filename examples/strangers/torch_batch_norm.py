"""PyTorch's own BatchNorm, held to the reference.

python examples/own_batch_norm/torch_batch_norm.py
"""

import torch
from findings import report
from torch import nn

from rbn.conformance.subjects.torch import TorchModule
from rbn_core.config import Config

COUNTED = "counts a batch in num_batches_tracked before it refuses it: one value per channel has no variance"


def make(config: Config, dtype: torch.dtype) -> nn.Module:
    """The BatchNorm for a case's shape and options."""
    layer = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}.get(config.spatial_dims, nn.BatchNorm1d)
    return layer(
        config.num_features,
        eps=config.eps,
        momentum=config.momentum,
        affine=config.gamma,
        track_running_stats=config.track_running_stats,
        dtype=dtype,
    )


subject = TorchModule(
    "torch BatchNorm",
    make,
    {
        "gamma": "weight",
        "beta": "bias",
        "running_mean": "running_mean",
        "running_var": "running_var",
        "num_batches_tracked": "num_batches_tracked",
    },
    momentum="new",
    fixed={"running_var": "unbiased"},
    expected_failures={"bn/train/offset0/1x3*": COUNTED},
)


def main() -> int:
    """Print what differs."""
    return report(subject)


if __name__ == "__main__":
    raise SystemExit(main())
