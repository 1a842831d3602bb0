"""RBN as a Jittor module."""

from __future__ import annotations

import jittor as jt
from jittor import Module, Var, init

from rbn.backends.jittor import functional
from rbn_core.config import (
    CALIBRATION_STARTS,
    Config,
    Statistic,
    check_input,
    old_value_weight,
    refuse_unknown_options,
)
from rbn_core.names import NAMES, PARAMETERS


@refuse_unknown_options
class RBN(Module):
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
        centering: K_m, "channel_mean", "channel_std", "spatial_mean", "spatial_std" or `None`.
        scaling: K_s, the same choice, of X_s.
        restrict: R, "sigmoid" or "hard_sigmoid".
        running_var: the batch variance that is accumulated, "unbiased" or "biased".

    BatchNorm's `sync` is not here: under MPI every process takes the statistics of its own batch.

    Raises:
        RBNError: An option or an input is refused; no statistic has changed then.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        is_train: bool = True,
        *,
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
            beta=affine,
        )
        super().__init__()
        self.num_features = num_features
        self.eps = eps
        self.momentum = momentum
        self.affine = affine
        self.is_train = is_train
        self.centering = centering
        self.scaling = scaling
        self.restrict = restrict
        self.variance_estimator = running_var
        self.weight = init.constant((num_features,), "float32", 1.0) if affine else 1.0
        self.bias = init.constant((num_features,), "float32", 0.0) if affine else 0.0
        for name, start in CALIBRATION_STARTS.items():
            parameter = None
            if name in config.parameters:
                parameter = init.constant((num_features,), "float32", start)
            setattr(self, name, parameter)
        self.running_mean = init.constant((num_features,), "float32", 0.0).stop_grad()
        self.running_var = init.constant((num_features,), "float32", 1.0).stop_grad()
        self.num_batches_tracked = init.constant((1,), "int32", 0).stop_grad()

    def execute(self, x: Var) -> Var:
        """Y of eq. 12, of the shape and dtype of `x`, (N, C, *spatial)."""
        check_input(x.shape, str(x.dtype), self.num_features, training=self.is_train)
        stored = {canonical: getattr(self, NAMES["jittor"][canonical], None) for canonical in PARAMETERS}
        # Under automatic mixed precision every operation would be in half precision; bit 0 prefers float32.
        with jt.flag_scope(amp_reg=int(jt.flags.amp_reg != 0)):
            y, mean, var = functional.rbn(
                x,
                {canonical: value for canonical, value in stored.items() if isinstance(value, Var)},
                None if self.is_train else (self.running_mean, self.running_var),
                eps=self.eps,
                centering=self.centering,
                scaling=self.scaling,
                restrict=self.restrict,
            )
            if self.is_train:
                self._track(mean, var, values=x.numel() // self.num_features)
        return y

    def _track(self, mean: Var, var: Var, values: int) -> None:
        self.num_batches_tracked.update(self.num_batches_tracked + 1)
        # Nothing else may ever ask for the counter: left lazy, its graph would grow by an addition a step.
        self.num_batches_tracked.sync(False, False)
        new_weight = self.momentum
        if new_weight is None:
            new_weight = functional.constant(1) / self.num_batches_tracked.float64()
        if self.variance_estimator == "unbiased":
            var = var * functional.constant(values / (values - 1))
        functional.accumulate((self.running_mean, self.running_var), mean, var, new_weight)

    def extra_repr(self) -> str:
        """The options, as `print(model)` shows them."""
        return (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}, "
            f"is_train={self.is_train}, centering={self.centering!r}, scaling={self.scaling!r}, "
            f"restrict={self.restrict!r}, running_var={self.variance_estimator!r}"
        )
