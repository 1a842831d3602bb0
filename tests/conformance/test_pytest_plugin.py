"""The suite in other people's pytest."""

import pytest

from rbn.conformance.subjects.numpy import NumpyLayer
from rbn.conformance.suite import all_cases
from rbn_core.reference import Layer

pytest_plugins = ["pytester"]

SUBJECTS = """
from rbn.conformance.subjects.numpy import NumpyLayer
from rbn_core.reference import Layer


class Right(NumpyLayer):
    layers = ("bn",)
    devices = 1

    def __init__(self):
        super().__init__("right", Layer)


class Unbiased(Layer):
    def standardize(self, x_cm, mean, var):
        values = x_cm.size // x_cm.shape[1]
        return super().standardize(x_cm, mean, var * values / (values - 1) if values > 1 else var)


class Wrong(NumpyLayer):
    layers = ("bn",)

    def __init__(self):
        super().__init__("wrong", Unbiased)
"""

TEST = """
from rbn.conformance import all_cases, parametrize_with_checks, select
import subjects


class Known(subjects.Wrong):
    expected_failures = {"bn/train/offset0/8x3/float32": "known"}


class Declared(subjects.Wrong):
    absent = {"bn/train/offset0/8x3/float64": "not there"}


@parametrize_with_checks(
    [subjects.Wrong(), Known(), Declared(), subjects.Right()],
    select(all_cases(), ["bn/train/offset0/8x3/float32", "bn/train/offset0/8x3/float64"]),
)
def test_conforms(subject, check):
    check(subject)
"""


@pytest.fixture
def folder(pytester):
    pytester.makepyfile(subjects=SUBJECTS)
    pytester.syspathinsert()
    return pytester


def test_the_decorator_runs_every_case_of_every_subject(folder):
    folder.makepyfile(test_mine=TEST)
    result = folder.runpytest_subprocess("-rA")
    result.assert_outcomes(passed=2, failed=4, xfailed=1, skipped=1)
    for line in (
        "PASSED test_mine.py::test_conforms[right-bn/train/offset0/8x3/float32]",
        "ConformanceError: wrong: 1 of 1 cases failed",
        "behaves like: X is normalized with the unbiased variance.",
    ):
        assert line in result.stdout.str()


def test_the_option_needs_no_test_of_ones_own(folder):
    result = folder.runpytest_subprocess("--rbn-subject", "subjects:Right", "-q")
    outcomes = result.parseoutcomes()
    assert outcomes.keys() == {"passed"}
    taken = [case for case in all_cases() if case.layer == "bn" and NumpyLayer("right", Layer).takes(case)]
    assert outcomes["passed"] == len(taken)
    result = folder.runpytest_subprocess("--rbn-subject", "subjects:Wrong", "-k", "8x3 and train and offset0")
    outcomes = result.parseoutcomes()
    assert outcomes.keys() == {"failed", "deselected"}
    assert "behaves like: X is normalized with the unbiased variance." in result.stdout.str()


@pytest.mark.parametrize("wrong", ["no_such_module:Right", "subjects:Rihgt", "builtins:dict"])
def test_a_subject_that_cannot_be_loaded_is_an_error_of_usage(folder, wrong):
    result = folder.runpytest_subprocess("--rbn-subject", wrong)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: --rbn-subject {wrong}: *"])


def test_a_session_without_it_imports_nothing_slow(folder):
    folder.makepyfile(
        """
        import sys

        def test_light():
            assert not {"sklearn", "rbn.conformance.suite", "torch"} & set(sys.modules)
        """
    )
    folder.runpytest_subprocess().assert_outcomes(passed=1)
