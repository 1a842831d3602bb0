"""What every layer does, and where two Flax models part: linen and NNX."""

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax import nnx

from rbn.backends.flax import RBN, activations
from rbn.backends.flax.nnx import RBN as NNXRBN
from rbn.backends.flax.nnx import activations as nnx_activations
from rbn_core.activations import compare

X = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)
SAME, EVEN = "SAME", ((1, 1), (1, 1))


class Net(nn.Module):
    """A convolution, a layer of ours, pooling as a function, and a dense layer."""

    padding: object = EVEN
    pool: object = "VALID"

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), strides=2, padding=self.padding, name="conv1")(x)
        x = RBN(use_running_average=True, name="bn1")(x)
        x = nn.max_pool(x, (3, 3), (2, 2), self.pool)[:, :3, :3]
        return nn.Dense(5, name="fc")(x)


class NNXNet(nnx.Module):
    """The same in NNX."""

    def __init__(self, padding=EVEN, pool="VALID"):
        rngs = nnx.Rngs(0)
        self.conv1 = nnx.Conv(3, 4, (3, 3), strides=2, padding=padding, rngs=rngs)
        self.bn1 = NNXRBN(4, use_running_average=True, rngs=rngs)
        self.fc = nnx.Linear(4, 5, rngs=rngs)
        self.pool = pool

    def __call__(self, x):
        x = nn.max_pool(self.bn1(self.conv1(x)), (3, 3), (2, 2), self.pool)[:, :3, :3]
        return self.fc(x)


def linen(**options):
    variables = Net().init(jax.random.key(0), X)
    return lambda x: activations(Net(**options), variables, x)


def new(**options):
    return lambda x: nnx_activations(NNXNet(**options), x)


@pytest.fixture(params=[linen, new], ids=["linen", "nnx"])
def build(request):
    return request.param


def test_every_layer_is_noted_in_order(build):
    found = build()(X)
    assert list(found) == ["conv1", "bn1", "fc", ""]
    assert found["bn1"].kind == "RBN"
    assert found[""].output.shape == (2, 3, 3, 5)
    np.testing.assert_array_equal(found["bn1"].input, found["conv1"].output)


def test_calls_are_as_they_were_afterwards():
    call = nnx.Linear.__call__
    new()(X)
    assert nnx.Linear.__call__ is call


def test_another_padding_is_found_where_it_is(build):
    found = compare(build(), build(padding=SAME), X)
    assert (found.layer, found.before) == ("conv1", False)
    assert "SAME" in found.causes


def test_another_pooling_is_found_before_the_next_layer(build):
    found = compare(build(), build(pool=EVEN), X)
    assert (found.layer, found.before) == ("fc", True)
    assert "pooling" in found.causes
    assert compare(build(), build(), X).layer is None
