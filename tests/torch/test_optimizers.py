"""PyTorch optimizers that go on from where they stood."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from rbn.backends.torch import BNET, RBN, from_numpy, optimizer_from_numpy, optimizer_to_numpy, to_numpy
from rbn_core import RBNTypeError, RBNValueError
from rbn_core.training import Group, Training
from rbn_core.weights import read, save

OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, 0.05, momentum=0.9, weight_decay=1e-3),
    "nesterov": lambda parameters: torch.optim.SGD(parameters, 0.05, momentum=0.9, nesterov=True),
    "plain": lambda parameters: torch.optim.SGD(parameters, 0.05),
    "adam": lambda parameters: torch.optim.Adam(parameters, 0.01, foreach=True),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, torch.tensor(0.01), capturable=False),
    "adam in groups": lambda parameters: torch.optim.Adam(in_groups(parameters), 0.01),
    "sgd in groups": lambda parameters: torch.optim.SGD(in_groups(parameters), 0.05, weight_decay=0.1),
}


def in_groups(parameters):
    """The kernels, and without weight decay and at a tenth of the rate the rest."""
    parameters = list(parameters)
    return [
        {"params": [p for p in parameters if p.ndim > 1]},
        {"params": [p for p in parameters if p.ndim == 1], "lr": 0.005, "weight_decay": 0.0},
    ]


def without_options(optimizer):
    """The optimizer with rates and decays that nothing should be left of."""
    for group in optimizer.param_groups:
        group["lr"], group["weight_decay"] = group["lr"] * 7, 0.7
    return optimizer


def build(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    layers = nn.Conv2d(3, 4, 3), RBN(4), nn.ReLU(), BNET(4), nn.Flatten(), nn.Linear(36, 2)
    return nn.Sequential(*layers).to(dtype)


def train(model, optimizer, steps):
    """Train on batches that are the same for the same steps; return the losses."""
    losses = []
    for step in steps:
        x = torch.randn(5, 3, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        loss = model(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_ten_steps_and_ten_more_are_twenty(name, tmp_path):
    model = build()
    optimizer = OPTIMIZERS[name](model.parameters())
    train(model, optimizer, range(10))
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] * 0.5
    path = tmp_path / "training.safetensors"
    save(path, to_numpy(model), training=optimizer_to_numpy(optimizer, model, step=10))
    expected = train(model, optimizer, range(10, 20))

    stored = read(path)
    assert stored.training.step == 10
    expected_rate = 0.005 if name.startswith("adam") else 0.025
    assert stored.training.groups[0].learning_rate == pytest.approx(expected_rate)
    assert len(stored.training.groups) == (2 if "groups" in name else 1)
    assert stored.training.decoupled == (name == "adamw")
    other = build(seed=1)
    from_numpy(other, stored.state)
    its = without_options(OPTIMIZERS[name](other.parameters()))
    optimizer_from_numpy(its, other, stored.training)
    np.testing.assert_allclose(train(other, its, range(10, 20)), expected, rtol=1e-12)
    for key, array in to_numpy(other).items():
        np.testing.assert_allclose(array, to_numpy(model)[key], rtol=1e-9, atol=1e-12)


def test_moments_are_those_of_the_formulas():
    for kind, make in (("sgd", OPTIMIZERS["nesterov"]), ("adam", OPTIMIZERS["adam"])):
        model = nn.Linear(2, 2)
        optimizer = make(model.parameters())
        gradients = [np.array([[1.0, -2.0], [3.0, 4.0]]), np.array([[0.5, 1.0], [-1.0, 2.0]])]
        for gradient in gradients:
            model.weight.grad = torch.from_numpy(gradient).float()
            optimizer.step()
        training = optimizer_to_numpy(optimizer, model)
        g1, g2 = gradients
        expected = {"momentum": 0.9 * g1 + g2}
        if kind == "adam":
            expected = {"first_moment": 0.09 * g1 + 0.1 * g2}
            expected |= {"second_moment": 0.999 * 0.001 * g1**2 + 0.001 * g2**2}
            assert training.step == 2
        assert training.optimizer == kind
        assert training.slots.keys() == expected.keys()
        for slot, array in expected.items():
            np.testing.assert_allclose(training.slots[slot]["weight"], array, rtol=1e-5)
            np.testing.assert_array_equal(training.slots[slot]["bias"], np.zeros(2))


def test_names_are_canonical_and_arrays_are_copies():
    model = build()
    optimizer = OPTIMIZERS["adam"](model.parameters())
    train(model, optimizer, range(1))
    training = optimizer_to_numpy(optimizer, model)
    expected = {
        name for name in to_numpy(model) if not name.startswith(("1.running", "1.num", "3.running", "3.num"))
    }
    assert training.slots["first_moment"].keys() == expected
    assert {"1.gamma", "1.scale_bias", "3.conv_weight", "5.weight"} <= expected
    training.slots["first_moment"]["0.weight"][:] = 7
    assert not np.any(optimizer_to_numpy(optimizer, model).slots["first_moment"]["0.weight"] == 7)


def test_a_new_optimizer_stands_at_zero_and_a_part_of_the_model_is_enough():
    model = build()
    optimizer = OPTIMIZERS["adam"]([*model[0].parameters()])
    training = optimizer_to_numpy(optimizer, model)
    assert training.step == 0
    assert training.slots["second_moment"].keys() == {"0.weight", "0.bias"}
    assert all(not array.any() for slot in training.slots.values() for array in slot.values())
    optimizer_from_numpy(optimizer, model, training)
    train(model, optimizer, range(1))
    assert optimizer_to_numpy(optimizer, model).step == 1


def test_a_parameter_with_two_names_has_one_slot():
    model = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
    model["b"].weight = model["a"].weight
    optimizer = OPTIMIZERS["adam"](model.parameters())
    assert optimizer_to_numpy(optimizer, model).slots["first_moment"].keys() == {"a.weight"}


def test_dtypes_are_the_parameters():
    model = build(dtype=torch.bfloat16)
    optimizer = OPTIMIZERS["adam"](model.parameters())
    training = optimizer_to_numpy(optimizer, model)
    assert training.slots["first_moment"]["0.weight"].dtype == np.float32
    optimizer_from_numpy(optimizer, model, training)
    assert optimizer.state[model[0].weight]["exp_avg"].dtype == torch.bfloat16
    assert optimizer.state[model[0].weight]["step"].dtype == torch.float32


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda p: torch.optim.RMSprop(p),
            RBNTypeError,
            "SGD, Adam or AdamW, which every framework has, got RMSprop",
        ),
        (
            lambda p: torch.optim.SGD(p, momentum=0.9, dampening=0.1),
            RBNValueError,
            r"dampening=0\.1: its momentum",
        ),
        (
            lambda p: torch.optim.SGD(p, maximize=True),
            RBNValueError,
            "maximize=True: its arrays are those of",
        ),
        (lambda p: torch.optim.Adam(p, amsgrad=True), RBNValueError, "amsgrad=True: it goes by the largest"),
        (
            lambda p: torch.optim.SGD([{"params": [*p], "lr": 0.1}, {"params": [torch.ones(2)], "lr": 0.2}]),
            RBNValueError,
            r"optimizer of the model's parameters, got one of others: \(2,\)\. Build it with model",
        ),
        (
            lambda p: torch.optim.Adam(
                [
                    {"params": [next(p)], "weight_decay": 0.1, "decoupled_weight_decay": True},
                    {"params": [*p], "weight_decay": 0.1},
                ]
            ),
            RBNValueError,
            r"expected one decoupled_weight_decay for all parameters, got False, True",
        ),
        (
            lambda p: torch.optim.SGD([{"params": [next(p)], "momentum": 0.9}, {"params": [*p]}]),
            RBNValueError,
            "expected one use of momentum for all parameters, got False, True",
        ),
    ],
)
def test_what_means_something_else_is_refused(make, error, message):
    model = build()
    with pytest.raises(error, match=message):
        optimizer_to_numpy(make(model.parameters()), model)


def test_steps_that_differ_are_refused():
    model = build()
    optimizer = OPTIMIZERS["adam"](model.parameters())
    train(model, optimizer, range(2))
    optimizer.state[model[0].weight]["step"] += 3
    with pytest.raises(RBNValueError, match="expected one step for all parameters, got 2, 5"):
        optimizer_to_numpy(optimizer, model)


def wrong(training, **changes):
    groups = dataclasses.replace(training.groups[0], learning_rate=0.1, **changes.pop("group", {}))
    known = {"optimizer": "adam", "step": 3, "groups": (groups,), "slots": training.slots} | changes
    return Training(**known)


def test_what_does_not_fit_changes_nothing():
    model = build()
    optimizer = OPTIMIZERS["adam"](model.parameters())
    train(model, optimizer, range(2))
    before = optimizer_to_numpy(optimizer, model)
    first = before.slots["first_moment"]
    less = {name: array for name, array in first.items() if name != "0.bias"} | {
        "5.bias": np.ones(3),
        "x": np.ones(1),
    }
    cases = [
        (
            wrong(before, slots=before.slots | {"first_moment": less}),
            r"missing first_moment/0\.bias; unexpected first_moment/x; first_moment/5\.bias of shape",
        ),
        (wrong(before, optimizer="sgd"), "an optimizer of kind 'adam' stands, got 'sgd'"),
        (wrong(before, step=-1), "expected a number of steps, and groups .* got a step of -1"),
        (wrong(before, step="3"), "expected a number of steps, and groups .* got a step of '3'"),
        (wrong(before, groups=(Group(float("nan"), 0.0, ()),)), "got a learning rate of nan"),
        (
            wrong(before, groups=(Group(0.1, 0.0, tuple(first)[1:]),)),
            r"expected the learning rate of every parameter that is trained, got none of 0\.weight",
        ),
        (
            wrong(before, group={"weight_decay": 0.1}, decoupled=True),
            "decoupled from it.* got one where it is",
        ),
        (
            wrong(before, groups=(Group(0.1, 0.0, tuple(first)[1:]), Group(0.2, 0.0, ("0.weight",)))),
            r"expected one learning rate for all .* alike, got 0\.2 for 0\.weight, 0\.1 for 0\.bias\. Build",
        ),
        (
            wrong(before, groups=(Group(0.1, 0.0, tuple(first)[1:]), Group(0.1, 0.5, ("0.weight",)))),
            r"expected one weight decay for all .* alike, got 0\.5 for 0\.weight, 0 for 0\.bias",
        ),
    ]
    for training, message in cases:
        with pytest.raises(RBNValueError, match=message):
            optimizer_from_numpy(optimizer, model, training)
    after = optimizer_to_numpy(optimizer, model)
    assert (after.step, after.groups) == (2, before.groups)
    for slot, arrays in before.slots.items():
        for name, array in arrays.items():
            np.testing.assert_array_equal(after.slots[slot][name], array)


def test_the_rates_and_decays_of_the_groups_count():
    model = build()
    optimizer = OPTIMIZERS["sgd in groups"](model.parameters())
    training = optimizer_to_numpy(optimizer, model)
    kernels = ("0.weight", "3.conv_weight", "5.weight")
    assert training.groups[0] == Group(0.05, 0.1, kernels)
    assert training.groups[1].parameters[:2] == ("0.bias", "1.gamma")
    assert (training.groups[1].learning_rate, training.groups[1].weight_decay) == (0.005, 0.0)

    alone = without_options(torch.optim.SGD([{"params": [model[0].weight]}, {"params": [model[0].bias]}], 1))
    optimizer_from_numpy(alone, model, training)
    assert [(g["lr"], g["weight_decay"]) for g in alone.param_groups] == [(0.05, 0.1), (0.005, 0.0)]
    less = dataclasses.replace(training, groups=training.groups[:1])
    with pytest.raises(
        RBNValueError, match=r"learning rate of every parameter .* got none of 0\.bias\. Build"
    ):
        optimizer_from_numpy(alone, model, less)


def test_an_unknown_decay_leaves_the_optimizer_its_own():
    model = build()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    training = optimizer_to_numpy(optimizer, model)
    groups = (dataclasses.replace(training.groups[0], weight_decay=None, learning_rate=0.5),)
    optimizer_from_numpy(optimizer, model, dataclasses.replace(training, groups=groups))
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["weight_decay"]) == (0.5, 1e-3)


def test_a_decay_of_0_has_no_form():
    model = build()
    training = optimizer_to_numpy(torch.optim.AdamW(model.parameters(), 0.1, weight_decay=0.0), model)
    assert training.decoupled
    optimizer = without_options(torch.optim.Adam(model.parameters(), 0.1))
    optimizer_from_numpy(optimizer, model, training)
    assert optimizer.param_groups[0]["weight_decay"] == 0


def test_momentum_needs_an_optimizer_with_momentum():
    model = build()
    training = optimizer_to_numpy(OPTIMIZERS["sgd"](model.parameters()), model)
    with pytest.raises(RBNValueError, match=r"unexpected momentum/0\.weight"):
        optimizer_from_numpy(OPTIMIZERS["plain"](model.parameters()), model, training)
