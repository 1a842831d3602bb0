"""What the suite needs from an implementation: build it from a config and a state, and run it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from numpy.typing import NDArray

from rbn_core.config import Config
from rbn_core.weights import State

Array = NDArray[Any]


@dataclass(frozen=True)
class Outcome:
    """What one step of a layer gave, as NumPy arrays.

    Attributes:
        y: The output, (N, C, *spatial).
        dx: The gradient of sum(y * cotangent) for the input.
        gradients: The same for every parameter, under canonical names.
        state: Everything the layer stores after the step, under canonical names.
        x: The input as it stands after the step; a layer must not change it.
    """

    y: Array
    dx: Array
    gradients: dict[str, Array]
    state: State
    x: Array


class Subject(ABC):
    """One implementation under test; a new layer is built for every case.

    Attributes:
        name: What the reports call it.
        absent: Cases it cannot run, declared as {pattern of case ids: reason}. A declaration that matches no
            case, and one whose case would pass, fail the run.
    """

    name: ClassVar[str]
    absent: ClassVar[dict[str, str]] = {}

    @abstractmethod
    def build(self, config: Config, state: State, dtype: str, layout: str = "channels_first") -> None:
        """Make the layer under test.

        Args:
            config: Its options.
            state: What it stores at the start, float64 under canonical names.
            dtype: The dtype of the inputs to come; parameters are at least float32.
            layout: Where the framework's input has the channels, "channels_first" or "channels_last"; in the
                suite they are always first.
        """

    @abstractmethod
    def run(self, x: Array, training: bool, cotangent: Array) -> Outcome:
        """One step of the layer, forward and backward.

        Args:
            x: The input, (N, C, *spatial), whatever the framework's own layout is.
            training: Batch statistics, which the layer then accumulates, or running statistics.
            cotangent: The gradient of the output, of its shape and dtype.

        Raises:
            RBNError: The layer refuses the input; its state is as it was.
        """

    @abstractmethod
    def state(self) -> State:
        """Everything the layer stores now, under canonical names."""
