"""RBN as one operator forward and one backward: compiled loops on the CPU, Triton kernels on CUDA.

`rbn::forward` and `rbn::backward` are registered with `torch.library`, so that autograd, fake tensors and
`torch.compile` know them. Of the image only X is kept for the backward pass, as in BatchNorm.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rbn import kernels
from rbn.backends.torch import functional, internals
from rbn.kernels.library import DTYPES as NAMES_OF_DTYPES
from rbn.kernels.library import VECTOR_PARAMETERS, VECTORS
from rbn_core.config import check_vectors
from rbn_core.errors import RBNTypeError, RBNValueError
from rbn_core.names import NAMES
from rbn_core.options import MOMENT_STATISTICS, RESTRICTIONS, Statistic

DTYPES = {getattr(torch, name): place for place, name in enumerate(NAMES_OF_DTYPES)}
AVAILABLE = {"cpu": not kernels.problem(), "cuda": importlib.util.find_spec("triton") is not None}
"""On which kinds of device there is a fused form."""

KINDS = (Tensor, torch.nn.Parameter)
"""The kinds of tensors whose memory holds their numbers."""

OPTIONS = {
    *itertools.product((None, *MOMENT_STATISTICS), (None, *MOMENT_STATISTICS, "input_mean"), RESTRICTIONS)
}
"""The centering, scaling and restrict that the fused form knows."""

STATISTICS_DTYPES = (torch.float32, torch.float64)
COUNT = len(VECTORS)


class Vectors(NamedTuple):
    """What a layer keeps, (C,) each, in the order in which the loops take it; `None` for what it lacks.

    E and Var are left out where a layer takes the batch's.
    """

    gamma: Tensor | None
    beta: Tensor | None
    center_weight: Tensor | None
    scale_weight: Tensor | None
    scale_bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None


class Options(NamedTuple):
    """epsilon of eq. 1, K_m of eq. 5, K_s and R of eq. 9."""

    eps: float
    centering: Statistic | None
    scaling: Statistic | None
    restrict: str


LIBRARY = torch.library.Library("rbn", "DEF")
LAYER = ", ".join(
    (
        *(f"Tensor? {name}" for name in Vectors._fields),
        "float eps, str? centering, str? scaling, str restrict",
    )
)
"""Vectors and options one after another, as autograd and the operators take them."""

LIBRARY.define(f"forward(Tensor x, {LAYER}) -> ({', '.join(['Tensor'] * 5)})")
LIBRARY.define(
    f"backward(Tensor dy, Tensor x, Tensor mu, Tensor v, {LAYER}, bool needs_dx) "
    f"-> ({', '.join(['Tensor'] * (1 + len(VECTOR_PARAMETERS)))})"
)


def check_layer(
    x: Tensor,
    parameters: Mapping[str, Tensor],
    running: tuple[Tensor, Tensor] | None,
    num_features: int,
    layer: str,
) -> bool:
    """Refuse parameters and statistics that do not fit the layer or its input, in either form.

    Args:
        x: The input.
        parameters: Those that the layer has, by canonical names.
        running: E and Var, where it keeps them.
        num_features: C.
        layer: What an error calls the layer.

    Returns:
        Whether all of it, and the input, are dense numbers in PyTorch's own kinds of tensors. A subclass may
        mean something else by its numbers, and goes through its own operations.

    Raises:
        RBNValueError: One is not (C,), or on another device than the input.
        RBNTypeError: One is not of a floating-point dtype, or not dense.
    """
    shape, device, strided, on_cpu = (num_features,), x.device, torch.strided, x.is_cpu
    ordinary = type(x) in KINDS and x.layout is strided
    for value in (*parameters.values(), *(running or ())):
        if (
            value.shape != shape
            or value.dtype not in DTYPES
            or not (value.is_cpu if on_cpu else value.device == device)
            or value.layout is not strided
        ):
            stored = {**parameters, **dict(zip(VECTORS[-2:], running or (), strict=False))}
            name = NAMES["torch"][next(name for name, each in stored.items() if each is value)]
            check_vectors({name: tuple(value.shape)}, num_features, layer)
            check_kind(name, value, x, layer)
        if type(value) not in KINDS:
            ordinary = False
    return ordinary


def check_kind(name: str, value: Tensor, x: Tensor, layer: str) -> None:
    """Refuse a stored tensor whose dtype, layout or device is none for this input."""
    if value.dtype not in DTYPES or value.layout is not torch.strided:
        raise RBNTypeError(
            f"{layer}: expected {name} of dense floating-point numbers, got {value.dtype}, {value.layout}. "
            "Convert it, for example with .to_dense() and .float()."
        )
    if value.device != x.device:
        raise RBNValueError(
            f"{layer}: expected {name} on the input's device, {x.device}, got it on {value.device}. "
            "Move the layer or the input with .to(...)."
        )


def share_memory(running: tuple[Tensor, Tensor], parameters: Mapping[str, Tensor]) -> bool:
    """Whether an update of the statistics would change parameters before their gradients are computed."""
    if torch.compiler.is_compiling() or internals.functorch_is_active():
        return False
    updated = [statistic.data_ptr() for statistic in running]
    return any(value.data_ptr() in updated for value in parameters.values())


def name_of(dtype: torch.dtype) -> str:
    """Its bare name; that of those which layers take without making a text of it."""
    return NAMES_OF_DTYPES[DTYPES[dtype]] if dtype in DTYPES else str(dtype).removeprefix("torch.")


def takes(x: Tensor, centering: Statistic | None, scaling: Statistic | None, restrict: str) -> bool:
    """Whether the fused form can compute what `check_layer` found ordinary; else it is for `functional.rbn`.

    The operators have no rules for forward-mode derivatives and for `torch.func`, and an exported or traced
    program must run where this package is not installed.
    """
    return (
        not torch.jit.is_tracing()
        and AVAILABLE.get("cpu" if x.is_cpu else x.device.type, False)
        and x.dtype in DTYPES
        and x.numel() > 0
        and (centering, scaling, restrict) in OPTIONS
        and not (torch.compiler.is_compiling() and torch.compiler.is_exporting())
        and not internals.functorch_is_active()
        and not internals.forward_mode_is_active()
    )


def rbn(
    x: Tensor,
    parameters: Mapping[str, Tensor],
    running: tuple[Tensor, Tensor] | None,
    *,
    eps: float,
    centering: Statistic | None,
    scaling: Statistic | None,
    restrict: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """`functional.rbn` for what `takes` accepts.

    Returns:
        Y, of the dtype and memory format of x, and the E and biased Var it was normalized with, in at least
        float32 and without a gradient.
    """
    dtype = statistics_dtype(x)
    layer = [
        value if value is None or value.dtype is dtype else value.to(dtype)
        for value in (*map(parameters.get, VECTOR_PARAMETERS), *(running or (None, None)))
    ]
    options = (eps, centering, scaling, restrict)
    # torch.compile and what records operators must see a registered one. Without them the loops are called at
    # once, in an autograd.Function: PyTorch's way to an operator takes longer than a small layer.
    compiling = torch.compiler.is_compiling()
    at_once = not compiling and _nobody_listens(x)
    if torch.is_grad_enabled() and not compiling:
        y, _, _, mean, var = _Differentiable.apply(x, *layer, *options, at_once)
    elif at_once:
        y, _, _, mean, var = _forward_cpu(x, layer, options, kept=False)
    else:
        y, _, _, mean, var = torch.ops.rbn.forward.default(x, *layer, *options)
    return y, mean, var


def accumulate(
    running: tuple[Tensor, Tensor],
    mean: Tensor,
    var: Tensor,
    new_weight: float | None,
    *,
    count: Tensor | None = None,
    values: int | None = None,
) -> None:
    """`functional.accumulate`, on the CPU in one call for each statistic."""
    at_once = (
        not torch.compiler.is_compiling()
        and _nobody_listens(*running, mean, var)
        and all(
            each.dtype in STATISTICS_DTYPES and each.is_contiguous() and _aligned(each) is each
            for each in running
        )
    )
    if not at_once or not isinstance(new_weight, float):
        functional.accumulate(running, mean, var, new_weight, count=count, values=values)
        return
    correction = 1.0 if values is None else values / (values - 1)
    torch.autograd.graph.increment_version(running)
    kernels.accumulate(_arrays((*running, mean, var)), new_weight, correction)


def statistics_dtype(x: Tensor) -> torch.dtype:
    """What statistics, parameters and their gradients are computed in: at least float32."""
    return torch.float64 if x.dtype is torch.float64 else torch.float32


# ---- what autograd and the compiler know of the operators ----


@torch.library.register_fake("rbn::forward", lib=LIBRARY)
def _forward_shapes(x: Tensor, *_: Any) -> tuple[Tensor, ...]:
    planes = x.new_empty(x.shape[:2], dtype=statistics_dtype(x))
    channels = planes.new_empty(x.shape[1])
    y = torch.empty_like(functional.dense(x)[0])
    return y, planes, torch.empty_like(planes), channels, torch.empty_like(channels)


@torch.library.register_fake("rbn::backward", lib=LIBRARY)
def _backward_shapes(dy: Tensor, x: Tensor, mu: Tensor, v: Tensor, *layer: Any) -> tuple[Tensor, ...]:
    return _gradients_of(functional.dense(x)[0], mu, layer[: len(VECTOR_PARAMETERS)], needs_dx=layer[-1])


def _remember(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor, ...]) -> None:
    x, *layer = inputs
    _, mu, v, mean, var = output
    vectors, ctx.options = layer[:COUNT], layer[COUNT:]
    ctx.mark_non_differentiable(mu, v, mean, var)
    ctx.set_materialize_grads(False)
    if vectors[-1] is not None:  # as the operator copied them: the layer's own may change until then
        vectors[-2:] = mean, var
    ctx.save_for_backward(x, mu, v, *vectors)


def _differentiate(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    wanted = ctx.needs_input_grad[: 1 + len(VECTOR_PARAMETERS)]
    gradients: Iterable[Tensor | None] = (None,) * len(wanted)
    if dy is not None:
        x, mu, v, *vectors = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradients are to be differentiated again
            gradients = _differentiable_gradients(dy, x, vectors, Options(*ctx.options), wanted)
        else:
            operator = _backward_cpu if _nobody_listens(dy, x) else torch.ops.rbn.backward.default
            gradients = operator(dy, x, mu, v, *vectors, *ctx.options, wanted[0])
    found = [gradient if want else None for gradient, want in zip(gradients, wanted, strict=True)]
    return *found, *[None] * (len(ctx.needs_input_grad) - len(found))


torch.library.register_autograd("rbn::forward", _differentiate, setup_context=_remember, lib=LIBRARY)


class _Differentiable(torch.autograd.Function):
    """`rbn::forward` as autograd knows it, without what the library wraps around it."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:  # a setup_context beside it takes its own time
        x, *layer, at_once = inputs
        if at_once:
            output = _forward_cpu(x, layer[:COUNT], layer[COUNT:])
        else:
            output = torch.ops.rbn.forward.default(x, *layer)
        _remember(ctx, (x, *layer), output)
        return output

    backward = staticmethod(_differentiate)


def _nobody_listens(*images: Tensor) -> bool:
    """Whether the loops can be called at once: no mode, profiler or kind of tensor must learn of them.

    Python's own way to the operator takes longer than the loops on a small layer.
    """
    for image in images:
        if not image.is_cpu or type(image) not in KINDS or image.is_neg():
            return False
    return not internals.modes() and not internals.profiler_is_active()


def _differentiable_gradients(
    dy: Tensor, x: Tensor, vectors: Sequence[Tensor | None], options: Options, wanted: tuple[bool, ...]
) -> list[Tensor | None]:
    """The gradients as functions of dY, X and the parameters, through the plain form."""
    *stored, mean, var = vectors
    parameters = {
        name: value for name, value in zip(VECTOR_PARAMETERS, stored, strict=True) if value is not None
    }
    running = None if mean is None or var is None else (mean, var)
    y, _, _ = functional.rbn(x, parameters, running, **options._asdict())
    chosen = [value for value, want in zip((x, *stored), wanted, strict=True) if want]
    found = iter(torch.autograd.grad(y.to(x.dtype), chosen, dy, create_graph=True))
    return [next(found) if want else None for want in wanted]


# ---- on the CPU: calls into the compiled loops ----


def _forward_cpu(
    x: Tensor, vectors: Sequence[Any], options: Sequence[Any], kept: bool = True
) -> tuple[Any, ...]:
    """Y, mu, v, E and Var; of the last four no more than needed, where none is kept for a backward pass."""
    known = vectors[-1] is not None
    mu = v = mean = var = None
    if kept or not known:
        like = {"dtype": statistics_dtype(x), "device": x.device}  # `new_empty` takes longer
        mu, v = torch.empty(x.shape[:2], **like), torch.empty(x.shape[:2], **like)
        if not known:
            mean, var = torch.empty(x.shape[1], **like), torch.empty(x.shape[1], **like)
    x, channels_last = functional.dense(x)
    y = torch.empty_like(x)
    plan = _plan(x, channels_last, not known, options)
    _call(kernels.forward, plan, [x, y, mu, v, mean, var, *_dense(vectors)])
    if known:
        mean, var = (value.clone() for value in vectors[-2:]) if kept else vectors[-2:]
    return y, mu, v, mean, var


LIBRARY.impl("forward", lambda x, *layer: _forward_cpu(x, layer[:COUNT], layer[COUNT:]), "CPU")


@torch.library.impl(LIBRARY, "backward", "CPU")
def _backward_cpu(dy: Tensor, x: Tensor, mu: Tensor, v: Tensor, *layer: Any) -> tuple[Tensor, ...]:
    vectors, options, needs_dx = layer[:COUNT], layer[COUNT:-1], layer[-1]
    x, channels_last = functional.dense(x)
    dy = dy.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else dy.contiguous()
    dx, *others = gradients = _gradients_of(x, mu, vectors[: len(VECTOR_PARAMETERS)], needs_dx)
    plan = _plan(x, channels_last, vectors[-1] is None, options)
    _call(kernels.backward, plan, [dy, x, mu, v, dx, *_dense(vectors), *others])
    return gradients


def _call(function: Callable[..., None], plan: kernels.Plan, tensors: list[Tensor | None]) -> None:
    """Call the loops, with copies of what they cannot read, which must live as long as they run."""
    try:
        function(plan, _arrays(tensors))
    except RBNValueError:  # what starts between two numbers: rare, and dear to ask of each
        tensors = [*map(_aligned, tensors)]
        function(plan, _arrays(tensors))


def _plan(x: Tensor, channels_last: bool, batch_statistics: bool, options: Sequence[Any]) -> kernels.Plan:
    dtype = NAMES_OF_DTYPES[DTYPES[x.dtype]]
    return _known_plan(
        tuple(x.shape), dtype, channels_last, batch_statistics, torch.get_num_threads(), *options
    )


@lru_cache(maxsize=1024)
def _known_plan(
    shape: tuple[int, ...],
    dtype: str,
    channels_last: bool,
    batch_statistics: bool,
    threads: int,
    eps: float,
    centering: Statistic | None,
    scaling: Statistic | None,
    restrict: str,
) -> kernels.Plan:
    planes = shape[0], shape[1], math.prod(shape[2:])
    return kernels.Plan(
        *planes,
        dtype,
        channels_last,
        centering,
        scaling,
        restrict,
        batch_statistics,
        kernels.worthwhile_threads(*planes, threads),
        eps,
    )


def _dense(vectors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """As the loops read them."""
    return [
        None if value is None else (value.resolve_neg() if value.is_neg() else value).contiguous()
        for value in vectors
    ]


def _aligned(values: Tensor | None) -> Tensor | None:
    """A copy of what starts between two numbers, as a view of bytes may."""
    if values is None or values.data_ptr() % values.element_size() == 0:
        return values
    return values.clone()


def _arrays(tensors: Iterable[Tensor | None]) -> list[kernels.Array]:
    """As the loops take them; those without numbers are none."""
    return [
        (tensor.data_ptr(), tensor.numel(), DTYPES[tensor.dtype]) if tensor is not None else kernels.NOTHING
        for tensor in tensors
    ]


def _gradients_of(x: Tensor, mu: Tensor, stored: Sequence[Any], needs_dx: bool) -> tuple[Tensor, ...]:
    """Room for the gradients of X and of the parameters; none for what the layer lacks or nobody wants."""
    dx = torch.empty_like(x) if needs_dx else x.new_empty(0)
    return dx, *[mu.new_empty(0) if value is None else torch.empty_like(value) for value in stored]


# ---- on CUDA: Triton ----


@torch.library.impl(LIBRARY, "forward", "CUDA")
def _forward_cuda(x: Tensor, *layer: Any) -> tuple[Tensor, ...]:
    from rbn.backends.torch.triton import launch  # imports Triton, which takes seconds

    vectors, options = Vectors(*layer[:COUNT]), Options(*layer[COUNT:])
    return launch.forward(functional.dense(x)[0], vectors, options)


@torch.library.impl(LIBRARY, "backward", "CUDA")
def _backward_cuda(dy: Tensor, x: Tensor, mu: Tensor, v: Tensor, *layer: Any) -> tuple[Tensor, ...]:
    from rbn.backends.torch.triton import launch

    vectors, options = Vectors(*layer[:COUNT]), Options(*layer[COUNT:-1])
    dx, gradients = launch.backward(dy, functional.dense(x)[0], mu, v, vectors, options, needs_dx=layer[-1])
    return tuple(mu.new_empty(0) if gradient is None else gradient for gradient in (dx, *gradients))
