"""The custom calls give what the plain form gives: outputs, gradients and gradients of gradients."""

import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export
from jax.sharding import PartitionSpec as P

import rbn.backends.flax as rbn_flax
from rbn import kernels
from rbn.backends.flax import functional, fused
from rbn.backends.flax.internals import enable_x64
from rbn.kernels.library import VECTOR_PARAMETERS

pytestmark = pytest.mark.skipif(not fused.AVAILABLE, reason=kernels.problem() or "without custom calls")

OPTIONS = [
    (None, None, 1, True),
    ("channel_mean", "channel_mean", -1, False),
    ("channel_mean", "channel_mean", 1, True),
    ("channel_std", "channel_std", -1, True),
    ("channel_std", "channel_std", 1, False),
    (None, "input_mean", -1, False),
]


@pytest.fixture(autouse=True)
def float64():
    with enable_x64():
        yield


def layer_and_input(centering, scaling, axis, training, dtype="float64"):
    """(x, parameters, running), dY and the options."""
    rng = np.random.default_rng(0)
    wide = np.promote_types(dtype, np.float32)
    absent = {"center_weight"} if centering is None else set()
    absent |= {"scale_weight", "scale_bias"} if scaling is None else set()
    parameters = {
        name: jnp.asarray(rng.normal(size=5), wide) for name in VECTOR_PARAMETERS if name not in absent
    }
    running = (jnp.asarray(rng.normal(size=5), wide), jnp.asarray(rng.uniform(0.5, 2, 5), wide))
    x, dy = jnp.asarray(rng.normal(size=(2, 3, 5, 6, 5)), dtype)
    options = {"centering": centering, "scaling": scaling, "axis": axis, "eps": 1e-3, "restrict": "sigmoid"}
    return (x, parameters, None if training else running), dy, options | {"dtype": None}


def assert_close(some, others, tolerance):
    assert jax.tree.structure(some) == jax.tree.structure(others)
    for one, other in zip(jax.tree.leaves(some), jax.tree.leaves(others), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance * np.abs(other).max(initial=1))


@pytest.mark.parametrize(("centering", "scaling", "axis", "training"), OPTIONS)
def test_outputs_and_gradients_of_both_orders(centering, scaling, axis, training):
    layer, dy, options = layer_and_input(centering, scaling, axis, training)

    def everything(rbn):
        def gradients(layer, dy):
            y, pull, statistics = jax.vjp(lambda *a: split(rbn(*a, **options)), *layer, has_aux=True)
            return (y, pull(dy)), statistics

        def both(layer, dy):
            first, pull, statistics = jax.vjp(gradients, layer, dy, has_aux=True)
            return first, pull(jax.tree.map(jnp.cos, first)), statistics

        return jax.jit(both)(layer, dy)

    assert_close(everything(fused.rbn), everything(functional.rbn), 1e-10)


def split(outputs):
    y, mean, var = outputs
    return y, (mean, var)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_other_dtypes(dtype):
    layer, _, options = layer_and_input("channel_mean", "channel_mean", -1, True, dtype)
    y, mean, var = fused.rbn(*layer, **options)
    due, *statistics = functional.rbn(*layer, **options)
    assert y.dtype == dtype
    unit = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(y.astype(float), due.astype(float), rtol=4 * unit, atol=16 * unit)
    assert_close([mean, var], statistics, 1e-5)


def test_an_output_of_another_dtype_is_not_rounded_before():
    layer, _, options = layer_and_input("channel_mean", "channel_mean", -1, True, "bfloat16")
    options["dtype"] = jnp.float32
    assert_close(fused.rbn(*layer, **options), functional.rbn(*layer, **options), 1e-5)


def test_under_vmap():
    (x, *others), _, options = layer_and_input("channel_mean", "channel_std", -1, True)
    batches = jnp.stack([x, 2 * x + 1])
    found, due = (
        jax.vmap(lambda x, rbn=rbn: rbn(x, *others, **options))(batches)
        for rbn in (fused.rbn, functional.rbn)
    )
    assert_close(found, due, 1e-10)


@pytest.mark.parametrize(("centering", "scaling", "axis", "training"), OPTIONS)
def test_forward_mode(centering, scaling, axis, training):
    layer, dx, options = layer_and_input(centering, scaling, axis, training)
    directions = (dx, *jax.tree.map(jnp.cos, layer[1:]))

    def along(rbn):
        tangent = jax.jit(lambda *layer: jax.jvp(lambda *a: rbn(*a, **options)[0], layer, directions))
        return tangent(*layer), jax.jvp(lambda *layer: tangent(*layer)[1], layer, directions)

    assert_close(along(fused.rbn), along(functional.rbn), 1e-10)


def test_what_it_takes():
    (x, parameters, _), _, _ = layer_and_input("channel_mean", "channel_mean", -1, True)
    options = {"axis": -1, "centering": "channel_mean", "scaling": None, "restrict": "sigmoid"}
    assert fused.takes(x, parameters, **options)
    for changed in (
        {"axis": 2},
        {"centering": "spatial_mean"},
        {"scaling": "spatial_std"},
        {"scaling": "typo"},
        {"restrict": "typo"},
    ):
        assert not fused.takes(x, parameters, **options | changed)
    for other in (x[:0], x.astype(jnp.float32), x[:, 0, 0], x[:, :1, :3]):
        assert not fused.takes(other, parameters, **options)
    assert fused.takes(x[:, :1, :4], parameters, **options)


def linen(name, **options):
    """(variables, x, training) to Y and what is stored, and the variables."""
    layer = getattr(rbn_flax, name)(**options)
    module = getattr(rbn_flax.nnx, name)(4, rngs=nnx.Rngs(0), fused=False)
    rng = np.random.default_rng(1)
    state = {key: rng.uniform(0.5, 1, np.shape(value)) for key, value in rbn_flax.to_numpy(module).items()}
    variables, _ = rbn_flax.from_numpy(layer, state | {"num_batches_tracked": np.array(0)})

    def run(variables, x, training):
        return layer.apply(
            variables, x, use_running_average=not training, mutable=["batch_stats"] if training else []
        )

    return run, variables


def nnx_module(name, **options):
    """The same of an NNX module, with the same numbers."""
    _, variables = linen(name)
    module = getattr(rbn_flax.nnx, name)(4, rngs=nnx.Rngs(0), **options)
    rbn_flax.from_numpy(module, rbn_flax.to_numpy(variables))
    graph, stored = nnx.split(module)

    def run(stored, x, training):
        module = nnx.merge(graph, stored, copy=True)
        return module(x, use_running_average=not training), nnx.state(module, nnx.BatchStat)

    return run, stored


def images(*shape, dtype="float32", seed=2):
    return jnp.asarray(np.random.default_rng(seed).normal(1, size=shape), dtype)


X = (2, 3, 5, 4)


def calls(function, *arguments):
    """How often each custom call is in the program."""
    text = jax.jit(function).lower(*arguments).as_text()
    return [text.count(f"@{name}(") for name in fused.TARGETS]


def losses(run, x, training):
    return lambda stored, x=x: jnp.sum(jnp.sin(run(stored, x, training)[0]))


@pytest.mark.parametrize("idiom", [linen, nnx_module])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["RBN", "IEBN", "BNET"])
def test_a_layer_is_one_call_forward_and_one_backward(name, training, idiom):
    run, stored = idiom(name)
    x = images(*X)
    assert calls(lambda stored, x: run(stored, x, training), stored, x) == [1, 0]
    gradients = jax.grad(losses(run, x, training), (0, 1), allow_int=True)
    assert calls(gradients, stored, x) == [1, 1]


@pytest.mark.parametrize("idiom", [linen, nnx_module])
@pytest.mark.parametrize(
    ("name", "options", "shape"),
    [
        ("RBN", {"fused": False}, X),
        ("IEBN", {"fused": False}, X),
        ("BNET", {"fused": False}, X),
        ("RBN", {"centering": "spatial_mean"}, X),
        ("RBN", {"scaling": "spatial_std"}, X),
        ("RBN", {"param_dtype": jnp.float64}, X),
        ("RBN", {"axis": 2}, (2, 3, 4, 5)),
        ("RBN", {}, (6, 4)),
        ("RBN", {}, (6, 3, 4)),
    ],
)
def test_what_takes_the_operations_of_jax(name, options, shape, idiom):
    run, stored = idiom(name, **options)
    x = images(*shape)
    gradients = jax.grad(losses(run, x, True), (0, 1), allow_int=True)
    assert calls(gradients, stored, x) == [0, 0]


@pytest.mark.parametrize("idiom", [linen, nnx_module])
def test_synchronised_statistics_take_the_operations_of_jax(idiom):
    run, stored = idiom("RBN", axis_name="batch")
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("batch",))

    def program(training):
        step = jax.shard_map(
            lambda stored, x: run(stored, x, training)[0],
            mesh=mesh,
            in_specs=(P(), P("batch")),
            out_specs=P("batch"),
            check_vma=False,
        )
        return str(jax.make_jaxpr(step)(stored, images(*X)))

    assert fused.OPERATIONS.forward.name not in program(training=True)
    assert fused.OPERATIONS.forward.name in program(training=False)  # which shares nothing


def test_without_compiled_loops_the_layers_take_the_operations_of_jax(monkeypatch):
    monkeypatch.setattr(fused, "AVAILABLE", False)
    run, stored = linen("RBN")
    assert calls(lambda stored, x: run(stored, x, True), stored, images(*X)) == [0, 0]


@pytest.mark.parametrize("error", [OSError, AttributeError])
def test_a_library_without_custom_calls_is_as_none(error, monkeypatch):
    def absent(name):
        raise error(name)

    monkeypatch.setattr(fused, "address", absent)
    assert fused._register() is False


@pytest.mark.parametrize("idiom", [linen, nnx_module])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["RBN", "IEBN", "BNET"])
def test_both_forms_are_one_layer(name, training, idiom):
    x = images(*X, dtype="float64")

    def everything(**options):
        run, stored = idiom(name, param_dtype=jnp.float64, **options)
        assert calls(lambda stored, x: run(stored, x, training), stored, x)[0] == options.get("fused", True)
        gradients = jax.grad(losses(run, x, training), (0, 1), allow_int=True)
        again = jax.grad(lambda stored, x: squares(gradients(stored, x)), (0, 1), allow_int=True)
        results = run(stored, x, training), gradients(stored, x), jax.jit(again)(stored, x)
        return [leaf for leaf in jax.tree.leaves(results) if leaf.dtype != jax.dtypes.float0]

    assert_close(everything(), everything(fused=False), 1e-10)


def squares(tree):
    return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(tree) if leaf.dtype != jax.dtypes.float0)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("options", [{}, {"dtype": "float32"}, {"dtype": "bfloat16"}])
@pytest.mark.parametrize("name", ["RBN", "IEBN", "BNET"])
def test_half_precision_is_rounded_once(name, options, dtype):
    x = images(8, 7, 7, 4, dtype=dtype)
    (run, stored), (unrounded, _) = linen(name, **options), linen(name, fused=False)
    for training in (True, False):
        assert calls(lambda stored, x, training=training: run(stored, x, training), stored, x) == [1, 0]
        y, due = run(stored, x, training)[0], unrounded(stored, x.astype("float32"), training)[0]
        assert y.dtype == options.get("dtype", dtype)
        allowed = float(jnp.finfo(y.dtype).eps) / 2 + 1e-5  # that of the one rounding, and float32's own
        np.testing.assert_allclose(y.astype(float), due.astype(float), rtol=allowed, atol=1e-5)


def test_frozen_parts_have_no_gradient():
    run, stored = linen("RBN")
    x = images(*X)

    def gradient(run):
        def loss(scale):
            params = stored["params"] | {"scale": scale}
            return losses(run, x, True)(stored | {"params": params})

        return jax.jit(jax.grad(loss))(stored["params"]["scale"])

    assert_close(gradient(run), gradient(linen("RBN", fused=False)[0]), 1e-4)


def test_under_vmap_and_scan_and_checkpoint():
    x = images(3, *X)

    def everything(**options):
        run, stored = linen("RBN", **options)

        def one(x):
            return run(stored, x, False)[0]

        scanned = jax.lax.scan(lambda _, x: (None, one(x)), None, x)[1]
        remembered = jax.grad(lambda x: jnp.sum(jnp.sin(jax.checkpoint(one)(x))))(x[0])
        return jax.vmap(one)(x), scanned, remembered, jax.vmap(jax.grad(lambda x: one(x).sum()))(x)

    assert_close(everything(), everything(fused=False), 1e-5)


def test_second_derivatives_by_forward_over_reverse():
    x = images(1, 2, 2, 4)

    def hessian(**options):
        run, stored = linen("RBN", **options)
        return jax.hessian(lambda x: losses(run, x, False)(stored))(x)

    assert_close(hessian(), hessian(fused=False), 1e-4)


def test_an_exported_program_needs_nothing_of_this_package():
    run, stored = linen("RBN")
    x = images(*X)
    program = export.export(jax.jit(lambda stored, x: run(stored, x, False)))(stored, x)
    assert "rbn_xla" not in program.mlir_module()
    assert_close(program.call(stored, x), run(stored, x, False), 1e-5)


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_over_one_device(check_vma):
    x = images(*X)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("batch",))

    def gradients(**options):
        run, stored = linen("RBN", **options)
        return jax.shard_map(
            lambda params, x: jax.grad(
                lambda params, x: losses(run, x, False)({**stored, "params": params}), (0, 1)
            )(params, x),
            mesh=mesh,
            in_specs=(P(), P("batch")),
            out_specs=(P(), P("batch")),
            check_vma=check_vma,
        )(stored["params"], x)

    assert_close(gradients(), gradients(fused=False), 1e-5)


def test_explicit_sharding_stays_in_the_type():
    run, stored = linen("RBN")
    mesh = jax.make_mesh((1,), ("batch",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        x = jax.device_put(images(*X), jax.sharding.NamedSharding(mesh, P("batch")))
        assert jax.eval_shape(lambda x: run(stored, x, True)[0], x).sharding.spec[0] == "batch"


def test_a_batch_on_several_devices_is_not_gathered():
    """In a process of its own: the number of devices is fixed when JAX starts."""
    program = textwrap.dedent("""
        import jax
        import jax.numpy as jnp
        from jax.sharding import Mesh, NamedSharding, PartitionSpec

        from rbn.backends.flax import RBN

        assert jax.device_count() == 4
        layer, x = RBN(), jnp.ones((8, 3, 3, 4))
        variables = layer.init(jax.random.key(0), x, use_running_average=True)
        step = jax.jit(lambda x: layer.apply(variables, x, use_running_average=True))
        mesh = Mesh(jax.devices(), ("batch",))
        spread = jax.device_put(x, NamedSharding(mesh, PartitionSpec("batch")))
        for image in (x, spread):
            text = step.lower(image).compile().as_text()
            print("rbn_xla_forward" in text, "all-gather" in text)
    """)
    forced = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    finished = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | forced, capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert finished.stdout.splitlines() == ["True False", "False False"]
