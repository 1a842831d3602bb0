"""Where an optimizer of optax stands, to and from canonical NumPy arrays."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax  # type: ignore[import-untyped]
from flax import nnx as flax_nnx
from numpy.typing import NDArray

from rbn.backends.flax import nnx, places
from rbn.backends.flax.weights import layouts
from rbn_core.errors import RBNTypeError, RBNValueError
from rbn_core.names import Kind
from rbn_core.training import Option, Training, check, check_decay, check_kind, few, grouped, needed, one

KINDS: dict[type[Any], tuple[str, dict[str, str]]] = {
    optax.TraceState: ("sgd", {"momentum": "trace"}),
    optax.ScaleByAdamState: ("adam", {"first_moment": "mu", "second_moment": "nu"}),
}
"""What optax keeps, the optimizer that it belongs to, and by slot the field that holds it."""

OPTIONS: tuple[Option, ...] = ("learning_rate", "weight_decay")
"""What groups of parameters have, and `optax.inject_hyperparams` keeps."""

FORMS = ("added to the gradient", "decoupled from it")
"""What a weight decay is; the second if it is decoupled."""

STATELESS = ("EmptyState", "ScaleByScheduleState", "WeightDecaySchedule")
"""What the states of scalings and weight decays are, and of what else stores nothing, such as clipping."""


def optimizer_to_numpy(
    optimizer: Any,
    model: Any = None,
    *,
    learning_rate: float | Mapping[str, float] | None = None,
    weight_decay: float | Mapping[str, float] | None = None,
    decoupled: bool | None = None,
    step: int | None = None,
) -> Training:
    """Where an optimizer stands: b <- momentum b + g of `optax.sgd`, or the moments of `optax.adam`.

    Any chain that has one of these will do, such as `optax.adamw`, also in `optax.multi_transform` and
    `optax.masked`, whose parts are groups of parameters.

    Args:
        optimizer: What `tx.init(variables["params"])` and `tx.update` return, or an `nnx.Optimizer`.
        model: What it trains: an NNX module; for linen this package's `Network` or a function that
            initialises the model, as in `to_numpy`. Without it the layers are told by their names, as there.
        learning_rate: The rate of the next update, for all parameters or by canonical name; needed without
            `optax.inject_hyperparams`, as optax then does not store it.
        weight_decay: The same of the weight decay; needed where a part of the chain may be
            `optax.add_decayed_weights`, of which optax stores nothing, and where one that
            `optax.inject_hyperparams` stores is masked.
        decoupled: Whether that decay comes behind the moments, as in `optax.adamw`; needed where both are
            possible.
        step: How many updates there have been, where nothing in the chain counts them; 0 by default.

    Raises:
        RBNTypeError: There is no momentum and no Adam in it.
        RBNValueError: A learning rate or a weight decay is not known, or parameters differ in whether theirs
            is decoupled.
    """
    opt_state = _opt_state(optimizer)
    parts = _parts(opt_state)
    kind, fields = KINDS[type(parts[0].state)]
    kinds = _layouts(model)
    slots = {}
    for slot, field in fields.items():
        stored = {own: np.asarray(_value(leaf)) for part in parts for own, leaf in part.leaves(field)}
        found, _ = places.canonical(stored, kinds)
        slots[slot] = {name: places.copied(array) for name, array in found.items()}
    counts = [_value(node.count) for node in _nodes(opt_state) if "count" in node._fields]
    if isinstance(optimizer, flax_nnx.Optimizer):
        counts = [optimizer.step[...]]
    options: dict[str, tuple[float, float | None]] = {}
    forms = []
    names = iter(next(iter(slots.values())))
    for part in parts:
        own_names = [next(names) for _ in part.leaves(next(iter(fields.values())))]
        if not own_names:
            continue
        rates = _known_rates(part, own_names, learning_rate)
        decays = _known_decays(part, own_names, weight_decay)
        if any(decays):
            forms.append(FORMS[_form(part, decoupled)])
        options |= dict(zip(own_names, zip(rates, decays, strict=True), strict=True))
    decoupled = one("form of weight decay", forms or FORMS[:1]) == FORMS[True]
    return Training(kind, int(counts[0]) if counts else step or 0, grouped(options), slots, decoupled)


def optimizer_from_numpy(optimizer: Any, model: Any, training: Training) -> Any:
    """Let an optimizer go on from where another one stands.

    The step goes wherever the chain counts, schedules included; the learning rate and the weight decay where
    `optax.inject_hyperparams` keeps them, in the parts of `optax.multi_transform` and `optax.masked` for the
    parameters there: else build the optimizer with those of `training.groups`.

    Args:
        optimizer: What `tx.init(variables["params"])` returns, not changed; or an `nnx.Optimizer`, filled in
            place.
        model: As in `optimizer_to_numpy`; `None` tells the layers by their names.
        training: Where the other one stands.

    Returns:
        The new state of optax; `None` for an `nnx.Optimizer`.

    Raises:
        RBNTypeError: There is no momentum and no Adam in it.
        RBNValueError: The optimizers differ, or their arrays, or it trains parameters alike that have several
            learning rates or weight decays, or does not decay them; all arrays that do not fit are listed,
            nothing changes.
    """
    opt_state = _opt_state(optimizer)
    parts = _parts(opt_state)
    kind, fields = KINDS[type(parts[0].state)]
    check_kind(training, kind)
    check(training)
    kinds = _layouts(model)
    arrays = {}
    for slot, field in fields.items():
        target = {own: _value(leaf) for part in parts for own, leaf in part.leaves(field)}
        arrays[field], _ = places.to_load(training.slots.get(slot, {}), target, kinds)
    shaped = {own: np.broadcast_to(np.zeros((), array.dtype), array.shape) for own, array in target.items()}
    names = dict(zip(target, places.canonical(shaped, kinds)[0], strict=True))
    own_names = [[names[own] for own, _ in part.leaves(field)] for part in parts]
    hyperparameters = _hyperparameters(training, list(zip(parts, own_names, strict=True)))
    in_place = isinstance(optimizer, flax_nnx.Optimizer)
    filled = _Filling(training, arrays, hyperparameters, in_place).filled(opt_state)
    if not in_place:
        return filled
    optimizer.step[...] = jnp.asarray(training.step, optimizer.step.dtype)
    return None


@dataclass(frozen=True, eq=False)
class _Node:
    """A named tuple of a state of optax.

    Args:
        state: It.
        path: Where it is: what it is in is what its path begins with.
        scope: The paths of what masks it, from the outside: below the same masks are the same parameters.
    """

    state: Any
    path: tuple[int, ...]
    scope: tuple[tuple[int, ...], ...]

    def holds(self, other: _Node) -> bool:
        """Whether another one is inside of it."""
        return other.path[: len(self.path)] == self.path

    def meets(self, other: _Node) -> bool:
        """Whether they have parameters in common, as far as masks tell: one's are those of the other."""
        shorter = min(len(self.scope), len(other.scope))
        return self.scope[:shorter] == other.scope[:shorter]


@dataclass(frozen=True, eq=False)
class _Part:
    """Momentum or moments, and what else there is for their parameters.

    Args:
        state: What holds them.
        scope: As in `_Node`.
        rates: What `optax.inject_hyperparams` keeps, with a learning rate in it.
        decays: The same, with a weight decay in it.
        before: What stores nothing and comes before: it can be a weight decay that is added to the gradient.
        behind: The same behind, without what the learning rate is: there a weight decay is decoupled.
        scalings: What comes behind, with what the learning rate is.
    """

    state: Any
    scope: tuple[tuple[int, ...], ...]
    rates: tuple[_Node, ...]
    decays: tuple[_Node, ...]
    before: tuple[_Node, ...]
    behind: tuple[_Node, ...]
    scalings: tuple[_Node, ...]

    def leaves(self, field: str) -> list[tuple[str, Any]]:
        """The arrays of a field, under their names in the collection of parameters."""
        return [(own, leaf) for own, leaf in _flat(getattr(self.state, field)) if not _is_masked(leaf)]

    def is_masked(self, nodes: tuple[_Node, ...]) -> bool:
        """Whether some of these are for a part of the parameters alone."""
        return any(len(node.scope) > len(self.scope) for node in nodes)


def _parts(opt_state: Any) -> list[_Part]:
    """The parts that hold momentum or moments, all of one kind."""
    nodes = list(_placed(opt_state))
    holders = [node for node in nodes if isinstance(node.state, tuple(KINDS))]
    if len({type(node.state) for node in holders}) != 1:
        held = ", ".join(dict.fromkeys(type(node.state).__name__ for node in nodes))
        raise RBNTypeError(
            "RBN: expected an optimizer with either the momentum of optax.sgd or the moments of optax.adam, "
            f"got {held or type(opt_state).__name__}. Only these mean the same in every framework."
        )
    return [_part(holder, nodes) for holder in holders]


def _part(holder: _Node, nodes: list[_Node]) -> _Part:
    near = [node for node in nodes if node.meets(holder)]
    at = near.index(holder)
    before, scalings = (
        tuple(node for node in some if type(node.state).__name__ in STATELESS)
        for some in (near[:at], near[at + 1 :])
    )
    scheduled = [node for node in scalings if isinstance(node.state, optax.ScaleByScheduleState)]
    behind = tuple(node for node in scalings if node not in (scheduled or scalings[-1:]))
    rates, decays = (
        tuple(node for node in near if name in getattr(node.state, "hyperparams", ())) for name in OPTIONS
    )
    rooms = (*before, *behind)
    return _Part(
        holder.state,
        holder.scope,
        rates,
        tuple(node for node in decays if any(node.holds(room) for room in rooms)),
        before,
        behind,
        scalings,
    )


def _known_rates(part: _Part, names: list[str], given: float | Mapping[str, float] | None) -> list[float]:
    """The learning rates of the parameters of a part.

    Raises:
        RBNValueError: One is not known.
    """
    if part.rates and not part.is_masked(part.rates):
        return [_hyperparameter(part.rates[0], "learning_rate")] * len(names)
    return _told("learning_rate", names, given)


def _known_decays(part: _Part, names: list[str], given: float | Mapping[str, float] | None) -> list[float]:
    """The weight decays of the parameters of a part.

    Raises:
        RBNValueError: One is not known.
    """
    rooms = (*part.before, *part.behind)
    if not rooms and given is None:
        return [0.0] * len(names)
    inside = tuple(room for room in rooms if any(node.holds(room) for node in part.decays))
    if len(part.decays) == 1 and not part.is_masked(inside):
        return [_hyperparameter(part.decays[0], "weight_decay")] * len(names)
    return _told("weight_decay", names, given)


def _told(option: str, names: list[str], given: float | Mapping[str, float] | None) -> list[float]:
    """What the user says, for every parameter."""
    if given is not None and not isinstance(given, Mapping):
        return [float(given)] * len(names)
    if absent := [name for name in names if name not in (given or {})]:
        what = option.replace("_", " ")
        whose = f" of {few(absent)}" if given else ""
        zero = ", 0 where there is none" if option == "weight_decay" else ""
        raise RBNValueError(
            f"RBN: expected a {what}{whose}, got an optimizer that does not store its own. Pass "
            f"{option}=...{zero}, or build it with optax.inject_hyperparams."
        )
    assert given is not None
    return [float(given[name]) for name in names]


def _form(part: _Part, given: bool | None) -> bool:
    """Whether the weight decay of a part is decoupled from the gradient.

    Raises:
        RBNValueError: It is not known.
    """
    possible = _forms(part)
    if len(possible) > 1 and given is None:
        raise RBNValueError(
            "RBN: expected a weight decay that comes either before the moments or behind them, got an "
            "optimizer where both can be. Pass decoupled=True if it is behind, as in optax.adamw, or False."
        )
    return possible.pop() if len(possible) == 1 else bool(given)


def _forms(part: _Part) -> set[bool]:
    """Whether the weight decay of a part can be decoupled from the gradient, and whether it can be not."""
    sides: tuple[tuple[bool, tuple[_Node, ...]], ...] = ((False, part.before), (True, part.behind))
    if part.decays:
        sides = tuple(
            (form, tuple(room for room in rooms if any(node.holds(room) for node in part.decays)))
            for form, rooms in sides
        )
    return {form for form, rooms in sides if rooms}


def _hyperparameters(training: Training, parts: list[tuple[_Part, list[str]]]) -> dict[int, dict[str, float]]:
    """What the places are to hold in which `optax.inject_hyperparams` keeps numbers, by their identity.

    Raises:
        RBNValueError: Parameters that are trained alike need several numbers, or some have no weight decay.
    """
    found: dict[int, dict[str, float]] = {}
    shared: dict[tuple[int, Option], tuple[_Node, list[str], bool]] = {}
    for part, names in parts:
        if not names:
            continue
        decays = [needed(training, "weight_decay", [name]) for name in names]
        rooms = (*part.before, *part.behind)
        if any(decays) and not rooms:
            decaying = [name for name, decay in zip(names, decays, strict=True) if decay]
            raise RBNValueError(
                f"RBN: expected an optimizer that decays {few(decaying)}, got one without a weight decay. "
                "Build it with optax.adamw or optax.add_decayed_weights, and the decays of training.groups."
            )
        if any(decays) and len(forms := _forms(part)) == 1:
            check_decay(training, forms.pop())
        if len(part.decays) > 1:
            raise RBNValueError(
                f"RBN: expected one weight decay of {few(names)}, got an optimizer with {len(part.decays)}. "
                "Build it with one."
            )
        inside = tuple(room for room in rooms if any(node.holds(room) for node in part.decays))
        choices: tuple[tuple[Option, tuple[_Node, ...], tuple[_Node, ...]], ...] = (
            ("learning_rate", part.rates, part.rates or part.scalings),
            ("weight_decay", part.decays, inside or rooms),
        )
        for option, nodes, masked in choices:
            if not nodes and not part.is_masked(masked):
                needed(training, option, names)
            for node in nodes:
                entry = shared.setdefault((id(node.state), option), (node, [], part.is_masked(masked)))
                entry[1].extend(names)
    for (identity, option), (_, names, is_masked) in shared.items():
        if is_masked and option == "weight_decay":  # what does not decay is what the mask leaves out
            names = [name for name in names if needed(training, option, [name])] or names
        value = needed(training, option, names)
        if value is not None:
            found.setdefault(identity, {})[option] = value
    return found


class _Filling:
    """A state of optax with other values.

    Args:
        training: The step.
        arrays: By field, arrays under Flax's names.
        hyperparameters: Numbers by the identity of what keeps them, and their names.
        in_place: Whether variables of NNX are filled, and not replaced.
    """

    def __init__(
        self,
        training: Training,
        arrays: Mapping[str, Mapping[str, NDArray[Any]]],
        hyperparameters: Mapping[int, Mapping[str, float]],
        in_place: bool,
    ) -> None:
        self.training = training
        self.arrays = arrays
        self.hyperparameters = hyperparameters
        self.in_place = in_place

    def filled(self, part: Any) -> Any:
        """A part of the state."""
        if isinstance(part, dict):
            return {name: self.filled(inner) for name, inner in part.items()}
        if not isinstance(part, tuple | list):
            return part
        if not hasattr(part, "_fields"):
            return type(part)(map(self.filled, part))
        node: Any = part  # a named tuple
        parts = {name: self.filled(inner) for name, inner in zip(node._fields, node, strict=True)}
        if "count" in parts:
            parts["count"] = self.leaf(node.count, self.training.step)
        if numbers := self.hyperparameters.get(id(node)):
            new = {name: self.leaf(node.hyperparams[name], number) for name, number in numbers.items()}
            parts["hyperparams"] = node.hyperparams | new
        for field in KINDS.get(type(node), ("", {}))[1].values():
            leaves = [
                leaf if _is_masked(leaf) else self.leaf(leaf, self.arrays[field][own])
                for own, leaf in _flat(getattr(node, field))
            ]
            structure = jax.tree.structure(getattr(node, field), is_leaf=_is_leaf)
            parts[field] = jax.tree.unflatten(structure, leaves)
        return type(node)(**parts)

    def leaf(self, old: Any, value: Any) -> Any:
        """An array, in its variable or its box, with its dtype."""
        array = jnp.asarray(value, jnp.result_type(_value(old)))
        if isinstance(old, flax_nnx.Variable):
            if not self.in_place:
                return old.replace(array)
            old[...] = array
            return old
        return old.replace_boxed(array) if isinstance(old, nn.meta.AxisMetadata) else array


def _opt_state(optimizer: Any) -> Any:
    return optimizer.opt_state if isinstance(optimizer, flax_nnx.Optimizer) else optimizer


def _layouts(model: Any) -> dict[str, Kind] | None:
    if model is None:
        return None
    return nnx.layouts(model) if isinstance(model, flax_nnx.Module) else layouts(model)


def _nodes(node: Any) -> Iterator[Any]:
    """Every named tuple of a state of optax, from the outside."""
    if hasattr(node, "_fields"):
        yield node
    for inner in node.values() if isinstance(node, dict) else node if isinstance(node, tuple | list) else ():
        yield from _nodes(inner)


def _placed(
    node: Any, path: tuple[int, ...] = (), scope: tuple[tuple[int, ...], ...] = ()
) -> Iterator[_Node]:
    """Every named tuple of a state of optax, from the outside, with its place."""
    if hasattr(node, "_fields"):
        yield _Node(node, path, scope)
        if isinstance(node, optax.MaskedState):
            scope = (*scope, path)
    inside = node.values() if isinstance(node, dict) else node if isinstance(node, tuple | list) else ()
    for index, inner in enumerate(inside):
        yield from _placed(inner, (*path, index), scope)


def _hyperparameter(node: _Node, name: str) -> float:
    """A number that `optax.inject_hyperparams` keeps."""
    return float(_value(node.state.hyperparams[name]))


def _flat(tree: Any) -> Iterator[tuple[str, Any]]:
    """Every leaf of a tree like the parameters', under its name in the collection of these."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_leaf)[0]:
        parts = (
            next(getattr(key, name) for name in ("key", "name", "idx") if hasattr(key, name)) for key in path
        )
        yield places.own_path(("params", *parts)), leaf


def _is_leaf(node: Any) -> bool:
    return isinstance(node, flax_nnx.Variable | nn.meta.AxisMetadata)


def _is_masked(leaf: Any) -> bool:
    """Whether a variable or a box holds what stands for a parameter of another group, and no array."""
    held = leaf
    if isinstance(leaf, flax_nnx.Variable):
        held = getattr(leaf, "get_raw_value", lambda: leaf.raw_value)()
    held = held.unbox() if isinstance(held, nn.meta.AxisMetadata) else held
    return isinstance(held, optax.MaskedNode)


def _value(leaf: Any) -> Any:
    if isinstance(leaf, flax_nnx.Variable):
        return leaf[...]
    return leaf.unbox() if isinstance(leaf, nn.meta.AxisMetadata) else leaf
