"""The Flax layers, linen and NNX, as subjects of the suite."""

from __future__ import annotations

import os
from typing import Any

# On a CPU JAX has several devices only if it is told so before it starts.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=4")

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental import enable_x64
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rbn.backends import flax as linen_layers
from rbn.backends.flax import from_numpy, to_numpy
from rbn.backends.flax import nnx as nnx_layers
from rbn.conformance.cases import LAYERS
from rbn.conformance.subject import Array, LayerSubject, Outcome, Subject
from rbn.conformance.suite import OPTION_SHAPE
from rbn_core.config import Config
from rbn_core.matching import State
from rbn_core.names import NAMES

NO_SWITCH = {"track_running_stats": True}
"""Flax's BatchNorm always keeps running statistics, and so do the layers."""

NO_STRIDES = "JAX's arrays have no strides"
ONE_SHAPE = "all devices of JAX have shares of one shape"
ABSENT = {
    "*/strided": NO_STRIDES,
    "*/expanded": NO_STRIDES,
    "*/shares=3+1": ONE_SHAPE,
    "*/shares=4+0": ONE_SHAPE,
    "*/shares=2+0+1+1": ONE_SHAPE,
}
"""What there is not in JAX."""


class FlaxModule(LayerSubject):
    """Any linen module called with `use_running_average`; its inputs have the channels last.

    `make` gets the dtype of the parameters as a NumPy dtype. Names carry their collection: "params/scale".
    """

    takes_axis = False

    def build(self, config: Config, state: State, dtype: str, layout: str = "channels_first") -> None:
        """Make the module and its variables, with parameters in at least float32."""
        if layout in ("strided", "expanded"):
            raise NotImplementedError(NO_STRIDES)
        self.axis = channel_axis(dtype, layout) if self.takes_axis else -1
        with enable_x64(dtype == "float64"):
            self.layer = self.make_layer(config, jnp.promote_types(dtype, jnp.float32))
            self.load(state)

    def load(self, state: State) -> None:
        """Make the variables."""
        example = jnp.ones((2, *(1,) * self.config.spatial_dims, self.config.num_features))
        variables = self.layer.init(jax.random.key(0), example, use_running_average=True)
        flat = flatten_dict(variables, sep="/")
        own = self.own(state, {name: np.asarray(value) for name, value in flat.items()})
        self.variables = unflatten_dict({name: jnp.asarray(value) for name, value in own.items()}, sep="/")

    def run(self, x: Array, training: bool, cotangent: Array) -> Outcome:
        """Forward and backward in one step."""
        with enable_x64(needs_x64(x)):
            image, upstream = (jnp.asarray(laid_out(value, self.axis)) for value in (x, cotangent))
            step = self.step if is_compiled(x) else linen_step
            (_, (y, stats)), (gradients, dx) = step(self.layer, self.variables, image, upstream, training)
            self.variables = self.variables | stats
            return self.outcome(image, y, dx, {"params": gradients})

    def step(self, *arguments: Any) -> Any:
        """A compiled step."""
        return compiled_linen_step(*arguments)

    def outcome(self, x: jax.Array, y: jax.Array, dx: jax.Array, gradients: Any) -> Outcome:
        """The step's results, channels first again."""
        y, dx, x = (np.moveaxis(np.asarray(value), self.axis, 1) for value in (y, dx, x))
        return Outcome(y, dx, self.named(gradients), self.state(), x)

    def named(self, variables: Any) -> State:
        """Variables under canonical names."""
        flat = flatten_dict(variables, sep="/")
        return self.canonical({name: np.array(value) for name, value in flat.items()})

    def state(self) -> State:
        """The variables."""
        return self.named(self.variables)


class NNXModule(FlaxModule):
    """Any NNX module called with `use_running_average`; its inputs have the channels last.

    `make` gets the dtype of the parameters as a NumPy dtype. Names are the module's: "scale".
    """

    def load(self, state: State) -> None:
        """Fill the module."""
        variables = nnx.state(self.layer)
        flat = {"/".join(map(str, path)): variable for path, variable in nnx.to_flat_state(variables)}
        own = self.own(state, {name: np.asarray(variable.value) for name, variable in flat.items()})
        for name, variable in flat.items():
            variable.value = jnp.asarray(own[name])
        nnx.update(self.layer, variables)

    def run(self, x: Array, training: bool, cotangent: Array) -> Outcome:
        """Forward and backward in one step."""
        with enable_x64(needs_x64(x)):
            image, upstream = (self.placed(laid_out(value, self.axis)) for value in (x, cotangent))
            step = compiled_nnx_step if is_compiled(x) else nnx_step
            (_, y), (gradients, dx) = step(self.layer, image, upstream, training)
            return self.outcome(image, y, dx, nnx.to_pure_dict(gradients))

    def placed(self, x: Array) -> jax.Array:
        """The images on their device."""
        return jnp.asarray(x)

    def state(self) -> State:
        """The module's state."""
        return self.named(nnx.to_pure_dict(nnx.state(self.layer)))


class Flax(FlaxModule):
    """The project's linen layers."""

    devices = 4
    takes_axis = True

    def __init__(self) -> None:
        super().__init__(
            "flax",
            self.make_rbn,
            NAMES["flax"],
            momentum="old",
            layers=LAYERS,
            fixed=NO_SWITCH,
            absent=ABSENT,
        )

    def make_rbn(self, config: Config, dtype: Any) -> Any:
        """RBN, IEBN or BNET."""
        return getattr(linen_layers, config.layer)(axis=self.axis, **options(config, dtype))

    def load(self, state: State) -> None:
        """Make the variables as users do."""
        self.variables = from_numpy(self.layer, state)

    def named(self, variables: Any) -> State:
        """Variables as users get them."""
        return to_numpy(variables)

    def spread(self, shares: tuple[int, ...]) -> Subject:
        """The layers under `shard_map` on so many devices."""
        return FlaxDevices(mesh(shares))


class FlaxDevices(Flax):
    """The linen layers with an `axis_name`, under `shard_map` on several devices."""

    def __init__(self, mesh: Mesh) -> None:
        super().__init__()
        self.mesh = mesh

    def make_rbn(self, config: Config, dtype: Any) -> Any:
        """RBN, IEBN or BNET."""
        return super().make_rbn(config, dtype).clone(axis_name="batch")

    def step(self, layer: Any, variables: Any, x: jax.Array, cotangent: jax.Array, training: bool) -> Any:
        """A step in which every device has its images; JAX sums the parameters' gradients itself."""

        def mapped(variables: Any, x: jax.Array, cotangent: jax.Array) -> Any:
            (_, (y, stats)), (gradients, dx) = linen_step(layer, variables, x, cotangent, training)
            return (y, dx), (stats, gradients)

        images, everywhere = PartitionSpec("batch"), PartitionSpec()
        sharded = jax.shard_map(
            mapped, mesh=self.mesh, in_specs=(everywhere, images, images), out_specs=(images, everywhere)
        )
        (y, dx), (stats, gradients) = jax.jit(sharded)(variables, x, cotangent)
        return (None, (y, stats)), (gradients, dx)


class FlaxNNX(NNXModule):
    """The project's NNX layers."""

    devices = 4
    takes_axis = True

    def __init__(self) -> None:
        super().__init__(
            "flax.nnx",
            self.make_rbn,
            NAMES["flax"],
            momentum="old",
            layers=LAYERS,
            fixed=NO_SWITCH,
            absent=ABSENT,
        )

    def make_rbn(self, config: Config, dtype: Any) -> Any:
        """RBN, IEBN or BNET."""
        return getattr(nnx_layers, config.layer)(
            config.num_features, axis=self.axis, **options(config, dtype), rngs=nnx.Rngs(0)
        )

    def load(self, state: State) -> None:
        """Fill the module as users do."""
        from_numpy(self.layer, state)

    def named(self, variables: Any) -> State:
        """Gradients as users would get them."""
        return to_numpy({"params": variables})

    def state(self) -> State:
        """The module's state as users get it."""
        return to_numpy(self.layer)

    def spread(self, shares: tuple[int, ...]) -> Subject:
        """The layers under `jit` with the batch on so many devices."""
        return FlaxNNXDevices(mesh(shares))


class FlaxNNXDevices(FlaxNNX):
    """The NNX layers under `jit` with a `NamedSharding` of the batch, which needs no `axis_name`."""

    def __init__(self, mesh: Mesh) -> None:
        super().__init__()
        self.sharding = NamedSharding(mesh, PartitionSpec("batch"))

    def placed(self, x: Array) -> jax.Array:
        """Every device has its images."""
        return jax.device_put(x, self.sharding)


def mesh(shares: tuple[int, ...]) -> Mesh:
    """Devices for so many shares, along the axis "batch"."""
    if len(set(shares)) > 1:
        raise NotImplementedError(ONE_SHAPE)
    if len(jax.devices()) < len(shares):
        raise RuntimeError(
            f"expected {len(shares)} devices, got {len(jax.devices())}. On a CPU, set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={len(shares)} before JAX is imported."
        )
    return Mesh(np.array(jax.devices()[: len(shares)]), ("batch",))


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
