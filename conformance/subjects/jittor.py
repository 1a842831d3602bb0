"""The Jittor layers as a subject of the suite."""

from __future__ import annotations

from typing import Any, ClassVar

from rbn.backends.jittor import BNET, IEBN, RBN, from_numpy, to_numpy

# First, because it prepares what Jittor reads at its import.
# isort: split
import jittor as jt

from rbn.conformance.subject import Array, Outcome, Subject
from rbn_core.config import Config
from rbn_core.names import NAMES, PARAMETERS
from rbn_core.weights import State


class Jittor(Subject):
    """The Jittor layers."""

    name = "jittor"
    absent: ClassVar[dict[str, str]] = {
        "*/track_running_stats=False/*": "Jittor's BatchNorm always keeps running statistics",
        "*/channels_last": "Jittor has no channels-last layout",
    }

    def build(self, config: Config, state: State, dtype: str, layout: str = "channels_first") -> None:
        """Make the module, with parameters in at least float32."""
        if layout != "channels_first":
            raise NotImplementedError(self.absent["*/channels_last"])
        common: dict[str, Any] = {
            "eps": config.eps,
            "momentum": None if config.momentum is None else 1.0 - config.momentum,
            "running_var": config.running_var,
        }
        self.layer: RBN | IEBN | BNET
        if config.layer == "BNET":
            common["spatial_dims"] = config.spatial_dims
            self.layer = BNET(config.num_features, config.kernel_size or 0, **common)
        elif config.layer == "IEBN":
            self.layer = IEBN(config.num_features, affine=config.gamma, **common)
        else:
            common |= {"centering": config.centering, "scaling": config.scaling, "restrict": config.restrict}
            self.layer = RBN(config.num_features, affine=config.gamma, **common)
        if dtype == "float64":
            self.layer.float64()
        from_numpy(self.layer, state)

    def run(self, x: Array, training: bool, cotangent: Array) -> Outcome:
        """Forward and backward through `jt.grad`."""
        self.layer.is_train = training  # eval() would also stop the gradients of the parameters
        # Jittor has no complex variables: what could come is an array.
        leaf: Any = x if x.dtype.kind == "c" else variable(x)
        y = self.layer(leaf)
        stored = self.layer.state_dict()
        names = [name for name in PARAMETERS if NAMES["jittor"][name] in stored]
        wanted = [leaf, *(stored[NAMES["jittor"][name]] for name in names)]
        loss = (y * variable(cotangent)).sum()
        dx, *gradients = (array(gradient) for gradient in jt.grad(loss, wanted))
        return Outcome(array(y), dx, dict(zip(names, gradients, strict=True)), self.state(), array(leaf))

    def state(self) -> State:
        """The module's state."""
        return to_numpy(self.layer)


def variable(x: Array) -> jt.Var:
    """The array as a variable of its own dtype; NumPy's bfloat16 goes through float32."""
    if x.dtype.name == "bfloat16":
        return jt.array(x.astype("float32")).cast("bfloat16")
    return jt.array(x, dtype=x.dtype.name)


def array(var: jt.Var) -> Array:
    """The variable as an array of its own dtype."""
    result: Array = var.float32().numpy().astype("bfloat16") if var.dtype == "bfloat16" else var.numpy()
    return result
