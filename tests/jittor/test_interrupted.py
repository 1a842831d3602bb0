"""After an exception inside of a gradient a layer goes on as a new one that was given the same steps."""

import numpy as np
import pytest

from rbn.backends.jittor import BNET, IEBN, RBN, from_numpy, to_numpy

# After the backend, which prepares what Jittor reads at its import.
# isort: split
import jittor as jt
from jittor import nn

from rbn_core.errors import RBNValueError

LAYERS = {
    "rbn": lambda: RBN(3),
    "plain": lambda: RBN(3, fused=False),
    "iebn": lambda: IEBN(3),
    "bnet": lambda: BNET(3),
    "spatial": lambda: RBN(3, scaling="spatial_std", momentum=None),
}


class Interrupted(BaseException):
    """What a user's Ctrl+C raises, under a name of its own: pytest ends at a KeyboardInterrupt."""


def images(channels=3, seed=0):
    return jt.array(np.random.default_rng(seed).normal(3, 2, (4, channels, 5, 5)).astype("float32"))


def right(layer, x):
    return layer(x)


def refused(layer, x):
    return layer(images(2))


def own_mistake(layer, x):
    layer(x)
    raise ValueError("the user's own")


def interrupted_forward(layer, x):
    layer.register_forward_hook(interrupt)
    try:
        return layer(x)
    finally:
        layer.remove_forward_hook()


def interrupted_backward(layer, x):
    return Interrupting.apply(layer(x))


class Interrupting(jt.Function):
    def execute(self, y):
        return y

    def grad(self, dy):
        interrupt()


def interrupt(*_):
    raise Interrupted


FAILURES = {
    refused: RBNValueError,
    own_mistake: ValueError,
    interrupted_forward: Interrupted,
    interrupted_backward: Interrupted,
}


def eager(run, layer, x):
    with jt.flag_scope(lazy_execution=0):
        return lazy(run, layer, x)


def lazy(run, layer, x):
    y = run(layer, x)
    weights = [weight for weight in layer.parameters() if weight.requires_grad]
    return [value.numpy() for value in (y, *jt.grad((y * y * y).sum(), [x, *weights]))]


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("way", [lazy, eager])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_goes_on_after_an_exception(name, way, failure):
    layer, fresh, norm, other = LAYERS[name](), LAYERS[name](), nn.BatchNorm(3), nn.BatchNorm(3)
    from_numpy(fresh, to_numpy(layer))  # a convolution starts at random
    flags = {flag: getattr(jt.flags, flag) for flag in ("no_grad", "amp_reg", "lazy_execution")}
    if failure is not refused:
        fresh(images()), other(images())
    for each in (layer, norm):
        x = images()
        with pytest.raises(Exception if failure is refused and each is norm else FAILURES[failure]):
            way(failure, each, x)
    assert flags == {flag: getattr(jt.flags, flag) for flag in flags}
    np.testing.assert_array_equal(norm.running_mean.numpy(), other.running_mean.numpy())
    assert_equal(to_numpy(layer).values(), to_numpy(fresh).values())
    assert_equal(*(way(right, each, images(seed=1)) for each in (layer, fresh)))
    assert_equal(to_numpy(layer).values(), to_numpy(fresh).values())


def assert_equal(found, expected):
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)
