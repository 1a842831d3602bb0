"""Where a MindSpore optimizer stands, to and from what every framework has."""

from __future__ import annotations

import math
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn
from mindspore.experimental.optim import AdamW
from mindspore.nn.optim import Optimizer

from rbn.backends.mindspore.weights import Place, places, to_array, to_tensor
from rbn_core.errors import RBNValueError
from rbn_core.matching import match
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
)

SLOTS: dict[type[Optimizer], tuple[str, dict[str, str]]] = {
    nn.Momentum: ("sgd", {"momentum": "moments"}),
    nn.SGD: ("sgd", {"momentum": "accum"}),
    nn.Adam: ("adam", {"first_moment": "moment1", "second_moment": "moment2"}),
    nn.AdamWeightDecay: ("adam", {"first_moment": "moments1", "second_moment": "moments2"}),
    AdamW: ("adam", {"first_moment": "exp_avg", "second_moment": "exp_avg_sq"}),
}
"""What an optimizer is elsewhere, what it keeps for every parameter, and what MindSpore calls that."""

DECOUPLED = (nn.AdamWeightDecay, AdamW)
"""Whose weight decay is decoupled from the gradient."""


def optimizer_to_numpy(optimizer: Optimizer, model: nn.Cell) -> Training:
    """Where an optimizer stands.

    SGD's momentum is b of b <- mu b + g, p <- p - lr b, also with Nesterov's look-ahead, and Adam's moments
    are those of its paper, without the correction of their bias: as MindSpore stores them. AdamWeightDecay
    never corrects it; the AdamW of other frameworks is `mindspore.experimental.optim.AdamW`.

    Args:
        optimizer: `mindspore.nn.Momentum`, `SGD`, `Adam` or `AdamWeightDecay`, or
            `mindspore.experimental.optim.AdamW`.
        model: What it trains.

    Returns:
        Copies under canonical names; a parameter that has had no gradient yet has zeros. Learning rates and
        weight decays are the parameters' own in the next update, also those of schedules: where there are no
        groups, MindSpore does not decay what has gamma or beta in its name.

    Raises:
        RBNTypeError: It is another optimizer.
        RBNValueError: An option gives its arrays another meaning, or it trains parameters that are not the
            model's.
    """
    kind, slots = _kind(optimizer)
    trained = _trained(optimizer, model)
    step = int(_counter(optimizer).asnumpy().item())
    arrays = {
        slot: {name: to_array(place) for name, place in own.items()}
        for slot, own in _stored(optimizer, trained, slots).items()
    }
    rates = [_number(rate, step) for rate in _rates(optimizer)]
    options = dict(zip(trained, zip(rates, _decays(optimizer, step), strict=True), strict=True))
    return Training(kind, step, grouped(options), arrays, isinstance(optimizer, DECOUPLED))


def optimizer_from_numpy(optimizer: Optimizer, model: nn.Cell, training: Training) -> None:
    """Let an optimizer go on from where another one stands, in place; its other options stay its own.

    Args:
        optimizer: As in `optimizer_to_numpy`. If it has a schedule, that goes on from the step. Its groups
            get the learning rates that their parameters have in the training's groups. The weight decays of
            `mindspore.nn` cannot be changed once an optimizer is built, and have to be these.
        model: What it trains.
        training: Where it is to stand, with an array for every parameter that it trains.

    Raises:
        RBNTypeError: It is another optimizer.
        RBNValueError: It is not of the kind of the training, the arrays do not fit, its schedule has another
            learning rate at the step, it has one group for parameters with several rates, or its weight decay
            is another one or has another form; nothing has changed.
    """
    kind, slots = _kind(optimizer)
    check_kind(training, kind)
    check(training)
    if training.step >= 2**31:
        raise RBNValueError(
            f"RBN: expected a number of steps below 2^31, which MindSpore counts in, got {training.step}. "
            "Write the training's state again."
        )
    check_decay(training, isinstance(optimizer, DECOUPLED))
    trained = _trained(optimizer, model)
    numbers = _numbers(optimizer, training, list(trained))
    options = _group_options(optimizer, training, list(trained))
    stored = by_slot(_stored(optimizer, trained, slots))
    arrays, _ = match(by_slot(training.slots), {name: place.shape for name, place in stored.items()})
    values = [
        (stored[name].parameter, to_tensor(array, stored[name].parameter)) for name, array in arrays.items()
    ]
    values += [(number, Tensor(np.full(number.shape, value), number.dtype)) for number, value in numbers]
    for parameter, tensor in values:
        parameter.copy_(tensor)  # the optimizer's compiled graph does not see what set_data puts there
    for group, name, value in options:
        group[name] = value


def _kind(optimizer: Optimizer) -> tuple[str, dict[str, str]]:
    """What an optimizer is called, and the slots in use, if both mean here what they mean elsewhere."""
    if type(optimizer) not in SLOTS:
        raise not_portable(
            "mindspore.nn.Momentum, SGD, Adam or AdamWeightDecay, or mindspore.experimental.optim.AdamW",
            optimizer,
        )
    groups = optimizer.param_groups if isinstance(optimizer, AdamW) else []
    for option in REFUSED:
        for value in (getattr(optimizer, option, False), *(group.get(option) for group in groups)):
            check_meaning(option, value)
    kind, slots = SLOTS[type(optimizer)]
    return kind, slots if kind == "adam" or optimizer.momentum.asnumpy() > 0 else {}


def _trained(optimizer: Optimizer, model: nn.Cell) -> dict[str, Place]:
    """What an optimizer trains, under canonical names; a parameter with two has the first."""
    names: dict[int, str] = {}
    known = places(model)
    for name, place in known.items():
        names.setdefault(id(place.parameter), name)
    strange = [parameter.name for parameter in optimizer.parameters if id(parameter) not in names]
    check_own(strange, "model.trainable_params()")
    return {names[id(parameter)]: known[names[id(parameter)]] for parameter in optimizer.parameters}


def _stored(
    optimizer: Optimizer, trained: dict[str, Place], slots: dict[str, str]
) -> dict[str, dict[str, Place]]:
    """What an optimizer keeps, by slot under canonical names."""
    return {
        slot: {
            name: Place(parameter, place.shape)
            for (name, place), parameter in zip(trained.items(), getattr(optimizer, own), strict=True)
        }
        for slot, own in slots.items()
    }


def _numbers(optimizer: Optimizer, training: Training, names: list[str]) -> list[tuple[Parameter, float]]:
    """What an optimizer keeps beside arrays for its parameters, and what that is where a training stands.

    Raises:
        RBNValueError: A learning rate or weight decay that cannot be changed is another one.
    """
    numbers: list[tuple[Parameter, float]] = [(_counter(optimizer), training.step)]
    alike: dict[int, tuple[Any, list[str]]] = {}
    for rate, name in zip(_rates(optimizer), names, strict=True):
        alike.setdefault(id(rate), (rate, []))[1].append(name)
    for rate, own in alike.values():
        value = needed(training, "learning_rate", own)
        assert value is not None
        if isinstance(rate, Parameter):
            numbers.append((rate, value))
        elif isinstance(rate, nn.Cell):
            _check_schedule(_number(rate, training.step), value, training.step)
    if not isinstance(optimizer, AdamW):
        for name, decay in zip(names, _decays(optimizer, training.step), strict=True):
            _check_decay(name, decay, needed(training, "weight_decay", [name]))
    if isinstance(optimizer, nn.SGD):  # where `stat` is not 0, the next update forgets the momentum
        numbers += [(stat, float(training.step == 0)) for stat in optimizer.stat]
    if isinstance(optimizer, nn.Adam):
        for beta, power in (("beta1", "beta1_power"), ("beta2", "beta2_power")):
            decay = float(getattr(optimizer, beta).asnumpy())
            numbers.append((getattr(optimizer, power), decay**training.step))
    return numbers


def _group_options(
    optimizer: Optimizer, training: Training, names: list[str]
) -> list[tuple[dict[str, Any], str, float]]:
    """What the groups of `mindspore.experimental.optim` hold as plain numbers, and what that is to be."""
    found: list[tuple[dict[str, Any], str, float]] = []
    for group in optimizer.param_groups if isinstance(optimizer, AdamW) else []:
        own, names = names[: len(group["params"])], names[len(group["params"]) :]
        rate, decay = needed(training, "learning_rate", own), needed(training, "weight_decay", own)
        if isinstance(group["lr"], float) and rate is not None:
            found.append((group, "lr", rate))
        if decay is not None:
            found.append((group, "weight_decay", decay))
    return found


def _counter(optimizer: Optimizer) -> Parameter:
    """What counts the updates."""
    return optimizer.state_step if isinstance(optimizer, AdamW) else optimizer.global_step


def _rates(optimizer: Optimizer) -> list[Any]:
    """The learning rate of every parameter, one object per group: a parameter, a number or a schedule."""
    if isinstance(optimizer, AdamW):
        return [group["lr"] for group in optimizer.param_groups for _ in group["params"]]
    if optimizer.is_group_lr:
        return list(optimizer.learning_rate)
    return [optimizer.learning_rate] * len(optimizer.parameters)


def _decays(optimizer: Optimizer, step: int) -> list[float]:
    """The weight decay of every parameter after so many updates."""
    if isinstance(optimizer, AdamW):
        return [float(group["weight_decay"]) for group in optimizer.param_groups for _ in group["params"]]
    if optimizer.is_group:
        return [_number(decay, step) / optimizer.loss_scale for decay in optimizer.group_weight_decay]
    decay = _number(optimizer.weight_decay, step) / optimizer.loss_scale
    return [decay if flag else 0.0 for flag in optimizer.decay_flags]


def _number(value: Any, step: int) -> float:
    """A number, or what a schedule says after so many updates."""
    if isinstance(value, float):
        return value
    if isinstance(value, nn.Cell):
        value = value(Tensor([step], ms.int32))
    return float(value.asnumpy().item())


def _check_schedule(rate: float, needs: float, step: int) -> None:
    """Refuse to change what a schedule says."""
    if not math.isclose(rate, needs, rel_tol=1e-6):
        raise RBNValueError(
            f"RBN: expected the learning rate of the optimizer's schedule after {step} updates, "
            f"{rate:g}, got {needs:g}. Build the optimizer with a number, or with a schedule that agrees."
        )


def _check_decay(name: str, decay: float, needs: float | None) -> None:
    """Refuse to decay what was not decayed before, or by another factor: MindSpore compiles the decay in."""
    if needs is not None and not math.isclose(decay, needs, rel_tol=1e-6):
        raise RBNValueError(
            f"RBN: expected an optimizer with the weight decay of the training, {needs:g} for {name}, got "
            f"{decay:g}. Build it with a group of parameters, and its weight_decay, for each of "
            "training.groups: without groups MindSpore leaves out what has gamma or beta in its name."
        )
