"""Where two networks part: their layers' results compared, one after another.

A backend's `activations` runs a model and notes what goes into each of its layers and what comes out. Weights
can be right and the networks differ all the same, in what is no weight: padding, pooling, epsilon.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rbn_core.errors import RBNValueError

OUTPUT = ""
"""The path of the whole network."""

ALLOWED = 1e-4
"""How far an activation may be off, relative to the largest: frameworks round differently, layer by layer."""


class Observed(NamedTuple):
    """What a layer did.

    Args:
        kind: The name of its class.
        input: What went into it first, if that was an array.
        output: What came out of it.
    """

    kind: str
    input: NDArray[Any] | None
    output: NDArray[Any]


Layers = dict[str, Observed]
"""What the layers of a network did, by dotted path, in the order in which they ended; the network is last."""


CAUSES = (
    (
        ("conv",),
        "padding: Flax's SAME pads more at the end than at the start where the stride is 2, MindSpore's "
        "default is 'same' and PyTorch's 0; or stride, dilation, groups, or a transposed kernel not turned",
    ),
    (
        ("pool",),
        "pooling: the padding ('same' against 1), ceil_mode, or whether an average counts what was padded",
    ),
    (
        ("norm", "rbn", "iebn", "bnet"),
        "epsilon (1e-6 in Flax's LayerNorm, elsewhere 1e-5); batch statistics in place of the running ones, "
        "as in training; or another axis of the channels",
    ),
    (
        ("gelu", "relu", "act", "sigmoid", "swish"),
        "the activation: GELU exact or by tanh, a slope, a limit of 6",
    ),
    (("dropout", "droppath"), "a network in training"),
    (
        ("linear", "dense"),
        "the order of what was flattened: channels come last in Flax, and first elsewhere",
    ),
    (("upsample", "resize", "interpolate"), "align_corners, or how sizes are rounded"),
)
"""By a part of the class's name in small letters, why layers of the same weights differ."""

BETWEEN = (
    "what is no layer of its own: pooling (its padding, ceil_mode), an activation, padding before a "
    "convolution, the order of what is flattened or concatenated"
)


@dataclass(frozen=True)
class Parting:
    """How far two networks are apart, and where they part.

    Args:
        largest: The largest difference of the results.
        relative: The same, relative to the largest number of the first network's result.
        layer: The first layer whose activations part, if any does.
        before: Whether what goes into it differs already, though the layers before agree.
        detail: By how much, and of which shapes.
        causes: What is usually behind it.
        compared: How many layers were compared.
    """

    largest: float
    relative: float
    layer: str | None
    before: bool
    detail: str
    causes: str
    compared: int

    @property
    def allowed(self) -> bool:
        """Whether the networks are the same but for rounding."""
        return self.relative <= ALLOWED

    def __str__(self) -> str:
        result = f"largest difference {self.largest:.1e}, {self.relative:.1e} of the largest result"
        if self.layer is None:
            return f"{result}; none of {self.compared} layers part"
        where = f"before {self.layer!r}" if self.before else f"at {self.layer!r}"
        return (
            f"{result}; of {self.compared} layers the first part {where} ({self.detail}). Usual causes: "
            f"{self.causes}."
        )


def compare(
    first: Callable[[Any], Layers] | Layers,
    second: Callable[[Any], Layers] | Layers,
    x: Any = None,
    *,
    rename: Mapping[str, str] | None = None,
) -> Parting:
    """Run two networks on the same input, and find the first layer whose activations part.

    Layers are paired by their paths, or, where no path of one is in the other, in their order by the shapes
    of what comes out. Channels may be last in one and first in the other.

    Args:
        first: Takes the input and returns what a backend's `activations` does, or is this already, as from
            another process.
        second: The same of the other network.
        x: The input, as the callables take it.
        rename: Paths of the first network with those of the second, where they differ.

    Raises:
        RBNValueError: No layer of one is like one of the other, or the results have other shapes.
    """
    one = first(x) if callable(first) else first
    other = second(x) if callable(second) else second
    if OUTPUT not in one or OUTPUT not in other:
        raise RBNValueError(
            "compare: expected what a backend's `activations` returns, which ends with the network's result, "
            f"got layers {', '.join([*one, *other][:6])}. Return all of it."
        )
    largest, relative = difference(one[OUTPUT].output, other[OUTPUT].output)
    if relative == np.inf:
        raise RBNValueError(
            f"compare: expected results of one shape, got {one[OUTPUT].output.shape} and "
            f"{other[OUTPUT].output.shape}. Compare networks of the same task."
        )
    pairs = list(paired(one, other, rename or {}))
    for path, theirs in pairs:
        mine, its = one[path], other[theirs]
        apart = difference(mine.output, its.output)[1]
        if apart <= ALLOWED:
            continue
        before = (
            mine.input is not None
            and its.input is not None
            and difference(mine.input, its.input)[1] > ALLOWED
        )
        shapes = f"{mine.output.shape} and {its.output.shape}"
        detail = f"shapes {shapes}" if apart == np.inf else f"{apart:.1e} of the largest of {shapes}"
        return Parting(
            largest,
            relative,
            path or "the result",
            before,
            detail,
            BETWEEN if before else causes(mine, its),
            len(pairs),
        )
    return Parting(largest, relative, None, False, "", "", len(pairs))


def paired(one: Layers, other: Layers, rename: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """The paths of layers that belong together, in the order of the first network."""
    named = [
        (path, rename.get(path, path)) for path in one if path != OUTPUT and rename.get(path, path) in other
    ]
    if named:
        yield from [*named, (OUTPUT, OUTPUT)]
        return
    left = [path for path in other if path != OUTPUT]
    for path in one:
        if path == OUTPUT:
            continue
        alike = (
            place
            for place, theirs in enumerate(left)
            if np.isfinite(difference(one[path].output, other[theirs].output)[1])
        )
        place = next(alike, None)
        if place is not None:
            yield path, left[place]
            del left[: place + 1]
    yield OUTPUT, OUTPUT


def difference(one: NDArray[Any], other: NDArray[Any]) -> tuple[float, float]:
    """The largest difference of two activations, and relative to the largest of the first.

    Infinity is the difference of shapes, and of what is not finite in one alone.
    """
    candidates = [other]
    if other.ndim > 2:
        candidates += [np.moveaxis(other, -1, 1), np.moveaxis(other, 1, -1)]
    best = np.inf
    size = float(np.max(np.abs(one), initial=0))
    for candidate in candidates:
        if candidate.shape == one.shape:
            apart = float(np.max(np.abs(one.astype(np.float64) - candidate), initial=0))
            best = min(best, apart if np.isfinite(apart) else np.inf)
    return best, best / size if size else (0.0 if best == 0 else np.inf)


def causes(one: Observed, other: Observed) -> str:
    """What is usually behind a difference at such a layer."""
    kinds = f"{one.kind} {other.kind}".lower()
    found = next((cause for names, cause in CAUSES if any(name in kinds for name in names)), None)
    return found or "the options of the layer, and whether its weights are the same"
