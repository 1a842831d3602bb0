"""Where a MindSpore optimizer stands, to and from what every framework has."""

import os

os.environ.setdefault("GLOG_v", "4")

import dataclasses

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn, ops
from mindspore.experimental.optim import AdamW

from rbn.backends.mindspore import from_numpy, optimizer_from_numpy, optimizer_to_numpy, to_numpy
from rbn_core import RBNTypeError, RBNValueError
from rbn_core.training import Group, Training

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
        [{"params": weights[:1], "lr": 0.02}, {"params": weights[1:], "weight_decay": 0.1}],
        0.05,
        0.9,
        loss_scale=4.0,
    ),
    "groups of AdamW": lambda weights: AdamW(
        [{"params": weights[:1], "lr": 0.002, "weight_decay": 0.0}, {"params": weights[1:]}], 0.01
    ),
    "AdamW": lambda weights: AdamW(weights, 0.01, weight_decay=0.1),
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
    [*((kind, False) for kind in OPTIMIZERS), ("Momentum", True), ("SGD", True), ("groups of AdamW", True)],
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
    if isinstance(another, AdamW):  # whose weight decays can be changed
        for group in another.param_groups:
            group["weight_decay"] = 0.7
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
        scaled = np.float32(getattr(optimizer, "loss_scale", 1.0))
        optimizer((Tensor(gradient * scaled, ms.float32), Tensor([scaled])))
    training = optimizer_to_numpy(optimizer, net)
    # A decoupled one is no part of the moments.
    decay = 0.1 if kind == "SGD with weight decay" else 0.0
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
    [("Momentum", 0.05), ("a schedule", 0.1 * 0.9**2), ("a list of rates", 0.01 / 3), ("AdamW", 0.01)],
)
def test_the_learning_rate_is_that_of_the_next_update(kind, rate):
    net, optimizer = made(kind)
    trained(net, optimizer, range(2))
    assert [group.learning_rate for group in optimizer_to_numpy(optimizer, net).groups] == [
        pytest.approx(rate)
    ]


def test_arrays_have_canonical_names_and_shapes():
    net, optimizer = made("Adam")
    training = optimizer_to_numpy(optimizer, net)
    state = to_numpy(net)
    learned = {name for name in state if not name.startswith("1.running")}
    names = ("0.weight", "1.gamma", "1.beta", "3.weight", "3.bias")
    names = tuple(name for name in training.slots["first_moment"] if name in {*names, "0.bias"})
    assert training == Training("adam", 0, (Group(pytest.approx(0.01), 0.0, names),), training.slots)
    for arrays in training.slots.values():
        assert {name: array.shape for name, array in arrays.items()} == {n: state[n].shape for n in learned}
    assert training.slots["first_moment"]["0.weight"].shape == (4, 3, 3)


def test_the_learning_rate_is_taken_over_and_other_options_are_kept():
    net, optimizer = made("Momentum")
    training = with_rate(optimizer_to_numpy(optimizer, net), 0.3)
    optimizer_from_numpy(optimizer, net, dataclasses.replace(training, step=7))
    assert optimizer.learning_rate.asnumpy() == np.float32(0.3)
    assert optimizer.momentum.asnumpy() == np.float32(0.9)
    assert optimizer.global_step.asnumpy() == [7]


def with_rate(training, rate):
    groups = tuple(dataclasses.replace(group, learning_rate=rate) for group in training.groups)
    return dataclasses.replace(training, groups=groups)


@pytest.mark.parametrize("kind", ["groups", "groups of AdamW"])
def test_rates_and_decays_are_those_of_the_groups(kind):
    net, optimizer = made(kind)
    training = optimizer_to_numpy(optimizer, net)
    names = [name for group in training.groups for name in group.parameters]
    first, rest = tuple(names[:1]), tuple(names[1:])
    rates, decays = {"groups": ((0.02, 0.05), (0.0, 0.1))}.get(kind, ((0.002, 0.01), (0.0, 0.01)))
    approx = pytest.approx
    assert training.groups == (
        Group(approx(rates[0]), approx(decays[0]), first),
        Group(approx(rates[1]), approx(decays[1]), rest),
    )
    assert training.decoupled == (kind == "groups of AdamW")
    trained(net, optimizer, range(2))
    changed = (
        dataclasses.replace(training.groups[0], learning_rate=0.3),
        dataclasses.replace(training.groups[1], learning_rate=0.4, weight_decay=None),
    )
    optimizer_from_numpy(optimizer, net, dataclasses.replace(training, groups=changed))
    after = optimizer_to_numpy(optimizer, net).groups
    assert [group.learning_rate for group in after] == [approx(0.3), approx(0.4)]
    assert [group.weight_decay for group in after] == [approx(decay) for decay in decays]


def test_a_number_for_a_rate_in_a_group_is_taken_and_set():
    net, optimizer = made("AdamW")
    optimizer.param_groups[0]["lr"] = 0.25
    training = optimizer_to_numpy(optimizer, net)
    assert training.groups[0].learning_rate == 0.25
    optimizer_from_numpy(optimizer, net, with_rate(training, 0.5))
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_without_groups_gamma_and_beta_do_not_decay():
    net, optimizer = made("SGD with weight decay")
    decays = {
        name: group.weight_decay
        for group in optimizer_to_numpy(optimizer, net).groups
        for name in group.parameters
    }
    assert decays["1.gamma"] == decays["1.beta"] == 0
    assert decays["0.weight"] == decays["3.bias"] == pytest.approx(0.1)


def test_a_schedule_of_the_decay_is_asked_for_its_value():
    class Falling(nn.Cell):
        def construct(self, step):
            return 0.1 / (step + 1)

    net = model()
    optimizer = nn.Adam(net.trainable_params(), weight_decay=Falling(), loss_scale=2.0)
    training = optimizer_to_numpy(optimizer, net)
    assert sorted(group.weight_decay for group in training.groups) == [0.0, pytest.approx(0.1)]
    with pytest.raises(
        RBNValueError, match=r"weight decay of the training, 0\.1 for 0\.weight, got 0\.025\. Build"
    ):
        optimizer_from_numpy(optimizer, net, dataclasses.replace(training, step=3))


def test_adam_corrects_its_bias_by_the_steps_of_the_training():
    net, optimizer = made("Adam")
    training = optimizer_to_numpy(optimizer, net)
    optimizer_from_numpy(optimizer, net, dataclasses.replace(training, step=100))
    assert optimizer.beta1_power.asnumpy() == pytest.approx(0.9**100, rel=1e-5)
    assert optimizer.beta2_power.asnumpy() == pytest.approx(0.999**100, rel=1e-5)


def without(training, name):
    slots = {slot: {n: a for n, a in arrays.items() if n != name} for slot, arrays in training.slots.items()}
    return dataclasses.replace(training, slots=slots)


def with_decay(training, decay):
    groups = tuple(dataclasses.replace(group, weight_decay=decay) for group in training.groups)
    return dataclasses.replace(training, groups=groups)


def without_first(training):
    """A training in which the first parameter is in no group."""
    first, *rest = training.groups
    assert first.parameters[0] == "0.weight"
    first = dataclasses.replace(first, parameters=first.parameters[1:])
    return dataclasses.replace(training, groups=(first, *rest))


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
        (lambda t: dataclasses.replace(t, step=-1), "a number of steps, .* got a step of -1"),
        (lambda t: dataclasses.replace(t, step=2.5), "a number of steps, .* got a step of 2.5"),
        (lambda t: dataclasses.replace(t, step=2**31), r"a number of steps below 2\^31"),
        (lambda t: with_rate(t, float("nan")), "got a learning rate of nan"),
        (
            lambda t: with_decay(t, 0.1),
            "weight decay of the training, 0.1 for 0.weight, got 0. Build it with",
        ),
        (lambda t: dataclasses.replace(with_decay(t, 0.1), decoupled=True), "decoupled from it, .* is added"),
        (
            lambda t: dataclasses.replace(
                t, groups=(*with_rate(without_first(t), 0.5).groups, Group(0.2, 0.0, ("0.weight",)))
            ),
            "one learning rate for all .* alike, got 0.2 for 0.weight, 0.5 for",
        ),
        (lambda t: without_first(t), "got none of 0.weight"),
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
    optimizer_from_numpy(optimizer, net, dataclasses.replace(with_rate(training, 0.1 * 0.9**3), step=3))
    with pytest.raises(RBNValueError, match=r"schedule after 4 updates, 0.0656\d*, got 0.1"):
        optimizer_from_numpy(optimizer, net, dataclasses.replace(training, step=4))
    assert optimizer.global_step.asnumpy() == [3]


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda w: nn.RMSProp(w), RBNTypeError, "Momentum, SGD, Adam or AdamWeightDecay.* got RMSProp"),
        (lambda w: nn.SGD(w, momentum=0.9, dampening=0.5), RBNValueError, "dampening=0.5: its momentum"),
        (lambda w: nn.Adam(w, use_amsgrad=True), RBNValueError, "use_amsgrad=True: it goes by the largest"),
        (lambda w: AdamW(w, amsgrad=True), RBNValueError, "amsgrad=True: it goes by the largest"),
        (lambda w: AdamW(w, maximize=True), RBNValueError, "maximize=True: its arrays are those of"),
        (
            lambda w: nn.SGD([*w, Parameter(Tensor([1.0]), name="strange")], 0.2),
            RBNValueError,
            r"got one of others: strange\. Build it with model.trainable_params",
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
