"""Which cases the suite has: the combinations, written as data."""

from __future__ import annotations

import fnmatch
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from rbn.conformance.cases import (
    LAYERS,
    LAYOUTS,
    PRECISIONS,
    PRECISIONS_OF,
    SHARED_SPOILS,
    SHARED_WITH,
    SPOILS,
    WAYS,
    Case,
    config_of,
    parse,
)
from rbn.conformance.comparison import SMALL
from rbn.conformance.data import EXTREMES, OFFSETS, REAL, REAL_SHAPES
from rbn_core.errors import RBNValueError
from rbn_core.options import INSTANCE_STATISTICS, RESTRICTIONS, RUNNING_VARIANCES

MODES = (True, False)
"""Training and evaluation."""

DTYPES = ("float32", "float64")
HALF_DTYPES = ("float16", "bfloat16")

SHAPES = ((4, 3, 1, 1), (1, 2, 2, 3), (3, 1, 2, 3), (2, 5, 7, 7), (8, 3))
"""Batch 1 and more, one and many channels, planes of 1x1, 2x3 and 7x7, no planes."""

OTHER_SHAPES = ((2, 3, 5), (2, 3, 2, 3, 2))
"""One and three spatial axes."""

EVALUATION_SHAPES = ((0, 2, 2, 3), (1, 3, 1, 1))
"""What only evaluation takes: no image at all, and one value per channel."""

REFUSED_SHAPES = ((1, 3, 1, 1), (1, 3))
"""What training must refuse: one value per channel has no variance."""

LARGE_SHAPE = (1, 1, 1100, 1100)
"""Planes of 5 MB in float32, more than a processor's own caches hold."""

OPTION_SHAPE = (3, 4, 2, 3)
"""The shape on which every combination of options runs, and numbers near a dtype's ends."""

CALIBRATIONS: tuple[dict[str, Any], ...] = tuple(
    {"centering": centering, "scaling": scaling}
    for centering, scaling in itertools.product(INSTANCE_STATISTICS, INSTANCE_STATISTICS)
    if (centering, scaling) != ("channel_mean", "channel_mean")
)
"""Every choice of the two statistics but the default one, which the other rows have."""

OPTIONS: tuple[dict[str, Any], ...] = (
    *({"running_var": estimator} for estimator in RUNNING_VARIANCES[1:]),
    {"momentum": None},
    {"momentum": 0.0},
    {"momentum": 1.0},
    {"eps": 0.1},
    {"track_running_stats": False},
)
"""Options that all layers have."""

MORE_OPTIONS: dict[str, tuple[dict[str, Any], ...]] = {
    "rbn": (*({"restrict": name} for name in RESTRICTIONS[1:]), {"gamma": False, "beta": False}),
    "iebn": ({"gamma": False, "beta": False},),
    "bn": ({"gamma": False, "beta": False},),
    "bnet": (),
}
"""Options that only some have."""

KERNELS = tuple(itertools.product(((2, 3, 7), (2, 3, 5, 4), (2, 3, 4, 3, 5)), (3, 5, 7)))
"""BNET's shapes of one, two and three spatial axes, and its kernels."""

FEW: tuple[tuple[str, tuple[int, ...]], ...] = (
    ("offset0", (2, 5, 7, 7)),
    ("offset0", (8, 3)),
    ("offset10", (3, 1, 2, 3)),
    *REAL_SHAPES.items(),
)
"""What the relatives run on that share RBN's steps, which all the shapes check."""

MIXED_DTYPES = (*DTYPES, *HALF_DTYPES, "float16")
MIXED_LAYOUTS = (*LAYOUTS, "channels_first")
MIXED_SHAPES = ((8, 3), (2, 3, 5), OPTION_SHAPE, (2, 3, 2, 3, 2), (3, 1, 2, 3))
MIXED_OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"running_var": "biased"},
    {"momentum": None},
    {"gamma": False, "beta": False},
    {"restrict": "hard_sigmoid"},
)
"""What is mixed."""

SHARES = ((2, 2), (3, 1), (4, 0), (1, 1, 1, 1), (2, 0, 1, 1))
"""Images on each of two and four devices: equal, unequal, and none on one of them."""

WAY_SHARES = (2, 2, 2, 2)
"""The same where a framework knows several ways; in some of them all shares must be equal."""

SPOILT_NAMES: dict[tuple[str, bool], tuple[str, ...]] = {
    **{
        ("rbn", training): (
            "gamma",
            "beta",
            "center_weight",
            "scale_weight",
            "scale_bias",
            "running_mean",
            "running_var",
        )
        for training in MODES
    },
    ("iebn", True): ("scale_weight", "scale_bias", "running_var"),
    ("iebn", False): ("scale_bias", "running_mean"),
    ("bnet", True): ("conv_weight", "conv_bias", "running_mean"),
    ("bnet", False): ("conv_bias", "running_var"),
    ("bn", True): ("gamma", "running_mean"),
    ("bn", False): ("beta", "running_var"),
}
"""What is spoilt of which layer, in training and in evaluation, in every way there is."""


@cache
def all_cases() -> tuple[Case, ...]:
    """Every case of the suite, in the order of the report's rows.

    Spoilt states come last: what reads memory that is not its own may ruin what its process does later.
    """
    cases = (*_rbn(), *_relative("iebn"), *_bnet(), *_relative("bn"), *_shared(), *_precise(), *_spoilt())
    rows = list(dict.fromkeys(case.group for case in cases))

    def place(case: Case) -> tuple[bool, int, int]:
        return bool(case.spoilt), LAYERS.index(case.layer), rows.index(case.group)

    return tuple(sorted(dict.fromkeys(cases), key=place))


@cache
def quick_cases() -> tuple[Case, ...]:
    """The first case of each row, but for float64 and several devices: a look in less than a minute.

    In the rows of mixed precision it is the first of each framework's, and of the spoilt states of RBN in
    training the first of each kind.
    """
    home = {way: framework for framework, ways in PRECISIONS_OF.items() for way in ways}
    first: dict[tuple[str, ...], Case] = {}
    for case in all_cases():
        kind = case.spoil[1] if case.training and case.layer == "rbn" else ""
        if not case.shares and case.dtype != "float64":
            first.setdefault((case.group, home.get(case.precision, ""), kind), case)
    return tuple(first.values())


@cache
def telling_cases() -> tuple[Case, ...]:
    """Small cases of every kind, in which every planted mistake shows; the suite's own tests run on them.

    Each is there once, in float64 if it is in both, and in the ways into mixed precision that any layer has.
    Of what is spoilt it is one array of a kind.
    """
    every = all_cases()
    ids = {case.id for case in every}
    spoilt = ("gamma", "running_mean", "center_weight", "num_batches_tracked")
    halves: dict[tuple[str, bool, str], Case] = {}

    def tells(case: Case) -> bool:
        twice = case.dtype == "float32" and replace(case, dtype="float64").id in ids
        if (
            twice
            or case.way
            or math.prod(case.shape) > SMALL
            or case.precision not in ("", *PRECISIONS_OF[""])
        ):
            return False
        if case.spoilt:
            names = spoilt if case.layer == "rbn" else ("running_var", "num_batches_tracked")
            return case.training and case.spoil[0] in names
        if case.dtype in HALF_DTYPES and not case.precision:
            return halves.setdefault((case.layer, case.training, case.dtype), case) is case
        statistics = {case.config.centering, case.config.scaling}
        return len(statistics) == 1 or bool(statistics & {None, "channel_mean", "input_mean"})

    return tuple(case for case in every if tells(case))


def select(cases: Iterable[Case], only: Sequence[str] = (), exclude: Sequence[str] = ()) -> tuple[Case, ...]:
    """The cases whose ids match.

    Args:
        cases: What to choose from.
        only: Patterns of ids, with * for anything, of which a case must match one; or the id of a case that
            need not be among `cases`. All of them by default.
        exclude: Patterns of which it must match none.

    Raises:
        RBNValueError: A pattern matches no case.
    """
    known = {case.id: case for case in cases}
    chosen: dict[str, Case] = {} if only else dict(known)
    for pattern in only:
        found = {name: known[name] for name in fnmatch.filter(known, pattern)}
        if not found and "*" not in pattern and "/" in pattern:
            found = {pattern: parse(pattern)}
        chosen |= _found(pattern, found)
    for pattern in exclude:
        for name in _found(pattern, {name: known[name] for name in fnmatch.filter(known, pattern)}):
            chosen.pop(name, None)
    return tuple(chosen.values())


def _found(pattern: str, cases: dict[str, Case]) -> dict[str, Case]:
    if not cases:
        raise RBNValueError(
            f"expected a pattern that matches a case, got {pattern!r}. "
            "Write * for anything, as in 'rbn/train/*/float32'; `rbn conform --list` shows the ids."
        )
    return cases


def with_seeds(cases: Sequence[Case], seeds: int) -> tuple[Case, ...]:
    """Every case with so many sets of numbers; the real images have one set, but random cotangents."""
    return tuple(replace(case, variant=variant) for variant in range(seeds) for case in cases)


def _rbn() -> Iterator[Case]:
    layer = "rbn"
    yield from _refused(layer)
    for training, data, shape, dtype in itertools.product(MODES, OFFSETS, SHAPES, DTYPES):
        yield _case(layer, training, data, shape, dtype)
    for training, shape, dtype in itertools.product(MODES, OTHER_SHAPES, DTYPES):
        yield _case(layer, training, "offset0", shape, dtype)
    for shape, dtype in itertools.product(EVALUATION_SHAPES, DTYPES):
        yield _case(layer, False, "offset0", shape, dtype)
    for training in MODES:
        yield _case(layer, training, "offset10", LARGE_SHAPE, "float32")
    for training, data, dtype in itertools.product(MODES, REAL, DTYPES):
        yield _case(layer, training, data, REAL_SHAPES[data], dtype)
    for training, data, dtype in itertools.product(MODES, EXTREMES, DTYPES):
        yield _case(layer, training, data, OPTION_SHAPE, dtype)
    deviations = {"centering": "channel_std", "scaling": "channel_std"}
    for training, dtype in itertools.product(MODES, DTYPES):  # where a root without eps has no gradient
        yield _case(layer, training, "constant", OPTION_SHAPE, dtype, deviations)
    for training in MODES:  # more values than a processor takes at once
        yield _case(layer, training, "nan", (2, 5, 7, 7), "float32")
    yield from _options(layer, (*CALIBRATIONS, *MORE_OPTIONS[layer], *OPTIONS))
    halves = (("offset0", (2, 5, 7, 7)), ("offset10", (2, 3, 5)), ("digits", REAL_SHAPES["digits"]))
    for training, (data, shape), dtype in itertools.product(MODES, halves, HALF_DTYPES):
        yield _case(layer, training, data, shape, dtype)
    for training, shape, dtype in itertools.product(MODES, ((2, 5, 7, 7), *OTHER_SHAPES), DTYPES):
        yield _case(layer, training, "offset0", shape, dtype, layout="channels_last")
    for training, layout in itertools.product(MODES, ("strided", "expanded")):
        yield _case(layer, training, "offset10", (3, 2, 4, 5), "float32", layout=layout)
    calibrations = [[{name: value} for value in INSTANCE_STATISTICS] for name in ("centering", "scaling")]
    yield from _mixed(layer, MIXED_SHAPES, *calibrations, MIXED_OPTIONS)


def _relative(layer: str) -> Iterator[Case]:
    yield from _refused(layer)
    for training, (data, shape), dtype in itertools.product(MODES, FEW, DTYPES):
        yield _case(layer, training, data, shape, dtype)
    if layer == "bn":
        for training, shape in itertools.product(MODES, OTHER_SHAPES):
            yield _case(layer, training, "offset0", shape, "float32")
        for training, data, dtype in itertools.product(MODES, ("offset1000", "constant"), DTYPES):
            yield _case(layer, training, data, OPTION_SHAPE, dtype)
    yield from _not_finite(layer)
    yield from _options(layer, (*MORE_OPTIONS[layer], *OPTIONS))
    for training, dtype in itertools.product(MODES, HALF_DTYPES):
        yield _case(layer, training, "offset0", (2, 5, 7, 7), dtype)
    for training in MODES:
        yield _case(layer, training, "offset0", (2, 5, 7, 7), "float32", layout="channels_last")
    if layer != "bn":  # RBN without its calibrations is mixed with the others
        yield from _mixed(layer, MIXED_SHAPES, MIXED_OPTIONS[:4])


def _bnet() -> Iterator[Case]:
    yield _case("bnet", True, "offset0", REFUSED_SHAPES[0], "float32")
    for training, (shape, kernel_size) in itertools.product(MODES, KERNELS):
        for dtype in DTYPES if kernel_size == 3 else ("float32",):
            yield _case("bnet", training, "offset0", shape, dtype, {"kernel_size": kernel_size})
    for training, data, dtype in itertools.product(MODES, REAL, DTYPES):
        yield _case("bnet", training, data, REAL_SHAPES[data], dtype)
    yield from _not_finite("bnet")
    yield from _options("bnet", OPTIONS)
    for training, dtype in itertools.product(MODES, HALF_DTYPES):
        yield _case("bnet", training, "offset0", (2, 5, 7, 7), dtype)
    for training in MODES:
        yield _case("bnet", training, "offset0", (2, 5, 7, 7), "float32", layout="channels_last")
    kernels = [{"kernel_size": size} for size in (3, 5, 7)]
    yield from _mixed("bnet", MIXED_SHAPES[1:], MIXED_OPTIONS[:3], kernels)


def _mixed(
    layer: str, shapes: Sequence[tuple[int, ...]], *options: Sequence[dict[str, Any]]
) -> Iterator[Case]:
    """25 cases in which every two choices of two kinds meet, or more where a kind has more than five choices.

    The columns i, j, i + j, i + 2j, ... modulo a prime p of all rows (i, j) are an orthogonal array: any two
    of them have each of the p p pairs once. A kind of fewer than p choices has some of them twice.
    """
    most = max(map(len, (shapes, MIXED_DTYPES, MIXED_LAYOUTS, *options)))
    p = next(p for p in itertools.count(max(5, most, 2 + len(options))) if all(p % d for d in range(2, p)))
    for i, j in itertools.product(range(p), repeat=2):
        shape, dtype = shapes[i % len(shapes)], MIXED_DTYPES[j % len(MIXED_DTYPES)]
        layout, *others = ((i + factor * j) % p for factor in range(1, 2 + len(options)))
        merged: dict[str, Any] = {}
        for choices, column in zip(options, others, strict=True):
            merged |= choices[column % len(choices)]
        training = (i + j) % 2 == 0
        how = {"layout": MIXED_LAYOUTS[layout % len(MIXED_LAYOUTS)]}
        yield _case(layer, training, "offset0", shape, dtype, merged, **how)


def _refused(layer: str) -> Iterator[Case]:
    for shape in REFUSED_SHAPES:
        yield _case(layer, True, "offset0", shape, "float32")


def _not_finite(layer: str) -> Iterator[Case]:
    # An infinite mean saturates IEBN's attention: what is finite then depends on the order of operations.
    values = ("nan",) if layer == "iebn" else ("inf", "nan")
    for training, data, dtype in itertools.product(MODES, values, DTYPES):
        yield _case(layer, training, data, OPTION_SHAPE, dtype)


def _options(layer: str, choices: Iterable[dict[str, Any]]) -> Iterator[Case]:
    for training, options, dtype in itertools.product(MODES, choices, DTYPES):
        yield _case(layer, training, "offset0", OPTION_SHAPE, dtype, options)


def _shared() -> Iterator[Case]:
    for shares in SHARES:
        shape = (sum(shares), 3, 4, 3)
        yield _case("rbn", True, "offset10", shape, "float32", shares=shares)
        yield _case("iebn", True, "offset0", shape, "float32", shares=shares)
    for options in ({"centering": "channel_std", "scaling": "channel_std"}, {"momentum": None}):
        yield _case("rbn", True, "offset0", (4, 3, 4, 3), "float32", options, shares=(3, 1))
    yield _case("rbn", True, "offset1000", (4, 3, 4, 3), "float64", shares=(3, 1))
    yield _case("bnet", True, "offset0", (4, 3, 4, 3), "float32", shares=(3, 1))
    spatial = {"centering": "spatial_mean", "scaling": "spatial_std"}
    yield _case("rbn", True, "offset0", (4, 3, 4, 3), "float32", spatial, shares=(2, 2))
    yield _case("bnet", True, "offset0", (4, 3, 4, 3), "float32", shares=(2, 2))
    for way in WAYS:
        yield _case("rbn", True, "offset10", (8, 3, 4, 3), "float32", shares=WAY_SHARES, way=way)
        yield _case("iebn", True, "offset0", (8, 3, 4, 3), "float32", shares=WAY_SHARES, way=way)


def _precise() -> Iterator[Case]:
    """Mixed precision, in every way there is; in graph mode, where a step takes seconds to compile, fewer."""
    shape, long = (2, 5, 7, 7), (2, 3, 64, 64)  # so long that a sum in half precision stands still
    deviations = {"centering": "channel_std", "scaling": "channel_std"}
    chosen: tuple[tuple[str, bool, str, tuple[int, ...], dict[str, Any]], ...] = (
        ("rbn", True, "offset0", shape, {}),
        ("rbn", False, "offset0", shape, {}),
        ("iebn", True, "offset0", shape, {}),
        ("bnet", True, "offset0", shape, {}),
        ("bn", True, "offset0", shape, {}),
        ("rbn", True, "offset10", long, {}),
        ("rbn", True, "offset0", shape, deviations),
    )
    for place, (layer, training, data, size, options) in enumerate(chosen):
        for way, dtype in PRECISIONS.items():
            if place < 3 or not way.endswith(".graph"):
                yield _case(layer, training, data, size, dtype, options, precision=way)


def _spoilt() -> Iterator[Case]:
    """Everything that can happen to what is stored."""
    for (layer, training), names in SPOILT_NAMES.items():
        for name, kind in itertools.product(names, SPOILS):
            if kind not in SHARED_SPOILS or name in SHARED_WITH:
                yield _case(layer, training, "offset0", OPTION_SHAPE, "float32", spoilt=f"{name}:{kind}")
    for layer in LAYERS:
        yield _case(layer, True, "offset0", OPTION_SHAPE, "float32", spoilt="num_batches_tracked:missing")


def _case(
    layer: str,
    training: bool,
    data: str,
    shape: tuple[int, ...],
    dtype: str,
    options: dict[str, Any] | None = None,
    **how: Any,
) -> Case:
    return Case(config_of(layer, shape, options or {}), training, data, shape, dtype, **how)
