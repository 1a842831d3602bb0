"""Where a PyTorch optimizer stands, to and from what every framework has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from rbn.backends.torch.weights import places, to_array, to_tensor
from rbn_core.matching import match
from rbn_core.stored_optimizers import SLOTS as ALL_SLOTS
from rbn_core.training import (
    REFUSED,
    Training,
    by_slot,
    check,
    check_decay,
    check_kind,
    check_meaning,
    check_own,
    grouped,
    needed,
    not_portable,
    one,
)

SLOTS = ALL_SLOTS["torch"]
"""What an optimizer keeps for every parameter, and what PyTorch calls it."""


def optimizer_to_numpy(optimizer: Optimizer, model: nn.Module, *, step: int = 0) -> Training:
    """Where an optimizer stands.

    SGD's momentum is b of b <- mu b + g, p <- p - lr b, also with Nesterov's look-ahead, and Adam's moments
    are those of its paper, without the correction of their bias: as PyTorch stores them.

    Args:
        optimizer: `torch.optim.SGD`, `Adam` or `AdamW`.
        model: What it trains.
        step: How many updates it has made: PyTorch's SGD does not count them. Adam does.

    Returns:
        Copies under canonical names; a parameter that has had no gradient yet has zeros. Learning rates and
        weight decays are those of the parameters' own groups.

    Raises:
        RBNTypeError: It is another optimizer.
        RBNValueError: An option gives its arrays another meaning, its parameters differ in their steps or in
            whether their weight decay is decoupled, or it trains parameters that are not the model's.
    """
    kind, slots = _kind(optimizer)
    parameters = _parameters(optimizer, model)
    names = {id(parameter): name for name, parameter in parameters.items()}
    states = {name: optimizer.state.get(parameter, {}) for name, parameter in parameters.items()}
    arrays = {
        slot: {
            name: to_array(_slot(states[name].get(own), parameter)) for name, parameter in parameters.items()
        }
        for slot, own in slots.items()
    }
    if kind == "adam":
        step = one("step", [int(state["step"]) for state in states.values() if "step" in state] or [0])
    options: dict[str, tuple[float, float | None]] = {
        names[id(parameter)]: (float(group["lr"]), float(group["weight_decay"]))
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    decaying = [group for group in optimizer.param_groups if group["weight_decay"]]
    return Training(kind, step, grouped(options), arrays, _decoupled(decaying or optimizer.param_groups))


def optimizer_from_numpy(optimizer: Optimizer, model: nn.Module, training: Training) -> None:
    """Let an optimizer go on from where another one stands, in place; its other options stay its own.

    Args:
        optimizer: `torch.optim.SGD`, `Adam` or `AdamW`. Its groups get the learning rate and the weight decay
            that their parameters have in the training's groups.
        model: What it trains.
        training: Where it is to stand, with an array for every parameter that it trains.

    Raises:
        RBNTypeError: It is another optimizer.
        RBNValueError: It is not of the kind of the training, the arrays do not fit, it has one group for
            parameters with several rates or decays, or another form of weight decay; nothing has changed.
    """
    kind, slots = _kind(optimizer)
    check_kind(training, kind)
    check(training)
    check_decay(training, _decoupled(optimizer.param_groups))
    parameters = _parameters(optimizer, model)
    shapes = {f"{slot}/{name}": tuple(p.shape) for slot in slots for name, p in parameters.items()}
    arrays, _ = match(by_slot(training.slots), shapes)
    tensors = {name: to_tensor(array) for name, array in arrays.items()}
    stored = optimizer.state_dict()
    names = {id(parameter): name for name, parameter in parameters.items()}
    stored["state"] = {}
    for group, own_group in zip(stored["param_groups"], optimizer.param_groups, strict=True):
        if own_group["params"]:
            alike = [names[id(parameter)] for parameter in own_group["params"]]
            old, rate = group["lr"], needed(training, "learning_rate", alike)
            group["lr"] = torch.full_like(old, rate) if torch.is_tensor(old) else rate
            if (decay := needed(training, "weight_decay", alike)) is not None:
                group["weight_decay"] = decay
        for index, parameter in zip(group["params"], own_group["params"], strict=True):
            state: dict[str, Tensor] = {
                own: tensors[f"{slot}/{names[id(parameter)]}"] for slot, own in slots.items()
            }
            if kind == "adam":
                state["step"] = torch.tensor(float(training.step))
            stored["state"][index] = state
    optimizer.load_state_dict(stored)  # which casts and moves everything as each parameter needs it


def _kind(optimizer: Optimizer) -> tuple[str, Mapping[str, str]]:
    """What an optimizer is called, and the slots in use, if both mean here what they mean elsewhere."""
    if not isinstance(optimizer, SGD | Adam | AdamW):
        raise not_portable("torch.optim.SGD, Adam or AdamW", optimizer)
    for group in optimizer.param_groups:
        for option in REFUSED:
            check_meaning(option, group.get(option))
    if not isinstance(optimizer, SGD):
        return "adam", SLOTS["adam"]
    uses_momentum = one("use of momentum", [bool(group["momentum"]) for group in optimizer.param_groups])
    return "sgd", SLOTS["sgd"] if uses_momentum else {}


def _decoupled(groups: list[dict[str, Any]]) -> bool:
    """Whether the weight decay of groups is decoupled from the gradient."""
    option = "decoupled_weight_decay"
    found: bool = one(option, [bool(group.get(option)) for group in groups])
    return found


def _parameters(optimizer: Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """What an optimizer trains, under canonical names; a parameter with two has the first."""
    names: dict[int, str] = {}
    for place, tensor in places(model).items():
        names.setdefault(id(tensor), place.full_name)
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    strange = [tuple(parameter.shape) for parameter in trained if id(parameter) not in names]
    check_own(strange, "model.parameters()")
    return {names[id(parameter)]: parameter for parameter in trained}


def _slot(stored: Tensor | None, parameter: Tensor) -> Tensor:
    """What is stored for a parameter, or the zeros that it starts from."""
    return torch.zeros_like(parameter) if stored is None else stored
