"""NumPy layers as subjects: any function, and layers with the interface of the reference."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from rbn.conformance.cases import LAYERS, PRECISIONS_OF, SHARED_SPOILS, SHARED_WITH, SPOILS, WAYS
from rbn.conformance.subject import Array, Momentum, Outcome, Subject, in_convention
from rbn_core.config import Config
from rbn_core.matching import State
from rbn_core.options import IMAGE_STATISTICS
from rbn_core.reference import Layer
from rbn_core.two_pass import TwoPass

Step = Callable[[Array, State, Config, bool, Array], tuple[Array, Array, dict[str, Array], State]]
"""(x, state, config, training, cotangent) to (y, dx, gradients of the parameters, state after the step)."""


class InNumpy(Subject):
    """What NumPy's subjects have in common: how they enter mixed precision, and how they are spoilt.

    Mixed precision is what a framework makes of it that casts the input of every operator, and not what comes
    back: X is of the narrowest type in play, and dY is float32.
    """

    precisions: Collection[str] = tuple(PRECISIONS_OF[""])
    spoils: Collection[str] = tuple(kind for kind in SPOILS if kind != "elsewhere")
    precision = ""

    def under(self, precision: str) -> Subject:
        """The same, which is then given its cotangents in float32."""
        other = copy.copy(self)
        other.precision = precision
        return other

    def arriving(self, cotangent: Array) -> Array:
        """The cotangent as the layer gets it."""
        return cotangent.astype(np.float32) if self.precision else cotangent


class NumpyFunction(InNumpy):
    """A plain NumPy function as a subject.

    Args:
        name: What the reports call it.
        step: One step of the layer; arrays are under canonical names, and nothing it is given changes.
        momentum: Which value its momentum weighs.
        layers: Which of `cases.LAYERS` it implements.
        counts_batches: As in `Subject`; without, the state that the function is given has no
            "num_batches_tracked".
        fixed: As in `Subject`.
        absent: As in `Subject`.
        expected_failures: As in `Subject`.
    """

    def __init__(
        self,
        name: str,
        step: Step,
        *,
        momentum: Momentum = "old",
        layers: Collection[str] = LAYERS,
        counts_batches: bool = True,
        fixed: Mapping[str, Any] | None = None,
        absent: Mapping[str, str] | None = None,
        expected_failures: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.step = step
        self.momentum: Momentum = momentum
        self.layers = layers
        self.counts_batches = counts_batches
        self.fixed = fixed or {}
        self.absent = absent or {}
        self.expected_failures = expected_failures or {}

    def build(self, config: Config, state: State, dtype: str, layout: str = "channels_first") -> None:
        """Remember the options and the state."""
        self.config = in_convention(config, self.momentum)
        self.stored = dict(state)
        if not self.counts_batches:
            self.stored.pop("num_batches_tracked", None)
        self.layout = layout

    def run(self, x: Array, training: bool, cotangent: Array) -> Outcome:
        """Call the function."""
        x, dy = laid_out(x, self.layout), self.arriving(cotangent)
        with not_finite():
            y, dx, gradients, self.stored = self.step(x, self.stored, self.config, training, dy)
        return Outcome(y, dx, gradients, self.state(), x)

    def state(self) -> State:
        """What the function returned last."""
        return {name: np.array(value) for name, value in self.stored.items()}

    def spoil(self, name: str, kind: str) -> None:
        """Change what the function is given next."""
        self.stored = spoilt(self.stored, name, kind)


class NumpyLayer(InNumpy):
    """A NumPy layer with the interface of `rbn_core.reference.Layer`."""

    devices = 4
    ways: Collection[str] = WAYS

    def __init__(self, name: str, layer_class: type[Layer]) -> None:
        self.name = name
        self.layer_class = layer_class

    def build(self, config: Config, state: State, dtype: str, layout: str = "channels_first") -> None:
        """Make the layer."""
        self.layer = self.layer_class(config)
        self.layer.load(state)
        self.layout = layout

    def run(self, x: Array, training: bool, cotangent: Array) -> Outcome:
        """Forward and the hand-derived backward."""
        x = laid_out(x, self.layout)
        with not_finite():
            y = self.layer.forward(x, training)
            dx, gradients = self.layer.backward(self.arriving(cotangent))
        return Outcome(y.astype(x.dtype), dx.astype(x.dtype), gradients, self.state(), x)

    def state(self) -> State:
        """The layer's state."""
        return self.layer.state()

    def spoil(self, name: str, kind: str) -> None:
        """Change one of the layer's arrays."""
        kept = spoilt(self.layer.parameters | self.layer.statistics, name, kind)
        self.layer.parameters, self.layer.statistics = (
            {name: kept[name] for name in own if name in kept}
            for own in (self.layer.parameters, self.layer.statistics)
        )

    def through(self, way: str) -> Subject:
        """The layer itself, likewise."""
        return self

    def spread(self, shares: tuple[int, ...]) -> Subject:
        """The layer itself: one process has the whole batch."""
        return self


class Numpy(NumpyLayer):
    """The reference's two-pass form: NumPy against NumPy, by two derivations."""

    ways = ()
    absent: Mapping[str, str] = {
        f"rbn/*={name}*": "statistics of the image have no two-pass form" for name in IMAGE_STATISTICS
    }

    def __init__(self) -> None:
        super().__init__("numpy", TwoPass)


class Subclass(np.ndarray[Any, Any]):
    """An array by another name."""


def spoilt(state: Mapping[str, Any], name: str, kind: str) -> dict[str, Any]:
    """What is stored once something has happened to one array of it.

    Args:
        state: Everything that is stored, under canonical names; not changed.
        name: What is spoilt.
        kind: One of `cases.SPOILS`, but for "elsewhere".
    """
    rest = {other: value for other, value in state.items() if other != name}
    if kind == "missing":
        return rest
    if kind in SHARED_SPOILS:
        return rest | {name: next(rest[other] for other in SHARED_WITH[name] if other in rest)}
    value = state[name]
    larger = np.full((*value.shape[:-1], 2 * value.shape[-1]), np.nan, value.dtype)
    larger[..., ::2] = value
    frozen = value.copy()
    frozen.flags.writeable = False
    changed: dict[str, Array] = {
        "short": value[:-1].copy(),
        "one": value[:1].copy(),
        "long": np.concatenate((value, value)),
        "empty": value[:0].copy(),
        "half": value.astype(np.float16),
        "double": value.astype(np.float64),
        "integer": value.astype(np.int64),
        "read_only": frozen,
        "subclass": value.view(Subclass),
        "strided": larger[..., ::2],
    }
    return rest | {name: changed[kind]}


def not_finite() -> Any:
    """No warnings of NaN and infinity, which are what some cases are about, and some mistakes make."""
    return np.errstate(invalid="ignore", over="ignore", divide="ignore")


def laid_out(x: Array, layout: str) -> Array:
    """The same numbers in another layout, one of `cases.LAYOUTS`."""
    if layout == "channels_last":
        return np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1)
    if layout == "strided":
        return np.repeat(x, 2, axis=-1)[..., ::2]
    if layout == "expanded":
        return np.lib.stride_tricks.as_strided(x, strides=(0, *x.strides[1:]))
    return x
