"""RBN as a MindSpore cell."""

from __future__ import annotations

from typing import Any, TypeAlias

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import Initializer, initializer

from rbn.backends.mindspore import functional
from rbn_core.config import (
    CALIBRATION_STARTS,
    Config,
    Statistic,
    check_choice,
    check_input,
    refuse_unknown_options,
)

Start: TypeAlias = Initializer | str | float | Tensor
"""What MindSpore's BatchNorm takes as a parameter's start."""


@refuse_unknown_options
class RBN(nn.Cell):
    r"""Representative Batch Normalization (Gao et al., CVPR 2021, eq. 12) in place of `nn.BatchNorm*d`.

        X_cm = X + w_m K_m
        X_s  = (X_cm - E(X_cm)) / sqrt(Var(X_cm) + eps)
        Y    = X_s R(w_v K_s + w_b) gamma + beta

    Inputs are (N, C, *spatial), or with `data_format="NHWC"` (N, *spatial, C), with any number of spatial
    axes, in float64, float32, bfloat16 or float16; statistics are taken in at least float32 and the output
    has the input's dtype. In training E and Var are the batch's, in evaluation the running ones; K_m and K_s
    are always the input's. Like every cell the layer starts in evaluation; `set_train()` switches.

    State: `gamma`, `beta`, `moving_mean` and `moving_variance` as in BatchNorm, and `center_weight` (w_m,
    from 0), `scale_weight` (w_v, from 0) and `scale_bias` (w_b, from 1), each of shape (C,), and the int32
    scalar `num_batches_tracked`. Statistics are kept in at least float32.

    Args:
        num_features: C, the number of channels.
        eps: epsilon, added to a variance under its root.
        momentum: the weight of the *old* value in the running statistics; `None` averages all batches.
        affine: whether gamma and beta are learned; they are there and applied either way.
        gamma_init: where gamma starts.
        beta_init: where beta starts.
        moving_mean_init: where the running mean starts.
        moving_var_init: where the running variance starts.
        use_batch_statistics: `True` takes and accumulates the batch's statistics in evaluation too, `False`
            the running ones in training too; `None` follows `set_train`.
        data_format: where the channels are, "NCHW" for axis 1 or "NHWC" for the last.
        dtype: the dtype of the parameters.
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
        momentum: float | None = 0.9,
        affine: bool = True,
        gamma_init: Start = "ones",
        beta_init: Start = "zeros",
        moving_mean_init: Start = "zeros",
        moving_var_init: Start = "ones",
        use_batch_statistics: bool | None = None,
        data_format: str = "NCHW",
        dtype: Any = ms.float32,
        *,
        centering: Statistic | None = "channel_mean",
        scaling: Statistic | None = "channel_mean",
        restrict: str = "sigmoid",
        running_var: str = "unbiased",
    ) -> None:
        config = Config(num_features, eps, momentum, centering, scaling, restrict, running_var)
        check_choice("use_batch_statistics", use_batch_statistics, (None, True, False))
        check_choice("data_format", data_format, ("NCHW", "NHWC"))
        super().__init__()
        self.num_features = num_features
        self.eps = eps
        self.momentum = momentum
        self.use_batch_statistics = use_batch_statistics
        self.data_format = data_format
        self.centering = centering
        self.scaling = scaling
        self.restrict = restrict
        self.running_var = running_var
        # BatchNorm's names: in a network MindSpore renames the parameters after their attributes.
        kept = functional.at_least_float32(dtype)
        self.moving_mean = Parameter(
            initializer(moving_mean_init, num_features, kept), name="mean", requires_grad=False
        )
        self.moving_variance = Parameter(
            initializer(moving_var_init, num_features, kept), name="variance", requires_grad=False
        )
        self.num_batches_tracked = Parameter(
            Tensor(0, ms.int32), name="num_batches_tracked", requires_grad=False
        )
        self.gamma = Parameter(
            initializer(gamma_init, num_features, dtype), name="gamma", requires_grad=affine
        )
        self.beta = Parameter(initializer(beta_init, num_features, dtype), name="beta", requires_grad=affine)
        for name, start in CALIBRATION_STARTS.items():
            if name in config.parameters:
                setattr(self, name, Parameter(initializer(start, num_features, dtype), name=name))

    def construct(self, x: Tensor) -> Tensor:
        """Y of eq. 12, of the shape and dtype of `x`."""
        batch_statistics = self.training if self.use_batch_statistics is None else self.use_batch_statistics
        channels_last = self.data_format == "NHWC"
        _check_input(x.shape, x.dtype, self.num_features, batch_statistics, -1 if channels_last else 1)
        parameters = {"gamma": self.gamma, "beta": self.beta}
        if self.centering is not None:
            parameters["center_weight"] = self.center_weight
        if self.scaling is not None:
            parameters["scale_weight"] = self.scale_weight
            parameters["scale_bias"] = self.scale_bias
        y, mean, var = functional.rbn(
            ops.movedim(x, -1, 1) if channels_last else x,
            parameters,
            None if batch_statistics else (self.moving_mean, self.moving_variance),
            eps=self.eps,
            centering=self.centering,
            scaling=self.scaling,
            restrict=self.restrict,
        )
        if batch_statistics:
            self._track(mean, var, x.size // self.num_features)
        return ops.movedim(y, 1, -1) if channels_last else y

    def _track(self, mean: Tensor, var: Tensor, values: int) -> None:
        count = self.num_batches_tracked + 1
        ops.assign(self.num_batches_tracked, count)
        if self.momentum is None:
            new_weight = 1 / count.astype(self.moving_mean.dtype)
        else:
            new_weight = 1 - functional.scalar(self.momentum, self.moving_mean)
        if self.running_var == "unbiased":
            var = var * (functional.scalar(values, var) / (values - 1))
        functional.accumulate((self.moving_mean, self.moving_variance), mean, var, new_weight)

    def add_flags(self, **flags: Any) -> nn.Cell:
        """Stay in float32 where `to_float` or mixed precision casts the network, as BatchNorm does at O2.

        In half precision MindSpore would accumulate rounded statistics, and in a graph none at all.
        """
        if flags.get("fp16") or flags.get("bf16"):
            flags |= {"fp16": False, "bf16": False, "fp32": True}
        return super().add_flags(**flags)

    def extend_repr(self) -> str:
        """The options, as `print(network)` shows them."""
        return (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, "
            f"affine={self.gamma.requires_grad}, use_batch_statistics={self.use_batch_statistics}, "
            f"data_format={self.data_format!r}, centering={self.centering!r}, scaling={self.scaling!r}, "
            f"restrict={self.restrict!r}, running_var={self.running_var!r}"
        )


@ops.constexpr
def _check_input(shape: tuple[int, ...], dtype: Any, num_features: int, training: bool, axis: int) -> None:
    """Run `check_input` while a graph is compiled, when shapes are known; in PyNative on every call."""
    check_input(shape, str(dtype).lower(), num_features, training=training, axis=axis)
