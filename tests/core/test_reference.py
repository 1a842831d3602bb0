"""The reference against the paper, against finite differences, and against its two-pass form."""

import itertools

import numpy as np
import pytest
import scipy.ndimage

from rbn_core import BNET, IEBN, RBN, Config, RBNValueError
from rbn_core.options import INSTANCE_STATISTICS, MOMENT_STATISTICS
from rbn_core.reference import Layer
from rbn_core.two_pass import TwoPass

CALIBRATIONS = list(itertools.product(INSTANCE_STATISTICS, INSTANCE_STATISTICS))
CHANNEL_CALIBRATIONS = list(itertools.product((*MOMENT_STATISTICS, None), repeat=2))


class Extended(Layer):
    """The same equations with more digits, so that a finite difference has digits to lose."""

    dtype = np.longdouble


def filled(layer, seed=0):
    """The layer with no parameter or statistic left at a value that could hide a mistake."""
    rng = np.random.default_rng(seed)
    for values in (layer.parameters, layer.statistics):
        for name, value in values.items():
            if np.shape(value):
                values[name] = rng.uniform(0.5, 1.5, value.shape).astype(value.dtype)
    return layer


def plain_numbers(shape, seed=1):
    rng = np.random.default_rng(seed)
    return rng.normal(1.0, 2.0, shape), rng.normal(size=shape)


RBN_CONFIGS = [
    Config(2, centering=centering, scaling=scaling, restrict=restrict)
    for (centering, scaling), restrict in itertools.product(CALIBRATIONS, ("sigmoid", "hard_sigmoid"))
]
OTHER_CONFIGS = [
    Config.iebn(2),
    *(Config.bnet(2, size, spatial_dims=rank) for size, rank in itertools.product((1, 3, 5), (1, 2, 3))),
]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("config", [*RBN_CONFIGS, *OTHER_CONFIGS], ids=str)
def test_every_gradient_is_the_finite_difference(config, training):
    layer, longer = filled(Layer(config)), filled(Extended(config))
    x, dy = plain_numbers((2, 2, 1, 3, 2)[: config.spatial_dims + 2])
    layer.forward(x, training)
    dx, gradients = layer.backward(dy)

    statistics = dict(longer.statistics)
    varied = {"x": x} | longer.parameters

    def objective():
        longer.statistics = dict(statistics)
        return np.sum(longer.forward(x, training) * dy)

    def objective_at(values, place, value):
        kept, values[place] = values[place], value
        result, exact = objective(), np.longdouble(values[place])
        values[place] = kept
        return result, exact

    for name, expected in ({"x": dx} | gradients).items():
        numeric = np.empty(expected.shape)
        for place in np.ndindex(*expected.shape):
            value = varied[name][place]
            above, right = objective_at(varied[name], place, value + 1e-6)
            below, left = objective_at(varied[name], place, value - 1e-6)
            numeric[place] = (above - below) / (right - left)
        np.testing.assert_allclose(expected, numeric, rtol=1e-8, atol=1e-8, err_msg=name)


SHAPES = [(3, 4, 2, 3), (2, 3, 5), (5, 3), (1, 2, 7, 7), (2, 1, 2, 2, 2), (4, 3, 1, 1)]


def same(literal, two_pass, shape, training):
    """Hold one layer to another, to rounding, for two steps."""
    filled(literal), filled(two_pass)
    for seed in (1, 2):
        x, dy = plain_numbers(shape, seed)
        expected = {"y": literal.forward(x, training)}
        actual = {"y": two_pass.forward(x, training)}
        for layer, results in ((literal, expected), (two_pass, actual)):
            results["dx"], gradients = layer.backward(dy)
            results |= {f"d {name}": value for name, value in gradients.items()} | layer.statistics
        assert actual.keys() == expected.keys()
        for name in expected:
            scale = max(1.0, np.max(np.abs(expected[name])))
            np.testing.assert_allclose(actual[name], expected[name], rtol=0, atol=1e-12 * scale, err_msg=name)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("centering", "scaling"), CHANNEL_CALIBRATIONS)
def test_the_two_pass_form_is_the_same_rbn(centering, scaling, training, shape):
    config = Config(shape[1], centering=centering, scaling=scaling)
    same(Layer(config), TwoPass(config), shape, training)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_the_two_pass_form_is_the_same_iebn_and_bnet(training, shape):
    same(Layer(Config.iebn(shape[1])), TwoPass(Config.iebn(shape[1])), shape, training)
    if len(shape) > 2:
        config = Config.bnet(shape[1], spatial_dims=len(shape) - 2)
        same(Layer(config), TwoPass(config), shape, training)


def test_the_two_pass_form_refuses_statistics_over_the_channels():
    with pytest.raises(ValueError, match=r"expected statistics that follow .*, got centering='spatial_mean'"):
        TwoPass(Config(3, centering="spatial_mean"))


def test_a_layer_worked_out_by_hand():
    # One channel, two planes of two values: plane means 2 and 6, mean 4, variance (9 + 1 + 1 + 9) / 4 = 5.
    x = np.array([[[1.0, 3.0]], [[5.0, 7.0]]])
    layer = RBN(1, eps=4.0)
    layer.load(layer.state() | {"center_weight": [1.0], "scale_weight": [3.0], "scale_bias": [0.0]})
    # X_cm = X + the plane's mean: 3 5 11 13; E = 8, Var = (25 + 9 + 9 + 25) / 4 = 17, Var + eps = 21.
    x_s = np.array([[[-5.0, -3.0]], [[3.0, 5.0]]]) / np.sqrt(21.0)
    k_s = np.array([[[-4.0]], [[4.0]]]) / np.sqrt(21.0)
    y = layer.forward(x, training=True)
    np.testing.assert_allclose(y, x_s / (1.0 + np.exp(-3.0 * k_s)), rtol=1e-14)
    np.testing.assert_allclose(layer.statistics["running_mean"], [0.9 * 0 + 0.1 * 8], rtol=1e-14)
    np.testing.assert_allclose(layer.statistics["running_var"], [0.9 * 1 + 0.1 * 17 * 4 / 3], rtol=1e-14)


def test_equation_6_the_mean_of_x_cm_is_one_plus_w_m_times_the_mean_of_x():
    layer = filled(RBN(3, momentum=0.0))
    x, _ = plain_numbers((4, 3, 2, 2))
    layer.forward(x, training=True)
    expected = (1.0 + layer.parameters["center_weight"]) * x.mean(axis=(0, 2, 3))
    np.testing.assert_allclose(layer.statistics["running_mean"], expected, rtol=1e-14)


def test_equation_11_the_scaling_calibration_makes_the_variance_smaller():
    layer = filled(RBN(3))
    layer.forward(plain_numbers((4, 3, 2, 2))[0], training=True)
    assert np.all(layer.steps.x_cs.var(axis=(0, 2, 3)) < layer.steps.x_s.var(axis=(0, 2, 3)))


def test_section_4_1_the_calibrations_start_without_a_role():
    x, _ = plain_numbers((4, 3, 2, 2))
    plain = RBN(3, centering=None, scaling=None).forward(x, training=True)
    np.testing.assert_allclose(RBN(3).forward(x, training=True), plain / (1.0 + np.exp(-1.0)), rtol=1e-14)


def test_without_calibration_and_eps_training_output_has_mean_0_and_variance_1():
    y = RBN(3, centering=None, scaling=None, eps=1e-300).forward(
        plain_numbers((4, 3, 5, 5))[0], training=True
    )
    np.testing.assert_allclose(y.mean(axis=(0, 2, 3)), 0.0, atol=1e-15)
    np.testing.assert_allclose(y.var(axis=(0, 2, 3)), 1.0, rtol=1e-14)


@pytest.mark.parametrize(("estimator", "divisor"), [("unbiased", 7), ("biased", 8)])
def test_equation_3_accumulates_step_by_step(estimator, divisor):
    layer = RBN(1, centering=None, running_var=estimator, momentum=0.8)
    mean, var = 0.0, 1.0
    for seed in range(3):
        x, _ = plain_numbers((2, 1, 4), seed)
        layer.forward(x, training=True)
        mean = 0.8 * mean + 0.2 * x.mean()
        var = 0.8 * var + 0.2 * np.sum((x - x.mean()) ** 2) / divisor
    np.testing.assert_allclose(layer.statistics["running_mean"], [mean], rtol=1e-14)
    np.testing.assert_allclose(layer.statistics["running_var"], [var], rtol=1e-14)
    assert layer.statistics["num_batches_tracked"] == 3


def test_cumulative_averaging_weighs_all_batches_equally():
    layer = RBN(1, centering=None, momentum=None)
    batches = [plain_numbers((2, 1, 4), seed)[0] for seed in range(3)]
    for x in batches:
        layer.forward(x, training=True)
    np.testing.assert_allclose(layer.statistics["running_mean"], [np.mean([x.mean() for x in batches])])
    np.testing.assert_allclose(layer.statistics["running_var"], [np.mean([x.var(ddof=1) for x in batches])])


def test_evaluation_changes_no_statistic_and_training_no_input():
    layer = filled(RBN(3))
    x, _ = plain_numbers((4, 3, 2, 2))
    kept, before = x.copy(), layer.state()
    layer.forward(x, training=False)
    for name, value in layer.state().items():
        np.testing.assert_array_equal(value, before[name])
    layer.forward(x, training=True)
    np.testing.assert_array_equal(x, kept)


def test_backward_before_forward_says_so():
    with pytest.raises(RuntimeError, match="Call forward first"):
        RBN(3).backward(np.zeros((2, 3)))


def test_a_state_that_does_not_fit_lists_every_fault_and_changes_nothing():
    layer = RBN(3)
    before = layer.state()
    state = {name: value + 1 for name, value in before.items() if name != "beta"}
    state |= {"gamma": np.ones(4), "surprise": np.ones(3), "running_mean": np.array(["a", "b", "c"])}
    with pytest.raises(
        ValueError, match=r"missing beta; unexpected surprise; gamma of shape .*; running_mean of dtype"
    ):
        layer.load(state)
    for name, value in layer.state().items():
        np.testing.assert_array_equal(value, before[name])


def test_a_new_iebn_is_batch_norm_times_sigmoid_of_minus_one():
    x, _ = plain_numbers((4, 3, 2, 2))
    plain = RBN(3, centering=None, scaling=None).forward(x, training=True)
    np.testing.assert_allclose(IEBN(3).forward(x, training=True), plain / (1.0 + np.exp(1.0)), rtol=1e-14)


def test_the_attention_of_iebn_follows_the_raw_input():
    layer = filled(IEBN(3))
    x, _ = plain_numbers((4, 3, 2, 2))
    z = layer.parameters["scale_weight"] * x.mean(axis=(2, 3)) + layer.parameters["scale_bias"]
    layer.forward(x, training=True)
    np.testing.assert_allclose(layer.steps.restriction[:, :, 0, 0], 1.0 / (1.0 + np.exp(-z)), rtol=1e-14)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("kernel_size", [1, 3, 5, 7])
def test_a_new_bnet_is_batch_norm(kernel_size, rank):
    x, _ = plain_numbers((4, 3, 5, 4, 3)[: rank + 2])
    plain = RBN(3, centering=None, scaling=None).forward(x, training=True)
    layer = BNET(3, kernel_size, spatial_dims=rank)
    np.testing.assert_array_equal(layer.forward(x, training=True), plain)


def test_the_convolution_of_bnet_is_scipys():
    layer = filled(BNET(2, 3))
    y = layer.forward(plain_numbers((2, 2, 5, 4))[0], training=True)
    for n, c in np.ndindex(2, 2):
        kernel = layer.parameters["conv_weight"][c, 0]
        expected = scipy.ndimage.correlate(layer.steps.x_s[n, c], kernel, mode="constant")
        np.testing.assert_allclose(y[n, c], expected + layer.parameters["conv_bias"][c], rtol=1e-12)


@pytest.mark.parametrize("make", [Layer, TwoPass])
@pytest.mark.parametrize(
    "wrong", [np.ones(3), np.ones(1), np.ones(8), np.ones(0), np.ones((1, 4)), np.float64(2), None]
)
@pytest.mark.parametrize(
    "name", ["gamma", "beta", "center_weight", "scale_weight", "scale_bias", "running_mean", "running_var"]
)
def test_a_stored_array_that_does_not_fit_is_refused_and_nothing_changes(name, wrong, make):
    for training in (True, False):
        layer = filled(make(Config(4)))
        stored = layer.parameters if name in layer.parameters else layer.statistics
        stored[name] = wrong
        before = layer.state()
        with pytest.raises(RBNValueError, match=rf"RBN: expected {name} of shape \(4,\), got "):
            layer.forward(np.ones((2, 4, 3)), training)
        for other, value in layer.state().items():
            np.testing.assert_array_equal(value, before[other])


def test_a_kernel_that_does_not_fit_is_refused():
    layer = BNET(4)
    layer.parameters["conv_weight"] = layer.parameters["conv_weight"][:1]
    with pytest.raises(
        RBNValueError, match=r"BNET: expected conv_weight of shape \(4, 1, 3, 3\), got one of"
    ):
        layer.forward(np.ones((2, 4, 3, 3)), training=True)


@pytest.mark.parametrize("make", [Layer, TwoPass])
def test_without_a_counter_a_layer_trains_unless_it_averages_all_batches(make):
    x, _ = plain_numbers((3, 4, 5))
    layer, other = make(Config(4)), make(Config(4))
    layer.statistics["num_batches_tracked"] = None
    np.testing.assert_array_equal(layer.forward(x, True), other.forward(x, True))
    np.testing.assert_array_equal(layer.statistics["running_var"], other.statistics["running_var"])
    assert layer.statistics["num_batches_tracked"] is None
    layer = make(Config(4, momentum=None))
    del layer.statistics["num_batches_tracked"]
    with pytest.raises(RBNValueError, match="RBN: expected num_batches_tracked with momentum=None"):
        layer.forward(x, True)
    layer.forward(x, False)


@pytest.mark.parametrize("layer_class", [Layer, TwoPass])
def test_after_an_exception_the_layer_goes_on_as_a_new_one_that_was_given_the_same_steps(layer_class):
    config = Config(2, centering="channel_std")
    layer, fresh = (filled(layer_class(config)) for _ in range(2))
    x, dy = plain_numbers((4, 2, 3, 3))
    for each in (layer, fresh):
        each.forward(x, training=True)
    with pytest.raises(RBNValueError, match="expected 2 channels"):
        layer.forward(x[:, :1], training=True)
    with pytest.raises(ValueError, match="broadcast"):
        layer.backward(dy[:3])
    np.testing.assert_equal(layer.backward(dy), fresh.backward(dy))
    np.testing.assert_array_equal(layer.forward(x + 1, training=True), fresh.forward(x + 1, training=True))
    np.testing.assert_equal(layer.state(), fresh.state())
