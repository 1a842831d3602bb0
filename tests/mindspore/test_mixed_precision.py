"""Every way into MindSpore's mixed precision leaves the layers' numbers right, in both modes."""

import os

os.environ.setdefault("GLOG_v", "4")

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, amp, nn, ops

import rbn_core
from rbn.backends.mindspore import BNET, IEBN, RBN, from_numpy, to_numpy
from rbn.conformance.cases import parse
from rbn.conformance.checks import check
from rbn.conformance.subjects.mindspore import MindSpore

WAYS = {
    **{
        level: lambda net, level=level: amp.auto_mixed_precision(net, level)
        for level in ("O1", "O2", "O3", "auto")
    },
    "to_float": lambda net: net.to_float(ms.float16),
    "black list": lambda net: amp.custom_mixed_precision(net, black_list=[nn.LayerNorm]),
    "white list": lambda net: amp.custom_mixed_precision(net, white_list=amp.get_white_list()),
}
REFERENCES = {RBN: rbn_core.RBN, IEBN: rbn_core.IEBN, BNET: rbn_core.BNET}
GRADIENTS = {"conv.weight": "conv_weight", "conv.bias": "conv_bias"}
rng = np.random.default_rng(0)
X, DY = (rng.normal(1, 1, (4, 3, 5, 5)).astype(np.float16) for _ in range(2))


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    """MindSpore writes the code that it rewrites into the working folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(params=[ms.PYNATIVE_MODE, ms.GRAPH_MODE], ids=["pynative", "graph"])
def mode(request):
    ms.set_context(mode=request.param)
    yield request.param
    ms.set_context(mode=ms.PYNATIVE_MODE)


class Network(nn.Cell):
    """The layer between two convolutions that change nothing, but in half precision are in half precision."""

    def __init__(self, norm):
        super().__init__()
        nothing = Tensor(np.eye(3, dtype=np.float32).reshape(3, 3, 1, 1))
        self.before = nn.Conv2d(3, 3, 1, weight_init=nothing)
        self.norm = norm
        self.after = nn.Conv2d(3, 3, 1, weight_init=nothing)

    def construct(self, x):
        return self.after(self.norm(self.before(x)))


class Holder(nn.Cell):
    """What is inside, called."""

    def __init__(self, inside):
        super().__init__()
        self.inside = inside

    def construct(self, *inputs):
        return self.inside(*inputs)


class Weighted(nn.Cell):
    """sum Y dY, with a gradient of its own, which does not care for the dtype of Y."""

    def __init__(self, dy):
        super().__init__()
        self.dy = dy

    def construct(self, y):
        return (y.astype(self.dy.dtype) * self.dy).sum()

    def bprop(self, y, out, dout):
        return (self.dy,)


def trained(kind, **options):
    """A layer none of whose numbers is special, each exact in half precision, and the same reference."""
    layer, reference = kind(3, **options).set_train(), REFERENCES[kind](3)
    numbers = np.random.default_rng(1)
    state = {
        name: value
        if value.ndim == 0
        else (value + numbers.uniform(0.1, 0.9, value.shape)).astype(np.float16)
        for name, value in to_numpy(layer).items()
    }
    from_numpy(layer, state)
    reference.load(state)
    return layer, reference


def step(call, layer, x, dy):
    """Y and the gradients of X and of the layer's parameters."""
    weights = layer.trainable_params()

    def loss(x):
        y = call(x)
        return (y.astype(ms.float32) * dy).sum(), y

    (_, y), (dx, gradients) = ms.value_and_grad(loss, 0, weights, has_aux=True)(x)
    names = [parameter.name.removeprefix("norm.").removeprefix("inside.") for parameter in weights]
    return y, dx, dict(zip(names, gradients, strict=True))


def assert_right(layer, reference, y, dx, gradients, own=2e-6):
    """The values of the reference: in between rounded to half precision, the layer's own as in float32."""
    expected_y = reference.forward(X, training=True)
    expected_dx, expected = reference.backward(DY)
    for found, due in ((y, expected_y), (dx, expected_dx))[y is None :]:
        assert np.abs(found.astype(ms.float32).asnumpy() - due).max() <= 2e-3 * np.abs(due).max()
    assert len(gradients) == len(expected)
    for name, gradient in gradients.items():
        due = expected[GRADIENTS.get(name, name)]
        difference = gradient.astype(ms.float32).asnumpy().reshape(due.shape) - due
        assert np.abs(difference).max() <= own * np.abs(due).max(), name
    for name, value in reference.state().items():
        np.testing.assert_allclose(to_numpy(layer)[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", [True, False], ids=["fused", "plain"])
@pytest.mark.parametrize("kind", [RBN, IEBN, BNET])
@pytest.mark.parametrize("way", WAYS)
def test_y_gradients_and_statistics_are_right_in_pynative(way, kind, form) -> None:
    layer, reference = trained(kind, fused=form)
    network = WAYS[way](Network(layer)).set_train()
    results = step(network, layer, Tensor(X).astype(ms.float32), Tensor(DY).astype(ms.float32))
    # BNET has a convolution, and mixed precision is there to cast these.
    assert_right(layer, reference, *results, own=2e-3 if kind is BNET else 2e-6)


@pytest.mark.parametrize(("way", "kind"), [("O1", RBN), ("O1", BNET), ("O2", RBN), ("auto", IEBN)])
def test_y_gradients_and_statistics_are_right_in_a_graph(way, kind) -> None:
    ms.set_context(mode=ms.GRAPH_MODE)
    try:
        layer, reference = trained(kind)
        network = WAYS[way](Network(layer)).set_train()
        results = step(network, layer, Tensor(X).astype(ms.float32), Tensor(DY).astype(ms.float32))
        assert_right(layer, reference, *results, own=2e-3 if kind is BNET else 2e-6)
    finally:
        ms.set_context(mode=ms.PYNATIVE_MODE)


@pytest.mark.parametrize("form", [True, False], ids=["fused", "plain"])
def test_a_layer_that_is_put_into_a_network_after_the_cast_computes_as_before(form) -> None:
    layer, reference = trained(RBN, fused=form)
    network = Network(nn.BatchNorm2d(3)).to_float(ms.float16).set_train()
    network.norm = layer
    assert_right(layer, reference, *step(network, layer, Tensor(X), Tensor(DY).astype(ms.float32)))


@pytest.mark.parametrize("form", [True, False], ids=["fused", "plain"])
def test_a_gradient_that_is_taken_inside_of_a_cast_network_is_right(form) -> None:
    layer, reference = trained(RBN, fused=form)
    dy = Tensor(DY).astype(ms.float32)
    inside = Holder(lambda x: step(layer, layer, x, dy)).to_float(ms.float16)
    assert_right(layer, reference, *inside(Tensor(X)), own=2e-3)  # the loss's own gradient is rounded


@pytest.mark.parametrize("of_dy", [ms.float32, ms.float64])
def test_a_gradient_of_another_dtype_than_y_is_read_as_it_is(mode, of_dy) -> None:
    layer, reference = trained(RBN)
    dy = Tensor(DY).astype(of_dy)
    network = nn.SequentialCell(layer, Weighted(dy))
    weights = layer.trainable_params()
    dx, gradients = ms.grad(network, 0, weights)(Tensor(X))
    assert dx.dtype == ms.float16
    names = [parameter.name.rpartition(".")[2] for parameter in weights]
    assert_right(layer, reference, None, dx, dict(zip(names, gradients, strict=True)))


@pytest.mark.parametrize("kind", [RBN, IEBN, BNET])
@pytest.mark.parametrize("form", [True, False], ids=["fused", "plain"])
@pytest.mark.parametrize(
    ("of_x", "to"), [(ms.float32, ms.float16), (ms.float16, ms.float16), (ms.float16, ms.float32)]
)
def test_y_has_the_dtype_of_batch_norm_in_a_cast_network(of_x, to, form, kind) -> None:
    x = Tensor(X).astype(of_x)
    expected = Holder(nn.BatchNorm2d(3)).to_float(to).set_train()(x)
    y = Holder(kind(3, fused=form)).to_float(to).set_train()(x)
    assert y.dtype == expected.dtype == to


def test_y_has_the_dtype_of_batch_norm_in_a_cast_graph() -> None:
    ms.set_context(mode=ms.GRAPH_MODE)
    try:
        for layer in (nn.BatchNorm2d(3), RBN(3)):
            assert (
                Holder(layer).to_float(ms.float16).set_train()(Tensor(X).astype(ms.float32)).dtype
                == ms.float16
            )
    finally:
        ms.set_context(mode=ms.PYNATIVE_MODE)


@pytest.mark.parametrize("kind", [RBN, IEBN, BNET])
def test_the_layer_itself_can_be_cast(kind) -> None:
    for way in WAYS.values():
        layer, reference = trained(kind)
        results = step(
            way(layer).set_train(), layer, Tensor(X).astype(ms.float32), Tensor(DY).astype(ms.float32)
        )
        assert_right(layer, reference, *results, own=2e-3 if kind is BNET else 2e-6)


def test_what_runs_after_a_refusal_inside_of_a_cast_network_is_not_cast() -> None:
    layer = RBN(3).to_float(ms.float16)
    with pytest.raises(rbn_core.RBNTypeError):
        layer(ops.ones((2, 3, 4, 4), ms.int32))
    assert (Tensor(X) * Tensor(X)).dtype == ms.float16
    assert (Tensor(X).astype(ms.float64) * 2.0).dtype == ms.float64


def test_a_case_that_is_refused_leaves_nothing_to_a_graph_of_the_next():
    """An error inside of a gradient has made the suite's next graph a second gradient."""
    ids = ("iebn/train/offset0/1x3x1x1/float32", "iebn/train/offset0/2x5x7x7/float16/precision=O2.graph")
    assert [result.status for result in check(MindSpore(), [parse(id) for id in ids])] == ["passed"] * 2
