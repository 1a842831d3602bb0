"""A case: one thing to check, as plain data with an id that says all of it."""

from __future__ import annotations

import ast
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from rbn.conformance.data import DATA, EXTREMES, OFFSETS, REAL, REAL_SHAPES, Array, centre, magnitude, numbers
from rbn_core.config import FLOATING, Config
from rbn_core.errors import RBNError, RBNValueError
from rbn_core.matching import State
from rbn_core.options import LAYERS as OURS

LAYERS = (*map(str.lower, OURS), "bn")
"""What a case can be of; "bn" is plain BatchNorm, RBN without its calibrations."""

LAYOUTS = ("channels_first", "channels_last", "strided", "expanded")
"""How the framework's input lies in memory: contiguous with the channels first or last, every second value of
a larger array, or one image repeated with stride 0."""

WAYS = ("vmap", "pmap", "shard_map", "shard_map_unchecked", "jit")
"""How devices share a batch in a framework that knows more than one way: JAX's transformations over a named
axis, of which `shard_map` has a check of its own that can be off, and `jit` on a sharded array."""

PRECISIONS_OF: dict[str, dict[str, str]] = {
    "": {"mixed_float16": "float16", "mixed_bfloat16": "bfloat16"},
    "torch": {
        "autocast_float16": "float16",
        "autocast_bfloat16": "bfloat16",
        "autocast_float16_scaled": "float16",
    },
    "flax": {
        "dtype_float16": "float16",
        "dtype_bfloat16": "bfloat16",
        "dtype_float32": "bfloat16",
        "param_float16": "float16",
        "param_float16_dtype_float32": "float16",
        "param_float16_dtype_float16": "float16",
        "param_float16_dtype_bfloat16": "bfloat16",
        "param_bfloat16": "bfloat16",
        "param_bfloat16_dtype_float32": "bfloat16",
        "param_bfloat16_dtype_float16": "bfloat16",
        "param_bfloat16_dtype_bfloat16": "bfloat16",
    },
    "mindspore": {
        f"{way}{mode}": "float16"
        for mode in ("", ".graph")
        for way in ("O2", "O3", "O1", "auto", "to_float16", "custom")
    },
    "jittor": {
        f"level{level}{made}": "float16" for made in ("", ".outside") for level in (5, 6, 4, 3, 2, 1, 0)
    },
}
"""The ways into mixed precision, each with the narrowest type that is in play, under the framework that has
them; any layer can have those of "".

In Flax they are the dtypes of the parameters and of the work, where these are not float32 and the promoted
one; in MindSpore and Jittor the levels that they know, also in graph mode (".graph") and with an input that
was made before the level was set (".outside"). "scaled" has a loss scale. A quick run takes the first ones.
"""

PRECISIONS: dict[str, str] = {way: dtype for ways in PRECISIONS_OF.values() for way, dtype in ways.items()}
"""Every way into mixed precision, and the narrowest type that is in play."""

REFUSED_SPOILS = ("short", "one", "long", "empty", "elsewhere")
"""What is stored is no vector of the layer's: C - 1 values, a single one, which would broadcast, 2 C of them,
or none; or it is on another device."""

SHARED_SPOILS = ("shared", "shared_compiled")
"""What is stored lies in the memory of another stored array, and the step may be compiled."""

SPOILS = (
    *REFUSED_SPOILS,
    "missing",
    "half",
    "double",
    "integer",
    "read_only",
    *SHARED_SPOILS,
    "subclass",
    "strided",
)
"""What can happen to an array that a layer stores. Beside the above: it is gone; it is float16, float64 or
integers; it is not to be written to; it shares its memory; it is of a subclass that wraps another array; it
is every second value of a larger array."""

SHARED_WITH = {
    "gamma": ("running_var",),
    "beta": ("running_mean",),
    "center_weight": ("gamma",),
    "scale_weight": ("beta",),
    "scale_bias": ("gamma",),
    "conv_bias": ("running_mean",),
    "running_mean": ("beta", "conv_bias"),
    "running_var": ("gamma", "conv_bias"),
}
"""In whose memory a shared array lies: the first of these that the layer has."""

LARGE = 10**6
"""From so many values on a case has one step."""

OPTIONS = tuple(
    field.name
    for field in fields(Config)
    if field.name not in ("num_features", "spatial_dims", "layer")  # the shape and the layer's name say these
)


@dataclass(frozen=True)
class Case:
    """One thing to check: a layer, a mode, some data and a dtype.

    Attributes:
        config: The layer's options.
        training: Training steps or evaluation steps.
        data: Where the numbers come from, one of `data.DATA`.
        shape: The input's shape, (N, C, *spatial).
        dtype: The input's dtype.
        layout: How the input lies in memory, one of `LAYOUTS`.
        shares: How many images of the batch each of several devices has; empty on a single device.
        way: How these share their statistics, one of `WAYS`; empty is the subject's usual one.
        precision: The way into mixed precision, one of `PRECISIONS`; the case's dtype is then the narrowest
            in play, in which the input, the cotangent and the state are exact.
        spoilt: What happens to what the layer stores before its only step, such as "center_weight:short": a
            canonical name and one of `SPOILS`.
        variant: Which of the many sets of numbers; what `--seeds` counts.
    """

    config: Config
    training: bool
    data: str
    shape: tuple[int, ...]
    dtype: str
    layout: str = "channels_first"
    shares: tuple[int, ...] = ()
    way: str = ""
    precision: str = ""
    spoilt: str = ""
    variant: int = 0

    @property
    def layer(self) -> str:
        """One of `LAYERS`."""
        return layer_of(self.config)

    @property
    def mode(self) -> str:
        """What the id calls training and evaluation."""
        return "train" if self.training else "eval"

    @property
    def options(self) -> dict[str, Any]:
        """The options that differ from the layer's defaults."""
        usual = config_of(self.layer, self.shape, {})
        mine = {name: getattr(self.config, name) for name in OPTIONS}
        return {name: value for name, value in mine.items() if value != getattr(usual, name)}

    @property
    def id(self) -> str:
        """The case's name, such as "rbn/train/offset1000/2x5x7x7/float32"; `parse` reads it."""
        parts = [
            self.layer,
            self.mode,
            self.data,
            "x".join(map(str, self.shape)),
            ",".join(f"{name}={value}" for name, value in self.options.items()),
            self.dtype,
            "" if self.layout == "channels_first" else self.layout,
            f"shares={'+'.join(map(str, self.shares))}" if self.shares else "",
            self.way,
            f"precision={self.precision}" if self.precision else "",
            f"spoilt={self.spoilt}" if self.spoilt else "",
            f"seed={self.variant}" if self.variant else "",
        ]
        return "/".join(filter(None, parts))

    @property
    def refused(self) -> bool:
        """Whether a layer must refuse it: one value per channel has no variance."""
        batch_statistics = self.training or not self.config.track_running_stats
        return batch_statistics and math.prod(self.shape) <= self.shape[1]

    @property
    def spoil(self) -> tuple[str, str]:
        """The name that is spoilt, and the kind, one of `SPOILS`; both empty if nothing is."""
        name, _, kind = self.spoilt.partition(":")
        return name, kind

    @property
    def partner(self) -> str:
        """The name in whose memory the spoilt array lies, if it is shared; else empty."""
        name, kind = self.spoil
        there = self.config.state_shapes()
        if kind not in SHARED_SPOILS:
            return ""
        return next((other for other in SHARED_WITH[name] if other in there), "")

    @property
    def group(self) -> str:
        """The row of the report that the case belongs to."""
        if self.spoilt:
            return f"{self.layer}/{self.mode}/hostile"
        if self.precision:
            return f"{self.layer}/{self.mode}/mixed/{self.dtype}"
        if self.refused:
            return f"{self.layer}/{self.mode}/refused"
        if self.way:
            return f"{self.layer}/{self.mode}/shares/{self.way}"
        if self.shares:
            return f"{self.layer}/{self.mode}/shares={'+'.join(map(str, self.shares))}"
        if self.dtype not in ("float32", "float64"):
            return f"{self.layer}/{self.mode}/half"
        if self.layout != "channels_first":
            row = "channels_last" if self.layout == "channels_last" else "strided"
        elif self.options.keys() - {"kernel_size"}:
            row = "options" if self.options.keys() - {"centering", "scaling"} else "calibrations"
        elif self.data in OFFSETS and self.layer == "rbn":
            row = self.data
        else:
            row = "extremes" if self.data in EXTREMES else "real" if self.data in REAL else "data"
        return f"{self.layer}/{self.mode}/{row}/{self.dtype}"

    @property
    def steps(self) -> int:
        """How many steps it takes; the running statistics are compared after every one.

        Two are enough for the many cases of options and of mixed precision, and one for large planes and for
        what is spoilt.
        """
        if not self.training or math.prod(self.shape) > LARGE or self.spoilt:
            return 1
        return 2 if self.precision or self.options.keys() - {"kernel_size"} else 3

    @property
    def features(self) -> dict[str, str]:
        """What the case covers: every option with its value."""
        c = self.config
        options: dict[str, object] = {
            "layer": self.layer,
            "mode": self.mode,
            "dtype": self.dtype,
            "layout": self.layout,
            "spatial axes": len(self.shape) - 2,
            "data": self.data,
            "devices": f"{len(self.shares) or 1}{self.way and f' by {self.way}'}",
            "mixed precision": self.dtype if self.precision else None,
            "spoilt": self.spoil[1] or None,
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
        """A seed that the id alone decides, so that a case is the same wherever it runs.

        All ways into mixed precision have the same numbers, so that they can be compared.
        """
        return zlib.crc32(self.generic.id.encode())

    @property
    def generic(self) -> Case:
        """The same case in the way into mixed precision that any layer can have."""
        return replace(self, precision=f"mixed_{self.dtype}") if self.precision else self

    def state(self) -> State:
        """What the layer stores at the start, exact in the dtype of its parameters.

        In mixed precision it is exact in the narrowest dtype; what will be spoilt is exact in what it becomes
        and has the values of the array whose memory it will share: no cast and no `Subject.spoil` changes a
        number. No value is one at which a mistake could hide: no zero, no one, no equal channels. The running
        statistics are near those of X_cm, whose mean is (1 + w_m) E(X) by eq. 6, as in a trained layer.
        """
        rng = np.random.default_rng(self.seed)
        channels = self.config.num_features
        values = {
            "gamma": rng.uniform(0.5, 2.0, channels) * rng.choice([-1.0, 1.0], channels),
            "beta": rng.normal(size=channels),
            "center_weight": rng.normal(scale=0.5, size=channels),
            "scale_weight": rng.normal(size=channels),
            "scale_bias": rng.normal(loc=1.0, scale=0.5, size=channels),
            "running_var": rng.uniform(0.5, 2.0, channels),
            "num_batches_tracked": np.array(7),
        }
        if (
            self.config.restrict == "hard_sigmoid"
        ):  # the ends of R, far from the corners, where it has two slopes
            values["scale_weight"][[0, -1]] *= 0.25
            values["scale_bias"][[0, -1]] += [5.0, -6.0]
        if self.config.kernel_size is not None:
            shape = self.config.state_shapes()["conv_weight"]
            values["conv_weight"] = rng.normal(scale=math.prod(shape[2:]) ** -0.5, size=shape)
            values["conv_bias"] = rng.normal(size=channels)
        shifted = self.config.centering is not None
        values["running_mean"] = (1.0 + shifted * values["center_weight"]) * centre(self.data)
        values["running_mean"] += rng.normal(size=channels)
        scale = magnitude(self.data, self.dtype)
        values |= {
            "running_mean": scale * values["running_mean"],
            "running_var": scale**2 * values["running_var"],
        }
        name, kind = self.spoil
        if kind == "half":
            values[name] = values[name].astype(np.float16)
        elif kind == "integer" and name != "num_batches_tracked":
            values[name] = np.copysign(np.maximum(np.rint(np.abs(values[name])), 1.0), values[name])
        elif kind in SHARED_SPOILS:  # a variance is positive: it decides
            values |= {self.partner: values[name]} if name == "running_var" else {name: values[self.partner]}
        exact = self.dtype if self.precision else np.float64
        stored = np.promote_types(self.dtype, np.float32)
        return {
            name: values[name].astype(exact).astype(stored) if shape else values[name]
            for name, shape in self.config.state_shapes().items()
        }

    def inputs(self) -> Iterator[tuple[Array, Array]]:
        """The input and the cotangent of every step, in the case's dtype."""
        rng = np.random.default_rng([self.seed, 1])
        for step in range(self.steps):
            x = numbers(self.data, self.shape, self.dtype, step, rng)
            if self.layout == "expanded":
                x = np.broadcast_to(x[:1], self.shape)
            yield x.astype(self.dtype), rng.normal(size=self.shape).astype(self.dtype)


def layer_of(config: Config) -> str:
    """Which of `LAYERS` a config describes."""
    plain = config.layer == "RBN" and config.centering is None and config.scaling is None
    return "bn" if plain else config.layer.lower()


def config_of(layer: str, shape: tuple[int, ...], options: dict[str, Any]) -> Config:
    """The config of one of `LAYERS` for inputs of a shape; what `options` leaves out is the default."""
    channels, spatial_dims = shape[1], len(shape) - 2
    off = {"centering": None, "scaling": None} if layer == "bn" else {}
    name = "RBN" if layer == "bn" else layer.upper()
    return Config.of(name, channels, spatial_dims=spatial_dims, **(off | options))


def parse(case_id: str) -> Case:
    """The case that an id describes, whether or not it is one of the suite's; options in any order.

    Raises:
        RBNValueError: It is no case's id.
    """
    try:
        layer, mode, data, sizes, *rest = case_id.split("/")
        shape = tuple(int(size) for size in sizes.split("x"))
        options: dict[str, Any] = {}
        if rest and "=" in rest[0]:
            options = {name: _value(value) for name, value in _pairs(rest.pop(0))}
        case = Case(config_of(layer, shape, options), mode == "train", data, shape, rest.pop(0))
        if rest and rest[0] in LAYOUTS:
            case = replace(case, layout=rest.pop(0))
        if rest and rest[0].startswith("shares="):
            shares = rest.pop(0).removeprefix("shares=").split("+")
            case = replace(case, shares=tuple(int(images) for images in shares))
            if rest and rest[0] in WAYS:
                case = replace(case, way=rest.pop(0))
        if rest and rest[0].startswith("precision="):
            case = replace(case, precision=rest.pop(0).removeprefix("precision="))
        if rest and rest[0].startswith("spoilt="):
            case = replace(case, spoilt=rest.pop(0).removeprefix("spoilt="))
        if rest:
            case = replace(case, variant=int(rest.pop(0).removeprefix("seed=")))
    except (ValueError, IndexError, TypeError, RBNError) as error:
        raise RBNValueError(f"{_not_an_id(case_id)} ({error})") from error
    known = layer in LAYERS and mode in ("train", "eval") and data in DATA and case.dtype in FLOATING
    fits = REAL_SHAPES.get(data, shape) == shape and sum(case.shares) in (0, shape[0])
    mixed = PRECISIONS.get(case.precision) == (case.dtype if case.precision else None)
    if rest or not known or not fits or not mixed or not _can_be_spoilt(case):
        raise RBNValueError(_not_an_id(case_id))
    return case


def _can_be_spoilt(case: Case) -> bool:
    """Whether what is spoilt is there, if anything is."""
    name, kind = case.spoil
    if not case.spoilt:
        return True
    if name not in case.config.state_shapes() or kind not in SPOILS:
        return False
    if kind in SHARED_SPOILS:
        return name in SHARED_WITH and bool(case.partner)
    return kind == "missing" or name != "num_batches_tracked"


def _pairs(text: str) -> Iterator[tuple[str, str]]:
    for pair in text.split(","):
        name, value = pair.split("=")
        yield name, value


def _value(text: str) -> Any:
    """An option's value; a word that Python does not know is a string."""
    try:
        return ast.literal_eval(text)
    except ValueError:
        return text


def _not_an_id(case_id: str) -> str:
    return (
        f"expected the id of a case, such as rbn/train/offset10/2x5x7x7/eps=0.1/float32, got {case_id!r}. "
        "`rbn conform --list` shows those of the suite."
    )
