"""Every planted mistake is rejected, and a layer that has one is told which."""

from collections import defaultdict

import numpy as np
import pytest

from rbn.conformance import wrong_layers, wrong_subjects
from rbn.conformance.cases import PRECISIONS, parse
from rbn.conformance.checks import FAILED, check
from rbn.conformance.diagnosis import behaviour
from rbn.conformance.kills import kills
from rbn.conformance.mutants import MUTANTS
from rbn.conformance.subject import Outcome
from rbn.conformance.subjects.numpy import NumpyLayer
from rbn.conformance.suite import all_cases, select
from rbn.conformance.wrong_layers import (
    FlippedMomentum,
    OnePassVariance,
    ScalingStatisticOfX,
    TrainingDoesNotAccumulate,
)
from rbn_core.reference import Layer

# One fixture runs every mutant over every case.
pytestmark = pytest.mark.timeout(1800)


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


KINDS = {
    "formula",
    "gradient",
    "statistics",
    "state",
    "mode",
    "layout",
    "dtype",
    "precision",
    "hostile",
    "aliasing",
    "synchronization",
}


@pytest.mark.parametrize("layer", ["rbn", "iebn", "bnet"])
def test_the_cases_of_every_layer_reject_forty_mistakes_of_every_kind(layer, killers):
    rejected = [m for m in MUTANTS if any(case.layer == layer for case in killers[m.name])]
    print(f"{layer}: {len(rejected)} of {len(MUTANTS)} mutants")
    assert len(rejected) >= 40
    assert {mutant.kind for mutant in rejected} == {mutant.kind for mutant in MUTANTS} == KINDS


def test_every_wrong_layer_and_subject_is_a_mutant():
    planted = [c for c in vars(wrong_layers).values() if isinstance(c, type) and issubclass(c, Layer)]
    planted += [c for c in vars(wrong_subjects).values() if isinstance(c, type) and issubclass(c, NumpyLayer)]
    shared = {"Layer", "NumpyLayer", "WrongSubject", "Sharing", "Spoilt"}
    assert {c.__name__ for c in planted} - shared == {mutant.name for mutant in MUTANTS}


@pytest.mark.parametrize("kind", ["precision", "hostile"])
def test_at_least_five_mutants_are_about_mixed_precision_and_about_what_is_stored(kind, killers):
    mine = [mutant for mutant in MUTANTS if mutant.kind == kind]
    assert len(mine) >= 5
    for mutant in mine:
        about = "mixed" if kind == "precision" else "hostile"
        assert [case.group for case in killers[mutant.name] if about in case.group]


def test_every_way_into_mixed_precision_rejects_what_the_generic_one_does(killers):
    for mutant in (mutant for mutant in MUTANTS if mutant.kind == "precision"):
        rejecting = {case.precision for case in killers[mutant.name]}
        assert rejecting == PRECISIONS.keys(), mutant.name


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
    # Where an input has to be refused there are no numbers that could be the same.
    how = "fails in much the same way as" if caught[0].refused else "behaves like"
    for result in results:
        assert result.status == FAILED
        assert result.causes
        assert result.causes[0].startswith(how)
    assert f"{how}: {mutant.mistake}" in {cause for result in results for cause in result.causes}


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


class CountsNothing(NumpyLayer):
    """A layer without a number of batches, as the frameworks' users write them."""

    counts_batches = False

    def __init__(self):
        super().__init__("mine", FlippedMomentum)

    def state(self):
        return {name: value for name, value in super().state().items() if name != "num_batches_tracked"}


def test_the_cause_is_found_in_a_layer_that_counts_no_batches():
    cases = select(all_cases(), ["rbn/train/offset0/3x4x2x3/momentum=*/float32"])
    results = check(CountsNothing(), cases, on_failure="collect")
    causes = {result.case: result.causes for result in results if result.status == FAILED}
    assert all(
        "behaves like: The momentum weighs the new value instead of the old." in c for c in causes.values()
    )
    assert {case.rpartition("/momentum=")[2] for case in causes} == {"0.0/float32", "1.0/float32"}


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


def test_what_is_written_over_the_input_need_not_be_the_same_numbers():
    class InPlace(Layer):
        def forward(self, x, training):
            y = super().forward(x, training)
            x[...] = y
            return y

    (result,) = check(
        NumpyLayer("mine", InPlace), [parse("rbn/train/offset0/2x5x7x7/float32")], on_failure="collect"
    )
    assert result.causes == ("behaves like: X_s is written over the caller's X.",)


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


def test_in_float32_the_smallest_mistake_is_ten_times_beyond_the_tolerance(killers):
    """While test_tolerances.py shows that what is right stays within it."""
    worst = {
        mutant.name: max(
            max(behaviour(mutant, case)[1].values())
            for case in killers[mutant.name][:40]
            if case.dtype == "float32"
        )
        for mutant in MUTANTS
        if mutant.kind not in ("dtype", "precision")  # those are of other dtypes
    }
    smallest = min(worst, key=worst.__getitem__)
    print(f"the smallest: {smallest}, {worst[smallest]:.0f} times the tolerance")
    assert worst[smallest] >= 10


def test_mistakes_about_dtypes_are_ten_times_beyond_the_tolerance_of_theirs(killers):
    for mutant in MUTANTS:
        if mutant.kind in ("dtype", "precision"):
            assert max(max(behaviour(mutant, case)[1].values()) for case in killers[mutant.name]) >= 10
