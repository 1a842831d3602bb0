"""What a framework's module says about it, and the loop over forms, shapes and phases that all share."""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from rbn.benchmarks import timing
from rbn.benchmarks.cases import BATCH_NORM, EVALUATION, RBN, TRAINING, Options, Shape
from rbn.benchmarks.timing import Comparison, Step, by_the_clock, compare

ITEMSIZES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""The dtypes that can be measured, and the bytes of a number; NumPy alone does not know them all."""


@dataclass(frozen=True)
class Measurement:
    """A form beside the framework's own BatchNorm.

    Args:
        variant: The way the framework works, such as a memory format; "" where there is one.
        shape: Of X, (N, C, *spatial).
        phase: "training", forward and backward, or "evaluation", forward.
        form: One of `cases.FORMS`.
        comparison: Its time and BatchNorm's.
        copy_seconds: How long a copy of X takes; `None` for a network.
    """

    variant: str
    shape: Shape
    phase: str
    form: str
    comparison: Comparison
    copy_seconds: float | None


class Worker(ABC):
    """A framework, in a process of its own.

    Args:
        options: What of it is measured.

    Attributes:
        variants: The ways it works.
        forms: Those of `cases.FORMS` that it has.
    """

    variants: tuple[str, ...] = ("",)
    forms: tuple[str, ...] = ()

    def __init__(self, options: Options) -> None:
        self.options = options

    @abstractmethod
    def build(self, form: str, variant: str, shape: Shape) -> dict[str, Step]:
        """The layer in a form on an input of a shape: a step for each phase.

        A training step is the forward pass, the gradients of X and of all parameters for a random dY, and the
        update of the running statistics; an evaluation step is the forward pass.
        """

    def network_step(self, name: str, norm: str) -> Step:
        """A training step of a network with "bn" or "rbn" on the images of the options."""
        raise NotImplementedError(f"{type(self).__name__} has no training steps of networks")

    def takes(self, variant: str, shape: Shape) -> bool:
        """Whether the variant differs from others on such a shape."""
        return True

    def threads(self) -> int:
        """How many threads the framework computes with, by default."""
        return len(os.sched_getaffinity(0))

    def copy_seconds(self, shape: Shape) -> float:
        """How long a copy of X takes."""
        size = math.prod(shape) * ITEMSIZES[self.options.dtype]
        return timing.copy_seconds(size, self.options.seconds / 2)

    def measure(self, step: Step) -> float:
        """How long a step takes, in seconds."""
        return by_the_clock(step)


def work(worker: Worker, announce: Callable[[str], None]) -> Iterator[Measurement]:
    """Measure everything.

    Args:
        worker: The framework.
        announce: Called with what is measured next, in words.
    """
    options = worker.options
    if options.network is not None:
        announce(f"{options.network} {options.images}")
        bn, rbn = (worker.network_step(options.network, norm) for norm in ("bn", "rbn"))
        found = compare(rbn, bn, options.seconds, worker.measure)
        yield Measurement("", options.images, TRAINING, RBN, found, None)
        return
    for shape in options.shapes:
        copy_seconds = worker.copy_seconds(shape)
        for variant in worker.variants:
            if not worker.takes(variant, shape):
                continue
            own = worker.build(BATCH_NORM, variant, shape)
            for form in worker.forms[1:]:
                steps = worker.build(form, variant, shape)
                for phase in (TRAINING, EVALUATION):
                    announce(f"{variant} {shape}, {form}, {phase}".lstrip())
                    found = compare(steps[phase], own[phase], options.seconds, worker.measure)
                    yield Measurement(variant, shape, phase, form, found, copy_seconds)


def count(worker: Worker) -> int:
    """How many measurements `work` makes."""
    if worker.options.network is not None:
        return 1
    places = [(shape, variant) for shape in worker.options.shapes for variant in worker.variants]
    return 2 * (len(worker.forms) - 1) * sum(worker.takes(variant, shape) for shape, variant in places)


def random(shape: Shape, seed: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """Numbers of mean 0 and deviation 1, float32."""
    return np.random.default_rng(seed).standard_normal(shape, np.float32)
