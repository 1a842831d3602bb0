"""A layer's options and inputs, validated in one place with one text for all frameworks."""

from __future__ import annotations

import difflib
import functools
import inspect
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from rbn_core.errors import RBNError, RBNTypeError, RBNValueError
from rbn_core.options import (
    FRAMEWORKS,
    IMAGE_STATISTICS,
    LAYERS,
    NEW_VALUE,
    OPTIONS,
    Statistic,
    meant,
)

FLOATING = ("float16", "bfloat16", "float32", "float64")

CALIBRATION_STARTS = {"center_weight": 0.0, "scale_weight": 0.0, "scale_bias": 1.0}
"""Where w_m, w_v and w_b start, so that the calibrations play no role at first (Section 4.1 of the paper)."""

IEBN_STARTS = {"scale_weight": 0.0, "scale_bias": -1.0}
"""Where IEBN's weight and bias start."""

CHOSEN = ("centering", "scaling", "restrict", "running_var")
"""The options that say what a layer computes."""

KNOWN = {
    layer: frozenset(itertools.product(*(OPTIONS[name].choices[layer] for name in CHOSEN)))
    for layer in LAYERS
}
"""What these can be together in each layer."""

LayerType = TypeVar("LayerType", bound=type[Any])


@dataclass(frozen=True)
class Config:
    """The options of a layer, checked when it is made.

    Args:
        num_features: C, the number of channels; a positive integer.
        eps: epsilon of eq. 1, added to a variance under its root; positive.
        momentum: m of eq. 3, the weight of the *old* running value, in [0, 1]; `None` averages all
            batches seen so far with equal weight.
        centering: K_m of eq. 5; `None` leaves the centering calibration out.
        scaling: K_s of eq. 9; `None` leaves the scaling calibration out. "input_mean" is IEBN's.
        restrict: R of eq. 9.
        running_var: which batch variance eq. 3 accumulates: divided by n - 1 or by n.
        gamma: whether the scale of eq. 1's affine step is there and learned.
        beta: whether its shift is.
        track_running_stats: whether running statistics are kept; without them evaluation uses the batch's.
        kernel_size: the odd extent of BNET's depthwise convolution, which takes the place of gamma and
            beta; `None` in the other layers.
        spatial_dims: how many axes that convolution has.
        layer: "RBN", "IEBN" or "BNET", what errors call the layer.

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
    kernel_size: int | None = None
    spatial_dims: int = 2
    layer: str = "RBN"

    def __post_init__(self) -> None:
        check_count("num_features", self.num_features, self.layer)
        check_eps(self.eps, self.layer)
        check_momentum(self.momentum, self.layer)
        check_options(self.centering, self.scaling, self.restrict, self.running_var, self.layer)
        if self.layer == "BNET":
            _check_kernel_size(self.kernel_size)
            check_choice(
                "spatial_dims", self.spatial_dims, OPTIONS["spatial_dims"].choices["BNET"], self.layer
            )

    @classmethod
    def of(cls, layer: str, num_features: int, **options: Any) -> Config:
        """The options of one of `rbn_core.options.LAYERS`; what is not said is as usual in that layer.

        Args:
            layer: "RBN", "IEBN" or "BNET".
            num_features: C.
            options: The others, in the conventions of this class.
        """
        usual: dict[str, Any] = {
            name: option.usual(layer) for name, option in OPTIONS.items() if name != "num_features"
        }
        return cls(num_features, layer=layer, **usual | options)

    @classmethod
    def iebn(cls, num_features: int, **options: Any) -> Config:
        """The options of an IEBN layer: BatchNorm, scaled by an attention to X itself."""
        return cls.of("IEBN", num_features, **options)

    @classmethod
    def bnet(cls, num_features: int, kernel_size: int = 3, spatial_dims: int = 2, **options: Any) -> Config:
        """The options of a BNET layer: BatchNorm with a depthwise convolution for its affine step."""
        return cls.of("BNET", num_features, kernel_size=kernel_size, spatial_dims=spatial_dims, **options)

    @property
    def parameters(self) -> dict[str, float]:
        """The canonical names of the learned parameters of shape (C,), and where they start."""
        starts = {"gamma": 1.0, "beta": 0.0} | CALIBRATION_STARTS
        if self.layer == "IEBN":
            starts |= IEBN_STARTS
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
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(self.parameters, (self.num_features,))
        if self.kernel_size is not None:
            shapes["conv_weight"] = (self.num_features, 1, *(self.kernel_size,) * self.spatial_dims)
            shapes["conv_bias"] = (self.num_features,)
        shapes |= dict.fromkeys(self.statistics, (self.num_features,))
        return shapes | ({"num_batches_tracked": ()} if self.track_running_stats else {})

    @property
    def has_two_pass_form(self) -> bool:
        """Whether the statistics follow from the moments of the planes, so that there is a two-pass form."""
        return self.centering not in IMAGE_STATISTICS and self.scaling not in IMAGE_STATISTICS


def config_of(framework: str, layer: Any, **known: Any) -> Config:
    """The options that a framework's layer has now, checked: its attributes can be assigned.

    Args:
        framework: Whose layer it is, of `rbn_core.options.FRAMEWORKS`.
        layer: The layer; its attribute `layer` says which of the three it is.
        known: Options of `Config` that no attribute of the layer's says.

    Raises:
        RBNError: An option is none.
    """
    values: dict[str, Any] = {"layer": layer.layer}
    for name, attribute, usual in _attributes(framework, layer.layer):
        if name in known:
            values[name] = known[name]
        else:
            values[name] = usual if attribute is None else getattr(layer, attribute, usual)
    if framework in NEW_VALUE:
        values["momentum"] = old_value_weight(values["momentum"], layer.layer)
    try:
        return _known_config(**values)
    except TypeError:  # also of what has no hash, and is refused for what it is
        return Config(**values)


@functools.cache
def _attributes(framework: str, layer: str) -> tuple[tuple[str, str | None, object], ...]:
    """Every option with the attribute that holds it, if one does, and its value if none does."""
    return tuple(
        (
            option.name,
            option.attribute(framework) if layer in option.layers or layer in option.choices else None,
            option.usual(layer),
        )
        for option in OPTIONS.values()
    )


def arguments(framework: str, config: Config) -> dict[str, Any]:
    """A layer's options as the constructor of a framework's layer takes them, without the number of channels.

    Args:
        framework: Whose layer, of `rbn_core.options.FRAMEWORKS`.
        config: The options.

    Raises:
        RBNValueError: The layers of the framework cannot be so.
    """
    given = {}
    for option in OPTIONS.values():
        value, argument = getattr(config, option.name), option.argument(framework)
        if config.layer not in option.layers or option.name == "num_features":
            continue
        needed = option.needs.get(framework)
        possible = needed is None or bool(getattr(config, needed))
        due: object = False if not possible else option.default if argument is None else value
        if value != due:
            beside = "" if needed is None else f" beside {needed}={getattr(config, needed)!r}"
            raise RBNValueError(
                f"{config.layer}: expected {option.name}={due!r}{beside}, as the layers of "
                f"{FRAMEWORKS[framework]} have it, got {value!r}. Give it that value."
            )
        if option.name == "momentum" and framework in NEW_VALUE:
            value = old_value_weight(value, config.layer)
        if argument is not None:
            given[argument] = value
    return given


def old_value_weight(momentum: float | None, layer: str = "RBN") -> float | None:
    """The paper's m of a momentum that weighs the new value, as PyTorch's and Jittor's do, or the other way.

    Raises:
        RBNError: The momentum, as the user gave it, is not a number in [0, 1] or `None`.
    """
    check_momentum(momentum, layer)
    return None if momentum is None else round(1.0 - momentum, 15)  # 0.3, and not 1 - (1 - 0.3)


def check_momentum(momentum: float | None, layer: str = "RBN") -> None:
    """Refuse what is not a momentum; the interval is the same in either convention."""
    if momentum is None:
        return
    if not isinstance(momentum, int | float | np.number) or isinstance(momentum, bool):
        raise RBNTypeError(
            f"{layer}: expected momentum to be a number in [0, 1] or None, got {momentum!r}. "
            "Pass a float, or None for the average of all batches."
        )
    if not 0 <= momentum <= 1:
        raise RBNValueError(
            f"{layer}: expected momentum in [0, 1], got {momentum!r}. "
            "Pass a weight between 0 and 1, or None for the average of all batches."
        )


_known_config = functools.lru_cache(maxsize=1024, typed=True)(Config)
"""The same, of what was checked before: some layers ask at every call."""


def check_input(
    shape: tuple[int, ...],
    dtype: str,
    num_features: int,
    *,
    training: bool,
    axis: int = 1,
    values: int | None = None,
    spatial_dims: int | None = None,
    layer: str = "RBN",
) -> None:
    """Refuse an input that no layer can normalize, before any statistic changes.

    Args:
        shape: The input's shape, (N, C, *spatial) up to the place of the channel axis.
        dtype: The bare name of the input's dtype, such as "float32".
        num_features: C, what the layer was built for.
        training: Whether batch statistics are about to be taken.
        axis: The channel axis; negative counts from the end.
        values: How many values each channel has where this input is only a share of the batch.
        spatial_dims: How many spatial axes there must be; any number by default.
        layer: What the error calls the layer.

    Raises:
        RBNTypeError: The dtype is not one of float16, bfloat16, float32, float64.
        RBNValueError: The rank, the channel count, or in training the number of values is wrong.
    """
    if dtype not in FLOATING:
        raise RBNTypeError(
            f"{layer}: expected a floating-point input, got dtype {dtype}. "
            "Convert the input first, for example to float32."
        )
    shape = tuple(shape)
    if len(shape) < 2:
        raise RBNValueError(
            f"{layer}: expected an input with a batch and a channel axis, got shape {shape}. "
            "Add the missing axes: one image is a batch of 1."
        )
    if spatial_dims is not None and len(shape) != spatial_dims + 2:
        raise RBNValueError(
            f"{layer}: expected an input with {spatial_dims} spatial axes, got shape {shape}. "
            f"Build the layer with spatial_dims={len(shape) - 2}, or reshape the input."
        )
    if not -len(shape) <= axis < len(shape):
        raise RBNValueError(
            f"{layer}: expected a channel axis of the input, got axis {axis} for shape {shape}. "
            "Build the layer with another axis."
        )
    axis %= len(shape)
    channels = shape[axis]
    if channels != num_features:
        raise RBNValueError(
            f"{layer}: expected {num_features} channels on axis {axis}, got an input of shape {shape}. "
            f"Build the layer with num_features={channels}, or move the channels to axis {axis}."
        )
    if not training:
        return
    if values is None:
        values = math.prod(shape) // channels
    if values == 0:
        raise RBNValueError(
            f"{layer}: expected values to train on, got an empty input of shape {shape}. "
            "Skip empty batches, or switch the layer to evaluation."
        )
    if values == 1:
        raise RBNValueError(
            f"{layer}: expected more than one value per channel in training, got an input of shape {shape}. "
            "Use a larger batch, or switch the layer to evaluation."
        )


def check_vectors(
    shapes: Mapping[str, tuple[int, ...] | None], num_features: int, layer: str = "RBN"
) -> None:
    """Refuse parameters and statistics that are not one number for each channel: nothing may broadcast.

    Args:
        shapes: The shape of everything that the layer must have, under the name that it has there; `None`
            for what is missing.
        num_features: C, what the layer was built for.
        layer: What the error calls the layer.

    Raises:
        RBNValueError: Something is missing, or its shape is not (C,).
    """
    for name, shape in shapes.items():
        check_shape(name, shape, (num_features,), layer)


def check_shape(name: str, shape: tuple[int, ...] | None, due: tuple[int, ...], layer: str = "RBN") -> None:
    """Refuse a stored array that is missing or has another shape than is due."""
    if shape is None:
        raise RBNValueError(
            f"{layer}: expected {name} of shape {due}, got None. "
            "Assign one, or build a layer whose options do without it."
        )
    if tuple(shape) != due:
        raise RBNValueError(
            f"{layer}: expected {name} of shape {due}, got one of shape {tuple(shape)}. "
            "Assign one that fits, or build the layer with another num_features."
        )


def check_options(
    centering: object, scaling: object, restrict: object, running_var: object, layer: str = "RBN"
) -> None:
    """Refuse choices that a layer does not have, when it is made and when it is called: attributes change."""
    for name, value in zip(CHOSEN, (centering, scaling, restrict, running_var), strict=True):
        check_choice(name, value, OPTIONS[name].choices[layer], layer)


def check_counter(counter: object, momentum: float | None, layer: str = "RBN") -> None:
    """Refuse to average all batches seen so far where nobody counts them; with a momentum nobody needs to."""
    if counter is None and momentum is None:
        raise RBNValueError(
            f"{layer}: expected num_batches_tracked with momentum=None, the mean of all batches, got None. "
            "Assign the number of batches so far, or a momentum."
        )


def refuse_unknown_options(layer: LayerType) -> LayerType:
    """Class decorator: an unknown keyword of the constructor is the common error in every framework."""
    construct: Callable[..., None] = vars(layer)["__init__"]
    known = [name for name in inspect.signature(construct).parameters if name != "self"]

    @functools.wraps(construct)
    def checked(self: Any, *args: Any, **options: Any) -> None:
        for option in options:
            if option not in known:
                same = meant(option, known)
                near = [same] if same else difflib.get_close_matches(option, known, n=1)
                way_out = f"Did you mean {near[0]!r}?" if near else "See the layer's documentation."
                raise RBNTypeError(
                    f"{layer.__name__}: expected an option of this layer, got {option!r}. {way_out}"
                )
        construct(self, *args, **options)

    setattr(layer, "__init__", checked)  # noqa: B010 (mypy refuses the assignment)
    return layer


def check_count(name: str, value: object, layer: str = "RBN") -> None:
    """Refuse what is not a positive integer."""
    if not isinstance(value, int | np.integer) or isinstance(value, bool):
        raise RBNTypeError(f"{layer}: expected {name} to be a positive integer, got {value!r}. Pass an int.")
    if value <= 0:
        raise RBNValueError(
            f"{layer}: expected {name} to be a positive integer, got {value!r}. Pass such a number."
        )


def check_eps(eps: object, layer: str = "RBN") -> None:
    """Refuse what is not a positive, finite number."""
    if not isinstance(eps, int | float | np.number) or isinstance(eps, bool):
        raise RBNTypeError(
            f"{layer}: expected eps to be a positive number, got {eps!r}. Pass a float such as 1e-5."
        )
    if not 0 < eps < math.inf:
        raise RBNValueError(
            f"{layer}: expected eps to be positive and finite, got {eps!r}. Pass a small number such as 1e-5."
        )


def _check_kernel_size(kernel_size: object) -> None:
    check_count("kernel_size", kernel_size, "BNET")
    assert isinstance(kernel_size, int | np.integer)
    if kernel_size % 2 == 0:
        raise RBNValueError(
            f"BNET: expected an odd kernel_size, got {kernel_size}. "
            f"Take {kernel_size - 1} or {kernel_size + 1}: an even kernel has no centre."
        )


def check_choice(name: str, value: object, choices: tuple[object, ...], layer: str = "RBN") -> None:
    """Refuse a value that is none of an option's choices."""
    if any(type(value) is type(choice) and value == choice for choice in choices):
        return
    wrong: type[RBNError] = RBNValueError if isinstance(value, str) else RBNTypeError
    listed = ", ".join(repr(choice) for choice in choices)
    raise wrong(f"{layer}: expected {name} to be one of {listed}, got {value!r}. Choose one of these.")
