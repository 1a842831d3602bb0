"""JAX/Flax: the linen layers under `jit`, channels last."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from rbn.backends.flax import RBN
from rbn.benchmarks import cases
from rbn.benchmarks.cases import EVALUATION, TRAINING, Shape
from rbn.benchmarks.timing import Step
from rbn.benchmarks.worker import Worker, random


class Equations(nn.Module):
    """Eq. 12 as it stands, on (N, *spatial, C): what it costs without the two-pass form."""

    epsilon: float = 1e-5
    momentum: float = 0.9

    @nn.compact
    def __call__(self, x: Array, use_running_average: bool) -> Array:
        """Y."""
        shape, spatial = x.shape[-1:], tuple(range(1, x.ndim - 1))
        starts = {"gamma": 1.0, "beta": 0.0, "w_m": 0.0, "w_v": 0.0, "w_b": 1.0}
        p = {name: self.param(name, nn.initializers.constant(start), shape) for name, start in starts.items()}
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, shape)
        running_var = self.variable("batch_stats", "var", jnp.ones, shape)
        x_cm = x + p["w_m"] * x.mean(spatial, keepdims=True)
        if use_running_average:
            mean, var = running_mean.value, running_var.value
        else:
            everywhere = (0, *spatial)
            mean, var = x_cm.mean(everywhere), x_cm.var(everywhere)
            if not self.is_initializing():
                values = x.size // x.shape[-1]
                for running, batch in ((running_mean, mean), (running_var, var * (values / (values - 1)))):
                    running.value = self.momentum * running.value + (1 - self.momentum) * batch
        x_s = (x_cm - mean) / jnp.sqrt(var + self.epsilon)
        x_cs = x_s * nn.sigmoid(p["w_v"] * x_s.mean(spatial, keepdims=True) + p["w_b"])
        return x_cs * p["gamma"] + p["beta"]


LAYERS: dict[str, Callable[[], nn.Module]] = {
    cases.BATCH_NORM: lambda: nn.BatchNorm(momentum=0.9),
    cases.RBN: RBN,
    cases.PLAIN: lambda: RBN(fused=False),
    cases.EQUATIONS: Equations,
}


def trained(layer: nn.Module) -> Any:
    """Y, the gradients and the new statistics, compiled: what is returned is computed, and so is Y."""

    @jax.jit
    def step(params: Any, stats: Any, x: Array, dy: Array) -> tuple[Array, Any, Any]:
        def forward(params: Any, x: Array) -> tuple[Array, Any]:
            variables = {"params": params, "batch_stats": stats}
            return layer.apply(variables, x, use_running_average=False, mutable=["batch_stats"])

        y, pull, updated = jax.vjp(forward, params, x, has_aux=True)
        return y, pull(dy), updated["batch_stats"]

    return step


def evaluated(layer: nn.Module) -> Any:
    """Y with the running statistics, compiled."""

    @jax.jit
    def step(params: Any, stats: Any, x: Array) -> Array:
        return layer.apply({"params": params, "batch_stats": stats}, x, use_running_average=True)

    return step


class Flax(Worker):
    """JAX on its default device."""

    forms = tuple(LAYERS)

    def build(self, form: str, variant: str, shape: Shape) -> dict[str, Step]:
        """A step for each phase."""
        layer = LAYERS[form]()
        channels_last = (shape[0], *shape[2:], shape[1])
        x, dy = (jnp.asarray(random(channels_last, seed)) for seed in range(2))
        variables = layer.init(jax.random.key(0), x, use_running_average=False)
        params, stats = variables["params"], variables["batch_stats"]
        train, evaluate = trained(layer), evaluated(layer)

        def training() -> object:
            nonlocal stats
            results = jax.block_until_ready(train(params, stats, x, dy))
            stats = results[2]
            return results

        def evaluation() -> object:
            return jax.block_until_ready(evaluate(params, stats, x))

        return {TRAINING: training, EVALUATION: evaluation}
