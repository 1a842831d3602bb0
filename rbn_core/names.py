"""One table: what every stored array is called and how it lies, canonically and in each framework.

An array is called after the layer that owns it: the dotted path of the layer in the network, and below it
the array's own name. gamma, beta and the running statistics keep the name that the framework's own BatchNorm
gives them, so that a plain BatchNorm's weights load; BNET's convolution is the framework's own, in a
submodule `conv`. All are of shape (C,) everywhere, but for the counter of batches, which is a scalar.

Kernels lie canonically as in PyTorch: a convolution's (out, in / groups, *kernel), a transposed
convolution's (in, out / groups, *kernel), a linear layer's (out, in), an embedding's (count, features).
MindSpore and Jittor agree; Flax puts the kernel's axes first and the outputs last, and does not flip a
transposed convolution's. Flax names carry their collection.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rbn_core import published
from rbn_core.matching import State

Kind = Literal["convolution", "transposed_convolution", "linear", "embedding", "norm", "other"]
"""What owns an array, as far as that decides how it lies; "norm" is any with gamma and beta."""

KINDS: tuple[Kind, ...] = ("convolution", "transposed_convolution", "linear", "embedding", "norm", "other")

PARAMETERS = (
    "gamma",
    "beta",
    "center_weight",
    "scale_weight",
    "scale_bias",
    "conv_weight",
    "conv_bias",
)
RUNNING_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")

NAMES: dict[str, dict[str, str]] = {
    "torch": {
        "gamma": "weight",
        "beta": "bias",
        "center_weight": "center_weight",
        "scale_weight": "scale_weight",
        "scale_bias": "scale_bias",
        "conv_weight": "conv.weight",
        "conv_bias": "conv.bias",
        "running_mean": "running_mean",
        "running_var": "running_var",
        "num_batches_tracked": "num_batches_tracked",
    },
    "flax": {
        "gamma": "params/scale",
        "beta": "params/bias",
        "center_weight": "params/center_weight",
        "scale_weight": "params/scale_weight",
        "scale_bias": "params/scale_bias",
        "conv_weight": "params/conv/kernel",
        "conv_bias": "params/conv/bias",
        "running_mean": "batch_stats/mean",
        "running_var": "batch_stats/var",
        "num_batches_tracked": "batch_stats/num_batches_tracked",
    },
    "mindspore": {
        "gamma": "gamma",
        "beta": "beta",
        "center_weight": "center_weight",
        "scale_weight": "scale_weight",
        "scale_bias": "scale_bias",
        "conv_weight": "conv.weight",
        "conv_bias": "conv.bias",
        "running_mean": "moving_mean",
        "running_var": "moving_variance",
        "num_batches_tracked": "num_batches_tracked",
    },
    "jittor": {
        "gamma": "weight",
        "beta": "bias",
        "center_weight": "center_weight",
        "scale_weight": "scale_weight",
        "scale_bias": "scale_bias",
        "conv_weight": "conv.weight",
        "conv_bias": "conv.bias",
        "running_mean": "running_mean",
        "running_var": "running_var",
        "num_batches_tracked": "num_batches_tracked",
    },
}

WEIGHTS: dict[str, dict[Kind, str]] = {
    "torch": {},
    "flax": {
        "convolution": "kernel",
        "transposed_convolution": "kernel",
        "linear": "kernel",
        "embedding": "embedding",
    },
    "mindspore": {"embedding": "embedding_table"},
    "jittor": {},
}
"""What the weight of a layer without statistics is called, where it is not "weight"; its bias is "bias"."""


def own_name(framework: str, path: str, name: str, kind: Kind) -> str:
    """A framework's name of an array.

    Args:
        framework: Whose.
        path: The dotted path of the layer; empty for a layer alone.
        name: The canonical name of the array below it.
        kind: What the layer is.
    """
    if kind == "norm" and name in NAMES[framework]:
        own = NAMES[framework][name]
    else:
        own = WEIGHTS[framework].get(kind, name) if name == "weight" else name
        own = f"params/{own}" if framework == "flax" else own
    if framework != "flax":
        return f"{path}.{own}" if path else own
    collection, _, own = own.partition("/")
    return "/".join([collection, *(path.split(".") if path else ()), own])


def to_layout(framework: str, name: str, kind: Kind, array: NDArray[Any]) -> NDArray[Any]:
    """A canonical array as a framework lays it out: a view.

    Args:
        framework: Whose layout.
        name: The array's canonical name below its layer.
        kind: What the layer is.
        array: The array.
    """
    if framework != "flax" or array.ndim < 2:
        return array
    if kind == "linear" and name == "weight":
        return array.T
    if (kind == "convolution" and name == "weight") or (kind == "norm" and name == "conv_weight"):
        return np.moveaxis(array, (0, 1), (-1, -2))
    if kind == "transposed_convolution" and name == "weight":
        return np.flip(np.moveaxis(array, (0, 1), (-2, -1)), range(array.ndim - 2))
    return array


def from_layout(framework: str, name: str, kind: Kind, array: NDArray[Any]) -> NDArray[Any]:
    """The canonical form of an array that lies as a framework has it, a view: the inverse of `to_layout`."""
    if framework != "flax" or array.ndim < 2:
        return array
    if kind == "linear" and name == "weight":
        return array.T
    if (kind == "convolution" and name == "weight") or (kind == "norm" and name == "conv_weight"):
        return np.moveaxis(array, (-1, -2), (0, 1))
    if kind == "transposed_convolution" and name == "weight":
        return np.moveaxis(np.flip(array, range(array.ndim - 2)), (-2, -1), (0, 1))
    return array


def to_own(framework: str, state: Mapping[str, Any], kinds: Mapping[str, Kind]) -> State:
    """A canonical state under a framework's names and in its layout.

    Args:
        framework: Whose.
        state: Arrays under canonical names.
        kinds: What the layers are, by dotted path; the arrays of any other stay as they lie.
    """
    own = {}
    for canonical, array in state.items():
        path, _, name = canonical.rpartition(".")
        kind = kinds.get(path, "other")
        own[own_name(framework, path, name, kind)] = to_layout(framework, name, kind, np.asarray(array))
    return own


def from_own(
    framework: str, stored: Mapping[str, Any], kinds: Mapping[str, Kind] | None = None
) -> tuple[State, dict[str, Kind]]:
    """The canonical state of arrays under a framework's names and in its layout, with what the layers are.

    Those of the papers' own code, in PyTorch and Jittor, are taken in its form, too: see `published`.

    Args:
        framework: Whose.
        stored: The arrays, as a file of the framework has them.
        kinds: What the layers are, by dotted path. One that is not said is told by its arrays' names and
            ranks: a kernel of rank 2 is then a linear layer's and one of more a convolution's, so that
            transposed convolutions, and outside of Flax and MindSpore embeddings, have to be said.

    Returns:
        The arrays under canonical names, and what every layer is.
    """
    if framework in published.FRAMEWORKS:
        stored = published.to_ours(stored)
    places = {own: _place(framework, own) for own in stored}
    ranks = {place: np.ndim(stored[own]) for own, place in places.items()}
    known: dict[str, Kind] = dict(kinds or {})  # a layer may own nothing but BNET's convolution
    for collection, path, own in ranks:
        if ranks[collection, path, own] > 1 and ranks.get((collection, path, "bias"), 1) > 1:
            continue  # a bias for each weight: no kernel, but a normalization over several axes, for example
        if kind := (kinds or {}).get(path) or _told_by(
            framework, collection, own, ranks[collection, path, own]
        ):
            known[path] = kind
    state: State = {}
    owners: dict[str, Kind] = {}
    for own_name, (collection, path, own) in places.items():
        outer, _, inner = path.rpartition(".")
        kind = known.get(path, "other")
        name = "weight" if own == WEIGHTS[framework].get(kind) else own
        for owner, suffix in ((path, own), (outer, f"{inner}.{own}")):  # the latter is BNET's convolution
            canonical = _NORMS[framework].get((collection, suffix))
            if canonical and known.get(owner) == "norm":
                path, name, kind = owner, canonical, "norm"
        state[f"{path}.{name}" if path else name] = from_layout(
            framework, name, kind, np.asarray(stored[own_name])
        )
        owners[path] = kind
    return state, owners


def _place(framework: str, own: str) -> tuple[str, str, str]:
    """An own name's collection (of Flax), dotted path and last part."""
    collection, _, rest = own.partition("/") if framework == "flax" else ("", "", own)
    path, _, last = (rest.replace("/", ".") if framework == "flax" else rest).rpartition(".")
    return collection, path, last


def _told_by(framework: str, collection: str, own: str, rank: int) -> Kind | None:
    """What the layer is that owns such an array, if that can be told."""
    canonical = _NORMS[framework].get((collection, own))
    # "weight" and "bias" are anyone's, and a norm's where its statistics are there; "gamma" and "scale" tell.
    if (
        canonical in (*RUNNING_STATISTICS, *PARAMETERS)
        and own not in ("weight", "bias")
        and (canonical != "gamma" or rank == 1)
    ):
        return "norm"
    if own == WEIGHTS[framework].get("embedding"):
        return "embedding"
    if own == WEIGHTS[framework].get("convolution", "weight"):
        return "convolution" if rank > 2 else "linear" if rank == 2 else None
    return None


_NORMS = {
    framework: {
        (
            _place(framework, own)[0],
            own.partition("/")[2].replace("/", ".") if framework == "flax" else own,
        ): canonical
        for canonical, own in names.items()
    }
    for framework, names in NAMES.items()
}
"""The canonical name of what a norm layer has, by collection and dotted name below the layer."""
