"""What MindSpore does not promise to keep, in one place: without these names layers are slower, not wrong.

MindSpore's public way to define a gradient, a cell's or an operator's `bprop`, keeps all results for it, Y
included; and there is no public word for "no casts in here", or for whether a gradient is part of what
another is taken of.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import warnings
from types import FunctionType, ModuleType
from typing import Any

import mindspore as ms
from mindspore import nn

from rbn_core.errors import RBNWarning


def _found(module: str, name: str, lost: str) -> Any:
    """What a module calls so; `None`, with one warning, where it is gone."""
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        _warn(f"{module}.{name}", lost)
        return None


def _warn(name: str, lost: str) -> None:
    """Say that a name is gone and what that costs."""
    warnings.warn(
        f"RBN: expected MindSpore to have {name}, which version {ms.__version__} lacks. {lost} "
        "Install a version of MindSpore that `rbn info` names, or a newer rbn.",
        RBNWarning,
        stacklevel=2,
    )


def _no_casts() -> Any:
    """The mark of a cell that leaves what it computes with as it is, inside of a cast network, too."""
    marks = type(getattr(nn.Cell().to_float(ms.float32), "mixed_precision_type", None))
    if not hasattr(marks, "NOTSET"):
        _warn(
            "MixedPrecisionType.NOTSET",
            "In PyNative mode the layers compute half precision in float32, and are slower.",
        )
    return getattr(marks, "NOTSET", None)


Function: Any = _found(
    "mindspore.common",
    "_Function",
    "The layers give the same numbers, and keep Y beside X until the backward pass.",
)
"""A gradient in PyNative mode that keeps what it is told to."""

no_grad: Any = (
    _found(
        "mindspore.common", "_no_grad", "After an exception inside of a gradient no weights can be loaded."
    )
    or contextlib.nullcontext
)
"""A context that records nothing."""

_executor: Any = _found(
    "mindspore.common.api",
    "_pynative_executor",
    "After an exception inside of a gradient, the first gradient of a graph in the suite is refused.",
)

AS_GIVEN: Any = _no_casts()
"""A cell's `mixed_precision_type` inside of which operators get what they are given."""

signatures: ModuleType | None = _found(
    "mindspore.ops",
    "signature",
    "The layers give the same numbers, and update their statistics in several operations.",
)
"""How an operator says what it changes in place."""

_recorded: Any = _found(
    "mindspore.ops.composite.base",
    "_pynative_forward_run",
    "Gradients of gradients in PyNative mode, which MindSpore computes wrongly, are no longer refused.",
)


def is_recorded() -> bool:
    """Whether a function that a gradient will be taken of is running: it is further up the stack.

    What MindSpore says itself is also so after an exception inside of a gradient.
    """
    return _recorded is not None and _is_running(_recorded)


def end_gradient() -> None:
    """End the gradient inside of which an exception was raised: MindSpore itself goes on recording."""
    if _executor is not None:
        _executor.clear_res()


def is_for_plain_operations() -> bool:
    """Whether `mindspore.export` or `mindspore.jvp` is compiling a graph: it is further up the stack.

    A file of the former runs where this package is not installed, and the latter takes the gradient of a
    gradient, which only MindSpore's own operations have.
    """
    return _is_running(ms.export, ms.jvp)


def _is_running(*functions: FunctionType) -> bool:
    """Whether one of some functions is further up the stack."""
    codes = {function.__code__ for function in functions}
    frame = inspect.currentframe()
    while frame:
        if frame.f_code in codes:
            return True
        frame = frame.f_back
    return False
