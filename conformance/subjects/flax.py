"""The Flax layers, linen and NNX, as subjects of the suite."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from rbn.backends import flax as linen_layers
from rbn.backends.flax import from_numpy, to_numpy
from rbn.backends.flax import nnx as nnx_layers
from rbn.backends.flax.internals import enable_x64
from rbn.backends.flax.nnx.layers import assign
from rbn.conformance.cases import LAYERS, PRECISIONS_OF, SPOILS, WAYS
from rbn.conformance.subject import Array, LayerSubject, Outcome, Subject
from rbn.conformance.subjects.jax_devices import AXIS, Step, compiled, shared
from rbn.conformance.subjects.numpy import spoilt
from rbn.conformance.suite import OPTION_SHAPE
from rbn_core.config import Config, arguments
from rbn_core.matching import State
from rbn_core.names import NAMES

NO_SWITCH = {"track_running_stats": True}
"""Flax's BatchNorm always keeps running statistics, and so do the layers."""

NO_STRIDES = "JAX's arrays have no strides"
ONE_SHAPE = "all devices of JAX have shares of one shape"
ABSENT = {
    "*/shares=3+1": ONE_SHAPE,
    "*/shares=4+0": ONE_SHAPE,
    "*/shares=2+0+1+1": ONE_SHAPE,
}
"""Which devices there are not in JAX."""

OTHER_CHANNELS = "on a CPU XLA convolves float64 with zeros for the other channels, and 0 times NaN is NaN"
EXPECTED = {"bnet/*/inf/*/float64*": OTHER_CHANNELS, "bnet/*/nan/*/float64*": OTHER_CHANNELS}
"""Where JAX is known to differ."""


class FlaxModule(LayerSubject):
    """Any linen module called with `use_running_average`; its inputs have the channels last.

    `make` gets the dtype of the parameters as a NumPy dtype. Names carry their collection: "params/scale".
    """

    takes_axis = False
    nowhere: Mapping[str, str] = {"*/strided": NO_STRIDES, "*/expanded": NO_STRIDES}

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
            (y, dx), gradients = self.step(image, upstream, training)
            y, dx, image = (np.moveaxis(np.asarray(value), self.axis, 1) for value in (y, dx, image))
            return Outcome(y, dx, self.named(gradients), self.state(), image)

    def step(self, x: jax.Array, cotangent: jax.Array, training: bool) -> Any:
        """(y, dx) and the parameters' gradients; the layer then stores what it should."""
        step = self.way_of(linen_step, x)
        images, gradients, self.variables = step(self.layer, self.variables, x, cotangent, training)
        return images, gradients

    def way_of(self, step: Step, x: jax.Array) -> Step:
        """How the step is run."""
        return compiled(step) if is_compiled(x) else step

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
        own = self.own(state, {name: np.asarray(variable[...]) for name, variable in flat.items()})
        for name, variable in flat.items():
            assign(variable, jnp.asarray(own[name]))
        nnx.update(self.layer, variables)

    def step(self, x: jax.Array, cotangent: jax.Array, training: bool) -> Any:
        """(y, dx) and the parameters' gradients; the layer then stores what it should."""
        step = self.way_of(nnx_step, x)
        images, gradients, stored = step(*nnx.split(self.layer), x, cotangent, training)
        nnx.update(self.layer, stored)
        return images, gradients

    def state(self) -> State:
        """The module's state."""
        return self.named(nnx.to_pure_dict(nnx.state(self.layer)))


class Family(FlaxModule):
    """What the project's linen and NNX layers have in common.

    Args:
        way: How several devices share their statistics, one of `cases.WAYS`; by default the `usual` one.
        world: How many devices there are.
        fused: Whether one custom call computes them, where it can.
        precision: The dtypes of the parameters and of the work, one of Flax's `cases.PRECISIONS`; by default
            those of the input, at least float32 for the parameters.
    """

    devices = 4
    ways = WAYS
    precisions = tuple(PRECISIONS_OF["flax"])
    # A CPU is one device, and nothing is written to, so that a compiled step knows no memory either.
    spoils = tuple(kind for kind in SPOILS if kind not in ("elsewhere", "shared_compiled"))
    takes_axis = True
    usual: str

    def __init__(self, way: str = "", world: int = 1, fused: bool = True, precision: str = "") -> None:
        super().__init__(
            self.name if fused else f"{self.name}.plain",
            self.make_rbn,
            NAMES["flax"],
            momentum="old",
            layers=LAYERS,
            fixed=NO_SWITCH,
            absent=ABSENT,
            expected_failures=EXPECTED,
        )
        self.way = way or self.usual
        self.world = world
        self.fused = fused
        self.precision = precision

    def make_rbn(self, config: Config, dtype: Any) -> Any:
        """RBN, IEBN or BNET."""
        raise NotImplementedError

    def options(self, config: Config, dtype: Any) -> dict[str, Any]:
        """The options of either kind; under `jit` a batch on several devices needs no name of an axis."""
        named = self.world > 1 and self.way != "jit"
        own = {
            "axis": self.axis,
            "axis_name": AXIS if named else None,
            "fused": self.fused,
            "param_dtype": jnp.promote_types(dtype, jnp.float32),
        }
        return arguments(type(self).name, config) | own | dtypes(self.precision)

    def through(self, way: str) -> Subject:
        """The layers that share their statistics in another way."""
        return type(self)(way, fused=self.fused)

    def under(self, precision: str) -> Subject:
        """The layers with other dtypes of the parameters and of the work."""
        return type(self)(fused=self.fused, precision=precision)

    def spread(self, shares: tuple[int, ...]) -> Subject:
        """The layers on so many devices."""
        if len(set(shares)) > 1:
            raise NotImplementedError(ONE_SHAPE)
        return type(self)(self.way, len(shares), self.fused)

    def way_of(self, step: Step, x: jax.Array) -> Step:
        """How the step is run; op by op the ways into mixed precision share what is compiled."""
        if self.precision:
            return step
        return super().way_of(step, x) if self.world == 1 else shared(step, self.way, self.world)


class Flax(Family):
    """The project's linen layers."""

    name = "flax"
    usual = "shard_map"

    def make_rbn(self, config: Config, dtype: Any) -> Any:
        """RBN, IEBN or BNET."""
        return getattr(linen_layers, config.layer)(**self.options(config, dtype))

    def load(self, state: State) -> None:
        """Make the variables as users do."""
        self.variables, _ = from_numpy(self.layer, state)

    def named(self, variables: Any) -> State:
        """Variables as users get them."""
        return to_numpy(variables)

    def spoil(self, name: str, kind: str) -> None:
        """Variables of NumPy, as `flax.serialization.from_bytes` returns them, of which one is changed."""
        flat = {name: np.array(value) for name, value in flatten_dict(self.variables, sep="/").items()}
        found = {canonical: flat[own] for canonical, own in NAMES["flax"].items() if own in flat}
        kept = spoilt(found, name, kind)
        self.variables = unflatten_dict({NAMES["flax"][name]: value for name, value in kept.items()}, sep="/")


class FlaxNNX(Family, NNXModule):
    """The project's NNX layers."""

    name = "flax.nnx"
    usual = "jit"

    def make_rbn(self, config: Config, dtype: Any) -> Any:
        """RBN, IEBN or BNET."""
        layer = getattr(nnx_layers, config.layer)
        return layer(config.num_features, **self.options(config, dtype), rngs=nnx.Rngs(0))

    def load(self, state: State) -> None:
        """Fill the module as users do."""
        from_numpy(self.layer, state)

    def named(self, variables: Any) -> State:
        """Gradients as users would get them."""
        return to_numpy({"params": variables})

    def state(self) -> State:
        """The module's state as users get it."""
        return to_numpy(self.layer)

    def spoil(self, name: str, kind: str) -> None:
        """Variables of NumPy, of which one is changed or taken away."""
        owners: dict[str, tuple[Any, str]] = {}
        for canonical, own in NAMES["flax"].items():
            _, *path, last = own.split("/")
            owner: Any = self.layer
            for part in path:
                owner = getattr(owner, part, None)
            if getattr(owner, last, None) is not None:
                owners[canonical] = owner, last
        found = {canonical: np.array(getattr(*place)[...]) for canonical, place in owners.items()}
        kept = spoilt(found, name, kind)
        for canonical, (owner, last) in owners.items():
            if canonical in kept:
                assign(getattr(owner, last), kept[canonical])
            else:
                setattr(owner, last, None)


def plain() -> Flax:
    """The project's linen layers in JAX's own operations."""
    return Flax(fused=False)


def differentiable(x: jax.Array) -> tuple[int, ...]:
    """The arguments of a loss to differentiate for: x too, unless it is for the layer to refuse."""
    return (0, 1) if jnp.issubdtype(x.dtype, jnp.floating) else (0,)


def linen_step(layer: Any, variables: Any, x: jax.Array, cotangent: jax.Array, training: bool) -> Any:
    """A `Step` of a linen module, which stores its variables; gradients of sum(y * cotangent)."""

    def loss(params: Any, x: jax.Array) -> Any:
        y, stats = layer.apply(
            variables | {"params": params},
            x,
            use_running_average=not training,
            mutable=["batch_stats"] if training else [],
        )
        return (y * cotangent).sum(), (y, stats)

    both = jax.value_and_grad(loss, differentiable(x), has_aux=True)
    (_, (y, stats)), (gradients, dx) = both(variables.get("params", {}), x)
    return (y, dx), {"params": gradients}, variables | stats


def nnx_step(graph: Any, stored: Any, x: jax.Array, cotangent: jax.Array, training: bool) -> Any:
    """A `Step` of an NNX module, which is split into its graph and its state."""
    layer = nnx.merge(graph, stored)

    def loss(layer: Any, x: jax.Array) -> Any:
        y = layer(x, use_running_average=not training)
        return (y * cotangent).sum(), y

    both = nnx.value_and_grad(loss, argnums=differentiable(x), has_aux=True)
    (_, y), (gradients, dx) = both(layer, x)
    return (y, dx), nnx.to_pure_dict(gradients), nnx.state(layer)


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


def dtypes(precision: str) -> dict[str, Any]:
    """The options that a way into mixed precision is, such as "param_float16_dtype_float32"."""
    words = precision.split("_")
    given = dict(zip(words[::2], words[1::2], strict=False))
    named = {"param": "param_dtype", "dtype": "dtype"}
    return {named[word]: jnp.dtype(dtype) for word, dtype in given.items() if word}


def needs_x64(x: Array) -> bool:
    """Whether JAX would turn x into something narrower: float64, and the int64 that a layer must refuse."""
    return x.dtype.itemsize >= 8


def laid_out(x: Array, axis: int) -> Array:
    """(N, C, *spatial) with the channels at `axis`; what has no spatial axes stays as it is."""
    return np.moveaxis(x, 1, axis) if x.ndim > 2 else x
