"""The Flax layers, linen and NNX, as subjects of the suite."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import enable_x64

from rbn.backends import flax as linen_layers
from rbn.backends.flax import from_numpy, to_numpy
from rbn.backends.flax import nnx as nnx_layers
from rbn.conformance.cases import OPTION_SHAPE
from rbn.conformance.subject import Array, Outcome, Subject
from rbn_core.config import Config
from rbn_core.weights import State

NO_SWITCH = {
    "*/track_running_stats=False/*": "Flax's BatchNorm always keeps running statistics, and so do the layers"
}


class Flax(Subject):
    """The linen layers."""

    name = "flax"
    absent = NO_SWITCH

    def build(self, config: Config, state: State, dtype: str, layout: str = "channels_first") -> None:
        """Make the module and its variables, with parameters in at least float32."""
        with enable_x64(dtype == "float64"):
            self.axis = channel_axis(dtype, layout)
            self.layer = getattr(linen_layers, config.layer)(axis=self.axis, **options(config, dtype))
            self.variables = from_numpy(self.layer, state)

    def run(self, x: Array, training: bool, cotangent: Array) -> Outcome:
        """Forward and backward in one step."""
        with enable_x64(needs_x64(x)):
            image = jnp.asarray(laid_out(x, self.axis))
            upstream = jnp.asarray(laid_out(cotangent, self.axis))
            step = compiled_linen_step if is_compiled(x) else linen_step
            (_, (y, stats)), (gradients, dx) = step(self.layer, self.variables, image, upstream, training)
            self.variables = self.variables | stats
            return outcome(self.axis, image, y, dx, to_numpy({"params": gradients}), self.state())

    def state(self) -> State:
        """The variables."""
        return to_numpy(self.variables)


class FlaxNNX(Subject):
    """The NNX layers."""

    name = "flax.nnx"
    absent = NO_SWITCH

    def build(self, config: Config, state: State, dtype: str, layout: str = "channels_first") -> None:
        """Make the module, with parameters in at least float32."""
        with enable_x64(dtype == "float64"):
            self.axis = channel_axis(dtype, layout)
            self.layer = getattr(nnx_layers, config.layer)(
                config.num_features, axis=self.axis, **options(config, dtype), rngs=nnx.Rngs(0)
            )
            from_numpy(self.layer, state)

    def run(self, x: Array, training: bool, cotangent: Array) -> Outcome:
        """Forward and backward in one step."""
        with enable_x64(needs_x64(x)):
            image = jnp.asarray(laid_out(x, self.axis))
            upstream = jnp.asarray(laid_out(cotangent, self.axis))
            step = compiled_nnx_step if is_compiled(x) else nnx_step
            (_, y), (gradients, dx) = step(self.layer, image, upstream, training)
            gradients = to_numpy({"params": nnx.to_pure_dict(gradients)})
            return outcome(self.axis, image, y, dx, gradients, self.state())

    def state(self) -> State:
        """The module's state."""
        return to_numpy(self.layer)


def differentiable(x: jax.Array) -> tuple[int, ...]:
    """The arguments of a loss to differentiate for: x too, unless it is for the layer to refuse."""
    return (0, 1) if jnp.issubdtype(x.dtype, jnp.floating) else (0,)


def linen_step(layer: Any, variables: Any, x: jax.Array, cotangent: jax.Array, training: bool) -> Any:
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


def nnx_step(layer: Any, x: jax.Array, cotangent: jax.Array, training: bool) -> Any:
    """(loss, y) and the gradients of sum(y * cotangent) for the parameters and for x; fills the layer."""

    def loss(layer: Any, x: jax.Array) -> Any:
        y = layer(x, use_running_average=not training)
        return (y * cotangent).sum(), y

    return nnx.value_and_grad(loss, argnums=differentiable(x), has_aux=True)(layer, x)


compiled_linen_step = jax.jit(linen_step, static_argnames=("layer", "training"))
compiled_nnx_step = nnx.jit(nnx_step, static_argnames="training")


def is_compiled(x: Array) -> bool:
    """Whether a step on this input runs compiled.

    The cases of options share one shape, and op by op they share what is compiled, too. So both ways are
    covered, and the suite does not spend minutes in the compiler.
    """
    return x.shape != OPTION_SHAPE


def channel_axis(dtype: str, layout: str) -> int:
    """Where the channels are.

    Last, as is usual in Flax, but for the channels-first cases in float64: so every option runs with both,
    and the layout cases in float64 compare them on the same shapes.
    """
    return 1 if (dtype, layout) == ("float64", "channels_first") else -1


def options(config: Config, dtype: str) -> dict[str, Any]:
    """The options of either layer but for the number of channels and the axis."""
    common = {
        "momentum": config.momentum,
        "epsilon": config.eps,
        "param_dtype": jnp.promote_types(dtype, jnp.float32),
        "running_var": config.running_var,
    }
    if config.layer == "BNET":
        return common | {"kernel_size": config.kernel_size, "spatial_dims": config.spatial_dims}
    common |= {"use_bias": config.beta, "use_scale": config.gamma}
    if config.layer == "IEBN":
        return common
    return common | {
        "centering": config.centering,
        "scaling": config.scaling,
        "restrict": config.restrict,
    }


def needs_x64(x: Array) -> bool:
    """Whether JAX would turn x into something narrower: float64, and the int64 that a layer must refuse."""
    return x.dtype.itemsize >= 8


def laid_out(x: Array, axis: int) -> Array:
    """(N, C, *spatial) with the channels at `axis`; what has no spatial axes stays as it is."""
    return np.moveaxis(x, 1, axis) if x.ndim > 2 else x


def outcome(axis: int, x: jax.Array, y: jax.Array, dx: jax.Array, gradients: State, state: State) -> Outcome:
    """The step's results, channels first again."""
    y, dx, x = (np.moveaxis(np.asarray(value), axis, 1) for value in (y, dx, x))
    return Outcome(y, dx, gradients, state, x)
