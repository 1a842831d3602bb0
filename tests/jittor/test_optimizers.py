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
from rbn_core.training import Group, Training


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
    "adamw in groups": lambda parameters: AdamW(in_groups(parameters), 0.01, weight_decay=0.1),
}


def in_groups(parameters):
    """The matrices, and without weight decay and at a tenth of the rate the rest."""
    return [
        {"params": [p for p in parameters if p.ndim > 1]},
        {"params": [p for p in parameters if p.ndim == 1], "lr": 0.001, "weight_decay": 0.0},
    ]


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
    assert training.groups[0].learning_rate == optimizer.lr
    assert len(training.groups) == (2 if "groups" in name else 1)
    assert training.decoupled == name.startswith("adamw")
    assert all(arrays.keys() == TRAINED for arrays in training.slots.values())
    other = Small()
    resumed = OPTIMIZERS[name](other.parameters())
    resumed.lr, resumed.weight_decay = 7.0, 0.7
    for group in resumed.param_groups:
        group |= {key: 0.7 for key in ("lr", "weight_decay") if key in group}
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
    assert dataclasses.replace(training, slots={}) == Training("sgd", 1, (Group(0.1, 0.5, ("weight",)),))


def test_the_first_moments_are_those_of_the_formula():
    training, _ = first_step(lambda parameters: Adam(parameters, 0.1, betas=(0.8, 0.99)))
    np.testing.assert_allclose(training.slots["first_moment"]["weight"], [[0.2 * 3, 0.2 * 0.5]], rtol=1e-6)
    np.testing.assert_allclose(
        training.slots["second_moment"]["weight"], [[0.01 * 9, 0.01 * 0.25]], rtol=1e-5
    )


def test_sgd_without_momentum_has_no_slots():
    training, _ = first_step(lambda parameters: SGD(parameters, 0.1))
    assert training == Training("sgd", 1, (Group(0.1, 0.0, ("weight",)),))


def test_the_rate_of_the_groups_counts():
    model = Small()
    groups = [{"params": [model.inner.weight], "lr": 0.5}, {"params": [model.outer.weight]}]
    optimizer = SGD(groups, 0.5, momentum=0.9)
    assert optimizer_to_numpy(optimizer, model).slots["momentum"].keys() == {"inner.weight", "outer.weight"}
    training = optimizer_to_numpy(optimizer, model)
    names = ("inner.weight", "outer.weight")
    assert training.groups == (Group(0.5, 0.0, names),)
    optimizer_from_numpy(optimizer, model, dataclasses.replace(training, groups=(Group(0.25, 0.1, names),)))
    assert (optimizer.lr, optimizer.param_groups[0]["lr"], optimizer.weight_decay) == (0.25, 0.25, 0.1)
    assert "lr" not in optimizer.param_groups[1]
    assert "weight_decay" not in optimizer.param_groups[0]
    groups = (Group(0.25, 0.0, names[:1]), Group(0.125, 0.01, names[1:]))
    optimizer_from_numpy(optimizer, model, dataclasses.replace(training, groups=groups))
    assert optimizer_to_numpy(optimizer, model).groups == groups
    together = SGD([model.inner.weight, model.outer.weight], 0.5, momentum=0.9)
    with pytest.raises(
        RBNValueError, match=r"one learning rate .* got 0\.25 for inner\.weight, 0\.125 for outer"
    ):
        optimizer_from_numpy(together, model, dataclasses.replace(training, groups=groups))
    assert together.lr == 0.5


def test_a_decay_in_another_form_is_refused_and_an_unknown_one_leaves_the_own():
    model = Small()
    adamw, adam = (kind(model.parameters(), 0.1, weight_decay=0.3) for kind in (AdamW, Adam))
    training = optimizer_to_numpy(adamw, model)
    with pytest.raises(
        RBNValueError, match=r"weight decay that is decoupled from it, .* got one where it is add"
    ):
        optimizer_from_numpy(adam, model, training)
    unknown = (dataclasses.replace(training.groups[0], learning_rate=0.2, weight_decay=None),)
    optimizer_from_numpy(adam, model, dataclasses.replace(training, groups=unknown))
    assert (adam.lr, adam.weight_decay) == (0.2, 0.3)


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
        (SGD(parameters, 0.1), nn.Linear(3, 4), RBNValueError, r"got one of others: \(4, 3\)"),
        (mixed, model, RBNValueError, "expected one use of momentum for all"),
    ):
        with pytest.raises(error, match=message):
            optimizer_to_numpy(optimizer, trains)
        with pytest.raises(error, match=message):
            optimizer_from_numpy(optimizer, trains, Training("sgd", 1, (Group(0.1, 0.0, ()),)))


def test_a_training_that_does_not_fit_changes_nothing():
    model = Small()
    optimizer = SGD(model.parameters(), 0.1, momentum=0.9)
    train(model, optimizer, range(2))
    good = optimizer_to_numpy(optimizer, model)
    slots = good.slots["momentum"]
    other = {name: value + 1 for name, value in slots.items()}
    groups = (Group(0.5, 0.5, tuple(slots)),)
    for change, message in (
        ({"optimizer": "adam"}, "expected where an optimizer of kind 'sgd' stands, got 'adam'"),
        ({"step": -1}, "expected a number of steps"),
        ({"step": 1.5}, "expected a number of steps"),
        ({"groups": (Group(float("nan"), 0.0, tuple(slots)),)}, "a finite learning rate"),
        ({"groups": good.groups * 2}, r"got inner\.weight twice in the groups"),
        ({"slots": {}}, r"missing momentum/inner\.weight"),
        ({"slots": {"momentum": other, "other": slots}}, r"unexpected other/inner\.weight"),
        ({"slots": {"momentum": other | {"inner.bias": np.zeros(3)}}}, r"momentum/inner\.bias of shape"),
        ({"slots": {"momentum": other | {"inner.bias": np.zeros(4, int)}}}, r"momentum/inner\.bias of dtype"),
    ):
        wrong = dataclasses.replace(good, **{"step": 9, "groups": groups} | change)
        with pytest.raises(RBNValueError, match=message):
            optimizer_from_numpy(optimizer, model, wrong)
        after = optimizer_to_numpy(optimizer, model)
        assert (after.step, after.groups) == (2, good.groups)
        for name, array in after.slots["momentum"].items():
            np.testing.assert_array_equal(array, slots[name])
