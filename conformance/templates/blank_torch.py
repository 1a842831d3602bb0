"""A layer of your own in PyTorch, held to the reference: rbn conform --subject MODULE:subject.

As it stands it is a BatchNorm that conforms. TO DO, to make it RBN:

1. write the two calibrations, where it says so below, or put your own module in the place of this one;
2. take out the line that raises NotImplementedError, and `absent`, which says that this is still to be done;
3. take out of `fixed` what your layer has an option for.
"""

import torch
from torch import Tensor, nn

from rbn.conformance.subjects.torch import TorchModule
from rbn_core.config import Config


class MyLayer(nn.Module):
    """Takes (N, C, *spatial)."""

    def __init__(
        self, channels: int, eps: float, momentum: float, calibrated: bool, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.eps, self.momentum, self.calibrated = eps, momentum, calibrated
        self.weight = nn.Parameter(torch.ones(channels, 1, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(channels, 1, dtype=dtype))
        if calibrated:  # w_m, w_v and w_b
            self.center_weight = nn.Parameter(torch.zeros(channels, 1, dtype=dtype))
            self.scale_weight = nn.Parameter(torch.zeros(channels, 1, dtype=dtype))
            self.scale_bias = nn.Parameter(torch.ones(channels, 1, dtype=dtype))
        self.register_buffer("running_mean", torch.zeros(channels, 1, dtype=dtype))
        self.register_buffer("running_var", torch.ones(channels, 1, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Y of X."""
        if self.calibrated:
            raise NotImplementedError("the calibrations are still to be written")  # TO DO
        X = x[..., None].flatten(2).to(self.weight.dtype)  # (N, C, positions)
        values = X.shape[0] * X.shape[2]
        if self.training and values <= 1:
            raise ValueError(
                f"expected more than one value per channel, got an input of shape {tuple(x.shape)}"
            )
        # TO DO: the centering calibration X_cm = X + w_m K_m, K_m the plane means of X.
        mean = X.mean((0, 2))[:, None] if self.training else self.running_mean
        X_m = X - mean
        var = (X_m**2).mean((0, 2))[:, None] if self.training else self.running_var
        X_s = X_m / torch.sqrt(var + self.eps)
        # TO DO: the scaling calibration X_cs = X_s sigmoid(w_v K_s + w_b), K_s the plane means of X_s.
        Y = X_s * self.weight + self.bias
        if self.training:
            with torch.no_grad():
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(var * values / (values - 1), self.momentum)
        return Y.to(x.dtype).reshape(x.shape)


def make(config: Config, dtype: torch.dtype) -> nn.Module:
    """The layer for a case's options."""
    assert config.momentum is not None  # None is for layers that count batches
    return MyLayer(config.num_features, config.eps, config.momentum, config.centering is not None, dtype)


subject = TorchModule(
    "my layer",
    make,
    {  # the canonical names of what it stores, and its own
        "gamma": "weight",
        "beta": "bias",
        "center_weight": "center_weight",
        "scale_weight": "scale_weight",
        "scale_bias": "scale_bias",
        "running_mean": "running_mean",
        "running_var": "running_var",
    },
    momentum="new",  # the momentum above weighs the batch's value; "old" is the running one, as in Flax
    layers=("bn", "rbn"),  # what it is held to; there are "iebn" and "bnet", too
    fixed={  # what it has no option for, and always does
        "centering": "channel_mean",
        "scaling": "channel_mean",
        "restrict": "sigmoid",
        "running_var": "unbiased",
        "gamma": True,
        "beta": True,
        "track_running_stats": True,
    },
    absent={"rbn/*": "TO DO: the calibrations of RBN"},
)
