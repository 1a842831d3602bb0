"""A layer's options and inputs, validated in one place with one text for all frameworks."""

from __future__ import annotations

import difflib
import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np

from rbn_core.errors import RBNError, RBNTypeError, RBNValueError

Statistic = Literal["channel_mean", "channel_std", "spatial_mean", "spatial_std"]
"""An instance statistic of the paper's Table 3: mu_c, sigma_c, mu_s, sigma_s."""

CHANNEL_STATISTICS: tuple[Statistic, ...] = ("channel_mean", "channel_std")
SPATIAL_STATISTICS: tuple[Statistic, ...] = ("spatial_mean", "spatial_std")
STATISTICS = (*CHANNEL_STATISTICS, *SPATIAL_STATISTICS, None)
RESTRICTIONS = ("sigmoid", "hard_sigmoid")
RUNNING_VARIANCES = ("unbiased", "biased")
FLOATING = ("float16", "bfloat16", "float32", "float64")

CALIBRATION_STARTS = {"center_weight": 0.0, "scale_weight": 0.0, "scale_bias": 1.0}
"""Where w_m, w_v and w_b start, so that the calibrations play no role at first (Section 4.1 of the paper)."""

LayerType = TypeVar("LayerType", bound=type[Any])


@dataclass(frozen=True)
class Config:
    """The options of an RBN layer, checked when it is made.

    Args:
        num_features: C, the number of channels; a positive integer.
        eps: epsilon of eq. 1, added to a variance under its root; positive.
        momentum: m of eq. 3, the weight of the *old* running value, in [0, 1]; `None` averages all
            batches seen so far with equal weight.
        centering: K_m of eq. 5; `None` leaves the centering calibration out.
        scaling: K_s of eq. 9; `None` leaves the scaling calibration out.
        restrict: R of eq. 9.
        running_var: which batch variance eq. 3 accumulates: divided by n - 1 or by n.
        gamma: whether the scale of eq. 1's affine step is there and learned.
        beta: whether its shift is.
        track_running_stats: whether running statistics are kept; without them evaluation uses the batch's.

    Raises:
        RBNError: An option is unknown, of the wrong type or out of range.
    """

    num_features: int
    eps: float = 1e-5
    momentum: float | None = 0.9
    centering: Statistic | None = "channel_mean"
    scaling: Statistic | None = "channel_mean"
    restrict: str = "sigmoid"
    running_var: str = "unbiased"
    gamma: bool = True
    beta: bool = True
    track_running_stats: bool = True

    def __post_init__(self) -> None:
        _check_count("num_features", self.num_features)
        _check_eps(self.eps)
        check_momentum(self.momentum)
        check_choice("centering", self.centering, STATISTICS)
        check_choice("scaling", self.scaling, STATISTICS)
        check_choice("restrict", self.restrict, RESTRICTIONS)
        check_choice("running_var", self.running_var, RUNNING_VARIANCES)

    @property
    def parameters(self) -> dict[str, float]:
        """The canonical names of the learned parameters, each of shape (C,), and where they start."""
        starts = {"gamma": 1.0, "beta": 0.0} | CALIBRATION_STARTS
        present = {
            "gamma": self.gamma,
            "beta": self.beta,
            "center_weight": self.centering is not None,
            "scale_weight": self.scaling is not None,
            "scale_bias": self.scaling is not None,
        }
        return {name: starts[name] for name in starts if present[name]}

    @property
    def statistics(self) -> tuple[str, ...]:
        """The canonical names of the state that training accumulates."""
        return ("running_mean", "running_var", "num_batches_tracked") if self.track_running_stats else ()

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of everything the layer stores, under its canonical name."""
        names = (*self.parameters, *self.statistics)
        return {name: () if name == "num_batches_tracked" else (self.num_features,) for name in names}

    @property
    def uses_spatial_statistics(self) -> bool:
        """Whether a statistic over the channels is used; those have no two-pass form."""
        return self.centering in SPATIAL_STATISTICS or self.scaling in SPATIAL_STATISTICS


def old_value_weight(momentum: float | None) -> float | None:
    """The paper's m of a momentum that weighs the new value, as PyTorch's and Jittor's do.

    Raises:
        RBNError: The momentum, as the user gave it, is not a number in [0, 1] or `None`.
    """
    check_momentum(momentum)
    return None if momentum is None else 1.0 - momentum


def check_momentum(momentum: float | None) -> None:
    """Refuse what is not a momentum; the interval is the same in either convention."""
    if momentum is None:
        return
    if not isinstance(momentum, int | float | np.number) or isinstance(momentum, bool):
        raise RBNTypeError(
            f"RBN: expected momentum to be a number in [0, 1] or None, got {momentum!r}. "
            "Pass a float, or None for the average of all batches."
        )
    if not 0 <= momentum <= 1:
        raise RBNValueError(
            f"RBN: expected momentum in [0, 1], got {momentum!r}. "
            "Pass a weight between 0 and 1, or None for the average of all batches."
        )


def check_input(
    shape: tuple[int, ...], dtype: str, num_features: int, *, training: bool, axis: int = 1
) -> None:
    """Refuse an input that no RBN layer can normalize, before any statistic changes.

    Args:
        shape: The input's shape, (N, C, *spatial) up to the place of the channel axis.
        dtype: The bare name of the input's dtype, such as "float32".
        num_features: C, what the layer was built for.
        training: Whether batch statistics are about to be taken.
        axis: The channel axis; negative counts from the end.

    Raises:
        RBNTypeError: The dtype is not one of float16, bfloat16, float32, float64.
        RBNValueError: The rank, the channel count, or in training the number of values is wrong.
    """
    if dtype not in FLOATING:
        raise RBNTypeError(
            f"RBN: expected a floating-point input, got dtype {dtype}. "
            "Convert the input first, for example to float32."
        )
    shape = tuple(shape)
    if len(shape) < 2:
        raise RBNValueError(
            f"RBN: expected an input with a batch and a channel axis, got shape {shape}. "
            "Add the missing axes: one image is a batch of 1."
        )
    axis %= len(shape)
    channels = shape[axis]
    if channels != num_features:
        raise RBNValueError(
            f"RBN: expected {num_features} channels on axis {axis}, got an input of shape {shape}. "
            f"Build the layer with num_features={channels}, or move the channels to axis {axis}."
        )
    if not training:
        return
    per_channel = math.prod(shape) // channels
    if per_channel == 0:
        raise RBNValueError(
            f"RBN: expected values to train on, got an empty input of shape {shape}. "
            "Skip empty batches, or switch the layer to evaluation."
        )
    if per_channel == 1:
        raise RBNValueError(
            f"RBN: expected more than one value per channel in training, got an input of shape {shape}. "
            "Use a larger batch, or switch the layer to evaluation."
        )


def refuse_unknown_options(layer: LayerType) -> LayerType:
    """Class decorator: an unknown keyword of the constructor is the common error in every framework."""
    construct: Callable[..., None] = vars(layer)["__init__"]
    known = [name for name in inspect.signature(construct).parameters if name != "self"]

    @functools.wraps(construct)
    def checked(self: Any, *args: Any, **options: Any) -> None:
        for option in options:
            if option not in known:
                near = difflib.get_close_matches(option, known, n=1)
                way_out = f"Did you mean {near[0]!r}?" if near else "See the layer's documentation."
                raise RBNTypeError(
                    f"{layer.__name__}: expected an option of this layer, got {option!r}. {way_out}"
                )
        construct(self, *args, **options)

    setattr(layer, "__init__", checked)  # noqa: B010
    return layer


def _check_count(name: str, value: object) -> None:
    if not isinstance(value, int | np.integer) or isinstance(value, bool):
        raise RBNTypeError(f"RBN: expected {name} to be a positive integer, got {value!r}. Pass an int.")
    if value <= 0:
        raise RBNValueError(
            f"RBN: expected {name} to be a positive integer, got {value!r}. Pass the number of channels."
        )


def _check_eps(eps: object) -> None:
    if not isinstance(eps, int | float | np.number) or isinstance(eps, bool):
        raise RBNTypeError(
            f"RBN: expected eps to be a positive number, got {eps!r}. Pass a float such as 1e-5."
        )
    if not 0 < eps < math.inf:
        raise RBNValueError(
            f"RBN: expected eps to be positive and finite, got {eps!r}. Pass a small number such as 1e-5."
        )


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    """Refuse a value that is none of an option's choices."""
    if value in choices:
        return
    wrong: type[RBNError] = RBNValueError if isinstance(value, str) else RBNTypeError
    listed = ", ".join(repr(choice) for choice in choices)
    raise wrong(f"RBN: expected {name} to be one of {listed}, got {value!r}. Choose one of these.")
