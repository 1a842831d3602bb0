"""The fused form in MindSpore is the same layer as the plain one, in PyNative mode and in graphs."""

import os

os.environ.setdefault("GLOG_v", "4")

import contextlib
import itertools

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, ops

from rbn.backends.mindspore import BNET, IEBN, RBN, from_numpy, functional, fused, to_numpy
from rbn_core.errors import RBNError

pytestmark = pytest.mark.skipif(not fused.AVAILABLE, reason="the loops were not compiled: no C++ compiler")

OPTIONS = [
    {"centering": centering, "scaling": scaling}
    for centering, scaling in itertools.product((None, "channel_mean", "channel_std"), repeat=2)
]
FORWARD, BACKWARD, ACCUMULATE = (f"rbn_mindspore_{name}" for name in ("forward", "backward", "accumulate"))


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    """MindSpore writes into the working folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(params=["pynative", "jit", "graph"])
def compiled(request):
    """A function of functions that run so."""
    if request.param == "graph":
        ms.set_context(mode=ms.GRAPH_MODE)
    yield ms.jit if request.param == "jit" else lambda function: function
    ms.set_context(mode=ms.PYNATIVE_MODE)


@pytest.fixture
def launched(monkeypatch):
    """The functions of the custom operators that run in PyNative mode, in order."""
    names = []
    launch = ops.Custom.__call__

    def recorded(self, *inputs):
        names.append(self.func.rpartition(":")[2])
        return launch(self, *inputs)

    monkeypatch.setattr(ops.Custom, "__call__", recorded)
    return names


def images(*shape, dtype=ms.float64, seed=1):
    return Tensor(np.random.default_rng(seed).normal(3, 1, shape)).astype(dtype)


def trained(layer, seed=0):
    """A layer none of whose numbers is special."""
    rng = np.random.default_rng(seed)
    state = {
        name: np.asarray(value + rng.uniform(0.1, 0.9, value.shape), value.dtype)
        for name, value in to_numpy(layer).items()
    }
    from_numpy(layer, state)
    return layer


def pair(kind, *arguments, training=True, **options):
    """The fast and the plain form of a layer."""
    layers = [kind(*arguments, fused=form, **options).set_train(training) for form in (True, False)]
    from_numpy(layers[1], to_numpy(trained(layers[0])))
    return layers


def step(layer, x, compiled):
    """Y, the gradients of X and of the parameters, and what the layer keeps then."""
    dy = images(*x.shape, dtype=x.dtype, seed=3)
    weights = layer.trainable_params()

    def loss(x):
        y = layer(x)
        return (y * dy).sum(), y

    if weights:
        (_, y), (dx, gradients) = compiled(ms.value_and_grad(loss, 0, weights, has_aux=True))(x)
    else:
        (_, y), dx = compiled(ms.value_and_grad(loss, 0, None, has_aux=True))(x)
        gradients = ()
    return [value.asnumpy() for value in (y, dx, *gradients)], to_numpy(layer)


def in_pynative(layer, x):
    """What `step` gives in PyNative mode, whose operators are compiled already."""
    mode = ms.get_context("mode")
    ms.set_context(mode=ms.PYNATIVE_MODE)
    try:
        return step(layer, x, lambda function: function)
    finally:
        ms.set_context(mode=mode)


def assert_same(layers, x, compiled, tolerance=1e-12):
    """The first layer, compiled or not, is the second one in PyNative mode."""
    found, found_state = step(layers[0], x, compiled)
    expected, expected_state = in_pynative(layers[1], x)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance * max(1, np.abs(other).max()))
    for name, value in expected_state.items():
        assert found_state[name].dtype == value.dtype
        in_float32 = np.float32 in (value.dtype, x.asnumpy().dtype)  # float32 images have float32 statistics
        np.testing.assert_allclose(found_state[name], value, rtol=1e-6 if in_float32 else 1e-12)


def test_one_operator_forward_and_one_backward_and_one_for_the_statistics(launched):
    step(trained(RBN(4)).set_train(), images(2, 4, 3, 3, dtype=ms.float32), lambda function: function)
    assert launched == [FORWARD, ACCUMULATE, BACKWARD]


def test_evaluation_is_one_operator(launched):
    RBN(4)(images(2, 4, 3, 3, dtype=ms.float32))
    assert launched == [FORWARD]


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (RBN(4, fused=False), (2, 4, 3, 3)),
        (IEBN(4, fused=False), (2, 4, 3, 3)),
        (BNET(4, fused=False), (2, 4, 3, 3)),
        (RBN(4, centering="spatial_mean"), (2, 4, 3, 3)),
        (RBN(4, scaling="spatial_std"), (2, 4, 3, 3)),
        (RBN(4), (0, 4, 3, 3)),
    ],
)
def test_what_takes_the_frameworks_own_operations(layer, shape, launched):
    layer(images(*shape, dtype=ms.float32))
    assert launched == []


def test_without_compiled_loops_the_layers_take_the_frameworks_own_operations(monkeypatch, launched):
    monkeypatch.setattr(fused, "AVAILABLE", False)
    step(RBN(4).set_train(), images(2, 4, 3, 3, dtype=ms.float32), lambda function: function)
    assert launched == []


@pytest.mark.parametrize("form", [True, False])
def test_a_graph_takes_the_operators_too(form, monkeypatch):
    made = []
    make = fused.Compiled.__init__

    def recorded(self, *options):
        made.append(options)
        make(self, *options)

    monkeypatch.setattr(fused.Compiled, "__init__", recorded)
    ms.jit(RBN(4, fused=form))(images(2, 4, 3, 3, dtype=ms.float32))
    assert bool(made) == form


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_every_statistic_gives_the_same_as_the_plain_form(options, training, compiled):
    layers = pair(RBN, 3, training=training, dtype=ms.float64, **options)
    assert_same(layers, images(4, 3, 5, 2), compiled)


@pytest.mark.parametrize("data_format", ["NCHW", "NHWC"])
@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 5), (4, 3, 5, 2), (2, 3, 2, 4, 3)])
def test_any_rank_and_data_format(data_format, shape, compiled):
    layers = pair(RBN, 3, data_format=data_format, restrict="hard_sigmoid", dtype=ms.float64)
    x = images(*shape)
    assert_same(layers, ops.movedim(x, 1, -1) if data_format == "NHWC" else x, compiled)


@pytest.mark.parametrize("data_format", ["NCHW", "NHWC"])
@pytest.mark.parametrize("kind", [IEBN, BNET])
def test_the_relatives(kind, data_format, compiled):
    layers = pair(kind, 3, data_format=data_format)
    shape = (4, 5, 2, 3) if data_format == "NHWC" else (4, 3, 5, 2)
    assert_same(layers, images(*shape, dtype=ms.float32), compiled, 1e-5)


@pytest.mark.parametrize(
    "options",
    [{"momentum": None}, {"running_var": "biased"}, {"eps": 0.1, "momentum": 0.7}, {"affine": False}],
    ids=str,
)
def test_the_other_options(options, compiled):
    layers = pair(RBN, 3, dtype=ms.float64, **options)
    assert_same(layers, images(4, 3, 5, 2), compiled)
    assert_same(layers, images(4, 3, 5, 2, seed=2), compiled)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("of_x", "of_parameters"), list(itertools.permutations((ms.float32, ms.float64), 2)))
def test_an_input_of_another_dtype_than_the_parameters(of_x, of_parameters, training, compiled):
    layers = pair(RBN, 3, training=training, dtype=of_parameters)
    assert_same(layers, images(4, 3, 5, 2, dtype=of_x), compiled, 1e-5)


@pytest.mark.parametrize(("dtype", "eps"), [(ms.float16, 2**-10), (ms.bfloat16, 2**-7)])
@pytest.mark.parametrize("kind", [RBN, IEBN, BNET])
def test_half_precision_is_rounded_once(kind, dtype, eps, compiled):
    layers = pair(kind, 3)
    x = images(4, 3, 5, 2, dtype=dtype)
    found, expected = (compiled(layer)(x) for layer in layers)
    assert found.dtype == dtype
    found, expected = (y.astype(ms.float32).asnumpy() for y in (found, expected))
    np.testing.assert_allclose(found, expected, rtol=eps, atol=eps * 1e-3)
    assert (found == expected).mean() > 0.9  # but for ties


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", [RBN, IEBN, BNET])
def test_the_plain_form_is_the_same_in_graphs(kind, training, compiled):
    _, plain = pair(kind, 3, training=training, dtype=ms.float64)
    again = kind(3, fused=False, dtype=ms.float64).set_train(training)
    from_numpy(again, to_numpy(plain))
    assert_same((plain, again), images(4, 3, 5, 2), compiled)


@pytest.mark.parametrize("values", [None, 20])
@pytest.mark.parametrize("new_weight", [0.1, 1.0, None])
def test_equation_3_has_one_form_of_call_and_the_operator_counts_the_batch(new_weight, values):
    mean, var = images(3), images(3, seed=2)
    weight = 1 / 4 if new_weight is None else new_weight
    correction = 1 if values is None else values / (values - 1)
    due = [weight * mean.asnumpy(), 1 - weight + weight * correction * var.asnumpy()]
    counter = Parameter(Tensor(3, ms.int32))
    for accumulate, count in ((functional.accumulate, Tensor(4, ms.int32)), (fused.accumulate, counter)):
        running = [Parameter(start((3,), ms.float64)) for start in (ops.zeros, ops.ones)]
        accumulate(running, mean, var, new_weight, count=count, values=values)
        for found, expected in zip(running, due, strict=True):
            np.testing.assert_allclose(found.asnumpy(), expected, rtol=1e-14)
    assert counter == 4
    running = [Parameter(start((3,), ms.float64)) for start in (ops.zeros, ops.ones)]
    functional.accumulate(running, mean, var, 0.1)
    np.testing.assert_allclose(running[1].asnumpy(), 0.9 + 0.1 * var.asnumpy(), rtol=1e-14)


def test_views_of_other_tensors(compiled):
    layers = pair(RBN, 4, dtype=ms.float64)
    x = images(5, 6, 4, 3)
    for view in (
        x[:, ::2, :, :].swapaxes(1, 2),
        ops.movedim(x, 2, 1),
        ops.broadcast_to(x[:1, :4], (3, 4, 4, 3)),
    ):
        assert_same(layers, view, compiled)


def test_a_transposed_gradient(compiled):
    weight = images(5, 2, 3, 4)

    def results(layer, x):
        def loss(x):
            return (ops.transpose(layer(x), (2, 3, 1, 0)) * weight).sum()

        return compiled(ms.grad(loss))(x)

    found, expected = (results(layer, images(4, 3, 5, 2)) for layer in pair(RBN, 3, dtype=ms.float64))
    np.testing.assert_allclose(found.asnumpy(), expected.asnumpy(), rtol=1e-12, atol=1e-12)


def test_only_what_is_asked_for_has_a_gradient(compiled):
    for asked in ([], ["gamma"], ["beta", "scale_weight"]):

        def gradients(layer):
            weights = [getattr(layer, name) for name in asked] or None  # noqa: B023 - called in this turn

            def loss(x):
                return ops.sin(layer(x)).sum()

            return compiled(ms.grad(loss, None if weights else 0, weights))

        found, expected = (gradients(layer)(images(4, 3, 5, 2)) for layer in pair(RBN, 3, dtype=ms.float64))
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one.asnumpy(), other.asnumpy(), rtol=1e-10, atol=1e-12)


def test_evaluation_before_a_training_step_keeps_its_gradient():
    def gradient(layer):
        layer.set_train(False)
        y, pull = ops.vjp(layer, images(4, 3, 5, 2))
        layer.set_train(True)
        layer(images(4, 3, 5, 2, seed=4))  # changes the running statistics that y was made with
        return pull(ops.cos(y))[0]

    found, expected = (gradient(layer) for layer in pair(RBN, 3, dtype=ms.float64))
    np.testing.assert_allclose(found.asnumpy(), expected.asnumpy(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("training", [True, False])
def test_gradients_of_gradients_are_refused_in_a_graph_with_the_way_out(training):
    x, direction = images(3, 2, 2, 2), images(3, 2, 2, 2, seed=5)
    layer, _ = pair(RBN, 2, training=training, dtype=ms.float64)

    def loss(x):
        return ops.square(ops.sin(layer(x))).sum()

    gradient = ms.grad(loss)

    def slope(x):
        return (gradient(x) * direction).sum()

    with pytest.raises(RBNError, match=r"the gradient of a gradient(.|\n)*fused=False(.|\n)*run this again"):
        ms.jit(ms.grad(slope))(x)


def test_a_first_gradient_after_an_error_inside_of_another_is_refused_at_most_once():
    """MindSpore goes on as if inside of the gradient that raised, and asks a graph for a second one."""

    def wrong(x):
        raise ValueError("a mistake in the user's own loss")

    layer = RBN(3).set_train()
    x = images(2, 3, 4, 4, dtype=ms.float32)
    expected = ms.grad(layer)(x).asnumpy()
    gradient = ms.jit(ms.grad(layer))
    with pytest.raises(ValueError, match="the user's own loss"):
        ms.grad(wrong)(x)
    with contextlib.suppress(RBNError):
        gradient(x)
    np.testing.assert_allclose(gradient(x).asnumpy(), expected, atol=1e-6)


def test_of_images_the_backward_pass_keeps_the_input_alone(monkeypatch):
    kept = []
    backward = fused.Eager.backward

    def recorded(ctx, *gradients):
        kept.extend(tensor.size for tensor in ctx.saved_tensors)
        return backward(ctx, *gradients)

    monkeypatch.setattr(fused.Eager, "backward", staticmethod(recorded))
    ms.grad(lambda x: RBN(3).set_train()(x).sum())(images(2, 3, 8, 8))
    assert sorted(kept)[-1] == 2 * 3 * 8 * 8
    assert sorted(kept)[-2] <= 13


def test_the_operators_get_the_frameworks_number_of_threads():
    before = ms.get_context("runtime_num_threads")
    arguments = (1e-5, None, None, "sigmoid", (False,) * 7, False)
    try:
        ms.set_context(runtime_num_threads=3)
        assert fused.plan(*arguments).asnumpy().view(np.float64)[4] == 3
    finally:
        ms.set_context(runtime_num_threads=before)
