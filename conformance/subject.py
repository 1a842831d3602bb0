"""What the suite needs from an implementation: build it from a config and a state, and run it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rbn.conformance.cases import LAYERS, Case
from rbn_core.config import Config
from rbn_core.errors import RBNValueError
from rbn_core.matching import State

Array = NDArray[Any]

Momentum = Literal["old", "new"]
"""Which value a momentum weighs: the old running one, as in the paper, Flax and MindSpore, or the batch's new
one, as in PyTorch and Jittor."""


class NoResultInTimeError(Exception):
    """A subject waited for other processes as long as it would: whether these are right is not known."""


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
        layers: Which of `cases.LAYERS` it implements; cases of others are not run.
        fixed: Options that it lacks, and what it always does instead, such as {"running_var": "biased"}.
            Every case then has that value, and cases about another value of such an option are absent.
        counts_batches: Whether it stores the number of batches it was trained on. Without, that number is not
            compared, and the average over all batches, momentum=None, is absent.
        devices: On how many devices it can share its statistics; cases of more are absent.
        ways: In which of `cases.WAYS` it can do so, besides its usual one; cases of others are not run.
        forward_only: Whether it has no gradients; what `run` returns for them is then not compared.
        precisions: In which of `cases.PRECISIONS` it can run; cases of others are not run.
        spoils: Which of `cases.SPOILS` can happen to what it stores; cases of others are not run.
        refusals: What it raises to refuse something. Anything else that it raises is a failure, and so are
            the `NotImplementedError` and the `RecursionError` of a `RuntimeError` that is named here.
        absent: Cases it cannot run, declared as {pattern of case ids: reason}. A declaration that matches no
            case, and one whose case would pass, fail the run.
        expected_failures: Cases in which it is known to differ, declared in the same way.
    """

    name: str
    layers: Collection[str] = LAYERS
    fixed: Mapping[str, Any] = {}
    counts_batches: bool = True
    devices: int = 1
    ways: Collection[str] = ()
    forward_only: bool = False
    precisions: Collection[str] = ()
    spoils: Collection[str] = ()
    refusals: tuple[type[Exception], ...] = (ValueError, TypeError)
    absent: Mapping[str, str] = {}
    expected_failures: Mapping[str, str] = {}

    @abstractmethod
    def build(self, config: Config, state: State, dtype: str, layout: str = "channels_first") -> None:
        """Make the layer under test.

        Args:
            config: Its options; its `spatial_dims` is the number of the inputs' spatial axes.
            state: What it stores at the start, in at least float32 under canonical names.
            dtype: The dtype of the inputs to come; parameters are at least float32.
            layout: How the framework's input lies in memory, one of `cases.LAYOUTS`; in the suite the
                channels are always first.
        """

    @abstractmethod
    def run(self, x: Array, training: bool, cotangent: Array) -> Outcome:
        """One step of the layer, forward and backward.

        Args:
            x: The input, (N, C, *spatial), whatever the framework's own layout is.
            training: Batch statistics, which the layer then accumulates, or running statistics.
            cotangent: The gradient of the output, of its shape and dtype.

        Raises:
            RBNError: The layer refuses the input, or what it stores; its state is as it was.
        """

    @abstractmethod
    def state(self) -> State:
        """Everything the layer stores now, under canonical names.

        What `spoil` has changed comes as it then is, or is left out where NumPy cannot have it.
        """

    def takes(self, case: Case) -> bool:
        """Whether the case is about something that it has.

        That is the layer, the way to share statistics, the way into mixed precision, and what can be spoilt.
        """
        return (
            case.layer in self.layers
            and case.way in ("", *self.ways)
            and case.precision in ("", *self.precisions)
            and case.spoil[1] in ("", *self.spoils)
        )

    def under(self, precision: str) -> Subject:
        """The same implementation, entered through a way into mixed precision.

        `build` then gets the narrowest dtype in play, and `run` an input and a cotangent of that dtype. What
        of it the framework hands to the layer in which dtype, and made where, is for this method to say. The
        values of what comes back are compared, and not the dtypes. A loss scale is taken out again.

        Args:
            precision: One of `precisions`.
        """
        raise NotImplementedError

    def spoil(self, name: str, kind: str) -> None:
        """Change what the layer stores as a user's code can; called between `build` and `run`.

        No number changes: what becomes half precision or integers has such values already, and what comes to
        lie in the memory of another array has its values. It may raise what the framework raises by itself,
        which then is the refusal.

        Args:
            name: The canonical name of what is spoilt.
            kind: One of `spoils`; where it is one of `cases.SHARED_SPOILS`, `cases.SHARED_WITH` says with
                what, and where it is "shared_compiled", `run` compiles the step.
        """
        raise NotImplementedError

    def through(self, way: str) -> Subject:
        """The same implementation that shares its statistics in another way.

        Args:
            way: One of `ways`.
        """
        raise NotImplementedError

    def spread(self, shares: tuple[int, ...]) -> Subject:
        """The same implementation on several devices, each with its share of the batch, as one subject.

        Args:
            shares: How many images each device has; at most `devices` of them.
        """
        raise NotImplementedError


def in_convention(config: Config, momentum: Momentum) -> Config:
    """The config with its momentum in a subject's convention."""
    if momentum == "old" or config.momentum is None:
        return config
    return replace(config, momentum=1.0 - config.momentum)


class LayerSubject(Subject):
    """What the frameworks' helpers share: a layer made by a function, and the names of what it stores.

    Args:
        name: What the reports call it.
        make: Takes a config, its momentum in the convention below, and the framework's dtype for the
            parameters to a new layer.
        names: What the layer calls everything it stores, {canonical name: own name}; without
            "num_batches_tracked" it counts no batches.
        momentum: Which value its momentum weighs.
        layers: Which of `cases.LAYERS` it implements.
        fixed: As in `Subject`; {"running_var": "biased"} for a layer that accumulates the biased variance.
        absent: As in `Subject`.
        expected_failures: As in `Subject`.

    Attributes:
        nowhere: What no layer of the framework can run; it is absent, too.
    """

    nowhere: Mapping[str, str] = {}

    def __init__(
        self,
        name: str,
        make: Callable[[Config, Any], Any],
        names: Mapping[str, str],
        *,
        momentum: Momentum,
        layers: Collection[str] = ("bn",),
        fixed: Mapping[str, Any] | None = None,
        absent: Mapping[str, str] | None = None,
        expected_failures: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.make = make
        self.names = names
        self.momentum = momentum
        self.layers = layers
        self.fixed = fixed or {}
        self.absent = {**(absent or {}), **self.nowhere}
        self.expected_failures = expected_failures or {}
        self.counts_batches = "num_batches_tracked" in names

    def make_layer(self, config: Config, dtype: Any) -> Any:
        """A new layer with these options and a framework's dtype."""
        self.config = config
        return self.make(in_convention(config, self.momentum), dtype)

    def own(self, state: State, stored: Mapping[str, Any]) -> dict[str, Array]:
        """A state under the layer's own names, in the shapes of what it stores.

        Raises:
            RBNValueError: The layer stores other names than were declared.
        """
        given = {self.names[name]: value for name, value in state.items() if name in self.names}
        if given.keys() != stored.keys():
            raise RBNValueError(
                f"{self.name}: expected a layer that stores {sorted(given)} with these options, got "
                f"{sorted(stored)}. Correct `names`, or declare the case."
            )
        return {name: value.reshape(np.shape(stored[name])) for name, value in given.items()}

    def canonical(self, stored: Mapping[str, Array]) -> State:
        """What the layer stores, or its gradients, under canonical names.

        In canonical shapes, too, but for what has been spoilt and has not so many values.
        """
        shapes = self.config.state_shapes()
        found = {name: stored[own] for name, own in self.names.items() if own in stored}
        return {
            name: value.reshape(shapes[name]) if value.size == math.prod(shapes[name]) else value
            for name, value in found.items()
        }
