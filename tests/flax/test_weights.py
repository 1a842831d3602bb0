"""Weights of any Flax model, linen and NNX, to and from canonical arrays."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import freeze

from rbn.backends import flax as rbn_flax
from rbn.backends.flax import BNET, IEBN, RBN, Network, describe, from_numpy, network, to_numpy
from rbn.backends.flax.internals import enable_x64
from rbn_core import Config, RBNTypeError, RBNValueError
from rbn_core.execution import convolution, initial_state
from rbn_core.networks import Convolution


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def equal(actual: Any, expected: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


class Everything(nn.Module):
    """Every kind of linen layer."""

    @nn.compact
    def __call__(self, x: jax.Array, words: jax.Array, train: bool) -> jax.Array:
        x = nn.Conv(4, (3, 3), name="conv")(x)
        x = nn.Conv(4, (3, 3), feature_group_count=2, name="grouped")(x)
        x = nn.ConvTranspose(5, (2, 3), strides=(2, 2), name="up")(x)
        x = nn.ConvTranspose(6, (2, 3), transpose_kernel=True, name="up_as_gradient")(x)
        x = nn.ConvLocal(4, (3, 3), name="local")(x)
        x = nn.BatchNorm(use_running_average=not train, name="batch_norm")(x)
        x = nn.LayerNorm(name="layer_norm")(x)
        x = nn.GroupNorm(2, name="group_norm")(x)
        x = nn.RMSNorm(name="rms_norm")(x)
        x = RBN(use_running_average=not train, scaling="channel_std", name="rbn")(x)
        x = BNET(use_running_average=not train, name="bnet")(x)
        x = x.mean((1, 2)) + nn.Embed(7, 4, name="words")(words).mean(1)
        x = nn.Dense(8, name="dense")(x)
        x = nn.MultiHeadDotProductAttention(2, name="attention")(x[:, None])[:, 0]
        return nn.Conv(3, 3, name="one_dimension")(x[..., None]).sum(-1)


WORDS = jnp.array([[1, 2], [3, 4]])


def start() -> Any:
    return Everything().init(jax.random.key(0), normal(2, 6, 6, 3), WORDS, train=False)


SHAPES = {
    "conv.weight": (4, 3, 3, 3),
    "conv.bias": (4,),
    "grouped.weight": (4, 2, 3, 3),
    "up.weight": (4, 5, 2, 3),
    "up_as_gradient.weight": (5, 6, 2, 3),
    "batch_norm.gamma": (4,),
    "batch_norm.running_var": (4,),
    "layer_norm.gamma": (4,),
    "group_norm.beta": (4,),
    "rms_norm.gamma": (4,),
    "rbn.scale_weight": (4,),
    "rbn.num_batches_tracked": (),
    "bnet.conv_weight": (4, 1, 3, 3),
    "words.weight": (7, 4),
    "dense.weight": (8, 4),
    "attention.query.kernel": (8, 2, 4),
    "attention.query.bias": (2, 4),
    "one_dimension.weight": (3, 1, 3),
}


def test_every_kind_of_linen_layer_has_its_canonical_shape_and_returns() -> None:
    variables = start()
    state = to_numpy(variables, start)
    shapes = {name: array.shape for name, array in state.items()}
    assert shapes | SHAPES == shapes
    assert shapes["local.kernel"] == variables["params"]["local"]["kernel"].shape
    loaded, table = from_numpy(start, state)
    equal(loaded, variables)
    statuses = {row.name: row.status for row in table.rows}
    assert statuses["conv.weight"] == statuses["bnet.conv_weight"] == statuses["dense.weight"] == "transposed"
    assert statuses["words.weight"] == statuses["attention.query.kernel"] == "matched"
    assert jax.tree.map(jnp.result_type, loaded) == jax.tree.map(jnp.result_type, variables)


def test_every_linen_layer_is_described() -> None:
    found = describe(start)
    assert {path: layer["kind"] for path, layer in found.items()} == {
        "conv": "convolution",
        "grouped": "convolution",
        "up": "transposed_convolution",
        "up_as_gradient": "transposed_convolution",
        "local": "other",
        "batch_norm": "norm",
        "layer_norm": "norm",
        "group_norm": "norm",
        "rms_norm": "norm",
        "rbn": "norm",
        "bnet": "norm",
        "words": "embedding",
        "dense": "linear",
        **{f"attention.{name}": "other" for name in ("query", "key", "value", "out")},
        "one_dimension": "convolution",
    }
    assert found["rbn"] == {"kind": "norm"} | dataclasses.asdict(Config(4, scaling="channel_std"))
    assert found["bnet"] == {"kind": "norm"} | dataclasses.asdict(Config.bnet(4))
    assert found["batch_norm"] == {"kind": "norm"}


class NNXEverything(nnx.Module):
    """Every kind of NNX layer, in attributes and lists."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.grouped = nnx.Conv(4, 4, (3, 3), feature_group_count=2, rngs=rngs)
        self.up = nnx.ConvTranspose(4, 5, (2, 3), rngs=rngs)
        self.up_as_gradient = nnx.ConvTranspose(5, 6, (2, 3), transpose_kernel=True, rngs=rngs)
        self.norms = nnx.List([nnx.BatchNorm(4, rngs=rngs), nnx.LayerNorm(4, rngs=rngs)])
        self.rbn = rbn_flax.nnx.RBN(4, scaling="channel_std", rngs=rngs)
        self.bnet = rbn_flax.nnx.BNET(4, rngs=rngs)
        self.iebn = rbn_flax.nnx.IEBN(4, momentum=0.5, rngs=rngs)
        self.words = nnx.Embed(7, 4, rngs=rngs)
        self.dense = nnx.Linear(4, 8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.tables = nnx.data({"kernel": nnx.Param(jnp.ones((2, 3)))})


def test_every_kind_of_nnx_layer_has_its_canonical_shape_and_returns() -> None:
    model, other = NNXEverything(nnx.Rngs(0)), NNXEverything(nnx.Rngs(1))
    state = to_numpy(model)
    shapes = {name: array.shape for name, array in state.items()}
    for name in ("conv.weight", "grouped.weight", "up.weight", "up_as_gradient.weight", "bnet.conv_weight"):
        assert shapes[name] == SHAPES[name]
    for name in ("words.weight", "dense.weight", "attention.query.kernel", "attention.query.bias"):
        assert shapes[name] == SHAPES[name]
    assert shapes["norms.0.running_mean"] == shapes["norms.1.gamma"] == (4,)
    assert shapes["tables.kernel"] == (2, 3)
    assert not any("dropout" in name for name in state)
    assert not from_numpy(other, state).faults
    for type_ in (nnx.Param, nnx.BatchStat):
        equal(nnx.to_pure_dict(nnx.state(other, type_)), nnx.to_pure_dict(nnx.state(model, type_)))
    found = describe(model)
    assert {found[path]["kind"] for path in ("up", "up_as_gradient")} == {"transposed_convolution"}
    assert found["tables"] == found["attention.query"] == {"kind": "other"}
    assert found["iebn"] == {"kind": "norm"} | dataclasses.asdict(Config.iebn(4, momentum=0.5))
    assert found["rbn"] == {"kind": "norm"} | dataclasses.asdict(Config(4, scaling="channel_std"))
    assert found["bnet"] == {"kind": "norm"} | dataclasses.asdict(Config.bnet(4))


def test_a_convolutions_weight_is_the_references() -> None:
    x = normal(2, 7, 7, 4)
    layer = nn.Conv(6, (3, 3), strides=2, padding=1, feature_group_count=2)
    variables = layer.init(jax.random.key(0), x)
    state = to_numpy(variables)
    node = Convolution("", ("input",), 4, 6, 3, 2, 1, 2, True)
    expected = convolution(node, np.asarray(x).transpose(0, 3, 1, 2), state["weight"], state["bias"])
    np.testing.assert_allclose(np.transpose(layer.apply(variables, x), (0, 3, 1, 2)), expected, atol=1e-5)


@pytest.mark.parametrize("transpose_kernel", [False, True])
def test_a_transposed_convolutions_weight_is_the_gradients(transpose_kernel: bool) -> None:
    """Y[i stride + p] = sum X[i] W[p], as in PyTorch, with the kernel (in, out, *kernel)."""
    x = normal(1, 3, 2)
    layer = nn.ConvTranspose(
        4, (3,), strides=(2,), padding="VALID", use_bias=False, transpose_kernel=transpose_kernel
    )
    variables = layer.init(jax.random.key(0), x)
    weight = to_numpy(variables, lambda: layer.init(jax.random.key(0), x))["weight"]
    expected = np.zeros((7, 4))
    for i in range(3):
        for p in range(3):
            expected[2 * i + p] += np.asarray(x)[0, i] @ weight[:, :, p]
    np.testing.assert_allclose(layer.apply(variables, x)[0], expected, atol=1e-6)


def test_our_networks_need_nothing_else() -> None:
    model = network("resnet18", {"layer": "rbn", "stages": [1, 4], "scaling": "channel_std"}, 5)
    state = initial_state(model.description)
    variables, table = from_numpy(model, state)
    assert {row.status for row in table.rows} == {"matched", "transposed", "no counterpart"}
    found = to_numpy(variables)
    counted = {name for name in found if name.endswith("tracked")}
    assert counted == {name for name in state if name.startswith(("layer1", "layer4")) and "tracked" in name}
    assert found.keys() - counted == {name for name in state if "tracked" not in name}
    equal(found, {name: state[name] for name in found})
    assert describe(model) == model.description.layers()
    module = rbn_flax.nnx.Network(small(), rngs=nnx.Rngs(0))
    assert describe(module) == small().layers()


def small() -> Any:
    """A few layers of ResNet-18."""
    description = network("resnet18", "bnet", 5).description
    return dataclasses.replace(description, nodes=description.nodes[:10])


def test_parameters_alone_are_laid_out_by_the_network_that_owns_them() -> None:
    model = Network(small())
    state = initial_state(model.description)
    variables, _ = from_numpy(model, state)
    found = to_numpy({"params": variables["params"]}, model)
    assert "layer1.0.bn2.conv_weight" in found
    equal(found, {name: state[name] for name in found})


def test_names_can_be_renamed_and_faults_are_listed() -> None:
    variables = start()
    state = to_numpy(variables, start)
    state = {f"module.{name}": array for name, array in state.items()}
    loaded, table = from_numpy(start, state, rename={r"module\.(.*)": r"\1"})
    equal(loaded, variables)
    assert table.rows[0].source.startswith("module.")
    state["module.dense.bias"] = np.ones(3)
    del state["module.conv.bias"]
    with pytest.raises(RBNValueError, match=r"missing conv.bias; dense.bias of shape \(3,\)"):
        from_numpy(start, state, rename={r"module\.(.*)": r"\1"})
    changed = {name: array + 1 for name, array in state.items()}
    loaded, table = from_numpy(start, changed, rename={r"module\.(.*)": r"\1"}, strict=False)
    assert {row.name for row in table.faults} == {"conv.bias", "dense.bias"}
    equal(loaded["params"]["dense"]["bias"], variables["params"]["dense"]["bias"])
    equal(loaded["params"]["conv"]["bias"], variables["params"]["conv"]["bias"])
    equal(loaded["params"]["dense"]["kernel"], variables["params"]["dense"]["kernel"] + 1)


def test_what_a_state_lacks_starts_as_the_layers_and_networks_do() -> None:
    loaded, _ = from_numpy(RBN(), {"gamma": np.full(3, 2.0)}, strict=False)
    equal(loaded["params"]["scale"], np.full(3, 2.0))
    equal(loaded["params"]["scale_bias"], np.ones(3))
    model = Network(small())
    state = initial_state(model.description, 1)
    loaded, _ = from_numpy(model, {name: state[name] for name in state if "bn" not in name}, strict=False)
    expected = initial_state(model.description)
    equal(to_numpy(loaded)["layer1.0.bn2.conv_weight"], expected["layer1.0.bn2.conv_weight"])
    equal(to_numpy(loaded)["conv1.weight"], state["conv1.weight"])


def test_a_counter_that_is_not_given_stays() -> None:
    module = rbn_flax.nnx.RBN(3, rngs=nnx.Rngs(0))
    module(normal(4, 3))
    state = to_numpy(module)
    del state["num_batches_tracked"]
    from_numpy(module, state)
    assert module.num_batches_tracked[...] == 1
    variables, _ = from_numpy(RBN(), state)
    assert variables["batch_stats"]["num_batches_tracked"] == 0


def test_an_nnx_module_changes_only_when_all_is_well() -> None:
    model = NNXEverything(nnx.Rngs(0))
    before = to_numpy(model)
    with pytest.raises(RBNValueError, match=r"missing conv\.bias"):
        from_numpy(model, {name: array + 1 for name, array in before.items() if name != "conv.bias"})
    equal(to_numpy(model), before)


class Tied(nnx.Module):
    def __init__(self) -> None:
        self.first = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
        self.again = self.first
        self.blocks = nnx.List([nnx.BatchNorm(2, rngs=nnx.Rngs(0)), self.first])
        self.table = self.first.kernel
        self.whole = self


def test_a_shared_layer_is_there_under_each_of_its_names() -> None:
    model = Tied()
    state = to_numpy(model)
    assert {name for name in state if name.endswith(("weight", "table"))} == {
        "first.weight",
        "again.weight",
        "blocks.1.weight",
        "table",
    }
    equal(state["again.weight"], state["first.weight"])
    equal(state["table"], state["first.weight"].T)
    assert not from_numpy(model, {name: array + 1 for name, array in state.items()}).faults
    equal(model.first.kernel[...], state["table"] + 1)
    assert model.again is model.first


def test_dtypes_stay_the_models() -> None:
    def init() -> Any:
        return nn.Dense(2, param_dtype=jnp.bfloat16).init(jax.random.key(0), normal(1, 3))

    state = to_numpy(init(), init)
    assert state["weight"].dtype == np.float32
    wide = {name: array.astype(np.float64) for name, array in state.items()}
    for loaded in (from_numpy(init, state)[0], from_numpy(init, wide)[0]):
        assert loaded["params"]["kernel"].dtype == jnp.bfloat16
        equal(loaded, init())
    module = nnx.Linear(3, 2, param_dtype=jnp.float16, rngs=nnx.Rngs(0))
    from_numpy(module, wide)
    assert module.kernel.dtype == jnp.float16
    with enable_x64():
        variables, _ = from_numpy(RBN(param_dtype=jnp.float64), {"gamma": np.full(2, 1 / 3)}, strict=False)
        assert variables["params"]["scale"].dtype == jnp.float64
        assert variables["params"]["scale"][0] == 1 / 3


def test_integers_of_a_model_come_along() -> None:
    class Counting(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return x + self.variable("batch_stats", "calls", jnp.zeros, (2,), jnp.int32).value

    def init() -> Any:
        return Counting().init(jax.random.key(0), normal(2))

    loaded, _ = from_numpy(init, {"calls": np.array([3, 4])})
    equal(loaded, {"batch_stats": {"calls": jnp.array([3, 4])}})


def test_boxes_stay() -> None:
    def init() -> Any:
        kernel = nn.with_partitioning(nn.initializers.ones, ("in", "out"))
        return nn.Dense(2, kernel_init=kernel).init(jax.random.key(0), normal(1, 3))

    state = to_numpy(init(), init)
    assert state["weight"].shape == (2, 3)
    loaded, _ = from_numpy(init, {name: array + 1 for name, array in state.items()})
    assert loaded["params"]["kernel"].names == ("in", "out")
    equal(loaded["params"]["kernel"].value, np.full((3, 2), 2.0))


def test_stacked_layers_keep_their_layout() -> None:
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array, _: None) -> Any:
            return nn.Dense(3, name="dense")(x), None

    stack = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=4)()

    def init() -> Any:
        return stack.init(jax.random.key(0), normal(2, 3), None)

    state = to_numpy(init(), init)
    assert {name: array.shape for name, array in state.items()} == {
        "dense.kernel": (4, 3, 3),
        "dense.bias": (4, 3),
    }
    equal(from_numpy(init, state)[0], init())


def test_names_with_dots_return_and_those_that_meet_are_refused() -> None:
    class Dotted(nn.Module):
        meet: bool

        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            x = nn.Dense(3, name="a.b")(x)
            return Inner(name="a")(x) if self.meet else x

    class Inner(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return nn.Dense(3, name="b")(x)

    def init(meet: bool = False) -> Any:
        return Dotted(meet).init(jax.random.key(0), normal(1, 2))

    state = to_numpy(init(), init)
    assert {name: array.shape for name, array in state.items()} == {"a.b.weight": (3, 2), "a.b.bias": (3,)}
    equal(from_numpy(init, state)[0], init())
    with pytest.raises(RBNValueError, match=r"names differ, got a\.b\.bias, a\.b\.kernel more than once"):
        to_numpy(init(True))
    with pytest.raises(RBNValueError, match="without a slash, got 'a/b'"):
        to_numpy({"params": {"a/b": {"kernel": jnp.ones((2, 2))}}})


def test_modules_that_share_a_scope_and_functions_of_modules_are_seen() -> None:
    class Wrapping(nn.Module):
        inner: nn.Module

        def setup(self) -> None:
            nn.share_scope(self, self.inner)

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.inner(x)

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            x = Wrapping(nn.ConvTranspose(3, (2,)))(x)
            norm = nn.LayerNorm(name="norm")
            scale = self.param("scale", nn.initializers.ones, (3,))
            return scale * nn.remat(lambda norm, x: norm(x))(norm, x)

    def init() -> Any:
        return Net().init(jax.random.key(0), normal(1, 5, 2))

    assert {path: layer["kind"] for path, layer in describe(init).items()} == {
        "": "other",
        "ConvTranspose_0": "transposed_convolution",
        "norm": "norm",
    }
    equal(from_numpy(init, to_numpy(init(), init))[0], init())


def test_linen_models_need_a_function_that_initialises_them() -> None:
    model = Everything()
    for use in (lambda given: from_numpy(given, {}), describe):
        with pytest.raises(RBNTypeError, match=r"Pass for example lambda: net\.init"):
            use(model)
    with pytest.raises(RBNValueError, match="got one that returns ShapeDtypeStruct"):
        from_numpy(lambda: nn.Dense(2).init_with_output(jax.random.key(0), normal(1, 2))[0], {})
    compiled = jax.jit(nn.Dense(2).init)
    compiled(jax.random.key(0), normal(1, 2))
    with pytest.raises(RBNValueError, match="runs no module"):
        from_numpy(lambda: compiled(jax.random.key(0), normal(1, 2)), {})
    with pytest.raises(RBNTypeError, match="expected an NNX module"):
        rbn_flax.nnx.to_numpy(nnx.state(nnx.Linear(2, 2, rngs=nnx.Rngs(0))))


def test_one_function_is_used_again_and_frozen_variables_will_do() -> None:
    state = to_numpy(freeze(start()), start)
    assert from_numpy(start, state)[1] == from_numpy(start, state)[1]


def test_gradients_of_one_layer_are_told_by_their_names() -> None:
    layers = {"bias": RBN(use_scale=False, centering=None, scaling=None), "conv": BNET(), "all": IEBN()}
    found = {}
    for name, layer in layers.items():
        variables = layer.init(jax.random.key(0), normal(2, 4, 4, 3), use_running_average=True)
        found[name] = set(to_numpy({"params": variables["params"]}))
    assert found == {
        "bias": {"beta"},
        "conv": {"conv_weight", "conv_bias"},
        "all": {"gamma", "beta", "scale_weight", "scale_bias"},
    }
