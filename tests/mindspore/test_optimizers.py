"""Where a MindSpore optimizer stands, to and from what every framework has."""

import os

os.environ.setdefault("GLOG_v", "4")

import dataclasses

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn, ops

from rbn.backends.mindspore import from_numpy, optimizer_from_numpy, optimizer_to_numpy, to_numpy
from rbn_core import RBNTypeError, RBNValueError
from rbn_core.weights import Training

rng = np.random.default_rng(0)
DATA = Tensor(rng.normal(size=(40, 8, 3, 6)).astype(np.float32))


def model():
    return nn.SequentialCell(
        nn.Conv1d(3, 4, 3, pad_mode="pad", padding=1), nn.BatchNorm1d(4), nn.Flatten(), nn.Dense(24, 2)
    ).set_train()


OPTIMIZERS = {
    "Momentum": lambda weights: nn.Momentum(weights, 0.05, 0.9),
    "SGD": lambda weights: nn.SGD(weights, 0.05, momentum=0.9),
    "SGD with Nesterov's step": lambda weights: nn.SGD(weights, 0.05, momentum=0.9, nesterov=True),
    "SGD without momentum": lambda weights: nn.SGD(weights, 0.05),
    "SGD with weight decay": lambda weights: nn.SGD(weights, 0.05, momentum=0.9, weight_decay=0.1),
    "Adam": lambda weights: nn.Adam(weights, 0.01),
    "AdamWeightDecay": lambda weights: nn.AdamWeightDecay(weights, 0.01, weight_decay=0.1),
    "a schedule": lambda weights: nn.Momentum(weights, nn.ExponentialDecayLR(0.1, 0.9, 1), 0.9),
    "a list of rates": lambda weights: nn.Adam(weights, [0.01 / (1 + i) for i in range(100)]),
    "groups": lambda weights: nn.Momentum(
        [{"params": weights[:1], "lr": 0.05}, {"params": weights[1:]}], 0.05, 0.9
    ),
}


def trained(net, optimizer, steps):
    """Train on some of the batches; gives the losses."""

    def loss(x):
        return ops.square(net(x) - 1).mean()

    step, losses = ms.value_and_grad(loss, None, optimizer.parameters), []
    for i in steps:
        value, gradients = step(DATA[i])
        optimizer(gradients)
        losses.append(float(value.asnumpy()))
    return losses


def made(kind):
    net = model()
    return net, OPTIMIZERS[kind](net.trainable_params())


def assert_equal(training, expected):
    assert dataclasses.replace(training, slots={}) == dataclasses.replace(expected, slots={})
    assert training.slots.keys() == expected.slots.keys()
    for slot, arrays in training.slots.items():
        for name, array in arrays.items():
            np.testing.assert_array_equal(array, expected.slots[slot][name], err_msg=name)


@pytest.mark.parametrize(
    ("kind", "used"),
    [*((kind, False) for kind in OPTIMIZERS), ("Momentum", True), ("SGD", True), ("Adam", True)],
)
def test_training_goes_on_as_if_nothing_had_happened(kind, used):
    net, optimizer = made(kind)
    trained(net, optimizer, range(10))
    state, training = to_numpy(net), optimizer_to_numpy(optimizer, net)
    expected = trained(net, optimizer, range(10, 20))
    other, another = made(kind)
    if used:
        trained(other, another, range(30, 32))  # its update is a compiled graph by now
    from_numpy(other, state)
    optimizer_from_numpy(another, other, training)
    assert_equal(optimizer_to_numpy(another, other), training)
    np.testing.assert_allclose(trained(other, another, range(10, 20)), expected, rtol=1e-5)
    assert_equal_states(to_numpy(other), to_numpy(net))


def assert_equal_states(state, expected):
    for name, value in state.items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_what_is_stored_is_as_the_formulas_say(kind):
    net = nn.Dense(2, 1)
    first, second = np.array([[1.0, -2.0]]), np.array([[0.5, 4.0]])
    optimizer = OPTIMIZERS[kind](net.trainable_params())
    weights = []
    for gradient in (first, second):
        weights.append(to_numpy(net)["weight"])
        optimizer((Tensor(gradient, ms.float32), Tensor([1.0])))
    training = optimizer_to_numpy(optimizer, net)
    decay = 0.1 if kind == "SGD with weight decay" else 0.0  # AdamWeightDecay's is no part of the moments
    g1, g2 = first + decay * weights[0], second + decay * weights[1]
    expected = {
        "momentum": 0.9 * g1 + g2,
        "first_moment": 0.9 * 0.1 * g1 + 0.1 * g2,
        "second_moment": 0.999 * 0.001 * g1**2 + 0.001 * g2**2,
    }
    assert training.step == 2
    slots = {"adam": ["first_moment", "second_moment"], "sgd": ["momentum"]}[training.optimizer]
    assert list(training.slots) == ([] if kind == "SGD without momentum" else slots)
    for slot, arrays in training.slots.items():
        assert list(arrays) == ["weight", "bias"]
        np.testing.assert_allclose(arrays["weight"], expected[slot], rtol=1e-4)


@pytest.mark.parametrize(
    ("kind", "rate"),
    [("Momentum", 0.05), ("a schedule", 0.1 * 0.9**2), ("a list of rates", 0.01 / 3), ("groups", 0.05)],
)
def test_the_learning_rate_is_that_of_the_next_update(kind, rate):
    net, optimizer = made(kind)
    trained(net, optimizer, range(2))
    assert optimizer_to_numpy(optimizer, net).learning_rate == pytest.approx(rate)


def test_arrays_have_canonical_names_and_shapes():
    net, optimizer = made("Adam")
    training = optimizer_to_numpy(optimizer, net)
    state = to_numpy(net)
    learned = {name for name in state if not name.startswith("1.running")}
    assert training == Training("adam", 0, pytest.approx(0.01), training.slots)
    for arrays in training.slots.values():
        assert {name: array.shape for name, array in arrays.items()} == {n: state[n].shape for n in learned}
    assert training.slots["first_moment"]["0.weight"].shape == (4, 3, 3)


def test_the_learning_rate_is_taken_over_and_other_options_are_kept():
    net, optimizer = made("Momentum")
    training = optimizer_to_numpy(optimizer, net)
    optimizer_from_numpy(optimizer, net, dataclasses.replace(training, learning_rate=0.3, step=7))
    assert optimizer.learning_rate.asnumpy() == np.float32(0.3)
    assert optimizer.momentum.asnumpy() == np.float32(0.9)
    assert optimizer.global_step.asnumpy() == [7]


def test_adam_corrects_its_bias_by_the_steps_of_the_training():
    net, optimizer = made("Adam")
    training = optimizer_to_numpy(optimizer, net)
    optimizer_from_numpy(optimizer, net, dataclasses.replace(training, step=100))
    assert optimizer.beta1_power.asnumpy() == pytest.approx(0.9**100, rel=1e-5)
    assert optimizer.beta2_power.asnumpy() == pytest.approx(0.999**100, rel=1e-5)


def without(training, name):
    slots = {slot: {n: a for n, a in arrays.items() if n != name} for slot, arrays in training.slots.items()}
    return dataclasses.replace(training, slots=slots)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: dataclasses.replace(t, optimizer="adam"), "an optimizer of kind 'sgd' stands, got 'adam'"),
        (lambda t: without(t, "0.weight"), "missing momentum/0.weight"),
        (lambda t: dataclasses.replace(t, slots={}), "missing momentum/0.weight; missing"),
        (
            lambda t: dataclasses.replace(t, slots=t.slots | {"extra": {"a": np.ones(3)}}),
            "unexpected extra/a",
        ),
        (
            lambda t: dataclasses.replace(
                t, slots={"momentum": t.slots["momentum"] | {"1.beta": np.ones(5)}}
            ),
            r"momentum/1.beta of shape \(5,\) where \(4,\)",
        ),
        (lambda t: dataclasses.replace(t, step=-1), "a number of steps and a finite learning rate, got -1"),
        (lambda t: dataclasses.replace(t, step=2.5), "a number of steps and a finite learning rate, got 2.5"),
        (lambda t: dataclasses.replace(t, learning_rate=float("nan")), "got 3 and nan"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_changes(change, message):
    net, optimizer = made("SGD")
    trained(net, optimizer, range(3))
    training = optimizer_to_numpy(optimizer, net)
    altered = without(training, "")
    altered.slots["momentum"] = {name: array + 1 for name, array in altered.slots["momentum"].items()}
    with pytest.raises(RBNValueError, match=f"RBN: expected.*{message}"):
        optimizer_from_numpy(optimizer, net, change(altered))
    assert_equal_states(optimizer_to_numpy(optimizer, net).slots["momentum"], training.slots["momentum"])
    assert optimizer.stat[0].asnumpy().max() == 0


def test_a_schedule_that_says_otherwise_is_refused():
    net, optimizer = made("a schedule")
    training = optimizer_to_numpy(optimizer, net)
    optimizer_from_numpy(optimizer, net, dataclasses.replace(training, step=3, learning_rate=0.1 * 0.9**3))
    with pytest.raises(RBNValueError, match=r"schedule after 4 updates, 0.0656\d*, got 0.1"):
        optimizer_from_numpy(optimizer, net, dataclasses.replace(training, step=4))
    assert optimizer.global_step.asnumpy() == [3]


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda w: nn.RMSProp(w), RBNTypeError, "Momentum, SGD, Adam or AdamWeightDecay.* got RMSProp"),
        (lambda w: nn.SGD(w, momentum=0.9, dampening=0.5), RBNValueError, "dampening=0.5: its momentum"),
        (lambda w: nn.Adam(w, use_amsgrad=True), RBNValueError, "use_amsgrad=True: it goes by the largest"),
        (
            lambda w: nn.SGD([{"params": w[:2], "lr": 0.1}, {"params": w[2:]}], 0.2),
            RBNValueError,
            "one learning rate for all parameters, got 0.1.*, 0.2",
        ),
        (
            lambda w: nn.SGD([*w, Parameter(Tensor([1.0]), name="strange")], 0.2),
            RBNValueError,
            "got one of others, strange",
        ),
    ],
)
def test_optimizers_that_mean_something_else_are_refused(build, error, message):
    net = model()
    with pytest.raises(error, match=f"RBN: expected.*{message}"):
        optimizer_to_numpy(build(net.trainable_params()), net)


def test_a_shared_parameter_is_there_once():
    net = nn.Cell()
    net.first = net.second = nn.Dense(2, 2)
    training = optimizer_to_numpy(nn.Momentum(net.trainable_params(), 0.1, 0.9), net)
    assert training.slots["momentum"].keys() == {"first.weight", "first.bias"}


def test_frozen_parameters_have_no_moments():
    net = model()
    net[0].weight.requires_grad = False
    training = optimizer_to_numpy(nn.Adam(net.trainable_params()), net)
    assert "0.weight" not in training.slots["first_moment"]
