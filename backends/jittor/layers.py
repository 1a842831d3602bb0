"""RBN, IEBN and BNET as Jittor modules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jittor as jt
from jittor import Module, Var, init, nn

from rbn.backends.jittor import distributed, functional, fused, internals
from rbn_core.config import (
    CALIBRATION_STARTS,
    IEBN_STARTS,
    Config,
    check_input,
    config_of,
    old_value_weight,
    refuse_unknown_options,
)
from rbn_core.errors import RBNTypeError
from rbn_core.matching import COUNTER
from rbn_core.names import NAMES
from rbn_core.options import OPTIONS, Statistic

PLACES = tuple((canonical, *own.rpartition(".")[::2]) for canonical, own in NAMES["jittor"].items())
"""The canonical name of everything that a layer stores, the part of it that has it, and its name there."""


@dataclass(frozen=True)
class Setting:
    """What a constructor takes beside the options of `rbn_core.Config`, as `RBN` describes it."""

    momentum: float | None
    is_train: bool
    sync: bool
    fused: bool


class CalibratedNorm(nn.BatchNorm):
    """What the three layers share: BatchNorm's parameters and statistics, and the forward pass.

    A `jittor.nn.BatchNorm`, so that what freezes or starts the BatchNorms of a model does so with these
    layers. What builds a BatchNorm anew, or folds one, reads its `eps`, and would leave the calibration out:
    here that is an error, and the value is `epsilon`.

    Attributes:
        epsilon: The number that is added to a variance under its root.
        starts: Where the parameters beyond BatchNorm's start.
        spatial_dims: How many spatial axes an input must have; any number where `None`.
        kernel_size: The extent of the convolution that follows, if one does.
    """

    starts: ClassVar[Mapping[str, float]] = {}
    spatial_dims: int | None = None
    kernel_size: int | None = None

    def __init__(self, config: Config, setting: Setting) -> None:
        Module.__init__(self)
        shape = (config.num_features,)
        self.layer = config.layer
        self.num_features = config.num_features
        self.epsilon = config.eps
        self.momentum = setting.momentum
        self.affine = config.gamma
        self.is_train = setting.is_train
        self.sync = setting.sync
        self.fused = setting.fused
        self.centering = config.centering
        self.scaling = config.scaling
        self.restrict = config.restrict
        self.variance_estimator = config.running_var
        self.weight = init.constant(shape, "float32", 1.0) if config.gamma else 1.0
        self.bias = init.constant(shape, "float32", 0.0) if config.beta else 0.0
        for name, start in self.starts.items():
            parameter = init.constant(shape, "float32", start) if name in config.parameters else None
            setattr(self, name, parameter)
        self.running_mean = init.constant(shape, "float32", 0.0).stop_grad()
        self.running_var = init.constant(shape, "float32", 1.0).stop_grad()
        self.num_batches_tracked = init.constant((1,), "int32", 0).stop_grad()

    @property
    def eps(self) -> float:
        """The epsilon of a plain BatchNorm, to set; the layer's own is read as `epsilon`.

        Raises:
            RBNTypeError: It is read, which is what a tool does that builds or folds a BatchNorm.
        """
        raise RBNTypeError(
            f"{self.layer}: expected a plain BatchNorm where a tool reads eps, got {self.layer}. A tool that "
            "rebuilds or folds a BatchNorm would drop the calibration. Use freeze, fold or convert of "
            "rbn.backends.jittor; the value itself is layer.epsilon."
        )

    @eps.setter
    def eps(self, value: float) -> None:
        self.epsilon = value

    def execute(self, x: Var) -> Var:
        """Y, of the shape and dtype of `x`, (N, C, *spatial)."""
        parameters = fused.check_layer(self.config(), self._stored(), self.is_train)
        share = distributed.Share(x) if self.is_train and self.sync and jt.in_mpi else None
        check_input(
            x.shape,
            str(x.dtype),
            self.num_features,
            training=self.is_train,
            values=None if share is None else share.values,
            spatial_dims=self.spatial_dims,
            layer=self.layer,
        )
        running = None if self.is_train else (self.running_mean, self.running_var)
        options: dict[str, Any] = {
            "eps": self.epsilon,
            "centering": self.centering,
            "scaling": self.scaling,
            "restrict": self.restrict,
        }
        with internals.full_precision():
            if self.fused and share is None and fused.takes(x, self.centering, self.scaling, self.restrict):
                y, mean, var = fused.rbn(x, parameters, running, **options)
            else:
                average = functional.batch_average if share is None else share.average
                y, mean, var = functional.rbn(x, parameters, running, **options, average=average)
            y = self.transform(y).cast(x.dtype)
        if self.is_train:
            values = x.numel() // self.num_features if share is None else share.values
            functional.accumulate(
                (self.running_mean, self.running_var),
                mean,
                var,
                self.momentum,
                count=self._count(),
                values=values if self.variance_estimator == "unbiased" else None,
            )
        return y

    def transform(self, y: Var) -> Var:
        """What follows on (N, C) coefficients; nothing but in BNET."""
        return y

    def config(self) -> Config:
        """The options as they are now, each of which can have changed since construction."""
        return config_of("jittor", self, beta=self.affine)

    def extra_repr(self) -> str:
        """The options, as `print(model)` shows them."""
        chosen = [name for name in ("centering", "scaling", "restrict") if self.layer in OPTIONS[name].layers]
        return ", ".join(
            (
                f"{self.num_features}, eps={self.epsilon}, momentum={self.momentum}, affine={self.affine}",
                f"is_train={self.is_train}, running_var={self.variance_estimator!r}, sync={self.sync}",
                *(f"{name}={getattr(self, name)!r}" for name in chosen),
            )
        )

    def _stored(self) -> dict[str, Any]:
        """What there is, under canonical names."""
        return {
            canonical: getattr(getattr(self, part, None) if part else self, name, None)
            for canonical, part, name in PLACES
        }

    def _count(self) -> Var | None:
        """Count a batch, where batches are counted."""
        counter: Any = getattr(self, COUNTER, None)
        if counter is not None:
            counter.update(counter + 1)
            # Nothing else may ever ask for it: left lazy, its graph would grow by an addition a step.
            counter.sync(False, False)
        return counter


@refuse_unknown_options
class RBN(CalibratedNorm):
    r"""Representative Batch Normalization (Gao et al., CVPR 2021, eq. 12) in place of `jittor.nn.BatchNorm`.

        X_cm = X + w_m K_m
        X_s  = (X_cm - E(X_cm)) / sqrt(Var(X_cm) + eps)
        Y    = X_s R(w_v K_s + w_b) gamma + beta

    Inputs are (N, C, *spatial) with any number of spatial axes, in float64, float32, bfloat16 or float16;
    statistics are taken in at least float32 and the output has the input's dtype.
    In training E and Var are the batch's, in evaluation the running ones; K_m and K_s are always the input's.

    State: `weight` (gamma), `bias` (beta), `running_mean` and `running_var` as in BatchNorm, and
    `center_weight` (w_m, from 0), `scale_weight` (w_v, from 0) and `scale_bias` (w_b, from 1), each of shape
    (C,), and `num_batches_tracked`. As in BatchNorm, `parameters()` lists the statistics, without gradients.

    Args:
        num_features: C, the number of channels.
        eps: epsilon, added to a variance under its root.
        momentum: the weight of the *new* value in the running statistics; `None` averages all batches.
        affine: whether gamma and beta are learned.
        is_train: the mode at construction, which `train()` and `eval()` change.
        sync: whether, under MPI, E and Var are those of the batches of all processes together.
        centering: K_m, "channel_mean", "channel_std", "spatial_mean", "spatial_std" or `None`.
        scaling: K_s, the same choice, of X_s.
        restrict: R, "sigmoid" or "hard_sigmoid".
        running_var: the batch variance that is accumulated, "unbiased" or "biased".
        fused: whether compiled loops compute the layer where they can, on the CPU; `False` always takes
            Jittor's own operations. Synchronised and spatial statistics take them, too.

    Raises:
        RBNError: An option or an input is refused; no statistic has changed then.

    Example:
        >>> import jittor as jt
        >>> from rbn.backends.jittor import RBN
        >>> layer = RBN(3, scaling="channel_std")
        >>> layer(jt.randn((4, 3, 5, 5))).shape
        [4,3,5,5,]
        >>> layer.center_weight.tolist(), layer.scale_bias.tolist()
        ([0.0, 0.0, 0.0], [1.0, 1.0, 1.0])
    """

    starts = CALIBRATION_STARTS

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        is_train: bool = True,
        sync: bool = True,
        *,
        centering: Statistic | None = "channel_mean",
        scaling: Statistic | None = "channel_mean",
        restrict: str = "sigmoid",
        running_var: str = "unbiased",
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
            beta=affine,
        )
        super().__init__(config, Setting(momentum, is_train, sync, fused))


@refuse_unknown_options
class IEBN(CalibratedNorm):
    r"""Instance Enhancement Batch Normalization (Liang et al., AAAI 2020) in place of `jittor.nn.BatchNorm`.

        X_s = (X - E(X)) / sqrt(Var(X) + eps)
        Y   = X_s sigmoid(w_v mean_c(X) + w_b) gamma + beta        mean_c over the positions of one channel

    Inputs, statistics, modes, options and errors are those of `RBN`, without `centering`, `scaling` and
    `restrict`. State: BatchNorm's, `scale_weight` (w_v, from 0) and `scale_bias` (w_b, from -1), each of
    shape (C,), and `num_batches_tracked`.

    Example:
        >>> import jittor as jt
        >>> from rbn.backends.jittor import IEBN
        >>> IEBN(3)(jt.randn((4, 3, 5, 5))).shape
        [4,3,5,5,]
    """

    starts = IEBN_STARTS

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        is_train: bool = True,
        sync: bool = True,
        *,
        running_var: str = "unbiased",
        fused: bool = True,
    ) -> None:
        config = Config.iebn(
            num_features,
            eps=eps,
            momentum=old_value_weight(momentum, "IEBN"),
            running_var=running_var,
            gamma=affine,
            beta=affine,
        )
        super().__init__(config, Setting(momentum, is_train, sync, fused))


@refuse_unknown_options
class BNET(CalibratedNorm):
    r"""BatchNorm with an enhanced linear transformation (Xu et al., 2020): its affine step is a convolution.

        X_s = (X - E(X)) / sqrt(Var(X) + eps)
        Y   = depthwise convolution of X_s, zero padded, plus a bias

    Inputs, statistics, modes, options and errors are those of `RBN`, with the kernel's number of spatial axes
    and without `affine`, `centering`, `scaling` and `restrict`. State: BatchNorm's running statistics,
    `num_batches_tracked`, and `conv`, a depthwise `jittor.nn.Conv*d` that starts as Jittor starts it and
    holds the parameters; the layer itself convolves with them, in `functional.depthwise_convolution`.
    `convert(model, "bnet", preserve=True)` makes BNETs that equal a model's BatchNorms.

    Args:
        kernel_size: the extent of the kernel along every axis; odd.
        spatial_dims: the number of spatial axes, 1, 2 or 3.

    Example:
        >>> import jittor as jt
        >>> from rbn.backends.jittor import BNET
        >>> BNET(3, kernel_size=5)(jt.randn((4, 3, 5, 5))).shape
        [4,3,5,5,]
    """

    def __init__(
        self,
        num_features: int,
        kernel_size: int = 3,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        is_train: bool = True,
        sync: bool = True,
        *,
        spatial_dims: int = 2,
        running_var: str = "unbiased",
        fused: bool = True,
    ) -> None:
        config = Config.bnet(
            num_features,
            kernel_size,
            spatial_dims,
            eps=eps,
            momentum=old_value_weight(momentum, "BNET"),
            running_var=running_var,
        )
        super().__init__(config, Setting(momentum, is_train, sync, fused))
        self.kernel_size = kernel_size
        self.spatial_dims = spatial_dims
        self.conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[spatial_dims - 1](
            num_features, num_features, kernel_size, padding=kernel_size // 2, groups=num_features
        )

    def execute(self, x: Var) -> Var:
        """Y; half precision is rounded once, after the convolution."""
        return super().execute(functional.at_least_float32(x)).cast(x.dtype)

    def transform(self, y: Var) -> Var:
        """The convolution in the place of BatchNorm's affine step."""
        return functional.depthwise_convolution(y, self.conv.weight, self.conv.bias)
