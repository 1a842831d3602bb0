"""Where optimizers of optax stand, to and from canonical arrays."""

import dataclasses
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
from rbn_core.training import Group, Training


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
    "in injected groups": lambda: in_groups(
        lambda rate, decay: optax.inject_hyperparams(optax.adamw)(learning_rate=rate, weight_decay=decay)
    ),
    "in masked groups": lambda: in_groups(decayed_sgd, masks=True),
}


def decayed_sgd(rate: float, decay: float) -> Any:
    """SGD with a weight decay, of which everything is stored."""
    return optax.chain(
        optax.inject_hyperparams(optax.add_decayed_weights)(weight_decay=decay),
        optax.inject_hyperparams(optax.sgd)(learning_rate=rate, momentum=0.9),
    )


def in_groups(make: Any, *, masks: bool = False, rates: tuple[float, float] = (0.01, 0.001)) -> Any:
    """The kernels, and without weight decay and at another rate the rest."""

    def labels(params: Any) -> Any:
        return jax.tree.map(lambda leaf: "kernels" if leaf.ndim > 1 else "rest", params)

    groups = {"kernels": make(rates[0], 0.1), "rest": make(rates[1], 0.0)}
    if not masks:
        return optax.multi_transform(groups, labels)

    def mask(name: str) -> Any:
        return lambda params: jax.tree.map(lambda label: label == name, labels(params))

    return optax.chain(*(optax.masked(tx, mask(name)) for name, tx in groups.items()))


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


@pytest.mark.parametrize(
    "name", ["sgd", "injected", "scheduled", "in groups", "in injected groups", "in masked groups"]
)
def test_training_goes_on_in_linen(name: str) -> None:
    tx = OPTIMIZERS[name]()
    variables, opt_state = train(tx, VARIABLES, tx.init(VARIABLES["params"]), range(10))
    expected = train(tx, variables, opt_state, range(10, 20))
    training = optimizer_to_numpy(opt_state, start, learning_rate=0.1, step=10, **decay_of(name))
    assert training.step == 10
    assert len(training.groups) == (2 if name in ("in injected groups", "in masked groups") else 1)
    loaded, _ = from_numpy(start, to_numpy(variables, start))
    fresh = tx.init(jax.tree.map(jnp.zeros_like, VARIABLES["params"]))
    continued = optimizer_from_numpy(fresh, start, training)
    equal(continued, opt_state)
    equal(train(tx, loaded, continued, range(10, 20)), expected)
    equal(fresh, tx.init(jax.tree.map(jnp.zeros_like, VARIABLES["params"])))


def decay_of(name: str) -> dict[str, float]:
    """What has to be said of a chain that clips, as it could decay as well."""
    return {"weight_decay": 0.0} if name == "scheduled" else {}


@pytest.mark.parametrize("name", ["sgd", "injected", "in injected groups"])
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
    assert training.optimizer == name
    assert training.groups == (Group(0.5, 0.0, tuple(canonical)),)
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
    names = tuple(training.slots["momentum"])
    assert training.groups == (Group(0.25, 0.0, names),)
    groups = (Group(0.125, None, names),)
    continued = optimizer_from_numpy(tx.init(params), start, Training("sgd", 5, groups, training.slots))
    assert continued.hyperparams["learning_rate"] == 0.125
    assert continued.hyperparams["momentum"] == np.float32(0.9)
    assert continued.count == 5
    with pytest.raises(RBNValueError, match=r"expected a learning rate.*Pass learning_rate="):
        optimizer_to_numpy(optax.sgd(0.1, momentum=0.9).init(params), start)


def test_boxes_stay_and_layers_can_be_told_by_their_names() -> None:
    kernel_init = nn.with_partitioning(nn.initializers.ones, ("in", "out"))
    params = nn.Dense(2, kernel_init=kernel_init).init(jax.random.key(0), jnp.ones((1, 3)))["params"]
    tx = optax.multi_transform(
        {"a": optax.sgd(0.1, momentum=0.9), "b": optax.sgd(0.1, momentum=0.9)}, {"kernel": "a", "bias": "b"}
    )
    masked = optimizer_to_numpy(tx.init(params), learning_rate={"weight": 0.1, "bias": 0.2})
    assert masked.groups == (Group(0.1, 0.0, ("weight",)), Group(0.2, 0.0, ("bias",)))
    assert optimizer_from_numpy(tx.init(params), None, masked).inner_states["a"].inner_state[0].trace
    tx = optax.sgd(0.1, momentum=0.9)
    training = optimizer_to_numpy(tx.init(params), learning_rate=0.1)
    slots = {"momentum": {"weight": np.arange(6.0).reshape(2, 3), "bias": np.ones(2)}}
    assert training.slots["momentum"].keys() == slots["momentum"].keys()
    assert training.groups == (Group(0.1, 0.0, tuple(training.slots["momentum"])),)
    trace = optimizer_from_numpy(tx.init(params), None, Training("sgd", 1, training.groups, slots))[0].trace
    assert trace["kernel"].names == ("in", "out")
    np.testing.assert_array_equal(trace["kernel"].value, slots["momentum"]["weight"].T)
    assert trace["bias"].dtype == jnp.float32


def test_what_does_not_fit_is_refused_and_nothing_changes() -> None:
    params = VARIABLES["params"]
    sgd, adam = optax.sgd(0.1, momentum=0.9), optax.adam(0.1)
    training = optimizer_to_numpy(sgd.init(params), start, learning_rate=0.1)
    with pytest.raises(RBNValueError, match="expected where an optimizer of kind 'adam' stands, got 'sgd'"):
        optimizer_from_numpy(adam.init(params), start, training)
    for tx in (optax.sgd(0.1), optax.rmsprop(0.1), optax.chain(sgd, adam)):
        with pytest.raises(RBNTypeError, match=r"either the momentum of optax\.sgd or the moments"):
            optimizer_to_numpy(tx.init(params), start, learning_rate=0.1)
    with pytest.raises(RBNValueError, match=r"missing bnet\.conv_bias; "):
        optimizer_from_numpy(sgd.init(params), start, dataclasses.replace(training, slots={}))
    model = Module()
    optimizer = nnx.Optimizer(model, sgd, wrt=nnx.Param)
    slots = {name: array + 1 for name, array in training.slots["momentum"].items() if name != "rbn.beta"}
    slots |= {"conv.bias": np.ones(3), "surprise": np.ones(1)}
    for state, given in ((optimizer, model), (sgd.init(params), start)):
        with pytest.raises(
            RBNValueError, match=r"missing rbn\.beta; unexpected surprise; conv\.bias of shape \(3,\)"
        ):
            optimizer_from_numpy(state, given, Training("sgd", 1, training.groups, {"momentum": slots}))
    assert optimizer.step[...] == 0
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(nnx.state(optimizer)))


KERNELS = ("bnet.conv_weight", "conv.weight", "dense.weight", "up.weight")


def test_the_rates_and_decays_are_those_of_the_groups() -> None:
    params = VARIABLES["params"]
    for name, decoupled in (("in injected groups", True), ("in masked groups", False)):
        tx = OPTIMIZERS[name]()
        training = optimizer_to_numpy(tx.init(params), start)
        assert training.groups[0] == Group(np.float32(0.01), np.float32(0.1), KERNELS)
        assert (training.groups[1].learning_rate, training.groups[1].weight_decay) == (np.float32(0.001), 0.0)
        assert training.decoupled == decoupled
        groups = (Group(0.5, 0.25, KERNELS), Group(0.125, 0.0, training.groups[1].parameters))
        changed = dataclasses.replace(training, groups=groups)
        after = optimizer_to_numpy(optimizer_from_numpy(tx.init(params), start, changed), start)
        assert after.groups == groups


def test_what_optax_does_not_store_has_to_be_said() -> None:
    params = VARIABLES["params"]
    names = tuple(
        optimizer_to_numpy(optax.sgd(0.1, 0.9).init(params), start, learning_rate=1).groups[0].parameters
    )
    decays = {name: 0.5 if name in KERNELS else 0.0 for name in names}
    adamw = optax.adamw(0.1).init(params)
    with pytest.raises(
        RBNValueError, match=r"expected a weight decay, .* Pass weight_decay=\.\.\., 0 where there"
    ):
        optimizer_to_numpy(adamw, start, learning_rate=0.1)
    with pytest.raises(
        RBNValueError, match=r"expected a weight decay of bnet\.conv_bias, .* and 5 more, got"
    ):
        optimizer_to_numpy(adamw, start, learning_rate=0.1, weight_decay=dict.fromkeys(KERNELS, 0.1))
    with pytest.raises(RBNValueError, match=r"expected a learning rate of bnet\.conv_bias"):
        optimizer_to_numpy(adamw, start, learning_rate=dict.fromkeys(KERNELS, 0.1), weight_decay=0.0)
    training = optimizer_to_numpy(adamw, start, learning_rate=0.1, weight_decay=decays)
    assert {(group.weight_decay, *group.parameters) for group in training.groups} >= {(0.5, *KERNELS)}
    assert training.decoupled
    masked = optax.inject_hyperparams(optax.adamw, static_args="mask")(
        0.1, weight_decay=0.5, mask=lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params)
    )
    with pytest.raises(RBNValueError, match="expected a weight decay, got an optimizer that does not store"):
        optimizer_to_numpy(masked.init(params), start)
    again = optimizer_to_numpy(masked.init(params), start, weight_decay=decays)
    assert [group.weight_decay for group in again.groups] == [group.weight_decay for group in training.groups]
    other = dataclasses.replace(
        training,
        groups=tuple(dataclasses.replace(g, weight_decay=g.weight_decay / 2) for g in training.groups),
    )
    assert optimizer_from_numpy(masked.init(params), start, other).hyperparams["weight_decay"] == 0.25


@pytest.mark.parametrize("decoupled", [False, True])
def test_a_decay_is_decoupled_where_it_comes_behind_the_moments(decoupled: bool) -> None:
    params, decay = VARIABLES["params"], optax.add_decayed_weights(0.1)
    parts = (optax.scale_by_adam(), decay) if decoupled else (decay, optax.scale_by_adam())
    for rate in (optax.scale(-0.1), optax.scale_by_schedule(lambda count: -0.1)):
        state = optax.chain(*parts, rate).init(params)
        training = optimizer_to_numpy(state, start, learning_rate=0.1, weight_decay=0.1)
        assert training.decoupled == decoupled
        with pytest.raises(RBNValueError, match="expected an optimizer with a weight decay that is"):
            optimizer_from_numpy(state, start, dataclasses.replace(training, decoupled=not decoupled))
    clipping = optax.chain(optax.clip(1.0), optax.scale_by_adam(), decay, rate).init(params)
    with pytest.raises(RBNValueError, match=r"where both can be\. Pass decoupled=True if it is behind"):
        optimizer_to_numpy(clipping, start, learning_rate=0.1, weight_decay=0.1)
    training = optimizer_to_numpy(clipping, start, learning_rate=0.1, weight_decay=0.1, decoupled=decoupled)
    assert training.decoupled == decoupled


def test_groups_that_an_optimizer_cannot_have_are_refused() -> None:
    params = VARIABLES["params"]
    sgd = optax.sgd(0.1, momentum=0.9)
    training = optimizer_to_numpy(sgd.init(params), start, learning_rate=0.1)
    rest = tuple(name for name in training.groups[0].parameters if name not in KERNELS)
    injected = optax.inject_hyperparams(optax.sgd)(learning_rate=0.1, momentum=0.9)
    rates = (Group(0.1, 0.0, KERNELS), Group(0.01, 0.0, rest))
    decays = (Group(0.1, 0.5, KERNELS), Group(0.1, 0.0, rest))
    twice = optax.chain(optax.inject_hyperparams(optax.add_decayed_weights)(0.1), decayed_sgd(0.1, 0.1))
    both = optax.multi_transform(
        {"a": optax.adamw(0.1), "b": optax.chain(optax.add_decayed_weights(0.1), optax.adam(0.1))},
        lambda params: {name: "a" if name == "conv" else "b" for name in params},
    )
    for tx, groups, message in (
        (
            sgd,
            rates,
            r"one learning rate for all parameters .* alike, got 0\.01 for bnet\.conv_bias, 0\.1 for",
        ),
        (injected, rates, "one learning rate for all parameters"),
        (sgd, decays, r"an optimizer that decays bnet\.conv_weight, .*, got one without a weight decay"),
        (injected, decays, "got one without a weight decay"),
        (decayed_sgd(0.1, 0.1), decays, "one weight decay for all parameters"),
        (optax.chain(optax.add_decayed_weights(0.1), sgd), decays, "one weight decay for all parameters"),
        (twice, training.groups, r"one weight decay of .*, got an optimizer with 2"),
        (sgd, training.groups * 2, r"got bnet\.conv_bias twice in the groups"),
        (sgd, rates[:1], "learning rate of every parameter|weight decay of every parameter"),
    ):
        with pytest.raises(RBNValueError, match=message):
            optimizer_from_numpy(tx.init(params), start, dataclasses.replace(training, groups=groups))
    with pytest.raises(
        RBNValueError, match="one form of weight decay for all parameters, got added to the gr"
    ):
        optimizer_to_numpy(both.init(params), start, learning_rate=0.1, weight_decay=0.1)
