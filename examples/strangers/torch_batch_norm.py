"""PyTorch's own BatchNorm, held to the reference."""

import torch
from findings import Finding, declared
from torch import nn

from rbn.conformance.subjects.torch import TorchModule
from rbn_core.config import Config

COUNTED = Finding(
    "a batch of one value per channel is refused, but num_batches_tracked has counted it: it is 1 too large",
    "torch_counts_what_it_refuses.py",
    ("bn/train/offset0/1x3*",),
)
FINDINGS = {"subject": (COUNTED,)}
KEPT = ("running_mean", "running_var", "num_batches_tracked")
NAMES = {"gamma": "weight", "beta": "bias", **{name: name for name in KEPT}}


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
    NAMES,
    momentum="new",
    fixed={"running_var": "unbiased"},
    expected_failures=declared(FINDINGS["subject"]),
)
