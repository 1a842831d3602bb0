"""Checking a subject: what is right passes, what is wrong is named, and declarations are held to."""

from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest

import rbn.conformance
from rbn.conformance.cases import SPOILS
from rbn.conformance.checks import (
    ABSENT,
    EXPECTED,
    FAILED,
    LATE,
    PASSED,
    ConformanceError,
    check,
    check_case,
)
from rbn.conformance.comparison import Deviation, compare
from rbn.conformance.subject import NoResultInTimeError, Outcome
from rbn.conformance.subjects.numpy import Numpy, NumpyFunction, NumpyLayer
from rbn.conformance.suite import DTYPES, all_cases, select, with_seeds
from rbn_core.errors import RBNValueError
from rbn_core.reference import Layer

SOME = tuple(
    case
    for case in all_cases()
    if case.data == "digits" and case.dtype in DTYPES and case.layer == "rbn" and not case.options
)


class Reference(NumpyLayer):
    def __init__(self):
        super().__init__("reference", Layer)


def collect(subject, cases=None, **options):
    return check(subject, cases, on_failure="collect", **options)


def failed(subject, cases=None):
    return [result for result in collect(subject, cases) if result.status == FAILED]


def test_the_reference_passes_every_case():
    subject = Reference()
    results = collect(subject)
    assert [result.case for result in results] == [case.id for case in all_cases() if subject.takes(case)]
    assert {result.status for result in results} == {PASSED}


def test_the_two_pass_form_passes_every_case_it_has():
    assert {result.status for result in collect(Numpy())} == {PASSED, ABSENT}


def test_the_suite_is_imported_from_its_front_door():
    assert rbn.conformance.check is check
    assert set(rbn.conformance.__all__) == rbn.conformance._HOMES.keys()
    for name in rbn.conformance.__all__:
        assert getattr(rbn.conformance, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'chekc'"):
        rbn.conformance.chekc  # noqa: B018 (the attribute is what is tested)


class Raises(Reference):
    def run(self, x, training, cotangent):
        raise RuntimeError("out of order")


class Prints(Reference):
    def run(self, x, training, cotangent):
        print("loud")
        return super().run(x, training, cotangent)


class WrongShape(Layer):
    """dx is one image short."""

    def backward(self, dy):
        dx, gradients = super().backward(dy)
        return dx[1:], gradients


class AllNaN(Layer):
    """y is NaN."""

    def forward(self, x, training):
        return np.full_like(super().forward(x, training), np.nan)


class ForgetsAGradient(Layer):
    """The gradient of beta is not there."""

    def backward(self, dy):
        dx, gradients = super().backward(dy)
        return dx, {name: value for name, value in gradients.items() if name != "beta"}


class WrongDtype(Reference):
    def run(self, x, training, cotangent):
        outcome = super().run(x, training, cotangent)
        return Outcome(**{**vars(outcome), "y": outcome.y.astype("float16")})


@pytest.mark.parametrize(
    ("subject", "quantity", "message"),
    [
        (Raises(), "raised", "RuntimeError: out of order"),
        (NumpyLayer("short", WrongShape), "dx", "shape (15, 6, 6, 6) where (16, 6, 6, 6) is due"),
        (NumpyLayer("NaN", AllNaN), "y", "nan where"),
        (
            NumpyLayer("forgets", ForgetsAGradient),
            "gradients",
            "['center_weight', 'gamma', 'scale_bias', 'scale_weight'] where",
        ),
        (WrongDtype(), "y", "dtype float16 where"),
    ],
    ids=["raises", "wrong shape", "NaN", "a gradient missing", "wrong dtype"],
)
def test_a_broken_subject_gets_a_clear_row_for_every_case(subject, quantity, message):
    results = collect(subject, SOME)
    assert [result.case for result in results] == [case.id for case in SOME]
    assert {result.status for result in results} == {FAILED}
    assert {result.worst.quantity for result in results} == {quantity}
    assert all(message in result.message for result in results)


class Slips(Reference):
    """Refuses with whatever it is told to."""

    spoils = SPOILS
    named = (ValueError, TypeError)

    def __init__(self, error, change=False):
        super().__init__()
        self.error, self.change = error, change
        self.refusals = self.named

    def spoil(self, name, kind):
        pass

    def run(self, x, training, cotangent):
        if self.change:
            self.layer.statistics["running_mean"] = self.layer.statistics["running_mean"] + 1
        raise self.error


REFUSING = select(all_cases(), ["rbn/train/offset0/1x3/float32", "rbn/train/*/spoilt=gamma:short"])


@pytest.mark.parametrize("error", [ValueError("no"), TypeError("no"), RBNValueError("no")])
def test_only_a_value_error_or_a_type_error_is_a_refusal_and_its_text_is_kept(error):
    results = collect(Slips(error), REFUSING)
    assert [result.status for result in results] == [PASSED] * 2
    assert [result.message for result in results] == [f"{type(error).__name__}: no"] * 2


@pytest.mark.parametrize(
    "error",
    [
        NameError("slip"),
        AttributeError("slip"),
        KeyError("slip"),
        IndexError("slip"),
        AssertionError("slip"),
        SystemError("slip"),
        ZeroDivisionError("slip"),
        RuntimeError("slip"),
        NotImplementedError("slip"),
        RecursionError("slip"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_anything_else_that_is_raised_is_a_failure_that_says_what(error):
    for result in collect(Slips(error), REFUSING):
        assert result.status == FAILED
        assert f"is due as a ValueError or TypeError, and it raised {type(error).__name__}:" in result.message
        assert "slip" in result.message


def test_a_subject_names_what_its_framework_refuses_with_but_no_slip_is_among_it():
    class Named(Slips):
        named = (ValueError, RuntimeError)

    assert {r.status for r in collect(Named(RuntimeError("wrong size")), REFUSING)} == {PASSED}
    for error in (NotImplementedError("slip"), RecursionError("slip"), TypeError("not named")):
        assert {r.status for r in collect(Named(error), REFUSING)} == {FAILED}

    class Meant(Slips):
        named = (NotImplementedError,)

    assert {r.status for r in collect(Meant(NotImplementedError("no such")), REFUSING)} == {PASSED}


def test_a_refusal_that_leaves_a_changed_state_fails():
    for result in collect(Slips(ValueError("no"), change=True), REFUSING):
        assert result.status == FAILED
        assert result.message.startswith("running_mean at ")


def test_right_numbers_where_a_refusal_is_due_fail():
    class Unmoved(Reference):
        def spoil(self, name, kind):
            pass

    results = collect(Unmoved(), select(all_cases(), ["rbn/train/*/spoilt=gamma:*"]))
    wrong = {result.case.rpartition(":")[2]: result.message for result in results if result.status == FAILED}
    assert wrong.pop("missing").startswith("gradients ")  # of the layer without gamma there are fewer
    assert wrong.keys() == {"short", "one", "long", "empty"}
    assert all(
        message.startswith(f"refusal is due: gamma is {kind}. Got y ") for kind, message in wrong.items()
    )


def test_a_layer_without_the_number_of_batches_has_to_train_on():
    cases = select(all_cases(), ["*num_batches_tracked:missing"])
    assert {result.status for result in collect(Slips(ValueError("no")), cases)} == {FAILED}
    assert [result.status for result in collect(Reference(), cases)] == [PASSED] * 4


def test_a_layer_without_gamma_or_beta_may_be_one_that_never_had_them():
    class Drops(Reference):
        def spoil(self, name, kind):
            plain = Layer(replace(self.layer.config, **{name: False}))
            plain.load({other: value for other, value in self.state().items() if other != name})
            self.layer = plain

    cases = select(all_cases(), ["*spoilt=gamma:missing", "*spoilt=beta:missing"])
    assert {result.status for result in collect(Drops(), cases)} == {PASSED}


def test_what_is_late_is_no_failure_and_no_success():
    class Late(Reference):
        def run(self, x, training, cotangent):
            raise NoResultInTimeError("device 1 of 2 gave no answer")

    results = collect(Late(), SOME)
    assert {(r.status, r.message) for r in results} == {
        (LATE, "no result in time: device 1 of 2 gave no answer")
    }
    with pytest.raises(ConformanceError, match="no result in time: device 1"):
        check(Late(), SOME)


def test_what_a_subject_does_not_declare_is_not_run():
    class Plain(Reference):
        precisions = ()
        spoils = ("short",)

    results = collect(Plain(), select(all_cases(), ["*/precision=*", "bn/*/spoilt=*"]))
    assert results
    assert all(result.case.endswith(":short") for result in results)
    assert len([case for case in all_cases() if Plain().takes(case) and case.precision]) == 0


def test_a_failure_raises_at_the_end_and_names_the_case_and_the_cause():
    class Flipped(Layer):
        def accumulate(self, mean, var, values):
            super().accumulate(mean, var, values)
            self.statistics["num_batches_tracked"] = 7

    with pytest.raises(ConformanceError) as raised:
        check(NumpyLayer("mine", Flipped), SOME)
    text = str(raised.value)
    assert "mine: 2 of 4 cases failed" in text
    assert "rbn/train/digits/16x6x6x6/float32: num_batches_tracked at []: 7.0 where 8.0 is due" in text
    assert "behaves like: num_batches_tracked is never counted up." in text


def test_results_are_data():
    (result,) = check(Reference(), SOME[:1])
    assert (result.case, result.status) == (SOME[0].id, PASSED)
    quantities = {deviation.quantity: deviation for deviation in result.deviations}
    assert {"y", "dx", "x", "d gamma", "running_var", "num_batches_tracked"} <= quantities.keys()
    assert 0 <= quantities["y"].error <= quantities["y"].tolerance
    assert result.worst.ratio <= 1
    assert result.seconds > 0


def test_on_failure_knows_two_words():
    with pytest.raises(ValueError, match="expected on_failure"):
        check(Reference(), SOME, on_failure="ignore")


@pytest.mark.parametrize(("error", "tolerance"), [(1.0, np.nan), (np.inf, np.inf), (np.nan, 1.0)])
def test_what_cannot_be_compared_is_never_right(error, tolerance):
    assert Deviation("y", error, tolerance).ratio == np.inf


@pytest.mark.parametrize(
    ("actual", "expected", "right"),
    [
        ([np.nan, 1.0], [np.nan, 1.0], True),
        ([np.inf, 1.0], [np.nan, 1.0], True),
        ([0.0, 1.0], [np.nan, 1.0], False),
        ([np.nan, 1.0], [0.0, 1.0], False),
        ([np.nan, np.nan], [np.nan, 1.0], False),
    ],
)
def test_what_is_not_finite_must_be_so_where_the_reference_is_not(actual, expected, right):
    assert (compare("y", np.array(actual), np.array(expected), 0.1).ratio <= 1.0) == right


class Declares(Raises):
    absent: ClassVar = {"rbn/*/digits/*": "this machine has no fingers"}


def test_a_declared_absence_is_absent_with_its_reason():
    results = collect(Declares(), SOME)
    assert {(result.status, result.message) for result in results} == {
        (ABSENT, "this machine has no fingers")
    }


def test_a_declared_absence_that_passes_fails():
    class Wrong(Numpy):
        absent = Declares.absent

    results = collect(Wrong(), SOME)
    assert {result.status for result in results} == {FAILED}
    assert "but it passes" in results[0].message


def test_a_declaration_that_matches_nothing_fails():
    class Stale(Numpy):
        absent: ClassVar = {**Numpy.absent, "rbn/no/such/case": "it was removed"}

    (result,) = failed(Stale(), SOME)
    assert "no case matches 'rbn/no/such/case'" in result.message


def test_an_expected_failure_is_expected_whatever_the_seed_and_fails_when_it_passes():
    known = {"rbn/*/digits/16x6x6x6/float??": "known since long"}
    cases = with_seeds(SOME, 2)
    results = collect(NumpyLayer("NaN", AllNaN), cases, expected_failures=known)
    assert [result.status for result in results] == [EXPECTED] * len(cases)
    assert {result.message for result in results} == {"known since long"}
    assert {result.worst.ratio for result in results} == {np.inf}
    results = collect(Raises(), cases, expected_failures=known)
    assert {result.status for result in results} == {FAILED}
    results = collect(Reference(), cases, expected_failures=known)
    assert {result.status for result in results} == {FAILED}
    (stale, *_) = [r for r in collect(Reference(), SOME, expected_failures={"x": "y"}) if r.status == FAILED]
    assert "no case matches 'x'" in stale.message


def test_what_a_subject_lacks_is_absent_and_what_it_always_does_is_due():
    class Biased(Layer):
        """Knows no running_var and counts nothing."""

        def accumulate(self, mean, var, values):
            assert self.config.running_var == "biased"
            super().accumulate(mean, var, values)

    class Simple(NumpyLayer):
        layers = ("bn",)
        fixed: ClassVar = {"running_var": "biased", "track_running_stats": True}
        counts_batches = False

        def __init__(self):
            super().__init__("simple", Biased)

        def state(self):
            return {k: v for k, v in super().state().items() if k != "num_batches_tracked"}

    results = collect(Simple())
    assert {result.case.split("/")[0] for result in results} == {"bn"}
    absent = {result.message for result in results if result.status == ABSENT}
    assert absent == {
        "stores no number of batches to average over",
        "stores no num_batches_tracked",
        "has no option track_running_stats: it is always True",
    }
    assert {result.status for result in results} == {ABSENT, PASSED}


def test_of_a_subject_without_gradients_everything_else_is_compared():
    class Forward(Reference):
        forward_only = True
        factor = 1.0

        def run(self, x, training, cotangent):
            outcome = super().run(x, training, cotangent)
            return replace(outcome, y=self.factor * outcome.y, dx=np.full_like(x, np.nan), gradients={})

    (case,) = select((), ["rbn/train/offset0/8x3/float32"])
    result = check_case(Forward(), case)
    assert result.status == PASSED
    assert {deviation.quantity for deviation in result.deviations} == {
        *("x", "y", *case.config.state_shapes()),
        *("loaded state", "cotangent", "earlier y", "earlier dx"),
    }
    with_gradients = Forward()
    with_gradients.forward_only = False
    assert check_case(with_gradients, case).status == FAILED
    wrong = Forward()
    wrong.factor = 1.01
    assert check_case(wrong, case).worst.quantity == "y"


def test_a_case_on_more_devices_than_a_subject_has_is_absent():
    class Single(Reference):
        devices = 1

    results = collect(Single(), select(all_cases(), ["*shares*"]))
    assert {(r.status, r.message) for r in results} == {
        (ABSENT, "shares its statistics on at most 1 devices")
    }


def test_a_case_of_a_way_to_share_that_a_subject_does_not_know_is_not_run():
    cases = select(all_cases(), ["*/pmap"])
    assert collect(Numpy(), cases) == []
    assert [result.status for result in collect(Reference(), cases)] == [PASSED] * len(cases)


def test_a_plain_function_is_a_subject():
    def step(x, state, config, training, cotangent):
        layer = Layer(config)
        layer.load(state)
        y = layer.forward(x, training)
        dx, gradients = layer.backward(cotangent)
        return y.astype(x.dtype), dx.astype(x.dtype), gradients, layer.state()

    check(NumpyFunction("function", step), SOME)
    check(
        NumpyFunction(
            "of the new value", lambda x, s, c, *rest: step(x, s, flipped(c), *rest), momentum="new"
        ),
        SOME,
    )


def flipped(config):
    return replace(config, momentum=1 - config.momentum)


def test_what_a_subject_prints_and_a_single_case_change_nothing(capsys):
    assert check_case(Prints(), SOME[0]).status == PASSED
