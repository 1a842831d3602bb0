"""Calls into the compiled loops, on memory: whoever has some, of any framework, can use them.

The library is compiled when the package is installed and there is a C++ compiler; where it is not there, the
layers compute in their framework's operations, and `problem()` says why.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TypeAlias

from rbn_core.errors import RBNValueError
from rbn_core.options import Statistic

INTERFACE = 2
"""`RBN_INTERFACE` of rbn_kernels.h: a library from before a change of it must not be called."""

DTYPES = ("float32", "float64", "float16", "bfloat16")
LOOP_STATISTICS = (None, "channel_mean", "channel_std", "input_mean")
RESTRICTIONS = ("sigmoid", "hard_sigmoid")
INSTRUCTIONS = ("the compiler's default", "AVX2", "AVX-512")
VECTOR_PARAMETERS = ("gamma", "beta", "center_weight", "scale_weight", "scale_bias")
VECTORS = (*VECTOR_PARAMETERS, "running_mean", "running_var")
"""The (C,) inputs of a layer, in the order of `rbn_parameters`; the last two where E and Var are known."""

FORWARD = ("x", "y", "mu", "v", "mean", "var", *VECTORS)
"""The arrays of a forward pass, in the order of `rbn_forward_arrays`."""

BACKWARD = ("dy", "x", "mu", "v", "dx", *VECTORS, *(f"the gradient of {name}" for name in VECTOR_PARAMETERS))
"""The arrays of a backward pass, in the order of `rbn_backward_arrays`."""

ACCUMULATE = ("running_mean", "running_var", "mean", "var")
"""The arrays of an update of the running statistics, in the order of `rbn_statistics`."""

Array: TypeAlias = tuple[int, int, int]
"""`rbn_array`: where numbers lie without gaps, how many there are, and their dtype's place in `DTYPES`."""

NOTHING: Array = (0, 0, 0)
"""In the place of an array that is not there or not wanted."""

_DONE, _NO_MEMORY, _ = range(3)
"""`rbn_result`."""


class _Layer(ctypes.Structure):
    """`rbn_layer` of rbn_kernels.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("images", "channels", "positions")),
        *((name, ctypes.c_int32) for name in ("dtype", "channels_last", "centering", "scaling")),
        *((name, ctypes.c_int32) for name in ("restriction", "batch_statistics", "threads")),
        ("eps", ctypes.c_double),
    )


@dataclass(frozen=True)
class Plan:
    """What a layer is and on what it runs.

    Args:
        images: N.
        channels: C.
        positions: M, the values of a plane.
        dtype: Of X, Y and their gradients, one of `DTYPES`; all else is float32, or float64 beside float64.
        channels_last: Whether X lies as (N, M, C) and not as (N, C, M); without gaps in either.
        centering: K_m of eq. 5.
        scaling: K_s of eq. 9.
        restrict: R of eq. 9.
        batch_statistics: Whether E and Var are the batch's.
        threads: How many threads take part.
        eps: epsilon of eq. 1.
    """

    images: int
    channels: int
    positions: int
    dtype: str
    channels_last: bool
    centering: Statistic | None
    scaling: Statistic | None
    restrict: str
    batch_statistics: bool
    threads: int
    eps: float

    @functools.cached_property
    def structure(self) -> _Layer:
        """As the library takes it."""
        return _Layer(
            self.images,
            self.channels,
            self.positions,
            DTYPES.index(self.dtype),
            self.channels_last,
            LOOP_STATISTICS.index(self.centering),
            LOOP_STATISTICS.index(self.scaling),
            RESTRICTIONS.index(self.restrict),
            self.batch_statistics,
            self.threads,
            self.eps,
        )


def forward(plan: Plan, arrays: Iterable[Array]) -> None:
    """Y of eq. 12.

    Args:
        plan: The layer.
        arrays: `FORWARD`: X, (N, C, M), is read, and Y, of the same kind, written. mu and v, (N, C), get the
            mean and biased variance of every plane (or 0 where nothing depends on it) for `backward`, and are
            `NOTHING` where there will be none. mean and var, (C,), get E and biased Var of the batch with
            batch statistics. The vectors, (C,), are read, as far as the layer has them; the running ones are
            not with batch statistics.

    Raises:
        RBNValueError: An array does not fit the layer; nothing was read or written.
        MemoryError: There is no memory for (N, C) numbers.
    """
    _check(_library().rbn_forward(plan.structure, _FORWARD(*chain.from_iterable(arrays))))


def backward(plan: Plan, arrays: Iterable[Array]) -> None:
    """The gradients of X and of the parameters.

    Args:
        plan: As in `forward`.
        arrays: `BACKWARD`: the gradient of Y, laid out as X, X, mu and v as `forward` wrote them, and the
            vectors are read; the gradients of X and of the parameters written, where they are wanted.

    Raises:
        RBNValueError: An array does not fit the layer; nothing was read or written.
        MemoryError: There is no memory for (N, C) numbers.
    """
    _check(_library().rbn_backward(plan.structure, _BACKWARD(*chain.from_iterable(arrays))))


def accumulate(arrays: Iterable[Array], new_weight: float, correction: float) -> None:
    """Eq. 3, in place: running <- running + new_weight (batch - running).

    Args:
        arrays: `ACCUMULATE`, (C,) each, float32 or float64; the first two are changed.
        new_weight: 1 - m, the weight of the batch.
        correction: What Var of the batch is multiplied with before.

    Raises:
        RBNValueError: The arrays do not fit each other; nothing was read or written.
    """
    statistics = _ACCUMULATE(*chain.from_iterable(arrays))
    _check(_library().rbn_accumulate(statistics, new_weight, correction))


def _check(result: int) -> None:
    if result == _DONE:
        return
    if result == _NO_MEMORY:
        raise MemoryError
    raise RBNValueError(
        f"the compiled loops: {_library().rbn_refusal().decode()}. Hand over the arrays of one layer."
    )


_FORWARD, _BACKWARD, _ACCUMULATE = (
    struct.Struct(f"{3 * len(names)}q").pack for names in (FORWARD, BACKWARD, ACCUMULATE)
)


def worthwhile_threads(images: int, channels: int, positions: int, most: int) -> int:
    """How many of so many threads are worth waking for a batch."""
    return int(_library().rbn_worthwhile_threads(images, channels, positions, most))


def problem() -> str:
    """Why the loops cannot be used here; empty where they can."""
    try:
        _library()
    except OSError as error:
        return str(error)
    return ""


def address(function: str) -> int:
    """Where a function of rbn_kernels.h lies, for compiled code that calls it."""
    return int(ctypes.cast(getattr(_library(), function), ctypes.c_void_p).value or 0)


def path() -> str:
    """Where the compiled library is, for a framework that opens it by itself."""
    return _library()._name


def instructions() -> str:
    """The instruction set that the loops use on this processor."""
    return INSTRUCTIONS[_library().rbn_instructions()]


def limit_instructions(level: int) -> int:
    """Use at most one of `INSTRUCTIONS`, by its number; returns the one in use. For tests."""
    return int(_library().rbn_limit_instructions(level))


def limit_cache(size: int) -> int:
    """Take the last cache to have at most so many bytes; returns how many. For tests."""
    return int(_library().rbn_limit_cache(size))


@functools.cache
def _library() -> ctypes.CDLL:
    found = Path(__file__).with_name("rbn_kernels.so")
    if not found.exists():
        raise OSError("the loops were not compiled: install g++ and install rbn again")
    library = ctypes.CDLL(str(found))
    if not hasattr(library, "rbn_interface") or library.rbn_interface() != INTERFACE:
        raise OSError(f"{found.name} was compiled for another version: install rbn again")
    integer, number, layer, arrays = ctypes.c_int64, ctypes.c_double, ctypes.POINTER(_Layer), ctypes.c_char_p
    library.rbn_forward.argtypes = library.rbn_backward.argtypes = (layer, arrays)
    library.rbn_accumulate.argtypes = (arrays, number, number)
    library.rbn_refusal.restype = ctypes.c_char_p
    library.rbn_worthwhile_threads.argtypes = (integer, integer, integer, ctypes.c_int32)
    library.rbn_limit_cache.argtypes, library.rbn_limit_cache.restype = (integer,), integer
    return library
