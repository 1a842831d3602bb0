"""Where a MindSpore optimizer stands, to and from what every framework has."""

from __future__ import annotations

import math
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn
from mindspore.nn.optim import Optimizer

from rbn.backends.mindspore.weights import Place, places, to_array, to_tensor
from rbn_core.errors import RBNTypeError, RBNValueError
from rbn_core.matching import match
from rbn_core.weights import Training

SLOTS: dict[type[Optimizer], tuple[str, dict[str, str]]] = {
    nn.Momentum: ("sgd", {"momentum": "moments"}),
    nn.SGD: ("sgd", {"momentum": "accum"}),
    nn.Adam: ("adam", {"first_moment": "moment1", "second_moment": "moment2"}),
    nn.AdamWeightDecay: ("adam", {"first_moment": "moments1", "second_moment": "moments2"}),
}
"""What an optimizer is elsewhere, what it keeps for every parameter, and what MindSpore calls that."""

REFUSED = {
    "dampening": "its momentum leaves a part of every gradient out",
    "use_amsgrad": "it goes by the largest second moment so far, which has no place elsewhere",
}
"""Options that give the arrays another meaning, and which."""


def optimizer_to_numpy(optimizer: Optimizer, model: nn.Cell) -> Training:
    """Where an optimizer stands.

    SGD's momentum is b of b <- mu b + g, p <- p - lr b, also with Nesterov's look-ahead, and Adam's moments
    are those of its paper, without the correction of their bias: as MindSpore stores them. AdamWeightDecay
    never corrects it.

    Args:
        optimizer: `mindspore.nn.Momentum`, `SGD`, `Adam` or `AdamWeightDecay`.
        model: What it trains.

    Returns:
        Copies under canonical names; a parameter that has had no gradient yet has zeros. The learning rate is
        that of the next update, also of a schedule.

    Raises:
        RBNTypeError: It is another optimizer.
        RBNValueError: An option gives its arrays another meaning, its groups differ in their learning rates,
            or it trains parameters that are not the model's.
    """
    kind, slots = _kind(optimizer)
    step = int(optimizer.global_step.asnumpy().item())
    arrays = {
        slot: {name: to_array(place) for name, place in own.items()}
        for slot, own in _stored(optimizer, model, slots).items()
    }
    return Training(kind, step, _rate(optimizer, step), arrays)


def optimizer_from_numpy(optimizer: Optimizer, model: nn.Cell, training: Training) -> None:
    """Let an optimizer go on from where another one stands, in place; its other options stay its own.

    Args:
        optimizer: `mindspore.nn.Momentum`, `SGD`, `Adam` or `AdamWeightDecay`. If it has a schedule, that
            goes on from the step.
        model: What it trains.
        training: Where it is to stand, with an array for every parameter that it trains.

    Raises:
        RBNTypeError: It is another optimizer.
        RBNValueError: It is not of the kind of the training, the arrays do not fit, or its schedule has
            another learning rate at the step; nothing has changed.
    """
    kind, slots = _kind(optimizer)
    if training.optimizer != kind:
        raise RBNValueError(
            f"RBN: expected where an optimizer of kind {kind!r} stands, got {training.optimizer!r}. "
            "Build the optimizer that the training was made with."
        )
    _check_numbers(training)
    stored = {
        f"{slot}/{name}": place
        for slot, own in _stored(optimizer, model, slots).items()
        for name, place in own.items()
    }
    given = {f"{slot}/{name}": value for slot, own in training.slots.items() for name, value in own.items()}
    arrays, _ = match(given, {name: place.shape for name, place in stored.items()})
    _check_schedule(optimizer, training)
    values = [
        (stored[name].parameter, to_tensor(array, stored[name].parameter)) for name, array in arrays.items()
    ]
    values += [
        (number, Tensor(np.full(number.shape, value), number.dtype))
        for number, value in _numbers(optimizer, training)
    ]
    for parameter, tensor in values:
        parameter.copy_(tensor)  # the optimizer's compiled graph does not see what set_data puts there


def _kind(optimizer: Optimizer) -> tuple[str, dict[str, str]]:
    """What an optimizer is called, and the slots in use, if both mean here what they mean elsewhere."""
    if type(optimizer) not in SLOTS:
        raise RBNTypeError(
            "RBN: expected mindspore.nn.Momentum, SGD, Adam or AdamWeightDecay, which every framework has, "
            f"got {type(optimizer).__name__}. Train with one of these, or move the weights alone."
        )
    for option, reason in REFUSED.items():
        if value := getattr(optimizer, option, False):
            raise RBNValueError(
                f"RBN: expected an optimizer that means the same everywhere, got {option}={value!r}: "
                f"{reason}. Train without it, or move the weights alone."
            )
    kind, slots = SLOTS[type(optimizer)]
    return kind, slots if kind == "adam" or optimizer.momentum.asnumpy() > 0 else {}


def _stored(optimizer: Optimizer, model: nn.Cell, slots: dict[str, str]) -> dict[str, dict[str, Place]]:
    """What an optimizer keeps, by slot under canonical names; a parameter with two has the first."""
    names: dict[int, str] = {}
    known = places(model)
    for name, place in known.items():
        names.setdefault(id(place.parameter), name)
    if strange := [parameter.name for parameter in optimizer.parameters if id(parameter) not in names]:
        raise RBNValueError(
            f"RBN: expected an optimizer of the model's parameters, got one of others, {', '.join(strange)}. "
            "Build it with model.trainable_params()."
        )
    trained = [names[id(parameter)] for parameter in optimizer.parameters]
    return {
        slot: {
            name: Place(parameter, known[name].shape)
            for name, parameter in zip(trained, getattr(optimizer, own), strict=True)
        }
        for slot, own in slots.items()
    }


def _numbers(optimizer: Optimizer, training: Training) -> list[tuple[Parameter, float]]:
    """What an optimizer keeps beside arrays for its parameters, and what that is where a training stands."""
    numbers: list[tuple[Parameter, float]] = [(optimizer.global_step, training.step)]
    if not optimizer.dynamic_lr:
        numbers += [(rate, training.learning_rate) for rate in _rates(optimizer)]
    if isinstance(optimizer, nn.SGD):  # where `stat` is not 0, the next update forgets the momentum
        numbers += [(stat, float(training.step == 0)) for stat in optimizer.stat]
    if isinstance(optimizer, nn.Adam):
        for beta, power in (("beta1", "beta1_power"), ("beta2", "beta2_power")):
            decay = float(getattr(optimizer, beta).asnumpy())
            numbers.append((getattr(optimizer, power), decay**training.step))
    return numbers


def _rates(optimizer: Optimizer) -> list[Any]:
    """The learning rates of all groups: parameters, or cells that take the step."""
    return list(optimizer.learning_rate) if optimizer.is_group_lr else [optimizer.learning_rate]


def _rate(optimizer: Optimizer, step: int) -> float:
    """The learning rate of all groups after so many updates."""
    rates = _rates(optimizer)
    if optimizer.dynamic_lr:
        rates = [schedule(Tensor([step], ms.int32)) for schedule in rates]
    values = {float(rate.asnumpy().item()) for rate in rates}
    if len(values) > 1:
        raise RBNValueError(
            f"RBN: expected one learning rate for all parameters, got {', '.join(map(str, sorted(values)))}. "
            "Move the weights alone, or train all parameters alike."
        )
    return values.pop()


def _check_schedule(optimizer: Optimizer, training: Training) -> None:
    """Refuse to change what a schedule says."""
    rate = _rate(optimizer, training.step)
    if optimizer.dynamic_lr and not math.isclose(rate, training.learning_rate, rel_tol=1e-6):
        raise RBNValueError(
            f"RBN: expected the learning rate of the optimizer's schedule after {training.step} updates, "
            f"{rate:g}, got {training.learning_rate:g}. Build the optimizer with a number, or with a "
            "schedule that agrees."
        )


def _check_numbers(training: Training) -> None:
    step, rate = training.step, training.learning_rate
    whole = isinstance(step, int | np.integer) and not isinstance(step, bool) and 0 <= step < 2**31
    if not whole or not isinstance(rate, int | float | np.number) or not math.isfinite(rate):
        raise RBNValueError(
            f"RBN: expected a number of steps and a finite learning rate, got {step!r} and {rate!r}. "
            "Write the training's state again."
        )
