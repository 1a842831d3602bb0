"""The tolerances: what is right in float32 is within them; test_mutants.py shows that no mistake is."""

import math
from collections import defaultdict

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


FLOAT32 = [case for case in all_cases() if case.dtype == "float32" and math.prod(case.shape) <= LARGE]


def test_a_correct_implementation_in_float32_is_within_every_tolerance():
    worst = defaultdict(float)
    for case in with_seeds(FLOAT32, 3):
        result = check_case(NumpyLayer("float32", Single), case)
        assert result.status == PASSED, f"{case.id}: {result.message}"
        for deviation in result.deviations:
            worst[deviation.quantity] = max(worst[deviation.quantity], deviation.ratio)
    print(", ".join(f"{quantity} {ratio:.2f}" for quantity, ratio in worst.items() if ratio))
    assert {"y", "dx", "d gamma", "d conv_weight", "running_mean", "running_var"} <= worst.keys()


@pytest.mark.parametrize("statistic", ["channel_std", "spatial_std"])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_the_gradient_of_a_deviation_is_within_it_where_planes_are_constant(mode, statistic):
    """Where it divides by sqrt(eps), and the rounding of X - mu counts 300 times."""
    options = f"centering={statistic},scaling={statistic}"
    for case in with_seeds([parse(f"rbn/{mode}/constant/3x4x2x3/{options}/float32")], 100):
        result = check_case(NumpyLayer("float32", Single), case)
        assert result.worst.ratio <= 0.5, f"{case.id}: {result.worst}"
