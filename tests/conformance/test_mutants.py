"""Every planted mistake is rejected, and a layer that has one is told which."""

from collections import defaultdict

import numpy as np
import pytest

from rbn.conformance.cases import parse
from rbn.conformance.checks import FAILED, check, check_case
from rbn.conformance.diagnosis import behaviour
from rbn.conformance.kills import kills
from rbn.conformance.mutants import MUTANTS
from rbn.conformance.subject import Outcome
from rbn.conformance.subjects.numpy import NumpyLayer
from rbn.conformance.suite import all_cases, select
from rbn.conformance.wrong_layers import OnePassVariance, ScalingStatisticOfX, TrainingDoesNotAccumulate
from rbn_core.reference import Layer


@pytest.fixture(scope="module")
def killers():
    """For every mutant the cases that reject it."""
    found = defaultdict(list)
    for case, names in kills(all_cases()):
        for name in names:
            found[name].append(case)
    return found


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_every_mutant_is_rejected_by_more_than_one_case(mutant, killers):
    caught = killers[mutant.name]
    assert len(caught) > 1, f"thinly covered: {mutant.mistake}"
    print(f"{mutant.name}: {len(caught)} cases, first {caught[0].id}")


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_is_wrong_and_not_broken(mutant, killers):
    for case in killers[mutant.name][:3]:
        assert "raised" not in behaviour(mutant, case)[1], case.id


def test_there_are_at_least_forty_mutants_and_each_says_its_mistake():
    assert len(MUTANTS) >= 40
    assert (
        len({mutant.name for mutant in MUTANTS})
        == len({mutant.mistake for mutant in MUTANTS})
        == len(MUTANTS)
    )
    for mutant in MUTANTS:
        assert mutant.mistake != Layer.__doc__
        assert mutant.mistake.endswith(".")


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_layer_with_a_mistake_is_told_which(mutant, killers):
    caught = killers[mutant.name]
    results = check(mutant.subject(), [caught[0], caught[-1]], on_failure="collect")
    for result in results:
        assert result.status == FAILED
        assert result.causes
        assert result.causes[0].startswith("behaves like:")
    assert f"behaves like: {mutant.mistake}" in {cause for result in results for cause in result.causes}


class Float32Flipped(NumpyLayer):
    """A float32 layer of somebody else's, with the momentum's other convention."""

    def __init__(self):
        class Flipped(Layer):
            def accumulate(self, mean, var, values):
                m = self.config.momentum
                for name, batch in (("running_mean", mean), ("running_var", var * values / (values - 1))):
                    self.statistics[name] = (1 - m) * self.statistics[name] + m * batch
                self.statistics["num_batches_tracked"] += 1

        super().__init__("mine", Flipped)

    def run(self, x, training, cotangent):
        outcome = super().run(x, training, cotangent)
        noise = 1 + np.finfo("float32").eps * np.random.default_rng(0).uniform(-1, 1, x.shape)
        return Outcome(**{**vars(outcome), "y": (outcome.y * noise).astype(x.dtype)})


def test_the_cause_is_found_through_the_rounding_of_another_implementation():
    cases = select(all_cases(), ["rbn/train/offset10/*/float32"], ["*shares*", "*strided", "*expanded"])
    results = check(Float32Flipped(), cases, on_failure="collect")
    assert {result.status for result in results} == {FAILED}
    assert {result.causes for result in results} == {
        ("behaves like: The momentum weighs the new value instead of the old.",)
    }


class Live(Float32Flipped):
    """One that hands out the very arrays that its next step changes."""

    def state(self):
        return self.live

    def run(self, x, training, cotangent):
        outcome = super().run(x, training, cotangent)
        for name, value in self.layer.state().items():
            self.live[name][...] = value
        return outcome

    def build(self, *arguments):
        super().build(*arguments)
        self.live = self.layer.state()


def test_the_cause_is_found_where_states_are_views_of_what_the_next_step_changes():
    (result,) = check(Live(), [parse("rbn/train/offset0/2x5x7x7/float32")], on_failure="collect")
    assert result.causes == ("behaves like: The momentum weighs the new value instead of the old.",)


def test_two_mistakes_at_once_are_told_where_to_look():
    class Both(Layer):
        def accumulate(self, mean, var, values):
            super().accumulate(1.5 * mean, 2.0 * var, values)

    (result,) = check(
        NumpyLayer("both", Both),
        select(all_cases(), ["rbn/train/offset0/2x5x7x7/float32"]),
        on_failure="collect",
    )
    assert result.causes
    assert all(cause.startswith("fails in much the same way as:") for cause in result.causes)


class OwnGradients(NumpyLayer):
    """K_s of X, with the gradients of that and not of eq. 9, as automatic differentiation finds them."""

    def __init__(self):
        super().__init__("mine", ScalingStatisticOfX)

    def run(self, x, training, cotangent):
        outcome = super().run(x, training, cotangent)
        gradients = {name: 2.0 * value for name, value in outcome.gradients.items()}
        return Outcome(**{**vars(outcome), "dx": outcome.dx + cotangent, "gradients": gradients})


def test_the_cause_of_a_wrong_output_is_found_whatever_its_gradients():
    (result,) = check(OwnGradients(), [parse("rbn/train/offset0/2x5x7x7/float32")], on_failure="collect")
    assert result.causes == ("behaves like: K_s is taken from X instead of X_s.",)


def test_statistics_that_stand_still_are_found_whether_or_not_batches_are_counted():
    class Counts(TrainingDoesNotAccumulate):
        def accumulate(self, mean, var, values):
            self.statistics["num_batches_tracked"] += 1

    for layer in (TrainingDoesNotAccumulate, Counts):
        (result,) = check(
            NumpyLayer("mine", layer), [parse("rbn/train/offset0/2x5x7x7/float32")], on_failure="collect"
        )
        assert result.causes == ("behaves like: Training leaves the running statistics as they are.",)


def test_a_mistake_of_rounding_is_found_by_the_size_of_its_errors():
    class OnePass(OnePassVariance):
        """The same mistake with other roundings."""

        def statistics_of(self, x_cm, training):
            return super().statistics_of(x_cm[:, :, ::-1], training)

    (result,) = check(
        NumpyLayer("mine", OnePass), [parse("bn/train/offset1000/2x5x7x7/float32")], on_failure="collect"
    )
    assert result.causes[0].startswith("fails in much the same way as: The variance is E[X^2] - E[X]^2")


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_every_mistake_is_far_beyond_the_tolerance(mutant, killers):
    """At least ten times in some case, while what is right stays within it in all."""
    cases = killers[mutant.name][:20]
    assert max(check_case(mutant.subject(), case).worst.ratio for case in cases) >= 10
