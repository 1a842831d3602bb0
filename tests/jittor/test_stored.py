"""What a layer stores, changed as a user's code can: the right numbers, or an error at the call."""

import numpy as np
import pytest

from rbn.backends.jittor import BNET, IEBN, RBN, to_numpy

# After the backend, which prepares what Jittor reads at its import.
# isort: split
import jittor as jt

from rbn_core import RBNTypeError, RBNValueError

OWN = ("weight", "bias", "center_weight", "scale_weight", "scale_bias", "running_mean", "running_var")


def image(shape=(4, 3, 5, 5), seed=0):
    return jt.array(np.random.default_rng(seed).normal(size=shape), dtype="float32").sync()


def values(layer):
    return {name: var.numpy() for name, var in layer.state_dict().items()}


def assert_refused(layer, error, match):
    before = values(layer)
    with pytest.raises(error, match=match):
        layer(image())
    after = values(layer)
    assert after.keys() == before.keys()
    for name in after:
        np.testing.assert_array_equal(after[name], before[name])


@pytest.fixture(params=[True, False], ids=["fused", "plain"])
def fused(request):
    return request.param


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", OWN)
def test_a_wrong_length_is_refused_where_the_layer_is_called(name, training, fused):
    for shape in ((2,), (1,), (6,), (0,), (3, 1), (1, 3)):
        layer = RBN(3, is_train=training, fused=fused)
        setattr(layer, name, jt.ones(shape))
        text = f"RBN: expected {name} of shape \\(3,\\), got one of shape"
        assert_refused(layer, RBNValueError, text)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", OWN)
def test_what_holds_no_floating_point_numbers_is_refused(name, training, fused):
    for value in (jt.ones((3,), "int32"), np.ones(3, np.float32), 2.0, [1.0, 1.0, 1.0]):
        layer = RBN(3, is_train=training, fused=fused)
        setattr(layer, name, value)
        text = f"RBN: expected {name} as a variable of floating-point numbers, got"
        assert_refused(layer, RBNTypeError, text)


@pytest.mark.parametrize("name", OWN[2:])
def test_what_is_missing_is_refused(name, fused):
    layer = RBN(3, fused=fused)
    setattr(layer, name, None)
    assert_refused(layer, RBNValueError, f"RBN: expected {name} of shape \\(3,\\), got None")
    delattr(layer, name)
    assert_refused(layer, RBNValueError, f"RBN: expected {name} of shape \\(3,\\), got None")


def test_without_gamma_or_beta_it_is_a_layer_without(fused):
    expected = RBN(3, affine=False, fused=fused)(image()).numpy()
    for weight, bias in ((None, None), (1.0, 0.0)):
        layer = RBN(3, fused=fused)
        layer.weight, layer.bias = weight, bias
        np.testing.assert_array_equal(layer(image()).numpy(), expected)


def test_a_gamma_that_was_added_counts(fused):
    layer = RBN(3, affine=False, fused=fused)
    expected = 2 * layer(image()).numpy()
    layer.weight = 2 * jt.ones((3,))
    np.testing.assert_allclose(layer(image()).numpy(), expected, rtol=1e-6)


def test_bnet_refuses_another_convolution(fused):
    for name, value in (
        ("weight", jt.ones((3, 1, 3, 1))),
        ("weight", jt.ones((2, 1, 3, 3))),
        ("bias", jt.ones((1,))),
        ("bias", None),
    ):
        layer = BNET(3, fused=fused)
        setattr(layer.conv, name, value)
        assert_refused(layer, RBNValueError, f"BNET: expected conv.{name} of shape")
    layer = BNET(3, fused=fused)
    layer.conv = None
    assert_refused(layer, RBNValueError, "BNET: expected conv.weight of shape")


def test_without_a_counter_the_layer_trains_on_if_nobody_needs_it(fused):
    layer, expected = RBN(3, fused=fused), RBN(3, fused=fused)
    layer.num_batches_tracked = None
    y = layer(image())
    np.testing.assert_array_equal(y.numpy(), expected(image()).numpy())
    np.testing.assert_array_equal(layer.running_var.numpy(), expected.running_var.numpy())
    layer = RBN(3, momentum=None, fused=fused)
    layer.num_batches_tracked = None
    assert_refused(layer, RBNValueError, "expected num_batches_tracked with momentum=None")


@pytest.mark.parametrize("value", [jt.zeros((3,), "int32"), jt.zeros((1,)), 0])
def test_a_counter_that_is_none_is_refused_in_training_alone(value):
    layer = RBN(3)
    layer.num_batches_tracked = value
    assert_refused(layer, (RBNValueError, RBNTypeError), "expected num_batches_tracked")
    layer.eval()
    assert np.isfinite(layer(image()).numpy()).all()


@pytest.mark.parametrize("make", [RBN, IEBN, BNET])
@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("centering", "typo"),
        ("scaling", "typo"),
        ("scaling", ["channel_mean"]),
        ("restrict", "typo"),
        ("variance_estimator", "typo"),
        ("momentum", 2.0),
        ("eps", 0.0),
    ],
)
def test_an_option_that_became_none_is_refused(make, option, value, fused):
    layer = make(3, fused=fused)
    setattr(layer, option, value)
    option = "running_var" if option == "variance_estimator" else option
    assert_refused(layer, (RBNValueError, RBNTypeError), f"{make.__name__}: expected {option} ")


@pytest.mark.parametrize("name", ["weight", "bias", "center_weight", "running_var"])
def test_a_statistic_that_is_something_else_too_is_refused(name, fused):
    layer = RBN(3, fused=fused)
    layer.running_mean = getattr(layer, name)
    first, second = ("running_mean", name)
    assert_refused(layer, RBNValueError, f"expected {first} as a variable of its own, got that of {second}")


def test_a_statistic_in_the_memory_of_a_parameter_leaves_it_alone(fused):
    layer, expected = RBN(3, fused=fused), RBN(3, fused=fused)
    layer.running_mean, layer.running_var = layer.bias.detach().stop_grad(), layer.weight.detach().stop_grad()
    for seed in range(2):
        found, due = (each(image(seed=seed)) for each in (layer, expected))
        gradients = [jt.grad(y.sqr().sum(), each.bias) for y, each in ((found, layer), (due, expected))]
        np.testing.assert_array_equal(found.numpy(), due.numpy())
        np.testing.assert_array_equal(gradients[0].numpy(), gradients[1].numpy())
    for name, value in to_numpy(expected).items():
        np.testing.assert_array_equal(to_numpy(layer)[name], value)


def test_one_variable_for_two_parameters_counts_twice(fused):
    layer = RBN(3, fused=fused)
    layer.scale_weight = layer.bias
    y, other = layer(image()), RBN(3, fused=fused)
    separate = jt.grad(other(image()).sqr().sum(), [other.bias, other.scale_weight])
    np.testing.assert_array_equal(y.numpy(), other(image()).numpy())
    found = jt.grad(y.sqr().sum(), layer.bias).numpy()
    np.testing.assert_allclose(found, sum(value.numpy() for value in separate), rtol=1e-4, atol=1e-4)
