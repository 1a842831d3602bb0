"""Jittor: the modules, whose lazy operations are compiled for every shape."""

from __future__ import annotations

import os
from collections.abc import Callable

from rbn.backends.jittor import RBN

# After the backend, which prepares what Jittor reads at its import.
# isort: split
import jittor as jt
from jittor import Var, nn

from rbn.benchmarks import cases
from rbn.benchmarks.cases import EVALUATION, TRAINING, Shape
from rbn.benchmarks.timing import Step
from rbn.benchmarks.worker import Worker, random


class Equations(nn.Module):
    """Eq. 12 as it stands, on (N, C, *spatial): what it costs without the two-pass form."""

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        for name, start in {"gamma": 1.0, "beta": 0.0, "w_m": 0.0, "w_v": 0.0, "w_b": 1.0}.items():
            setattr(self, name, jt.init.constant((num_features,), "float32", start))
        self.running_mean = jt.init.constant((num_features,), "float32", 0.0).stop_grad()
        self.running_var = jt.init.constant((num_features,), "float32", 1.0).stop_grad()
        self.is_train = True

    def execute(self, x: Var) -> Var:
        """Y."""
        spatial = tuple(range(2, x.ndim))

        def shaped(values: Var) -> Var:
            return values.reshape((1, -1, *(1,) * len(spatial)))

        def instance_mean(values: Var) -> Var:
            return values.mean(spatial, keepdims=True) if spatial else values

        x_cm = x + shaped(self.w_m) * instance_mean(x)
        if self.is_train:
            mean = x_cm.mean((0, *spatial), keepdims=True)
            var = (x_cm - mean).sqr().mean((0, *spatial), keepdims=True)
            values = x.numel() // x.shape[1]
            unbiased = var * (values / (values - 1))
            for running, batch in ((self.running_mean, mean), (self.running_var, unbiased)):
                running.update(running + self.momentum * (batch.reshape(-1) - running))
        else:
            mean, var = shaped(self.running_mean), shaped(self.running_var)
        x_s = (x_cm - mean) / jt.sqrt(var + self.eps)
        x_cs = x_s * jt.sigmoid(shaped(self.w_v) * instance_mean(x_s) + shaped(self.w_b))
        return x_cs * shaped(self.gamma) + shaped(self.beta)


LAYERS: dict[str, Callable[[int], nn.Module]] = {
    cases.BATCH_NORM: nn.BatchNorm,
    cases.RBN: RBN,
    cases.PLAIN: lambda num_features: RBN(num_features, fused=False),
    cases.EQUATIONS: Equations,
}


class Jittor(Worker):
    """Jittor on the CPU."""

    forms = tuple(LAYERS)

    def build(self, form: str, variant: str, shape: Shape) -> dict[str, Step]:
        """A step for each phase."""
        layer = LAYERS[form](shape[1])
        statistics = [layer.running_mean, layer.running_var]
        parameters = [p for p in layer.parameters() if not p.is_stop_grad()]  # it lists the statistics, too
        x, dy = (jt.array(random(shape, seed)) for seed in range(2))
        jt.sync_all(True)

        def training() -> object:
            layer.is_train = True  # eval() would also stop the gradients of the parameters
            y = layer(x)
            # The sum itself is never computed: nobody asks for it.
            gradients = jt.grad((y * dy).sum(), [x, *parameters])
            results = [y, *gradients, *statistics]
            jt.sync(results, True)
            return results

        def evaluation() -> object:
            layer.is_train = False
            with jt.no_grad():
                y = layer(x)
            jt.sync([y], True)
            return y

        return {TRAINING: training, EVALUATION: evaluation}

    def threads(self) -> int:
        """As OpenMP has it."""
        return int(os.environ.get("OMP_NUM_THREADS") or super().threads())
