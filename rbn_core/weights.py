"""The canonical weight file: safetensors with canonical names, and what the arrays belong to in its metadata.

The metadata's `format` is "rbn" and its `schema` the version of this description. `layers` holds, as JSON,
what owns the arrays: by dotted path an object with the `kind` (one of `rbn_core.names.KINDS`) and, for RBN,
IEBN and BNET, the options. `network` holds `rbn_core.networks.Network` as JSON. An optimizer's arrays are
called "training/SLOT/NAME" and the rest of it is in `training`. `run` holds, as JSON, an object with what
else a training run needs to go on, which is the run's own. All but `format` and `schema` may lack.
A file whose metadata names no format is taken for arrays under canonical names.

Schema 1 differs in `training` alone: it has one `learning_rate` in place of `groups` and `decoupled`, and
does not say the weight decay. It is read, and no longer written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from rbn_core.bfloat16 import bfloat16
from rbn_core.config import FLOATING
from rbn_core.counting import Meter, writing
from rbn_core.errors import RBNError, RBNTypeError, RBNValueError
from rbn_core.files import replacing
from rbn_core.matching import State
from rbn_core.names import KINDS, RUNNING_STATISTICS
from rbn_core.networks import Network
from rbn_core.training import Group, Training, check, fault, few

SCHEMA = 2
TRAINING = "training/"

DTYPES = ("bool", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)), *FLOATING)
"""What the arrays of a file may be."""

SAFETENSORS = {
    name: {"bool": "BOOL", "bfloat16": "BF16"}.get(name, re.sub(r"([a-z])[a-z]*", r"\1", name).upper())
    for name in DTYPES
}
"""What a safetensors file calls them."""

LONGEST_HEADER = 100_000_000
"""How many bytes the header of a safetensors file may have, as its library has it."""

LONGEST_TEXT = 500_000
"""How many characters `layers`, `network`, `training` and `run` may have each: Python needs up to thirty
times as much memory for what they say. ResNet-164's have 73,000."""

Layers = dict[str, dict[str, Any]]
"""What owns the arrays: by dotted path an object with its `kind`, and options where it is a layer of ours."""


@dataclass(frozen=True)
class Weights:
    """What a canonical file holds."""

    state: State
    layers: Layers = field(default_factory=dict)
    network: Network | None = None
    training: Training | None = None
    run: dict[str, Any] | None = None


def save(
    path: str | PathLike[str],
    state: Mapping[str, Any],
    *,
    layers: Layers | None = None,
    network: Network | None = None,
    training: Training | None = None,
    run: Mapping[str, Any] | None = None,
) -> None:
    """Write a state, and what is known about it, as a safetensors file, in one step.

    Args:
        path: Where; a file that is there is replaced when the new one is whole.
        state: Arrays under canonical names, of `DTYPES`.
        layers: What owns them, as a backend's `describe` returns it.
        network: The network they belong to.
        training: The optimizer that goes on with them.
        run: What else a run needs to go on, of what JSON has.

    Raises:
        RBNTypeError: An array is of another dtype.
        RBNValueError: A name is one that the file needs itself, the training is not whole or is that of other
            arrays, or the file cannot be there.
    """
    for name in state:
        if name == "__metadata__" or name.startswith(TRAINING):
            raise RBNValueError(
                f"RBN: expected names that a weight file does not need itself, got {name!r}. "
                "Rename the array."
            )
    arrays = dict(state)
    metadata = {"format": "rbn", "schema": str(SCHEMA)}
    if layers:
        metadata["layers"] = json.dumps(layers)
    if network is not None:
        metadata["network"] = network.to_json()
    if run is not None:
        metadata["run"] = json.dumps(run)
    if training is not None:
        check(training)
        if wrong := _astray(training, state):
            raise RBNValueError(
                "RBN: expected the training of arrays in the state, each in one of its groups, got "
                f"{wrong}. Save the state of the whole model that is trained."
            )
        groups = [
            {
                "learning_rate": float(group.learning_rate),
                "weight_decay": None if group.weight_decay is None else float(group.weight_decay),
                "parameters": group.parameters,
            }
            for group in training.groups
        ]
        metadata["training"] = json.dumps(
            {
                "optimizer": training.optimizer,
                "step": int(training.step),
                "decoupled": bool(training.decoupled),
                "groups": groups,
            }
        )
        arrays |= {
            f"{TRAINING}{slot}/{name}": value
            for slot, values in training.slots.items()
            for name, value in values.items()
        }
    arrays = {name: np.asarray(value) for name, value in arrays.items()}
    with replacing(path) as temporary:
        write_safetensors(temporary, arrays, metadata)


def load(path: str | PathLike[str]) -> State:
    """Read a state from a safetensors file.

    Raises:
        RBNValueError: As in `read`.
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
    schema = metadata.get("schema")
    if schema not in ("1", str(SCHEMA)):
        raise RBNValueError(
            f"RBN: expected a weight file of schema 1 or {SCHEMA}, got schema {schema!r} "
            f"in {path}. Install a later version of rbn."
        )
    try:
        layers = json.loads(_text(metadata, "layers", "{}"))
        network = Network.from_json(_text(metadata, "network")) if "network" in metadata else None
        known = json.loads(_text(metadata, "training", "null"))
        run = json.loads(_text(metadata, "run", "null"))
        if not isinstance(run, dict | None):
            raise TypeError(f"its run is {str(run)[:60]!r}, and no object")
        state = {name: array for name, array in arrays.items() if not name.startswith(TRAINING)}
        slots = {name: array for name, array in arrays.items() if name not in state}
        training = _training(known, slots, state, with_groups=schema != "1")
        if unknown := [path for path, layer in layers.items() if layer["kind"] not in KINDS]:
            raise RBNTypeError(f"the kinds of {', '.join(unknown)} are none of {', '.join(KINDS)}")
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise RBNValueError(
            f"RBN: expected a weight file with whole metadata, got {path} ({error}). Write it again."
        ) from error
    return Weights(state, layers, network, training, run)


def read_safetensors(path: str | PathLike[str]) -> tuple[State, dict[str, str]]:
    """The arrays of any safetensors file, and its metadata.

    Raises:
        RBNValueError: The file is not a whole safetensors file, has a name twice, or holds a dtype that NumPy
            lacks.
    """
    if not Path(path).is_file():
        raise RBNValueError(
            f"RBN: expected a safetensors file, got {path}, which is no file. Check the path."
        )
    try:
        described = _header(path)
        if any(entry.get("dtype") == "BF16" for entry in described.values()):
            bfloat16()  # NumPy then knows it by name
        # "pread", not a mapping: half of the memory, and no crash if the file shrinks meanwhile.
        with safe_open(path, framework="numpy", backend="pread") as opened:
            arrays = {}
            with Meter("read", Path(path).stat().st_size) as meter:
                for name in opened.keys():  # noqa: SIM118
                    arrays[name] = opened.get_tensor(name)
                    meter(arrays[name].nbytes)
            metadata = opened.metadata() or {}
    except RBNError:
        raise
    except (SafetensorError, TypeError, AttributeError, KeyError, ValueError, RecursionError) as error:
        raise RBNValueError(
            f"RBN: expected a safetensors file, got {path} ({error}). Write it with rbn_core.weights.save."
        ) from error
    return arrays, metadata


def write_safetensors(
    path: str | PathLike[str], arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]
) -> None:
    """Write arrays as a safetensors file, one by one, where the library copies all of them first.

    Args:
        path: Where; not in one step, which is the caller's.
        arrays: Of `DTYPES`.
        metadata: What the file says of itself.

    Raises:
        RBNTypeError: An array is of another dtype.
    """
    if wrong := [
        f"{name} of {value.dtype}" for name, value in arrays.items() if value.dtype.name not in DTYPES
    ]:
        raise RBNTypeError(
            f"RBN: expected arrays of {', '.join(DTYPES)}, got {', '.join(wrong)}. Convert them first."
        )
    described: dict[str, Any] = {"__metadata__": dict(metadata)}
    names = sorted(arrays, key=lambda name: (-arrays[name].itemsize, name))  # so that all lie aligned
    end = 0
    for name in names:
        array, start = arrays[name], end
        end += array.nbytes
        described[name] = {
            "dtype": SAFETENSORS[array.dtype.name],
            "shape": array.shape,
            "data_offsets": (start, end),
        }
    header = json.dumps(described, ensure_ascii=False, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with writing(path, 8 + len(header) + end) as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name in names:
            little = np.asarray(arrays[name], arrays[name].dtype.newbyteorder("<"), "C")
            file.write(little.reshape(-1).view(np.uint8))


def read_metadata(path: str | PathLike[str]) -> dict[str, str]:
    """The metadata of any safetensors file, without its arrays.

    Raises:
        RBNValueError: The file is not a whole safetensors file.
    """
    try:
        metadata = _header(path).get("__metadata__", {})
    except (OSError, TypeError, AttributeError, KeyError, ValueError, RecursionError) as error:
        raise RBNValueError(
            f"RBN: expected a safetensors file, got {path} ({error}). Write it with rbn_core.weights.save."
        ) from error
    return metadata


def _header(path: str | PathLike[str]) -> dict[str, Any]:
    """What a safetensors file says of its arrays, held against the length of the file."""
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        file.seek(0)
        length = int.from_bytes(file.read(8), "little")
        if length > min(size, LONGEST_HEADER):
            raise ValueError("its header is longer than the file or than any")
        described = json.loads(file.read(length), object_pairs_hook=_refuse_twice)
    if not isinstance(described, dict):
        raise ValueError("its header describes nothing")
    ends = []
    for name, entry in described.items():
        if name != "__metadata__":
            offsets = entry["data_offsets"]
            if len(offsets) != 2:
                raise ValueError(f"{name[:60]!r} lies between {len(offsets)} offsets, and not two")
            ends.append(offsets[1])
    needed = 8 + length + max(ends, default=0)
    if needed > size:
        raise ValueError(f"it has {size} bytes of {needed}, as half of a download")
    return described


def _refuse_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, refused if a name is there twice: the library takes the last of two arrays."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is there twice")
    return found


def _text(metadata: Mapping[str, str], key: str, default: str = "") -> str:
    """A text of the metadata, if it is no longer than what may be taken apart."""
    text = metadata.get(key, default)
    if len(text) > LONGEST_TEXT:
        raise ValueError(f"{key} has {len(text)} characters where {LONGEST_TEXT} are allowed")
    return text


def _training(
    known: Any, arrays: Mapping[str, Any], state: Mapping[str, Any], *, with_groups: bool
) -> Training | None:
    """The optimizer of a file's metadata and arrays; without groups it is one of schema 1."""
    if known is None:
        if arrays:
            raise ValueError(f"{', '.join(arrays)} without an optimizer")
        return None
    slots: dict[str, State] = {}
    for name, array in arrays.items():
        slot, _, parameter = name.removeprefix(TRAINING).partition("/")
        if not parameter:
            raise ValueError(f"{name} of no parameter")
        slots.setdefault(slot, {})[parameter] = array
    keys = {"optimizer", "step"} | ({"decoupled", "groups"} if with_groups else {"learning_rate"})
    if not isinstance(known, dict) or known.keys() != keys:
        raise ValueError(f"an optimizer's {', '.join(sorted(keys))} as {known}")
    if with_groups:
        groups = tuple(_group(entry) for entry in known["groups"])
    else:
        trained = {name: None for own in slots.values() for name in own} or {
            name: None
            for name, array in state.items()
            if array.dtype.kind in "fV" and name.rpartition(".")[2] not in RUNNING_STATISTICS
        }
        groups = (Group(known["learning_rate"], None, tuple(trained)),)
    training = Training(known["optimizer"], known["step"], groups, slots, known.get("decoupled", False))
    wrong = fault(training) or (_astray(training, state) if with_groups else "")
    if type(training.optimizer) is not str or type(training.decoupled) is not bool:
        wrong = f"an optimizer's name, and whether its weight decay is decoupled, as {known}"
    if wrong:
        raise ValueError(wrong)
    return training


def _group(entry: Any) -> Group:
    """A group of a file's metadata."""
    keys = {"learning_rate", "weight_decay", "parameters"}
    if not isinstance(entry, dict) or entry.keys() != keys or not isinstance(entry["parameters"], list):
        raise ValueError(f"a group's {', '.join(sorted(keys))} as {entry}")
    return Group(entry["learning_rate"], entry["weight_decay"], tuple(entry["parameters"]))


def _astray(training: Training, state: Mapping[str, Any]) -> str:
    """What is trained and is not in the state, or has an array and is in no group, in words."""
    names = {name for group in training.groups for name in group.parameters}
    if strange := [name for name in names if name not in state]:
        return f"that of {few(sorted(strange))}, which is not there"
    lost = [f"{slot}/{name}" for slot, own in training.slots.items() for name in own if name not in names]
    return f"{few(lost)} of no group" if lost else ""
