"""Whatever numbers, shapes and options: every implementation agrees with the reference, derived apart."""

import shlex
from dataclasses import replace
from functools import cache

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, note, settings
from hypothesis import strategies as st

from rbn.conformance import loading
from rbn.conformance.cases import LAYERS, Case, config_of, parse
from rbn.conformance.checks import FAILED, check_case, reason
from rbn.conformance.data import EXTREMES, OFFSETS
from rbn.conformance.subjects.numpy import NumpyLayer
from rbn_core.config import FLOATING
from rbn_core.options import INSTANCE_STATISTICS, MOMENT_STATISTICS, RESTRICTIONS, RUNNING_VARIANCES
from rbn_core.reference import Layer

NOT_FINITE = ("inf", "nan")
DATA = tuple(data for data in (*OFFSETS, *EXTREMES) if data not in NOT_FINITE)
"""Made-up numbers. What stays finite of an infinity's gradient depends on the order of operations."""

SLOW = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

EXAMPLES = {"flax": 12, "mindspore": 12, "jittor": 4}
"""Where every new shape is compiled for seconds; elsewhere there are a hundred."""

SEARCHES = pytest.mark.parametrize("share", [0.25, pytest.param(1.0, marks=pytest.mark.long)])
"""How much of a search runs."""

APART = ("reference", "numpy", "flax", "flax.nnx")
"""Who can have gamma without beta, or beta without gamma."""


@st.composite
def cases(draw, statistics=INSTANCE_STATISTICS, data=DATA):
    """Any case of any layer."""
    layer = draw(st.sampled_from(LAYERS))
    spatial = draw(st.lists(st.integers(1, 5), min_size=int(layer == "bnet"), max_size=3))
    shape = (draw(st.integers(1, 4)), draw(st.integers(1, 4)), *spatial)
    options = {
        "eps": draw(st.sampled_from((1e-5, 1e-3, 0.1))),
        "momentum": draw(st.none() | st.integers(0, 64).map(lambda parts: parts / 64)),
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


@cache
def subject_of(name):
    """One of the project's subjects."""
    if name == "reference":
        return NumpyLayer("reference", Layer)
    (reference,) = loading.SUBJECTS[name]
    return loading.load(reference)


def name_in_turn():
    """Every subject, in the process of its framework's tests."""
    names = ["reference", *loading.SUBJECTS]
    return pytest.mark.parametrize(
        "name",
        [
            name
            if name in ("reference", "numpy")
            else pytest.param(name, marks=pytest.mark.framework(name.partition(".")[0]))
            for name in names
        ],
    )


def for_each(name, data, property_of, share=1.0):
    """Look for a case that breaks a property of a subject; it can be run again by the id that is printed."""
    subject = subject_of(name)

    @given(
        case=cases(
            statistics=(*MOMENT_STATISTICS, None) if name == "numpy" else INSTANCE_STATISTICS, data=data
        )
    )
    @settings(SLOW, max_examples=round(share * EXAMPLES.get(name.partition(".")[0], 100)))
    def search(case):
        assume(reason(case, {**subject.absent, **subject.expected_failures}) is None)
        assume(case.config.gamma == case.config.beta or name in APART)
        note(f"rbn conform --only {case.id!r}")
        property_of(subject, case)

    search()


def agrees(subject, case):
    """A case passes."""
    result = check_case(subject, case)
    assert result.status != FAILED, f"{case.id}: {result.message}"


def shows_where_it_is(subject, case):
    """One value that is not finite stays in its plane in evaluation, and is not swallowed in training."""
    case = replace(case, config=replace(case.config, **subject.fixed))
    (x, cotangent), *_ = case.inputs()
    whole = x.copy()
    whole[~np.isfinite(x)] = 1.0
    outcomes = []
    for values in (x, whole):
        subject.build(case.config, case.state(), case.dtype, case.layout)
        outcomes.append(subject.run(values.copy(), case.training, cotangent.copy()))
    broken, right = outcomes
    assert np.isfinite(right.y).all()
    assert not np.isfinite(broken.y[(0,) * x.ndim])
    if case.training or not case.config.track_running_stats:
        assert not np.isfinite(broken.y[:, 0]).any(), "nothing of a channel whose statistics are not"
        if case.config.track_running_stats and case.config.momentum != 1.0:
            assert not np.isfinite(broken.state["running_var"][0])
        return
    same = np.ones(x.shape[:2], bool)  # but for the value's own plane, or its image
    mixes_channels = any(str(k).startswith("spatial") for k in (case.config.centering, case.config.scaling))
    same[(0,) if mixes_channels else (0, 0)] = False
    # What is computed a vector at a time may round otherwise beside an infinity, MindSpore's exp by 20 units.
    close = 32 * float(ml_dtypes.finfo(case.dtype).eps)
    np.testing.assert_allclose(
        broken.y[same].astype(float), right.y[same].astype(float), rtol=close, atol=close
    )


@given(case=cases())
@SLOW
def test_an_id_holds_the_whole_case(case):
    assert parse(case.id) == case


@SEARCHES
@name_in_turn()
def test_every_implementation_agrees_with_the_reference(name, share):
    for_each(name, DATA, agrees, share)


@SEARCHES
@name_in_turn()
def test_what_is_not_finite_stays_in_its_plane_in_evaluation_and_is_not_swallowed_in_training(name, share):
    for_each(name, NOT_FINITE, shows_where_it_is, share)


class Swallows(Layer):
    """NaN becomes 0."""

    def transform(self, x_cs):
        return np.nan_to_num(super().transform(x_cs), nan=0.0, posinf=0.0, neginf=0.0)


class Spreads(Layer):
    """A NaN anywhere is a NaN everywhere."""

    def transform(self, x_cs):
        return super().transform(x_cs) + 0.0 * x_cs.sum()


class Biased(Layer):
    """The running variance lacks Bessel's correction."""

    def accumulate(self, mean, var, values):
        super().accumulate(mean, var * (values - 1) / values, values)


@pytest.mark.parametrize(
    ("layer", "data", "property_of"),
    [
        (Biased, DATA, agrees),
        (Swallows, NOT_FINITE, shows_where_it_is),
        (Spreads, NOT_FINITE, shows_where_it_is),
    ],
)
def test_a_mistake_is_found_and_printed_as_a_case_that_runs_again(monkeypatch, layer, data, property_of):
    wrong = NumpyLayer("wrong", layer)
    monkeypatch.setitem(globals(), "subject_of", lambda name: wrong)
    with pytest.raises(AssertionError) as raised:
        for_each("reference", data, property_of)
    (printed,) = [note for note in raised.value.__notes__ if note.startswith("rbn conform --only ")]
    case = parse(shlex.split(printed)[-1])
    with pytest.raises(AssertionError):
        property_of(wrong, case)
    property_of(NumpyLayer("reference", Layer), case)
