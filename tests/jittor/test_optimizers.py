"""Where Jittor's optimizers stand, to and from what every framework has."""

import dataclasses

import numpy as np
import pytest

from rbn.backends.jittor import RBN, from_numpy, optimizer_from_numpy, optimizer_to_numpy, to_numpy

# After the backend, which prepares what Jittor reads at its import.
# isort: split
import jittor as jt
from jittor import Module, nn
from jittor.optim import SGD, Adam, AdamW, RMSprop

from rbn_core import RBNTypeError, RBNValueError
from rbn_core.weights import Training


class Small(Module):
    """Two layers and statistics, which Jittor has among the parameters."""

    def __init__(self):
        self.inner = nn.Linear(3, 4)
        self.norm = RBN(4)
        self.outer = nn.Linear(4, 1, bias=False)

    def execute(self, x):
        return self.outer(self.norm(self.inner(x)))


TRAINED = {
    *("inner.weight", "inner.bias", "outer.weight"),
    *(f"norm.{name}" for name in ("gamma", "beta", "center_weight", "scale_weight", "scale_bias")),
}

OPTIMIZERS = {
    "sgd": lambda parameters: SGD(parameters, 0.05, momentum=0.9, weight_decay=0.01),
    "nesterov": lambda parameters: SGD(parameters, 0.05, momentum=0.9, nesterov=True),
    "adam": lambda parameters: Adam(parameters, 0.01, weight_decay=0.01),
    "adamw": lambda parameters: AdamW(parameters, 0.01, weight_decay=0.01),
}


def train(model, optimizer, steps):
    losses = []
    for step in steps:
        x = jt.array(np.random.default_rng(step).normal(size=(8, 3)).astype("float32"))
        loss = (model(x) - x.sum(1, keepdims=True)).sqr().mean()
        optimizer.step(loss)
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_ten_steps_and_ten_more_are_twenty(name):
    model = Small()
    optimizer = OPTIMIZERS[name](model.parameters())
    train(model, optimizer, range(10))
    state, training = to_numpy(model), optimizer_to_numpy(optimizer, model)
    expected = train(model, optimizer, range(10, 20))
    assert (training.optimizer, training.step) == ("adam" if "adam" in name else "sgd", 10)
    assert training.learning_rate == optimizer.lr
    assert all(arrays.keys() == TRAINED for arrays in training.slots.values())
    other = Small()
    resumed = OPTIMIZERS[name](other.parameters())
    resumed.lr = 7.0
    from_numpy(other, state)
    optimizer_from_numpy(resumed, other, training)
    np.testing.assert_allclose(train(other, resumed, range(10, 20)), expected, rtol=1e-6)
    assert resumed.n_step == 20
    assert all(var.is_stop_grad() for group in resumed.param_groups for var in group["values"])


def first_step(optimizer_of):
    """An optimizer after one step with a known gradient."""
    model = nn.Linear(2, 1, bias=False)
    model.weight.update(jt.array([[1.0, -2.0]]))
    optimizer = optimizer_of([model.weight])
    optimizer.step((model.weight * jt.array([[3.0, 0.5]])).sum())
    return optimizer_to_numpy(optimizer, model), model.weight.numpy()


def test_the_first_momentum_is_the_gradient():
    training, weight = first_step(lambda parameters: SGD(parameters, 0.1, momentum=0.9, weight_decay=0.5))
    gradient = np.array([[3.5, -0.5]])  # with the decay
    np.testing.assert_allclose(training.slots["momentum"]["weight"], gradient, rtol=1e-6)
    np.testing.assert_allclose(weight, [[1.0, -2.0]] - 0.1 * gradient, rtol=1e-6)
    assert dataclasses.replace(training, slots={}) == Training("sgd", 1, 0.1)


def test_the_first_moments_are_those_of_the_formula():
    training, _ = first_step(lambda parameters: Adam(parameters, 0.1, betas=(0.8, 0.99)))
    np.testing.assert_allclose(training.slots["first_moment"]["weight"], [[0.2 * 3, 0.2 * 0.5]], rtol=1e-6)
    np.testing.assert_allclose(
        training.slots["second_moment"]["weight"], [[0.01 * 9, 0.01 * 0.25]], rtol=1e-5
    )


def test_sgd_without_momentum_has_no_slots():
    training, _ = first_step(lambda parameters: SGD(parameters, 0.1))
    assert training == Training("sgd", 1, 0.1)


def test_the_rate_of_the_groups_counts():
    model = Small()
    groups = [{"params": [model.inner.weight], "lr": 0.5}, {"params": [model.outer.weight]}]
    optimizer = SGD(groups, 0.5, momentum=0.9)
    assert optimizer_to_numpy(optimizer, model).slots["momentum"].keys() == {"inner.weight", "outer.weight"}
    training = dataclasses.replace(optimizer_to_numpy(optimizer, model), learning_rate=0.25)
    optimizer_from_numpy(optimizer, model, training)
    assert (optimizer.lr, optimizer.param_groups[0]["lr"]) == (0.25, 0.25)
    assert "lr" not in optimizer.param_groups[1]
    optimizer.param_groups[0]["lr"] = 0.125
    with pytest.raises(
        RBNValueError, match=r"expected one learning rate for all parameters, got 0\.125, 0\.25"
    ):
        optimizer_to_numpy(optimizer, model)


def test_a_variable_of_two_layers_comes_once():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    training = optimizer_to_numpy(Adam(model.parameters(), 0.1), model)
    assert training.slots["first_moment"].keys() == {"0.weight", "0.bias"}


def test_buffers_and_integers_are_not_trained():
    model = nn.Linear(2, 2)
    model.register_buffer("offset", jt.zeros(2))
    model.table = jt.array([1, 2]).int32()
    optimizer = SGD(model.parameters(), 0.1, momentum=0.5)
    assert optimizer_to_numpy(optimizer, model).slots["momentum"].keys() == {"weight", "bias"}


def test_what_means_something_else_is_refused():
    model = Small()
    parameters = model.parameters()
    mixed = SGD([{"params": parameters[:1], "momentum": 0.5}, {"params": parameters[1:]}], 0.1)
    for optimizer, trains, error, message in (
        (RMSprop(parameters), model, RBNTypeError, r"expected jittor.optim.SGD, Adam or AdamW.*got RMSprop"),
        (SGD(parameters, 0.1, 0.9, dampening=0.5), model, RBNValueError, r"got dampening=0\.5"),
        (SGD(parameters, 0.1), nn.Linear(3, 4), RBNValueError, "got one of others, of shapes"),
        (mixed, model, RBNValueError, "expected one momentum or none for all"),
    ):
        with pytest.raises(error, match=message):
            optimizer_to_numpy(optimizer, trains)
        with pytest.raises(error, match=message):
            optimizer_from_numpy(optimizer, trains, Training("sgd", 1, 0.1))


def test_a_training_that_does_not_fit_changes_nothing():
    model = Small()
    optimizer = SGD(model.parameters(), 0.1, momentum=0.9)
    train(model, optimizer, range(2))
    good = optimizer_to_numpy(optimizer, model)
    slots = good.slots["momentum"]
    other = {name: value + 1 for name, value in slots.items()}
    for change, message in (
        ({"optimizer": "adam"}, "expected where an optimizer of kind 'sgd' stands, got 'adam'"),
        ({"step": -1}, "expected a number of steps"),
        ({"step": 1.5}, "expected a number of steps"),
        ({"learning_rate": float("nan")}, "a finite learning rate"),
        ({"slots": {}}, r"missing momentum/inner\.weight"),
        ({"slots": {"momentum": other, "other": slots}}, r"unexpected other/inner\.weight"),
        ({"slots": {"momentum": other | {"inner.bias": np.zeros(3)}}}, r"momentum/inner\.bias of shape"),
        ({"slots": {"momentum": other | {"inner.bias": np.zeros(4, int)}}}, r"momentum/inner\.bias of dtype"),
    ):
        wrong = dataclasses.replace(good, **{"step": 9, "learning_rate": 0.5} | change)
        with pytest.raises(RBNValueError, match=message):
            optimizer_from_numpy(optimizer, model, wrong)
        after = optimizer_to_numpy(optimizer, model)
        assert (after.step, after.learning_rate) == (2, 0.1)
        for name, array in after.slots["momentum"].items():
            np.testing.assert_array_equal(array, slots[name])
