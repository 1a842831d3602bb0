"""Whatever numbers, shapes and options: the two-pass form, derived apart, agrees with the reference."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from rbn.conformance.cases import LAYERS, Case, config_of, parse
from rbn.conformance.checks import FAILED, PASSED, check_case
from rbn.conformance.comparison import due
from rbn.conformance.data import EXTREMES, OFFSETS
from rbn.conformance.subjects.numpy import Numpy, NumpyLayer
from rbn.conformance.tolerances import FACTOR
from rbn_core.config import CHANNEL_STATISTICS, FLOATING, RESTRICTIONS, RUNNING_VARIANCES, STATISTICS
from rbn_core.reference import Layer

DATA = tuple(data for data in (*OFFSETS, *EXTREMES) if data not in ("inf", "nan"))
"""Made-up numbers. What stays finite of an infinity's gradient depends on the order of operations."""

SLOW = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def cases(draw, statistics=STATISTICS, data=DATA):
    """Any case of any layer."""
    layer = draw(st.sampled_from(LAYERS))
    spatial = draw(st.lists(st.integers(1, 5), min_size=int(layer == "bnet"), max_size=3))
    shape = (draw(st.integers(1, 4)), draw(st.integers(1, 4)), *spatial)
    options = {
        "eps": draw(st.sampled_from((1e-5, 1e-3, 0.1))),
        "momentum": draw(st.none() | st.floats(0, 1)),
        "running_var": draw(st.sampled_from(RUNNING_VARIANCES)),
        "track_running_stats": draw(st.booleans()),
    }
    if layer == "rbn":
        options["centering"] = draw(st.sampled_from(statistics))
        options["scaling"] = draw(st.sampled_from(statistics))
        options["restrict"] = draw(st.sampled_from(RESTRICTIONS))
    if layer == "bnet":
        options["kernel_size"] = draw(st.sampled_from((1, 3, 5)))
    else:
        options |= {"gamma": draw(st.booleans()), "beta": draw(st.booleans())}
    config = config_of(layer, shape, options)
    values = shape[0] * int(np.prod(shape[2:]))
    training = draw(st.booleans()) and values > 1
    if not config.track_running_stats and values == 1:
        training, config = False, config_of(layer, shape, options | {"track_running_stats": True})
    return Case(
        config,
        training,
        draw(st.sampled_from(data)),
        shape,
        draw(st.sampled_from(FLOATING)),
        draw(st.sampled_from(("channels_first", "channels_last", "strided")))
        if len(shape) > 2
        else "channels_first",
        variant=draw(st.integers(0, 1000)),
    )


def holds(subject, case):
    """Check a case; one that fails can be run again by the id that is printed."""
    result = check_case(subject, case)
    note(f"rbn conform --only {case.id!r}")
    assert result.status != FAILED, f"{case.id}: {result.message}"


@given(case=cases())
@SLOW
def test_an_id_holds_the_whole_case(case):
    assert parse(case.id) == case


@given(case=cases(statistics=(*CHANNEL_STATISTICS, None)))
@SLOW
def test_the_two_pass_form_agrees_with_the_reference(case):
    holds(Numpy(), case)


@given(case=cases())
@SLOW
def test_the_reference_in_float64_agrees_with_itself_in_more_digits(case):
    holds(NumpyLayer("reference", Layer), case)


@given(case=cases(data=("nan",)))
@SLOW
def test_a_nan_stays_in_its_plane_in_evaluation_and_is_not_swallowed_in_training(case):
    (step, *_) = due(case)
    wrong = ~np.isfinite(step.outcome.y)
    assert wrong[(0,) * wrong.ndim]
    if case.training or not case.config.track_running_stats:
        assert wrong[:, 0].all(), "the channel's statistics are NaN, and so is all of it"
        if case.config.track_running_stats and case.config.momentum != 1.0:
            assert not np.isfinite(step.outcome.state["running_var"][0])
        return
    assert not wrong[1:].any(), "other images have nothing to do with it"
    if not case.config.uses_spatial_statistics:
        assert not wrong[0, 1:].any(), "nor have other channels, without statistics over the channels"


class OffBy(Layer):
    """The smallest mistake that matters: a relative error of so many units in the last place of float32."""

    units: float

    def transform(self, x_cs):
        return super().transform(x_cs) * (1 + self.units * float(np.finfo(np.float32).eps))


@pytest.mark.parametrize(
    "data", ["rbn/train/offset0", "rbn/eval/offset0", "iebn/train/offset0", "bn/train/offset0"]
)
def test_the_tolerance_is_tight(data):
    """What float32 rounds is within it, and ten times what it allows is not."""

    class Far(OffBy):
        units = 10 * FACTOR

    class Near(OffBy):
        units = 1.0

    case = parse(f"{data}/2x5x7x7/float32")
    assert check_case(NumpyLayer("near", Near), case).status == PASSED
    assert check_case(NumpyLayer("far", Far), case).status == FAILED
