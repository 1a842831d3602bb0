"""Where an optimizer of optax stands, to and from canonical NumPy arrays."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
from rbn_core.weights import Training

KINDS: dict[type[Any], tuple[str, dict[str, str]]] = {
    optax.TraceState: ("sgd", {"momentum": "trace"}),
    optax.ScaleByAdamState: ("adam", {"first_moment": "mu", "second_moment": "nu"}),
}
"""What optax keeps, the optimizer that it belongs to, and by slot the field that holds it."""


def optimizer_to_numpy(
    optimizer: Any, model: Any = None, *, learning_rate: float | None = None, step: int | None = None
) -> Training:
    """Where an optimizer stands: b <- momentum b + g of `optax.sgd`, or the moments of `optax.adam`.

    Any chain that has one of these will do, such as `optax.adamw`, also in `optax.multi_transform`.

    Args:
        optimizer: What `tx.init(variables["params"])` and `tx.update` return, or an `nnx.Optimizer`.
        model: What it trains: an NNX module; for linen this package's `Network` or a function that
            initialises the model, as in `to_numpy`. Without it the layers are told by their names, as there.
        learning_rate: The rate of the next update; needed without `optax.inject_hyperparams`, as optax then
            does not store it.
        step: How many updates there have been, where nothing in the chain counts them; 0 by default.

    Raises:
        RBNTypeError: There is no momentum and no Adam in it.
        RBNValueError: The learning rate is not known.
    """
    opt_state = _opt_state(optimizer)
    states = _moments(opt_state)
    kind, fields = KINDS[type(states[0])]
    kinds = _layouts(model)
    slots = {}
    for slot, field in fields.items():
        stored = {
            own: np.asarray(_value(leaf)) for state in states for own, leaf in _flat(getattr(state, field))
        }
        found, _ = places.canonical(stored, kinds)
        slots[slot] = {name: places.copied(array) for name, array in found.items()}
    counts = [_value(node.count) for node in _nodes(opt_state) if "count" in node._fields]
    if isinstance(optimizer, flax_nnx.Optimizer):
        counts = [optimizer.step[...]]
    rates = [_value(rate) for rate in _rates(opt_state)]
    if not rates and learning_rate is None:
        raise RBNValueError(
            "RBN: expected a learning rate, got an optimizer that does not store its own. Pass "
            "learning_rate=..., or build it with optax.inject_hyperparams."
        )
    return Training(
        kind,
        int(counts[0]) if counts else step or 0,
        float(rates[0] if rates else learning_rate),  # type: ignore[arg-type]
        slots,
    )


def optimizer_from_numpy(optimizer: Any, model: Any, training: Training) -> Any:
    """Let an optimizer go on from where another one stands.

    The step goes wherever the chain counts, schedules included; the learning rate where
    `optax.inject_hyperparams` keeps it: else build the optimizer with `training.learning_rate`.

    Args:
        optimizer: What `tx.init(variables["params"])` returns, not changed; or an `nnx.Optimizer`, filled in
            place.
        model: As in `optimizer_to_numpy`; `None` tells the layers by their names.
        training: Where the other one stands.

    Returns:
        The new state of optax; `None` for an `nnx.Optimizer`.

    Raises:
        RBNTypeError: There is no momentum and no Adam in it.
        RBNValueError: The optimizers differ, or their arrays; everything wrong is listed, nothing changes.
    """
    opt_state = _opt_state(optimizer)
    states = _moments(opt_state)
    kind, fields = KINDS[type(states[0])]
    if (training.optimizer, set(training.slots)) != (kind, set(fields)):
        raise RBNValueError(
            f"RBN: expected the training state of {kind} with {', '.join(fields)}, got that of "
            f"{training.optimizer} with {', '.join(training.slots) or 'nothing'}. Build the same optimizer."
        )
    kinds = _layouts(model)
    arrays = {}
    for slot, field in fields.items():
        target = {own: _value(leaf) for state in states for own, leaf in _flat(getattr(state, field))}
        arrays[field], _ = places.to_load(training.slots[slot], target, kinds)
    in_place = isinstance(optimizer, flax_nnx.Optimizer)
    filled = _Filling(training, arrays, in_place).filled(opt_state)
    if not in_place:
        return filled
    optimizer.step[...] = jnp.asarray(training.step, optimizer.step.dtype)
    return None


class _Filling:
    """A state of optax with other values.

    Args:
        training: The step and the learning rate.
        arrays: By field, arrays under Flax's names.
        in_place: Whether variables of NNX are filled, and not replaced.
    """

    def __init__(
        self, training: Training, arrays: Mapping[str, Mapping[str, NDArray[Any]]], in_place: bool
    ) -> None:
        self.training = training
        self.arrays = arrays
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
        if "learning_rate" in parts.get("hyperparams", ()):
            rate = self.leaf(node.hyperparams["learning_rate"], self.training.learning_rate)
            parts["hyperparams"] = node.hyperparams | {"learning_rate": rate}
        for field in KINDS.get(type(node), ("", {}))[1].values():
            leaves = [self.leaf(leaf, self.arrays[field][own]) for own, leaf in _flat(getattr(node, field))]
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


def _moments(opt_state: Any) -> list[Any]:
    """The parts that hold momentum or moments, all of one kind."""
    states = [node for node in _nodes(opt_state) if isinstance(node, tuple(KINDS))]
    if len({type(state) for state in states}) != 1:
        held = ", ".join(dict.fromkeys(type(node).__name__ for node in _nodes(opt_state)))
        raise RBNTypeError(
            "RBN: expected an optimizer with either the momentum of optax.sgd or the moments of optax.adam, "
            f"got {held or type(opt_state).__name__}. Only these mean the same in every framework."
        )
    return states


def _rates(opt_state: Any) -> Iterator[Any]:
    """The learning rates that `optax.inject_hyperparams` keeps."""
    for node in _nodes(opt_state):
        if "learning_rate" in getattr(node, "hyperparams", ()):
            yield node.hyperparams["learning_rate"]


def _flat(tree: Any) -> Iterator[tuple[str, Any]]:
    """Every leaf of a tree like the parameters', under its name in the collection of these."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_leaf)[0]:
        parts = (
            next(getattr(key, name) for name in ("key", "name", "idx") if hasattr(key, name)) for key in path
        )
        yield places.own_path(("params", *parts)), leaf


def _is_leaf(node: Any) -> bool:
    return isinstance(node, flax_nnx.Variable | nn.meta.AxisMetadata)


def _value(leaf: Any) -> Any:
    if isinstance(leaf, flax_nnx.Variable):
        return leaf[...]
    return leaf.unbox() if isinstance(leaf, nn.meta.AxisMetadata) else leaf
