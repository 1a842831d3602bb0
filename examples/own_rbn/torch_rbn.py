"""An RBN of one's own in PyTorch's operations, held to the suite.

In this folder:

    rbn conform --subject torch_rbn:subject
"""

import torch
from torch import Tensor, nn

from rbn.conformance.subjects.torch import TorchModule
from rbn_core.config import Config


class OwnRBN(nn.Module):
    """RBN with channel means; the gradients are autograd's."""

    def __init__(
        self, channels: int, eps: float = 1e-5, momentum: float = 0.1, dtype: torch.dtype | None = None
    ):
        super().__init__()
        self.eps, self.momentum = eps, momentum
        starts = {"weight": 1.0, "bias": 0.0, "center_weight": 0.0, "scale_weight": 0.0, "scale_bias": 1.0}
        for name, start in starts.items():
            self.register_parameter(name, nn.Parameter(torch.full((channels, 1), start, dtype=dtype)))
        self.register_buffer("running_mean", torch.zeros(channels, 1, dtype=dtype))
        self.register_buffer("running_var", torch.ones(channels, 1, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Y of X, (N, C, *spatial)."""
        X = x[..., None].flatten(2).to(self.weight.dtype)  # (N, C, positions)
        values = X.shape[0] * X.shape[2]
        if self.training and values <= 1:
            raise ValueError(
                f"expected more than one value per channel, got an input of shape {tuple(x.shape)}"
            )
        # X_cm = X + w_m K_m, less its mean: the batch's is (1 + w_m) E(X), and is taken off first.
        E = X.mean((0, 2))[:, None] if self.training else torch.zeros_like(self.running_mean)
        K_m = (X - E).mean(2, keepdim=True)
        X_m = X - E + self.center_weight * K_m - (0.0 if self.training else self.running_mean)
        Var = (X_m**2).mean((0, 2))[:, None] if self.training else self.running_var
        X_s = X_m / torch.sqrt(Var + self.eps)
        R = torch.sigmoid(self.scale_weight * X_s.mean(2, keepdim=True) + self.scale_bias)
        Y = X_s * R * self.weight + self.bias
        if self.training:
            with torch.no_grad():
                self.running_mean.lerp_((1 + self.center_weight) * E, self.momentum)
                self.running_var.lerp_(Var * values / (values - 1), self.momentum)
        return Y.to(x.dtype).reshape(x.shape)


def make(config: Config, dtype: torch.dtype) -> nn.Module:
    """The layer for a case's options."""
    return OwnRBN(config.num_features, config.eps, config.momentum, dtype)


subject = TorchModule(
    "RBN in PyTorch",
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
    momentum="new",  # its momentum weighs the batch's value
    layers=("rbn",),
    fixed={  # what it has no option for, and always does
        "centering": "channel_mean",
        "scaling": "channel_mean",
        "restrict": "sigmoid",
        "running_var": "unbiased",
        "gamma": True,
        "beta": True,
        "track_running_stats": True,
    },
)
