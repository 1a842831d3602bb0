"""MindSpore: the cells in PyNative mode and under `ms.jit`."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("GLOG_v", "4")  # MindSpore's warnings would break the printed table

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops

from rbn.backends.mindspore import RBN
from rbn.benchmarks import cases
from rbn.benchmarks.cases import EVALUATION, TRAINING, Shape
from rbn.benchmarks.timing import Step
from rbn.benchmarks.worker import Worker, random


class Equations(nn.Cell):
    """Eq. 12 as it stands, on (N, C, *spatial): what it costs without the two-pass form."""

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float = 0.9) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.gamma = Parameter(ops.ones(num_features), name="gamma")
        self.beta = Parameter(ops.zeros(num_features), name="beta")
        self.w_m = Parameter(ops.zeros(num_features), name="w_m")
        self.w_v = Parameter(ops.zeros(num_features), name="w_v")
        self.w_b = Parameter(ops.ones(num_features), name="w_b")
        self.moving_mean = Parameter(ops.zeros(num_features), name="mean", requires_grad=False)
        self.moving_variance = Parameter(ops.ones(num_features), name="variance", requires_grad=False)

    def construct(self, x: Tensor) -> Tensor:
        """Y."""
        shape = (1, -1, *(1,) * (x.ndim - 2))
        x_cm = x + self.w_m.reshape(shape) * self.instance_mean(x)
        if self.training:
            everywhere = (0, *range(2, x.ndim))
            mean = ops.mean(x_cm, everywhere, True)
            var = ops.mean(ops.square(x_cm - mean), everywhere, True)
            values = x.size // x.shape[1]
            self.accumulate(self.moving_mean, mean)
            self.accumulate(self.moving_variance, var * (values / (values - 1)))
        else:
            mean, var = self.moving_mean.reshape(shape), self.moving_variance.reshape(shape)
        x_s = (x_cm - mean) / ops.sqrt(var + self.eps)
        z = self.w_v.reshape(shape) * self.instance_mean(x_s) + self.w_b.reshape(shape)
        x_cs = x_s * ops.sigmoid(z)
        return x_cs * self.gamma.reshape(shape) + self.beta.reshape(shape)

    def instance_mean(self, x: Tensor) -> Tensor:
        """mu_c, the mean of every plane."""
        return ops.mean(x, tuple(range(2, x.ndim)), True) if x.ndim > 2 else x

    def accumulate(self, running: Parameter, batch: Tensor) -> None:
        """Eq. 3."""
        batch = ops.stop_gradient(batch).reshape(-1)
        ops.assign_add(running, (1 - self.momentum) * (batch - running))


def batch_norm(shape: Shape) -> nn.Cell:
    """MindSpore's own for (N, C, *spatial)."""
    return (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[len(shape) - 2](shape[1])


LAYERS: dict[str, Callable[[Shape], nn.Cell]] = {
    cases.BATCH_NORM: batch_norm,
    cases.RBN: lambda shape: RBN(shape[1]),
    cases.PLAIN: lambda shape: RBN(shape[1], fused=False),
    cases.EQUATIONS: lambda shape: Equations(shape[1]),
}


class MindSpore(Worker):
    """MindSpore on the CPU."""

    variants = ("PyNative", "jit")
    forms = tuple(LAYERS)

    def build(self, form: str, variant: str, shape: Shape) -> dict[str, Step]:
        """A step for each phase, by a cell of its own: a graph keeps the mode it was compiled in."""
        x, dy = (Tensor(random(shape, seed)) for seed in range(2))
        trained, evaluated = (LAYERS[form](shape) for _ in range(2))
        trained.set_train(True)
        evaluated.set_train(False)
        weights = trained.trainable_params()

        def train(x: Tensor, dy: Tensor) -> tuple[Tensor, Any]:
            y, pull = ops.vjp(trained, x, weights=weights)
            return y, pull(dy)

        def evaluate(x: Tensor) -> Tensor:
            return evaluated(x)

        if variant == "jit":
            train, evaluate = ms.jit(train), ms.jit(evaluate)

        def training() -> object:
            results = train(x, dy)
            ms.runtime.synchronize()
            return results

        def evaluation() -> object:
            y = evaluate(x)
            ms.runtime.synchronize()
            return y

        return {TRAINING: training, EVALUATION: evaluation}

    def threads(self) -> int:
        """As MindSpore says."""
        return int(ms.get_context("runtime_num_threads"))
