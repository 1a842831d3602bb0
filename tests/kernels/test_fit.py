"""The compiled loops refuse what does not fit the layer, before they read or write anything."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from rbn import kernels
from rbn.kernels.library import ACCUMULATE, BACKWARD, DTYPES, FORWARD, INTERFACE, LOOP_STATISTICS
from rbn_core import RBNValueError

pytestmark = pytest.mark.skipif(bool(kernels.problem()), reason=kernels.problem())

IMAGES, CHANNELS, POSITIONS = 3, 5, 4


def plan_of(dtype="float32", training=True, centering="channel_mean", scaling="channel_mean", **sizes):
    sizes = {"images": IMAGES, "channels": CHANNELS, "positions": POSITIONS} | sizes
    return kernels.Plan(
        **sizes,
        dtype=dtype,
        channels_last=False,
        centering=centering,
        scaling=scaling,
        restrict="sigmoid",
        batch_statistics=training,
        threads=1,
        eps=1e-5,
    )


def memory_of(names, dtype="float32"):
    """An array of ones for each of the names, as the loops need it."""
    kept = np.promote_types(dtype, np.float32)
    sizes = dict.fromkeys(("x", "y", "dy", "dx"), (IMAGES * CHANNELS * POSITIONS, dtype))
    sizes |= dict.fromkeys(("mu", "v"), (IMAGES * CHANNELS, kept))
    return {name: np.ones(*sizes.get(name, (CHANNELS, kept))) for name in names}


def described(array):
    return array.ctypes.data, array.size, DTYPES.index(array.dtype.name)


def in_order(names, memory):
    """The arrays as the loops take them, and none where there is none of a name."""
    return [described(memory[name]) if name in memory else kernels.NOTHING for name in names]


def assert_untouched(memory):
    for array in memory.values():
        np.testing.assert_array_equal(array, 1)


def changed(array, change):
    where, count, dtype = described(array)
    return {
        "short": (where, count - 1, dtype),
        "long": (where, 2 * count, dtype),
        "one": (where, 1, dtype),
        "empty": (where, 0, dtype),
        "nowhere": (0, count, dtype),
        "other": (where, count, (dtype + 1) % len(DTYPES)),
        "half": (where, count, DTYPES.index("float16")),
        "unknown": (where, count, -1),
        "askew": (where + 1, count, dtype),
    }[change]


OPTIONAL = ("gamma", "beta", "mean", "var", "dx")
"""What a layer may lack, or nobody ask for."""

CHANGES = ("short", "long", "one", "empty", "nowhere", "other", "unknown", "askew")


@pytest.mark.parametrize(
    ("function", "names", "name", "change"),
    [
        (function, names, name, change)
        for function, names in ((kernels.forward, FORWARD), (kernels.backward, BACKWARD))
        for name in names
        for change in (*CHANGES, "missing")
        if change != "missing" or not (name in OPTIONAL or "gradient" in name)
    ],
)
def test_an_array_that_does_not_fit_is_refused(function, names, name, change):
    for dtype in ("float32", "float64", "float16"):
        memory = memory_of(names, dtype)
        arrays = in_order(names, memory)
        at = names.index(name)
        arrays[at] = kernels.NOTHING if change == "missing" else changed(memory[name], change)
        with pytest.raises(RBNValueError, match=f"expected {name} to be [0-9]+ numbers of [a-z0-9]+, got "):
            function(plan_of(dtype, training=False), arrays)
        assert_untouched(memory)


@pytest.mark.parametrize(
    "change", ["short", "long", "one", "empty", "nowhere", "half", "unknown", "askew", "missing"]
)
@pytest.mark.parametrize("name", ACCUMULATE)
def test_statistics_that_do_not_fit_each_other_are_refused(name, change):
    memory = memory_of(ACCUMULATE)
    arrays = in_order(ACCUMULATE, memory)
    arrays[ACCUMULATE.index(name)] = kernels.NOTHING if change == "missing" else changed(memory[name], change)
    with pytest.raises(
        RBNValueError, match=r"expected running_mean|expected running_var|expected mean|expected var"
    ):
        kernels.accumulate(arrays, 0.1, 1.0)
    assert_untouched(memory)


def test_what_a_layer_has_no_use_for_may_be_missing():
    for centering, scaling in itertools.product(LOOP_STATISTICS[:3], LOOP_STATISTICS):
        for training in (True, False):
            memory = memory_of(FORWARD)
            unused = {"center_weight"} if centering is None else set()
            unused |= {"scale_weight", "scale_bias"} if scaling is None else set()
            unused |= {"running_mean", "running_var"} if training else set()
            needed = {name: array for name, array in memory.items() if name not in unused}
            kernels.forward(plan_of("float32", training, centering, scaling), in_order(FORWARD, needed))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *itertools.product(("dtype", "centering", "scaling"), (-1, 4, 17)),
        *itertools.product(("channels_last", "restriction", "batch_statistics"), (-1, 2, 17)),
        *itertools.product(("threads",), (-1, 0)),
    ],
)
def test_an_option_that_is_not_known_is_refused(field, value):
    plan, memory = plan_of(), memory_of(FORWARD)
    setattr(plan.structure, field, value)
    with pytest.raises(RBNValueError, match=f"expected options of rbn_kernels.h .*{field} {value}"):
        kernels.forward(plan, in_order(FORWARD, memory))
    assert_untouched(memory)


def test_centering_has_no_statistic_of_the_input_alone():
    plan, memory = plan_of(), memory_of(FORWARD)
    plan.structure.centering = LOOP_STATISTICS.index("input_mean")
    with pytest.raises(RBNValueError, match=r"centering 3"):
        kernels.forward(plan, in_order(FORWARD, memory))


@pytest.mark.parametrize("name", ["images", "channels", "positions"])
@pytest.mark.parametrize("size", [-1, 2**60, 2**62, 2**63 - 1])
def test_sizes_whose_product_cannot_be_counted_are_refused(name, size):
    plan, memory = plan_of(**{name: size}), memory_of(FORWARD)
    with pytest.raises(RBNValueError, match="and sizes that can be counted"):
        kernels.forward(plan, in_order(FORWARD, memory))


def test_a_library_of_another_version_is_not_called(monkeypatch):
    header = Path(kernels.__file__).with_name("rbn_kernels.h").read_text()
    assert f"#define RBN_INTERFACE {INTERFACE}\n" in header
    monkeypatch.setattr(kernels.library, "INTERFACE", INTERFACE + 1)
    kernels.library._library.cache_clear()
    try:
        assert "was compiled for another version: install rbn again" in kernels.problem()
    finally:
        monkeypatch.undo()
        kernels.library._library.cache_clear()
