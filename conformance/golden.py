"""Golden files: inputs and outputs of every layer and option at 50 digits, for other languages.

`docs/golden.md` describes the format. The files are the reference's own results, run on numbers of 60 digits;
reading them takes no more than NumPy, writing them takes mpmath:

    python -m rbn.conformance.golden FOLDER
"""

from __future__ import annotations

import itertools
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import typer
from rich.progress import track

from rbn.conformance.tolerances import tolerances
from rbn_core.config import Config
from rbn_core.matching import State
from rbn_core.options import INSTANCE_STATISTICS
from rbn_core.reference import Array, Layer

FOLDER = Path(__file__).with_name("golden")
FORMAT = 1
DIGITS = 50
GUARD_DIGITS = 10
"""Carried on top of those written, so that no rounding on the way shows in what is written."""

EQUATIONS = {
    "RBN": "Gao et al., Representative Batch Normalization with Feature Calibration, CVPR 2021, eq. 12",
    "IEBN": "Liang et al., Instance Enhancement Batch Normalization, AAAI 2020",
    "BNET": "Xu et al., Batch Normalization with Enhanced Linear Transformation, 2020",
}
"""Each layer's source; its name in lower case is that of its file."""

STEPS = {"train": 2, "eval": 1}
"""Each mode and its steps; the running statistics are written after every step."""

SHAPE = (2, 3, 2, 3)
"""The shape on which every option runs."""

OTHER_SHAPES = ((5, 3), (3, 2, 4), (2, 3, 2, 1, 3))
"""No, one and three spatial axes."""

DEFAULTS: dict[str, Any] = {"eps": 2.0**-17, "momentum": 0.875}
"""Close to the layers' own 1e-5 and 0.9, but the same number in every precision."""

OFFSET = 1000.0
"""The mean of an input on which a variance from E[X^2] - E[X]^2 is wrong."""

BATCH_NORM_OPTIONS: tuple[dict[str, Any], ...] = (
    {"running_var": "biased"},
    {"momentum": None},
    {"momentum": 0.0},
    {"momentum": 1.0},
    {"eps": 0.125},
    {"track_running_stats": False},
)
"""Options that all three layers have."""

AFFINE_OPTIONS: tuple[dict[str, Any], ...] = (
    {"gamma": False},
    {"beta": False},
    {"gamma": False, "beta": False},
)
"""Options that RBN and IEBN have."""


@dataclass(frozen=True)
class Step:
    """One forward and backward pass.

    Attributes:
        x: The input.
        cotangent: The gradient of y, of its shape.
        y: The output.
        dx: The gradient of x.
        gradients: Every parameter's, under its canonical name.
        statistics: Those stored after the step, under canonical names.
        tolerances: How far each result may be off, in units of the dtype's machine epsilon, under the names
            of `rbn.conformance.tolerances`.
    """

    x: Array
    cotangent: Array
    y: Array
    dx: Array
    gradients: State
    statistics: State
    tolerances: dict[str, float]


@dataclass(frozen=True)
class Case:
    """A layer, where it starts, and what its steps give.

    Attributes:
        id: What names the case, such as "rbn/train/momentum=None/2x3x2x3".
        config: The layer's options.
        training: Training steps or evaluation steps.
        shape: The input's shape, (N, C, *spatial).
        state: What the layer stores before the first step, under canonical names.
        steps: The steps, in order.
    """

    id: str
    config: Config
    training: bool
    shape: tuple[int, ...]
    state: State
    steps: tuple[Step, ...]


def load(number: Callable[[str], Any] = float) -> tuple[Case, ...]:
    """Every case of the golden files.

    Args:
        number: What makes a number of its decimal digits; `numpy.longdouble` keeps more of them.
    """

    def array(entry: Mapping[str, Any]) -> Array:
        return np.reshape(np.array([number(value) for value in entry["values"]]), entry["shape"])

    def arrays(entries: Mapping[str, Any]) -> State:
        # The counter is the only integer.
        return {
            name: array(entry) if name != "num_batches_tracked" else np.array(int(entry["values"][0]))
            for name, entry in entries.items()
        }

    def step(entry: Mapping[str, Any]) -> Step:
        return Step(
            x=array(entry["x"]),
            cotangent=array(entry["cotangent"]),
            y=array(entry["y"]),
            dx=array(entry["dx"]),
            gradients=arrays(entry["gradients"]),
            statistics=arrays(entry["statistics"]),
            tolerances=entry["tolerances"],
        )

    return tuple(
        Case(
            id=entry["id"],
            config=Config(layer=entry["layer"], **entry["options"]),
            training=entry["training"],
            shape=tuple(entry["shape"]),
            state=arrays(entry["state"]),
            steps=tuple(map(step, entry["steps"])),
        )
        for layer in EQUATIONS
        for entry in json.loads((FOLDER / f"{layer.lower()}.json").read_text())["cases"]
    )


def write(folder: Path) -> None:
    """Write the golden files, one for each layer, which takes some seconds.

    Args:
        folder: Where to; created where it is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for layer, source in EQUATIONS.items():
        chosen = [setting for setting in settings() if setting[1].layer == layer]
        content = {
            "format": FORMAT,
            "layer": layer,
            "equations": source,
            "digits": DIGITS,
            "cases": [entry_of(computed(*setting)) for setting in track(chosen, f"{layer.lower()}.json")],
        }
        (folder / f"{layer.lower()}.json").write_text(text_of(content))


def settings() -> Iterator[tuple[str, Config, str, tuple[int, ...], float]]:
    """The id, options, mode, shape and offset of every case, in the order of the files."""
    calibrations = [
        {"centering": centering, "scaling": scaling}
        for centering, scaling in itertools.product(INSTANCE_STATISTICS, INSTANCE_STATISTICS)
    ]
    hard = [{"restrict": "hard_sigmoid", "scaling": scaling} for scaling in ("channel_mean", "spatial_mean")]
    kernels: list[tuple[tuple[int, ...], dict[str, Any]]] = [
        ((2, 2, *size), {"kernel_size": kernel_size, "spatial_dims": len(size)})
        for size, kernel_size in itertools.product(((5,), (4, 3), (3, 2, 3)), (3, 5, 7))
    ]
    options_of: dict[str, tuple[dict[str, Any], ...]] = {
        "RBN": (*calibrations, *hard, *AFFINE_OPTIONS, *BATCH_NORM_OPTIONS),
        "IEBN": ({}, *AFFINE_OPTIONS, *BATCH_NORM_OPTIONS),
        "BNET": BATCH_NORM_OPTIONS,
    }
    for layer, mode in itertools.product(EQUATIONS, STEPS):
        on_shapes = kernels if layer == "BNET" else [(shape, {}) for shape in OTHER_SHAPES]
        for shape, options in [*((SHAPE, options) for options in options_of[layer]), *on_shapes]:
            if mode == "eval" and options.keys() & {"momentum", "running_var"}:
                continue  # these are about training alone
            spelled = ",".join(f"{name}={value}" for name, value in options.items())
            parts = (layer.lower(), mode, spelled, "x".join(map(str, shape)))
            config = Config.of(layer, shape[1], **DEFAULTS | options)
            yield "/".join(filter(None, parts)), config, mode, shape, 0.0
    for layer in ("RBN", "BNET"):  # IEBN's attention to such an input is 0 or 1
        config = Config.of(layer, SHAPE[1], **DEFAULTS)
        yield f"{layer.lower()}/train/offset1000/2x3x2x3", config, "train", SHAPE, OFFSET


def computed(name: str, config: Config, mode: str, shape: tuple[int, ...], offset: float) -> Case:
    """A case with all its numbers: what its id draws, and what the reference makes of it."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    state = drawn_state(rng, config)
    exactly, ordinarily = Exact(config), Layer(config)
    exactly.load(state)
    ordinarily.load(state)
    steps = []
    for _ in range(STEPS[mode]):
        x = offset + rng.integers(-128, 257, shape) / 64.0
        cotangent = rng.integers(-192, 193, shape) / 64.0
        y = exactly.forward(x, training=mode == "train")
        dx, gradients = exactly.backward(cotangent)
        allowed = tolerances_of(ordinarily, x, cotangent, training=mode == "train")
        steps.append(Step(x, cotangent, y, dx, gradients, dict(exactly.statistics), allowed))
    return Case(name, config, mode == "train", shape, state, tuple(steps))


def tolerances_of(layer: Layer, x: Array, cotangent: Array, training: bool) -> dict[str, float]:
    """The suite's tolerances for one step of the float64 reference, in units of machine epsilon."""
    before = dict(layer.statistics)
    layer.forward(x, training)
    layer.backward(cotangent)
    unit = float(np.finfo(np.float64).eps)
    allowed = tolerances(layer, cotangent, before, "float64")
    # To three digits, so that how NumPy rounds does not show.
    return {name: float(f"{tolerance / unit:.3g}") for name, tolerance in allowed.items()}


def drawn_state(rng: np.random.Generator, config: Config) -> State:
    """A state without a value at which a mistake could hide: no zero, no one, no equal channels.

    All are multiples of 1 / 64 from 1/4 up to 2 in magnitude, and so the same in every precision.
    """
    magnitudes = np.delete(np.arange(16, 128), 64 - 16) / 64.0
    state: State = {}
    for name, shape in config.state_shapes().items():
        values = rng.choice(magnitudes, shape, replace=name == "conv_weight")
        state[name] = values if name == "running_var" else values * rng.choice([-1.0, 1.0], shape)
    if config.restrict == "hard_sigmoid":
        state["scale_weight"] *= 4.0  # into both corners
    if config.track_running_stats:
        state["num_batches_tracked"] = np.array(7)
    return state


class Exact(Layer):
    """The reference on numbers of 60 digits: every array holds mpmath's, which NumPy calculates with."""

    dtype = object  # type: ignore[assignment] # NumPy has no such floating-point type

    def load(self, state: Mapping[str, Any]) -> None:
        """Load a state; the counter too becomes a number of 60 digits, since eq. 3 divides by it."""
        super().load(state)
        for own in (self.parameters, self.statistics):
            own.update({name: exact(value) for name, value in own.items()})

    def forward(self, x: Any, training: bool) -> Array:
        """Y, to 60 digits."""
        return super().forward(exact(x), training)

    def check_input(self, x: Array, batch_statistics: bool) -> None:
        """Refuse what the float64 reference refuses."""
        super().check_input(x.astype(np.float64), batch_statistics)

    def backward(self, dy: Any) -> tuple[Array, dict[str, Array]]:
        """The gradients, to 60 digits."""
        return super().backward(exact(dy))


def exact(values: Any) -> Any:
    """Numbers as those of `arithmetic`, without rounding."""
    return np.frompyfunc(arithmetic().mpf, 1, 1)(values)


@cache
def arithmetic() -> Any:
    """An mpmath of its own precision, whose numbers have the methods that np.sqrt and np.exp call."""
    import mpmath  # type: ignore[import-untyped] # only writing needs it

    context = mpmath.MPContext()
    context.dps = DIGITS + GUARD_DIGITS
    context.mpf.sqrt = lambda number: context.sqrt(number)
    context.mpf.exp = lambda number: context.exp(number)
    return context


def entry_of(case: Case) -> dict[str, Any]:
    """A case as it is written."""
    options = asdict(case.config)
    return {
        "id": case.id,
        "layer": options.pop("layer"),
        "options": options,
        "training": case.training,
        "shape": list(case.shape),
        "state": entries_of(case.state),
        "steps": [
            entries_of({"x": step.x, "cotangent": step.cotangent, "y": step.y, "dx": step.dx})
            | {"gradients": entries_of(step.gradients), "statistics": entries_of(step.statistics)}
            | {"tolerances": step.tolerances}
            for step in case.steps
        ],
    }


def entries_of(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Every array with its shape and its digits, in row-major order."""
    return {
        name: {
            "shape": list(np.shape(array)),
            "values": [digits_of(number) for number in np.ravel(exact(array))],
        }
        for name, array in arrays.items()
    }


def digits_of(number: Any) -> str:
    """A number to 50 significant digits; what is only rounding of a zero is a zero."""
    if abs(number) < 10.0**-DIGITS:
        return "0"
    digits: str = arithmetic().nstr(number, DIGITS)
    return digits.removesuffix(".0")


def text_of(content: dict[str, Any]) -> str:
    """JSON with every array and every set of plain values on a line of its own."""

    def one_line(found: re.Match[str]) -> str:
        return re.sub(r"\n *", "", re.sub(r",\n *", ", ", found[0]))

    # The innermost objects, and a case's shape.
    return re.sub(r"\{[^{}]*\}|\[[^][{}]*\]", one_line, json.dumps(content, indent=1)) + "\n"


if __name__ == "__main__":
    typer.run(write)
