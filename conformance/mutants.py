"""Mutants: implementations with one plausible mistake each. The suite must reject every one.

Mistakes in the formulas are in `wrong_layers`, those around them, in dtypes, memory, mixed precision, what is
stored and devices, in `wrong_subjects`. A class's docstring says the mistake, as somebody might make it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from rbn.conformance.cases import Case
from rbn.conformance.subject import Subject
from rbn.conformance.subjects.numpy import NumpyLayer
from rbn.conformance.wrong_layers import WRONG_LAYERS, OnePassVariance
from rbn.conformance.wrong_subjects import (
    WRONG_SUBJECTS,
    ComputedInFloat32,
    GradientsSummedInHalf,
    ReducedInHalf,
    RunningStatisticsInHalf,
    SummedInHalf,
    WrongSubject,
)
from rbn_core.reference import Layer


def anything(_: Case) -> bool:
    """What most mistakes can show in."""
    return True


ABOUT: dict[str, Callable[[Case], bool]] = {
    "layout": lambda case: case.layout != "channels_first",
    "dtype": lambda case: case.dtype != "float32",
    "precision": lambda case: bool(case.precision),
    "hostile": lambda case: bool(case.spoilt) or case.refused,
    "synchronization": lambda case: bool(case.shares),
    "state": lambda case: case.training,
}
"""In which cases the mistakes of a kind can show."""

ABOUT_LAYERS: tuple[tuple[str, Callable[[Case], bool]], ...] = (
    (
        "FlippedKernel ReversedKernelAxes OneKernelForAll PaddedBeforeNormalization BorderRepeated "
        "NoConvolutionBias KernelOffCentre",
        lambda case: case.layer == "bnet",
    ),
    ("AttentionOfXs AttentionWithoutGradient", lambda case: case.layer == "iebn"),
    (
        "OtherHardSigmoid HardSigmoidWithoutEnds HardSigmoidSlopeBeyondItsEnds RestrictIgnored",
        lambda case: case.config.restrict == "hard_sigmoid",
    ),
    ("HardcodedEps", lambda case: case.config.eps != 1e-5),
    ("CumulativeAverageOffByOne", lambda case: case.config.momentum is None),
    ("OneValueAccepted", lambda case: case.refused),
    (
        "DeviationWithoutEps UnbiasedDeviation VarianceForDeviation StatisticsIgnored",
        lambda case: bool(
            {case.config.centering, case.config.scaling} - {None, "channel_mean", "input_mean"}
        ),
    ),
    (
        "EvaluationAccumulates EvaluationCounts EvaluationWithoutCentering BatchStatisticsInEvaluation "
        "ModeIgnored RunningStatisticsWithBatchGradient",
        lambda case: not case.training,
    ),
)
"""In which cases these mistakes in the layers can show, by name."""

ROUNDING = (
    OnePassVariance,
    ComputedInFloat32,
    ReducedInHalf,
    RunningStatisticsInHalf,
    SummedInHalf,
    GradientsSummedInHalf,
)
"""Mistakes that show in the last digits."""


@dataclass(frozen=True)
class Mutant:
    """One planted mistake.

    Attributes:
        name: What it is called.
        kind: What the mistake is about: "formula", "gradient", "layout", ...
        mistake: What is wrong, in a sentence.
        subject: Makes an implementation that has the mistake.
        about: Whether the mistake can show in a case at all.
        rounding: Whether it is one of rounding, whose errors differ from one implementation to the next.
    """

    name: str
    kind: str
    mistake: str
    subject: Callable[[], Subject]
    about: Callable[[Case], bool] = anything
    rounding: bool = False


def of_layer(kind: str, layer: type[Layer]) -> Mutant:
    """A wrong layer as a mutant."""
    subject = partial(NumpyLayer, layer.__name__, layer)
    about = next((about for layers, about in ABOUT_LAYERS if layer.__name__ in layers.split()), None)
    about = about or ABOUT.get(kind, anything)
    return Mutant(layer.__name__, kind, str(layer.__doc__), subject, about, layer in ROUNDING)


def of_subject(kind: str, subject: type[WrongSubject]) -> Mutant:
    """A wrong subject as a mutant."""
    about = ABOUT.get(kind, anything)
    return Mutant(subject.__name__, kind, str(subject.__doc__), subject, about, subject in ROUNDING)


MUTANTS: tuple[Mutant, ...] = (
    *(of_layer(kind, layer) for kind, layers in WRONG_LAYERS.items() for layer in layers),
    *(of_subject(kind, subject) for kind, subjects in WRONG_SUBJECTS.items() for subject in subjects),
)
