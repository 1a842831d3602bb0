"""NumPy layers as subjects: any function, and layers with the interface of the reference."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from rbn.conformance.cases import LAYERS, WAYS
from rbn.conformance.subject import Array, Momentum, Outcome, Subject, in_convention
from rbn_core.config import Config
from rbn_core.fused import TwoPass
from rbn_core.matching import State
from rbn_core.reference import Layer

Step = Callable[[Array, State, Config, bool, Array], tuple[Array, Array, dict[str, Array], State]]
"""(x, state, config, training, cotangent) to (y, dx, gradients of the parameters, state after the step)."""


class NumpyFunction(Subject):
    """A plain NumPy function as a subject.

    Args:
        name: What the reports call it.
        step: One step of the layer; arrays are under canonical names, and nothing it is given changes.
        momentum: Which value its momentum weighs.
        layers: Which of `cases.LAYERS` it implements.
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
        fixed: Mapping[str, Any] | None = None,
        absent: Mapping[str, str] | None = None,
        expected_failures: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.step = step
        self.momentum: Momentum = momentum
        self.layers = layers
        self.fixed = fixed or {}
        self.absent = absent or {}
        self.expected_failures = expected_failures or {}

    def build(self, config: Config, state: State, dtype: str, layout: str = "channels_first") -> None:
        """Remember the options and the state."""
        self.config = in_convention(config, self.momentum)
        self.stored = dict(state)
        self.layout = layout

    def run(self, x: Array, training: bool, cotangent: Array) -> Outcome:
        """Call the function."""
        x = laid_out(x, self.layout)
        with not_finite():
            y, dx, gradients, self.stored = self.step(x, self.stored, self.config, training, cotangent)
        return Outcome(y, dx, gradients, self.state(), x)

    def state(self) -> State:
        """What the function returned last."""
        return {name: np.array(value) for name, value in self.stored.items()}


class NumpyLayer(Subject):
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
            dx, gradients = self.layer.backward(cotangent)
        return Outcome(y.astype(x.dtype), dx.astype(x.dtype), gradients, self.state(), x)

    def state(self) -> State:
        """The layer's state."""
        return self.layer.state()

    def through(self, way: str) -> Subject:
        """The layer itself, likewise."""
        return self

    def spread(self, shares: tuple[int, ...]) -> Subject:
        """The layer itself: one process has the whole batch."""
        return self


class Numpy(NumpyLayer):
    """The reference's two-pass form: NumPy against NumPy, by two derivations."""

    ways = ()
    absent: Mapping[str, str] = {"rbn/*=spatial_*": "statistics over the channels have no two-pass form"}

    def __init__(self) -> None:
        super().__init__("numpy", TwoPass)


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
