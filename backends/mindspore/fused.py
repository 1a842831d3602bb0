"""RBN as one operator forward and one backward: custom operators on the compiled loops of `rbn.kernels`.

Of the image only X is kept for the backward pass, as in BatchNorm. In PyNative a function with a gradient
takes the operators: it keeps what it is told to, where an operator with a gradient of its own keeps all its
results, Y included. A graph takes such operators, and knows by itself what is needed.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from rbn import kernels
from rbn.backends.mindspore import functional, internals
from rbn.kernels.library import LOOP_STATISTICS, RESTRICTIONS, VECTOR_PARAMETERS, path
from rbn_core.config import Config, check_counter, check_shape, check_vectors, config_of
from rbn_core.errors import RBNError, RBNTypeError, RBNValueError
from rbn_core.options import MOMENT_STATISTICS, Statistic

AVAILABLE = not kernels.problem()
DTYPES = (ms.float32, ms.float64, ms.float16, ms.bfloat16)
KEPT = (ms.float32, ms.float64)
"""What statistics are accumulated in."""
STATED = ("moving_mean", "moving_variance")
CONVOLUTION = ("weight", "bias")
NUMBERED: weakref.WeakValueDictionary[int, nn.Cell] = weakref.WeakValueDictionary()


class Number:
    """As an attribute, a number by which a layer is found: a graph hands no cell to Python, but numbers.

    Not stored in the layer, whose copies would have it, too.
    """

    def __get__(self, layer: nn.Cell | None, owner: type) -> int:
        """The layer's number, by which it is in `NUMBERED` as long as it lives; 0 of a class."""
        if layer is None:
            return 0
        NUMBERED[id(layer)] = layer
        return id(layer)


def check_layer(number: int, accumulates: bool) -> None:
    """Refuse a layer that was changed into none, in either form: nothing is computed or accumulated then.

    Statistics are not accumulated in the memory of a parameter, which is still read afterwards. That is
    looked at while a graph is compiled, and in PyNative mode when a layer is trained for the first time or
    has other parameters than before: MindSpore tells an address when everything before is computed.

    Args:
        number: The layer's `Number`.
        accumulates: Whether statistics are about to be accumulated.

    Raises:
        RBNError: An option is unknown, something stored is missing or has a wrong shape or dtype, or a
            statistic lies in the memory of a parameter or of the other statistic.
    """
    _check_layer(number, accumulates, is_compiled(check_layer))


def takes(x: Tensor, centering: Statistic | None, scaling: Statistic | None, restrict: str) -> bool:
    """Whether the fused form can compute this input; else it is for `functional.rbn`.

    What is not known to be right is not taken.
    """
    return _takes(x.shape, x.dtype, centering, scaling, restrict)


def counts(count: Parameter | None) -> bool:
    """Whether `accumulate` can count in this; else it is for `functional.accumulate`."""
    return ACCUMULATE is not None and count is not None and count.dtype == ms.int32


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
        vectors.append(absent if value is None else functional.cast(value, dtype))
        present.append(value is not None)
    options = (eps, centering, scaling, restrict, tuple(present), channels_last)
    if is_compiled(rbn):  # @jit.cond: True
        return with_an_operators_gradient(options, x, *vectors)
    return in_pynative(options, x, *vectors)


def with_an_operators_gradient(
    options: tuple[Any, ...], x: Tensor, *vectors: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Y, E and Var; in PyNative with all results kept."""
    y, _, _, mean, var = Compiled(*options)(x, *vectors)
    return y, ops.stop_gradient(mean), ops.stop_gradient(var)


def in_pynative(options: tuple[Any, ...], x: Tensor, *vectors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Y, E and Var, with X alone kept where MindSpore can do that."""
    # Without the mark, a cast network has all that an operator gets in float32, and nothing else.
    taken = x if internals.AS_GIVEN is not None else functional.cast(x, vectors[0].dtype)
    apply = with_an_operators_gradient if internals.Function is None else Eager.apply
    y, mean, var = apply(options, taken, *vectors)
    return functional.cast(y, x.dtype), mean, var


def accumulate(
    running: tuple[Parameter, Parameter],
    mean: Tensor,
    var: Tensor,
    new_weight: float | None,
    *,
    count: Parameter,
    values: int | None = None,
) -> None:
    """`functional.accumulate` in one operator, which counts the batch, too.

    `count` is what differs: the parameter of int32 with the number of batches without this one. It is one
    more afterwards, and that is the number whose inverse `new_weight=None` takes.
    """
    ACCUMULATE(running[0], running[1], count, mean, var, accumulation(new_weight, values))


class Eager(internals.Function or object):  # type: ignore[misc]
    """X and the vectors to Y, E and Var, in PyNative."""

    @staticmethod
    def forward(ctx: Any, options: tuple[Any, ...], x: Tensor, *vectors: Tensor) -> tuple[Tensor, ...]:
        """One pass to measure X, one to write Y."""
        numbers = plan(*options)
        y, mu, v, mean, var = FORWARD(x, *vectors, numbers)
        # E and Var as the operator copied them: the layer's own may have changed until the backward pass.
        ctx.save_for_backward(x, mu, v, *vectors[: len(VECTOR_PARAMETERS)], mean, var, numbers)
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
        return None, *backward(PYNATIVE_BACKWARD, dy, *ctx.saved_tensors), None, None


class Compiled(nn.Cell):
    """X and the vectors to Y, mu, v, E and Var, in a graph: there operators are attributes of cells."""

    def __init__(self, *options: Any) -> None:
        super().__init__(auto_prefix=False)
        self.operator = FORWARD
        self.numbers = plan(*options)

    def construct(self, x: Tensor, *vectors: Tensor) -> tuple[Tensor, ...]:
        """One pass to measure X, one to write Y."""
        return self.operator(x, *vectors, self.numbers)


class AsGiven(nn.Cell):
    """An operator that gets its inputs as they are, wherever in a cast network a gradient is taken."""

    def __init__(self, operator: ops.Custom) -> None:
        super().__init__(auto_prefix=False)
        self.operator = operator
        if internals.AS_GIVEN is not None:
            self.mixed_precision_type = internals.AS_GIVEN

    def construct(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The operator's results."""
        return self.operator(*inputs)


def backward(operator: Any, dy: Tensor, x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
    """The gradients of X and the parameters.

    Where what comes behind the layer gives dY in another dtype than Y, both are taken to what statistics are
    in, so that no value is rounded before the results are.
    """
    if dy.dtype == x.dtype:
        return operator(dy, x, *rest)
    dtype = functional.at_least_float32(x.dtype)
    dx, *gradients = operator(functional.cast(dy, dtype), functional.cast(x, dtype), *rest)
    return functional.cast(dx, x.dtype), *gradients


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
    gradients = backward(BACKWARD, dout[0], x, mu, v, *stored, mean, var, numbers)
    return (*gradients, ZEROS(running_mean), ZEROS(running_var), ZEROS(numbers))


def _operator(function: str, shapes: Any, dtypes: Any, bprop: Callable[..., Any] | None) -> ops.Custom:
    """A function of kernels/mindspore.cpp, and how its results' shapes and dtypes follow from the inputs'."""
    return ops.Custom(f"{path()}:{function}", shapes, dtypes, "aot", bprop)


def _accumulate() -> ops.Custom | None:
    """The operator that changes three inputs in place; `None` where MindSpore has no word for that."""
    if not AVAILABLE or internals.signatures is None:
        return None
    operator = _operator("rbn_mindspore_accumulate", (1,), ms.int32, None)
    operator.add_prim_attr("side_effect_mem", True)
    sign, written, dtypes = (
        internals.signatures.make_sig,
        internals.signatures.sig_rw,
        internals.signatures.sig_dtype,
    )
    operator.set_signatures(
        (
            sign("running_mean", written.RW_WRITE, dtype=dtypes.T),
            sign("running_var", written.RW_WRITE, dtype=dtypes.T1),
            sign("count", written.RW_WRITE, dtype=dtypes.T2),
            sign("mean", dtype=dtypes.T3),
            sign("var", dtype=dtypes.T4),
            sign("accumulation", dtype=dtypes.T5),
        )
    )
    return operator


ZEROS = ops.ZerosLike()
ACCUMULATE: Any = _accumulate()

if AVAILABLE:
    BACKWARD = _operator(
        "rbn_mindspore_backward",
        lambda dy, x, mu, v, vector, *_: (x, *[vector] * len(VECTOR_PARAMETERS)),
        lambda dy, x, mu, v, vector, *_: (x, *[vector] * len(VECTOR_PARAMETERS)),
        _gradients_of_backward,
    )
    FORWARD = _operator(
        "rbn_mindspore_forward",
        lambda x, vector, *_: (x, (x[0], *vector), (x[0], *vector), vector, vector),
        lambda x, vector, *_: (x, *[vector] * 4),
        _gradients_of_forward,
    )
    PYNATIVE_BACKWARD = AsGiven(BACKWARD)


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
        "RBN: expected a first gradient of the fused form, got the gradient of a gradient. "
        "Build the layer with fused=False: a graph of MindSpore's own operations can be differentiated "
        "again. If you asked for a first gradient after an error inside of another, run this again: until a "
        "graph fails MindSpore goes on as if inside of that one."
    )


@ops.constexpr
def _takes(
    shape: tuple[int, ...], dtype: Any, centering: Statistic | None, scaling: Statistic | None, restrict: str
) -> bool:
    return (
        AVAILABLE
        and not internals.is_for_plain_operations()
        and ms.get_context("device_target") == "CPU"
        and dtype in DTYPES
        and 0 not in shape
        and None not in shape  # MindSpore cannot tell its own operators' results then
        and centering in (None, *MOMENT_STATISTICS)
        and scaling in LOOP_STATISTICS
        and restrict in RESTRICTIONS
    )


@ops.constexpr(reuse_result=False)
def _check_layer(number: int, accumulates: bool, compiled: bool) -> None:
    layer = NUMBERED[number]
    config = config_of("mindspore", layer)
    stored = {name: getattr(layer, name, None) for name in (*config.parameters, *STATED)}
    due: tuple[int, ...] | None = None
    if config.layer == "BNET":
        stored |= {f"conv.{name}": getattr(layer.conv, name, None) for name in CONVOLUTION}
        added = (1,) if config.spatial_dims == 1 else ()  # MindSpore's Conv1d has an axis more
        due = (config.num_features, 1, *added, *(layer.kernel_size,) * config.spatial_dims)
    facts = {name: None if value is None else (value.shape, value.dtype) for name, value in stored.items()}
    _check_stored(config, tuple(facts.items()), due, accumulates)
    if not accumulates:
        return
    count = getattr(layer, "num_batches_tracked", None)
    check_counter(count, config.momentum, config.layer)
    if count is not None:
        check_shape("num_batches_tracked", count.shape, (), config.layer)
    known = tuple(map(id, stored.values()))
    if compiled or vars(layer).get("_apart") != known:  # a Parameter can have got other memory
        _check_memory(config.layer, stored)
        vars(layer)["_apart"] = known


def _check_memory(layer: str, stored: Mapping[str, Parameter]) -> None:
    places = {name: value.data_ptr() for name, value in stored.items()}
    for name in STATED:
        for other, place in places.items():
            if other != name and place == places[name] != 0:  # before its first value is read, a place is 0
                raise RBNValueError(
                    f"{layer}: expected {name} in memory of its own, got that of {other}. "
                    f"Assign a copy to one of them."
                )


@functools.lru_cache(maxsize=1024)
def _check_stored(
    config: Config,
    facts: tuple[tuple[str, tuple[tuple[int, ...], Any] | None], ...],
    due: tuple[int, ...] | None,
    accumulates: bool,
) -> None:
    for name, found in facts:
        shape, dtype = found or (None, None)
        if name == "conv.weight" and due is not None:
            check_shape(name, shape, due, config.layer)
        else:
            check_vectors({name: shape}, config.num_features, config.layer)
        if dtype not in DTYPES:  # gradients of integers would be rounded
            raise RBNTypeError(
                f"{config.layer}: expected {name} of floating-point numbers, got {dtype}. "
                "Assign one of float32."
            )
        if accumulates and name in STATED and dtype not in KEPT:
            raise RBNTypeError(
                f"{config.layer}: expected {name} in at least float32 to accumulate it, got {dtype}. "
                f"Call {name}.set_dtype(mindspore.float32), or switch the layer to evaluation."
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
def accumulation(new_weight: float | None, values: int | None) -> Tensor:
    """What the statistics are weighted with, as the operator takes it; an average has the weight -1."""
    correction = 1.0 if values is None else values / (values - 1)
    return _float64(-1.0 if new_weight is None else new_weight, correction)


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
        LOOP_STATISTICS.index(centering),
        LOOP_STATISTICS.index(scaling),
        RESTRICTIONS.index(restrict),
        threads,
        eps,
        *present,
    )


@functools.lru_cache(maxsize=1024)
def _float64(*numbers: float) -> Tensor:
    """As integers with the same bits, which mixed precision leaves alone."""
    return Tensor(np.array(numbers, np.float64).view(np.int64))
