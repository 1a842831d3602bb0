"""Mutants: implementations with one plausible mistake each. The suite must reject every one.

Mistakes in the formulas are in `wrong_layers`, those around them, in dtypes, memory, mixed precision, what is
stored and devices, in `wrong_subjects`. A class's docstring says the mistake, as somebody might make it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rbn.conformance.subject import Subject
from rbn.conformance.subjects.numpy import NumpyLayer
from rbn.conformance.wrong_layers import WRONG_LAYERS
from rbn.conformance.wrong_subjects import WRONG_SUBJECTS, WrongSubject
from rbn_core.reference import Layer


@dataclass(frozen=True)
class Mutant:
    """One planted mistake.

    Attributes:
        name: What it is called.
        kind: What the mistake is about: "formula", "gradient", "layout", ...
        mistake: What is wrong, in a sentence.
        subject: Makes an implementation that has the mistake.
    """

    name: str
    kind: str
    mistake: str
    subject: Callable[[], Subject]


def of_layer(kind: str, layer: type[Layer]) -> Mutant:
    """A wrong layer as a mutant."""
    return Mutant(layer.__name__, kind, str(layer.__doc__), lambda: NumpyLayer(layer.__name__, layer))


def of_subject(kind: str, subject: type[WrongSubject]) -> Mutant:
    """A wrong subject as a mutant."""
    return Mutant(subject.__name__, kind, str(subject.__doc__), subject)


MUTANTS: tuple[Mutant, ...] = (
    *(of_layer(kind, layer) for kind, layers in WRONG_LAYERS.items() for layer in layers),
    *(of_subject(kind, subject) for kind, subjects in WRONG_SUBJECTS.items() for subject in subjects),
)
