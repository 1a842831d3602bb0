"""The cases of the suite, as plain data, and the numbers they stand for."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from sklearn.datasets import load_digits, load_sample_images

from rbn_core.config import STATISTICS, Config
from rbn_core.weights import State

Array = NDArray[Any]

DTYPES = ("float32", "float64")
MODES = {"train": 3, "eval": 1}
"""Each mode and its steps; the running statistics are compared after every step."""

OFFSETS = (0, 10, 1000)
"""Means of the made-up data, whose standard deviation is 1."""

SHAPES = ((4, 3, 1, 1), (1, 2, 2, 3), (3, 1, 2, 3), (2, 5, 7, 7), (8, 3), (2, 3, 5), (2, 3, 2, 3, 2))
"""Batch 1 and more, one and many channels, planes of 1x1, 2x3 and 7x7, every rank."""

EVALUATION_SHAPES = ((0, 2, 2, 3), (1, 3, 1, 1))
"""What only evaluation takes: no image at all, and one value per channel."""

OPTION_SHAPE = (3, 4, 2, 3)
"""The shape on which every combination of options runs."""


@dataclass(frozen=True)
class Case:
    """One thing to check: a layer, a mode, some data and a dtype.

    Attributes:
        id: What names the case everywhere, such as "rbn/train/offset1000/2x5x7x7/float32".
        group: The row of the report that the case belongs to.
        config: The layer's options.
        training: Training steps or evaluation steps.
        steps: How many.
        data: Where the numbers come from: "offset0", "offset10", "offset1000", "photographs" or "digits".
        shape: The input's shape, (N, C, *spatial).
        dtype: The input's dtype.
    """

    id: str
    group: str
    config: Config
    training: bool
    steps: int
    data: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def seed(self) -> int:
        """A seed that the id alone decides, so that a case is the same wherever it runs."""
        return zlib.crc32(self.id.encode())

    def state(self) -> State:
        """What the layer stores at the start, exact in the dtype of its parameters.

        No value is one at which a mistake could hide: no zero, no one, no equal channels. The running mean is
        near the mean of X_cm, (1 + w_m) E(X) by eq. 6, as in a trained layer.
        """
        rng = np.random.default_rng(self.seed)
        channels = self.config.num_features
        centre = float(self.data.removeprefix("offset")) if self.data.startswith("offset") else 0.0
        values = {
            "gamma": rng.uniform(0.5, 2.0, channels) * rng.choice([-1.0, 1.0], channels),
            "beta": rng.normal(size=channels),
            "center_weight": rng.normal(scale=0.5, size=channels),
            "scale_weight": rng.normal(size=channels),
            "scale_bias": rng.normal(loc=1.0, scale=0.5, size=channels),
            "running_var": rng.uniform(0.5, 2.0, channels),
            "num_batches_tracked": np.array(7),
        }
        values["running_mean"] = (1.0 + values["center_weight"]) * centre + rng.normal(size=channels)
        stored = np.promote_types(self.dtype, np.float32)
        return {
            name: values[name].astype(stored) if shape else values[name]
            for name, shape in self.config.state_shapes().items()
        }

    def inputs(self) -> Iterator[tuple[Array, Array]]:
        """The input and the cotangent of every step, in the case's dtype."""
        rng = np.random.default_rng([self.seed, 1])
        for step in range(self.steps):
            if self.data == "photographs":
                x = photographs(step)
            elif self.data == "digits":
                x = digits(step)
            else:
                x = rng.normal(loc=float(self.data.removeprefix("offset")), size=self.shape)
            yield x.astype(self.dtype), rng.normal(size=self.shape).astype(self.dtype)


@cache
def all_cases() -> tuple[Case, ...]:
    """Every case of the suite, in the order of the report's rows."""
    return (*_data_cases(), *_option_cases())


def _data_cases() -> Iterator[Case]:
    real = (("photographs", photographs(0).shape), ("digits", digits(0).shape))
    shapes = (*SHAPES, *EVALUATION_SHAPES)
    made_up = tuple((f"offset{offset}", shape) for offset in OFFSETS for shape in shapes)
    for mode, (data, shape), dtype in itertools.product(MODES, (*made_up, *real), DTYPES):
        if mode == "train" and shape in EVALUATION_SHAPES:
            continue
        yield Case(
            id=f"rbn/{mode}/{data}/{'x'.join(map(str, shape))}/{dtype}",
            group=f"rbn/{mode}/{data}/{dtype}",
            config=Config(shape[1]),
            training=mode == "train",
            steps=MODES[mode],
            data=data,
            shape=shape,
            dtype=dtype,
        )


def _option_cases() -> Iterator[Case]:
    calibrations = [
        {"centering": centering, "scaling": scaling}
        for centering, scaling in itertools.product(STATISTICS, STATISTICS)
    ]
    others: list[dict[str, Any]] = [
        {"restrict": "hard_sigmoid"},
        {"running_var": "biased"},
        {"momentum": None},
        {"momentum": 0.0},
        {"momentum": 1.0},
        {"eps": 0.1},
        {"gamma": False, "beta": False},
        {"track_running_stats": False},
    ]
    for mode, options, dtype in itertools.product(MODES, (*calibrations, *others), DTYPES):
        spelled = ",".join(f"{name}={value}" for name, value in options.items())
        group = "calibrations" if options in calibrations else "options"
        yield Case(
            id=f"rbn/{mode}/{spelled}/{dtype}",
            group=f"rbn/{mode}/{group}/{dtype}",
            config=Config(OPTION_SHAPE[1], **options),
            training=mode == "train",
            steps=MODES[mode],
            data="offset0",
            shape=OPTION_SHAPE,
            dtype=dtype,
        )


@cache
def photographs(step: int) -> Array:
    """Real activations: four patches of scikit-learn's two photographs behind a fixed convolution."""
    patches = []
    for image in load_sample_images().images:
        for row in (100, 220):
            column = 60 + 120 * step
            patches.append(image[row : row + 26, column : column + 26].transpose(2, 0, 1) / 255.0)
    return fixed_convolution(np.stack(patches), channels=8)


@cache
def digits(step: int) -> Array:
    """Real activations: 16 of scikit-learn's handwritten digits, with their constant borders, likewise."""
    images = load_digits().images[16 * step : 16 * (step + 1)]
    return fixed_convolution(images[:, None] / 16.0, channels=6)


def fixed_convolution(images: Array, channels: int) -> Array:
    """A 3x3 convolution without padding, (N, I, H, W) to (N, channels, H - 2, W - 2)."""
    kernel = np.random.default_rng(0).normal(size=(channels, images.shape[1], 3, 3))
    windows = sliding_window_view(images, (3, 3), axis=(2, 3))  # type: ignore[call-overload] # NumPy 1.26 knows one axis
    return np.einsum("nihwyx,ciyx->nchw", windows, kernel)
