"""timm's BatchNormAct2d without its activation, held to the reference."""

from dataclasses import replace

import torch
import with_torchvision  # noqa: F401
from findings import declared
from timm.layers import BatchNormAct2d
from torch import nn
from torch_batch_norm import COUNTED, NAMES

from rbn.conformance.subjects.torch import TorchModule
from rbn_core.config import Config

FINDINGS = {"subject": (replace(COUNTED, cases=("bn/train/offset0/1x3x1x1/float32",)),)}
IMAGES = "takes images only"


def make(config: Config, dtype: torch.dtype) -> nn.Module:
    """The layer with a case's options."""
    return BatchNormAct2d(
        config.num_features,
        eps=config.eps,
        momentum=config.momentum,
        affine=config.gamma,
        track_running_stats=config.track_running_stats,
        apply_act=False,
        dtype=dtype,
    )


subject = TorchModule(
    "timm BatchNormAct2d",
    make,
    NAMES,
    momentum="new",
    fixed={"running_var": "unbiased"},
    absent=dict.fromkeys(("bn/*/8x3/*", "bn/*/1x3/*", "bn/*/2x3x5/*", "bn/*/2x3x2x3x2/*"), IMAGES),
    expected_failures=declared(FINDINGS["subject"]),
)
