"""After an exception inside of a gradient a layer goes on as a new one that was given the same steps."""

import jax
import numpy as np
import pytest
from flax import nnx

import rbn.backends.flax as rbn_flax
from rbn_core.errors import RBNValueError

LAYERS = {
    "rbn": ("RBN", {}),
    "plain": ("RBN", {"fused": False}),
    "bnet": ("BNET", {"momentum": None}),
}


class Interrupted(BaseException):
    """What a user's Ctrl+C raises, under a name of its own: pytest ends at a KeyboardInterrupt."""


def images(channels=3):
    return 2 * jax.random.normal(jax.random.key(channels), (2, 4, 5, 5, channels)) + 3


def right(call, x):
    return call(x)


def refused(call, x):
    return call(x[..., :2])


def own_mistake(call, x):
    call(x)
    raise ValueError("the user's own")


def interrupted_forward(call, x):
    call(x)
    raise Interrupted


def interrupted_backward(call, x):
    @jax.custom_vjp
    def hook(y):
        return y

    def backward(_, dy):
        raise Interrupted

    hook.defvjp(lambda y: (y, None), backward)
    return hook(call(x))


FAILURES = {
    refused: RBNValueError,
    own_mistake: ValueError,
    interrupted_forward: Interrupted,
    interrupted_backward: Interrupted,
}


def as_it_is(function):
    return function


def mapped(function):
    """Over two batches at once, whose statistics are then two."""
    return jax.jit(jax.vmap(function, in_axes=(None, None, 0)))


@pytest.mark.parametrize("way", [as_it_is, jax.jit, mapped])
@pytest.mark.parametrize("name", LAYERS)
def test_a_linen_layer_goes_on_after_an_exception(name, way):
    kind, options = LAYERS[name]
    layer = getattr(rbn_flax, kind)(use_running_average=False, **options)
    x = images() if way is mapped else images()[0]
    variables = layer.init(jax.random.key(0), images()[0])

    def step(run):
        def loss(params, rest, x):
            statistics = {}

            def call(x):
                y, found = layer.apply({"params": params} | rest, x, mutable=["batch_stats"])
                statistics.update(found)
                return y

            return (run(call, x) ** 3).sum(), statistics

        rest = {"batch_stats": variables["batch_stats"]}
        return way(jax.value_and_grad(loss, (0, 2), has_aux=True))(variables["params"], rest, x)

    expected = step(right)
    for failure, error in FAILURES.items():
        with pytest.raises(error), jax.checking_leaks():
            step(failure)
    assert_equal(step(right), expected)


@pytest.mark.parametrize("way", [as_it_is, nnx.jit])
@pytest.mark.parametrize("name", LAYERS)
def test_an_nnx_layer_goes_on_after_an_exception(name, way):
    kind, options = LAYERS[name]
    layer, fresh = (
        getattr(rbn_flax.nnx, kind)(3, use_running_average=False, **options, rngs=nnx.Rngs(0))
        for _ in range(2)
    )
    norm = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    x = images()[0]

    def step(run, layer):
        def loss(layer, x):
            return (run(layer, x) ** 3).sum()

        return way(nnx.value_and_grad(loss, argnums=(0, 1)))(layer, x)

    for failure, error in FAILURES.items():
        with pytest.raises(TypeError if failure is refused else error):
            step(failure, norm)
        with pytest.raises(error):
            step(failure, layer)
        np.testing.assert_array_equal(norm.mean[...], np.zeros(3))
        assert_equal(state(layer), state(fresh))
    assert_equal(step(right, layer), step(right, fresh))
    assert_equal(state(layer), state(fresh))


def state(layer):
    return nnx.to_pure_dict(nnx.state(layer))


def assert_equal(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
