"""torchvision's FrozenBatchNorm2d, held to the reference in evaluation, which is all that it does."""

import torch
import with_torchvision  # noqa: F401
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from rbn.conformance.subjects.torch import TorchModule
from rbn_core.config import Config

FROZEN = "always evaluates: that is what it is for"
IMAGES = "takes images only, though it does not refuse other shapes"
ALWAYS = "always has a weight, a bias and running statistics"
PROMOTED = "Y is float32, because the weight is"


def make(config: Config, dtype: torch.dtype) -> nn.Module:
    """The layer; its weight and bias are buffers, and become parameters so that they get gradients."""
    layer = FrozenBatchNorm2d(config.num_features, config.eps).to(dtype)
    for name in ("weight", "bias"):
        value = layer._buffers.pop(name)
        layer.register_parameter(name, nn.Parameter(value))
    return layer


subject = TorchModule(
    "torchvision FrozenBatchNorm2d",
    make,
    {"gamma": "weight", "beta": "bias", "running_mean": "running_mean", "running_var": "running_var"},
    momentum="new",
    fixed={"running_var": "unbiased", "track_running_stats": True},
    absent={
        **dict.fromkeys(("bn/train/[!o]*", "bn/train/offset10*", "bn/train/offset0/[!1]*"), FROZEN),
        "bn/train/offset0/1x3x1x1/*": FROZEN,
        **dict.fromkeys(("bn/eval/*/8x3/*", "bn/eval/*/2x3x5/*", "bn/eval/*/2x3x2x3x2/*"), IMAGES),
        "bn/eval/*/gamma=False,beta=False/*": ALWAYS,
    },
    expected_failures={"bn/eval/*/float16": PROMOTED, "bn/eval/*/bfloat16": PROMOTED},
)
