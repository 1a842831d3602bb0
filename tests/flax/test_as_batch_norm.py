"""Where BatchNorm works, the layers do: stored arrays, masks, views, dtypes, vmap, sharded images."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, serialization
from jax import export
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import rbn.backends.flax as rbn_flax
from rbn.backends.flax import BNET, IEBN, RBN, convert, from_numpy, fused, to_numpy
from rbn_core import RBNError, RBNTypeError, RBNValueError, reference
from rbn_core.config import Config

STATS = ["batch_stats"]
OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("RBN", {}),
    ("RBN", {"centering": "channel_std", "scaling": "channel_std"}),
    ("RBN", {"centering": "spatial_std", "scaling": "spatial_mean"}),
    ("IEBN", {}),
]


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def state_of(name: str, channels: int = 3, **options: Any) -> dict[str, Any]:
    """A state that no mistake hides in."""
    module = getattr(rbn_flax.nnx, name)(channels, rngs=nnx.Rngs(0), **options)
    rng = np.random.default_rng(0)
    state = {key: rng.uniform(0.5, 1.5, value.shape) for key, value in to_numpy(module).items()}
    return state | {"num_batches_tracked": np.array(3)}


def linen(name: str, **options: Any) -> tuple[Any, Any]:
    layer = getattr(rbn_flax, name)(**options)
    return layer, from_numpy(layer, state_of(name, **options))[0]


def nnx_module(name: str, **options: Any) -> Any:
    module = getattr(rbn_flax.nnx, name)(3, rngs=nnx.Rngs(0), **options)
    from_numpy(module, state_of(name, **options))
    return module


def train(layer: Any, variables: Any, x: Any, **call: Any) -> Any:
    return layer.apply(variables, x, use_running_average=False, mutable=STATS, **call)


def close(actual: Any, expected: Any) -> None:
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), actual, expected)


def in_numpy(tree: Any) -> Any:
    return jax.tree.map(np.array, tree)


# Stored arrays


@pytest.mark.parametrize("name", ["RBN", "IEBN", "BNET"])
def test_variables_of_numpy_are_read_and_never_written(name: str) -> None:
    layer, variables = linen(name)
    x = normal(2, 4, 4, 3)
    due = train(layer, variables, x)
    read_only = serialization.from_bytes(variables, serialization.to_bytes(variables))
    assert not read_only["batch_stats"]["num_batches_tracked"].flags.writeable
    mine = in_numpy(variables)
    for given in (read_only, mine):
        close(train(layer, given, x), due)
    jax.tree.map(np.testing.assert_array_equal, mine, variables)


@pytest.mark.parametrize("name", ["RBN", "IEBN", "BNET"])
def test_nnx_variables_of_numpy_are_read_and_never_written(name: str) -> None:
    expected, module = nnx_module(name), nnx_module(name)
    kept = in_numpy(nnx.to_pure_dict(nnx.state(module)))
    before = jax.tree.map(np.copy, kept)
    for array in jax.tree.leaves(kept):
        array.flags.writeable = False
    state = nnx.state(module)
    nnx.replace_by_pure_dict(state, kept)
    nnx.update(module, state)
    x = normal(2, 4, 4, 3)
    close(module(x), expected(x))
    close(to_numpy(module), to_numpy(expected))
    from_numpy(module, state_of(name))
    jax.tree.map(np.testing.assert_array_equal, kept, before)


WRONG = {
    "short": np.ones(2),
    "one": np.ones(1),
    "long": np.ones(6),
    "none": np.ones(0),
    "square": np.ones((3, 3)),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize(
    "own", ["scale", "bias", "center_weight", "scale_weight", "scale_bias", "mean", "var"]
)
def test_a_stored_array_of_another_shape_is_refused(own: str, wrong: str, training: bool) -> None:
    layer, variables = linen("RBN", fused=wrong != "short")
    module = nnx_module("RBN", fused=wrong != "short")
    collection = "batch_stats" if own in ("mean", "var") else "params"
    spoilt = variables | {collection: variables[collection] | {own: jnp.asarray(WRONG[wrong])}}
    setattr(module, own, type(getattr(module, own))(jnp.asarray(WRONG[wrong])))
    before = in_numpy(nnx.to_pure_dict(nnx.state(module)))
    x = normal(2, 4, 4, 3)
    text = rf"RBN: expected {own} of shape \(3,\), got one of shape"
    with pytest.raises(RBNValueError, match=text):
        layer.apply(spoilt, x, use_running_average=not training, mutable=STATS)
    with pytest.raises(RBNValueError, match=text):
        module(x, use_running_average=not training)
    jax.tree.map(np.testing.assert_array_equal, before, in_numpy(nnx.to_pure_dict(nnx.state(module))))


@pytest.mark.parametrize(
    "own", ["scale", "bias", "center_weight", "scale_weight", "scale_bias", "mean", "var"]
)
def test_a_stored_array_that_is_missing_is_refused(own: str) -> None:
    layer, variables = linen("RBN")
    module = nnx_module("RBN")
    collection = "batch_stats" if own in ("mean", "var") else "params"
    rest = {name: value for name, value in variables[collection].items() if name != own}
    setattr(module, own, None)
    text = rf"RBN: expected {own} of shape \(3,\), got None"
    with pytest.raises(RBNValueError, match=text):
        train(layer, variables | {collection: rest}, normal(2, 4, 4, 3))
    if own in ("scale", "bias"):  # as in BatchNorm
        without = nnx_module("RBN")
        getattr(without, own)[...] = jnp.ones(3) if own == "scale" else jnp.zeros(3)
        close(module(normal(2, 4, 4, 3)), without(normal(2, 4, 4, 3)))
        return
    with pytest.raises(RBNValueError, match=text):
        module(normal(2, 4, 4, 3))


def test_the_convolution_of_bnet_must_fit_too() -> None:
    layer, variables = linen("BNET")
    module = nnx_module("BNET")
    conv = variables["params"]["conv"] | {"bias": jnp.ones(1)}
    module.conv.bias = nnx.Param(jnp.ones(1))
    for call in (
        lambda: train(layer, variables | {"params": {"conv": conv}}, normal(2, 4, 4, 3)),
        lambda: module(normal(2, 4, 4, 3)),
    ):
        with pytest.raises(RBNValueError, match=r"BNET: expected conv/bias of shape \(3,\), got one"):
            call()


def test_without_a_counter_an_nnx_layer_trains_on_but_cannot_average_all() -> None:
    module, expected = nnx_module("RBN"), nnx_module("RBN")
    module.num_batches_tracked = None
    x = normal(2, 4, 4, 3)
    close(module(x), expected(x))
    close(module.var[...], expected.var[...])
    module.momentum = None
    with pytest.raises(RBNValueError, match="expected num_batches_tracked with momentum=None"):
        module(x)


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.int32])
def test_a_statistic_of_another_dtype_is_read_as_it_is(dtype: Any) -> None:
    layer, variables = linen("RBN")
    mean = np.array([1, 2, 3], dtype)
    x = normal(2, 4, 4, 3)
    due = train(layer, variables | {"batch_stats": variables["batch_stats"] | {"mean": jnp.float32(mean)}}, x)
    found = train(layer, variables | {"batch_stats": variables["batch_stats"] | {"mean": mean}}, x)
    close(found, due)
    assert found[1]["batch_stats"]["mean"].dtype == jnp.float32


def test_a_counter_of_another_shape_is_refused() -> None:
    layer, variables = linen("RBN", momentum=None)
    stats = variables["batch_stats"] | {"num_batches_tracked": jnp.ones(3, jnp.int32)}
    module = nnx_module("RBN", momentum=None)
    module.num_batches_tracked = nnx.BatchStat(jnp.ones(3, jnp.int32))
    for call in (
        lambda: train(layer, variables | {"batch_stats": stats}, normal(2, 4, 4, 3)),
        lambda: module(normal(2, 4, 4, 3)),
    ):
        with pytest.raises(
            RBNValueError, match=r"expected num_batches_tracked of shape \(\), got one of shape"
        ):
            call()


def test_a_parameter_that_is_no_real_number_is_refused() -> None:
    layer, variables = linen("RBN")
    params = variables["params"] | {"center_weight": np.ones(3, complex)}
    with pytest.raises(RBNTypeError, match="expected center_weight of real numbers, got dtype complex"):
        train(layer, variables | {"params": params}, normal(2, 4, 4, 3))


@pytest.mark.parametrize("in_loops", [True, False])
@pytest.mark.parametrize("option", ["centering", "scaling", "restrict", "running_var", "epsilon", "momentum"])
def test_an_unknown_option_that_was_assigned_is_refused(option: str, in_loops: bool) -> None:
    module = nnx_module("RBN", fused=in_loops)
    setattr(module, option, "typo")
    with pytest.raises(RBNError, match="'typo'"):
        module(normal(2, 4, 4, 3))


def test_the_loops_refuse_what_does_not_fit() -> None:
    if not fused.AVAILABLE:
        pytest.skip("without custom calls")
    x = normal(2, 4, 4, 3)
    layer = fused.Call(3, 1e-5, None, None, "sigmoid", ("gamma",))
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (x.shape, (2, 3), (2, 3), (3,), (3,))]
    call = jax.ffi.ffi_call(fused.TARGETS[0], shapes)
    plan = layer.plan(x)
    call(x, jnp.ones(3), plan=plan)
    for arrays in ((x, jnp.ones(2)), (x[:1], jnp.ones(3)), (x, jnp.ones(3, jnp.float16)), (x,)):
        with pytest.raises(Exception, match="INVALID_ARGUMENT"):
            jax.block_until_ready(call(*arrays, plan=plan))


# BatchNorm's options and calls


def test_a_tuple_of_one_axis_is_that_axis_and_several_are_refused() -> None:
    x = normal(2, 3, 4, 4)
    expected, variables = linen("RBN", axis=1)
    for axis in ((1,), [1], np.int64(1), (-3,)):
        close(train(RBN(axis=axis), variables, x), train(expected, variables, x))
        assert rbn_flax.nnx.RBN(3, axis=axis, rngs=nnx.Rngs(0))(x).shape == x.shape
    close(train(BNET(axis=(1,)), linen("BNET")[1], x), train(BNET(axis=1), linen("BNET")[1], x))
    for build in (RBN, functools.partial(rbn_flax.nnx.RBN, 3, rngs=nnx.Rngs(0))):
        with pytest.raises(RBNValueError, match=r"RBN: expected one channel axis, got axis=\(-2, -1\)"):
            build(axis=(-2, -1))
        with pytest.raises(RBNTypeError, match="expected one channel axis, got axis='last'"):
            build(axis="last")


def test_positional_options_are_in_the_order_of_batch_norm() -> None:
    order = [name for name in nn.BatchNorm.__dataclass_fields__ if name not in ("parent", "name")]
    shared = order[: order.index("axis_index_groups") + 1]
    for layer in (RBN, IEBN):
        fields = layer.__dataclass_fields__
        assert [name for name, field in fields.items() if not field.kw_only][: len(shared)] == shared


def test_nnx_view_switches_the_mode() -> None:
    if not hasattr(nnx, "view"):
        module = nnx_module("RBN")
        module.set_view(use_running_average=True)
        assert module.use_running_average
        return
    model = nnx.Sequential(nnx_module("RBN"), nnx.BatchNorm(3, rngs=nnx.Rngs(0)), nnx_module("BNET"))
    x = normal(2, 4, 4, 3)
    evaluating, before = nnx.view(model, use_running_average=True), to_numpy(model)
    evaluating(x)
    jax.tree.map(np.testing.assert_array_equal, to_numpy(model), before)
    assert [layer.use_running_average for layer in model.layers] == [False] * 3
    assert [layer.use_running_average for layer in evaluating.layers] == [True] * 3


def test_metadata_and_promote_dtype_of_nnx() -> None:
    seen = []

    def promote(arrays: Any, *, dtype: Any) -> Any:
        seen.append((len(arrays), dtype))
        return tuple(None if array is None else jnp.asarray(array, jnp.float32) for array in arrays)

    module = rbn_flax.nnx.RBN(
        3,
        promote_dtype=promote,
        rngs=nnx.Rngs(0),
        scale_metadata={"mine": "gamma"},
        bias_metadata={"mine": "beta"},
    )
    assert (module.scale.mine, module.bias.mine) == ("gamma", "beta")
    x = normal(2, 4, 4, 3).astype(jnp.bfloat16)
    y = module(x)
    assert y.dtype == jnp.float32
    close(y, nnx_rbn_of(x.astype(jnp.float32)))
    assert seen == [(5, None)]


def nnx_rbn_of(x: jax.Array) -> jax.Array:
    return rbn_flax.nnx.RBN(3, rngs=nnx.Rngs(0))(x)


def test_an_nnx_layer_that_is_told_no_mode_says_so() -> None:
    module = rbn_flax.nnx.RBN(3, use_running_average=None, rngs=nnx.Rngs(0))
    with pytest.raises(RBNValueError, match="expected use_running_average in the call or in the layer"):
        module(normal(2, 4, 4, 3))


# Masks


@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_a_mask_leaves_out_what_the_batch_had_not(name: str, options: dict[str, Any]) -> None:
    """The first 3 of 5 rows of 2 of 3 images count: as if these rows were all there is."""
    layer, variables = linen(name, **options)
    module = nnx_module(name, **options)
    x = normal(3, 5, 4, 3)
    mask = jnp.zeros((3, 5, 1, 1), bool).at[:2, :3].set(True)
    dirty = jnp.where(mask, x, jnp.nan)
    for given in (x, dirty):
        y, stats = train(layer, variables, given, mask=mask)
        due, expected = train(layer, variables, x[:2, :3])
        close(y[:2, :3], due)
        close(stats, expected)
    close(nnx.clone(module)(x, mask=mask), train(layer, variables, x, mask=mask)[0])
    assert np.isfinite(train(layer, variables, x, mask=mask)[0]).all()
    evaluated = functools.partial(layer.apply, variables, use_running_average=True)
    close(evaluated(x, mask=mask)[:2, :3], evaluated(x[:2, :3]))


def test_planes_of_unequal_masks_are_weighed_by_their_values() -> None:
    layer, variables = linen("RBN", running_var="unbiased", momentum=0.0)
    x = normal(2, 2, 3, 3) + 5
    mask = jnp.asarray(np.random.default_rng(3).random((2, 2, 3, 3)) < 0.6)
    y, stats = train(layer, variables, x, mask=mask.astype(jnp.int32))
    p = {name: np.asarray(value, float) for name, value in variables["params"].items()}
    for c in range(3):
        planes = [np.asarray(x, float)[n, ..., c][np.asarray(mask)[n, ..., c]] for n in range(2)]
        shifts = [p["center_weight"][c] * plane.mean() for plane in planes]
        calibrated = np.concatenate([plane + shift for plane, shift in zip(planes, shifts, strict=True)])
        close(stats["batch_stats"]["mean"][c], calibrated.mean())
        close(stats["batch_stats"]["var"][c], calibrated.var(ddof=1))
        for n, (plane, shift) in enumerate(zip(planes, shifts, strict=True)):
            x_s = (plane + shift - calibrated.mean()) / np.sqrt(calibrated.var() + 1e-5)
            r = 1 / (1 + np.exp(-(p["scale_weight"][c] * x_s.mean() + p["scale_bias"][c])))
            due = x_s * r * p["scale"][c] + p["bias"][c]
            np.testing.assert_allclose(y[n, ..., c][mask[n, ..., c]], due, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("running_var", ["unbiased", "biased"])
def test_a_mask_that_leaves_nothing_leaves_the_statistics(running_var: str) -> None:
    layer, variables = linen("RBN", running_var=running_var)
    module = nnx_module("RBN", running_var=running_var)
    x = normal(2, 4, 4, 3)
    mask = jnp.ones((1, 1, 1, 3), bool).at[..., 1].set(False)
    y, stats = train(layer, variables, x, mask=mask)
    module(x, mask=mask)
    _, expected = train(layer, variables, x)
    assert np.isfinite(y).all()
    for name in ("mean", "var"):
        old, new = variables["batch_stats"][name], stats["batch_stats"][name]
        close(new, jnp.asarray(expected["batch_stats"][name]).at[1].set(old[1]))
        close(getattr(module, name)[...], new)
    gradient = jax.grad(lambda x: train(layer, variables, x, mask=jnp.zeros((), bool))[0].sum())(x)
    assert np.isfinite(gradient).all()


def test_a_mask_in_bnet_is_batch_norms() -> None:
    norm = nn.Sequential([nn.BatchNorm(use_fast_variance=False)])
    x = normal(2, 4, 4, 3)
    variables = norm.init(jax.random.key(0), x, use_running_average=False)
    layer, converted, _ = convert(norm, variables, "bnet", preserve=True)
    mask = jnp.asarray(np.random.default_rng(0).random((2, 4, 4, 1)) < 0.5)
    due = train(norm, variables, x, mask=mask)[0]
    close(train(layer, converted, x, mask=mask)[0], due)
    model = nnx.Sequential(nnx.BatchNorm(3, rngs=nnx.Rngs(0), use_fast_variance=False))
    rbn_flax.nnx.convert(model, "bnet", preserve=True)
    close(model.layers[0](x, mask=mask), due)


# Transformations


def calls() -> dict[str, Any]:
    layer, variables = linen("RBN")
    evaluate = functools.partial(layer.apply, variables, use_running_average=True)
    return {
        "plain": evaluate,
        "jit": jax.jit(evaluate),
        "gradient": jax.grad(lambda x: evaluate(x).sum()),
        "gradient of jit": jax.grad(jax.jit(lambda x: evaluate(x).sum())),
        "checkpoint": jax.grad(jax.checkpoint(lambda x: evaluate(x).sum())),
        "training": lambda x: train(layer, variables, x),
    }


@pytest.mark.parametrize("way", list(calls()))
def test_an_image_without_its_batch_under_vmap_is_refused(way: str) -> None:
    for shape in ((4, 5, 5, 3), (4, 5, 3)):
        with pytest.raises(RBNValueError, match="expected an input whose batch axis can be told under vmap"):
            jax.vmap(calls()[way])(normal(*shape))


def test_under_vmap_what_can_be_told_is_right() -> None:
    layer, variables = linen("RBN")
    evaluate = functools.partial(layer.apply, use_running_average=True)
    x = normal(4, 5, 5, 3)
    expected = evaluate(variables, x)
    close(jax.vmap(lambda image: evaluate(variables, image[None])[0])(x), expected)
    sequences = normal(2, 4, 5, 3)
    due = jnp.stack([evaluate(variables, batch) for batch in sequences])
    found = jax.vmap(lambda batch: evaluate(variables, batch[:, None])[:, 0])(sequences)
    close(found, due)
    # An ensemble maps its parameters, too; or it has one input.
    both = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), variables)
    close(jax.vmap(evaluate)(both, sequences), due)
    close(jax.vmap(evaluate, (0, None))(both, sequences[0])[1], due[0])
    jacobian = jax.jacobian(lambda x: evaluate(variables, x).sum((0, 1)))(sequences[0])
    assert jacobian.shape == (3, 4, 5, 3)


def test_the_strictest_promotion_rules() -> None:
    x = normal(2, 4, 4, 3)
    choices = [("RBN", {}), ("RBN", {"fused": False}), OPTIONS[2], ("IEBN", {"momentum": None}), ("BNET", {})]
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        for name, options in choices:
            for image in (x, x.astype(jnp.bfloat16)):
                layer = getattr(rbn_flax, name)(**options)
                variables = layer.init(jax.random.key(0), image, use_running_average=False)

                @jax.jit
                def step(params: Any, layer: Any = layer, variables: Any = variables, x: Any = image) -> Any:
                    y, stats = train(layer, variables | {"params": params}, x)
                    return jnp.square(y).sum(), stats

                jax.grad(step, has_aux=True)(variables["params"])


@pytest.mark.parametrize("training", [True, False])
def test_export_with_symbols_for_every_size(training: bool) -> None:
    layer, variables = linen("RBN")
    run = functools.partial(layer.apply, use_running_average=not training, mutable=STATS if training else [])
    shape = jax.ShapeDtypeStruct(export.symbolic_shape("n,h,w,3"), jnp.float32)
    program = export.export(jax.jit(run))(variables, shape)
    for x in (normal(2, 4, 4, 3), normal(3, 1, 7, 3)):
        close(program.call(variables, x), run(variables, x))


def test_without_jit_and_on_the_hunt_for_nan() -> None:
    layer, variables = linen("RBN")
    x = normal(2, 4, 4, 3)

    def gradient(x: jax.Array) -> Any:
        return jax.grad(lambda x: jnp.sin(train(layer, variables, x)[0]).sum())(x)

    expected = gradient(x)
    with jax.disable_jit():
        close(gradient(x), expected)
    bad = x.at[0, 0, 0, 0].set(jnp.nan)
    with jax.debug_nans(True):
        close(gradient(x), expected)
        for run in (gradient, jax.jit(gradient)):
            with pytest.raises(FloatingPointError, match="nan"):
                run(bad)
        with jax.disable_jit(), pytest.raises(FloatingPointError, match="nan"):
            gradient(bad)


def test_an_axis_that_shares_images_may_be_named_twice() -> None:
    """As BatchNorm's users name it; on one device, several are in test_distributed.py."""
    layer, variables = linen("RBN", axis_name=("batch", "rows"), spatial_axis_name="rows")
    plain, _ = linen("RBN")
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("batch", "rows"))
    x = normal(2, 4, 4, 3)
    step = jax.shard_map(
        lambda x: train(layer, variables, x),
        mesh=mesh,
        in_specs=P("batch", "rows"),
        out_specs=(P("batch", "rows"), P()),
    )
    close(step(x), train(plain, variables, x))


def test_the_reference_is_what_the_masked_layer_was_held_to() -> None:
    layer, variables = linen("RBN")
    x = normal(2, 4, 4, 3)
    oracle = reference.Layer(Config(3))
    oracle.load(state_of("RBN"))
    due = oracle.forward(np.moveaxis(np.asarray(x, float), -1, 1), True)
    close(np.moveaxis(train(layer, variables, x, mask=jnp.ones((), bool))[0], -1, 1), due)
