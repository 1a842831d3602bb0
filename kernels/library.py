"""Calls into the compiled loops, on addresses: whoever has memory, of any framework, can use them.

The library is compiled when the package is installed and there is a C++ compiler; where it is not there, the
layers compute in their framework's operations, and `problem()` says why.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rbn_core.config import Statistic

DTYPES = ("float32", "float64", "float16", "bfloat16")
STATISTICS = (None, "channel_mean", "channel_std", "input_mean")
RESTRICTIONS = ("sigmoid", "hard_sigmoid")
INSTRUCTIONS = ("the compiler's default", "AVX2", "AVX-512")
PARAMETERS = ("gamma", "beta", "center_weight", "scale_weight", "scale_bias")
VECTORS = (*PARAMETERS, "running_mean", "running_var")
"""The (C,) inputs of a layer, in the order of `rbn_parameters`; the last two where E and Var are known."""


class _Layer(ctypes.Structure):
    """`rbn_layer` of rbn_kernels.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("images", "channels", "positions")),
        *((name, ctypes.c_int32) for name in ("dtype", "channels_last", "centering", "scaling")),
        *((name, ctypes.c_int32) for name in ("restriction", "batch_statistics", "threads")),
        ("eps", ctypes.c_double),
    )


class _Parameters(ctypes.Structure):
    """`rbn_parameters` of rbn_kernels.h."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in VECTORS)


class _Gradients(ctypes.Structure):
    """`rbn_gradients` of rbn_kernels.h."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in PARAMETERS)


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
            STATISTICS.index(self.centering),
            STATISTICS.index(self.scaling),
            RESTRICTIONS.index(self.restrict),
            self.batch_statistics,
            self.threads,
            self.eps,
        )


def forward(
    plan: Plan,
    vectors: Sequence[int | None],
    x: int,
    y: int,
    mu: int | None,
    v: int | None,
    mean: int | None,
    var: int | None,
) -> None:
    """Y of eq. 12, on addresses.

    Args:
        plan: The layer.
        vectors: `VECTORS`, (C,) each, as far as the layer has them; the last two are not read with batch
            statistics.
        x: The input; read.
        y: Of the same kind; written.
        mu: (N, C), the mean of every plane; written, for `backward`, or `None` where there will be none.
        v: (N, C), its biased variance, or 0 where nothing depends on it; as `mu`.
        mean: (C,), E of the batch; written with batch statistics.
        var: (C,), biased Var of the batch; written with batch statistics.

    Raises:
        MemoryError: There is no memory for (N, C) numbers.
    """
    if _library().rbn_forward(plan.structure, _Parameters(*vectors), x, y, mu, v, mean, var):
        raise MemoryError


def backward(
    plan: Plan,
    vectors: Sequence[int | None],
    dy: int,
    x: int,
    mu: int,
    v: int,
    dx: int | None,
    gradients: Sequence[int | None],
) -> None:
    """The gradients of X and of the parameters, on addresses.

    Args:
        plan: As in `forward`.
        vectors: As in `forward`.
        dy: The gradient of Y, laid out as X; read.
        x: The input; read.
        mu: As `forward` wrote it; read.
        v: As `forward` wrote it; read.
        dx: The gradient of X; written, unless `None`.
        gradients: Of `PARAMETERS`, (C,) each; written, those that are there.

    Raises:
        MemoryError: There is no memory for (N, C) numbers.
    """
    if _library().rbn_backward(
        plan.structure, _Parameters(*vectors), dy, x, mu, v, dx, _Gradients(*gradients)
    ):
        raise MemoryError


def accumulate(
    channels: int,
    dtype: str,
    batch_dtype: str,
    running: int,
    batch: int,
    new_weight: float,
    correction: float = 1.0,
) -> None:
    """Eq. 3, in place: running <- running + new_weight (correction batch - running), on addresses.

    Args:
        channels: C.
        dtype: Of the running statistic, float32 or float64.
        batch_dtype: Of the batch's, the same choice.
        running: (C,); changed.
        batch: (C,); read.
        new_weight: 1 - m, the weight of the batch.
        correction: What the batch's is multiplied with before.
    """
    wide, wide_batch = (name == "float64" for name in (dtype, batch_dtype))
    _library().rbn_accumulate(channels, wide, wide_batch, running, batch, new_weight, correction)


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
    folder = Path(__file__).parent
    # The last names are those of installations from before the library went without Python's.
    names = [f"rbn_kernels{suffix}" for suffix in (".so", *importlib.machinery.EXTENSION_SUFFIXES)]
    found = next((folder / name for name in names if (folder / name).exists()), None)
    if found is None:
        raise OSError("the loops were not compiled: install g++ and install rbn again")
    library = ctypes.CDLL(str(found))
    integer, number, address = ctypes.c_int64, ctypes.c_double, ctypes.c_void_p
    layer, vectors, gradients = map(ctypes.POINTER, (_Layer, _Parameters, _Gradients))
    library.rbn_forward.argtypes = (layer, vectors, *(address,) * 6)
    library.rbn_backward.argtypes = (layer, vectors, *(address,) * 5, gradients)
    library.rbn_accumulate.argtypes = (integer, ctypes.c_int, ctypes.c_int, address, address, number, number)
    library.rbn_accumulate.restype = None
    library.rbn_worthwhile_threads.argtypes = (integer, integer, integer, ctypes.c_int32)
    library.rbn_limit_cache.argtypes, library.rbn_limit_cache.restype = (integer,), integer
    return library
