"""bfloat16 in NumPy, which has none of its own: for those alone who hold files or tensors of it."""

from __future__ import annotations

from typing import Any

import numpy as np

from rbn_core.errors import RBNValueError


def bfloat16() -> np.dtype[Any]:
    """The dtype; NumPy then knows it by its name, too.

    Raises:
        RBNValueError: ml_dtypes, which defines it, is not installed.
    """
    try:
        import ml_dtypes
    except ImportError:
        raise RBNValueError(
            "bfloat16: expected the package ml_dtypes, which NumPy knows it from, got none. "
            "pip install ml_dtypes, or install rbn as 'rbn[cli]'."
        ) from None
    return np.dtype(ml_dtypes.bfloat16)
