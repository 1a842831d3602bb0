"""What PyTorch has no public name for: each taken here, with what to do where a release has it no more.

Without one the layers stay right, in PyTorch's own operations or through its dispatcher, and are slower.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from rbn_core.errors import RBNWarning

NAMES = (
    "_C._are_functorch_transforms_active",
    "_C._functorch._unwrap_functional_tensor",
    "_C._functorch.get_unwrapped",
    "_C._functorch.is_batchedtensor",
    "_C._functorch.is_functionaltensor",
    "_C._functorch.is_functorch_wrapped_tensor",
    "_C._len_torch_dispatch_stack",
    "autograd._profiler_enabled",
    "_sync",
    "autograd.forward_ad._current_level",
)
"""Below `torch`."""


def _taken() -> dict[str, Any]:
    found = {}
    for name in NAMES:
        try:
            found[name] = attrgetter(name)(torch)
        except AttributeError:
            continue
    missing = [f"torch.{name}" for name in NAMES if name not in found]
    if missing:
        warnings.warn(
            f"rbn: expected {', '.join(missing)}, which PyTorch {torch.__version__} does not have. "
            "The layers are right, and slower: install a version of rbn that knows this PyTorch.",
            RBNWarning,
            stacklevel=2,
        )
    return found


_FOUND = _taken()


def _or(name: str, otherwise: Callable[..., Any]) -> Any:
    return _FOUND.get(name, otherwise)


functorch_is_active: Callable[[], bool] = _or("_C._are_functorch_transforms_active", lambda: True)
"""Whether a transformation of `torch.func` is at work; if nobody knows, yes: plain operations allow it."""

modes: Callable[[], int] = _or("_C._len_torch_dispatch_stack", lambda: 1)
"""How many modes see every operator; if nobody knows, one."""

profiler_is_active: Callable[[], bool] = _or("autograd._profiler_enabled", lambda: True)
"""Whether a profiler sees every operator; if nobody knows, yes."""

KNOWS_FORWARD_MODE = "autograd.forward_ad._current_level" in _FOUND


def forward_mode_is_active() -> bool:
    """Whether forward-mode derivatives are taken; if nobody knows, yes: plain operations allow it."""
    return not KNOWS_FORWARD_MODE or torch.autograd.forward_ad._current_level >= 0


def is_batched(tensor: Tensor) -> bool:
    """Whether `torch.vmap` maps over a tensor; if nobody knows, no: PyTorch then says what it cannot do."""
    names = ("is_functorch_wrapped_tensor", "is_batchedtensor", "get_unwrapped")
    is_wrapped, is_mapped, unwrapped = (_FOUND.get(f"_C._functorch.{name}") for name in names)
    if not (is_wrapped and is_mapped and unwrapped):
        return False
    while is_wrapped(tensor):
        if is_mapped(tensor):
            return True
        tensor = unwrapped(tensor)
    return False


def as_written_to(target: Tensor, value: Any) -> Any:
    """A value that can be written into a tensor, which `torch.func.functionalize` may have wrapped or not.

    Args:
        target: What is written to.
        value: What is written; a tensor is unwrapped where the target comes from outside.
    """
    from_outside = isinstance(value, Tensor) and _without_functionalization(target) is target
    return _without_functionalization(value) if from_outside else value


def _without_functionalization(tensor: Tensor) -> Tensor:
    """What `torch.func.functionalize` wraps; else the tensor."""
    names = ("_C._functorch.is_functionaltensor", "_C._functorch._unwrap_functional_tensor", "_sync")
    is_functional, unwrapped, synchronize = map(_FOUND.get, names)
    if not (is_functional and unwrapped and synchronize):
        return tensor
    if not is_functional(tensor):
        return tensor
    synchronize(tensor)
    inner: Tensor = unwrapped(tensor, False)
    return inner
