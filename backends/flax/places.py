"""Where canonical arrays lie among those of Flax: what weights of linen and of NNX have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


Leads = Mapping[str, tuple[int, ...]]
"""By collection the sizes of the axes before those of a layer, where the layer stands for several."""

COLLECTIONS = ("params", "batch_stats")


def stack(own: Mapping[str, Any]) -> str:
    """The name of an array that shows that a layer stands for several; empty where it stands for itself.

    Args:
        own: A normalization's arrays under Flax's names, without its path.
    """
    vectors = [name for name in own if "/conv/" not in name and not name.endswith(COUNTER)]
    return next((name for name in vectors if np.ndim(own[name]) > 1), "")


def refuse_stack(own: Mapping[str, Any]) -> None:
    """Refuse a layer that stands for several where nothing says how its arrays lie.

    Raises:
        RBNValueError: It is one.
    """
    if name := stack(own):
        raise RBNValueError(
            f"convert: expected init=, which tells how the layers of a stack lie, got none and {name} of "
            f"shape {np.shape(own[name])}. Pass for example lambda: net.init(key, x, train=False); it tells "
            "layers of several channel axes, too."
        )


def unstacked(own: Mapping[str, Any], leads: Leads) -> list[Stored]:
    """The arrays of each layer of a stack.

    Args:
        own: Arrays under Flax's names, with the axes of the stack in front; what the layers share has none.
        leads: The sizes of those axes.

    Raises:
        RBNValueError: The collections are stacks of different sizes.
    """
    sizes = sorted(set(leads.values()), key=len)
    if len(sizes) > 2 or (len(sizes) == 2 and sizes[0]):
        raise RBNValueError(
            f"convert: expected parameters and statistics of as many layers, got stacks of {sizes[0]} and "
            f"{sizes[1]}. Leave these layers out with where=."
        )
    whole = sizes[-1]
    return [
        {
            name: np.asarray(array)[index] if leads[name.partition("/")[0]] else np.asarray(array)
            for name, array in own.items()
        }
        for index in np.ndindex(*whole)
    ]


def stacked(layers: Sequence[Mapping[str, Any]], leads: Leads) -> Stored:
    """What `unstacked` takes apart; of what the layers share the first one's."""

    def together(name: str) -> Any:
        lead = leads[name.partition("/")[0]]
        arrays = [np.asarray(layer[name]) for layer in layers]
        return np.stack(arrays).reshape(*lead, *arrays[0].shape) if lead else arrays[0]

    return {name: together(name) for name in layers[0]}


def copied(array: Any) -> NDArray[Any]:
    """A NumPy copy; half precision becomes float32."""
    copy = np.array(array, order="C")
    return copy.astype(np.float32) if copy.dtype.itemsize == 2 and copy.dtype.kind in "fV" else copy
