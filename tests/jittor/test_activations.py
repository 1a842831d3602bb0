"""What every layer does, and where two Jittor models part."""

import numpy as np

from rbn.backends.jittor import RBN, activations

# After the backend, which prepares what Jittor reads at its import.
# isort: split
import jittor as jt
from jittor import nn

from rbn_core.activations import compare

X = np.random.default_rng(0).normal(size=(2, 3, 16, 16)).astype(np.float32)


class Net(nn.Module):
    """A convolution, a layer of ours, pooling as a function, and a convolution."""

    def __init__(self, shift=0, pool=0):
        rng = np.random.default_rng(0)
        self.conv1 = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.bn1 = RBN(4)
        self.conv2 = nn.Conv2d(4, 4, 1)
        self.shift, self.pool = shift, pool
        for layer in (self.conv1, self.conv2):
            layer.weight.assign(rng.normal(size=layer.weight.shape).astype(np.float32))
            layer.bias.assign(rng.normal(size=layer.bias.shape).astype(np.float32))
        if shift:
            self.conv1.padding = (0, 0)

    def execute(self, x):
        x = nn.pad(x, [0, 2, 0, 2]) if self.shift else x
        x = self.bn1(self.conv1(x))
        x = nn.pool(x, 3, "maximum", padding=self.pool, stride=2)[:, :, :3, :3]
        return self.conv2(x)


def run(**options):
    def call(x):
        net = Net(**options)
        net.eval()
        return activations(net, jt.array(x))

    return call


def test_every_layer_is_noted_in_order():
    found = run()(X)
    assert list(found) == ["conv1", "bn1", "conv2", ""]
    assert found["bn1"].kind == "RBN"
    np.testing.assert_array_equal(found["bn1"].input, found["conv1"].output)


def test_layers_are_as_they_were_afterwards():
    net = Net()
    activations(net, jt.array(X))
    assert "execute" not in vars(net)
    assert "execute" not in vars(net.conv1)


def test_another_padding_is_found_where_it_is():
    found = compare(run(), run(shift=1), X)
    assert (found.layer, found.before) == ("conv1", True)  # padded before the layer
    assert "padding before a convolution" in found.causes


def test_another_pooling_is_found_before_the_next_layer():
    found = compare(run(), run(pool=1), X)
    assert (found.layer, found.before) == ("conv2", True)
    assert "pooling" in found.causes
    assert compare(run(), run(), X).layer is None
