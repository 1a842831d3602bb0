"""No false alarm: what is right passes with whatever numbers."""

import pytest

from rbn.conformance.checks import FAILED, PASSED, check_case
from rbn.conformance.subjects.numpy import Numpy, NumpyLayer
from rbn.conformance.suite import quick_cases, with_seeds
from rbn_core.reference import Layer

SEEDS = 200
MADE_UP = tuple(case for case in quick_cases() if case.data not in ("photographs", "digits"))
"""Real images have one set of numbers each."""


@pytest.mark.parametrize("case", MADE_UP, ids=lambda case: case.id)
def test_two_hundred_sets_of_numbers_raise_no_alarm(case):
    reference = NumpyLayer("reference", Layer)
    for variant in with_seeds([case], SEEDS):
        result = check_case(reference, variant)
        assert result.status == PASSED, f"{variant.id}: {result.message}"
        result = check_case(Numpy(), variant)
        assert result.status != FAILED, f"{variant.id}: {result.message}"
