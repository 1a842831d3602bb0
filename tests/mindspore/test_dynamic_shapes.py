"""`set_inputs` with open extents: what BatchNorm does with one graph for all shapes, the layers do."""

import os

os.environ.setdefault("GLOG_v", "4")

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

import rbn_core
from rbn.backends.mindspore import BNET, IEBN, RBN, distributed, from_numpy, to_numpy

LAYERS = {
    "BatchNorm2d": lambda fused: nn.BatchNorm2d(3),
    "RBN": lambda fused: RBN(3, fused=fused),
    "spatial": lambda fused: RBN(
        3, centering="channel_std", scaling="spatial_std", running_var="biased", fused=fused
    ),
    "IEBN": lambda fused: IEBN(3, momentum=None, fused=fused),
    "BNET": lambda fused: BNET(3, fused=fused),
}
rng = np.random.default_rng(0)
IMAGES = [Tensor(rng.normal(1, 2, shape).astype(np.float32)) for shape in ((4, 3, 5, 5), (2, 3, 6, 7))]


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def graph_mode():
    ms.set_context(mode=ms.GRAPH_MODE)
    yield
    ms.set_context(mode=ms.PYNATIVE_MODE)


class Loss(nn.Cell):
    """A number that depends on every value of Y differently."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def construct(self, x):
        y = self.layer(x)
        return (y * y * y).sum() + (y * x).sum()


def open_loss(layer):
    """The loss of a layer for images of any extent."""
    loss = Loss(layer).set_train(layer.training)
    loss.set_inputs(Tensor(shape=[None, 3, None, None], dtype=ms.float32))
    return loss


def twins(name, fused, training):
    """Two layers none of whose numbers is special; the first takes images of every shape."""
    open_one, fixed = LAYERS[name](fused).set_train(training), LAYERS[name](fused).set_train(training)
    numbers = np.random.default_rng(1)
    state = {
        key: value if value.ndim == 0 else value + numbers.uniform(0.1, 0.5, value.shape)
        for key, value in to_numpy(fixed).items()
    }
    for layer in (open_one, fixed):
        from_numpy(layer, state)
    return open_one, fixed


def assert_same(open_one, fixed, mode):
    """Both give the same on images of two shapes, and have the same state then."""
    found = ms.value_and_grad(open_loss(open_one), 0, open_one.trainable_params())
    due = ms.value_and_grad(Loss(fixed).set_train(fixed.training), 0, fixed.trainable_params())
    for x in IMAGES:
        expected = due(x)
        ms.set_context(mode=mode)
        result = found(x)
        ms.set_context(mode=ms.PYNATIVE_MODE)
        for value, wanted in zip(flat(result), flat(expected), strict=True):
            assert np.abs(value - wanted).max() <= 2e-5 * np.abs(wanted).max()
    for key, value in to_numpy(fixed).items():
        np.testing.assert_allclose(to_numpy(open_one)[key], value, rtol=1e-5, atol=1e-6, err_msg=key)


def flat(result):
    """The loss, and the gradients of the image and the parameters."""
    loss, (dx, gradients) = result
    return [tensor.asnumpy() for tensor in (loss, dx, *gradients)]


@pytest.mark.meeting(
    "`set_inputs` with open shapes",
    "works",
    "net.set_inputs(ms.Tensor(shape=[None, 8, None, None], dtype=ms.float32))",
)
@pytest.mark.parametrize(
    ("name", "fused", "training"),
    [
        ("BatchNorm2d", True, True),
        ("RBN", True, True),
        ("RBN", False, True),
        ("RBN", True, False),
        ("spatial", True, False),
        ("IEBN", True, True),
        ("BNET", True, True),
    ],
)
def test_one_graph_takes_images_of_every_shape(name, fused, training) -> None:
    assert_same(*twins(name, fused, training), ms.GRAPH_MODE)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
@pytest.mark.parametrize("name", LAYERS)
def test_pynative_takes_them_too(name, fused) -> None:
    assert_same(*twins(name, fused, True), ms.PYNATIVE_MODE)


@pytest.mark.parametrize("shape", [[None, None, 5, 5], None])
def test_a_graph_for_any_number_of_channels_is_refused(shape, graph_mode) -> None:
    layer = RBN(1)  # its one channel would be taken for all three
    layer.set_inputs(Tensor(shape=shape, dtype=ms.float32))
    with pytest.raises(rbn_core.RBNValueError, match=r"number of axes and of channels to be known"):
        layer(IMAGES[0])


def test_one_value_for_a_channel_makes_the_variance_nan_as_batch_norms(graph_mode) -> None:
    for layer in (nn.BatchNorm2d(3), RBN(3)):
        layer.set_train().set_inputs(Tensor(shape=[None, 3, None, None], dtype=ms.float32))
        layer(Tensor(np.ones((1, 3, 1, 1), np.float32)))
        assert np.isnan(layer.moving_variance.asnumpy()).all()


def test_processes_that_share_a_batch_must_know_its_shape() -> None:
    distributed.check_shape((4, 3, 5, 5), "RBN")
    with pytest.raises(rbn_core.RBNValueError, match="expected a known shape to train with sync=True"):
        distributed.check_shape((None, 3, 5, 5), "RBN")
