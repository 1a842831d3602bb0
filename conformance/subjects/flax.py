"""`rbn.backends.flax.RBN`, linen and NNX, as subjects of the suite."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import enable_x64

from rbn.backends.flax import RBN, from_numpy, to_numpy
from rbn.backends.flax.nnx import RBN as NNXRBN
from rbn.conformance.subject import Array, Outcome, Subject
from rbn_core.config import Config
from rbn_core.weights import State

NO_SWITCH = {
    "*/track_running_stats=False/*": "Flax's BatchNorm always keeps running statistics, and so does RBN"
}


class Flax(Subject):
    """The linen layer."""

    name = "flax"
    absent = NO_SWITCH

    def build(self, config: Config, state: State, dtype: str) -> None:
        """Make the module and its variables, with parameters in at least float32."""
        with enable_x64(dtype == "float64"):
            self.step, _ = STEPS[dtype]
            self.layer = RBN(**options(config, dtype))
            self.variables = from_numpy(self.layer, state)

    def run(self, x: Array, training: bool, cotangent: Array) -> Outcome:
        """Forward and backward in one step."""
        with enable_x64(needs_x64(x)):
            image = jnp.asarray(channels_last(x))
            (_, (y, stats)), (gradients, dx) = self.step(
                self.layer, self.variables, image, jnp.asarray(channels_last(cotangent)), training
            )
            self.variables = self.variables | stats
            return outcome(image, y, dx, to_numpy({"params": gradients}), self.state())

    def state(self) -> State:
        """The variables."""
        return to_numpy(self.variables)


class FlaxNNX(Subject):
    """The NNX layer."""

    name = "flax.nnx"
    absent = NO_SWITCH

    def build(self, config: Config, state: State, dtype: str) -> None:
        """Make the module, with parameters in at least float32."""
        with enable_x64(dtype == "float64"):
            _, self.step = STEPS[dtype]
            self.layer = NNXRBN(config.num_features, **options(config, dtype), rngs=nnx.Rngs(0))
            from_numpy(self.layer, state)

    def run(self, x: Array, training: bool, cotangent: Array) -> Outcome:
        """Forward and backward in one step."""
        with enable_x64(needs_x64(x)):
            image = jnp.asarray(channels_last(x))
            (_, y), (gradients, dx) = self.step(
                self.layer, image, jnp.asarray(channels_last(cotangent)), training
            )
            gradients = to_numpy({"params": nnx.to_pure_dict(gradients)})
            return outcome(image, y, dx, gradients, self.state())

    def state(self) -> State:
        """The module's state."""
        return to_numpy(self.layer)


def differentiable(x: jax.Array) -> tuple[int, ...]:
    """The arguments of a loss to differentiate for: x too, unless it is for the layer to refuse."""
    return (0, 1) if jnp.issubdtype(x.dtype, jnp.floating) else (0,)


def linen_step(layer: RBN, variables: Any, x: jax.Array, cotangent: jax.Array, training: bool) -> Any:
    """(loss, (y, batch_stats)) and the gradients of sum(y * cotangent) for the parameters and for x."""

    def loss(params: Any, x: jax.Array) -> Any:
        y, stats = layer.apply(
            variables | {"params": params},
            x,
            use_running_average=not training,
            mutable=["batch_stats"] if training else [],
        )
        return (y * cotangent).sum(), (y, stats)

    return jax.value_and_grad(loss, differentiable(x), has_aux=True)(variables.get("params", {}), x)


def nnx_step(layer: NNXRBN, x: jax.Array, cotangent: jax.Array, training: bool) -> Any:
    """(loss, y) and the gradients of sum(y * cotangent) for the parameters and for x; fills the layer."""

    def loss(layer: NNXRBN, x: jax.Array) -> Any:
        y = layer(x, use_running_average=not training)
        return (y * cotangent).sum(), y

    return nnx.value_and_grad(loss, argnums=differentiable(x), has_aux=True)(layer, x)


# float32 is compiled, once for a layer's options and a shape; float64 runs op by op. So both ways are
# covered, and the suite does not spend minutes in the compiler.
STEPS = {
    "float32": (
        jax.jit(linen_step, static_argnames=("layer", "training")),
        nnx.jit(nnx_step, static_argnames="training"),
    ),
    "float64": (linen_step, nnx_step),
}


def options(config: Config, dtype: str) -> dict[str, Any]:
    """The options of either layer but for the number of channels."""
    return {
        "momentum": config.momentum,
        "epsilon": config.eps,
        "param_dtype": jnp.promote_types(dtype, jnp.float32),
        "use_bias": config.beta,
        "use_scale": config.gamma,
        "centering": config.centering,
        "scaling": config.scaling,
        "restrict": config.restrict,
        "running_var": config.running_var,
    }


def needs_x64(x: Array) -> bool:
    """Whether JAX would turn x into something narrower: float64, and the int64 that a layer must refuse."""
    return x.dtype.itemsize >= 8


def channels_last(x: Array) -> Array:
    """(N, C, *spatial) as (N, *spatial, C)."""
    return np.moveaxis(x, 1, -1) if x.ndim > 2 else x


def outcome(x: jax.Array, y: jax.Array, dx: jax.Array, gradients: State, state: State) -> Outcome:
    """The step's results, channels first again."""
    y, dx, x = (np.moveaxis(np.asarray(value), -1, 1) for value in (y, dx, x))
    return Outcome(y, dx, gradients, state, x)
