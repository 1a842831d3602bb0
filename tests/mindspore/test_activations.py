"""What every layer does, and where two MindSpore models part."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn, ops

from rbn.backends.mindspore import RBN, activations
from rbn_core import RBNValueError
from rbn_core.activations import compare

X = ms.Tensor(np.random.default_rng(0).normal(size=(2, 3, 14, 14)).astype(np.float32))


class Net(nn.Cell):
    """A convolution, a layer of ours, pooling as a function, and a convolution."""

    def __init__(self, mode="pad", padding=1, pool="valid"):
        super().__init__()
        rng = np.random.default_rng(0)
        self.conv1 = nn.Conv2d(3, 4, 3, stride=2, pad_mode=mode, padding=padding)
        self.bn1 = RBN(4)
        self.pool = ops.MaxPool(kernel_size=3, strides=2, pad_mode=pool)
        self.conv2 = nn.Conv2d(4, 4, 1)
        for parameter in (self.conv1.weight, self.conv2.weight):
            parameter.set_data(ms.Tensor(rng.normal(size=parameter.shape).astype(np.float32)))

    def construct(self, x):
        x = self.pool(self.bn1(self.conv1(x)))[:, :, :3, :3]
        return self.conv2(x)


def run(**options):
    return lambda x: activations(Net(**options).set_train(False), x)


def test_every_layer_is_noted_in_order():
    found = run()(X)
    assert list(found) == ["conv1", "bn1", "conv2", ""]
    assert found["bn1"].kind == "RBN"
    np.testing.assert_array_equal(found["bn1"].input, found["conv1"].output)


def test_another_padding_is_found_where_it_is():
    found = compare(run(), run(mode="same", padding=0), X)
    assert (found.layer, found.before) == ("conv1", False)
    assert "'same'" in found.causes


def test_another_pooling_is_found_before_the_next_layer():
    found = compare(run(), run(pool="same"), X)
    assert (found.layer, found.before) == ("conv2", True)
    assert "pooling" in found.causes
    assert compare(run(), run(), X).layer is None


def test_a_graph_is_refused():
    ms.set_context(mode=ms.GRAPH_MODE)
    try:
        with pytest.raises(RBNValueError, match="expected a model that runs operation by operation"):
            run()(X)
    finally:
        ms.set_context(mode=ms.PYNATIVE_MODE)
