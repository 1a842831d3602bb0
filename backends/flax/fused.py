"""RBN as one custom call forward and one backward: the compiled loops, where XLA computes on one CPU.

Of the image only X is kept for the backward pass, as in BatchNorm. Forward-mode derivatives,
gradients of gradients and `vmap` go through the plain form, and so does everything on other devices.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import Dtype
from jax import Array
from numpy.typing import NDArray

from rbn import kernels
from rbn.backends.flax import distributed, functional, internals
from rbn.kernels.library import DTYPES, LOOP_STATISTICS, RESTRICTIONS, VECTOR_PARAMETERS, VECTORS, address
from rbn_core.config import Config, check_shape
from rbn_core.errors import RBNTypeError
from rbn_core.names import NAMES
from rbn_core.options import Statistic

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


def check_layer(config: Config, given: Mapping[str, Any]) -> dict[str, Array]:
    """What a layer stores, as arrays of JAX, if it is what the layer must have.

    Args:
        config: The layer's options.
        given: The parameters and running statistics under canonical names.

    Raises:
        RBNTypeError: Something holds no real numbers.
        RBNValueError: Something is missing, or is of another shape than the layer's.
    """
    due = config.state_shapes()
    if given.get("num_batches_tracked") is None:  # which counts from here on, or not at all
        due.pop("num_batches_tracked")
    if config.kernel_size is not None:
        due["conv_weight"] = (*due["conv_weight"][2:], 1, config.num_features)
    arrays = {name: given.get(name) for name in due}
    for name, array in arrays.items():
        own = NAMES["flax"][name].partition("/")[2]
        if array is None or np.shape(array) != due[name]:
            check_shape(own, None if array is None else np.shape(array), due[name], config.layer)
        if not isinstance(array, Array):  # such as what `flax.serialization` reads
            arrays[name] = array = jnp.asarray(array)
        if not (jnp.issubdtype(array.dtype, jnp.floating) or jnp.issubdtype(array.dtype, jnp.integer)):
            raise RBNTypeError(
                f"{config.layer}: expected {own} of real numbers, got dtype {array.dtype}. Convert it first."
            )
    return arrays


def compute(
    x: Any,
    parameters: Mapping[str, Array],
    running: tuple[Array, Array] | None,
    config: Config,
    *,
    axis: int,
    dtype: Dtype | None,
    mask: Any,
    share: distributed.Share,
    in_loops: bool,
) -> tuple[Array, Array, Array]:
    """Y, E and Var in the fused form where it can be, and else in the plain one.

    Args:
        x: As in `functional.rbn`, and so are `parameters`, `running`, `axis`, `dtype` and `mask`.
        parameters: Those that the layer has.
        running: E and Var, or `None` for the batch's.
        config: The layer's options.
        axis: The channel axis.
        dtype: The output dtype that the layer was given.
        mask: Which values count.
        share: What part of the batch x is.
        in_loops: Whether the layer may take the fused form.
    """
    statistics: dict[str, Any] = {
        "centering": config.centering,
        "scaling": config.scaling,
        "restrict": config.restrict,
    }
    options = statistics | {"axis": axis, "eps": config.eps, "dtype": dtype}
    if in_loops and share.alone and mask is None and takes(x, parameters, axis=axis, **statistics):
        return rbn(x, parameters, running, **options)
    return functional.rbn(
        x, parameters, running, **options, mask=mask, average=share.average, whole=share.whole
    )


def takes(
    x: Any,
    parameters: Mapping[str, Array],
    *,
    axis: int,
    centering: Statistic | None,
    scaling: Statistic | None,
    restrict: str,
) -> bool:
    """Whether the fused form can compute this input; else it is for `functional.rbn`.

    It is for images with the channels last or behind the batch, of sizes that are known.
    """
    arrays = (x, *parameters.values())
    return (
        AVAILABLE
        and all(isinstance(size, int) for size in x.shape)  # in an export a size can be a symbol
        and x.dtype.name in DTYPES
        and x.size >= POSITIONS * x.shape[0] * x.shape[axis] > 0
        and axis % x.ndim in (1, x.ndim - 1)
        and centering in LOOP_STATISTICS
        and scaling in LOOP_STATISTICS
        and restrict in RESTRICTIONS
        and functional.widest(*arrays, jnp.float32) == computed_in(x)
        and not any(map(internals.says_where, arrays))
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
        x = x.astype(functional.widest(computed_in(x), dtype))
    given = dict(parameters)
    if running is not None:
        given |= dict(zip(RUNNING, running, strict=True))
    present = tuple(name for name in VECTORS if name in given)
    call = Call(axis % x.ndim, eps, centering, scaling, restrict, present)
    vectors = [given[name].astype(computed_in(x)) for name in present]
    y, _, _, mean, var = OPERATIONS.forward.bind(x, *vectors, call=call)
    return y, mean, var


class Call(NamedTuple):
    """What a layer computes, without its arrays: of the vectors it says which are `present`."""

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


# ---- Y, of which the other outputs are a part: only Y has a derivative ----


def _forward_in_loops(call: Call, x: Array, *vectors: Array) -> list[Array]:
    results = jax.ffi.ffi_call(TARGETS[0], _forward_shapes(call, x))(x, *vectors, plan=call.plan(x))
    return [*results[:3], *(results[3:] if call.batch_statistics else vectors[-2:])]


def _forward_in_operations(call: Call, x: Array, *vectors: Array) -> list[Array]:
    y, mean, var = call.plain(x, *vectors)
    mu, v, _ = functional.moments(x.astype(computed_in(x)), call.axis)
    return [y, mu, v, mean, var]


def _forward_shapes(call: Call, x: Any, *_: Any) -> list[Any]:
    image, planes, channels = call.shapes(x)
    return [image, planes, planes, channels, channels]


# ---- the gradients of X, the parameters, and E and Var where they are given ----


def _backward_in_loops(call: Call, dy: Array, x: Array, mu: Array, v: Array, *vectors: Array) -> list[Array]:
    image, _, channels = call.shapes(x)
    backward = jax.ffi.ffi_call(TARGETS[1], (image, *(channels,) * len(VECTOR_PARAMETERS)))
    dx, *written = backward(dy, x, mu, v, *vectors, plan=call.plan(x))
    gradients = [each for name, each in zip(VECTOR_PARAMETERS, written, strict=True) if name in call.present]
    if not call.batch_statistics:  # rarely wanted: XLA leaves them out then
        gradients += _backward_in_operations(call, dy, x, mu, v, *vectors)[-2:]
    return [dx, *gradients]


def _backward_in_operations(
    call: Call, dy: Array, x: Array, mu: Array, v: Array, *vectors: Array
) -> tuple[Array, ...]:
    _, pull = jax.vjp(lambda *inputs: call.plain(*inputs)[0], x, *vectors)
    return pull(dy)


def _backward_shapes(call: Call, dy: Any, x: Any, *_: Any) -> list[Any]:
    image, _, channels = call.shapes(x)
    return [image, *(channels,) * len(call.present)]


# ---- the derivative of Y along tangents of X and the vectors, whose transpose are the gradients ----


def _tangent_in_operations(call: Call, x: Array, mu: Array, v: Array, *others: Array) -> list[Array]:
    vectors, tangents = others[: len(call.present)], others[len(call.present) :]
    return [jax.jvp(lambda *inputs: call.plain(*inputs)[0], (x, *vectors), tangents)[1]]


def _tangent_shapes(call: Call, x: Any, *_: Any) -> list[Any]:
    return [call.shapes(x)[0]]


def _derivative_of_forward(call: Call, primals: Sequence[Any], tangents: Sequence[Any]) -> tuple[Any, Any]:
    x, *vectors = primals
    outputs = OPERATIONS.forward.bind(x, *vectors, call=call)
    _, *statistics = outputs
    (dy,) = OPERATIONS.tangent.bind(x, *statistics[:2], *vectors, *tangents, call=call)
    return outputs, [dy, *map(jnp.zeros_like, statistics)]


def _transpose_of_tangent(
    call: Call, cotangents: Sequence[Any], arrays: Sequence[Any], linear: Sequence[bool]
) -> list[Any]:
    known = 3 + len(call.present)
    gradients = OPERATIONS.backward.bind(cotangents[0], *arrays[:known], call=call)
    wanted = zip(gradients, linear[known:], strict=True)
    return [None] * known + [gradient if is_linear else None for gradient, is_linear in wanted]


class Operations(NamedTuple):
    """What programs show of a layer."""

    forward: internals.Operation
    backward: internals.Operation
    tangent: internals.Operation


def _operations() -> Operations:
    return Operations(
        internals.operation(
            "rbn_forward",
            _forward_in_operations,
            _forward_shapes,
            _forward_in_loops,
            derivative=_derivative_of_forward,
        ),
        internals.operation("rbn_backward", _backward_in_operations, _backward_shapes, _backward_in_loops),
        internals.operation(
            "rbn_tangent", _tangent_in_operations, _tangent_shapes, transposed=_transpose_of_tangent
        ),
    )


OPERATIONS = internals.built(_operations)

AVAILABLE = OPERATIONS is not None and _register()
"""Whether there are compiled loops, and what JAX makes operations of."""


def computed_in(x: Any) -> Any:
    """What statistics, parameters and their gradients are computed in: at least float32."""
    return functional.widest(x, jnp.float32)
