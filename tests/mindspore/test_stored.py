"""What is stored and does not fit the layer is refused before anything has changed, in both forms."""

import os

os.environ.setdefault("GLOG_v", "4")

import copy

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops
from mindspore.nn.utils import no_init_parameters

from rbn.backends.mindspore import BNET, IEBN, RBN
from rbn_core import RBNTypeError, RBNValueError

X = Tensor(np.random.default_rng(0).normal(size=(4, 3, 5, 5)).astype(np.float32))
VECTORS = {
    RBN: ("gamma", "beta", "center_weight", "scale_weight", "scale_bias", "moving_mean", "moving_variance"),
    IEBN: ("gamma", "beta", "scale_weight", "scale_bias", "moving_mean", "moving_variance"),
    BNET: ("conv.weight", "conv.bias", "moving_mean", "moving_variance"),
}
STORED = [(kind, name) for kind, names in VECTORS.items() for name in names]


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    """MindSpore writes refused graphs into the working folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(params=[True, False], ids=["fused", "plain"])
def form(request):
    return request.param


@pytest.fixture(params=[True, False], ids=["training", "evaluation"])
def training(request):
    return request.param


def owner(layer, name):
    """What holds a parameter, and the parameter's name there."""
    return (layer.conv, name.partition(".")[2]) if "." in name else (layer, name)


def parameter(layer, name):
    return getattr(*owner(layer, name))


def assert_refused(layer, error, match, call=None):
    """The error comes, and everything that is stored is as it was."""
    before = {
        name: stored.asnumpy().copy() for name, stored in layer.parameters_and_names() if stored is not None
    }
    with pytest.raises(error, match=match):
        (call or layer)(X)
    for name, stored in layer.parameters_and_names():
        if stored is not None:
            np.testing.assert_array_equal(stored.asnumpy(), before[name])


@pytest.mark.parametrize(("kind", "name"), STORED)
def test_a_wrong_length_is_refused_like_batch_norm(kind, name, form, training) -> None:
    for length in (2, 1, 6, 0):
        layer = kind(3, fused=form).set_train(training)
        shape = (length, *parameter(layer, name).shape[1:])
        parameter(layer, name).set_data(Tensor(np.ones(shape, np.float32)), slice_shape=True)
        assert_refused(
            layer, RBNValueError, rf"{kind.__name__}: expected {name} of shape \(3,.*, got one of shape"
        )


@pytest.mark.parametrize(("kind", "name"), [(RBN, "gamma"), (RBN, "moving_variance"), (BNET, "conv.bias")])
@pytest.mark.parametrize("compile_", ["jit", "graph"])
def test_a_wrong_length_is_refused_while_a_graph_is_compiled(kind, name, form, compile_) -> None:
    layer = kind(3, fused=form).set_train()
    parameter(layer, name).set_data(Tensor(np.ones(1, np.float32)), slice_shape=True)
    ms.set_context(mode=ms.GRAPH_MODE if compile_ == "graph" else ms.PYNATIVE_MODE)
    try:
        assert_refused(
            layer, RBNValueError, f"expected {name} of shape", ms.jit(layer) if compile_ == "jit" else None
        )
    finally:
        ms.set_context(mode=ms.PYNATIVE_MODE)


@pytest.mark.parametrize(("kind", "name"), STORED)
def test_what_is_missing_is_refused(kind, name, form, training) -> None:
    for remove in (delattr, lambda *place: setattr(*place, None)):
        layer = kind(3, fused=form).set_train(training)
        remove(*owner(layer, name))
        assert_refused(layer, RBNValueError, f"expected {name} of shape .*, got None")


def test_without_a_counter_the_layer_trains_but_for_the_average_of_all_batches(form) -> None:
    layer, other = (RBN(3, fused=form).set_train() for _ in range(2))
    layer.num_batches_tracked = None
    np.testing.assert_array_equal(layer(X).asnumpy(), other(X).asnumpy())
    np.testing.assert_allclose(layer.moving_variance.asnumpy(), other.moving_variance.asnumpy(), rtol=1e-6)
    layer.momentum = None
    assert_refused(layer, RBNValueError, "expected num_batches_tracked with momentum=None")


@pytest.mark.parametrize("dtype", [ms.int64, ms.float32])
@pytest.mark.parametrize("momentum", [0.9, None])
def test_a_counter_of_any_dtype_counts(dtype, momentum, form) -> None:
    layer, other = (RBN(3, momentum=momentum, fused=form).set_train() for _ in range(2))
    layer.num_batches_tracked.set_dtype(dtype)
    for _ in range(2):
        layer(X), other(X)
    assert layer.num_batches_tracked.dtype == dtype
    assert int(layer.num_batches_tracked.asnumpy()) == 2
    np.testing.assert_allclose(layer.moving_mean.asnumpy(), other.moving_mean.asnumpy(), rtol=1e-6)


@pytest.mark.parametrize(("kind", "name"), STORED)
def test_integers_are_refused(kind, name, form, training) -> None:
    layer = kind(3, fused=form).set_train(training)
    parameter(layer, name).set_dtype(ms.int32)
    assert_refused(layer, RBNTypeError, f"expected {name} of floating-point numbers, got Int32")


@pytest.mark.parametrize("name", ["moving_mean", "moving_variance"])
def test_half_precision_statistics_are_evaluated_and_not_trained(name, form) -> None:
    layer = RBN(3, fused=form)
    expected = layer(X).asnumpy()
    parameter(layer, name).set_dtype(ms.float16)
    np.testing.assert_allclose(layer(X).asnumpy(), expected, rtol=1e-6)
    assert_refused(layer.set_train(), RBNTypeError, f"expected {name} in at least float32 to accumulate it")


@pytest.mark.parametrize("dtype", [ms.float16, ms.float64])
@pytest.mark.parametrize("kind", [RBN, IEBN, BNET])
def test_parameters_of_another_dtype_than_the_input_give_the_same(kind, dtype, form, training) -> None:
    for names in ([VECTORS[kind][0]], [name for name in VECTORS[kind] if not name.startswith("moving")]):
        layer, other = (kind(3, fused=form).set_train(training) for _ in range(2))
        for name in VECTORS[kind][:-2]:
            values = (
                np.random.default_rng(1).uniform(0.5, 1.5, parameter(layer, name).shape).astype(np.float16)
            )
            for each in (layer, other):
                parameter(each, name).set_data(Tensor(values.astype(np.float32)))
        for name in names:
            parameter(layer, name).set_dtype(dtype)
        y, expected = layer(X), other(X)
        assert y.dtype == ms.float32
        np.testing.assert_allclose(
            y.asnumpy(), expected.asnumpy(), rtol=5e-3, atol=5e-3 if kind is BNET else 1e-5
        )


@pytest.mark.parametrize(("name", "other"), [("moving_variance", "gamma"), ("moving_mean", "center_weight")])
@pytest.mark.parametrize("whole", [True, False], ids=["parameter", "data"])
def test_a_statistic_in_the_memory_of_a_parameter_is_refused_in_training(name, other, whole, form) -> None:
    layer = RBN(3, fused=form).set_train()
    layer(X)
    if whole:
        setattr(layer, name, getattr(layer, other))
    else:
        fresh = RBN(3, fused=form).set_train()
        parameter(fresh, name).set_data(parameter(fresh, other))
        layer = fresh
    assert_refused(layer, RBNValueError, f"expected {name} in memory of its own, got that of {other}")
    assert np.isfinite(layer.set_train(False)(X).asnumpy()).all()


@pytest.mark.parametrize(
    ("kind", "name", "other"),
    [
        (RBN, "moving_variance", "gamma"),
        (RBN, "moving_mean", "center_weight"),
        (RBN, "moving_mean", "moving_variance"),
        (BNET, "moving_mean", "conv.bias"),
    ],
)
@pytest.mark.parametrize("compile_", ["jit", "graph"])
def test_the_same_is_refused_while_a_graph_is_compiled(kind, name, other, form, compile_) -> None:
    layer = kind(3, fused=form).set_train()
    layer(X)  # in memory of its own
    parameter(layer, name).set_data(parameter(layer, other))
    network = nn.SequentialCell(layer).set_train()
    ms.set_context(mode=ms.GRAPH_MODE if compile_ == "graph" else ms.PYNATIVE_MODE)
    try:
        call = ms.jit(network) if compile_ == "jit" else network
        match = f"{kind.__name__}: expected {name} in memory of its own, got that of {other}"
        assert_refused(layer, RBNValueError, match, call)
        assert np.isfinite(network.set_train(False)(X).asnumpy()).all()
        parameter(layer, name).set_data(Tensor(parameter(layer, name).asnumpy().copy()))
        network.set_train()(X)
    finally:
        ms.set_context(mode=ms.PYNATIVE_MODE)


def test_a_copy_of_a_layer_is_not_taken_for_the_layer(form) -> None:
    layer = RBN(3, fused=form).set_train()
    wrong = copy.deepcopy(layer)
    wrong.moving_mean.set_data(wrong.beta)
    ms.jit(layer)(X)
    assert_refused(wrong, RBNValueError, "expected moving_mean in memory of its own", ms.jit(wrong))


def test_parameters_without_values_yet_lie_nowhere(form) -> None:
    with no_init_parameters():
        layer = RBN(3, fused=form).set_train()
    assert layer.gamma.has_init
    assert ms.jit(layer)(X).shape == X.shape  # of what numbers is MindSpore's business, as BatchNorm's


@pytest.mark.parametrize(
    ("option", "value", "error"),
    [
        ("scaling", "typo", RBNValueError),
        ("centering", "typo", RBNValueError),
        ("centering", ["channel_mean"], RBNTypeError),
        ("scaling", "input_mean", RBNValueError),
        ("restrict", "typo", RBNValueError),
        ("running_var", "typo", RBNValueError),
        ("momentum", 2.0, RBNValueError),
        ("eps", 0.0, RBNValueError),
    ],
)
def test_an_option_that_is_assigned_is_checked_like_one_of_the_constructor(
    option, value, error, form, training
) -> None:
    layer = RBN(3, fused=form).set_train(training)
    setattr(layer, option, value)
    assert_refused(layer, error, f"RBN: expected {option}")


def test_an_unknown_statistic_is_refused_while_a_graph_is_compiled(form) -> None:
    layer = RBN(3, fused=form).set_train()
    layer.scaling = "typo"
    assert_refused(layer, RBNValueError, "expected scaling to be one of", ms.jit(layer))


def test_the_fast_form_takes_what_it_knows(monkeypatch) -> None:
    from rbn.backends.mindspore import fused

    assert fused.takes(X, "channel_std", "channel_mean", "sigmoid") == fused.AVAILABLE
    for unknown in (
        ("new", None, "sigmoid"),
        (None, "new", "sigmoid"),
        (None, None, "new"),
        ("input_mean", None, "sigmoid"),
    ):
        assert not fused.takes(X, *unknown)
    assert not fused.takes(ops.ones((2, 3, 4, 4), ms.int32), None, None, "sigmoid")
