"""One table: the options of a layer, what each may be, and what every framework's layer calls it.

`names` is the same for what a layer stores. The layers' options, those of networks, of converted layers, of
the suite's layers and the table in docs/rbn.md are all read from here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Statistic = Literal["channel_mean", "channel_std", "spatial_mean", "spatial_std", "input_mean"]
"""An instance statistic: mu_c, sigma_c, mu_s, sigma_s of RBN's Table 3, and IEBN's mu_c of X itself."""

MOMENT_STATISTICS: tuple[Statistic, ...] = ("channel_mean", "channel_std")
"""Those that follow from the mean and the variance of a plane: the fused form has them."""

IMAGE_STATISTICS: tuple[Statistic, ...] = ("spatial_mean", "spatial_std")
"""Those computed from the image: over channels where the name begins with "spatial", else over positions."""

INSTANCE_STATISTICS = (*MOMENT_STATISTICS, *IMAGE_STATISTICS, None)
RESTRICTIONS = ("sigmoid", "hard_sigmoid")
RUNNING_VARIANCES = ("unbiased", "biased")
SPATIAL_RANKS = (1, 2, 3)

LAYERS = ("RBN", "IEBN", "BNET")

FRAMEWORKS = {
    "numpy": "the reference",
    "torch": "PyTorch",
    "flax": "Flax linen",
    "flax.nnx": "Flax NNX",
    "mindspore": "MindSpore",
    "jittor": "Jittor",
}
"""Who has the options, and what errors and documentation call it."""

NEW_VALUE = ("torch", "jittor")
"""Where the momentum is the weight of the new value; elsewhere it is the paper's m, that of the old one."""

Choices = Mapping[str, tuple[object, ...]]


def _alike(*choices: object) -> Choices:
    """The same choices in all layers."""
    return dict.fromkeys(LAYERS, choices)


@dataclass(frozen=True)
class Option:
    """An option of the layers.

    Args:
        name: What it is called in `rbn_core.Config`.
        default: Its value where nothing is said; `...` where something must be.
        text: What it is, in a line.
        layers: The layers whose constructors take it.
        choices: By layer the values that it may have; empty where they are too many to be listed.
        arguments: By framework the name of the constructor's argument, where that is another; `None` where
            the layers of a framework have no such argument, and the option is at its default.
        attributes: By framework the attribute that holds it, where that is named otherwise than the argument.
        needs: By framework the option that must be on where this one is.
        absent: Its value in the layers that do not have it, where `choices` does not say it.
        kept: Whether `convert` takes it from the layer before.
    """

    name: str
    default: object
    text: str
    layers: tuple[str, ...] = LAYERS
    choices: Choices = field(default_factory=dict)
    arguments: Mapping[str, str | None] = field(default_factory=dict)
    attributes: Mapping[str, str] = field(default_factory=dict)
    needs: Mapping[str, str] = field(default_factory=dict)
    absent: object = None
    kept: bool = False

    def argument(self, framework: str) -> str | None:
        """What the constructors of a framework's layers call it; `None` where they do not have it."""
        return self.arguments.get(framework, self.name)

    def attribute(self, framework: str) -> str | None:
        """Which attribute of a framework's layers holds it."""
        return self.attributes.get(framework, self.argument(framework))

    def usual(self, layer: str) -> object:
        """Its value in a layer of which nothing else is said."""
        if layer in self.layers:
            return self.default
        (value,) = self.choices.get(layer, (self.absent,))
        return value


OPTIONS: dict[str, Option] = {
    option.name: option
    for option in (
        Option(
            "num_features",
            ...,
            "C, the number of channels; Flax linen takes it from the first input",
            arguments={"flax": None},
            kept=True,
        ),
        Option(
            "eps",
            1e-5,
            "epsilon, added to a variance under its root",
            arguments={"flax": "epsilon", "flax.nnx": "epsilon"},
            attributes={"torch": "epsilon", "jittor": "epsilon"},  # eps is an error there: see the layers
            kept=True,
        ),
        Option(
            "momentum",
            0.9,
            "the weight of the old value in the running statistics, in PyTorch and Jittor that of the new "
            "one, so that the default is 0.1 there; `None` averages all batches",
            kept=True,
        ),
        Option(
            "centering",
            "channel_mean",
            "K_m of eq. 5, an instance statistic of X; `None` leaves the centering calibration out",
            layers=("RBN",),
            choices={"RBN": INSTANCE_STATISTICS, "IEBN": (None,), "BNET": (None,)},
        ),
        Option(
            "scaling",
            "channel_mean",
            "K_s of eq. 9, an instance statistic of X_s; `None` leaves the scaling calibration out",
            layers=("RBN",),
            choices={"RBN": INSTANCE_STATISTICS, "IEBN": ("input_mean",), "BNET": (None,)},
        ),
        Option(
            "restrict",
            "sigmoid",
            "R of eq. 9",
            layers=("RBN",),
            choices={"RBN": RESTRICTIONS, "IEBN": ("sigmoid",), "BNET": ("sigmoid",)},
        ),
        Option(
            "running_var",
            "unbiased",
            "which batch variance eq. 3 accumulates: divided by n - 1 or by n",
            choices=_alike(*RUNNING_VARIANCES),
            attributes={"torch": "variance_estimator", "jittor": "variance_estimator"},  # beside the buffer
        ),
        Option(
            "gamma",
            True,
            "whether there is a scale in the affine step of eq. 1",
            layers=("RBN", "IEBN"),
            absent=False,
            arguments={
                "torch": "affine",
                "flax": "use_scale",
                "flax.nnx": "use_scale",
                "mindspore": None,
                "jittor": "affine",
            },
            kept=True,
        ),
        Option(
            "beta",
            True,
            "whether there is a shift in that step; PyTorch and Jittor have none without a gamma",
            layers=("RBN", "IEBN"),
            absent=False,
            needs={"torch": "gamma", "jittor": "gamma"},
            arguments={
                "torch": "bias",
                "flax": "use_bias",
                "flax.nnx": "use_bias",
                "mindspore": None,
                "jittor": None,
            },
            kept=True,
        ),
        Option(
            "track_running_stats",
            True,
            "whether running statistics are kept; without them evaluation uses the batch's",
            arguments={"flax": None, "flax.nnx": None, "mindspore": None, "jittor": None},
            kept=True,
        ),
        Option(
            "kernel_size",
            3,
            "the odd extent of BNET's depthwise convolution along every axis",
            layers=("BNET",),
        ),
        Option(
            "spatial_dims",
            2,
            "how many spatial axes that convolution has",
            layers=("BNET",),
            choices={"BNET": SPATIAL_RANKS},
            absent=2,
        ),
    )
}


def kept_arguments(framework: str) -> tuple[str, ...]:
    """The constructors' arguments that `convert` takes from the layer before, so that nobody gives them."""
    names = (option.argument(framework) for option in OPTIONS.values() if option.kept)
    return tuple(name for name in names if name is not None)


def meant(given: str, known: Collection[str]) -> str | None:
    """The argument that an option has here, by what it is called anywhere; `None` if it is no option's name.

    Args:
        given: The argument that a layer does not know.
        known: Those that it knows.
    """
    for option in OPTIONS.values():
        names = [option.name, *filter(None, map(option.argument, FRAMEWORKS))]
        if given in names:
            return next((name for name in names if name in known), None)
    return None


def table() -> str:
    """The options as the Markdown table of docs/rbn.md."""
    lines = ["| option | layers | values, default first | what it is | called otherwise |"]
    lines.append("|---|---|---|---|---|")
    for option in OPTIONS.values():
        values = [option.default] if option.default is not ... else []
        values += [value for value in option.choices.get(option.layers[0], ()) if value != option.default]
        shown = ", ".join(f"`{_shown(value)}`" for value in values) or "an integer"
        others = {FRAMEWORKS[name]: option.arguments[name] for name in option.arguments}
        called = ", ".join(f"{who}: {f'`{own}`' if own else 'none'}" for who, own in others.items())
        layers = "all" if option.layers == LAYERS else ", ".join(option.layers)
        lines.append(f"| `{option.name}` | {layers} | {shown} | {option.text} | {called} |")
    return "\n".join(lines)


def _shown(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)
