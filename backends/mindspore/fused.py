"""RBN as one operator forward and one backward: custom operators on the compiled loops of `rbn.kernels`.

Of the image only X is kept for the backward pass, as in BatchNorm. In PyNative a `_Function` takes the
operators: it keeps what it is told to, where an operator with a gradient of its own keeps all its results, Y
included. A graph takes such operators, and knows by itself what is needed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common import _Function
from mindspore.ops.signature import make_sig, sig_dtype, sig_rw

from rbn import kernels
from rbn.backends.mindspore import functional
from rbn.kernels.library import PARAMETERS, RESTRICTIONS, STATISTICS, path
from rbn_core.config import SPATIAL_STATISTICS, Statistic
from rbn_core.errors import RBNError

AVAILABLE = not kernels.problem()
DTYPES = (ms.float32, ms.float64, ms.float16, ms.bfloat16)


def takes(x: Tensor, centering: Statistic | None, scaling: Statistic | None) -> bool:
    """Whether the fast form can compute this input; else it is for `functional.rbn`."""
    return _takes(x.shape, x.dtype, centering, scaling)


def rbn(
    x: Tensor,
    parameters: Mapping[str, Tensor],
    running: tuple[Tensor, Tensor] | None,
    *,
    eps: float,
    centering: Statistic | None,
    scaling: Statistic | None,
    restrict: str,
    channels_last: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """`functional.rbn` for what `takes` accepts, and with `channels_last` for (N, *spatial, C).

    Returns:
        Y, of the shape and dtype of x, and the E and biased Var it was normalized with, in at least float32
        and without a gradient; the running ones get none either.
    """
    dtype = functional.at_least_float32(x.dtype)
    absent = nothing(x.shape[-1 if channels_last else 1], dtype)
    vectors, present = [], []
    for value in (*functional.in_order(parameters), *((None, None) if running is None else running)):
        vectors.append(absent if value is None else value.astype(dtype))
        present.append(value is not None)
    options = (eps, centering, scaling, restrict, tuple(present), channels_last)
    if is_compiled(rbn):  # @jit.cond: True
        y, _, _, mean, var = Compiled(*options)(x, *vectors)
        return y, ops.stop_gradient(mean), ops.stop_gradient(var)
    return Eager.apply(options, x, *vectors)


def accumulate(
    running: tuple[Parameter, Parameter],
    count: Parameter,
    mean: Tensor,
    var: Tensor,
    momentum: float | None,
    values: int | None,
) -> None:
    """Eq. 3, in place: running <- running + (1 - m) (batch - running), and one more batch; no gradient.

    Args:
        running: E and Var, (C,) each.
        count: How many batches there were, of which `momentum=None` takes the average.
        mean: mu_B, (C,).
        var: sigma_B^2, (C,), biased.
        momentum: m.
        values: n, to take n / (n - 1) sigma_B^2; `None` takes sigma_B^2.
    """
    ACCUMULATE(running[0], running[1], count, mean, var, accumulation(momentum, values))


class Eager(_Function):
    """X and the vectors to Y, E and Var, in PyNative."""

    @staticmethod
    def forward(ctx: Any, options: tuple[Any, ...], x: Tensor, *vectors: Tensor) -> tuple[Tensor, ...]:
        """One pass to measure X, one to write Y."""
        numbers = plan(*options)
        y, mu, v, mean, var = FORWARD(x, *vectors, numbers)
        # E and Var as the operator copied them: the layer's own may have changed until the backward pass.
        ctx.save_for_backward(x, mu, v, *vectors[: len(PARAMETERS)], mean, var, numbers)
        ctx.mark_non_differentiable(mean, var)
        ctx.set_materialize_grads(False)
        return y, mean, var

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        """One pass to read dY and X, one to write dX.

        Raises:
            RBNError: It is to be differentiated in turn.
        """
        functional.refuse_second_gradients()
        return None, *BACKWARD(dy, *ctx.saved_tensors), None, None


class Compiled(nn.Cell):
    """X and the vectors to Y, mu, v, E and Var, in a graph: there operators are attributes of cells."""

    def __init__(self, *options: Any) -> None:
        super().__init__(auto_prefix=False)
        self.operator = FORWARD
        self.numbers = plan(*options)

    def construct(self, x: Tensor, *vectors: Tensor) -> tuple[Tensor, ...]:
        """One pass to measure X, one to write Y."""
        return self.operator(x, *vectors, self.numbers)


# The gradients of the operators, with every parameter by its name: MindSpore's parser counts them.


def _gradients_of_backward(
    dy: Tensor,
    x: Tensor,
    mu: Tensor,
    v: Tensor,
    gamma: Tensor,
    beta: Tensor,
    center_weight: Tensor,
    scale_weight: Tensor,
    scale_bias: Tensor,
    mean: Tensor,
    var: Tensor,
    numbers: Tensor,
    out: tuple[Tensor, ...],
    dout: tuple[Tensor, ...],
) -> tuple[Tensor, ...]:
    return refuse_second_gradients()


def _gradients_of_forward(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    center_weight: Tensor,
    scale_weight: Tensor,
    scale_bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    numbers: Tensor,
    out: tuple[Tensor, ...],
    dout: tuple[Tensor, ...],
) -> tuple[Tensor, ...]:
    _, mu, v, mean, var = out
    stored = (gamma, beta, center_weight, scale_weight, scale_bias)
    gradients = BACKWARD(dout[0], x, mu, v, *stored, mean, var, numbers)
    return (*gradients, ZEROS(running_mean), ZEROS(running_var), ZEROS(numbers))


def _operator(function: str, shapes: Any, dtypes: Any, bprop: Callable[..., Any] | None) -> ops.Custom:
    """A function of kernels/mindspore.cpp, and how its results' shapes and dtypes follow from the inputs'."""
    return ops.Custom(f"{path()}:{function}", shapes, dtypes, "aot", bprop)


ZEROS = ops.ZerosLike()

if AVAILABLE:
    BACKWARD = _operator(
        "rbn_mindspore_backward",
        lambda dy, x, mu, v, vector, *_: (x, *[vector] * len(PARAMETERS)),
        lambda dy, x, mu, v, vector, *_: (x, *[vector] * len(PARAMETERS)),
        _gradients_of_backward,
    )
    FORWARD = _operator(
        "rbn_mindspore_forward",
        lambda x, vector, *_: (x, (x[0], *vector), (x[0], *vector), vector, vector),
        lambda x, vector, *_: (x, *[vector] * 4),
        _gradients_of_forward,
    )
    ACCUMULATE = _operator("rbn_mindspore_accumulate", (1,), ms.int32, None)
    ACCUMULATE.add_prim_attr("side_effect_mem", True)
    ACCUMULATE.set_signatures(
        (
            make_sig("running_mean", sig_rw.RW_WRITE, dtype=sig_dtype.T),
            make_sig("running_var", sig_rw.RW_WRITE, dtype=sig_dtype.T1),
            make_sig("count", sig_rw.RW_WRITE, dtype=sig_dtype.T2),
            make_sig("mean", dtype=sig_dtype.T3),
            make_sig("var", dtype=sig_dtype.T4),
            make_sig("accumulation", dtype=sig_dtype.T5),
        )
    )


# ---- constants of a graph; in PyNative they are made once, too ----


@ops.constexpr(check=False)
def is_compiled(function: Any) -> bool:
    """Whether a graph is being compiled: a function is no constant there, and does not come."""
    return function is None


@ops.constexpr
def refuse_second_gradients() -> None:
    """Raise while a graph is compiled; `functional.refuse_second_gradients` does so in PyNative.

    Raises:
        RBNError: Always.
    """
    raise RBNError(
        "RBN: expected a first gradient of the fast form, got the gradient of a gradient. "
        "Build the layer with fused=False: a graph of MindSpore's own operations can be differentiated again."
    )


@ops.constexpr
def _takes(
    shape: tuple[int, ...], dtype: Any, centering: Statistic | None, scaling: Statistic | None
) -> bool:
    return (
        AVAILABLE
        and ms.get_context("device_target") == "CPU"
        and dtype in DTYPES
        and 0 not in shape
        and centering not in SPATIAL_STATISTICS
        and scaling not in SPATIAL_STATISTICS
    )


@ops.constexpr
def nothing(channels: int, dtype: Any) -> Tensor:
    """In the place of a vector that the layer lacks; not read."""
    return _zeros(channels, dtype)


@ops.constexpr
def plan(*options: Any) -> Tensor:
    """What a layer is, and MindSpore's number of threads, as the operators take it."""
    return _plan(ms.get_context("runtime_num_threads"), *options)


@ops.constexpr
def accumulation(momentum: float | None, values: int | None) -> Tensor:
    """What the statistics are weighted with, as the operator takes it; an average has the weight -1."""
    new_weight = -1.0 if momentum is None else 1 - momentum
    return _float64(new_weight, 1.0 if values is None else values / (values - 1))


@functools.lru_cache(maxsize=1024)
def _zeros(channels: int, dtype: Any) -> Tensor:
    return Tensor([0] * channels, dtype)


@functools.lru_cache(maxsize=1024)
def _plan(
    threads: int,
    eps: float,
    centering: Statistic | None,
    scaling: Statistic | None,
    restrict: str,
    present: tuple[bool, ...],
    channels_last: bool,
) -> Tensor:
    return _float64(
        channels_last,
        STATISTICS.index(centering),
        STATISTICS.index(scaling),
        RESTRICTIONS.index(restrict),
        threads,
        eps,
        *present,
    )


@functools.lru_cache(maxsize=1024)
def _float64(*numbers: float) -> Tensor:
    """As integers with the same bits, which mixed precision leaves alone."""
    return Tensor(np.array(numbers, np.float64).view(np.int64))
