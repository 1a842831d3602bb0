"""An NNX module's weights to and from canonical NumPy arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from rbn.backends.flax import places
from rbn.backends.flax.nnx.layers import CalibratedNorm, assign, config_of
from rbn_core.errors import RBNTypeError
from rbn_core.matching import State, Table
from rbn_core.names import Kind
from rbn_core.weights import Layers

KINDS: tuple[tuple[Any, Kind], ...] = (
    (nnx.Conv, "convolution"),
    (nnx.ConvTranspose, "transposed_convolution"),
    (nnx.Linear, "linear"),
    (nnx.Embed, "embedding"),
    ((nnx.BatchNorm, nnx.LayerNorm, nnx.GroupNorm, nnx.RMSNorm, nnx.InstanceNorm, CalibratedNorm), "norm"),
)

PASSING = (nnx.RngState, nnx.Intermediate, nnx.Perturbation, nnx.Cache)
"""What a model stores beside its weights."""

Path = tuple[Any, ...]


def to_numpy(model: nnx.Module) -> State:
    """Copies of everything the model stores, under canonical names; half precision becomes float32.

    Args:
        model: Any NNX module. What it has under two names is there under both; the state of its random keys
            is not there.

    Raises:
        RBNValueError: A name holds a slash, or two arrays get one name.
    """
    stored = {own: np.asarray(variable[...]) for own, variable in variables(model).items()}
    state, _ = places.canonical(stored, layouts(model))
    return {name: places.copied(array) for name, array in state.items()}


def from_numpy(
    model: nnx.Module,
    state: Mapping[str, Any],
    *,
    rename: Mapping[str, str] | None = None,
    strict: bool = True,
) -> Table:
    """Load a state into a model, in place; dtypes, sharding and metadata stay the model's.

    Args:
        model: Any NNX module.
        state: Arrays under canonical names, those that `to_numpy(model)` has.
        rename: Patterns of the state's names, each with the model's name for what it matches.
        strict: Whether anything missing, unexpected or wrong is an error; else it is left out.

    Returns:
        Every array, and what became of it.

    Raises:
        RBNValueError: The state does not match; everything wrong is listed, nothing changes.
    """
    found = variables(model)
    target = {own: variable[...] for own, variable in found.items()}
    arrays, table = places.to_load(state, target, layouts(model), rename=rename, strict=strict)
    for own, array in arrays.items():
        assign(found[own], jnp.asarray(array, target[own].dtype))
    return table


def describe(model: nnx.Module) -> Layers:
    """What owns a model's arrays: by dotted path the kind of layer, with the options of ours."""
    stored = {own: np.asarray(variable[...]) for own, variable in variables(model).items()}
    state, _ = places.canonical(stored, layouts(model))
    owners = {".".join(map(str, path)): module for path, module in modules(model)}
    layers: Layers = {}
    for path in dict.fromkeys(name.rpartition(".")[0] for name in state):
        module = owners.get(path)
        options = dataclasses.asdict(config_of(module)) if isinstance(module, CalibratedNorm) else {}
        layers[path] = {"kind": _kind(module)} | options
    return layers


def layouts(model: nnx.Module) -> dict[str, Kind]:
    """How the arrays of every layer lie, by dotted path."""
    return {
        # A kernel that is given transposed lies as the convolution's of which this is the gradient.
        ".".join(map(str, path)): "convolution"
        if getattr(module, "transpose_kernel", False)
        else _kind(module)
        for path, module in modules(model)
    }


def modules(model: nnx.Module) -> Iterator[tuple[Path, nnx.Module]]:
    """Every module of a model under each of its paths."""
    for path, node in _nodes(model):
        if isinstance(node, nnx.Module):
            yield path, node


def _kind(module: Any) -> Kind:
    return next((kind for types, kind in KINDS if isinstance(module, types)), "other")


def variables(model: nnx.Module) -> dict[str, Any]:
    """The variables that hold weights, under Flax's names, in the order of the model."""
    if not isinstance(model, nnx.Module):
        raise RBNTypeError(
            f"RBN: expected an NNX module, got {type(model).__name__}. Pass the model itself, not its state."
        )
    return {
        places.own_path(("batch_stats" if isinstance(node, nnx.BatchStat) else "params", *path)): node
        for path, node in _nodes(model)
        if isinstance(node, nnx.Variable) and not isinstance(node, PASSING) and jax.tree.leaves(node)
    }


def _nodes(model: nnx.Module) -> list[tuple[Path, Any]]:
    """Every node of a model under each of its paths; `nnx.iter_graph` gives each its first path alone."""
    found = [
        (path, node) for path, node in nnx.iter_graph(model) if isinstance(node, nnx.Module | nnx.Variable)
    ]
    for first, *others in nnx.find_duplicates(model):
        for other in others:
            if other[: len(first)] != first:  # else it holds itself
                found += [
                    (other + path[len(first) :], node) for path, node in found if path[: len(first)] == first
                ]
    return found
