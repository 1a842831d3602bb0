"""The tolerances: what is right in float32 is within them; test_mutants.py shows that no mistake is."""

import math
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest

from rbn.conformance.cases import LARGE, parse
from rbn.conformance.checks import PASSED, check_case
from rbn.conformance.subjects.numpy import NumpyLayer
from rbn.conformance.suite import all_cases, with_seeds
from rbn_core.reference import Layer


class Single(Layer):
    """The reference with float32 in every step: sums, statistics, gradients."""

    dtype = np.float32


class Narrow(NumpyLayer):
    """float32 in every step, and every result but the running statistics of the narrowest type in play."""

    def run(self, x, training, cotangent):
        outcome = super().run(x, training, cotangent)
        narrow = {name: value.astype(x.dtype) for name, value in outcome.gradients.items()}
        return replace(outcome, gradients=narrow)


FLOAT32 = [
    case
    for case in all_cases()
    if case.dtype == "float32"
    and math.prod(case.shape) <= LARGE
    and NumpyLayer("float32", Single).takes(case)
]


def test_a_correct_implementation_in_float32_is_within_every_tolerance():
    worst = defaultdict(float)
    for case in with_seeds(FLOAT32, 3):
        result = check_case(NumpyLayer("float32", Single), case)
        assert result.status == PASSED, f"{case.id}: {result.message}"
        for deviation in result.deviations:
            worst[deviation.quantity] = max(worst[deviation.quantity], deviation.ratio)
    print(", ".join(f"{quantity} {ratio:.2f}" for quantity, ratio in worst.items() if ratio))
    assert {"y", "dx", "d gamma", "d conv_weight", "running_mean", "running_var"} <= worst.keys()


def test_one_rounding_to_the_narrowest_type_is_within_the_tolerance_of_mixed_precision():
    subject = Narrow("narrow", Single)
    cases = [case for case in all_cases() if case.precision and subject.takes(case)]
    assert {case.dtype for case in cases} == {"float16", "bfloat16"}
    worst = defaultdict(float)
    for case in with_seeds(cases, 20):
        result = check_case(subject, case)
        assert result.status == PASSED, f"{case.id}: {result.message}"
        for deviation in result.deviations:
            worst[deviation.quantity] = max(worst[deviation.quantity], deviation.ratio)
    print(", ".join(f"{quantity} {ratio:.2f}" for quantity, ratio in worst.items() if ratio))
    assert all(0.25 <= worst[name] <= 0.6 for name in ("d gamma", "d center_weight", "d conv_weight"))
    assert worst["running_mean"] <= 0.1 >= worst["running_var"]


@pytest.mark.parametrize("statistic", ["channel_std", "spatial_std"])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_the_gradient_of_a_deviation_is_within_it_where_planes_are_constant(mode, statistic):
    """Where it divides by sqrt(eps), and the rounding of X - mu counts 300 times."""
    options = f"centering={statistic},scaling={statistic}"
    for case in with_seeds([parse(f"rbn/{mode}/constant/3x4x2x3/{options}/float32")], 100):
        result = check_case(NumpyLayer("float32", Single), case)
        assert result.worst.ratio <= 0.5, f"{case.id}: {result.worst}"
