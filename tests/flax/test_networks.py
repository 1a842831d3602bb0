"""Networks of the papers in Flax, held to NumPy's run of the same description."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, traverse_util

from rbn.backends import flax as rbn_flax
from rbn.backends.flax import Network, from_numpy, network, to_numpy
from rbn_core import RBNValueError, networks
from rbn_core.execution import initial_state, run
from rbn_core.matching import State
from rbn_core.networks import (
    INPUT,
    Activation,
    Add,
    Concatenate,
    Convolution,
    Linear,
    Norm,
    Pooling,
    Split,
)

NORMS = ["bn", "rbn", "iebn", "bnet"]
BATCH_STATS = ("batch_stats",)


def lively_state(description: networks.Network, seed: int = 0) -> State:
    """A state whose calibrations, statistics and depthwise convolutions all show in the result."""
    rng = np.random.default_rng(seed)
    state = initial_state(description, seed)
    for name, array in state.items():
        if array.ndim == 1:
            array += (0.2 * rng.random(array.shape)).astype(array.dtype)
        elif name.endswith("conv_weight"):  # which starts at 0 in networks
            array += rng.normal(0, 1 / 3, array.shape).astype(array.dtype)
        elif array.ndim == 4 and array.shape[1] == 1:
            array *= np.sqrt(len(array))  # their fan-out is that of one channel
    return state


def tiny(norm: str, **options: Any) -> networks.Network:
    """A network with every kind of node, in little."""
    nodes = (
        Convolution("stem.0", (INPUT,), 3, 8, 3, stride=2, padding=1, bias=True),
        Norm("stem.1", ("stem.0",), 8, norm, options),
        Activation("relu", ("stem.1",)),
        Pooling("max", ("relu",), "max", 3, 2, 1),
        Split("left", ("max",), 0, 4),
        Split("right", ("max",), 4, 8),
        Convolution("grouped", ("left",), 4, 4, 3, padding=1, groups=2),
        Convolution("depthwise", ("right",), 4, 4, 5, padding=2, groups=4),
        Concatenate("join", ("depthwise", "grouped")),
        Pooling("average", ("join",), "average", 3, 1, 1),
        Add("add", ("average", "max")),
        Activation("relu6", ("add",), 0.5),
        Pooling("mean", ("relu6",), "average"),
        Linear("head", ("mean",), 8, 5),
    )
    return networks.Network("tiny", nodes)


def images(size: int, batch: int = 2, seed: int = 0) -> Any:
    """Images as NumPy and as Flax have them."""
    x = np.random.default_rng(seed).normal(size=(batch, 3, size, size)).astype(np.float32)
    return x, jnp.asarray(x.transpose(0, 2, 3, 1))


def difference(a: Any, b: Any) -> float:
    return float(np.max(np.abs(np.asarray(a) - b)) / np.max(np.abs(b)))


def biased(description: networks.Network) -> networks.Network:
    """The description as Flax runs it, whose own BatchNorm accumulates the biased variance."""
    nodes = [
        Norm(node.name, node.inputs, node.channels, "bn", {**node.options, "running_var": "biased"})
        if isinstance(node, Norm) and node.layer == "bn"
        else node
        for node in description.nodes
    ]
    return networks.Network(description.name, tuple(nodes))


def compiled(model: Network) -> Any:
    """The network under `jit`, compiled fast rather than well."""
    quickly = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    return jax.jit(model.apply, static_argnames=("train", "mutable"), compiler_options=quickly)


def check_training(model: Network, apply: Any, state: State, size: int) -> None:
    """Logits and running statistics of a step against NumPy's."""
    variables, table = from_numpy(model, state)
    assert not table.faults
    x, own = images(size, 4)
    expected, after = run(biased(model.description), state, x, training=True)
    y, updated = apply(variables, own, train=True, mutable=BATCH_STATS)
    assert difference(y, expected) < 1e-4
    found = to_numpy(variables | updated, model)
    assert found.keys() >= {name for name in after if not name.endswith("tracked")}
    for name, array in found.items():
        if name.endswith(("running_mean", "running_var", "num_batches_tracked")):
            assert difference(array, after[name]) < 1e-4, name


@pytest.mark.parametrize("norm", NORMS)
def test_training_gives_what_numpy_gives(norm: str) -> None:
    model = network("resnet18", norm, 7)
    check_training(model, compiled(model), lively_state(model.description), 32)


@pytest.mark.parametrize("norm", NORMS)
def test_every_kind_of_node_gives_what_numpy_gives(norm: str) -> None:
    model = Network(tiny(norm, momentum=0.3, eps=0.1))
    state = lively_state(model.description)
    check_training(model, model.apply, state, 16)
    x, own = images(16, 4)
    expected, _ = run(model.description, state, x)
    y = model.apply(from_numpy(model, state)[0], own, train=False)
    assert difference(y, expected) < 1e-4


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_evaluation_gives_what_numpy_gives(name: str) -> None:
    """All eleven networks take minutes to compile; by hand they agree to 5e-5."""
    model = network(name, "rbn", 7)
    state = lively_state(model.description)
    x, own = images(32)
    expected, _ = run(model.description, state, x)
    assert difference(compiled(model)(from_numpy(model, state)[0], own, train=False), expected) < 1e-4


@pytest.mark.parametrize("name", ["resnet50", "res2net50_26w_4s", "cifar_resnext29_8x64d"])
def test_the_variables_are_those_of_the_description(name: str) -> None:
    model = network(name, "rbn", 7)
    x = jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.float32)
    init = functools.partial(model.init_with_output, train=False)
    y, variables = jax.eval_shape(init, jax.random.key(0), x)
    assert y.shape == (2, 7)
    loaded, _ = from_numpy(model, initial_state(model.description))
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, loaded)


@pytest.mark.parametrize("norm", NORMS)
def test_nnx_gives_what_numpy_gives(norm: str) -> None:
    description = tiny(norm, momentum=0.3, eps=0.1)
    model = rbn_flax.nnx.Network(description, rngs=nnx.Rngs(0))
    state = lively_state(description)
    from_numpy(model, state)
    x, own = images(16, 4)
    model.eval()
    expected, _ = run(description, state, x)
    assert difference(model(own), expected) < 1e-4
    model.train()
    expected, after = run(biased(description), state, x, training=True)
    assert difference(model(own), expected) < 1e-4
    for name, array in to_numpy(model).items():
        assert difference(array, after[name]) < 1e-4, name


def test_the_calibrations_and_options_show_in_the_result() -> None:
    """Or the comparisons above would not tell one layer from another."""
    _, own = images(16, 4)
    results = []
    for norm, options in [("bn", {}), ("bn", {"eps": 0.1}), ("rbn", {}), ("rbn", {"scaling": "channel_std"})]:
        model = Network(tiny(norm, **options))
        variables, _ = from_numpy(model, lively_state(model.description))
        results.append(np.asarray(model.apply(variables, own, train=False)))
    for i, result in enumerate(results):
        assert all(difference(result, other) > 1e-3 for other in results[:i])


def test_gradients_under_jit_equal_those_of_nnx() -> None:
    description = tiny("rbn")
    model, module = Network(description), rbn_flax.nnx.Network(description, rngs=nnx.Rngs(0))
    variables, _ = from_numpy(model, lively_state(description))
    from_numpy(module, lively_state(description))
    _, x = images(16, 4)
    apply = jax.jit(model.apply, static_argnames=("train", "mutable"))

    def loss(params: Any) -> Any:
        y, updated = apply(variables | {"params": params}, x, train=True, mutable=BATCH_STATS)
        return jnp.square(y - 1).sum(), updated

    gradients, updated = jax.grad(loss, has_aux=True)(variables["params"])

    @nnx.jit
    def nnx_gradients(module: Any, x: Any) -> Any:
        return nnx.grad(lambda module: jnp.square(module(x) - 1).sum())(module)

    found = {"params": nnx.to_pure_dict(nnx_gradients(module, x))}
    expected = to_numpy({"params": gradients}, model)
    assert expected.keys() == to_numpy(found, model).keys()
    found_too = to_numpy(found, model)
    expected.pop("stem.0.bias")  # the batch's mean takes it away: rounding is all there is
    for name, array in expected.items():
        assert difference(found_too[name], array) < 1e-4, name
    assert (
        difference(to_numpy(module)["stem.1.running_var"], updated["batch_stats"]["stem"]["1"]["var"]) < 1e-5
    )


@pytest.mark.parametrize("idiom", ["linen", "nnx"])
def test_weights_start_as_described(idiom: str) -> None:
    description = networks.Network(
        "two",
        (
            Convolution("conv", (INPUT,), 3, 64, 3, groups=1),
            Norm("norm", ("conv",), 64, "rbn"),
            Pooling("mean", ("norm",), "average"),
            Linear("head", ("mean",), 64, 100),
        ),
    )
    if idiom == "linen":
        model = Network(description)
        state = to_numpy(model.init(jax.random.key(1), images(8)[1], train=False))
    else:
        state = to_numpy(rbn_flax.nnx.Network(description, rngs=nnx.Rngs(1)))
    assert np.std(state["conv.weight"]) == pytest.approx(np.sqrt(2 / (64 * 9)), rel=0.05)
    assert np.mean(state["conv.weight"]) == pytest.approx(0, abs=5e-3)
    for name in ("head.weight", "head.bias"):
        assert 0.95 / 8 < np.max(np.abs(state[name])) <= 1 / 8
        assert np.mean(state[name]) == pytest.approx(0, abs=0.02)
    expected = initial_state(description)
    for name in (
        "gamma",
        "beta",
        "center_weight",
        "scale_weight",
        "scale_bias",
        "running_mean",
        "running_var",
    ):
        np.testing.assert_array_equal(state[f"norm.{name}"], expected[f"norm.{name}"])


def test_variables_are_nested_along_the_names() -> None:
    model = network("resnet18", {"layer": "bnet", "stages": [1]}, 7)
    variables = jax.eval_shape(
        functools.partial(model.init, train=False), jax.random.key(0), jnp.ones((1, 32, 32, 3))
    )
    names = set(traverse_util.flatten_dict(variables, sep="/"))
    assert {
        "params/layer1/0/bn2/conv/kernel",
        "params/layer2/0/downsample/1/scale",
        "batch_stats/layer4/1/bn2/var",
        "batch_stats/layer1/0/bn2/num_batches_tracked",
        "params/fc/bias",
    } <= names
    assert "batch_stats/layer2/0/bn2/num_batches_tracked" not in names


def test_batch_norm_is_flaxs_own_with_a_variance_in_two_passes() -> None:
    x, _ = images(16, 4)
    x = (x + 1000).astype(np.float32)
    description = networks.Network("one", (Norm("norm", (INPUT,), 3),))
    module = rbn_flax.nnx.Network(description, rngs=nnx.Rngs(0))
    assert type(module.norm) is nnx.BatchNorm
    y, _ = Network(description).apply(
        from_numpy(Network(description), initial_state(description))[0],
        jnp.asarray(x.transpose(0, 2, 3, 1)),
        train=True,
        mutable=BATCH_STATS,
    )
    expected, _ = run(description, initial_state(description), x.astype(np.float64), training=True)
    for found in (y, module(jnp.asarray(x.transpose(0, 2, 3, 1)))):
        assert difference(np.transpose(found, (0, 3, 1, 2)), expected) < 1e-2


def test_what_flax_lacks_is_refused() -> None:
    for norm, options, text in [
        ("bn", {"momentum": None}, "expected a momentum for 'stem.1'"),
        (
            "bn",
            {"track_running_stats": False},
            "RBN: expected track_running_stats=True, as the layers of Flax",
        ),
        ("rbn", {"track_running_stats": False}, "RBN: expected track_running_stats=True, as the layers of"),
    ]:
        description = tiny(norm, **options)
        with pytest.raises(RBNValueError, match=text):
            jax.eval_shape(
                functools.partial(Network(description).init, train=False), jax.random.key(0), images(8)[1]
            )
        with pytest.raises(RBNValueError, match=text):
            rbn_flax.nnx.Network(description, rngs=nnx.Rngs(0))
    inside = (Convolution("a", (INPUT,), 3, 3, 1), Convolution("a.b", ("a",), 3, 3, 1))
    for nodes in (
        inside,
        (inside[1].__class__("a.b", (INPUT,), 3, 3, 1), inside[0].__class__("a", ("a.b",), 3, 3, 1)),
    ):
        with pytest.raises(RBNValueError, match="no layer inside of another one"):
            rbn_flax.nnx.Network(networks.Network("x", nodes), rngs=nnx.Rngs(0))


def test_a_network_is_a_module_like_any_other() -> None:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array, train: bool) -> jax.Array:
            return nn.Dense(2)(Network(tiny("rbn"), name="body")(x, train))

    x = images(16)[1]
    variables = Net().init(jax.random.key(0), x, train=False)
    assert set(variables["params"]) == {"body", "Dense_0"}
    assert Net().apply(variables, x, train=False).shape == (2, 2)
    assert hash(network("resnet18", "rbn")) == hash(network("resnet18", "rbn"))
    assert network("resnet18", "rbn") != network("resnet18", "bn")
