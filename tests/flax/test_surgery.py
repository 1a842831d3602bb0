"""BatchNorm to RBN, IEBN and BNET in whole models, linen and NNX, and back."""

import functools
import inspect
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rbn.backends import flax as rbn_flax
from rbn.backends.flax import BNET, RBN, Network, convert, describe, from_numpy, to_numpy
from rbn_core import RBNError, RBNTypeError, RBNValueError, networks
from rbn_core.execution import initial_state
from rbn_core.matching import Row
from rbn_core.networks import INPUT, Convolution, Norm, Pooling

LAYERS: list[tuple[str, dict[str, Any]]] = [
    ("rbn", {"scaling": "channel_std", "restrict": "hard_sigmoid"}),
    ("rbn", {"centering": None, "scaling": None}),
    ("iebn", {}),
    ("bnet", {"kernel_size": 5}),
]
STATS = ["batch_stats"]


def images(seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (4, 5, 5, 3))


def close(actual: Any, expected: Any) -> None:
    np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=1e-5)


def equal(actual: Any, expected: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def rows(*found: tuple[str, str, str, str]) -> tuple[Row, ...]:
    return tuple(Row(*row) for row in found)  # type: ignore[arg-type]


# NNX


class Module(nnx.Module):
    """BatchNorms in an attribute, a list and a dictionary, and one under two names."""

    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, momentum=0.7, epsilon=0.1, rngs=rngs)
        self.blocks = nnx.List([nnx.BatchNorm(4, use_bias=False, rngs=rngs), self.norm])
        self.others = nnx.data({"plain": nnx.BatchNorm(4, param_dtype=jnp.bfloat16, rngs=rngs)})

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in (self.conv, self.norm, *self.blocks, self.others["plain"]):
            x = layer(x)
        return x


def module() -> Module:
    """One that is trained, with one layer in evaluation."""
    model = Module()
    rng = np.random.default_rng(0)
    state = to_numpy(model)
    for name in ("norm.gamma", "norm.beta", "blocks.0.gamma", "others.plain.gamma"):
        state[name] = rng.normal(1, 0.5, 4)
        if name.startswith("norm"):
            state[name.replace("norm", "blocks.1")] = state[name]
    from_numpy(model, state)
    model(images(1))
    model.blocks[0].eval()
    return model


PATHS = ["blocks.0", "blocks.1", "norm", "others.plain"]


@pytest.mark.parametrize(("to", "options"), LAYERS)
def test_a_converted_nnx_model_gives_what_it_gave(to: str, options: dict[str, Any]) -> None:
    expected, model = module(), module()
    table = rbn_flax.nnx.convert(model, to, preserve=True, **options)
    layer = to.upper()
    assert sorted(row.name for row in table.rows) == PATHS
    assert {(row.status, row.source, row.detail) for row in table.rows} == {("replaced", "BatchNorm", layer)}
    assert {path for path, found in describe(model).items() if found.get("layer") == layer} == set(PATHS)
    for _ in range(2):  # in training and, where it is so, in evaluation; then with the next statistics
        found, wanted = model(images(2)), expected(images(2))
        np.testing.assert_allclose(found, wanted, rtol=2e-2, atol=2e-2)  # gamma in bfloat16
    for name, array in to_numpy(model).items():
        if "running" in name and name.startswith(("blocks", "norm")):
            close(array, to_numpy(expected)[name])
    assert model.norm is model.blocks[1]
    assert (model.norm.momentum, model.norm.epsilon, model.norm.running_var) == (0.7, 0.1, "biased")
    assert (model.blocks[0].use_running_average, model.norm.use_running_average) == (True, False)
    assert model.others["plain"].param_dtype == jnp.bfloat16


def test_without_preserve_the_weights_themselves_stay() -> None:
    model = module()
    before, scale, mean = to_numpy(model), model.norm.scale, model.norm.mean
    rbn_flax.nnx.convert(model)
    found = to_numpy(model)
    equal({name: found[name] for name in before}, before)
    assert model.norm.scale is scale
    assert model.norm.mean is mean
    equal(found["norm.scale_bias"], np.ones(4))
    assert found["norm.num_batches_tracked"] == 0


def test_preserved_outputs_are_exact_to_rounding() -> None:
    model = module()
    model.eval()
    expected = model.norm(model.conv(images()))
    rbn_flax.nnx.convert(model, preserve=True)
    close(model.norm(model.conv(images())), expected)
    rbn_flax.nnx.convert(model, "bn")
    assert type(model.norm) is nnx.BatchNorm
    close(model.norm(model.conv(images())), expected)


def test_where_chooses_by_the_whole_path() -> None:
    model = module()
    with pytest.raises(RBNValueError, match="got 'blocks', which matches none of these 4: "):
        rbn_flax.nnx.convert(model, where=r"blocks")
    assert str(rbn_flax.nnx.convert(model, "bn")) == "0 replaced: there is no RBN, IEBN or BNET"
    table = rbn_flax.nnx.convert(model, where=r"blocks\.0")
    assert table.rows == rows(("blocks.0", "replaced", "BatchNorm", "RBN"))
    assert type(model.norm) is nnx.BatchNorm
    # A shared layer stays shared: all its names, or none.
    table = rbn_flax.nnx.convert(model, where=r"norm")
    assert {row.name for row in table.rows} == {"norm", "blocks.1"}
    assert model.norm is model.blocks[1]
    assert isinstance(model.norm, rbn_flax.nnx.RBN)


def test_the_way_back_says_what_is_not_inert() -> None:
    model = module()
    rbn_flax.nnx.convert(model)
    expected = model.blocks[0](model.conv(images()))
    model.norm.center_weight[...] += 0.5
    table = rbn_flax.nnx.convert(model, "bn", where="norm|blocks.*")
    assert table.rows[0] == Row("blocks.0", "replaced", "RBN", "BatchNorm")
    kept = [row for row in table.rows if row.status == "kept"]
    assert {(row.name, row.source) for row in kept} == {("norm", "RBN"), ("blocks.1", "RBN")}
    assert kept[0].detail == "center_weight is not 0 everywhere (largest 0.5)"
    assert isinstance(model.norm, rbn_flax.nnx.RBN)
    assert type(model.blocks[0]) is nnx.BatchNorm
    close(model.blocks[0](model.conv(images())), expected)
    cumulative = nnx.List([rbn_flax.nnx.RBN(2, momentum=None, rngs=nnx.Rngs(0))])
    assert rbn_flax.nnx.convert(cumulative, "bn").rows[0].detail.startswith("averages all batches")


class OwnParam(nnx.Variable):
    """A user's parameter that no optimizer takes."""


@pytest.mark.parametrize("to", ["rbn", "bnet"])
def test_what_a_conversion_adds_to_an_nnx_layer_is_learned_if_a_parameter_before_was(to: str) -> None:
    model = nnx.List([nnx.BatchNorm(3, rngs=nnx.Rngs(0)) for _ in range(3)])
    rbn_flax.nnx.freeze(nnx.List([model[0]]))
    model[1].scale, model[1].bias = OwnParam(model[1].scale[...]), OwnParam(model[1].bias[...])
    details = [row.detail for row in rbn_flax.nnx.convert(model, to).rows]
    name = to.upper()
    assert details == [f"{name}, frozen", f"{name}, not learned, as the layer before", name]
    assert [bool(jax.tree.leaves(nnx.state(layer, nnx.Param))) for layer in model] == [False, False, True]
    before = to_numpy(model[0])
    model.train()
    model[0](images())
    equal(to_numpy(model[0]), before)


def test_the_table_says_what_was_looked_at() -> None:
    nothing = nn.Dense(3)
    given = nothing.init(jax.random.key(0), jnp.ones((2, 3)))
    assert str(convert(nothing, given)[2]) == "0 replaced: there is no BatchNorm"
    nnx_nothing = nnx.List([nnx.Linear(3, 3, rngs=nnx.Rngs(0))])
    assert str(rbn_flax.nnx.convert(nnx_nothing)) == "0 replaced: there is no BatchNorm"
    text = "expected where to match the whole path of a layer, got 'x'"
    calls: Any = (
        lambda: convert(nothing, given, where="x"),
        lambda: convert(Net(), VARIABLES, where="x"),
        lambda: rbn_flax.nnx.convert(nnx_nothing, where="x"),
        lambda: rbn_flax.nnx.convert(module(), where="x"),
    )
    for call in calls:
        with pytest.raises(RBNValueError, match=text):
            call()


def test_new_kernels_of_bnet_are_drawn_one_by_one() -> None:
    first, again, other = module(), module(), module()
    for model, seed in ((first, 0), (again, 0), (other, 1)):
        rbn_flax.nnx.convert(model, "bnet", rngs=nnx.Rngs(seed))
    kernels = [np.asarray(model.norm.conv.kernel[...]) for model in (first, again, other)]
    np.testing.assert_array_equal(kernels[0], kernels[1])
    assert not np.allclose(kernels[0], kernels[2])
    assert not np.allclose(kernels[0], first.blocks[0].conv.kernel[...])


def test_an_nnx_network_knows_what_it_has_become() -> None:
    network = rbn_flax.nnx.Network(described(), rngs=nnx.Rngs(0))
    rbn_flax.nnx.convert(network, "rbn", where=r"a\.norm", scaling="channel_std")
    node = network.description.nodes[1]
    assert (node.layer, node.options) == (
        "rbn",
        {"scaling": "channel_std", "running_var": "biased", "eps": 0.1},
    )
    assert describe(network) == network.description.layers()
    rbn_flax.nnx.convert(network, "bn")
    assert network.description == described()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"to": "gn"}, "expected to to be one of"),
        ({"where": "("}, "expected where to be a regular expression"),
        ({"scalling": None}, "expected an option of this layer, got 'scalling'. Did you mean 'scaling'"),
        ({"scaling": "sum"}, "expected scaling to be one of"),
        ({"to": "bnet", "kernel_size": 2}, "expected an odd kernel_size"),
        ({"momentum": 0.5}, "expected options that the layer before has not, got momentum"),
        ({"to": "bn", "kernel_size": 3}, "expected no option but bias_init.* for 'bn', got kernel_size"),
    ],
)
def test_what_is_wrong_is_refused_alike_and_changes_nothing(change: dict[str, Any], text: str) -> None:
    model = module()
    before = nnx.clone(model)
    with pytest.raises(RBNError, match=text):
        rbn_flax.nnx.convert(model, **change)
    equal(to_numpy(model), to_numpy(before))
    assert type(model.norm) is nnx.BatchNorm
    with pytest.raises(RBNError, match=text):
        convert(Net(), VARIABLES, **change)


def test_a_batch_norm_alone_and_one_in_a_tuple_are_refused() -> None:
    with pytest.raises(RBNTypeError, match="expected a model that holds layers, got a BatchNorm"):
        rbn_flax.nnx.convert(nnx.BatchNorm(2, rngs=nnx.Rngs(0)))
    with pytest.raises(RBNTypeError, match="expected a model that holds layers, got a BatchNorm"):
        convert(nn.BatchNorm(), {})
    holder = nnx.List([nnx.BatchNorm(2, rngs=nnx.Rngs(0)), nnx.data((nnx.BatchNorm(2, rngs=nnx.Rngs(0)),))])
    with pytest.raises(RBNTypeError, match=r"got 1\.0 in a tuple"):
        rbn_flax.nnx.convert(holder)
    assert type(holder[0]) is nnx.BatchNorm


# linen


class Block(nn.Module):
    """A layer in `setup`, used twice."""

    def setup(self) -> None:
        self.norm = nn.BatchNorm(momentum=0.7, epsilon=0.1)

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        return self.norm(self.norm(x, use_running_average=not train), use_running_average=not train)


class Net(nn.Module):
    """Layers in a block, under a transformation, without a bias, and one that stays."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = nn.Conv(4, (3, 3), name="conv")(x)
        x = Block(name="block")(x, train)
        norm = nn.BatchNorm(use_running_average=not train, use_bias=False, name="under_remat")
        x = nn.remat(lambda norm, x: norm(x))(norm, x)
        x = nn.LayerNorm(name="layer_norm")(x)
        return nn.BatchNorm(use_running_average=not train, use_scale=False, name="last")(x)

    def double(self, x: jax.Array) -> jax.Array:
        return 2 * x


def start() -> Any:
    return Net().init(jax.random.key(0), images(), train=False)


def trained() -> Any:
    """Variables that are not where they start."""
    variables = jax.tree.map(lambda leaf: leaf + 0.3, jax.jit(start)())
    _, updated = Net().apply(variables, images(1), train=True, mutable=STATS)
    return variables | updated


VARIABLES = trained()
NORMS = {"block.norm", "under_remat", "last"}


@pytest.mark.parametrize("init", [None, start])
@pytest.mark.parametrize(("to", "options"), LAYERS)
def test_a_converted_linen_model_gives_what_it_gave(to: str, options: dict[str, Any], init: Any) -> None:
    before = jax.tree.map(jnp.copy, VARIABLES)
    model, variables, table = convert(Net(), VARIABLES, to, init=init, preserve=True, **options)
    equal(VARIABLES, before)
    if to in ("rbn", "iebn") and options.get("scaling", True):
        assert {row.name for row in table.rows if row.status == "kept"} == {"last"}
        assert next(row.detail for row in table.rows if row.name == "last").startswith("has no gamma")
    assert {row.name for row in table.rows} == NORMS
    expected, updated = Net().apply(VARIABLES, images(2), train=True, mutable=STATS)
    found, renewed = model.apply(variables, images(2), train=True, mutable=STATS)
    close(found, expected)
    close(renewed["batch_stats"]["block"]["norm"]["var"], updated["batch_stats"]["block"]["norm"]["var"])
    assert renewed["batch_stats"]["block"]["norm"]["num_batches_tracked"] == 2
    assert renewed["batch_stats"]["under_remat"]["num_batches_tracked"] == 1
    expected = Net().apply(VARIABLES, images(3), train=False)
    close(jax.jit(model.apply, static_argnames="train")(variables, images(3), train=False), expected)
    back, original, table = convert(model, variables, "bn")
    assert {row.status for row in table.rows} == {"replaced"}
    close(back.apply(original, images(3), train=False), expected)
    assert jax.tree.structure(original["batch_stats"]) == jax.tree.structure(VARIABLES["batch_stats"])


def test_a_converted_linen_model_is_like_one_that_was_built_so() -> None:
    with pytest.raises(RBNValueError, match="got 'block', which matches none of these"):
        convert(Net(), VARIABLES, "rbn", where="block")
    model, variables, _ = convert(Net(), VARIABLES, "rbn", where="block.*", scaling="channel_std")
    made = jax.eval_shape(lambda: model.init(jax.random.key(0), images(), train=False))
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, variables)
    assert set(variables["params"]["block"]["norm"]) == {
        *("scale", "bias", "center_weight", "scale_weight", "scale_bias"),
    }
    equal(variables["params"]["block"]["norm"]["scale"], VARIABLES["params"]["block"]["norm"]["scale"])

    def init() -> Any:
        return model.init(jax.random.key(0), images(), train=False)

    found = describe(init)
    assert (found["block.norm"]["layer"], found["block.norm"]["scaling"]) == ("RBN", "channel_std")
    assert (found["block.norm"]["eps"], found["block.norm"]["momentum"]) == (0.1, 0.7)
    assert found["last"] == {"kind": "norm"}
    state = to_numpy(variables, init)
    equal(from_numpy(init, state)[0], variables)
    assert model.apply(variables, "double", jnp.ones(2), method="run")[0] == 2

    class Holder(nn.Module):
        body: nn.Module

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.body(x, train=False)

    body = {"params": {"body": variables["params"]}, "batch_stats": {"body": variables["batch_stats"]}}
    close(Holder(model).apply(body, images()), model.apply(variables, images(), train=False))


def test_converting_more_of_a_converted_model() -> None:
    model, variables, _ = convert(Net(), VARIABLES, "rbn", where="block.*", preserve=True)
    model, variables, table = convert(model, variables, "bnet", preserve=True)
    assert {row.name for row in table.rows} == {"under_remat", "last"}
    assert {to for _, to, _ in model.answers} == {"rbn", "bnet"}
    close(model.apply(variables, images(), train=False), Net().apply(VARIABLES, images(), train=False))


class Own(nn.Module):
    """A user's model with layers of ours."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = RBN(use_running_average=not train, restrict="hard_sigmoid", epsilon=0.1, name="hard")(x)
        x = RBN(use_running_average=not train, name="moved")(x)
        return BNET(use_running_average=not train, name="bnet")(x)


def test_a_users_layers_go_back_with_init_alone() -> None:
    def init() -> Any:
        return Own().init(jax.random.key(0), images(), train=False)

    variables = init()
    variables["params"]["moved"]["scale_weight"] += 0.5
    with pytest.raises(RBNValueError, match="Pass init="):
        convert(Own(), variables, "bn")
    expected = Own().apply(variables, images(), train=False)
    model, found, table = convert(Own(), variables, "bn", init=init)
    assert table.rows[:2] == rows(
        ("hard", "replaced", "RBN", "BatchNorm"),
        ("moved", "kept", "RBN", "scale_weight is not 0 everywhere (largest 0.5)"),
    )
    assert table.rows[2].detail.startswith("conv_weight is not 0 beside its centre")
    assert set(found["params"]["hard"]) == {"scale", "bias"}
    close(model.apply(found, images(), train=False), expected)


def described() -> networks.Network:
    nodes = (
        Convolution("a.conv", (INPUT,), 3, 4, 3, padding=1),
        Norm("a.norm", ("a.conv",), 4, "bn", {"eps": 0.1}),
        Norm("b.norm", ("a.norm",), 4, "bn"),
        Pooling("mean", ("b.norm",), "average"),
    )
    return networks.Network("two", nodes)


@pytest.mark.parametrize(("to", "options"), LAYERS)
def test_a_linen_network_stays_a_network(to: str, options: dict[str, Any]) -> None:
    network = Network(described())
    state = {
        name: array + np.float32(0.3) for name, array in initial_state(described()).items() if array.ndim
    }
    variables, _ = from_numpy(network, state)
    expected = network.apply(variables, images(), train=False)
    model, converted, table = convert(network, variables, to, where=r"a\..*", preserve=True, **options)
    assert isinstance(model, Network)
    assert table.rows == rows(("a.norm", "replaced", "BatchNorm", to.upper()))
    assert [node.layer for node in model.description.nodes[1:3]] == [to, "bn"]
    assert model.description.nodes[1].options == {"eps": 0.1, "running_var": "biased"} | options
    close(model.apply(converted, images(), train=False), expected)
    assert not from_numpy(model, to_numpy(converted, model))[1].faults
    back, original, _ = convert(model, converted, "bn")
    assert back == network
    close(back.apply(original, images(), train=False), expected)


def test_what_a_description_cannot_say_is_refused() -> None:
    network = Network(described())
    variables, _ = from_numpy(network, initial_state(described()))
    with pytest.raises(RBNTypeError, match="options that a description of a network has, got scale_init"):
        convert(network, variables, scale_init=nn.initializers.zeros)
    with pytest.raises(RBNTypeError, match=r"call rbn\.backends\.flax\.nnx\.convert"):
        convert(Module(), "rbn")


def test_a_mask_reaches_the_layer_that_answers() -> None:
    class Masked(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array, train: bool) -> jax.Array:
            return nn.BatchNorm(use_running_average=not train)(x, mask=jnp.arange(5)[:, None, None] < 3)

    variables = Masked().init(jax.random.key(0), images(), train=False)
    model, converted, _ = convert(Masked(), variables, preserve=True, centering=None)
    for x in (images(), images().at[:, 3:].set(7.0)):
        found, due = (
            net.apply(given, x, train=True, mutable=STATS)
            for net, given in ((model, converted), (Masked(), variables))
        )
        close(found[0], due[0])
        close(found[1]["batch_stats"]["BatchNorm_0"]["var"], due[1]["batch_stats"]["BatchNorm_0"]["var"])


def test_what_batch_norm_is_told_of_axes_and_dtypes_stays() -> None:
    class Net(nnx.Module):
        def __init__(self, **options: Any) -> None:
            self.norm = nnx.BatchNorm(4, rngs=nnx.Rngs(0), **options)

    model = Net(axis=(-1,), axis_name="batch")
    rbn_flax.nnx.convert(model, centering=None, scaling=None)
    model.norm.spatial_axis_name = "rows"
    rbn_flax.nnx.convert(model, "bn")
    assert model.norm.axis_name == ("batch", "rows")
    if "promote_dtype" in inspect.signature(nnx.BatchNorm.__init__).parameters:
        promote = functools.partial(nnx.nn.dtypes.promote_dtype)
        for given, due in (({}, None), ({"promote_dtype": promote}, promote)):
            model = Net(**given)
            rbn_flax.nnx.convert(model)
            assert model.norm.promote_dtype is due


def test_several_channel_axes_of_linen_layers_are_refused() -> None:
    class TwoAxes(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return nn.BatchNorm(use_running_average=True, axis=(-2, -1))(x)

    variables = TwoAxes().init(jax.random.key(0), images())
    with pytest.raises(RBNValueError, match=r"of shape \(5, 3\)\. .*of several channel axes, too"):
        convert(TwoAxes(), variables)

    def init() -> Any:
        return TwoAxes().init(jax.random.key(0), images())

    table = convert(TwoAxes(), init(), init=init)[2]
    assert table.rows == rows(("BatchNorm_0", "kept", "BatchNorm", "has channels on the axes (-2, -1)"))


def test_boxes_and_dtypes_of_linen_stay() -> None:
    class Boxed(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            ones = nn.with_partitioning(nn.initializers.ones, ("channels",))
            return nn.BatchNorm(True, scale_init=ones, param_dtype=jnp.float16, name="norm")(x)

    variables = Boxed().init(jax.random.key(0), images())
    model, converted, _ = convert(Boxed(), variables, preserve=True)
    params = converted["params"]["norm"]
    assert params["scale"].names == ("channels",)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float16)}
    assert converted["batch_stats"]["norm"]["mean"].dtype == jnp.float32
    np.testing.assert_allclose(
        model.apply(converted, images()), Boxed().apply(variables, images()), rtol=1e-3, atol=1e-3
    )
