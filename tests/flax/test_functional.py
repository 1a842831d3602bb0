"""The plain function that Equinox and Haiku take, and the examples of docstrings."""

import doctest
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rbn.backends.flax import functional, nnx, recipes
from rbn_core import reference
from rbn_core.config import Config

CONFIGS = [
    Config(3),
    Config(3, 1e-5, None, "channel_std", "spatial_mean", restrict="hard_sigmoid", running_var="biased"),
]


@pytest.mark.parametrize("function", [functional.rbn, recipes.update_rbn, nnx.update_rbn])
def test_the_examples_run(function: Any) -> None:
    (example,) = doctest.DocTestFinder(recurse=False).find(function, function.__name__, globs={})
    assert doctest.DocTestRunner().run(example).attempted > 3
    assert doctest.DocTestRunner().run(example).failed == 0


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("config", CONFIGS)
def test_the_function_is_the_reference(config: Config, training: bool) -> None:
    rng = np.random.default_rng(0)
    oracle = reference.Layer(config)
    state = {name: rng.uniform(0.5, 1.5, value.shape) for name, value in oracle.state().items()}
    oracle.load(state | {"num_batches_tracked": np.array(3)})
    x, dy = rng.normal(size=(2, 2, 3, 4, 4))
    due = oracle.forward(x, training)
    dx, gradients = oracle.backward(dy)
    parameters = {name: jnp.asarray(state[name], jnp.float32) for name in config.parameters}
    running = tuple(jnp.asarray(state[name], jnp.float32) for name in ("running_mean", "running_var"))

    @jax.jit
    def run(parameters: Any, x: Any) -> Any:
        y, *statistics = functional.rbn(
            x,
            parameters,
            None if training else (running[0], running[1]),
            axis=1,
            eps=config.eps,
            centering=config.centering,
            scaling=config.scaling,
            restrict=config.restrict,
            dtype=None,
        )
        return y, statistics

    y, pull, (mean, var) = jax.vjp(run, parameters, jnp.asarray(x, jnp.float32), has_aux=True)
    found, found_dx = pull(jnp.asarray(dy, jnp.float32))
    for actual, expected in ((y, due), (found_dx, dx), *((found[name], gradients[name]) for name in found)):
        np.testing.assert_allclose(actual, expected, rtol=2e-4, atol=2e-4)
    if training:
        new_weight = None if config.momentum is None else 1 - config.momentum
        values = x.size // 3 if config.running_var == "unbiased" else None
        new = functional.accumulate(running, mean, var, new_weight, count=4, values=values)
        stored = oracle.state()
        for name, actual in zip(("running_mean", "running_var"), new, strict=True):
            np.testing.assert_allclose(actual, stored[name], rtol=1e-5)
