"""Cases are plain data: an id says all of one, and the suite has what it promises."""

import collections
import itertools
from typing import get_args

import numpy as np
import pytest

from rbn.conformance.cases import (
    LAYERS,
    LAYOUTS,
    PRECISIONS,
    PRECISIONS_OF,
    SPOILS,
    WAYS,
    Case,
    config_of,
    parse,
)
from rbn.conformance.data import DATA, EXTREMES, OFFSETS
from rbn.conformance.suite import (
    DTYPES,
    HALF_DTYPES,
    MIXED_SHAPES,
    SHAPES,
    SHARES,
    WAY_SHARES,
    _mixed,
    all_cases,
    quick_cases,
    select,
    with_seeds,
)
from rbn_core import RBNValueError
from rbn_core.config import FLOATING
from rbn_core.options import INSTANCE_STATISTICS, RESTRICTIONS, RUNNING_VARIANCES, SPATIAL_RANKS, Statistic
from rbn_core.reference import Layer


def test_case_ids_are_unique():
    counts = collections.Counter(case.id for case in all_cases())
    assert [name for name, count in counts.items() if count > 1] == []


def test_an_id_says_everything_about_its_case():
    for case in with_seeds(all_cases(), 2):
        assert parse(case.id) == case


def test_an_id_that_is_not_in_the_suite_makes_a_case_too():
    case = parse("rbn/train/huge/2x3x4/centering=None,eps=0.001/bfloat16/channels_last/seed=7")
    assert case not in all_cases()
    assert case.config == config_of("rbn", (2, 3, 4), {"centering": None, "eps": 0.001})
    assert (case.training, case.data, case.dtype) == (True, "huge", "bfloat16")
    assert (case.layout, case.variant) == ("channels_last", 7)
    (x, _), *_ = case.inputs()
    assert x.shape == (2, 3, 4)
    assert parse(case.id) == case


@pytest.mark.parametrize(
    "wrong",
    [
        "rbn",
        "rbn/train/offset0/2x3",
        "cbn/train/offset0/2x3/float32",
        "rbn/training/offset0/2x3/float32",
        "rbn/train/offset5/2x3/float32",
        "rbn/train/offset0/2xx3/float32",
        "rbn/train/offset0/2x3/float8",
        "rbn/train/offset0/2x3/center=None/float32",
        "rbn/train/offset0/2x3/centering=mean/float32",
        "rbn/train/offset0/2x3/float32/upside_down",
        "rbn/train/offset0/2x3/float32/shares=2+1",
        "rbn/train/offset0/2x3/float32/pmap",
        "rbn/train/offset0/2x3/float32/shares=1+1/ring",
        "rbn/train/digits/2x3/float32",
        "rbn/train/offset0/2x3/float32/seed=x",
        "rbn/train/offset0/2x3/float32/precision=autocast_float16",
        "rbn/train/offset0/2x3/float16/precision=autocast",
        "rbn/train/offset0/2x3/float32/spoilt=gamma",
        "rbn/train/offset0/2x3/float32/spoilt=gamma:eaten",
        "rbn/train/offset0/2x3/float32/spoilt=conv_bias:short",
        "rbn/train/offset0/2x3/float32/spoilt=num_batches_tracked:short",
        "bnet/train/offset0/2x3x4/float32/spoilt=conv_weight:shared",
    ],
)
def test_what_is_no_id_is_refused(wrong):
    with pytest.raises(RBNValueError, match="expected the id of a case"):
        parse(wrong)


def test_a_quick_run_has_one_case_for_every_row_on_one_device_and_not_in_float64():
    few = [case for case in all_cases() if not case.shares and case.dtype != "float64"]
    rows = dict.fromkeys(case.group for case in few)
    assert list(dict.fromkeys(case.group for case in quick_cases())) == list(rows)
    counts = collections.Counter(case.group for case in quick_cases())
    several = {row: count for row, count in counts.items() if count > 1}
    assert several.pop("rbn/train/hostile") == len(SPOILS)
    assert all("/mixed/" in row for row in several)


@pytest.mark.parametrize("layer", LAYERS)
def test_a_quick_run_has_a_sample_of_every_frameworks_mixed_precision(layer):
    ways = {case.precision for case in quick_cases() if case.layer == layer and case.training}
    for framework, theirs in PRECISIONS_OF.items():
        assert {theirs[way] for way in ways & theirs.keys()} == {*theirs.values()}, framework


def test_spoilt_states_come_last_so_that_they_can_ruin_nothing():
    spoilt = [bool(case.spoilt) for case in all_cases()]
    assert spoilt == sorted(spoilt)


@pytest.mark.parametrize("way", PRECISIONS)
def test_a_cast_to_the_narrowest_type_changes_nothing(way):
    (case, *_) = (case for case in all_cases() if case.precision == way)
    assert case.dtype == PRECISIONS[way]
    values = [*case.state().values(), *itertools.chain(*case.inputs())]
    for value in values:
        np.testing.assert_array_equal(value, value.astype(case.dtype).astype(value.dtype))


def test_all_ways_into_mixed_precision_have_the_same_numbers():
    one, other = (
        parse(f"rbn/train/offset0/2x3x4/float16/precision={way}") for way in ("level5", "autocast_float16")
    )
    assert one.generic == other.generic != one
    np.testing.assert_array_equal(one.state()["gamma"], other.state()["gamma"])


def test_to_be_spoilt_changes_no_number():
    for case in all_cases():
        name, kind = case.spoil
        value = case.state().get(name)
        if kind == "half":
            np.testing.assert_array_equal(value, value.astype("float16"))
        elif kind == "integer":
            np.testing.assert_array_equal(value, value.astype("int64"))
            assert value.all()
        elif kind == "shared":
            np.testing.assert_array_equal(value, case.state()[case.partner])
            assert (case.state()["running_var"] > 0).all()


def test_every_combination_that_the_suite_promises_has_a_case():
    features = [case.features for case in all_cases()]

    def has(**wanted):
        return any(wanted.items() <= case.items() for case in features)

    for layer, mode, dtype in itertools.product(LAYERS, ("train", "eval"), (*DTYPES, *HALF_DTYPES)):
        assert has(layer=layer, mode=mode, dtype=dtype)
        assert has(layer=layer, mode=mode, dtype="float32", data="nan")
    for mode, dtype, data in itertools.product(("train", "eval"), DTYPES, DATA):
        assert has(layer="rbn", mode=mode, dtype=dtype, data=data)
    for mode, dtype, centering, scaling in itertools.product(
        ("train", "eval"), DTYPES, INSTANCE_STATISTICS, INSTANCE_STATISTICS
    ):
        assert has(mode=mode, dtype=dtype, centering=str(centering), scaling=str(scaling))
    for mode, layout in itertools.product(("train", "eval"), LAYOUTS):
        assert has(layer="rbn", mode=mode, layout=layout)
    for layer in LAYERS:
        assert has(layer=layer, layout="channels_last")
        for option, value in (
            ("momentum", "None"),
            ("track_running_stats", "False"),
            ("running_var", "biased"),
        ):
            assert any(c["layer"] == layer and c[option] == value for c in features)
    shapes = {(case.mode, case.dtype, case.data, case.shape) for case in all_cases() if case.layer == "rbn"}
    for mode, dtype, data, shape in itertools.product(("train", "eval"), DTYPES, OFFSETS, SHAPES):
        assert (mode, dtype, data, shape) in shapes
    assert {case.shares for case in all_cases()} == {(), *SHARES, WAY_SHARES}
    for layer, way in itertools.product(("rbn", "iebn"), WAYS):
        assert has(layer=layer, devices=f"4 by {way}")


LISTED = {
    "layer": LAYERS,
    "mode": ("train", "eval"),
    "dtype": FLOATING,
    "layout": LAYOUTS,
    "spatial axes": (0, *SPATIAL_RANKS),
    "data": DATA,
    "centering": INSTANCE_STATISTICS,
    "scaling": (*INSTANCE_STATISTICS, "input_mean"),
    "restrict": RESTRICTIONS,
    "running_var": RUNNING_VARIANCES,
    "momentum": (None, 0.0, 0.9, 1.0),
    "eps": (1e-5, 0.1),
    "gamma and beta": (True, False),
    "track_running_stats": (True, False),
    "kernel_size": (None, 3, 5, 7),
    "mixed precision": (None, *HALF_DTYPES),
    "spoilt": (None, *SPOILS),
}
"""Every listed value of every option, under the names of `Case.features`."""


def unmet(listed, cases=None):
    """The listed values that no case has."""
    features = [case.features for case in (all_cases() if cases is None else cases)]
    return [
        (option, value)
        for option, values in listed.items()
        for value in values
        if not any(case[option] == str(value) for case in features)
    ]


def test_every_listed_value_of_every_option_is_met_by_a_case():
    assert unmet(LISTED) == []
    assert LISTED.keys() | {"devices"} == all_cases()[0].features.keys()
    assert {*get_args(Statistic)} == {*INSTANCE_STATISTICS, "input_mean"} - {None}
    assert {case.precision for case in all_cases()} == {"", *PRECISIONS}
    assert {case.way for case in all_cases()} == {"", *WAYS}
    for layer, mode in itertools.product(LAYERS, ("train", "eval")):
        mine = [case for case in all_cases() if (case.layer, case.mode) == (layer, mode)]
        assert {case.spoil[1] for case in mine} == {"", *SPOILS}
    for layer in LAYERS[:3]:
        mine = [case for case in all_cases() if case.layer == layer and case.spoilt]
        stored = {*mine[0].config.state_shapes()}
        assert {case.spoil[0] for case in mine} >= stored - ({"gamma", "beta"} if layer != "rbn" else set())


@pytest.mark.parametrize("option", LISTED)
def test_a_value_more_of_an_option_that_no_case_meets_is_noticed(option):
    assert unmet(LISTED | {option: (*LISTED[option], "a new one")}) == [(option, "a new one")]
    met = LISTED[option][-1]
    without = [case for case in all_cases() if case.features[option] != str(met)]
    assert (option, met) in unmet(LISTED, without)


@pytest.mark.parametrize("count", [1, 5, 6, 7, 8])
def test_however_many_choices_are_mixed_every_two_of_two_kinds_meet(count):
    kinds = [
        [{"eps": (1 + choice) / 100} for choice in range(count)],
        [{"momentum": choice / 10} for choice in range(count)],
        [{"centering": value} for value in INSTANCE_STATISTICS],
    ]
    features = [case.features for case in _mixed("rbn", MIXED_SHAPES, *kinds)]
    names = ("eps", "momentum", "centering", "dtype", "layout", "spatial axes")
    values = {name: {case[name] for case in features} for name in names}
    assert [len(values[name]) for name in names] == [count, count, 5, 4, 4, 4]
    for one, other in itertools.combinations(names, 2):
        met = {(case[one], case[other]) for case in features}
        assert met == {*itertools.product(values[one], values[other])}, (one, other)


@pytest.mark.parametrize("case", quick_cases(), ids=lambda case: case.id)
def test_a_case_is_the_same_wherever_it_runs(case: Case):
    for (x, cotangent), (again, cotangent_again) in zip(case.inputs(), case.inputs(), strict=True):
        np.testing.assert_array_equal(x, again)
        np.testing.assert_array_equal(cotangent, cotangent_again)
        assert x.shape == cotangent.shape == case.shape
        assert x.dtype == cotangent.dtype == case.dtype
    for name, value in case.state().items():
        np.testing.assert_array_equal(value, case.state()[name])


@pytest.mark.parametrize("data", EXTREMES)
def test_extreme_numbers_are_what_they_are_called(data):
    (x, _), *_ = parse(f"rbn/train/{data}/3x4x2x3/float32").inputs()
    finite = np.abs(x[np.isfinite(x)])
    assert {
        "constant": lambda: (x == x[..., :1, :1]).all() and len(np.unique(x)) == 12,
        "tiny": lambda: 0 < finite.max() < 1e-15 and finite.max() ** 2 > np.finfo("float32").tiny,
        "denormal": lambda: 0 < finite.max() < np.finfo("float32").tiny,
        "huge": lambda: finite.max() > 1e10,
        "inf": lambda: np.isinf(x).sum() == 1,
        "nan": lambda: np.isnan(x).sum() == 1,
    }[data]()


def test_patterns_choose_cases():
    chosen = select(all_cases(), ["rbn/train/*/float32", "iebn/*"], ["*shares*", "*/digits/*"])
    ids = [case.id for case in chosen]
    assert "rbn/train/offset0/8x3/float32" in ids
    assert any(name.startswith("iebn/eval") for name in ids)
    assert not any("shares" in name or "digits" in name or name.startswith("bnet") for name in ids)
    assert select(all_cases()) == all_cases()
    unusual = "rbn/train/tiny/1x1x9/float16"
    assert [case.id for case in select(all_cases(), [unusual])] == [unusual]


@pytest.mark.parametrize("where", ["only", "exclude"])
@pytest.mark.parametrize("pattern", ["rbn/nothing/*", "trian", "rbn/train/offset0/8x3/float8"])
def test_a_pattern_that_matches_nothing_is_refused(where, pattern):
    with pytest.raises(RBNValueError, match="expected"):
        select(all_cases(), **{where: [pattern]})


def test_every_seed_has_numbers_of_its_own():
    one, other = (dict(case.state()) for case in with_seeds([parse("bn/train/offset0/8x3/float32")], 2))
    assert not np.array_equal(one["gamma"], other["gamma"])


HARD = [case for case in all_cases() if case.config.restrict == "hard_sigmoid" and case.config.scaling]


@pytest.mark.parametrize("case", HARD, ids=lambda case: case.id)
def test_the_hard_sigmoid_reaches_both_ends_and_the_slope_and_stays_off_its_corners(case):
    layer = Layer(case.config)
    layer.load(case.state())
    for x, _ in case.inputs():
        layer.forward(x, case.training)
        z = layer.parameters["scale_weight"].reshape(1, -1, *[1] * (x.ndim - 2)) * layer.steps.k_s
        z = z + layer.parameters["scale_bias"].reshape(1, -1, *[1] * (x.ndim - 2))
        assert z.max() > 3.0
        assert z.min() < -3.0
        assert np.any(np.abs(z) < 3.0)
        assert np.min(np.abs(np.abs(z) - 3.0)) > 0.01
