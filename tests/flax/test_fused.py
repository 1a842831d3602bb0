"""The custom calls give what the plain form gives: outputs, gradients and gradients of gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import enable_x64

from rbn import kernels
from rbn.backends.flax import functional, fused
from rbn.kernels.library import PARAMETERS

pytestmark = pytest.mark.skipif(bool(kernels.problem()), reason=kernels.problem())

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
    parameters = {name: jnp.asarray(rng.normal(size=5), wide) for name in PARAMETERS if name not in absent}
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


def test_forward_mode_is_refused():
    (x, *others), _, options = layer_and_input("channel_mean", "channel_mean", -1, True)
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(lambda x: fused.rbn(x, *others, **options)[0], (x,), (x,))


def test_what_it_takes():
    (x, parameters, _), _, _ = layer_and_input("channel_mean", "channel_mean", -1, True)
    options = {"axis": -1, "centering": "channel_mean", "scaling": None}
    assert fused.takes(x, parameters, **options)
    for changed in (
        {"axis": 2},
        {"centering": "spatial_mean"},
        {"scaling": "spatial_std"},
    ):
        assert not fused.takes(x, parameters, **options | changed)
    assert not fused.takes(x[:0], parameters, **options)
    assert not fused.takes(x.astype(jnp.float32), parameters, **options)
