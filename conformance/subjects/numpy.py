"""The reference's two-pass form as a subject: NumPy against NumPy, by two derivations."""

from __future__ import annotations

from typing import ClassVar

from rbn.conformance.subject import Array, Outcome, Subject
from rbn_core.config import Config
from rbn_core.fused import TwoPass
from rbn_core.reference import Layer
from rbn_core.weights import State


class Numpy(Subject):
    """A NumPy layer with the interface of `rbn_core.reference.Layer`; here its two-pass form.

    Attributes:
        layer_class: The layer under test; mutants put their own here.
    """

    name = "numpy"
    absent: ClassVar[dict[str, str]] = {
        "rbn/*=spatial_*": "statistics over the channels have no two-pass form"
    }
    layer_class: type[Layer] = TwoPass

    def build(self, config: Config, state: State, dtype: str, layout: str = "channels_first") -> None:
        """Make the layer."""
        self.layer = self.layer_class(config)
        self.layer.load(state)

    def run(self, x: Array, training: bool, cotangent: Array) -> Outcome:
        """Forward and the hand-derived backward."""
        y = self.layer.forward(x, training)
        dx, gradients = self.layer.backward(cotangent)
        return Outcome(y.astype(x.dtype), dx.astype(x.dtype), gradients, self.state(), x)

    def state(self) -> State:
        """The layer's state."""
        return self.layer.state()
