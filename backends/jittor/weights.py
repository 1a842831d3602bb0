"""The state of any Jittor model to and from canonical NumPy arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jittor as jt
import numpy as np
from jittor import Module, Var, nn
from numpy.typing import NDArray

from rbn.backends.jittor.functional import at_least_float32
from rbn.backends.jittor.layers import CalibratedNorm
from rbn_core import published
from rbn_core.config import Config
from rbn_core.matching import COUNTER, State, Table, match
from rbn_core.names import NAMES, Kind
from rbn_core.weights import Layers

CANONICAL = {own: canonical for canonical, own in NAMES["jittor"].items()} | published.CANONICAL

OWNERS: dict[Kind, tuple[type[Any], ...]] = {
    "convolution": (nn.Conv, nn.Conv1d, nn.Conv3d),
    "transposed_convolution": (nn.ConvTranspose, nn.ConvTranspose3d),
    "linear": (nn.Linear,),
    "embedding": (nn.Embedding,),
    "norm": (CalibratedNorm, nn.BatchNorm, nn.InstanceNorm, nn.LayerNorm, nn.GroupNorm),
}


def to_numpy(model: Module) -> State:
    """Copies of everything that a model stores, under canonical names; half precision becomes float32.

    Args:
        model: Any module, of this project or not. What it holds under two names comes twice.
    """
    stored = variables(model)
    known = shapes(stored)
    return {name: array(var).reshape(known[name]) for name, var in stored.items()}


def from_numpy(
    model: Module, state: Mapping[str, Any], *, rename: Mapping[str, str] | None = None, strict: bool = True
) -> Table:
    r"""Load a state into a model, in place; dtypes stay the model's, and what is frozen stays so.

    Args:
        model: The model to fill.
        state: Arrays under canonical names, exactly those that `to_numpy(model)` has; of what the model holds
            under two names one is enough.
        rename: Patterns of the state's names with the model's, as `rbn_core.matching.match` explains them.
        strict: Whether anything missing, unexpected or wrong is an error; else it is left out.

    Returns:
        What became of every array.

    Raises:
        RBNValueError: Names are missing or unexpected, or shapes are wrong; all are listed, nothing changes.
    """
    stored = variables(model)
    arrays, table = fitting(state, stored, rename, strict)
    for name, value in arrays.items():
        assign(stored[name], value)
    return table


def describe(model: Module) -> Layers:
    """What owns the arrays: the kind of every layer by dotted path, and the options of RBN, IEBN and BNET."""
    return {
        path: {"kind": kind(module)}
        | (dataclasses.asdict(config_of(module)) if isinstance(module, CalibratedNorm) else {})
        for path, module in layers(model)
        if _own(module)
    }


def kind(module: Module) -> Kind:
    """What a module is, as far as that decides how its arrays lie."""
    return next((kind for kind, types in OWNERS.items() if isinstance(module, types)), "other")


def config_of(layer: CalibratedNorm) -> Config:
    """The options of one of our layers, as they are now."""
    return layer.config()


def layers(model: Module) -> Iterator[tuple[str, Module]]:
    """Every module with its dotted path, but for those inside our layers; one under two names comes twice."""
    inside: str | None = None
    for path, module in model.named_modules():
        if inside is None or not path.startswith(inside):
            yield path, module
            inside = (f"{path}." if path else "") if isinstance(module, CalibratedNorm) else None


def variables(model: Module) -> dict[str, Var]:
    """Everything that a model stores, under canonical names."""
    stored = {}
    for path, module in layers(model):
        names = CANONICAL if kind(module) == "norm" else {}
        for own, var in _own(module).items():
            name = names.get(own, own)
            stored[f"{path}.{name}" if path else name] = var
    return stored


def fitting(
    state: Mapping[str, Any],
    stored: Mapping[str, Var],
    rename: Mapping[str, str] | None = None,
    strict: bool = True,
) -> tuple[State, Table]:
    """What of a state goes where, as `rbn_core.matching.match` says; one name of a shared variable does."""
    known = shapes(stored)
    integers = {name for name, var in stored.items() if not var.dtype.is_float()}
    if len({id(var) for var in stored.values()}) < len(stored):
        present, _ = match(state, known, rename=rename, strict=False, integers=integers)
        filled = {id(stored[name]) for name in present}
        known = {
            name: shape for name, shape in known.items() if name in present or id(stored[name]) not in filled
        }
    return match(state, known, rename=rename, strict=strict, integers=integers)


def shapes(stored: Mapping[str, Var]) -> dict[str, tuple[int, ...]]:
    """The canonical shapes: Jittor has no 0-dimensional variables, the papers' code (1, C, 1, 1) for (C,)."""
    counted = {name: name.rpartition(".")[2] == COUNTER for name in stored}
    return published.flat_shapes(
        {name: () if counted[name] and var.numel() == 1 else tuple(var.shape) for name, var in stored.items()}
    )


def array(var: Var) -> NDArray[Any]:
    """A copy of a variable's values, in at least float32 where they are floating."""
    copied: NDArray[Any] = at_least_float32(var).numpy()
    return copied


def assign(var: Var, value: NDArray[Any]) -> None:
    """Give a variable other values of its own dtype."""
    frozen = var.is_stop_grad()
    if value.dtype.kind == "V":  # bfloat16, which Jittor does not take from NumPy
        value = value.astype(np.float32)
    host = "float64" if var.dtype.is_float() else str(var.dtype)
    var.update(jt.array(value.reshape(var.shape), dtype=host).cast(var.dtype))
    if not frozen:
        var.start_grad()  # under jt.no_grad() the new values have frozen it
    var.sync()  # broadcasting an array of one element that is still lazy gives C++ that does not compile


def _own(module: Module) -> dict[str, Var]:
    """What a module itself stores, and one of ours with its parts."""
    stored: dict[str, Var] = module.state_dict(recurse=isinstance(module, CalibratedNorm))
    return stored
