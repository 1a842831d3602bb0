"""The canonical weight file: safetensors with canonical names, and what the arrays belong to in its metadata.

The metadata's `format` is "rbn" and its `schema` the version of this description. `layers` holds, as JSON,
what owns the arrays: by dotted path an object with the `kind` (one of `rbn_core.names.KINDS`) and, for RBN,
IEBN and BNET, the options. `network` holds `rbn_core.networks.Network` as JSON. An optimizer's arrays are
called "training/SLOT/NAME" and the rest of it is in `training`. All but `format` and `schema` may lack.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from rbn_core.errors import RBNTypeError, RBNValueError
from rbn_core.files import replacing
from rbn_core.matching import State
from rbn_core.networks import Network

SCHEMA = 1
TRAINING = "training/"

Layers = dict[str, dict[str, Any]]
"""What owns the arrays: by dotted path an object with its `kind`, and options where it is a layer of ours."""


@dataclass(frozen=True)
class Training:
    """Where an optimizer stands, in terms that every framework has.

    Args:
        optimizer: "sgd" (slot "momentum") or "adam" (slots "first_moment", "second_moment").
        step: How many updates it has made.
        learning_rate: The rate of the next update.
        slots: By slot, arrays under the canonical names of the parameters they belong to.
    """

    optimizer: str
    step: int
    learning_rate: float
    slots: dict[str, State] = field(default_factory=dict)


@dataclass(frozen=True)
class Weights:
    """What a canonical file holds."""

    state: State
    layers: Layers = field(default_factory=dict)
    network: Network | None = None
    training: Training | None = None


def save(
    path: str | PathLike[str],
    state: Mapping[str, Any],
    *,
    layers: Layers | None = None,
    network: Network | None = None,
    training: Training | None = None,
) -> None:
    """Write a state, and what is known about it, as a safetensors file, in one step.

    Args:
        path: Where; a file that is there is replaced when the new one is whole.
        state: Arrays under canonical names.
        layers: What owns them, as a backend's `describe` returns it.
        network: The network they belong to.
        training: The optimizer that goes on with them.
    """
    arrays = {name: np.asarray(value, order="C") for name, value in state.items()}
    metadata = {"format": "rbn", "schema": str(SCHEMA)}
    if layers:
        metadata["layers"] = json.dumps(layers)
    if network is not None:
        metadata["network"] = network.to_json()
    if training is not None:
        known = {
            "optimizer": training.optimizer,
            "step": training.step,
            "learning_rate": training.learning_rate,
        }
        metadata["training"] = json.dumps(known)
        arrays |= {
            f"{TRAINING}{slot}/{name}": np.asarray(value, order="C")
            for slot, values in training.slots.items()
            for name, value in values.items()
        }
    with replacing(path) as temporary:
        save_file(arrays, temporary, metadata)


def load(path: str | PathLike[str]) -> State:
    """Read a state from a safetensors file.

    Raises:
        RBNValueError: The file is not a whole safetensors file.
    """
    return read(path).state


def read(path: str | PathLike[str]) -> Weights:
    """Read a state and all that its file says about it; a safetensors file without metadata will do.

    Raises:
        RBNValueError: The file is no whole safetensors file, or its metadata is damaged or of a later schema.
    """
    arrays, metadata = read_safetensors(path)
    if metadata.get("format") != "rbn":
        return Weights(arrays)
    if metadata.get("schema") != str(SCHEMA):
        raise RBNValueError(
            f"RBN: expected a weight file of schema {SCHEMA}, got schema {metadata.get('schema')!r} "
            f"in {path}. Install a later version of rbn."
        )
    try:
        layers = json.loads(metadata.get("layers", "{}"))
        network = Network.from_json(metadata["network"]) if "network" in metadata else None
        known = json.loads(metadata["training"]) if "training" in metadata else None
        slots: dict[str, State] = {}
        for name in [name for name in arrays if name.startswith(TRAINING)]:
            _, slot, parameter = name.split("/", 2)
            slots.setdefault(slot, {})[parameter] = arrays.pop(name)
        training = None if known is None else Training(**known, slots=slots)
        if not all(
            isinstance(layer, dict) and isinstance(layer.get("kind"), str) for layer in layers.values()
        ):
            raise RBNTypeError("layers without a kind")
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise RBNValueError(
            f"RBN: expected a weight file with whole metadata, got {path} ({error}). Write it again."
        ) from error
    return Weights(arrays, layers, network, training)


def read_safetensors(path: str | PathLike[str]) -> tuple[State, dict[str, str]]:
    """The arrays of any safetensors file, and its metadata.

    Raises:
        RBNValueError: The file is not a whole safetensors file, or holds a dtype that NumPy lacks.
    """
    try:
        with safe_open(path, framework="numpy") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata() or {}  # noqa: SIM118
    except (SafetensorError, TypeError, AttributeError, KeyError) as error:
        raise RBNValueError(
            f"RBN: expected a safetensors file, got {path} ({error}). Write it with rbn_core.weights.save."
        ) from error
