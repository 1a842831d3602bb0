"""Where a Jittor optimizer stands, to and from what every framework has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jittor import Module, Var
from jittor.optim import SGD, Adam, AdamW, Optimizer

from rbn.backends.jittor.weights import array, assign, fitting, variables
from rbn_core.matching import State
from rbn_core.names import RUNNING_STATISTICS
from rbn_core.stored_optimizers import SLOTS as ALL_SLOTS
from rbn_core.training import (
    Option,
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

SLOTS = ALL_SLOTS["jittor"]
"""What an optimizer keeps for every parameter, and what Jittor calls it."""

OPTIONS: dict[str, Option] = {"lr": "learning_rate", "weight_decay": "weight_decay"}
"""What groups of parameters have, and what it is elsewhere."""


def optimizer_to_numpy(optimizer: Optimizer, model: Module) -> Training:
    """Where an optimizer stands.

    SGD's momentum is b of b <- mu b + g, p <- p - lr b, also with Nesterov's look-ahead, and Adam's moments
    are those of its paper, without the correction of their bias: as Jittor stores them.

    Args:
        optimizer: `jittor.optim.SGD`, `Adam` or `AdamW`.
        model: What it trains.

    Returns:
        Copies under canonical names; a parameter that has had no gradient yet has zeros. Learning rates and
        weight decays are those of the parameters' own groups.

    Raises:
        RBNTypeError: It is another optimizer.
        RBNValueError: An option gives its arrays another meaning, or it trains variables that are not the
            model's.
    """
    kind, slots = _kind(optimizer)
    parameters = _parameters(optimizer, model)
    stored = _stored(optimizer, parameters, slots)
    arrays: dict[str, State] = {
        slot: {name: array(var) for name, var in variables.items()} for slot, variables in stored.items()
    }
    options: dict[str, tuple[float, float | None]] = {
        name: (float(_option(optimizer, group, "lr")), float(_option(optimizer, group, "weight_decay")))
        for group, own in zip(optimizer.param_groups, parameters, strict=True)
        for name in own.values()
    }
    decoupled = isinstance(optimizer, AdamW)
    return Training(kind, int(optimizer.n_step), grouped(options), arrays, decoupled)


def optimizer_from_numpy(optimizer: Optimizer, model: Module, training: Training) -> None:
    """Let an optimizer go on from where another one stands, in place; its other options stay its own.

    Args:
        optimizer: `jittor.optim.SGD`, `Adam` or `AdamW`. Its groups get the learning rate and weight decay
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
    check_decay(training, isinstance(optimizer, AdamW))
    parameters = _parameters(optimizer, model)
    options: dict[str, list[tuple[dict[str, Any], float | None]]] = {
        name: [
            (group, needed(training, option, own.values()))
            for group, own in zip(optimizer.param_groups, parameters, strict=True)
            if own
        ]
        for name, option in OPTIONS.items()
    }
    stored = by_slot(_stored(optimizer, parameters, slots))
    arrays, _ = fitting(by_slot(training.slots), stored)
    for name, value in arrays.items():
        assign(stored[name], value)
    optimizer.n_step = int(training.step)
    for name, groups in options.items():
        _set_option(optimizer, name, groups)


def _kind(optimizer: Optimizer) -> tuple[str, Mapping[str, str]]:
    """What an optimizer is, and the slots in use, if both mean here what they mean elsewhere."""
    if type(optimizer) not in (SGD, Adam, AdamW):
        raise not_portable("jittor.optim.SGD, Adam or AdamW", optimizer)
    if not isinstance(optimizer, SGD):
        return "adam", SLOTS["adam"]
    for group in optimizer.param_groups:
        check_meaning("dampening", _option(optimizer, group, "dampening"))
    momenta = [bool(_option(optimizer, group, "momentum")) for group in optimizer.param_groups]
    return "sgd", SLOTS["sgd"] if one("use of momentum", momenta) else {}


def _option(optimizer: Optimizer, group: Mapping[str, Any], name: str) -> Any:
    """An option of a group, or else the optimizer's."""
    return group.get(name, getattr(optimizer, name))


def _set_option(optimizer: Optimizer, name: str, groups: list[tuple[dict[str, Any], float | None]]) -> None:
    """Give every group its value, `None` for its own: through the optimizer's, where groups share that."""
    shared = {value for group, value in groups if name not in group}
    if len(shared) == 1 and (value := shared.pop()) is not None:
        setattr(optimizer, name, value)
    for group, value in groups:
        if value is not None and _option(optimizer, group, name) != value:
            group[name] = value


def _parameters(optimizer: Optimizer, model: Module) -> list[dict[int, str]]:
    """What every group of an optimizer trains: canonical names by index; a parameter with two has the first.

    Statistics and buffers, which a Jittor model has among its parameters, are none that it trains.
    """
    names: dict[int, str] = {}
    for name, var in variables(model).items():
        names.setdefault(id(var), name)
    trained = [var for group in optimizer.param_groups for var in group["params"]]
    check_own([tuple(var.shape) for var in trained if id(var) not in names], "model.parameters()")
    return [
        {
            index: names[id(var)]
            for index, var in enumerate(group["params"])
            if _is_parameter(names[id(var)], var)
        }
        for group in optimizer.param_groups
    ]


def _stored(
    optimizer: Optimizer, parameters: list[dict[int, str]], slots: Mapping[str, str]
) -> dict[str, dict[str, Var]]:
    """What an optimizer keeps, by slot under canonical names."""
    return {
        slot: {
            name: group[own][index]
            for group, names in zip(optimizer.param_groups, parameters, strict=True)
            for index, name in names.items()
        }
        for slot, own in slots.items()
    }


def _is_parameter(name: str, var: Var) -> bool:
    return (
        var.dtype.is_float()
        and name.rpartition(".")[2] not in RUNNING_STATISTICS
        and not hasattr(var, "persistent")
    )
