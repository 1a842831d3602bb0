"""What is said of a mistake that nobody knows is true, and is what a person needs."""

import numpy as np
import pytest

from rbn.conformance.checks import check, remember
from rbn.conformance.diagnosis import Diagnosis, Evidence
from rbn.conformance.held_out import HELD_OUT, BetaSubtracted, GammaMadePositive, MomentumHardcoded
from rbn.conformance.subjects.numpy import NumpyLayer
from rbn.conformance.suite import all_cases, select, with_seeds
from rbn_core.reference import Layer, per_channel

CASES = select(
    all_cases(),
    [
        "rbn/*/offset0/2x5x7x7/float64",
        "rbn/*/offset0/8x3/float64",
        "rbn/*/offset10/3x1x2x3/float64",
        "rbn/*/offset10/2x5x7x7/float64",
        "rbn/*/offset0/3x4x2x3/scaling=None/float64",
        "bnet/train/offset0/2x3x5x4/kernel_size=3/float64",
    ],
    ["*shares*"],
)


class Changed(Layer):
    """Y becomes what `change` makes of it."""

    def transform(self, x_cs):
        return self.change(super().transform(x_cs))


class Border(Changed):
    def change(self, y):
        if y.ndim < 4:
            return y
        y = y.copy()
        y[:, :, 0] += 1.0
        return y


class LastImage(Changed):
    def change(self, y):
        y = y.copy()
        y[-1] *= 1.5
        return y


class FirstChannelRight(Changed):
    def change(self, y):
        wrong = np.arange(y.shape[1]) > 0
        return y * (1.0 + per_channel(wrong * np.linspace(0.5, 1.0, y.shape[1]), y))


class PerPlane(Changed):
    def change(self, y):
        return y + np.cos(np.arange(y.shape[0] * y.shape[1])).reshape(*y.shape[:2], *(1,) * (y.ndim - 2))


class PlusOne(Changed):
    def change(self, y):
        return y + 1.0


class NotANumber(Changed):
    def change(self, y):
        return y * np.nan


class NegativeFactor(Layer):
    """R comes out between -1 and 1."""

    def calibrate_scaling(self, x_s, k_s):
        r, x_cs = super().calibrate_scaling(x_s, k_s)
        return (r, x_cs) if r is None else (2 * r - 1, 2 * x_cs - x_s)


class BatchCounted(Layer):
    def backward(self, dy):
        dx, gradients = super().backward(dy)
        return len(dx) * dx, gradients


class ThroughTheMean(Layer):
    def standardize_backward(self, dx_s, s):
        right = super().standardize_backward(dx_s, s)
        return right + 0.5 * s.x_s * (dx_s * s.x_s).mean() if s.batch_statistics else right


class Exchanged(Layer):
    def backward(self, dy):
        dx, gradients = super().backward(dy)
        if "scale_weight" in gradients:
            gradients["scale_weight"] = gradients["scale_bias"]
        return dx, gradients


class Late(Layer):
    def forward(self, x, training):
        self.step = getattr(self, "step", -1) + 1
        return super().forward(x, training) + self.step


class OnlyOffCentre(Changed):
    def forward(self, x, training):
        self.off = abs(np.mean(x)) > 5
        return super().forward(x, training)

    def change(self, y):
        return 1.25 * y if self.off else y


class Stopped(Layer):
    def accumulate(self, mean, var, values):
        super().accumulate(self.statistics["running_mean"], var + 3.0, values)


class Raises(Layer):
    def forward(self, x, training):
        if not training:
            raise RuntimeError("no evaluation")
        return super().forward(x, training)


class Narrow(Changed):
    def change(self, y):
        return y.astype(np.float16).astype(float)


@pytest.mark.parametrize(
    ("layer", "fact"),
    [
        (LastImage, "y is wrong in the last image alone, wherever there are several."),
        (FirstChannelRight, "y is right in the first channel of every case with several."),
        (
            PerPlane,
            "The error of y is the same at every position of a plane (an image and channel).",
        ),
        (PlusOne, "y is what is due plus 1 everywhere."),
        (BetaSubtracted, "y is what is due less 2 times beta."),
        (NotANumber, "y is NaN in some places wherever wrong."),
        (NegativeFactor, "As y shows it, R is from -"),
        (BatchCounted, "dx is the number of images times what is due."),
        (ThroughTheMean, "The error of dx is in every channel a constant plus multiples of X_s"),
        (Exchanged, "d scale_weight is what is due as d scale_bias."),
        (Late, "y is right in the first step of every case, and wrong only from the second or third on."),
        (OnlyOffCentre, "y is wrong only where the data has a mean: in all"),
        (Stopped, "running_mean is what was there before the step."),
        (Raises, "It raises in 5 of 11 cases: RuntimeError: no evaluation (5 of them)."),
        (Raises, "It raises only in evaluation: in all 5 such cases, and in none of the other 6."),
        (Narrow, "y is off by at most"),
        (
            MomentumHardcoded,
            "running_mean and running_var are 0.99 times the old value plus 0.01 times the batch's.",
        ),
        (GammaMadePositive, "y is wrong in the channels whose gamma is negative, and in no other."),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_the_facts_say_it(layer, fact):
    diagnosis = check(NumpyLayer("mine", layer), CASES, on_failure="collect").diagnosis
    assert diagnosis.causes == ()
    assert any(each.startswith(fact) for each in diagnosis.facts), diagnosis.facts
    assert len(diagnosis.facts) <= 6


def test_the_first_fact_says_which_quantities_are_wrong_and_which_are_right():
    (first, *_) = check(NumpyLayer("mine", Exchanged), CASES, on_failure="collect").diagnosis.facts
    wrong, right = first.split(". ", 1)
    assert wrong == "Wrong: d scale_weight in 8 of 8 cases"
    for name in ("y", "dx", "d gamma", "running_mean", "running_var", "num_batches_tracked"):
        assert name in right


@pytest.mark.parametrize("layer", list(HELD_OUT)[::4], ids=lambda layer: layer.__name__)
def test_the_relations_are_the_same_with_other_numbers(layer):
    """A fact that is chance would not be."""
    one, other = (
        check(NumpyLayer("mine", layer), cases, on_failure="collect").diagnosis.facts
        for cases in (CASES, with_seeds(CASES, 2)[len(CASES) :])
    )
    assert one == other


def test_nothing_is_said_of_what_is_right():
    results = check(NumpyLayer("mine", Layer), CASES)
    assert results.diagnosis == Diagnosis()
    assert results.diagnosis.lines == []


def test_what_another_process_found_rules_out_what_this_one_would_name():
    """Of a process that a case has ended the results are kept, and not the numbers."""
    evidence, subject = Evidence(), NumpyLayer("mine", OnlyOffCentre)
    remember(evidence, subject, CASES, check(subject, CASES, on_failure="collect"))
    diagnosis = evidence.diagnose()
    assert diagnosis.causes == ()
    assert any("wrong only where the data has a mean" in fact for fact in diagnosis.facts)
