"""Where optimizers of optax stand, to and from canonical arrays."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from rbn.backends import flax as rbn_flax
from rbn.backends.flax import BNET, RBN, from_numpy, optimizer_from_numpy, optimizer_to_numpy, to_numpy
from rbn_core import RBNTypeError, RBNValueError
from rbn_core.weights import Training


class Net(nn.Module):
    """A convolution, each normalization, and a linear layer."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = nn.Conv(4, (3, 3), name="conv")(x)
        x = RBN(use_running_average=not train, name="rbn")(x)
        x = nn.ConvTranspose(4, (2, 2), name="up")(x)
        x = BNET(use_running_average=not train, name="bnet")(x)
        return nn.Dense(2, name="dense")(nn.relu(x).mean((1, 2)))


class Module(nnx.Module):
    """The same in NNX."""

    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.rbn = rbn_flax.nnx.RBN(4, rngs=rngs)
        self.up = nnx.ConvTranspose(4, 4, (2, 2), rngs=rngs)
        self.bnet = rbn_flax.nnx.BNET(4, rngs=rngs)
        self.dense = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.bnet(self.up(self.rbn(self.conv(x))))
        return self.dense(nnx.relu(x).mean((1, 2)))


def images(step: int) -> jax.Array:
    return jax.random.normal(jax.random.key(step), (4, 5, 5, 3))


def start() -> Any:
    return Net().init(jax.random.key(0), images(0), train=False)


VARIABLES = jax.jit(start)()
QUICKLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""Compile fast rather than well."""


OPTIMIZERS = {
    "sgd": lambda: optax.sgd(0.1, momentum=0.9),
    "adam": lambda: optax.adam(1e-2),
    "injected": lambda: optax.inject_hyperparams(optax.adamw)(learning_rate=1e-2),
    "scheduled": lambda: optax.chain(
        optax.clip(0.5), optax.sgd(optax.linear_schedule(0.1, 0.01, 15), momentum=0.9, nesterov=True)
    ),
    "in groups": lambda: optax.multi_transform(
        {"slow": optax.sgd(1e-3, momentum=0.9), "fast": optax.sgd(0.1, momentum=0.8)},
        lambda params: {name: "slow" if name == "conv" else "fast" for name in params},
    ),
}


def train(tx: Any, variables: Any, opt_state: Any, steps: range) -> Any:
    @functools.partial(jax.jit, compiler_options=QUICKLY)
    def update(variables: Any, opt_state: Any, x: jax.Array) -> Any:
        def loss(params: Any) -> Any:
            y, stats = Net().apply(variables | {"params": params}, x, train=True, mutable=["batch_stats"])
            return jnp.square(y - 1).mean(), stats

        gradients, stats = jax.grad(loss, has_aux=True)(variables["params"])
        updates, opt_state = tx.update(gradients, opt_state, variables["params"])
        return {"params": optax.apply_updates(variables["params"], updates)} | stats, opt_state

    for step in steps:
        variables, opt_state = update(variables, opt_state, images(step))
    return variables, opt_state


def equal(actual: Any, expected: Any) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
    assert jax.tree.map(jnp.result_type, actual) == jax.tree.map(jnp.result_type, expected)


@pytest.mark.parametrize("name", ["sgd", "injected", "scheduled", "in groups"])
def test_training_goes_on_in_linen(name: str) -> None:
    tx = OPTIMIZERS[name]()
    variables, opt_state = train(tx, VARIABLES, tx.init(VARIABLES["params"]), range(10))
    expected = train(tx, variables, opt_state, range(10, 20))
    training = optimizer_to_numpy(opt_state, start, learning_rate=0.1, step=10)
    assert training.step == 10
    loaded, _ = from_numpy(start, to_numpy(variables, start))
    fresh = tx.init(jax.tree.map(jnp.zeros_like, VARIABLES["params"]))
    continued = optimizer_from_numpy(fresh, start, training)
    equal(continued, opt_state)
    equal(train(tx, loaded, continued, range(10, 20)), expected)
    equal(fresh, tx.init(jax.tree.map(jnp.zeros_like, VARIABLES["params"])))


@pytest.mark.parametrize("name", ["sgd", "injected"])
def test_training_goes_on_in_nnx(name: str) -> None:
    def run(model: Module, optimizer: nnx.Optimizer, steps: range) -> None:
        @nnx.jit
        def update(model: Module, optimizer: nnx.Optimizer, x: jax.Array) -> None:
            optimizer.update(model, nnx.grad(lambda model: jnp.square(model(x) - 1).mean())(model))

        for step in steps:
            update(model, optimizer, images(step))

    model, other = Module(), Module()
    optimizer, fresh = (nnx.Optimizer(net, OPTIMIZERS[name](), wrt=nnx.Param) for net in (model, other))
    run(model, optimizer, range(10))
    training = optimizer_to_numpy(optimizer, model, learning_rate=0.1)
    assert training.step == 10
    from_numpy(other, to_numpy(model))
    assert optimizer_from_numpy(fresh, other, training) is None
    equal(nnx.to_pure_dict(nnx.state(fresh)), nnx.to_pure_dict(nnx.state(optimizer)))
    run(model, optimizer, range(10, 20))
    run(other, fresh, range(10, 20))
    equal(to_numpy(other), to_numpy(model))


def gradients_of_one_step() -> tuple[Any, dict[str, Any]]:
    """Random gradients, as linen has them and canonically."""
    rng = np.random.default_rng(0)
    params = VARIABLES["params"]
    gradients = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), params)
    return gradients, to_numpy({"params": gradients}, start)


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_the_first_moments_are_the_formulas(name: str) -> None:
    """b <- 0.9 b + g; and m <- 0.9 m + 0.1 g, v <- 0.999 v + 0.001 g^2 (Kingma and Ba 2015)."""
    gradients, canonical = gradients_of_one_step()
    tx = OPTIMIZERS[name]()
    _, opt_state = tx.update(gradients, tx.init(gradients), gradients)
    _, opt_state = tx.update(gradients, opt_state, gradients)
    training = optimizer_to_numpy(opt_state, start, learning_rate=0.5, step=7)
    assert (training.optimizer, training.learning_rate) == (name, 0.5)
    assert training.step == (7 if name == "sgd" else 2)
    factors = {"momentum": (1.9, 1), "first_moment": (0.19, 1), "second_moment": (0.001999, 2)}
    assert set(training.slots) == ({"momentum"} if name == "sgd" else {"first_moment", "second_moment"})
    for slot, arrays in training.slots.items():
        assert arrays.keys() == canonical.keys()
        assert {"conv.weight", "up.weight", "bnet.conv_weight", "rbn.scale_bias"} <= arrays.keys()
        factor, power = factors[slot]
        for key, array in arrays.items():
            np.testing.assert_allclose(array, factor * canonical[key] ** power, rtol=1e-5)


def test_the_same_training_state_comes_from_linen_and_from_nnx() -> None:
    gradients, canonical = gradients_of_one_step()
    tx = optax.adam(1e-2)
    model = Module()
    from_numpy(model, to_numpy(VARIABLES, start))
    module_gradients = Module()
    from_numpy(module_gradients, canonical, strict=False)
    _, opt_state = tx.update(gradients, tx.init(gradients))
    expected = optimizer_to_numpy(opt_state, start, learning_rate=1e-2)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    optimizer.update(model, nnx.state(module_gradients, nnx.Param))
    state = tx.update(nnx.state(module_gradients, nnx.Param), tx.init(nnx.state(model, nnx.Param)))[1]
    for found in (optimizer, state):
        training = optimizer_to_numpy(found, model, learning_rate=1e-2)
        assert (training.step, training.optimizer) == (expected.step, expected.optimizer)
        jax.tree.map(np.testing.assert_array_equal, training.slots, expected.slots)
    fresh = tx.init(nnx.state(model, nnx.Param))
    filled = optimizer_from_numpy(fresh, model, expected)
    equal(nnx.to_pure_dict(filled[0].mu), nnx.to_pure_dict(state[0].mu))
    assert filled[0].count == 1
    assert fresh[0].count == 0
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(fresh[0].mu))


def test_the_learning_rate_is_that_of_the_injected_hyperparameters() -> None:
    params = VARIABLES["params"]
    tx = optax.inject_hyperparams(optax.sgd)(learning_rate=0.25, momentum=0.9)
    training = optimizer_to_numpy(tx.init(params), start, learning_rate=0.1)
    assert training.learning_rate == 0.25
    continued = optimizer_from_numpy(tx.init(params), start, Training("sgd", 5, 0.125, training.slots))
    assert continued.hyperparams["learning_rate"] == 0.125
    assert continued.hyperparams["momentum"] == np.float32(0.9)
    assert continued.count == 5
    with pytest.raises(RBNValueError, match=r"expected a learning rate.*Pass learning_rate="):
        optimizer_to_numpy(optax.sgd(0.1, momentum=0.9).init(params), start)


def test_boxes_stay_and_layers_can_be_told_by_their_names() -> None:
    kernel_init = nn.with_partitioning(nn.initializers.ones, ("in", "out"))
    params = nn.Dense(2, kernel_init=kernel_init).init(jax.random.key(0), jnp.ones((1, 3)))["params"]
    tx = optax.sgd(0.1, momentum=0.9)
    training = optimizer_to_numpy(tx.init(params), learning_rate=0.1)
    slots = {"momentum": {"weight": np.arange(6.0).reshape(2, 3), "bias": np.ones(2)}}
    assert training.slots["momentum"].keys() == slots["momentum"].keys()
    trace = optimizer_from_numpy(tx.init(params), None, Training("sgd", 1, 0.1, slots))[0].trace
    assert trace["kernel"].names == ("in", "out")
    np.testing.assert_array_equal(trace["kernel"].value, slots["momentum"]["weight"].T)
    assert trace["bias"].dtype == jnp.float32


def test_what_does_not_fit_is_refused_and_nothing_changes() -> None:
    params = VARIABLES["params"]
    sgd, adam = optax.sgd(0.1, momentum=0.9), optax.adam(0.1)
    training = optimizer_to_numpy(sgd.init(params), start, learning_rate=0.1)
    with pytest.raises(RBNValueError, match=r"of adam with first_moment, second_moment, got that of sgd"):
        optimizer_from_numpy(adam.init(params), start, training)
    for tx in (optax.sgd(0.1), optax.rmsprop(0.1), optax.chain(sgd, adam)):
        with pytest.raises(RBNTypeError, match=r"either the momentum of optax\.sgd or the moments"):
            optimizer_to_numpy(tx.init(params), start, learning_rate=0.1)
    model = Module()
    optimizer = nnx.Optimizer(model, sgd, wrt=nnx.Param)
    slots = {name: array + 1 for name, array in training.slots["momentum"].items() if name != "rbn.beta"}
    slots |= {"conv.bias": np.ones(3), "surprise": np.ones(1)}
    for state, given in ((optimizer, model), (sgd.init(params), start)):
        with pytest.raises(
            RBNValueError, match=r"missing rbn\.beta; unexpected surprise; conv\.bias of shape \(3,\)"
        ):
            optimizer_from_numpy(state, given, Training("sgd", 1, 0.1, {"momentum": slots}))
    assert optimizer.step[...] == 0
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(nnx.state(optimizer)))
