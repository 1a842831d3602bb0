"""What the three papers' own code stores, as data: other names and shapes for the same arrays.

That code is PyTorch's, and RBN's is Jittor's, too; there layers call their arrays alike. All their vectors
but those of plain BatchNorm are of shape (1, C, 1, 1), gamma and beta too.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rbn_core.errors import RBNValueError

FRAMEWORKS = ("torch", "jittor")
"""Whose files have these forms."""


@dataclass(frozen=True)
class Form:
    """How the code of a paper stores a layer.

    Args:
        names: Our own names below the layer in PyTorch and Jittor, each with theirs, where they differ.
        vectors: Our names of those arrays that are (1, C, 1, 1) there and (C,) here.
        paths: What the layer itself is called in their networks, where that differs from torchvision's.
    """

    names: Mapping[str, str] = field(default_factory=dict)
    vectors: tuple[str, ...] = ()
    paths: Mapping[str, str] = field(default_factory=dict)


FORMS = {
    "RBN": Form(vectors=("weight", "bias", "center_weight", "scale_weight", "scale_bias")),
    "IEBN": Form(
        {"scale_weight": "weight_readjust", "scale_bias": "bias_readjust"},
        ("weight", "bias", "scale_weight", "scale_bias"),
    ),
    "BNET": Form({"conv.weight": "bnconv.weight", "conv.bias": "bnconv.bias"}, paths={"bn3": "bnet3"}),
}
"""By the layer, as `rbn_core.Config.layer` has it."""

OURS = {theirs: ours for form in FORMS.values() for ours, theirs in form.names.items()}
"""Our own name of what has another one there."""

CANONICAL = {
    "weight_readjust": "scale_weight",
    "bias_readjust": "scale_bias",
    "bnconv.weight": "conv_weight",
    "bnconv.bias": "conv_bias",
}
"""The canonical name of what has another one there than in our layers."""

ADDED = ("center_weight", "scale_weight", "scale_bias", *FORMS["IEBN"].names.values())
"""What plain BatchNorm has not, under either name."""

VECTORS = ("weight", "bias", "gamma", "beta", *ADDED)
"""What is (1, C, 1, 1) there, under their, our own and canonical names."""

BACKBONE = "backbone."
"""What is before the names of a detector's backbone, beside which there are its other parts."""

MARKS = ("running_mean", *ADDED)
"""Beside one of these a vector is a layer's, and no kernel of somebody else's layer."""


def to_ours(state: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    """Arrays under PyTorch's or Jittor's names, in the papers' form or in ours, in ours.

    Raises:
        RBNValueError: Two arrays get one name.
    """
    ours = {}
    arrays = {name: np.asarray(array) for name, array in state.items()}
    shapes = flat_shapes({name: array.shape for name, array in arrays.items()})
    for name, array in arrays.items():
        renamed = our_name(name, state)
        if renamed in ours:
            raise RBNValueError(
                "RBN: expected a checkpoint of one form, got one with both ours and the published names of "
                f"{renamed}. Leave one of them out."
            )
        ours[renamed] = array if array.shape == shapes[name] else array.reshape(shapes[name])
    return ours


def to_theirs(state: Mapping[str, Any], layers: Mapping[str, Mapping[str, Any]]) -> dict[str, NDArray[Any]]:
    """Arrays under our own names in PyTorch or Jittor, in the form of the papers' code.

    Args:
        state: The arrays.
        layers: What owns them: where there is no `center_weight`, RBN and IEBN have the same names. What it
            does not say is told by the names: IEBN has a `scale_weight` alone.
    """
    theirs = {}
    for name, value in state.items():
        array = np.asarray(value)
        path, last = _divided(name, state)
        form = FORMS.get(layers.get(path, {}).get("layer") or _told(path, state), Form())
        if last in form.vectors and array.ndim == 1:
            array = array.reshape(1, -1, 1, 1)
        outer, _, inner = path.rpartition(".")
        path = _join(outer, form.paths.get(inner, inner))
        theirs[_join(path, form.names.get(last, last))] = array
    return theirs


def flat_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The shapes of all arrays with (1, C, 1, 1) as (C,), where such an array is a normalization's vector."""
    return {
        name: (shape[1],)
        if len(shape) > 1 and shape == (1, shape[1], *(1,) * (len(shape) - 2)) and _is_vector(name, shapes)
        else shape
        for name, shape in shapes.items()
    }


def our_name(name: str, state: Collection[str]) -> str:
    """Our own name in PyTorch and Jittor of an array of theirs, given all names."""
    path, last = _divided(name, state)
    if last.startswith("bnconv.") or _join(path, "bnconv.weight") in state:
        outer, _, inner = path.rpartition(".")
        paths = {theirs: ours for ours, theirs in FORMS["BNET"].paths.items()}
        path = _join(outer, paths.get(inner, inner))
    return _join(path, OURS.get(last, last))


def other_path(name: str) -> str:
    """The canonical name of an array where its layer is called as in their networks, or in ours again."""
    paths = FORMS["BNET"].paths
    *outer, path, last = ("", *name.split("."))
    swapped = {**paths, **{theirs: ours for ours, theirs in paths.items()}}
    return ".".join((*outer[1:], swapped.get(path, path), last)) if outer else name


def _divided(name: str, state: Collection[str]) -> tuple[str, str]:
    """The path of the layer that owns an array, and its own name below it: BNET's convolution is inside."""
    path, _, last = name.rpartition(".")
    outer, _, inner = path.rpartition(".")
    if inner in ("conv", "bnconv") and _join(outer, "running_mean") in state:
        return outer, f"{inner}.{last}"
    return path, last


def _is_vector(name: str, state: Collection[str]) -> bool:
    path, _, last = name.rpartition(".")
    return last in VECTORS and any(_join(path, mark) in state for mark in MARKS)


def _told(path: str, state: Collection[str]) -> str:
    """Which layer the names at a path are of; nothing where it is none of ours."""
    if _join(path, "center_weight") in state:
        return "RBN"
    if _join(path, "scale_weight") in state:
        return "IEBN"
    has_kernel = _join(path, "conv.weight") in state and _join(path, "weight") not in state
    return "BNET" if has_kernel and _join(path, "running_mean") in state else ""


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
