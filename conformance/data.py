"""The numbers that the cases run on: made up of every size, and real activations."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from rbn_core.config import FLOATING

Array = NDArray[Any]

OFFSETS = ("offset0", "offset10", "offset1000")
"""Normal numbers of deviation 1 around 0, 10 and 1000."""

EXTREMES = ("constant", "tiny", "denormal", "huge", "inf", "nan")
"""Planes of one value each; numbers near the dtype's ends; one infinity and one NaN among normal numbers."""

REAL = ("photographs", "digits")
"""Real activations: scikit-learn's two photographs and its handwritten digits behind a fixed convolution."""

DATA = (*OFFSETS, *EXTREMES, *REAL)
"""Everything a case can run on."""

REAL_SHAPES = {"photographs": (4, 8, 24, 24), "digits": (16, 6, 6, 6)}
"""Real activations have one shape each."""

HUGE = {"float16": 1e2, "bfloat16": 1e10, "float32": 1e10, "float64": 1e80}
"""So large that the variance and the cube of the deviation, by which its gradient divides, are just within
the range of what the dtype is computed in; float16 itself ends at 65504."""

TINY = {
    dtype: float(ml_dtypes.finfo(dtype).smallest_normal)  # type: ignore[no-untyped-call]
    for dtype in FLOATING
}
"""The smallest normal numbers. Asked for at the import: a framework may turn off what is below them, and
NumPy would warn of it when first asked."""


def numbers(data: str, shape: tuple[int, ...], dtype: str, step: int, rng: np.random.Generator) -> Array:
    """The input of one step, in float64.

    Args:
        data: One of `DATA`.
        shape: (N, C, *spatial); real activations have that of `REAL_SHAPES`.
        dtype: The dtype that the case runs in, which says what is huge and what is tiny.
        step: Real activations differ from step to step.
        rng: The source of the made-up numbers.
    """
    if data == "photographs":
        return photographs(step)
    if data == "digits":
        return digits(step)
    if data == "constant":
        return np.broadcast_to(rng.normal(size=(*shape[:2], *(1,) * (len(shape) - 2))), shape)
    x = magnitude(data, dtype) * rng.normal(loc=centre(data), size=shape)
    if data in ("inf", "nan"):
        x[(0,) * len(shape)] = float(data)
    return x


def centre(data: str) -> float:
    """The mean of the made-up numbers, in units of their deviation."""
    return float(data.removeprefix("offset")) if data in OFFSETS else 0.0


def magnitude(data: str, dtype: str) -> float:
    """The deviation of the made-up numbers."""
    tiny = TINY[dtype]
    return {"tiny": 1e3 * math.sqrt(tiny), "denormal": tiny / 16, "huge": HUGE[dtype]}.get(data, 1.0)


@cache
def photographs(step: int) -> Array:
    """Real activations: four patches of scikit-learn's two photographs behind a fixed convolution."""
    from sklearn.datasets import load_sample_images  # a second for those who need none of it

    patches = []
    for image in load_sample_images().images:
        for row in (100, 220):
            column = 60 + 120 * step
            patches.append(image[row : row + 26, column : column + 26].transpose(2, 0, 1) / 255.0)
    return fixed_convolution(np.stack(patches), channels=8)


@cache
def digits(step: int) -> Array:
    """Real activations: 16 of scikit-learn's handwritten digits, with their constant borders, likewise."""
    from sklearn.datasets import load_digits

    images = load_digits().images[16 * step : 16 * (step + 1)]
    return fixed_convolution(images[:, None] / 16.0, channels=6)


def fixed_convolution(images: Array, channels: int) -> Array:
    """A 3x3 convolution without padding, (N, I, H, W) to (N, channels, H - 2, W - 2)."""
    kernel = np.random.default_rng(0).normal(size=(channels, images.shape[1], 3, 3))
    windows = sliding_window_view(images, (3, 3), axis=(2, 3))  # type: ignore[call-overload] # NumPy 1.26 knows one axis
    return np.einsum("nihwyx,ciyx->nchw", windows, kernel)
