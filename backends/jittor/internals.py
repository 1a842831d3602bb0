"""The names of Jittor that its documentation does not promise, each with what is done where one is gone."""

from __future__ import annotations

import functools
import warnings
from contextlib import AbstractContextManager
from pathlib import Path

from rbn_core.errors import RBNWarning

PREFER_FLOAT32, PREFER_HALF = 1, 2
"""Bits of `amp_reg`, by which automatic mixed precision chooses the dtype of a result."""


def full_precision(*, gradients: bool = True) -> AbstractContextManager[object]:
    """A scope in which float32 stays so, which automatic mixed precision turns into half precision.

    Args:
        gradients: Whether those of what is computed in it are wanted in float32, too, wherever they are asked
            for. Jittor makes float32 of float64 then.
    """
    import jittor as jt

    if not hasattr(jt.flags, "amp_reg"):
        _warn_of("jittor.flags.amp_reg", "gradients are less exact in automatic mixed precision")
        return jt.flag_scope(auto_mixed_precision_level=0)
    mixed = jt.flags.amp_reg & PREFER_HALF
    return jt.flag_scope(amp_reg=PREFER_FLOAT32 if mixed and gradients else 0)


def has_cuda() -> bool:
    """Whether Jittor has installed a CUDA for itself, which it takes before any other."""
    try:
        from jittor_utils.install_cuda import has_installation
    except ImportError:
        return False
    return bool(has_installation())


def home() -> Path:
    """The folder in which Jittor keeps its cache."""
    import jittor_utils

    return Path(jittor_utils.home()) if hasattr(jittor_utils, "home") else Path.home()


def end_compilers() -> None:
    """End the processes that have compiled Jittor itself, once they are done: there are none without work."""
    import jittor_utils

    if pool := getattr(jittor_utils, "p", None):
        pool.close()
        pool.join()


@functools.cache
def _warn_of(name: str, loss: str) -> None:
    warnings.warn(
        f"This Jittor has no {name}: {loss}. Install the version that `rbn info` calls tested.",
        RBNWarning,
        stacklevel=4,
    )
