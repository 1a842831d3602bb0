"""Where an optimizer stands, in terms that every framework has."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from rbn_core.errors import RBNTypeError, RBNValueError
from rbn_core.matching import State

REFUSED = {
    "maximize": "its arrays are those of the negated gradient",
    "dampening": "its momentum leaves a part of every gradient out",
    "amsgrad": "it goes by the largest second moment so far, which has no place elsewhere",
    "use_amsgrad": "it goes by the largest second moment so far, which has no place elsewhere",
}
"""Options of optimizers that give the arrays another meaning, and which."""

Option = Literal["learning_rate", "weight_decay"]


@dataclass(frozen=True)
class Group:
    """Parameters that have the same learning rate and the same weight decay.

    Args:
        learning_rate: The rate of the next update.
        weight_decay: By how much of the parameter every update decays it; `None` if that is not known, as in
            files of schema 1.
        parameters: Their canonical names.
    """

    learning_rate: float
    weight_decay: float | None
    parameters: tuple[str, ...]


@dataclass(frozen=True)
class Training:
    """Where an optimizer stands.

    With the rate lr, the weight decay d, the gradient g and what the optimizer makes of it, u(g), a parameter
    p becomes p - lr u(g + d p), and p - lr (u(g) + d p) where the decay is decoupled.

    Args:
        optimizer: "sgd" (slot "momentum") or "adam" (slots "first_moment", "second_moment").
        step: How many updates it has made.
        groups: The learning rates and weight decays, and whose they are; each parameter is in one.
        slots: By slot, arrays under the canonical names of the parameters they belong to.
        decoupled: Whether the weight decay is decoupled from the gradient, as AdamW's.
    """

    optimizer: str
    step: int
    groups: tuple[Group, ...]
    slots: dict[str, State] = field(default_factory=dict)
    decoupled: bool = False


def grouped(options: Mapping[str, tuple[float, float | None]]) -> tuple[Group, ...]:
    """The groups of parameters that have the same learning rate and weight decay.

    Args:
        options: The rate and the decay of every parameter, under canonical names.
    """
    names: dict[tuple[float, float | None], list[str]] = {}
    for name, alike in options.items():
        names.setdefault(alike, []).append(name)
    return tuple(Group(*alike, tuple(own)) for alike, own in names.items())


def fault(training: Training) -> str:
    """What is wrong with the numbers and names of a training, in words; nothing if it is whole."""
    step, groups = training.step, training.groups
    if not _is_number(step) or not isinstance(step, int | np.integer) or step < 0:
        return f"a step of {step!r}"
    if not isinstance(groups, tuple) or not all(isinstance(group, Group) for group in groups):
        return f"groups of {groups!r}"
    names: set[str] = set()
    for group in groups:
        if not _is_number(group.learning_rate):
            return f"a learning rate of {group.learning_rate!r}"
        if group.weight_decay is not None and not _is_number(group.weight_decay):
            return f"a weight decay of {group.weight_decay!r}"
        if not isinstance(group.parameters, tuple) or not all(isinstance(n, str) for n in group.parameters):
            return f"parameters of {group.parameters!r}"
        for name in group.parameters:
            if name in names:
                return f"{name} twice in the groups"
            names.add(name)
    return ""


def check(training: Training) -> None:
    """Refuse a training that no optimizer can go on from.

    Raises:
        RBNValueError: Its step or a rate or decay is no finite number, or a parameter is in two groups.
    """
    if wrong := fault(training):
        raise RBNValueError(
            "RBN: expected a number of steps, and groups with a finite learning rate and weight decay and "
            f"no parameter in two of them, got {wrong}. Write the training's state again."
        )


def check_kind(training: Training, kind: str) -> None:
    """Refuse a training of another optimizer.

    Args:
        training: Where an optimizer stands.
        kind: What the optimizer is that is to stand there, "sgd" or "adam".

    Raises:
        RBNValueError: They differ.
    """
    if training.optimizer != kind:
        raise RBNValueError(
            f"RBN: expected where an optimizer of kind {kind!r} stands, got {training.optimizer!r}. "
            "Build the optimizer that the training was made with."
        )


def not_portable(known: str, optimizer: object) -> RBNTypeError:
    """The error for an optimizer that has no equal in the other frameworks.

    Args:
        known: The framework's optimizers that have.
        optimizer: The other.
    """
    return RBNTypeError(
        f"RBN: expected {known}, which every framework has, got {type(optimizer).__name__}. "
        "Train with one of these, or move the weights alone."
    )


def check_meaning(option: str, value: object) -> None:
    """Refuse an option that gives the arrays of an optimizer another meaning.

    Args:
        option: One of `REFUSED`.
        value: What it is set to.

    Raises:
        RBNValueError: It is set.
    """
    if value:
        raise RBNValueError(
            f"RBN: expected an optimizer that means the same everywhere, got {option}={value!r}: "
            f"{REFUSED[option]}. Train without it, or move the weights alone."
        )


def check_own(strange: Sequence[object], way_out: str) -> None:
    """Refuse an optimizer that trains what is none of the model's parameters.

    Args:
        strange: The names or shapes of what it trains beside them.
        way_out: How the framework builds one of the model's.

    Raises:
        RBNValueError: There are some.
    """
    if strange:
        raise RBNValueError(
            "RBN: expected an optimizer of the model's parameters, got one of others: "
            f"{', '.join(map(str, strange))}. Build it with {way_out}."
        )


def one(what: str, values: Sequence[Any]) -> Any:
    """The value that all groups of an optimizer, or all its parameters, have.

    Args:
        what: What it is, for the error.
        values: At least one.

    Raises:
        RBNValueError: They differ.
    """
    if len(set(values)) > 1:
        raise RBNValueError(
            f"RBN: expected one {what} for all parameters, got {', '.join(map(str, sorted(set(values))))}. "
            "Move the weights alone, or train all parameters alike."
        )
    return values[0]


def by_slot(slots: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What an optimizer keeps as one dictionary, under SLOT/NAME."""
    return {f"{slot}/{name}": value for slot, own in slots.items() for name, value in own.items()}


def needed(training: Training, option: Option, parameters: Iterable[str]) -> float | None:
    """The learning rate or weight decay of parameters that an optimizer trains alike.

    Args:
        training: Where the optimizer is to stand.
        option: Which of the two.
        parameters: Their canonical names; at least one.

    Returns:
        A number, or `None` for a weight decay that is not known.

    Raises:
        RBNValueError: They have several there, or one of them is in no group.
    """
    values = {name: getattr(group, option) for group in training.groups for name in group.parameters}
    parameters = tuple(parameters)
    what = option.replace("_", " ")
    if absent := [name for name in parameters if name not in values]:
        raise RBNValueError(
            f"RBN: expected the {what} of every parameter that is trained, got none of {few(absent)}. "
            "Build the optimizer with the parameters of training.groups."
        )
    firsts = {values[name]: name for name in reversed(parameters)}
    if len(firsts) > 1:
        got = ", ".join(f"{_shown(values[name])} for {name}" for name in reversed(firsts.values()))
        raise RBNValueError(
            f"RBN: expected one {what} for all parameters that the optimizer trains alike, got {got}. "
            "Build it with a group of parameters for each of training.groups."
        )
    value = next(iter(firsts))
    return None if value is None else float(value)


def check_decay(training: Training, decoupled: bool) -> None:
    """Refuse to turn a weight decay that is decoupled from the gradient into one that is not, and back.

    Args:
        training: Where the optimizer is to stand.
        decoupled: Whether its own decay is decoupled.

    Raises:
        RBNValueError: Something is to decay, and otherwise than the optimizer has it.
    """
    if training.decoupled == decoupled or not any(group.weight_decay for group in training.groups):
        return
    forms = ("added to the gradient, as Adam's and SGD's", "decoupled from it, as AdamW's")
    raise RBNValueError(
        f"RBN: expected an optimizer with a weight decay that is {forms[training.decoupled]}, got one where "
        f"it is {forms[decoupled]}. Build the other optimizer, or set the decays of training.groups to 0."
    )


def renamed(training: Training, names: Mapping[str, str]) -> tuple[Training, tuple[str, ...]]:
    """A training under other names, and the old names of the parameters that are left out of it.

    Args:
        training: Where an optimizer stands.
        names: The new names of the parameters that stay, by their old ones.
    """
    lost = tuple(name for group in training.groups for name in group.parameters if name not in names)
    groups = (
        replace(group, parameters=tuple(names[name] for name in group.parameters if name in names))
        for group in training.groups
    )
    slots = {
        slot: {names[name]: array for name, array in arrays.items() if name in names}
        for slot, arrays in training.slots.items()
    }
    return replace(training, groups=tuple(group for group in groups if group.parameters), slots=slots), lost


def summary(training: Training) -> str:
    """A training in a few words, as "sgd at step 9, learning rate 0.1 and weight decay 0.0001"."""
    told = [_said(group.learning_rate, group.weight_decay) for group in training.groups]
    if len(told) > 1:
        told = [
            f"{alike} ({len(group.parameters)})" for alike, group in zip(told, training.groups, strict=True)
        ]
        told[0] = f"{len(told)} groups: {told[0]}"
    decoupled = ["decoupled"] if training.decoupled and any(g.weight_decay for g in training.groups) else []
    return ", ".join([f"{training.optimizer} at step {training.step}", *told, *decoupled])


def few(names: list[str] | tuple[str, ...]) -> str:
    """Some names of many."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _said(rate: float, decay: float | None) -> str:
    return f"learning rate {_shown(rate)} and weight decay {_shown(decay)}"


def _shown(value: float | None) -> str:
    return "unknown" if value is None else f"{value:g}"


def _is_number(value: Any) -> bool:
    try:
        return (
            isinstance(value, int | float | np.integer | np.floating)
            and not isinstance(value, bool)
            and math.isfinite(value)
        )
    except OverflowError:  # an integer that no float holds
        return False
