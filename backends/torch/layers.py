"""RBN as a PyTorch module."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import init
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import Parameter

from rbn.backends.torch import functional
from rbn_core.config import (
    CALIBRATION_STARTS,
    Config,
    Statistic,
    check_input,
    old_value_weight,
    refuse_unknown_options,
)
from rbn_core.names import NAMES


@refuse_unknown_options
class RBN(_NormBase):
    r"""Representative Batch Normalization (Gao et al., CVPR 2021, eq. 12) in place of `torch.nn.BatchNorm*d`.

        X_cm = X + w_m K_m
        X_s  = (X_cm - E(X_cm)) / sqrt(Var(X_cm) + eps)
        Y    = X_s R(w_v K_s + w_b) gamma + beta

    Inputs are (N, C, *spatial) with any number of spatial axes and any memory format, in float64, float32,
    bfloat16 or float16; statistics are taken in at least float32 and the output has the input's dtype.
    In training E and Var are the batch's, in evaluation the running ones; K_m and K_s are always the input's.

    State: `weight` (gamma), `bias` (beta), `running_mean`, `running_var` and `num_batches_tracked` as in
    BatchNorm, and `center_weight` (w_m, from 0), `scale_weight` (w_v, from 0) and `scale_bias` (w_b, from 1),
    each of shape (C,).

    Args:
        num_features: C, the number of channels.
        eps: epsilon, added to a variance under its root.
        momentum: the weight of the *new* value in the running statistics; `None` averages all batches.
        affine: whether gamma and beta are learned.
        track_running_stats: whether running statistics are kept; without them evaluation uses the batch's.
        device: where the parameters and statistics live.
        dtype: their dtype.
        bias: whether an affine layer has a beta.
        centering: K_m, "channel_mean", "channel_std", "spatial_mean", "spatial_std" or `None`.
        scaling: K_s, the same choice, of X_s.
        restrict: R, "sigmoid" or "hard_sigmoid".
        running_var: the batch variance that is accumulated, "unbiased" or "biased".

    Raises:
        RBNError: An option or an input is refused; no statistic has changed then.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        centering: Statistic | None = "channel_mean",
        scaling: Statistic | None = "channel_mean",
        restrict: str = "sigmoid",
        running_var: str = "unbiased",
    ) -> None:
        config = Config(
            num_features,
            eps,
            old_value_weight(momentum),
            centering,
            scaling,
            restrict,
            running_var,
            gamma=affine,
            beta=affine and bias,
            track_running_stats=track_running_stats,
        )
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, bias=bias)
        self.centering = centering
        self.scaling = scaling
        self.restrict = restrict
        self.variance_estimator = running_var
        for name in CALIBRATION_STARTS:
            parameter = None
            if name in config.parameters:
                parameter = Parameter(torch.empty(num_features, device=device, dtype=dtype))
            self.register_parameter(name, parameter)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start as plain BatchNorm with R(w_b) = R(1) as its only trace (Section 4.1 of the paper)."""
        super().reset_parameters()
        for name, start in CALIBRATION_STARTS.items():
            parameter = self._parameters.get(name)
            if parameter is not None:
                init.constant_(parameter, start)

    def forward(self, input: Tensor) -> Tensor:
        """Y of eq. 12, of the shape, dtype and memory format of `input`, (N, C, *spatial)."""
        running = None if self.running_mean is None else (self.running_mean, self.running_var)
        batch_statistics = self.training or running is None
        check_input(
            input.shape, str(input.dtype).removeprefix("torch."), self.num_features, training=batch_statistics
        )
        parameters = {
            canonical: self._parameters[name]
            for canonical, name in NAMES["torch"].items()
            if self._parameters.get(name) is not None
        }
        y, mean, var = functional.rbn(
            input,
            parameters,
            None if batch_statistics else running,
            eps=self.eps,
            centering=self.centering,
            scaling=self.scaling,
            restrict=self.restrict,
        )
        if self.training and self.track_running_stats and running is not None:
            self._track(mean, var, values=input.numel() // self.num_features)
        return y

    def _track(self, mean: Tensor, var: Tensor, values: int) -> None:
        self.num_batches_tracked.add_(1)
        if self.momentum is None:  # in the statistics' dtype: 1 / an integer tensor is float32
            new_weight = self.num_batches_tracked.to(self.running_mean.dtype).reciprocal()
        else:
            new_weight = self.momentum
        if self.variance_estimator == "unbiased":
            var = var * (values / (values - 1))
        functional.accumulate((self.running_mean, self.running_var), mean, var, new_weight)

    def extra_repr(self) -> str:
        """The options, as `print(model)` shows them."""
        return (
            f"{super().extra_repr()}, centering={self.centering!r}, scaling={self.scaling!r}, "
            f"restrict={self.restrict!r}, running_var={self.variance_estimator!r}"
        )
