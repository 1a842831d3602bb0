"""RBN as one operator forward and one backward: compiled loops on the CPU, Triton kernels on CUDA.

`rbn::forward` and `rbn::backward` are registered with `torch.library`, so that autograd, fake tensors and
`torch.compile` know them. Of the image only X is kept for the backward pass, as in BatchNorm.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from rbn import kernels
from rbn.backends.torch import functional, internals
from rbn.kernels.library import DTYPES as NAMES_OF_DTYPES
from rbn.kernels.library import PARAMETERS, VECTORS
from rbn_core.config import check_vectors
from rbn_core.errors import RBNTypeError, RBNValueError
from rbn_core.names import NAMES
from rbn_core.options import CHANNEL_STATISTICS, RESTRICTIONS, Statistic

DTYPES = {getattr(torch, name): place for place, name in enumerate(NAMES_OF_DTYPES)}
AVAILABLE = {"cpu": not kernels.problem(), "cuda": importlib.util.find_spec("triton") is not None}
"""On which kinds of device there is a fast form."""

KINDS = (Tensor, torch.nn.Parameter)
"""The kinds of tensors whose memory holds their numbers."""

OPTIONS = {
    *itertools.product((None, *CHANNEL_STATISTICS), (None, *CHANNEL_STATISTICS, "input_mean"), RESTRICTIONS)
}
"""The centering, scaling and restrict that the fast form knows."""

STATISTICS_DTYPES = (torch.float32, torch.float64)

LIBRARY = torch.library.Library("rbn", "DEF")
ARGUMENTS = ", ".join(
    (*(f"Tensor? {name}" for name in VECTORS), "float eps, str? centering, str? scaling, str restrict")
)
LIBRARY.define(f"forward(Tensor x, {ARGUMENTS}) -> ({', '.join(['Tensor'] * 5)})")
LIBRARY.define(
    f"backward(Tensor dy, Tensor x, Tensor mu, Tensor v, {ARGUMENTS}, bool needs_dx) "
    f"-> ({', '.join(['Tensor'] * (1 + len(PARAMETERS)))})"
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
    """Whether the fast form can compute what `check_layer` found ordinary; else it is for `functional.rbn`.

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
        for value in (*map(parameters.get, PARAMETERS), *(running or (None, None)))
    ]
    options = (eps, centering, scaling, restrict)
    if torch.compiler.is_compiling():
        forward = torch.ops.rbn.forward.default
    elif torch.is_grad_enabled():
        forward = _Eager.apply
    elif running is not None and _nobody_listens(x):
        return _evaluated(x, layer, options), *running
    else:
        forward = _forward
    y, _, _, mean, var = forward(x, *layer, *options)
    return y, mean, var


def accumulate(
    running: tuple[Tensor, Tensor],
    mean: Tensor,
    var: Tensor,
    new_weight: float | Tensor,
    correction: float,
) -> None:
    """`functional.accumulate`, on the CPU in one call for each statistic."""
    at_once = (
        isinstance(new_weight, float)
        and not torch.compiler.is_compiling()
        and _nobody_listens(*running, mean, var)
        and all(
            each.dtype in STATISTICS_DTYPES and each.is_contiguous() and _aligned(each) is each
            for each in running
        )
    )
    if not at_once:
        functional.accumulate(running, mean, var, new_weight, correction)
        return
    torch.autograd.graph.increment_version(running)
    kernels.accumulate(_arrays(*running, mean, var), new_weight, correction)


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
def _backward_shapes(dy: Tensor, x: Tensor, mu: Tensor, v: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *layer_arguments, needs_dx = arguments
    return _gradients_of(functional.dense(x)[0], mu, layer_arguments[: len(PARAMETERS)], needs_dx)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, *layer = inputs
    _, mu, v, mean, var = output
    *stored, running_mean, _, eps, centering, scaling, restrict = layer
    ctx.mark_non_differentiable(mu, v, mean, var)
    ctx.set_materialize_grads(False)
    # E and Var as the operator copied them: the layer's own may have changed until the backward pass.
    running = (None, None) if running_mean is None else (mean, var)
    ctx.save_for_backward(x, mu, v, *stored, *running)
    ctx.options = (eps, centering, scaling, restrict)


def _differentiate(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    x, mu, v, *layer = ctx.saved_tensors
    nothing = (None,) * (2 + len(ctx.options))  # for E, Var and the options
    wanted = ctx.needs_input_grad[: 1 + len(PARAMETERS)]
    if dy is None:
        return (*(None for _ in wanted), *nothing)
    if torch.is_grad_enabled():  # the gradients are to be differentiated again
        gradients = _differentiable_gradients(dy, x, layer, ctx.options, wanted)
    else:
        operator = _backward_cpu if _nobody_listens(dy, x) else torch.ops.rbn.backward.default
        gradients = operator(dy, x, mu, v, *layer, *ctx.options, wanted[0])
    return (
        *(gradient if want else None for gradient, want in zip(gradients, wanted, strict=True)),
        *nothing,
    )


torch.library.register_autograd("rbn::forward", _differentiate, setup_context=_remember, lib=LIBRARY)


class _Eager(torch.autograd.Function):
    """`rbn::forward` without what the library wraps around it, which takes longer than a small layer."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:  # a setup_context beside it takes its own time
        output = _forward(*inputs)
        _remember(ctx, inputs, output)
        return output

    backward = staticmethod(_differentiate)


def _forward(x: Tensor, *layer: Any) -> tuple[Tensor, ...]:
    operator = _forward_cpu if _nobody_listens(x) else torch.ops.rbn.forward.default
    return operator(x, *layer)


def _nobody_listens(*images: Tensor) -> bool:
    """Whether the loops can be called at once: no mode, profiler or kind of tensor must learn of them.

    Python's own way to the operator takes longer than the loops on a small layer.
    """
    for image in images:
        if not image.is_cpu or type(image) not in KINDS or image.is_neg():
            return False
    return not internals.modes() and not internals.profiler_is_active()


def _differentiable_gradients(
    dy: Tensor, x: Tensor, layer: list[Tensor | None], options: tuple[Any, ...], wanted: tuple[bool, ...]
) -> list[Tensor | None]:
    """The gradients as functions of dY, X and the parameters, through the plain form."""
    *stored, mean, var = layer
    inputs = [x, *stored]
    eps, centering, scaling, restrict = options
    y, _, _ = functional.rbn(
        x,
        {name: value for name, value in zip(PARAMETERS, stored, strict=True) if value is not None},
        None if mean is None or var is None else (mean, var),
        eps=eps,
        centering=centering,
        scaling=scaling,
        restrict=restrict,
    )
    chosen = [value for value, want in zip(inputs, wanted, strict=True) if want]
    found = iter(torch.autograd.grad(y.to(x.dtype), chosen, dy, create_graph=True))
    return [next(found) if want else None for want in wanted]


# ---- on the CPU: calls into the compiled loops ----


@torch.library.impl(LIBRARY, "forward", "CPU")
def _forward_cpu(x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *layer, eps, centering, scaling, restrict = arguments
    like = {"dtype": statistics_dtype(x), "device": x.device}  # `new_empty` takes longer
    mu, v = torch.empty(x.shape[:2], **like), torch.empty(x.shape[:2], **like)
    *_, running_mean, running_var = layer
    mean = var = None
    if running_mean is None:
        mean, var = torch.empty(x.shape[1], **like), torch.empty(x.shape[1], **like)
    y = _transformed(x, layer, (eps, centering, scaling, restrict), mu, v, mean, var)
    return (
        (y, mu, v, mean, var) if mean is not None else (y, mu, v, running_mean.clone(), running_var.clone())
    )


def _evaluated(x: Tensor, layer: list[Tensor | None], options: tuple[Any, ...]) -> Tensor:
    """Y with the E and Var that are in the layer, and nothing for a backward pass."""
    return _transformed(x, layer, options, None, None, None, None)


def _transformed(
    x: Tensor, layer: list[Tensor | None], options: tuple[Any, ...], *statistics: Tensor | None
) -> Tensor:
    """Y, while the moments of the planes and of the batch are written, where there is room for them."""
    x, channels_last = functional.dense(x)
    y = torch.empty_like(x)
    vectors = _contiguous(layer)
    plan = _plan(x, channels_last, layer[-1] is None, *options)
    try:
        kernels.forward(plan, _arrays(x, y, *statistics, *vectors))
    except RBNValueError:  # what starts between two numbers: rare, and dear to ask of each
        x, *vectors = map(_aligned, (x, *vectors))
        kernels.forward(plan, _arrays(x, y, *statistics, *vectors))
    return y


@torch.library.impl(LIBRARY, "backward", "CPU")
def _backward_cpu(dy: Tensor, x: Tensor, mu: Tensor, v: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *layer, eps, centering, scaling, restrict, needs_dx = arguments
    x, channels_last = functional.dense(x)
    dy = dy.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else dy.contiguous()
    gradients = _gradients_of(x, mu, layer[: len(PARAMETERS)], needs_dx)
    vectors = _contiguous(layer)
    plan = _plan(x, channels_last, layer[-1] is None, eps, centering, scaling, restrict)
    dx, *others = gradients
    try:
        kernels.backward(plan, _arrays(dy, x, mu, v, dx, *vectors, *others))
    except RBNValueError:
        dy, x, *vectors = map(_aligned, (dy, x, *vectors))
        kernels.backward(plan, _arrays(dy, x, mu, v, dx, *vectors, *others))
    return gradients


def _plan(x: Tensor, channels_last: bool, batch_statistics: bool, *options: Any) -> kernels.Plan:
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


def _contiguous(layer: list[Tensor | None]) -> list[Tensor | None]:
    """As the loops read it; a copy must live as long as they run."""
    return [
        None if value is None else (value.resolve_neg() if value.is_neg() else value).contiguous()
        for value in layer
    ]


def _aligned(values: Tensor | None) -> Tensor | None:
    """A copy of what starts between two numbers, as a view of bytes may."""
    if values is None or values.data_ptr() % values.element_size() == 0:
        return values
    return values.clone()


def _arrays(*tensors: Tensor | None) -> list[kernels.Array]:
    """As the loops take them; those without numbers are none."""
    return [
        (tensor.data_ptr(), tensor.numel(), DTYPES[tensor.dtype]) if tensor is not None else kernels.NOTHING
        for tensor in tensors
    ]


def _gradients_of(x: Tensor, mu: Tensor, stored: Any, needs_dx: bool) -> tuple[Tensor, ...]:
    """Room for the gradients of X and of the parameters; none for what the layer lacks or nobody wants."""
    dx = torch.empty_like(x) if needs_dx else x.new_empty(0)
    return dx, *[mu.new_empty(0) if value is None else torch.empty_like(value) for value in stored]


# ---- on CUDA: Triton ----


@torch.library.impl(LIBRARY, "forward", "CUDA")
def _forward_cuda(x: Tensor, *layer: Any) -> tuple[Tensor, ...]:
    from rbn.backends.torch import triton_kernels  # imports Triton, which takes seconds

    *stored, running_mean, running_var, eps, centering, scaling, restrict = layer
    running = None if running_mean is None else (running_mean, running_var)
    y, mu, v, mean, var = triton_kernels.forward(
        functional.dense(x)[0], stored, running, eps, centering, scaling, restrict
    )
    if running is not None:
        mean, var = running_mean.clone(), running_var.clone()
    return y, mu, v, mean, var


@torch.library.impl(LIBRARY, "backward", "CUDA")
def _backward_cuda(dy: Tensor, x: Tensor, mu: Tensor, v: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    from rbn.backends.torch import triton_kernels

    *layer, eps, centering, scaling, restrict, needs_dx = arguments
    *stored, mean, var = layer
    running = None if mean is None else (mean, var)
    wanted = [value is not None for value in stored]
    x, _ = functional.dense(x)
    dx, gradients = triton_kernels.backward(
        dy, x, mu, v, stored, running, eps, centering, scaling, restrict, needs_dx, wanted
    )
    return tuple(mu.new_empty(0) if gradient is None else gradient for gradient in (dx, *gradients))
