"""Wrong subjects: the reference, right in its formulas, with one plausible mistake each in how it is handled.

In dtypes, memory, mixed precision, what is stored, and devices. A mutant's docstring says the mistake, as
somebody might make it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from rbn.conformance.subject import Array, Outcome, Subject
from rbn.conformance.subjects.numpy import NumpyLayer
from rbn_core.config import Config
from rbn_core.errors import RBNError
from rbn_core.matching import State
from rbn_core.reference import Layer, Steps, batch_mean_and_variance, per_channel


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


class SummedInHalf(WrongSubject):
    """In mixed precision E and Var are added up in the narrowest type."""

    def build(self, config: Config, state: State, dtype: str, layout: str = "channels_first") -> None:
        super().build(config, state, dtype, layout)
        if not self.precision:
            return
        narrow = self.dtype

        class Narrow(Layer):
            def statistics_of(self, x_cm: Array, training: bool) -> tuple[Array, Array]:
                if not training:
                    return super().statistics_of(x_cm, training)
                mean = one_after_another(x_cm, narrow) / (x_cm.size // x_cm.shape[1])
                var = one_after_another(np.square(x_cm - per_channel(mean, x_cm)), narrow)
                var /= x_cm.size // x_cm.shape[1]
                self.accumulate(mean, var, values=x_cm.size // x_cm.shape[1])
                return mean, var

        self.layer = Narrow(config)
        self.layer.load(state)


class GradientsSummedInHalf(WrongSubject):
    """In mixed precision the parameters' gradients are added up in the narrowest type."""

    def run(self, x: Array, training: bool, cotangent: Array) -> Outcome:
        outcome = super().run(x, training, cotangent)
        if not self.precision:
            return outcome
        steps = self.layer.steps
        assert steps is not None
        terms = {"beta": cotangent, "conv_bias": cotangent, "gamma": cotangent * steps.x_cs}
        summed = {
            name: one_after_another(values, self.dtype)
            for name, values in terms.items()
            if name in outcome.gradients
        }
        return changed(outcome, gradients=outcome.gradients | summed)


class CotangentMisread(WrongSubject):
    """In mixed precision dY is float32, and its bytes are read as if it were of X's type."""

    def arriving(self, cotangent: Array) -> Array:
        arrived = super().arriving(cotangent)
        return np.frombuffer(arrived.tobytes(), cotangent.dtype)[: arrived.size].reshape(arrived.shape)


class LossScaleLeftIn(WrongSubject):
    """In mixed precision the loss scale is taken out of all gradients but one."""

    def run(self, x: Array, training: bool, cotangent: Array) -> Outcome:
        outcome = super().run(x, training, cotangent)
        if not self.precision:
            return outcome
        last = list(outcome.gradients)[-1]
        return changed(outcome, gradients=outcome.gradients | {last: 1024.0 * outcome.gradients[last]})


class GradientEndsAtTheCast(WrongSubject):
    """In mixed precision the gradient of X ends where X is cast."""

    def run(self, x: Array, training: bool, cotangent: Array) -> Outcome:
        outcome = super().run(x, training, cotangent)
        return changed(outcome, dx=np.zeros_like(outcome.dx)) if self.precision else outcome


class CalibrationsLeftOut(WrongSubject):
    """In mixed precision the layer is plain BatchNorm: the calibrations have no form in the narrow type."""

    def run(self, x: Array, training: bool, cotangent: Array) -> Outcome:
        whole = self.layer
        if not self.precision or whole.config.kernel_size is not None:
            return super().run(x, training, cotangent)
        plain = Layer(replace(whole.config, layer="RBN", centering=None, scaling=None))
        plain.load({name: value for name, value in whole.state().items() if name in plain.state()})
        self.layer = plain
        outcome = super().run(x, training, cotangent)
        self.layer, whole.statistics = whole, plain.statistics
        none = {name: np.zeros_like(value) for name, value in whole.parameters.items()}
        return changed(outcome, gradients=none | outcome.gradients, state=self.state())


class Spoilt(WrongSubject):
    """A mistake about what is stored: `mend` gives what a spoilt array is taken for."""

    def spoil(self, name: str, kind: str) -> None:
        """Change one of the layer's arrays, and take it for what it is not."""
        shape = self.layer.config.state_shapes()[name]
        super().spoil(name, kind)
        for own in (self.layer.parameters, self.layer.statistics):
            if name in own:
                own[name] = self.mend(own[name], shape, kind)

    def mend(self, found: Array, shape: tuple[int, ...], kind: str) -> Array:
        """What an array is taken for."""
        return found


class ShortVectorReadPastItsEnd(Spoilt):
    """A vector that is too short is read past its end."""

    def mend(self, found: Array, shape: tuple[int, ...], kind: str) -> Array:
        if kind not in ("short", "empty"):
            return found
        beyond = np.full(shape, 0.25)
        beyond[: len(found)] = found
        return beyond


class LongVectorCutOff(Spoilt):
    """Of a vector that is too long the first C values are taken."""

    def mend(self, found: Array, shape: tuple[int, ...], kind: str) -> Array:
        return found[: shape[0]] if kind == "long" else found


class SingleValueBroadcast(Spoilt):
    """A single value is taken for all channels."""

    def mend(self, found: Array, shape: tuple[int, ...], kind: str) -> Array:
        return np.broadcast_to(found, shape).copy() if kind == "one" else found


class HalfMisread(Spoilt):
    """The bytes of a float16 array are read as float32, past its end."""

    def mend(self, found: Array, shape: tuple[int, ...], kind: str) -> Array:
        if kind != "half":
            return found
        return np.frombuffer(2 * found.tobytes(), np.float32).reshape(shape).astype(float)


class StridesOfTheStateIgnored(Spoilt):
    """An array with strides is read as if its values stood one after another in memory."""

    def mend(self, found: Array, shape: tuple[int, ...], kind: str) -> Array:
        if kind != "strided" or found.base is None:
            return found
        return np.nan_to_num(found.base.reshape(-1)[: found.size].reshape(shape))


class MissingLeftOut(Spoilt):
    """A calibration whose parameter is missing is left out without a word."""

    def spoil(self, name: str, kind: str) -> None:
        start = self.layer.config.parameters.get(name)
        super().spoil(name, kind)
        if kind == "missing" and start is not None:
            self.layer.parameters[name] = np.full(self.layer.config.num_features, start)


class UpdatedBeforeItIsRead(Spoilt):
    """The running statistics are updated before the parameters that lie in their memory are read."""

    def run(self, x: Array, training: bool, cotangent: Array) -> Outcome:
        layer = self.layer
        shared = {
            name: other
            for name, parameter in layer.parameters.items()
            for other, statistic in layer.statistics.items()
            if parameter is statistic
        }
        before = layer.statistics.copy()
        outcome = super().run(x, training, cotangent)
        if not training or not shared:
            return outcome
        layer.parameters |= {name: layer.statistics[other] for name, other in shared.items()}
        layer.statistics = before
        return super().run(x, training, cotangent)


class IntegersStayIntegers(Spoilt):
    """Running statistics that were given as integers are rounded to integers after every step."""

    def run(self, x: Array, training: bool, cotangent: Array) -> Outcome:
        before = self.layer.statistics.copy()
        outcome = super().run(x, training, cotangent)
        for name, value in before.items():
            if np.asarray(value).dtype.kind == "i":
                self.layer.statistics[name] = np.rint(self.layer.statistics[name]).astype(int)
        return changed(outcome, state=self.state())


class RefusedAfterTheCount(Spoilt):
    """A batch is counted before the layer refuses it, or what it stores."""

    def run(self, x: Array, training: bool, cotangent: Array) -> Outcome:
        try:
            return super().run(x, training, cotangent)
        except RBNError:
            if training and "num_batches_tracked" in self.layer.statistics:
                self.layer.statistics["num_batches_tracked"] += 1
            raise


class SlipInTheRefusal(Spoilt):
    """The lines that refuse something were never run, and raise a NameError of their own."""

    def run(self, x: Array, training: bool, cotangent: Array) -> Outcome:
        try:
            return super().run(x, training, cotangent)
        except RBNError as error:
            raise NameError("name 'shape' is not defined") from error


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


def one_after_another(x: Array, dtype: np.dtype[Any]) -> Array:
    """The sum over everything but the channels in the order of memory, rounded to a dtype at every step."""
    values = np.moveaxis(x, 1, 0).reshape(x.shape[1], -1).astype(dtype)
    return np.add.accumulate(values, axis=1, dtype=dtype)[:, -1].astype(float)


def changed(outcome: Outcome, **values: Any) -> Outcome:
    """The outcome with other values."""
    return Outcome(**{**vars(outcome), **values})


def axes(x: Array) -> tuple[int, ...]:
    """All axes but that of the channels."""
    return (0, *range(2, x.ndim))


WRONG_SUBJECTS: dict[str, tuple[type[WrongSubject], ...]] = {
    "layout": (ChannelsLastMisread, StridesIgnored, RepeatedImageCountedOnce),
    "dtype": (OutputInFloat32, ComputedInFloat32, ReducedInHalf, RunningStatisticsInHalf),
    "precision": (
        SummedInHalf,
        GradientsSummedInHalf,
        CotangentMisread,
        LossScaleLeftIn,
        GradientEndsAtTheCast,
        CalibrationsLeftOut,
    ),
    "hostile": (
        ShortVectorReadPastItsEnd,
        LongVectorCutOff,
        SingleValueBroadcast,
        HalfMisread,
        StridesOfTheStateIgnored,
        MissingLeftOut,
        UpdatedBeforeItIsRead,
        IntegersStayIntegers,
        RefusedAfterTheCount,
        SlipInTheRefusal,
    ),
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
