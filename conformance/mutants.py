"""Mutants: implementations with one plausible mistake each. The suite must reject every one.

Mistakes in the formulas are in `wrong_layers`; here are those around them, in dtypes, memory and devices. A
class's docstring says the mistake, as somebody might make it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from rbn.conformance.subject import Array, Outcome, Subject
from rbn.conformance.subjects.numpy import NumpyLayer
from rbn.conformance.wrong_layers import WRONG_LAYERS
from rbn_core.config import Config
from rbn_core.matching import State
from rbn_core.reference import Layer, Steps, batch_mean_and_variance


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


class WrongSubject(NumpyLayer):
    """The reference, handled wrongly."""

    def __init__(self) -> None:
        super().__init__(type(self).__name__, Layer)

    def build(self, config: Config, state: State, dtype: str, layout: str = "channels_first") -> None:
        """Make the layer, and remember the dtype."""
        super().build(config, state, dtype, layout)
        self.dtype = np.dtype(dtype)


class OutputInFloat32(WrongSubject):
    """Y is float32 whatever the input's dtype."""

    def run(self, x: Array, training: bool, cotangent: Array) -> Outcome:
        outcome = super().run(x, training, cotangent)
        return changed(outcome, y=outcome.y.astype(np.float32))


class ComputedInFloat32(WrongSubject):
    """float64 is computed in float32."""

    def run(self, x: Array, training: bool, cotangent: Array) -> Outcome:
        outcome = super().run(x.astype(np.float32), training, cotangent.astype(np.float32))
        return changed(outcome, y=outcome.y.astype(x.dtype), dx=outcome.dx.astype(x.dtype), x=x)


class ReducedInHalf(WrongSubject):
    """The statistics of a half precision input are rounded to half precision."""

    def build(self, config: Config, state: State, dtype: str, layout: str = "channels_first") -> None:
        super().build(config, state, dtype, layout)
        half = self.dtype if self.dtype.itemsize == 2 else np.dtype(float)

        class Rounded(Layer):
            def statistics_of(self, x_cm: Array, training: bool) -> tuple[Array, Array]:
                mean, var = super().statistics_of(x_cm, training)
                return mean.astype(half).astype(float), var.astype(half).astype(float)

        self.layer = Rounded(config)
        self.layer.load(state)


class RunningStatisticsInHalf(WrongSubject):
    """Running statistics are kept in half precision where the input is."""

    def run(self, x: Array, training: bool, cotangent: Array) -> Outcome:
        outcome = super().run(x, training, cotangent)
        for name in ("running_mean", "running_var"):
            if name in self.layer.statistics and self.dtype.itemsize == 2:
                kept = self.layer.statistics[name].astype(self.dtype).astype(float)
                self.layer.statistics[name] = kept
        return changed(outcome, state=self.state())


class ChannelsLastMisread(WrongSubject):
    """The memory of a channels-last input is read as if the channels came first."""

    def run(self, x: Array, training: bool, cotangent: Array) -> Outcome:
        if self.layout != "channels_last":
            return super().run(x, training, cotangent)
        memory = np.moveaxis(x, 1, -1).reshape(x.shape)
        return changed(super().run(memory, training, cotangent), x=x)


class StridesIgnored(WrongSubject):
    """A strided input is read as if its values stood one after another in memory."""

    def run(self, x: Array, training: bool, cotangent: Array) -> Outcome:
        if self.layout != "strided":
            return super().run(x, training, cotangent)
        memory = np.repeat(x, 2, axis=-1).reshape(-1)[: x.size].reshape(x.shape)
        return changed(super().run(memory, training, cotangent), x=x)


class RepeatedImageCountedOnce(WrongSubject):
    """The gradient of an image that is repeated with stride 0 is summed onto each of its copies."""

    def run(self, x: Array, training: bool, cotangent: Array) -> Outcome:
        outcome = super().run(x, training, cotangent)
        if self.layout != "expanded":
            return outcome
        return changed(outcome, dx=np.broadcast_to(outcome.dx.sum(axis=0), x.shape).copy())


class OutputMemoryReused(WrongSubject):
    """Y is written into the memory that the last step's Y was returned in."""

    def build(self, config: Config, state: State, dtype: str, layout: str = "channels_first") -> None:
        super().build(config, state, dtype, layout)
        self.y: Array | None = None

    def run(self, x: Array, training: bool, cotangent: Array) -> Outcome:
        outcome = super().run(x, training, cotangent)
        if self.y is None:
            self.y = outcome.y
        self.y[...] = outcome.y
        return changed(outcome, y=self.y)


class SharingLayer(Layer):
    """The reference on a batch whose images lie on several devices."""

    shares: tuple[int, ...] = ()

    def parts(self, x: Array) -> list[Array]:
        """The shares that have images."""
        stops = np.cumsum(self.shares)
        return [part for part in np.split(x, stops[:-1]) if len(part)] if self.shares else [x]


class Sharing(WrongSubject):
    """A mistake in the work of several devices, made by a layer of its own."""

    wrong: type[SharingLayer]
    shares: tuple[int, ...] = ()

    def build(self, config: Config, state: State, dtype: str, layout: str = "channels_first") -> None:
        """Make the layer, which knows the shares."""
        super().build(config, state, dtype, layout)
        layer = self.wrong(config)
        layer.load(state)
        layer.shares = self.shares
        self.layer = layer

    def spread(self, shares: tuple[int, ...]) -> Subject:
        """A subject like this one, with these shares."""
        other = type(self)()
        other.shares = shares
        return other


class OwnStatistics(Sharing):
    """Every device normalizes with the statistics of its own share; nothing is synchronized."""

    class Wrong(SharingLayer):
        def forward(self, x: Any, training: bool) -> Array:
            self.layers = [Layer(self.config) for _ in self.parts(x)]
            for layer in self.layers:
                layer.load(self.state())
            outputs = [
                layer.forward(part, training) for layer, part in zip(self.layers, self.parts(x), strict=True)
            ]
            self.statistics = self.layers[0].statistics
            return np.concatenate(outputs)

        def backward(self, dy: Any) -> tuple[Array, dict[str, Array]]:
            each = [layer.backward(part) for layer, part in zip(self.layers, self.parts(dy), strict=True)]
            gradients = {name: np.sum([own[name] for _, own in each], axis=0) for name in each[0][1]}
            return np.concatenate([dx for dx, _ in each]), gradients

    wrong = Wrong


class SharesCountEqually(Sharing):
    """The devices' means and variances are averaged however many images each of them has."""

    class Wrong(SharingLayer):
        def statistics_of(self, x_cm: Array, training: bool) -> tuple[Array, Array]:
            if len(self.parts(x_cm)) == 1:
                return super().statistics_of(x_cm, training)
            means, squares = zip(
                *(
                    (part.mean(axis=axes(part)), np.square(part).mean(axis=axes(part)))
                    for part in self.parts(x_cm)
                ),
                strict=True,
            )
            mean = np.mean(means, axis=0)
            var = np.mean(squares, axis=0) - np.square(mean)
            if self.config.track_running_stats:
                self.accumulate(mean, var, values=x_cm.size // x_cm.shape[1])
            return mean, var

    wrong = Wrong


class GradientOfOwnShare(Sharing):
    """The gradient through E and Var is that of the device's own share, not summed over the devices."""

    class Wrong(SharingLayer):
        def standardize_backward(self, dx_s: Array, s: Steps) -> Array:
            if not s.batch_statistics:
                return super().standardize_backward(dx_s, s)
            dx_cm = dx_s * s.inverse_std
            parts = zip(self.parts(dx_cm), self.parts(s.x_s), strict=True)
            through = [
                (
                    part.sum(axis=axes(part), keepdims=True),
                    (part * x_s).sum(axis=axes(part), keepdims=True),
                    len(part),
                )
                for part, x_s in parts
            ]
            mean, variance = (
                np.concatenate([np.repeat(each[i], each[2], axis=0) for each in through]) for i in (0, 1)
            )
            values = dx_s.size // dx_s.shape[1]
            return dx_cm - mean / values - s.x_s * variance / values

        def calibrate_centering_backward(self, dx_cm: Array, s: Steps, gradients: dict[str, Array]) -> Array:
            # The sum of dX_cm is not 0, and all of K_m counts.
            constant = replace(s, batch_statistics=False)
            return super().calibrate_centering_backward(dx_cm, constant, gradients)

    wrong = Wrong


class RunningStatisticsOfOwnShare(Sharing):
    """The running statistics accumulate the first device's share alone."""

    class Wrong(SharingLayer):
        def accumulate(self, mean: Array, var: Array, values: int) -> None:
            if len(self.shares) > 1:
                first = self.parts(self.x_cm)[0]
                mean, var = batch_mean_and_variance(first)
                values = first.size // first.shape[1]
            super().accumulate(mean, var, values)

        def statistics_of(self, x_cm: Array, training: bool) -> tuple[Array, Array]:
            self.x_cm = x_cm
            return super().statistics_of(x_cm, training)

    wrong = Wrong


class BesselOfOwnShare(Sharing):
    """The running variance is made unbiased with the number of values of the first device alone."""

    class Wrong(SharingLayer):
        def accumulate(self, mean: Array, var: Array, values: int) -> None:
            super().accumulate(
                mean, var, values * self.shares[0] // sum(self.shares) if self.shares else values
            )

    wrong = Wrong


def changed(outcome: Outcome, **values: Any) -> Outcome:
    """The outcome with other values."""
    return Outcome(**{**vars(outcome), **values})


def axes(x: Array) -> tuple[int, ...]:
    """All axes but that of the channels."""
    return (0, *range(2, x.ndim))


WRONG_SUBJECTS: dict[str, tuple[type[WrongSubject], ...]] = {
    "layout": (ChannelsLastMisread, StridesIgnored, RepeatedImageCountedOnce),
    "dtype": (OutputInFloat32, ComputedInFloat32, ReducedInHalf, RunningStatisticsInHalf),
    "aliasing": (OutputMemoryReused,),
    "synchronization": (
        OwnStatistics,
        SharesCountEqually,
        GradientOfOwnShare,
        RunningStatisticsOfOwnShare,
        BesselOfOwnShare,
    ),
}
"""Every wrong subject, by what its mistake is about."""


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
