"""`rbn.backends.jittor.RBN` as a subject of the suite."""

from __future__ import annotations

from typing import Any, ClassVar

from rbn.backends.jittor import RBN, from_numpy, to_numpy

# First, because it prepares what Jittor reads at its import.
# isort: split
import jittor as jt

from rbn.conformance.subject import Array, Outcome, Subject
from rbn_core.config import Config
from rbn_core.names import NAMES, PARAMETERS
from rbn_core.weights import State


class Jittor(Subject):
    """The Jittor layer."""

    name = "jittor"
    absent: ClassVar[dict[str, str]] = {
        "rbn/*/track_running_stats=False/*": "Jittor's BatchNorm always keeps running statistics"
    }

    def build(self, config: Config, state: State, dtype: str) -> None:
        """Make the module, with parameters in at least float32."""
        self.layer = RBN(
            config.num_features,
            config.eps,
            None if config.momentum is None else 1.0 - config.momentum,
            config.gamma,
            centering=config.centering,
            scaling=config.scaling,
            restrict=config.restrict,
            running_var=config.running_var,
        )
        if dtype == "float64":
            self.layer.float64()
        from_numpy(self.layer, state)

    def run(self, x: Array, training: bool, cotangent: Array) -> Outcome:
        """Forward and backward through `jt.grad`."""
        self.layer.is_train = training  # eval() would also stop the gradients of the parameters
        # Jittor has no complex variables: what could come is an array.
        leaf: Any = x if x.dtype.kind == "c" else jt.array(x, dtype=x.dtype.name)
        y = self.layer(leaf)
        stored = self.layer.state_dict()
        names = [name for name in PARAMETERS if NAMES["jittor"][name] in stored]
        wanted = [leaf, *(stored[NAMES["jittor"][name]] for name in names)]
        loss = (y * jt.array(cotangent, dtype=cotangent.dtype.name)).sum()
        dx, *gradients = (gradient.numpy() for gradient in jt.grad(loss, wanted))
        return Outcome(y.numpy(), dx, dict(zip(names, gradients, strict=True)), self.state(), leaf.numpy())

    def state(self) -> State:
        """The module's state."""
        return to_numpy(self.layer)
