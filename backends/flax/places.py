"""Where canonical arrays lie among those of Flax: what weights of linen and of NNX have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rbn_core.config import Config
from rbn_core.errors import RBNValueError
from rbn_core.matching import COUNTER, State, Table, match
from rbn_core.names import NAMES, PARAMETERS, Kind, from_own, to_layout

Stored = dict[str, Any]
"""Arrays under Flax's names with the collection in front, such as "params/layer1/0/conv1/kernel"."""

OTHER: Kind = "other"
RESHAPED: tuple[Kind, ...] = ("linear", "convolution", "transposed_convolution")


def own_path(parts: tuple[Any, ...]) -> str:
    """Flax's path of an array as a name.

    Raises:
        RBNValueError: A part of it holds the separator.
    """
    names = [str(part) for part in parts]
    if slashed := [name for name in names if "/" in name]:
        raise RBNValueError(
            f"RBN: expected names without a slash, got {slashed[0]!r}. Rename the layer or the array."
        )
    return "/".join(names)


def canonical(stored: Mapping[str, Any], kinds: Mapping[str, Kind] | None) -> tuple[State, dict[str, Kind]]:
    """Arrays under canonical names, in the order in which they are stored, with what the layers are.

    Args:
        stored: Arrays under Flax's names.
        kinds: How the arrays of a layer lie, by its dotted path; `None` to tell by their names and ranks.

    Raises:
        RBNValueError: Two arrays get one name.
    """
    if kinds is None and is_one_norm(stored):
        kinds = {"": "norm"}
    if kinds is not None:
        # What is in no layer, such as a dictionary of parameters, is not told by its name.
        kinds = dict.fromkeys(
            (own.partition("/")[2].rpartition("/")[0].replace("/", ".") for own in stored), OTHER
        ) | dict(kinds)
    state, found = from_own("flax", stored, kinds)
    state = {
        name: _counted(array) if name.rpartition(".")[2] == COUNTER else array
        for name, array in state.items()
    }
    if len(state) < len(stored):
        dotted = [name.partition("/")[2].replace("/", ".") for name in stored]
        twice = sorted({name for name in dotted if dotted.count(name) > 1})
        raise RBNValueError(
            f"RBN: expected arrays whose dotted names differ, got {', '.join(twice)} more than once. "
            "Rename one of the layers."
        )
    return state, found


def _counted(count: Any) -> Any:
    """A counter as whole batches, which `lax.pmean` or an average of optax may have made a float."""
    if np.asarray(count).dtype.kind in "iu":
        return count
    return np.rint(np.asarray(count, np.float64)).astype(np.int32)


def is_one_norm(stored: Mapping[str, Any]) -> bool:
    """Whether these are the arrays of one normalization, of a collection or of all."""
    return set(stored) <= set(NAMES["flax"].values())


def to_load(
    state: Mapping[str, Any],
    target: Mapping[str, Any],
    kinds: Mapping[str, Kind] | None,
    *,
    rename: Mapping[str, str] | None = None,
    strict: bool = True,
) -> tuple[dict[str, NDArray[Any]], Table]:
    """What of a canonical state a model takes, under Flax's names and in its layout, and the table of it.

    Args:
        state: Arrays under canonical names.
        target: What the model stores, under Flax's names: anything with a shape and a dtype.
        kinds: As in `canonical`.
        rename: As in `rbn_core.matching.match`.
        strict: As in `rbn_core.matching.match`.

    Raises:
        RBNValueError: As in `rbn_core.matching.match`.
    """
    # Views of one element say shapes and dtypes, and take no memory.
    shaped = {
        own: np.broadcast_to(np.zeros((), array.dtype), tuple(array.shape)) for own, array in target.items()
    }
    places, found = canonical(shaped, kinds)
    owns = dict(zip(places, target, strict=True))
    parts = {name: (found.get(name.rpartition(".")[0], "other"), name.rpartition(".")[2]) for name in places}
    taken, table = match(
        state,
        {name: array.shape for name, array in places.items()},
        rename=rename,
        strict=strict,
        transposed={
            name
            for name, (kind, last) in parts.items()
            if (kind in RESHAPED and last == "weight") or (kind == "norm" and last == "conv_weight")
        },
        integers={name for name, array in places.items() if array.dtype.kind in "iub"},
    )
    return {
        owns[name]: to_layout("flax", parts[name][1], parts[name][0], taken[name]) for name in taken
    }, table


def shapes_of_norm(config: Config, param_dtype: Any, statistics_dtype: Any) -> Stored:
    """What a normalization of ours stores, under Flax's names: views of one element."""
    dtypes = dict.fromkeys(PARAMETERS, param_dtype) | {"num_batches_tracked": np.int32}
    return {
        NAMES["flax"][name]: to_layout(
            "flax", name, "norm", np.broadcast_to(np.zeros((), dtypes.get(name, statistics_dtype)), shape)
        )
        for name, shape in config.state_shapes().items()
    }


def refuse_stack(path: str, state: State) -> None:
    """Refuse a layer that stands for several, as `nn.vmap`, `nn.scan` and `nnx.vmap` make them.

    Raises:
        RBNValueError: It is one: nothing says on which axis the layers lie.
    """
    stacked = [name for name, array in state.items() if array.ndim > 1 and name != "conv_weight"]
    if stacked:
        raise RBNValueError(
            f"convert: expected layers whose arrays are of shape (C,), got {stacked[0]} of shape "
            f"{state[stacked[0]].shape} in {path}, a stack of layers or one of several channel axes. "
            "Build the stack of the new layers, or leave the layer out with where=."
        )


def copied(array: Any) -> NDArray[Any]:
    """A NumPy copy; half precision becomes float32."""
    copy = np.array(array, order="C")
    return copy.astype(np.float32) if copy.dtype.itemsize == 2 and copy.dtype.kind in "fV" else copy
