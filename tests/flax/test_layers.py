"""What is Flax's own about the layers; the mathematics is the conformance suite's business."""

import functools
import pickle
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, serialization
from jax.test_util import check_grads

import rbn.backends.flax as rbn_flax
from rbn.backends.flax import BNET, IEBN, RBN, convert, from_numpy, to_numpy
from rbn.backends.flax.internals import enable_x64
from rbn_core import RBNError, RBNTypeError, RBNValueError

STATS = ["batch_stats"]


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def fresh(layer: Any, x: jax.Array) -> Any:
    return layer.init(jax.random.key(0), x, use_running_average=False)


def train(layer: Any, variables: Any, x: jax.Array) -> tuple[jax.Array, Any]:
    y, updated = layer.apply(variables, x, use_running_average=False, mutable=STATS)
    return y, variables | updated


def nnx_rbn(num_features: int, **options: Any) -> rbn_flax.nnx.RBN:
    return rbn_flax.nnx.RBN(num_features, rngs=nnx.Rngs(0), **options)


def close(actual: Any, expected: Any, rtol: float = 1e-5, atol: float = 1e-5) -> None:
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=rtol, atol=atol), actual, expected)


def equal(actual: Any, expected: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


# Both layers


def test_linen_and_nnx_are_one_layer() -> None:
    x = normal(4, 5, 5, 3)
    layer, module = RBN(), nnx_rbn(3)
    rng = np.random.default_rng(0)
    state = {name: rng.uniform(0.5, 1, np.shape(value)) for name, value in to_numpy(module).items()}
    state["num_batches_tracked"] = np.array(2)
    variables, _ = from_numpy(layer, state)
    from_numpy(module, state)
    close(layer.apply(variables, x, use_running_average=True), module(x, use_running_average=True))
    y, variables = train(layer, variables, x)
    close(y, module(x))
    close(to_numpy(variables), to_numpy(module))
    assert module.num_batches_tracked[...] == 3


def test_a_fresh_layer_is_batch_norm_times_one_constant() -> None:
    x = normal(4, 5, 5, 3)
    norm = nn.BatchNorm(momentum=0.9)
    y, _ = train(RBN(), fresh(RBN(), x), x)
    expected, _ = train(norm, fresh(norm, x), x)
    close(y, expected * jax.nn.sigmoid(1.0))


def test_biased_statistics_follow_batch_norm_step_by_step() -> None:
    layer, norm = RBN(running_var="biased"), nn.BatchNorm(momentum=0.9)
    variables, expected = fresh(layer, normal(4, 5, 5, 3)), fresh(norm, normal(4, 5, 5, 3))
    for seed in range(3):
        x = normal(4, 5, 5, 3, seed=seed)
        _, variables = train(layer, variables, x)
        _, expected = train(norm, expected, x)
    stats = variables["batch_stats"]
    assert stats.pop("num_batches_tracked") == 3
    close(stats, expected["batch_stats"])


def test_cumulative_momentum_averages_all_batches() -> None:
    layer, module = RBN(momentum=None), nnx_rbn(3, momentum=None)
    batches = [normal(4, 5, 5, 3, seed=seed) for seed in range(3)]
    variables = fresh(layer, batches[0])
    for x in batches:
        _, variables = train(layer, variables, x)
        module(x)
    expected = np.mean([np.var(x, axis=(0, 1, 2), ddof=1) for x in batches], axis=0)
    close(variables["batch_stats"]["var"], expected)
    close(module.var[...], expected)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_input_keeps_its_dtype_and_float32_statistics(dtype: Any) -> None:
    x = (normal(8, 16, 16, 3) + 10).astype(dtype)
    for options in ({}, {"param_dtype": dtype}):
        layer, module = RBN(**options), nnx_rbn(3, **options)
        y, variables = train(layer, fresh(layer, x), x)
        assert y.dtype == module(x).dtype == dtype
        assert variables["batch_stats"]["mean"].dtype == module.mean.dtype == jnp.float32
        assert to_numpy(variables)["gamma"].dtype == np.float32


def test_the_output_dtype_is_batch_norms_where_it_can_be() -> None:
    x = normal(2, 3, 3, 4)
    for dtype in (None, jnp.float32, jnp.bfloat16):
        for options in ({"dtype": dtype}, {"dtype": dtype, "param_dtype": jnp.float16}):
            norm = nn.BatchNorm(**options)
            expected = train(norm, fresh(norm, x), x)[0].dtype
            layer = RBN(**options)
            assert train(layer, fresh(layer, x), x)[0].dtype == expected
            assert nnx_rbn(4, **options)(x).dtype == expected
    assert nnx_rbn(4, dtype=jnp.float32)(x.astype(jnp.bfloat16)).dtype == jnp.float32


def test_float64_input_leaves_the_dtype_of_the_statistics() -> None:
    with enable_x64():
        x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 5, 3)))
        layer, module = RBN(), nnx_rbn(3)
        y, variables = train(layer, fresh(layer, x), x)
        assert y.dtype == module(x).dtype == jnp.float64
        assert variables["batch_stats"]["var"].dtype == module.var.dtype == jnp.float32
        wide = nnx_rbn(3, param_dtype=jnp.float64)
        assert wide(x.astype(jnp.float32), use_running_average=True).dtype == jnp.float64
        wide(x)
        close(wide.var[...], 0.9 + 0.1 * np.var(x, axis=(0, 1), ddof=1), rtol=1e-14, atol=0)


@pytest.mark.parametrize("axis", [0, 1, 2, -2, -1])
@pytest.mark.parametrize("centering", ["channel_mean", "spatial_std"])
def test_any_axis_can_hold_the_channels(axis: int, centering: Any) -> None:
    x = normal(3, 4, 5, 2)
    state = {name: value + 0.3 for name, value in to_numpy(nnx_rbn(2)).items()}
    state["num_batches_tracked"] = np.array(0)
    options = {"centering": centering, "scaling": centering.replace("std", "mean")}
    expected, moved = RBN(**options), RBN(axis=axis, **options)
    y, _ = train(expected, from_numpy(expected, state)[0], x)
    y_moved, _ = train(moved, from_numpy(moved, state)[0], jnp.moveaxis(x, -1, axis))
    close(jnp.moveaxis(y_moved, axis, -1), y)


@pytest.mark.parametrize("shape", [(5, 3), (5, 1, 3), (1, 2, 2, 2, 3)])
def test_every_rank_trains_and_evaluates(shape: tuple[int, ...]) -> None:
    x = normal(*shape)
    y, variables = train(RBN(), fresh(RBN(), x), x)
    close(y.mean(tuple(range(len(shape) - 1))), np.zeros(3))
    evaluated = RBN(use_running_average=True).apply(variables, x)
    module = nnx_rbn(3)
    from_numpy(module, to_numpy(variables))
    module.eval()
    close(module(x), evaluated)


def test_a_numpy_input_is_computed_by_jax_and_left_alone() -> None:
    x = np.array(normal(4, 5, 5, 3))
    before = x.copy()
    assert isinstance(nnx_rbn(3)(x), jax.Array)
    np.testing.assert_array_equal(x, before)


def test_gradients_of_gradients() -> None:
    with enable_x64():
        rng = np.random.default_rng(0)
        x, weigh = (jnp.asarray(rng.normal(size=(3, 2, 2, 2))) for _ in range(2))
        layer = RBN(use_running_average=False, param_dtype=jnp.float64)
        variables = jax.tree.map(lambda leaf: leaf + 0.3, layer.init(jax.random.key(0), x))

        @jax.jit
        def loss(x: jax.Array) -> jax.Array:
            return (layer.apply(variables, x, mutable=STATS)[0] * weigh).sum()

        check_grads(loss, (x,), order=2, modes=["rev"], rtol=1e-5)


def test_running_statistics_carry_no_gradient() -> None:
    x = normal(4, 5, 5, 3)
    variables = fresh(RBN(), x)
    gradient = jax.grad(lambda x: train(RBN(), variables, x)[1]["batch_stats"]["mean"].sum())(x)
    equal(gradient, jnp.zeros_like(x))


def test_refused_inputs_read_alike_in_both_layers() -> None:
    module = nnx_rbn(3)
    variables = fresh(RBN(), normal(2, 3))
    for x in (normal(2, 4, 4, 5), normal(3), normal(1, 3), jnp.ones((2, 3), jnp.int32), jnp.ones((0, 3))):
        before = to_numpy(module)
        with pytest.raises(RBNError) as linen_error:
            train(RBN(), variables, x)
        with pytest.raises(RBNError) as nnx_error:
            module(x)
        assert str(linen_error.value) == str(nnx_error.value)
        equal(to_numpy(module), before)


def test_iebn_starts_as_batch_norm_times_a_sigmoid_of_minus_one() -> None:
    x = normal(4, 5, 5, 3)
    norm = nn.BatchNorm(momentum=0.9)
    variables = fresh(norm, x)
    expected, _ = train(norm, variables, x)
    start = fresh(IEBN(), x)
    assert set(start["params"]) == {"scale", "bias", "scale_weight", "scale_bias"}
    loaded = start | {"params": start["params"] | variables["params"]}
    close(train(IEBN(), loaded, x)[0], expected * jax.nn.sigmoid(-1.0))
    module = rbn_flax.nnx.IEBN(3, rngs=nnx.Rngs(0))
    nnx.update(module, nnx.state(nnx.BatchNorm(3, rngs=nnx.Rngs(0))))
    close(module(x), expected * jax.nn.sigmoid(-1.0))
    equal(to_numpy(module)["scale_bias"], -np.ones(3))


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_bnet_starts_as_its_frameworks_convolution(dims: int) -> None:
    x = normal(2, *(4,) * dims, 3)
    options = {"kernel_size": 5, "spatial_dims": dims}
    conv = nn.Conv(3, (5,) * dims, feature_group_count=3)

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return nn.Conv(3, (5,) * dims, feature_group_count=3, name="conv")(x)

    expected = Net().init(jax.random.key(0), x)["params"]
    variables = fresh(BNET(**options), x)
    equal(variables["params"], expected)
    module = rbn_flax.nnx.BNET(3, **options, rngs=nnx.Rngs(7))
    own = nnx.Conv(3, 3, (5,) * dims, feature_group_count=3, rngs=nnx.Rngs(7))
    equal(module.conv.kernel[...], own.kernel[...])
    equal(module.conv.bias[...], own.bias[...])
    norm = nn.BatchNorm(use_bias=False, use_scale=False, momentum=0.9)
    normalized, _ = train(norm, fresh(norm, x), x)
    close(train(BNET(**options), variables, x)[0], conv.apply({"params": expected["conv"]}, normalized))


@pytest.mark.parametrize(
    ("options", "rank"), [({}, 2), ({"use_bias": False, "axis": 1}, 2), ({"use_scale": False}, 1)]
)
def test_bnet_in_the_place_of_a_batch_norm_equals_it(options: Any, rank: int) -> None:
    options = {"momentum": 0.7, "epsilon": 0.1} | options
    axis = options.get("axis", -1)
    x, later = (jnp.moveaxis(normal(4, *(5,) * rank, 3, seed=seed), -1, axis) for seed in (0, 1))
    norm = nn.Sequential([nn.BatchNorm(**options)])
    module = nnx.Sequential(nnx.BatchNorm(3, **options, rngs=nnx.Rngs(0)))
    variables = fresh(norm, x)
    variables = variables | {"params": jax.tree.map(lambda value: value + 0.3, variables["params"])}
    for name, value in variables["params"]["layers_0"].items():
        getattr(module.layers[0], name)[...] = value
    _, variables = train(norm, variables, x)
    module(x)
    wanted = {"preserve": True, "kernel_size": 5, "spatial_dims": rank}
    layer, converted, _ = convert(norm, variables, "bnet", init=lambda: fresh(norm, x), **wanted)
    rbn_flax.nnx.convert(module, "bnet", **wanted)
    (new,) = module.layers
    assert type(new) is rbn_flax.nnx.BNET
    expected = norm.apply(variables, later, use_running_average=True)
    close(layer.apply(converted, later, use_running_average=True), expected)
    close(new(later, use_running_average=True), expected)
    expected, variables = train(norm, variables, later)
    y, converted = train(layer, converted, later)
    close(y, expected)
    close(new(later), expected)
    stats = converted["batch_stats"]["layers_0"]
    assert stats.pop("num_batches_tracked") == 1
    close(stats, variables["batch_stats"]["layers_0"])
    close(new.var[...], stats["var"])


def test_bnet_in_the_place_of_a_batch_norm_takes_over_dtypes_and_mode() -> None:
    norm = nnx.BatchNorm(3, param_dtype=jnp.bfloat16, dtype=jnp.float16, rngs=nnx.Rngs(0))
    model = nnx.Sequential(norm)
    model.eval()
    rbn_flax.nnx.convert(model, "bnet", preserve=True)
    (layer,) = model.layers
    assert layer.conv.kernel.dtype == jnp.bfloat16
    assert layer(normal(2, 4, 4, 3)).dtype == jnp.float16
    assert layer.num_batches_tracked[...] == 0


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_bnet_and_iebn_take_any_axis(axis: int) -> None:
    x = normal(3, 4, 5, 2)
    for expected, moved in ((BNET(), BNET(axis=axis)), (IEBN(), IEBN(axis=axis))):
        variables = fresh(expected, x)
        y, _ = train(moved, variables, jnp.moveaxis(x, -1, axis))
        close(jnp.moveaxis(y, axis, -1), train(expected, variables, x)[0])


def test_bnet_convolves_in_float32_and_rounds_once() -> None:
    x = normal(4, 6, 6, 3).astype(jnp.bfloat16)
    variables = fresh(BNET(), x)
    y, _ = train(BNET(), variables, x)
    wide, _ = train(BNET(), variables, x.astype(jnp.float32))
    assert y.dtype == jnp.bfloat16
    equal(y, wide.astype(jnp.bfloat16))


def test_inputs_that_bnet_refuses() -> None:
    with pytest.raises(RBNValueError, match="BNET: expected an input with 2 spatial axes"):
        fresh(BNET(), normal(2, 4, 3))
    with pytest.raises(RBNValueError, match="BNET: expected an input with 2 spatial axes"):
        rbn_flax.nnx.BNET(3, rngs=nnx.Rngs(0))(normal(2, 4, 3))
    variables = fresh(BNET(), normal(2, 4, 4, 3))
    with pytest.raises(RBNValueError, match="BNET: expected 3 channels"):
        train(BNET(), variables, normal(2, 4, 4, 5))


def test_bnet_weights_move_between_linen_and_nnx() -> None:
    x = normal(2, 4, 5, 3)
    module = rbn_flax.nnx.BNET(3, rngs=nnx.Rngs(3))
    state = to_numpy(module)
    assert state["conv_weight"].shape == (3, 1, 3, 3)
    variables, _ = from_numpy(BNET(), state)
    equal(variables["params"]["conv"]["kernel"], module.conv.kernel[...])
    other = rbn_flax.nnx.BNET(3, rngs=nnx.Rngs(4))
    from_numpy(other, to_numpy(variables))
    close(other(x), module(x))


# Linen


def test_batch_norm_variables_load_into_linen() -> None:
    x = normal(4, 5, 5, 3)
    norm = nn.BatchNorm(momentum=0.9)
    _, loaded = train(norm, fresh(norm, x), x)
    params = fresh(RBN(), x)["params"] | loaded["params"]
    variables = {"params": params, "batch_stats": loaded["batch_stats"]}
    expected = norm.apply(loaded, x, use_running_average=True) * jax.nn.sigmoid(1.0)
    close(RBN().apply(variables, x, use_running_average=True), expected)
    _, updated = RBN().apply(variables, x, use_running_average=True, mutable=STATS)
    assert "num_batches_tracked" not in updated["batch_stats"]
    _, trained = train(RBN(), variables, x)
    assert trained["batch_stats"]["num_batches_tracked"] == 1


def test_linen_initialization_leaves_the_statistics_at_their_start() -> None:
    one_value = jnp.full((1, 1, 1, 3), 7.0)
    state = to_numpy(fresh(RBN(), one_value))
    np.testing.assert_array_equal(state["running_mean"], np.zeros(3))
    np.testing.assert_array_equal(state["running_var"], np.ones(3))
    assert state["num_batches_tracked"] == 0
    evaluating = RBN(use_running_average=True).init(jax.random.key(0), one_value)
    assert "num_batches_tracked" in evaluating["batch_stats"]


def test_linen_needs_to_be_told_the_mode_once() -> None:
    x = normal(2, 3)
    with pytest.raises(ValueError, match="use_running_average"):
        RBN().init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="use_running_average"):
        RBN(use_running_average=True).init(jax.random.key(0), x, use_running_average=True)


def test_linen_refuses_another_channel_count_and_none() -> None:
    variables = fresh(RBN(), normal(2, 4, 4, 3))
    with pytest.raises(RBNValueError, match=r"expected 3 channels on axis 3, got .* \(2, 4, 4, 5\)"):
        train(RBN(), variables, normal(2, 4, 4, 5))
    with pytest.raises(RBNValueError, match="positive integer, got 0"):
        fresh(RBN(), jnp.ones((2, 4, 4, 0)))


def test_other_collections_do_not_pass_for_the_channel_count() -> None:
    x = normal(4, 2, 2, 3)
    variables = {"cache": {"a": jnp.ones(5)}} | fresh(RBN(), x)
    y, _ = train(RBN(), variables, x)
    assert y.shape == x.shape


def test_evaluation_in_linen_needs_no_mutable_collection_and_training_does() -> None:
    x = normal(4, 5, 5, 3)
    variables = fresh(RBN(), x)
    RBN(use_running_average=True).apply(variables, x)
    with pytest.raises(Exception, match="immutable"):
        RBN(use_running_average=False).apply(variables, x)


def test_linen_under_jit_and_scan_and_vmap() -> None:
    layer = RBN(use_running_average=False)
    batches = normal(3, 4, 5, 5, 2)
    variables = fresh(RBN(), batches[0])
    expected = variables
    for x in batches:
        last, expected = train(RBN(), expected, x)

    def step(variables: Any, x: jax.Array) -> Any:
        y, updated = layer.apply(variables, x, mutable=STATS)
        return variables | updated, y

    scanned, ys = jax.jit(functools.partial(jax.lax.scan, step))(variables, batches)
    close(scanned, expected)
    close(ys[-1], last)
    ensemble, _ = jax.vmap(step, in_axes=(None, 0))(variables, batches)
    close(jax.tree.map(lambda leaf: leaf[0], ensemble), step(variables, batches[0])[0])


class Twice(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        norm = functools.partial(RBN, use_running_average=False, epsilon=1e-4)()
        return nn.remat(lambda norm, x: norm(x))(norm, norm(x))


def test_a_linen_layer_can_be_used_twice_in_one_step() -> None:
    x = normal(4, 5, 5, 3)
    variables = Twice().init(jax.random.key(0), x)
    _, updated = Twice().apply(variables, x, mutable=STATS)
    assert updated["batch_stats"]["RBN_0"]["num_batches_tracked"] == 2


def test_linen_variables_survive_serialization() -> None:
    x = normal(4, 5, 5, 3)
    start = fresh(RBN(), x)
    _, variables = train(RBN(), start, x)
    equal(serialization.from_bytes(start, serialization.to_bytes(variables)), variables)
    assert pickle.loads(pickle.dumps(RBN(centering=None))) == RBN(centering=None)


def test_partitioned_parameters_are_read_through_their_box() -> None:
    layer = RBN(scale_init=nn.with_partitioning(nn.initializers.ones, ("channels",)))
    x = normal(4, 5, 5, 3)
    variables = fresh(layer, x)
    assert isinstance(variables["params"]["scale"], nn.Partitioned)
    y, variables = train(layer, variables, x)
    close(y, train(RBN(), fresh(RBN(), x), x)[0])
    np.testing.assert_array_equal(to_numpy(variables)["gamma"], np.ones(3))


# NNX


def test_a_batch_norm_state_loads_into_nnx() -> None:
    x = normal(4, 5, 5, 3)
    norm = nnx.BatchNorm(3, momentum=0.9, rngs=nnx.Rngs(0))
    norm(x)
    layer = nnx_rbn(3)
    nnx.update(layer, nnx.state(norm))
    norm.eval(), layer.eval()
    close(layer(x), norm(x) * jax.nn.sigmoid(1.0))


def test_evaluation_in_nnx_leaves_every_statistic_alone() -> None:
    layer = nnx_rbn(3)
    layer.eval()
    before = to_numpy(layer)
    layer(normal(4, 5, 5, 3))
    equal(to_numpy(layer), before)
    layer(normal(4, 5, 5, 3), use_running_average=False)
    assert layer.num_batches_tracked[...] == 1


def test_nnx_reads_momentum_and_epsilon_when_called() -> None:
    x = normal(4, 5, 5, 3)
    layer = nnx_rbn(3)
    layer.momentum, layer.epsilon = 0.0, 3.0
    y = layer(x)
    close(layer.mean[...], x.mean((0, 1, 2)))
    close(y.std((0, 1, 2)), jax.nn.sigmoid(1.0) * np.sqrt(x.var((0, 1, 2)) / (x.var((0, 1, 2)) + 3)))


def test_nnx_trains_under_jit_with_the_layer_in_a_network() -> None:
    class Net(nnx.Module):
        def __init__(self) -> None:
            self.norm = nnx_rbn(3)

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.norm(self.norm(x))

    net = Net()
    x = normal(4, 5, 5, 3)

    @nnx.jit
    def step(net: Net, x: jax.Array) -> Any:
        return nnx.grad(lambda net: jnp.square(net(x) - 1).sum())(net)

    gradients = nnx.to_pure_dict(step(net, x))["norm"]
    assert set(gradients) == {"scale", "bias", "center_weight", "scale_weight", "scale_bias"}
    assert net.norm.num_batches_tracked[...] == 2
    assert not np.allclose(net.norm.mean[...], 0)


def test_frozen_nnx_parameters_get_no_gradient() -> None:
    layer = nnx_rbn(3)
    chosen = nnx.All(nnx.Param, nnx.Not(nnx.PathContains("center_weight")))
    gradients = nnx.grad(
        lambda layer: jnp.square(layer(normal(4, 5, 5, 3)) - 1).sum(), argnums=nnx.DiffState(0, chosen)
    )(layer)
    assert set(nnx.to_pure_dict(gradients)) == {"scale", "bias", "scale_weight", "scale_bias"}


def test_the_nnx_layer_splits_merges_and_clones() -> None:
    layer = nnx_rbn(3, use_scale=False, scaling=None)
    x = normal(4, 5, 5, 3)
    layer(x)
    graphdef, params, stats = nnx.split(layer, nnx.Param, nnx.BatchStat)
    assert set(params) == {"bias", "center_weight"}
    assert set(stats) == {"mean", "var", "num_batches_tracked"}
    equal(nnx.merge(graphdef, params, stats)(x), nnx.clone(layer)(x))


def test_printing_shows_every_option() -> None:
    assert "centering = 'channel_std'" in repr(RBN(centering="channel_std"))
    assert "centering='channel_std'" in repr(nnx_rbn(3, centering="channel_std"))


# Weights


def test_the_layers_without_parameters() -> None:
    options = {"use_bias": False, "use_scale": False, "centering": None, "scaling": None}
    x = normal(4, 5, 5, 3)
    module = nnx_rbn(3, **options)
    assert set(to_numpy(module)) == {"running_mean", "running_var", "num_batches_tracked"}
    norm = nn.BatchNorm(use_bias=False, use_scale=False)
    expected, _ = train(norm, fresh(norm, x), x)
    variables, _ = from_numpy(RBN(**options), to_numpy(module))
    close(train(RBN(**options), variables, x)[0], expected)
    close(module(x), expected)


def test_variables_from_numpy_are_those_of_init() -> None:
    layer = RBN(param_dtype=jnp.bfloat16)
    variables = fresh(layer, normal(4, 5, 5, 3))
    loaded, _ = from_numpy(layer, to_numpy(variables))
    equal(loaded, variables)
    assert jax.tree.map(jnp.result_type, loaded) == jax.tree.map(jnp.result_type, variables)


def test_a_state_that_does_not_fit_lists_every_fault_and_changes_nothing() -> None:
    module = nnx_rbn(3)
    before = to_numpy(module)
    state = {name: value + 1 for name, value in before.items() if name != "beta"}
    state |= {"gamma": np.ones(4), "surprise": np.ones(3)}
    for layer in (RBN(), module):
        with pytest.raises(RBNValueError, match="missing beta; unexpected surprise; gamma of shape"):
            from_numpy(layer, state)
    equal(to_numpy(module), before)
    with pytest.raises(RBNValueError, match="missing gamma"):
        from_numpy(RBN(), {})


def test_to_numpy_takes_no_linen_module() -> None:
    with pytest.raises(RBNTypeError, match="a linen module stores nothing itself"):
        to_numpy(RBN())


def test_to_numpy_gives_copies() -> None:
    module = nnx_rbn(3)
    variables = fresh(RBN(), normal(2, 3))
    for layer in (module, variables):
        to_numpy(layer)["gamma"][:] = 7
        np.testing.assert_array_equal(to_numpy(layer)["gamma"], np.ones(3))
