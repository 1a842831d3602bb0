"""RBN, IEBN and BNET as PyTorch modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import init
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import Parameter

from rbn.backends.torch import distributed, functional, fused
from rbn_core.config import (
    CALIBRATION_STARTS,
    IEBN_STARTS,
    Config,
    Statistic,
    check_input,
    old_value_weight,
    refuse_unknown_options,
)
from rbn_core.names import NAMES, STATISTICS

Device: TypeAlias = torch.device | str | int | None


class CalibratedNorm(_NormBase):
    """What the three layers share: BatchNorm's parameters and statistics, and the forward pass.

    `_NormBase` and not `_BatchNorm`, which `SyncBatchNorm.convert_sync_batchnorm` would replace by a plain
    `SyncBatchNorm`, calibration and all.

    Attributes:
        starts: Where the parameters beyond BatchNorm's start.
        stored: What the (C,) parameters are called here, by their canonical names.
        spatial_dims: How many spatial axes an input must have; any number where `None`.
    """

    starts: ClassVar[Mapping[str, float]] = {}
    stored: ClassVar[Mapping[str, str]]
    spatial_dims: int | None = None

    def __init_subclass__(cls, **options: object) -> None:
        super().__init_subclass__(**options)
        own = ("weight", "bias", *cls.starts)
        cls.stored = {canonical: name for canonical, name in NAMES["torch"].items() if name in own}

    def __init__(
        self,
        config: Config,
        momentum: float | None,
        device: Device,
        dtype: torch.dtype | None,
        sync: bool,
        process_group: ProcessGroup | None,
        fused: bool,
    ) -> None:
        super().__init__(
            config.num_features,
            config.eps,
            momentum,
            config.gamma,
            config.track_running_stats,
            device,
            dtype,
        )
        if not config.beta:  # PyTorch's own option is younger than what this package runs on
            self.register_parameter("bias", None)
        self._apply(lambda tensor: tensor)
        self.layer = config.layer
        self.centering = config.centering
        self.scaling = config.scaling
        self.restrict = config.restrict
        self.variance_estimator = config.running_var
        self.sync = sync
        self.process_group = process_group
        self.fused = fused
        for name in self.starts:
            parameter = None
            if name in config.parameters:
                parameter = Parameter(torch.empty(config.num_features, device=device, dtype=dtype))
            self.register_parameter(name, parameter)
        self.reset_parameters()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CalibratedNorm:
        """Move or cast the layer, but never its statistics to half precision, which would wear them down."""
        before = {name: self._buffers[name] for name in ("running_mean", "running_var")}
        super()._apply(fn, recurse)
        for name, exact in before.items():
            after = self._buffers[name]
            if after is not None and after.dtype in (torch.float16, torch.bfloat16):
                source = after if exact.is_meta else exact
                self._buffers[name] = source.to(after.device, torch.promote_types(exact.dtype, torch.float32))
        return self

    def reset_parameters(self) -> None:
        """Start as plain BatchNorm, but for the constant that the calibration or attention starts with."""
        self.reset_running_stats()
        for name, start in {"weight": 1.0, "bias": 0.0, **self.starts}.items():
            parameter = self._parameters.get(name)
            if parameter is not None:
                init.constant_(parameter, start)

    def forward(self, input: Tensor) -> Tensor:
        """Y, of the shape, dtype and memory format of `input`, (N, C, *spatial)."""
        running_mean, running_var = self.running_mean, self.running_var
        running = None if running_mean is None else (running_mean, running_var)
        batch_statistics = self.training or running is None
        share = distributed.Share(input, self.process_group) if batch_statistics and self.sync else None
        values = input.numel() // self.num_features if share is None else share.values
        self._check(input, training=batch_statistics, values=values)
        parameters = {
            canonical: value
            for canonical, name in self.stored.items()
            if (value := getattr(self, name)) is not None  # in `_parameters` there are no parametrized ones
        }
        compute: Callable[..., tuple[Tensor, Tensor, Tensor]]
        accumulate = functional.accumulate
        if share is not None:
            compute = partial(functional.rbn, average=share.average)
        elif self.fused and fused.takes(input, self.centering, self.scaling):
            compute, accumulate = fused.rbn, fused.accumulate
        else:
            compute = functional.rbn
        y, mean, var = compute(
            input,
            parameters,
            None if batch_statistics else running,
            eps=self.eps,
            centering=self.centering,
            scaling=self.scaling,
            restrict=self.restrict,
        )
        if self.training and self.track_running_stats and running is not None:
            self._track(mean, var, values, accumulate)
        y = self.transform(y)
        return y if y.dtype is input.dtype else y.to(input.dtype)

    def transform(self, y: Tensor) -> Tensor:
        """What follows on (N, C) coefficients; nothing but in BNET."""
        return y

    def _check(self, input: Tensor, *, training: bool, values: int | None) -> None:
        check_input(
            input.shape,
            str(input.dtype).removeprefix("torch."),
            self.num_features,
            training=training,
            values=values,
            spatial_dims=self.spatial_dims,
            layer=self.layer,
        )

    def extra_repr(self) -> str:
        """The options, as `print(model)` shows them."""
        return f"{super().extra_repr()}, running_var={self.variance_estimator!r}, sync={self.sync}"

    def _track(self, mean: Tensor, var: Tensor, values: int, accumulate: Callable[..., None]) -> None:
        self.num_batches_tracked.add_(1)
        if self.momentum is None:  # in the statistics' dtype: 1 / an integer tensor is float32
            new_weight = self.num_batches_tracked.to(self.running_mean.dtype).reciprocal()
        else:
            new_weight = self.momentum
        correction = values / (values - 1) if self.variance_estimator == "unbiased" else 1.0
        accumulate((self.running_mean, self.running_var), mean, var, new_weight, correction)


@refuse_unknown_options
class RBN(CalibratedNorm):
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
        sync: whether E and Var are those of the batches of all processes together.
        process_group: these processes; all by default.
        fused: whether one operator computes the layer where there is one for the device; `False` always takes
            PyTorch's own operations. Synchronised and spatial statistics take them, too.

    Raises:
        RBNError: An option or an input is refused; no statistic has changed then.
    """

    starts = CALIBRATION_STARTS

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        centering: Statistic | None = "channel_mean",
        scaling: Statistic | None = "channel_mean",
        restrict: str = "sigmoid",
        running_var: str = "unbiased",
        sync: bool = False,
        process_group: ProcessGroup | None = None,
        fused: bool = True,
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
        super().__init__(config, momentum, device, dtype, sync, process_group, fused)

    def extra_repr(self) -> str:
        """The options, as `print(model)` shows them."""
        return (
            f"{super().extra_repr()}, centering={self.centering!r}, scaling={self.scaling!r}, "
            f"restrict={self.restrict!r}"
        )


@refuse_unknown_options
class IEBN(CalibratedNorm):
    r"""Instance Enhancement Batch Normalization (Liang et al., AAAI 2020) in place of `torch.nn.BatchNorm*d`.

        X_s = (X - E(X)) / sqrt(Var(X) + eps)
        Y   = X_s sigmoid(w_v mean_c(X) + w_b) gamma + beta        mean_c over the positions of one channel

    Inputs, statistics and modes as in `RBN`. State: BatchNorm's, and `scale_weight` (w_v, from 0) and
    `scale_bias` (w_b, from -1), each of shape (C,).

    Args:
        num_features: C, the number of channels.
        eps: epsilon, added to the variance under its root.
        momentum: the weight of the *new* value in the running statistics; `None` averages all batches.
        affine: whether gamma and beta are learned.
        track_running_stats: whether running statistics are kept; without them evaluation uses the batch's.
        device: where the parameters and statistics live.
        dtype: their dtype.
        bias: whether an affine layer has a beta.
        running_var: the batch variance that is accumulated, "unbiased" or "biased".
        sync: whether E and Var are those of the batches of all processes together.
        process_group: these processes; all by default.
        fused: whether one operator computes the layer where there is one for the device; `False` always takes
            PyTorch's own operations. Synchronised and spatial statistics take them, too.

    Raises:
        RBNError: An option or an input is refused; no statistic has changed then.
    """

    starts = IEBN_STARTS

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        running_var: str = "unbiased",
        sync: bool = False,
        process_group: ProcessGroup | None = None,
        fused: bool = True,
    ) -> None:
        config = Config.iebn(
            num_features,
            eps=eps,
            momentum=old_value_weight(momentum, "IEBN"),
            running_var=running_var,
            gamma=affine,
            beta=affine and bias,
            track_running_stats=track_running_stats,
        )
        super().__init__(config, momentum, device, dtype, sync, process_group, fused)


@refuse_unknown_options
class BNET(CalibratedNorm):
    r"""BatchNorm with an enhanced linear transformation (Xu et al., 2020): its affine step is a convolution.

        X_s = (X - E(X)) / sqrt(Var(X) + eps)
        Y   = depthwise convolution of X_s, zero padded, plus a bias

    Inputs, statistics and modes as in `RBN`, with the kernel's number of spatial axes. State: BatchNorm's
    running statistics, and `conv`, a depthwise `torch.nn.Conv*d` that starts as PyTorch starts it.

    Args:
        num_features: C, the number of channels.
        kernel_size: the extent of the kernel along every axis; odd.
        eps: epsilon, added to the variance under its root.
        momentum: the weight of the *new* value in the running statistics; `None` averages all batches.
        track_running_stats: whether running statistics are kept; without them evaluation uses the batch's.
        device: where the parameters and statistics live.
        dtype: their dtype.
        spatial_dims: the number of spatial axes, 1, 2 or 3.
        running_var: the batch variance that is accumulated, "unbiased" or "biased".
        sync: whether E and Var are those of the batches of all processes together.
        process_group: these processes; all by default.
        fused: whether one operator computes the layer where there is one for the device; `False` always takes
            PyTorch's own operations. Synchronised and spatial statistics take them, too.

    Raises:
        RBNError: An option or an input is refused; no statistic has changed then.
    """

    def __init__(
        self,
        num_features: int,
        kernel_size: int = 3,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        track_running_stats: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        spatial_dims: int = 2,
        running_var: str = "unbiased",
        sync: bool = False,
        process_group: ProcessGroup | None = None,
        fused: bool = True,
    ) -> None:
        config = Config.bnet(
            num_features,
            kernel_size,
            spatial_dims,
            eps=eps,
            momentum=old_value_weight(momentum, "BNET"),
            running_var=running_var,
            track_running_stats=track_running_stats,
        )
        super().__init__(config, momentum, device, dtype, sync, process_group, fused)
        self.spatial_dims = spatial_dims
        self.conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[spatial_dims - 1](
            num_features,
            num_features,
            kernel_size,
            padding=kernel_size // 2,
            groups=num_features,
            device=device,
            dtype=dtype,
        )

    @classmethod
    def from_batch_norm(cls, norm: _NormBase, kernel_size: int = 3, *, spatial_dims: int = 2) -> BNET:
        """A layer that equals a BatchNorm: gamma in the middle of its kernels, 0 around it, and beta."""
        layer = cls(
            norm.num_features,
            kernel_size,
            norm.eps,
            norm.momentum,
            norm.track_running_stats,
            spatial_dims=spatial_dims,
        )
        stored = norm.state_dict()
        statistics = {name: stored[name] for name in STATISTICS if name in stored}
        layer.load_state_dict(statistics, strict=False)
        centre = (slice(None), 0, *(kernel_size // 2,) * spatial_dims)
        with torch.no_grad():
            layer.conv.weight.zero_()[centre] = 1.0 if norm.weight is None else norm.weight
            layer.conv.bias.zero_()
            if norm.bias is not None:
                layer.conv.bias.copy_(norm.bias)
        like = next(filter(torch.is_floating_point, stored.values()), layer.conv.bias)
        return layer.to(like).train(norm.training)

    def forward(self, input: Tensor) -> Tensor:
        """Y, as of `RBN`; half precision is rounded once, after the convolution."""
        wide = input.float() if input.dtype in (torch.float16, torch.bfloat16) else input
        return super().forward(wide).to(input.dtype)

    def reset_parameters(self) -> None:
        """Start the statistics as BatchNorm and the convolution as PyTorch does."""
        super().reset_parameters()
        if hasattr(self, "conv"):
            self.conv.reset_parameters()

    def transform(self, y: Tensor) -> Tensor:
        """The convolution in the place of BatchNorm's affine step."""
        return self.conv(y.to(self.conv.weight.dtype))
