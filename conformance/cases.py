"""The cases of the suite, as plain data, and the numbers they stand for."""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import ml_dtypes  # noqa: F401 (teaches NumPy bfloat16)
import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from sklearn.datasets import load_digits, load_sample_images

from rbn_core.config import STATISTICS, Config
from rbn_core.weights import State

Array = NDArray[Any]

DTYPES = ("float32", "float64")
HALF_DTYPES = ("float16", "bfloat16")
MODES = {"train": 3, "eval": 1}
"""Each mode and its steps; the running statistics are compared after every step."""

OPTION_STEPS = {"train": 2, "eval": 1}
"""The same for the many cases of options."""

OFFSETS = (0, 10, 1000)
"""Means of the made-up data, whose standard deviation is 1."""

SHAPES = ((4, 3, 1, 1), (1, 2, 2, 3), (3, 1, 2, 3), (2, 5, 7, 7), (8, 3))
"""Batch 1 and more, one and many channels, planes of 1x1, 2x3 and 7x7, no planes."""

OTHER_SHAPES = ((2, 3, 5), (2, 3, 2, 3, 2))
"""One and three spatial axes."""

EVALUATION_SHAPES = ((0, 2, 2, 3), (1, 3, 1, 1))
"""What only evaluation takes: no image at all, and one value per channel."""

OPTION_SHAPE = (3, 4, 2, 3)
"""The shape on which every combination of options runs."""

BATCH_NORM_OPTIONS: tuple[dict[str, Any], ...] = (
    {"running_var": "biased"},
    {"momentum": None},
    {"momentum": 0.0},
    {"momentum": 1.0},
    {"eps": 0.1},
    {"track_running_stats": False},
)
"""Options that all three layers have."""

REAL: tuple[tuple[str, tuple[int, ...]], ...] = (("photographs", (4, 8, 24, 24)), ("digits", (16, 6, 6, 6)))
"""Real activations, and their shapes."""

DATA = (
    *((f"offset{offset}", shape) for offset in OFFSETS for shape in SHAPES),
    *(("offset0", shape) for shape in (*OTHER_SHAPES, *EVALUATION_SHAPES)),
    *REAL,
)
"""Everything that RBN with its default options runs on."""


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
        layout: Where the framework's input has the channels: "channels_first" or "channels_last".
    """

    id: str
    group: str
    config: Config
    training: bool
    steps: int
    data: str
    shape: tuple[int, ...]
    dtype: str
    layout: str = "channels_first"

    @property
    def features(self) -> dict[str, str]:
        """What the case covers: every option with its value."""
        c = self.config
        options: dict[str, object] = {
            "layer": c.layer,
            "mode": "train" if self.training else "eval",
            "dtype": self.dtype,
            "layout": self.layout,
            "spatial axes": len(self.shape) - 2,
            "data": self.data,
            "centering": c.centering,
            "scaling": c.scaling,
            "restrict": c.restrict,
            "running_var": c.running_var,
            "momentum": c.momentum,
            "eps": c.eps,
            "gamma and beta": c.gamma,
            "track_running_stats": c.track_running_stats,
            "kernel_size": c.kernel_size,
        }
        return {name: str(value) for name, value in options.items()}

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
        if self.config.kernel_size is not None:
            shape = self.config.state_shapes()["conv_weight"]
            values["conv_weight"] = rng.normal(scale=math.prod(shape[2:]) ** -0.5, size=shape)
            values["conv_bias"] = rng.normal(size=channels)
        shifted = self.config.centering is not None
        values["running_mean"] = (1.0 + shifted * values["center_weight"]) * centre + rng.normal(
            size=channels
        )
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
    return (*_data_cases(), *_option_cases(), *_dtype_and_layout_cases(), *_iebn_cases(), *_bnet_cases())


@cache
def quick_cases() -> tuple[Case, ...]:
    """One case for each row of the report: a look in about a minute."""
    first: dict[str, Case] = {}
    for case in all_cases():
        first.setdefault(case.group, case)
    return tuple(first.values())


def _data_cases() -> Iterator[Case]:
    for mode, (data, shape), dtype in itertools.product(MODES, DATA, DTYPES):
        if mode == "eval" or shape not in EVALUATION_SHAPES:
            yield _case(Config(shape[1]), mode, data, shape, dtype)


def _option_cases() -> Iterator[Case]:
    calibrations = [
        {"centering": centering, "scaling": scaling}
        for centering, scaling in itertools.product(STATISTICS, STATISTICS)
    ]
    others: tuple[dict[str, Any], ...] = (
        {"restrict": "hard_sigmoid"},
        {"gamma": False, "beta": False},
        *BATCH_NORM_OPTIONS,
    )
    for mode, options, dtype in itertools.product(MODES, (*calibrations, *others), DTYPES):
        group = "calibrations" if options in calibrations else "options"
        yield _option_case(Config(OPTION_SHAPE[1], **options), mode, options, group, dtype)


def _dtype_and_layout_cases() -> Iterator[Case]:
    for mode, dtype in itertools.product(MODES, HALF_DTYPES):
        for data, shape in (("offset0", (2, 5, 7, 7)), ("offset10", (2, 3, 5)), REAL[1]):
            yield _case(Config(shape[1]), mode, data, shape, dtype)
    for mode, shape, dtype in itertools.product(MODES, ((2, 5, 7, 7), *OTHER_SHAPES), DTYPES):
        yield _case(Config(shape[1]), mode, "offset0", shape, dtype, layout="channels_last")


def _iebn_cases() -> Iterator[Case]:
    data: tuple[tuple[str, tuple[int, ...]], ...] = (
        ("offset0", (2, 5, 7, 7)),
        ("offset0", (8, 3)),
        ("offset10", (3, 1, 2, 3)),
        *REAL,
    )
    for mode, (source, shape), dtype in itertools.product(MODES, data, DTYPES):
        yield _case(Config.iebn(shape[1]), mode, source, shape, dtype)
    for mode, options, dtype in itertools.product(MODES, BATCH_NORM_OPTIONS, DTYPES):
        yield _option_case(Config.iebn(OPTION_SHAPE[1], **options), mode, options, "options", dtype)
    for mode, dtype in itertools.product(MODES, HALF_DTYPES):
        yield _case(Config.iebn(5), mode, "offset0", (2, 5, 7, 7), dtype)


def _bnet_cases() -> Iterator[Case]:
    spatial = ((7,), (5, 4), (4, 3, 5))
    for mode, size, kernel_size, dtype in itertools.product(MODES, spatial, (3, 5, 7), DTYPES):
        config = Config.bnet(3, kernel_size, len(size))
        yield _case(config, mode, "offset0", (2, 3, *size), dtype, option=f"kernel_size={kernel_size}")
    for mode, (source, shape), dtype in itertools.product(MODES, REAL, DTYPES):
        yield _case(Config.bnet(shape[1]), mode, source, shape, dtype)
    for mode, options, dtype in itertools.product(MODES, BATCH_NORM_OPTIONS, DTYPES):
        yield _option_case(Config.bnet(OPTION_SHAPE[1], **options), mode, options, "options", dtype)
    for mode, dtype in itertools.product(MODES, HALF_DTYPES):
        yield _case(Config.bnet(5), mode, "offset0", (2, 5, 7, 7), dtype)


def _case(
    config: Config,
    mode: str,
    data: str,
    shape: tuple[int, ...],
    dtype: str,
    *,
    layout: str = "channels_first",
    option: str = "",
) -> Case:
    """A case on some data; its row is that of the data, or of the layout where that is not the usual one."""
    layer = config.layer.lower()
    parts = [layer, mode, data, "x".join(map(str, shape)), option, dtype]
    row = data
    if layout != "channels_first":
        parts, row = [*parts, layout], layout
    return Case(
        id="/".join(filter(None, parts)),
        group=f"{layer}/{mode}/{row}/{dtype}",
        config=config,
        training=mode == "train",
        steps=MODES[mode],
        data=data,
        shape=shape,
        dtype=dtype,
        layout=layout,
    )


def _option_case(config: Config, mode: str, options: dict[str, Any], group: str, dtype: str) -> Case:
    """A case of some options, on the shape that all of them share."""
    spelled = ",".join(f"{name}={value}" for name, value in options.items())
    layer = config.layer.lower()
    return replace(
        _case(config, mode, "offset0", OPTION_SHAPE, dtype),
        steps=OPTION_STEPS[mode],
        id=f"{layer}/{mode}/{spelled}/{dtype}",
        group=f"{layer}/{mode}/{group}/{dtype}",
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
