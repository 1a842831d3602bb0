"""Every planted mistake is rejected, and a layer that has one is told which."""

from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rbn.conformance import held_out as held_out_module
from rbn.conformance import wrong_layers, wrong_subjects
from rbn.conformance.cases import PRECISIONS, parse
from rbn.conformance.checks import FAILED, check
from rbn.conformance.diagnosis import behaviour, those_for
from rbn.conformance.held_out import HELD_OUT
from rbn.conformance.kills import kills
from rbn.conformance.mutants import MUTANTS
from rbn.conformance.score import RIGHT, Scorer
from rbn.conformance.score import table as score
from rbn.conformance.subject import Outcome
from rbn.conformance.subjects.numpy import NumpyLayer
from rbn.conformance.suite import DTYPES, all_cases, select
from rbn.conformance.wrong_layers import (
    FlippedMomentum,
    GammaGradientOfXs,
    MaxPooling,
    OnePassVariance,
    RunningDeviation,
    ScalingByMaxPooling,
    ScalingStatisticOfX,
    TrainingDoesNotAccumulate,
)
from rbn_core.reference import Layer

DOCS = Path(__file__).parents[2] / "docs" / "conformance.md"

# One fixture runs every mutant over the cases that tell.
pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(scope="module")
def scorer():
    """Runs every mutant once in every case that tells."""
    return Scorer()


@pytest.fixture(scope="module")
def killers(scorer):
    """For every mutant the cases that reject it."""
    found = defaultdict(list)
    for case in scorer.cases:
        for mutant in those_for(case):
            if scorer.behaviour(mutant, case).wrong:
                found[mutant.name].append(case)
    return found


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_every_mutant_is_rejected_by_more_than_one_case(mutant, killers):
    caught = killers[mutant.name]
    assert len(caught) > 1, f"thinly covered: {mutant.mistake}"
    print(f"{mutant.name}: {len(caught)} cases, first {caught[0].id}")


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_is_wrong_and_not_broken(mutant, killers):
    for case in killers[mutant.name][:3]:
        assert "raised" not in behaviour(mutant, case).wrong, case.id


def test_a_mistake_shows_nowhere_but_in_the_cases_that_it_is_about(scorer):
    """So that nobody has to look there."""
    elsewhere = [(m, case) for m in MUTANTS for case in scorer.cases if not m.about(case)]
    elsewhere = [(m, case) for m, case in elsewhere if m.subject().takes(case)]
    for mutant, case in elsewhere[:: len(elsewhere) // 1000]:
        assert not behaviour(mutant, case).wrong, (mutant.name, case.id)


def test_the_table_of_kills_has_what_the_mutants_do(scorer, killers):
    cases = scorer.cases[::40]
    for case, names in kills(cases):
        rejected = {mutant.name for mutant in MUTANTS if case in killers[mutant.name]}
        hostile = {mutant.name for mutant in MUTANTS if mutant.kind == "hostile"}
        assert {*names} == (rejected & hostile if case.spoilt else rejected)


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
    shared |= {"SharingLayer", "FirstValueForAll", "OtherRestriction"}
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
        rejecting = {case.precision for case in all_cases() if case.generic in killers[mutant.name]}
        assert rejecting >= PRECISIONS.keys(), mutant.name


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
def test_a_layer_with_a_mistake_is_told_which(mutant, scorer):
    verdict = scorer.known(mutant)
    assert verdict.word == RIGHT, verdict.diagnosis.lines
    assert len(verdict.diagnosis.causes) <= 3
    assert verdict.diagnosis.facts == ()


FLIPPED = "behaves like: The momentum weighs the new value instead of the old."


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
    cases = select(
        all_cases(), ["rbn/train/offset10/*/float32"], ["*shares*", "*strided", "*expanded", "*1100*"]
    )
    results = check(Float32Flipped(), cases, on_failure="collect")
    assert {result.status for result in results} == {FAILED}
    assert [cause.mistake for cause in results.diagnosis.causes] == [FLIPPED]
    assert len(results.diagnosis.causes[0].cases) == len(results)
    assert {result.causes for result in results} == {(FLIPPED,)}
    number = len(results)
    assert results.diagnosis.summary == (f"This predicts all {number} failures, number by number.")


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
    assert [cause.mistake for cause in results.diagnosis.causes] == [FLIPPED]
    failed = {result.case for result in results if result.status == FAILED}
    assert {case.rpartition("/momentum=")[2] for case in failed} == {"0.0/float32", "1.0/float32"}
    assert {*results.diagnosis.causes[0].cases} == failed


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
    assert result.causes == (FLIPPED,)


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


def test_two_mistakes_at_once_that_nobody_knows_are_told_in_facts():
    class Both(Layer):
        def accumulate(self, mean, var, values):
            super().accumulate(1.5 * mean, 2.0 * var, values)

    results = check(
        NumpyLayer("both", Both),
        select(all_cases(), ["rbn/*/offset0/2x5x7x7/float64"]),
        on_failure="collect",
    )
    assert results.diagnosis.causes == ()
    text = "\n".join(results.diagnosis.facts)
    assert "What a batch adds to running_mean is 1.5 times what is due." in text
    assert "What a batch adds to running_var is 2 times what is due." in text
    assert results.diagnosis.lines[0].startswith("No known mistake gives these failures and these passes")


def test_two_known_mistakes_at_once_are_both_named():
    class Both(GammaGradientOfXs, RunningDeviation):
        pass

    cases = select(all_cases(), ["rbn/*/offset0/*/float64"], ["*shares*", "*channels_last", "*expanded"])
    diagnosis = check(NumpyLayer("both", Both), cases, on_failure="collect").diagnosis
    assert {cause.mistake for cause in diagnosis.causes} == {
        f"behaves like: {mistake.__doc__}" for mistake in (GammaGradientOfXs, RunningDeviation)
    }
    assert diagnosis.facts == ()
    assert diagnosis.summary.startswith("Together they predict all")


def test_mistakes_that_nothing_tells_apart_are_named_together():
    cases = select(all_cases(), ["iebn/*/offset0/2x5x7x7/float64"])
    diagnosis = check(NumpyLayer("mine", ScalingByMaxPooling), cases, on_failure="collect").diagnosis
    assert {cause.mistake for cause in diagnosis.causes} == {
        f"behaves like: {mistake.__doc__}" for mistake in (ScalingByMaxPooling, MaxPooling)
    }
    assert diagnosis.summary.startswith("Each of them predicts all 2 failures, number by number.")
    assert diagnosis.summary.endswith(" No case that ran tells the alike ones apart.")


def test_what_a_passed_case_rules_out_is_not_named():
    """A layer that flips its momentum only where its output is wanted in float32."""

    class Sometimes(FlippedMomentum):
        def forward(self, x, training):
            self.wrong = x.dtype == np.float32
            return super().forward(x, training)

        def accumulate(self, mean, var, values):
            (FlippedMomentum if self.wrong else Layer).accumulate(self, mean, var, values)

    failing, passing = (parse(f"rbn/train/offset0/2x5x7x7/{dtype}") for dtype in ("float32", "float64"))
    alone = check(NumpyLayer("mine", Sometimes), [failing], on_failure="collect")
    assert [cause.mistake for cause in alone.diagnosis.causes] == [FLIPPED]
    both = check(NumpyLayer("mine", Sometimes), [failing, passing], on_failure="collect")
    assert both.diagnosis.causes == ()
    assert any("wrong only with dtype float32" in fact for fact in both.diagnosis.facts)


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

    cases = select(all_cases(), ["bn/*/offset*/*/float??"], ["*shares*", "*/offset0/3x4*", "*/8x3/*"])
    results = check(NumpyLayer("mine", OnePass), cases, on_failure="collect")
    (cause,) = results.diagnosis.causes
    assert cause.mistake.startswith(
        "fails in the same quantities, and by as much, as: The variance is E[X^2]"
    )
    assert "quantity by quantity" in results.diagnosis.summary


def test_in_float32_every_mistake_is_ten_times_beyond_the_tolerance_somewhere(killers):
    """While test_tolerances.py shows that what is right stays within it."""
    for mutant in MUTANTS:
        if mutant.kind not in ("dtype", "precision"):  # those are of other dtypes
            chosen = [replace(case, dtype="float32") for case in killers[mutant.name] if case.dtype in DTYPES]
            assert any(max(behaviour(mutant, case).ratios.values()) >= 10 for case in chosen), mutant.name


def test_mistakes_about_dtypes_are_ten_times_beyond_the_tolerance_of_theirs(killers):
    shape = "rbn/train/offset10/2x3x64x64"
    long = [parse(f"{shape}/{dtype}/precision=mixed_{dtype}") for dtype in ("float16", "bfloat16")]
    for mutant in MUTANTS:
        if mutant.kind in ("dtype", "precision"):
            chosen = (*killers[mutant.name], *long)
            assert any(max(behaviour(mutant, case).ratios.values()) >= 10 for case in chosen), mutant.name


def test_the_score_in_the_documents_is_that_of_the_mistakes_that_are_held_out(scorer):
    verdicts = [
        scorer.held_out(NumpyLayer(layer.__name__, layer), tells, layer.__name__)
        for layer, tells in HELD_OUT.items()
    ]
    for verdict in verdicts:
        assert verdict.diagnosis.causes == (), verdict.name
        assert 0 < len(verdict.diagnosis.facts) <= 6, verdict.name
    rows = score(verdicts).splitlines()
    assert rows[-1] in DOCS.read_text()


@pytest.mark.long
def test_the_score_in_the_documents_is_that_of_the_command(scorer):
    assert score(list(scorer.all())) in DOCS.read_text()


def test_no_mistake_that_is_held_out_is_planted():
    held_out = [c for c in vars(held_out_module).values() if isinstance(c, type) and issubclass(c, Layer)]
    assert {layer.__name__ for layer in held_out} - {"Layer"} == {layer.__name__ for layer in HELD_OUT}
    assert len(HELD_OUT) >= 12
    assert not {layer.__doc__ for layer in HELD_OUT} & {mutant.mistake for mutant in MUTANTS}
