"""What JAX does not promise to keep, in one place: where a name is gone, the layers are slower, and right.

JAX's public ways to define an operation (`jax.custom_vjp` and `jax.ffi`, with `jax.lax.platform_dependent`)
cannot tell a program for one CPU from one for several devices or for export, and have no forward mode beside
the backward one. So the fused form is a `Primitive`, and where that cannot be made plain operations are left.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, cast

import jax
from jax.sharding import PartitionSpec

from rbn_core.errors import RBNWarning

NAMES = (
    "jax.core.ShapedArray",
    "jax.extend.core.Primitive",
    "jax.interpreters.ad.instantiate_zeros",
    "jax.interpreters.ad.is_undefined_primal",
    "jax.interpreters.ad.primitive_jvps",
    "jax.interpreters.ad.primitive_transposes",
    "jax.interpreters.batching.primitive_batchers",
    "jax.interpreters.mlir.lower_fun",
    "jax.interpreters.mlir.register_lowering",
)
"""What an operation of our own is made of."""

TAYLOR = "jax.experimental.jet"
"""Where Taylor mode is, with its rules for operations; a JAX without it has no Taylor mode at all."""

DEVICES = "module_context.axis_context.num_devices"
MAPPED = ("module_context.axis_context.mesh", "module_context.axis_context.axis_env.names")
EXPORTED = "module_context.lowering_parameters.for_export"
"""What a lowering rule is told of the program: its number of devices, or in `shard_map` and `pmap` the axes
that are mapped, and whether it is to be exported."""

MANUAL_AXES = ("mat", "vma")
SHARDING = "sharding.spec"
"""What an array's type says beside shape and dtype; the axes of `shard_map` since JAX 0.10 and before."""


class Operation(Protocol):
    """A `Primitive`, as far as it is used."""

    name: str

    def bind(self, *arrays: Any, call: Any) -> list[Any]:
        """The results."""


@functools.cache
def names() -> Mapping[str, Any]:
    """`NAMES` by their last part; empty, with one warning, where one is gone."""
    found = {}
    for name in NAMES:
        module, _, last = name.rpartition(".")
        try:
            found[last] = getattr(importlib.import_module(module), last)
        except (ImportError, AttributeError):
            warn_slower(name)
            return {}
    return found


@functools.cache
def warn_slower(name: str) -> None:
    """Say once that a name is gone and what that costs."""
    warnings.warn(
        f"RBN: expected JAX to have {name}, which version {jax.__version__} lacks. "
        "The layers give the same numbers in JAX's own operations and are slower. "
        "Install a version of JAX that `rbn info` names, or a newer rbn.",
        RBNWarning,
        stacklevel=2,
    )


def enable_x64(on: bool = True) -> AbstractContextManager[None]:
    """JAX with float64, or without, in a `with` block; `jax.experimental` had it before JAX 0.8."""
    if hasattr(jax, "enable_x64"):
        return cast(AbstractContextManager[None], jax.enable_x64(on))
    return cast(AbstractContextManager[None], importlib.import_module("jax.experimental").enable_x64(on))


def built(make: Callable[[], Any]) -> Any:
    """What `make` makes; `None`, with one warning, where JAX lacks what operations are made of."""
    if not names():
        return None
    try:
        return make()
    except (AttributeError, TypeError) as error:
        warn_slower(str(error))
        return None


def operation(
    name: str,
    in_operations: Callable[..., Sequence[Any]],
    shapes: Callable[..., Sequence[Any]],
    in_loops: Callable[..., Sequence[Any]] | None = None,
    derivative: Callable[..., tuple[Any, Any]] | None = None,
    transposed: Callable[..., Sequence[Any]] | None = None,
) -> Operation:
    """What becomes a custom call in a program for one CPU and JAX's operations in every other.

    On what a program runs is known only when it is compiled. XLA would gather a batch that is spread over
    devices, and an exported program must run where this package is not installed.

    Args:
        name: What programs show.
        in_operations: (call, *arrays) to the results, in JAX's operations.
        shapes: (call, *arrays) to the results' shapes and dtypes.
        in_loops: As `in_operations`, as a custom call; `None` where there is none.
        derivative: (call, arrays, tangents) to the results and theirs; by default that of `in_operations`.
        transposed: (call, cotangents, arrays, which of them are linear) to the gradients of those, where the
            operation is linear in some.
    """
    known = names()
    primitive = known["Primitive"](name)
    primitive.multiple_results = True

    @functools.partial(jax.jit, static_argnames="call")
    def compiled(*arrays: Any, call: Any) -> Sequence[Any]:
        # Flax itself does not work without this name, which JAX documents.
        if any(isinstance(array, jax.core.Tracer) for array in arrays):
            return primitive.bind(*arrays, call=call)
        return in_operations(call, *arrays)  # `jax_debug_nans` looks for the operation that made the NaN

    @primitive.def_impl
    def computed(*arrays: Any, call: Any) -> Sequence[Any]:
        with jax.disable_jit(False):  # without it one operation stays one operation, as JAX's own do
            return compiled(*arrays, call=call)

    @primitive.def_abstract_eval
    def shaped(*arrays: Any, call: Any) -> list[Any]:
        return [known["ShapedArray"](each.shape, each.dtype) for each in shapes(call, *arrays)]

    def on_cpu(context: Any, *arrays: Any, call: Any) -> Any:
        compute = in_loops if in_loops and is_for_one_device(context) else in_operations
        return known["lower_fun"](functools.partial(compute, call))(context, *arrays)

    def anywhere(*arrays: Any, call: Any) -> Sequence[Any]:
        return in_operations(call, *arrays)

    def batched(arrays: Sequence[Any], axes: Sequence[Any], *, call: Any) -> tuple[Any, Any]:
        results = jax.vmap(functools.partial(in_operations, call), axes)(*arrays)
        return results, (0,) * len(results)

    def along(primals: Sequence[Any], tangents: Sequence[Any], *, call: Any) -> tuple[Any, Any]:
        full = tuple(map(known["instantiate_zeros"], tangents))
        if derivative:
            return derivative(call, tuple(primals), full)
        return jax.jvp(functools.partial(in_operations, call), tuple(primals), full)

    def backwards(cotangents: Sequence[Any], *arrays: Any, call: Any) -> Sequence[Any]:
        assert transposed
        linear = tuple(map(known["is_undefined_primal"], arrays))
        return transposed(call, tuple(map(known["instantiate_zeros"], cotangents)), arrays, linear)

    def as_polynomial(primals: Sequence[Any], series: Sequence[Any], *, call: Any) -> tuple[Any, Any]:
        unscaled: Any = {"factorial_scaled": False}  # as the rules have it
        return taylor.jet(functools.partial(in_operations, call), tuple(primals), tuple(series), **unscaled)

    taylor = taylor_mode()
    if taylor:
        taylor.jet_rules[primitive] = as_polynomial
    known["register_lowering"](primitive, known["lower_fun"](anywhere))
    known["register_lowering"](primitive, on_cpu, platform="cpu")
    known["primitive_batchers"][primitive] = batched
    known["primitive_jvps"][primitive] = along
    if transposed:
        known["primitive_transposes"][primitive] = backwards
    return primitive


def taylor_mode() -> Any:
    """The module of Taylor mode; `None` where JAX has none, or none that takes rules."""
    try:
        module = importlib.import_module(TAYLOR)
    except ImportError:
        return None
    return module if hasattr(module, "jet") and hasattr(module, "jet_rules") else None


def is_for_one_device(context: Any) -> bool:
    """Whether a program is known to be for one device, and not for export."""
    devices, exported = _reach(context, DEVICES), _reach(context, EXPORTED)
    if exported is None:
        warn_slower(EXPORTED)
    if devices is None and not any(_reach(context, name) for name in MAPPED):
        warn_slower(DEVICES)
    return devices == 1 and exported is False


def says_where(array: Any) -> bool:
    """Whether the type of an array says more than its shape and dtype, or may do so.

    In `shard_map` and with explicit sharding it says what lies on which device, and JAX carries that only
    through its own operations.
    """
    kind = jax.typeof(array)
    manual = next((_reach(kind, name) for name in MANUAL_AXES if hasattr(kind, name)), None)
    spec = _reach(kind, SHARDING)
    if manual is None or spec is None:
        warn_slower("a type's " + (SHARDING if spec is None else MANUAL_AXES[0]))
        return True
    return bool(manual != type(manual)() or spec != PartitionSpec(*(None,) * kind.ndim))


def _reach(thing: Any, path: str) -> Any:
    """An attribute of an attribute; `None` where one is not there."""
    for name in path.split("."):
        thing = getattr(thing, name, None)
    return thing
