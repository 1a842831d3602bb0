"""RBN as one custom call forward and one backward: the compiled loops, where XLA computes on one CPU.

Of the image only X is kept for the backward pass, as in BatchNorm. Forward-mode derivatives,
gradients of gradients and `vmap` go through the plain form, and so does everything on other devices.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import Dtype
from jax import Array
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from numpy.typing import NDArray

from rbn import kernels
from rbn.backends.flax import functional
from rbn.kernels.library import DTYPES, PARAMETERS, VECTORS, address
from rbn_core.config import SPATIAL_STATISTICS, Statistic

TARGETS = ("rbn_xla_forward", "rbn_xla_backward")
"""The custom calls, under their names in kernels/xla.cpp."""

RUNNING = VECTORS[-2:]

POSITIONS = 4
"""The fewest values of a plane that make the loops worth it: with fewer, XLA is up to twice as fast."""


def _register() -> bool:
    try:
        addresses = [address(name) for name in TARGETS]
    except (OSError, AttributeError):  # not compiled, or by a version without custom calls
        return False
    for name, where in zip(TARGETS, addresses, strict=True):
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(ctypes.c_void_p(where)), platform="cpu")
    return True


AVAILABLE = _register()
"""Whether there are compiled loops."""


def takes(
    x: Any,
    parameters: Mapping[str, Array],
    *,
    axis: int,
    centering: Statistic | None,
    scaling: Statistic | None,
) -> bool:
    """Whether the fast form can compute this input; else it is for `functional.rbn`.

    It is for images with the channels last or behind the batch. Where types say what lies on which device,
    as in `shard_map` and with explicit sharding, JAX carries that only through its own operations.
    """
    arrays = (x, *parameters.values())
    return (
        AVAILABLE
        and jnp.result_type(x).name in DTYPES
        and x.size >= POSITIONS * x.shape[0] * x.shape[axis] > 0
        and axis % x.ndim in (1, x.ndim - 1)
        and centering not in SPATIAL_STATISTICS
        and scaling not in SPATIAL_STATISTICS
        and jnp.result_type(*arrays, jnp.float32) == computed_in(x)
        and not any(kind.vma or any(kind.sharding.spec) for kind in map(jax.typeof, arrays))
    )


def rbn(
    x: Any,
    parameters: Mapping[str, Array],
    running: tuple[Array, Array] | None,
    *,
    axis: int,
    eps: float,
    centering: Statistic | None,
    scaling: Statistic | None,
    restrict: str,
    dtype: Dtype | None,
) -> tuple[Array, Array, Array]:
    """`functional.rbn` for what `takes` accepts.

    Returns:
        Y, in the dtype of x or, where another output dtype was asked for, in what it is computed in, and the
        E and biased Var it was normalized with, in at least float32 and without a gradient.
    """
    x = jnp.asarray(x)
    if dtype is not None and dtype != x.dtype:
        x = x.astype(jnp.result_type(computed_in(x), dtype))
    given = dict(parameters)
    if running is not None:
        given |= dict(zip(RUNNING, running, strict=True))
    present = tuple(name for name in VECTORS if name in given)
    layer = Layer(axis % x.ndim, eps, centering, scaling, restrict, present)
    vectors = [given[name].astype(computed_in(x)) for name in present]
    y, _, _, mean, var = FORWARD.bind(x, *vectors, layer=layer)
    return y, mean, var


class Layer(NamedTuple):
    """What a layer is but for its arrays, the vectors, of which it says which are `present`."""

    axis: int
    eps: float
    centering: Statistic | None
    scaling: Statistic | None
    restrict: str
    present: tuple[str, ...]

    @property
    def batch_statistics(self) -> bool:
        """Whether E and Var are the batch's."""
        return RUNNING[0] not in self.present

    def plain(self, x: Array, *vectors: Array) -> tuple[Array, Array, Array]:
        """Y, E and Var in JAX's operations, Y in the dtype of x."""
        given = dict(zip(self.present, vectors, strict=True))
        running = None if self.batch_statistics else (given.pop(RUNNING[0]), given.pop(RUNNING[1]))
        y, mean, var = functional.rbn(
            x,
            given,
            running,
            axis=self.axis,
            eps=self.eps,
            centering=self.centering,
            scaling=self.scaling,
            restrict=self.restrict,
            dtype=None,
        )
        return y.astype(x.dtype), mean, var

    def shapes(self, x: Any) -> tuple[Any, Any, Any]:
        """Those of X, of (N, C) and of (C,) numbers."""
        images, channels = x.shape[0], x.shape[self.axis]
        image, wide = jax.ShapeDtypeStruct(x.shape, x.dtype), computed_in(x)
        return image, *(jax.ShapeDtypeStruct(shape, wide) for shape in ((images, channels), (channels,)))

    def plan(self, x: Any) -> NDArray[np.int64]:
        """As the custom calls take it."""
        images, channels = x.shape[0], x.shape[self.axis]
        plan = kernels.Plan(
            images,
            channels,
            x.size // (images * channels),
            x.dtype.name,
            self.axis == x.ndim - 1,
            self.centering,
            self.scaling,
            self.restrict,
            self.batch_statistics,
            1,  # for the call to change: a program may run on a machine with more
            self.eps,
        )
        bits = sum((name in self.present) << place for place, name in enumerate(VECTORS))
        return np.array([bits, *np.frombuffer(bytes(plan.structure), np.int64)])


def operation(
    name: str,
    in_operations: Callable[..., Sequence[Any]],
    shapes: Callable[..., Sequence[Any]],
    in_loops: Callable[..., Sequence[Any]] | None = None,
) -> Primitive:
    """What becomes a custom call in a program for one CPU and JAX's operations in every other.

    On what a program runs is known only when it is compiled. XLA would gather a batch that is spread over
    devices, and an exported program must run where this package is not installed.
    """
    primitive = Primitive(name)
    primitive.multiple_results = True
    primitive.def_impl(jax.jit(primitive.bind, static_argnames="layer"))

    @primitive.def_abstract_eval
    def shaped(*arrays: Any, layer: Layer) -> list[ShapedArray]:
        return [ShapedArray(each.shape, each.dtype) for each in shapes(layer, *arrays)]

    def on_cpu(context: mlir.LoweringRuleContext, *arrays: Any, layer: Layer) -> Any:
        program = context.module_context
        alone = getattr(program.axis_context, "num_devices", None) == 1
        exported = program.lowering_parameters.for_export
        compute = in_loops if in_loops and alone and not exported else in_operations
        return mlir.lower_fun(functools.partial(compute, layer))(context, *arrays)

    def batched(arrays: Sequence[Any], axes: Sequence[Any], *, layer: Layer) -> tuple[Any, Any]:
        results = jax.vmap(functools.partial(in_operations, layer), axes)(*arrays)
        return results, (0,) * len(results)

    def derivative(primals: Sequence[Any], tangents: Sequence[Any], *, layer: Layer) -> tuple[Any, Any]:
        compute = functools.partial(in_operations, layer)
        return jax.jvp(compute, tuple(primals), tuple(map(ad.instantiate_zeros, tangents)))

    mlir.register_lowering(primitive, mlir.lower_fun(lambda *arrays, layer: in_operations(layer, *arrays)))
    mlir.register_lowering(primitive, on_cpu, platform="cpu")
    batching.primitive_batchers[primitive] = batched
    ad.primitive_jvps[primitive] = derivative
    return primitive


# ---- Y, of which the other outputs are a part: only Y has a derivative ----


def _forward_in_loops(layer: Layer, x: Array, *vectors: Array) -> list[Array]:
    results = jax.ffi.ffi_call(TARGETS[0], _forward_shapes(layer, x))(x, *vectors, plan=layer.plan(x))
    return [*results[:3], *(results[3:] if layer.batch_statistics else vectors[-2:])]


def _forward_in_operations(layer: Layer, x: Array, *vectors: Array) -> list[Array]:
    y, mean, var = layer.plain(x, *vectors)
    return [y, *functional.moments(x.astype(computed_in(x)), layer.axis), mean, var]


def _forward_shapes(layer: Layer, x: Any, *_: Any) -> list[Any]:
    image, planes, channels = layer.shapes(x)
    return [image, planes, planes, channels, channels]


FORWARD = operation("rbn_forward", _forward_in_operations, _forward_shapes, _forward_in_loops)


# ---- the gradients of X, the parameters, and E and Var where they are given ----


def _backward_in_loops(
    layer: Layer, dy: Array, x: Array, mu: Array, v: Array, *vectors: Array
) -> list[Array]:
    image, _, channels = layer.shapes(x)
    call = jax.ffi.ffi_call(TARGETS[1], (image, *(channels,) * len(PARAMETERS)))
    dx, *written = call(dy, x, mu, v, *vectors, plan=layer.plan(x))
    gradients = [each for name, each in zip(PARAMETERS, written, strict=True) if name in layer.present]
    if not layer.batch_statistics:  # rarely wanted: XLA leaves them out then
        gradients += _backward_in_operations(layer, dy, x, mu, v, *vectors)[-2:]
    return [dx, *gradients]


def _backward_in_operations(
    layer: Layer, dy: Array, x: Array, mu: Array, v: Array, *vectors: Array
) -> tuple[Array, ...]:
    _, pull = jax.vjp(lambda *inputs: layer.plain(*inputs)[0], x, *vectors)
    return pull(dy)


def _backward_shapes(layer: Layer, dy: Any, x: Any, *_: Any) -> list[Any]:
    image, _, channels = layer.shapes(x)
    return [image, *(channels,) * len(layer.present)]


BACKWARD = operation("rbn_backward", _backward_in_operations, _backward_shapes, _backward_in_loops)


# ---- the derivative of Y along tangents of X and the vectors, whose transpose are the gradients ----


def _tangent_in_operations(layer: Layer, x: Array, mu: Array, v: Array, *others: Array) -> list[Array]:
    vectors, tangents = others[: len(layer.present)], others[len(layer.present) :]
    return [jax.jvp(lambda *inputs: layer.plain(*inputs)[0], (x, *vectors), tangents)[1]]


def _tangent_shapes(layer: Layer, x: Any, *_: Any) -> list[Any]:
    return [layer.shapes(x)[0]]


TANGENT = operation("rbn_tangent", _tangent_in_operations, _tangent_shapes)


def _derivative_of_forward(
    primals: Sequence[Any], tangents: Sequence[Any], *, layer: Layer
) -> tuple[Any, Any]:
    x, *vectors = primals
    outputs = FORWARD.bind(x, *vectors, layer=layer)
    _, mu, v, mean, var = outputs
    (dy,) = TANGENT.bind(x, mu, v, *vectors, *map(ad.instantiate_zeros, tangents), layer=layer)
    return outputs, [dy, *map(ad.Zero.from_primal_value, (mu, v, mean, var))]


def _transpose_of_tangent(cotangents: Sequence[Any], *arguments: Any, layer: Layer) -> list[Any]:
    known, linear = arguments[: 3 + len(layer.present)], arguments[3 + len(layer.present) :]
    gradients = BACKWARD.bind(ad.instantiate_zeros(cotangents[0]), *known, layer=layer)
    wanted = zip(gradients, linear, strict=True)
    return [
        *(None for _ in known),
        *(gradient if ad.is_undefined_primal(tangent) else None for gradient, tangent in wanted),
    ]


ad.primitive_jvps[FORWARD] = _derivative_of_forward
ad.primitive_transposes[TANGENT] = _transpose_of_tangent


def computed_in(x: Any) -> Any:
    """What statistics, parameters and their gradients are computed in: at least float32."""
    return jnp.promote_types(jnp.result_type(x), jnp.float32)
