"""No false alarm: what is right passes with whatever numbers."""

from dataclasses import replace

import pytest

from rbn.conformance import loading
from rbn.conformance.cases import parse
from rbn.conformance.checks import FAILED, PASSED, check_case
from rbn.conformance.subjects.numpy import Numpy, NumpyLayer
from rbn.conformance.suite import quick_cases, with_seeds
from rbn_core.reference import Layer

SEEDS = (20, pytest.param(200, marks=pytest.mark.long))
MADE_UP = tuple(
    case
    for case in quick_cases()
    if case.data not in ("photographs", "digits") and NumpyLayer("reference", Layer).takes(case)
)
"""Real images have one set of numbers each."""

BY_TURNS = (
    "rbn/train/offset0/8x3/float32",
    "rbn/train/offset1000/3x1x2x3/float32",
    "rbn/train/offset10/3x4x2x3/centering=channel_std,scaling=channel_std/float32",
    "rbn/train/tiny/3x4x2x3/float32",
    "rbn/train/offset10/2x3x5/float16",
    "rbn/eval/offset10/2x5x7x7/float32",
    "iebn/train/offset10/3x1x2x3/float32",
    "bnet/train/offset0/2x3x7/float32",
    "bn/train/offset1000/3x4x2x3/float32",
)
"""What every backend runs in seconds."""


@pytest.mark.parametrize("seeds", SEEDS)
@pytest.mark.parametrize("case", MADE_UP, ids=lambda case: case.id)
def test_many_sets_of_numbers_raise_no_alarm(case, seeds):
    reference = NumpyLayer("reference", Layer)
    for variant in with_seeds([case], seeds):
        result = check_case(reference, variant)
        assert result.status == PASSED, f"{variant.id}: {result.message}"
        result = check_case(Numpy(), variant)
        assert result.status != FAILED, f"{variant.id}: {result.message}"


@pytest.mark.parametrize("seeds", SEEDS)
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.framework(name.partition(".")[0]))
        for name in loading.SUBJECTS
        if name != "numpy"
    ],
)
def test_the_same_for_every_backend_case_by_case_in_turns(name, seeds):
    (reference,) = loading.SUBJECTS[name]
    subject = loading.load(reference)
    for seed in range(seeds):
        variant = replace(parse(BY_TURNS[seed % len(BY_TURNS)]), variant=seed)
        result = check_case(subject, variant)
        assert result.status == PASSED, f"{variant.id}: {result.message}"
