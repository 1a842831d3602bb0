"""The compiled loops against the reference, with every instruction set, between guard bytes."""

import itertools
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest

from rbn import kernels
from rbn.conformance.comparison import Extended, compare
from rbn.conformance.tolerances import tolerances
from rbn.kernels.library import (
    BACKWARD,
    DTYPES,
    FORWARD,
    INSTRUCTIONS,
    LOOP_STATISTICS,
    RESTRICTIONS,
    VECTOR_PARAMETERS,
)
from rbn_core.config import Config
from rbn_core.reference import Layer, batch_mean_and_variance, per_channel

pytestmark = pytest.mark.skipif(bool(kernels.problem()), reason=kernels.problem())

BFLOAT16 = ml_dtypes.bfloat16
LAYOUTS = pytest.mark.parametrize("channels_last", [False, True], ids=["channels first", "channels last"])
PHASES = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
CENTERINGS = LOOP_STATISTICS[:3]

GUARD = 72
"""Bytes around an array, no multiple of a vector: nothing lies as vectors like it, unless told to."""


@pytest.fixture(autouse=True, params=range(len(INSTRUCTIONS)), ids=INSTRUCTIONS)
def level(request):
    """Every test runs with every instruction set that this processor has."""
    if kernels.limit_instructions(request.param) < request.param:
        pytest.skip(f"this processor has no {INSTRUCTIONS[request.param]}")
    yield request.param
    kernels.limit_instructions(len(INSTRUCTIONS))


class Guarded:
    """An array in the middle of bytes that must not change, and if `read` must not change itself."""

    def __init__(self, array, read=True, line=1):
        self.room = np.full(array.nbytes + 2 * GUARD + line, 0xA5, np.uint8)
        begin = GUARD + -(self.room.ctypes.data + GUARD) % line
        self.inside = slice(begin, begin + array.nbytes)
        self.array = self.room[self.inside].view(array.dtype).reshape(array.shape)
        self.address = self.room.ctypes.data + begin
        if read:
            self.array[...] = array
        self.protected = self.room.copy()
        self.read = read

    @property
    def described(self):
        """As the loops take it."""
        return self.address, self.array.size, DTYPES.index(self.array.dtype.name)

    def check(self):
        changed = self.room != self.protected
        if not self.read:
            changed[self.inside] = False
        assert not changed.any()


def statistics_dtype(dtype):
    return np.promote_types(dtype, np.float32)


def layer_of(channels, dtype="float32", seed=0, **options):
    """The reference with random numbers that the dtype has; its running statistics become the batch's."""
    name = "IEBN" if options.get("scaling") == "input_mean" else "RBN"
    config = Config(channels, momentum=0.0, running_var="biased", layer=name, **options)
    layer = (Extended if dtype == "float64" else Layer)(config)
    rng = np.random.default_rng(seed)

    def random(low, high):
        return rng.uniform(low, high, channels).astype(statistics_dtype(dtype)).astype(layer.dtype)

    layer.parameters = {name: random(-1.5, 1.5) for name in layer.parameters}
    layer.statistics |= {"running_mean": random(-1, 1), "running_var": random(0.5, 2)}
    return layer


def image_of(shape, dtype="float32", offset=0.0, seed=1):
    """X and dY."""
    x, dy = np.random.default_rng(seed).normal(size=(2, *shape))
    return (x + offset).astype(dtype), dy.astype(dtype)


def in_order(names, arrays):
    """The arrays as the loops take them, and none where there is none of a name."""
    return [arrays[name].described if name in arrays else kernels.NOTHING for name in names]


def call(
    layer,
    x,
    dy,
    training=True,
    channels_last=False,
    threads=2,
    wanted=VECTOR_PARAMETERS,
    wants_dx=True,
    line=1,
):
    """What the loops give for a layer of the reference, by the names of `tolerances`."""
    count, channels = x.shape[:2]
    kept = statistics_dtype(x.dtype)
    inward = (lambda a: np.moveaxis(a, 1, -1)) if channels_last else (lambda a: a)
    outward = (lambda a: np.moveaxis(a, -1, 1)) if channels_last else (lambda a: a)
    plan = kernels.Plan(
        images=count,
        channels=channels,
        positions=int(np.prod(x.shape[2:])),
        dtype=x.dtype.name,
        channels_last=channels_last,
        centering=layer.config.centering,
        scaling=layer.config.scaling,
        restrict=layer.config.restrict,
        batch_statistics=training,
        threads=threads,
        eps=layer.config.eps,
    )
    names = [*layer.parameters, *(() if training else ("running_mean", "running_var"))]
    stored = {name: Guarded((layer.parameters | layer.statistics)[name].astype(kept)) for name in names}
    given = [Guarded(inward(a)) for a in (x, dy)]
    planes = [Guarded(np.empty((count, channels), kept), read=False) for _ in range(2)]
    batch = [Guarded(np.empty(channels, kept), read=False) for _ in range(2)]
    images = [Guarded(inward(x), read=False, line=line) for _ in range(2)]
    gradients = {
        name: Guarded(np.empty(channels, kept), read=False) for name in layer.parameters if name in wanted
    }
    (x_, dy_), (y, dx) = given, images
    arrays = {"x": x_, "y": y, **dict(zip(("mean", "var"), batch, strict=True)), **stored}
    kernels.forward(plan, in_order(FORWARD, arrays))
    alone = y.array.copy()
    kept_planes = dict(zip(("mu", "v"), planes, strict=True))
    kernels.forward(plan, in_order(FORWARD, arrays | kept_planes))
    assert alone.tobytes() == y.array.tobytes()  # whether or not the moments of the planes are kept
    for array in planes:
        array.protected, array.read = array.room.copy(), True  # from now on
    arrays = {"dy": dy_, "x": x_, **kept_planes, **({"dx": dx} if wants_dx else {}), **stored}
    written = {f"the gradient of {name}": value for name, value in gradients.items()}
    kernels.backward(plan, in_order(BACKWARD, arrays | written))
    for array in (*stored.values(), *given, *planes, *batch, *images, *gradients.values()):
        array.check()
    found = {"y": outward(y.array)}
    found |= {"dx": outward(dx.array)} if wants_dx else {}
    found |= {f"d {name}": value.array for name, value in gradients.items()}
    mean, var = (statistic.array for statistic in batch)
    return found | ({"running_mean": mean, "running_var": var} if training else {})


def check(layer, x, dy, training=True, **how):
    """Hold the loops to the reference; returns what they gave."""
    found = call(layer, x, dy, training, **how)
    before = dict(layer.statistics)
    with np.errstate(invalid="ignore"):
        expected = {"y": layer.forward(x, training)}
        expected["dx"], gradients = layer.backward(dy)
        allowed = tolerances(layer, dy.astype(layer.dtype), before, x.dtype.name)
    expected |= {f"d {name}": value for name, value in gradients.items()} | layer.statistics
    layer.statistics = before
    for name, value in found.items():
        deviation = compare(name, value, expected[name], allowed[name])
        assert deviation.ratio <= 1, f"{name}, {deviation.ratio:.3g} of the tolerance: {deviation.message}"
    return found


def assert_same(some, others):
    for name in some.keys() & others.keys():
        np.testing.assert_array_equal(some[name], others[name], err_msg=name)


@LAYOUTS
@PHASES
@pytest.mark.parametrize(
    ("centering", "scaling", "restrict"),
    [*itertools.product(CENTERINGS, CENTERINGS, RESTRICTIONS), (None, "input_mean", "sigmoid")],
    ids=lambda name: name or "none",
)
def test_every_option(centering, scaling, restrict, training, channels_last):
    for dtype in ("float32", "float64"):
        layer = layer_of(19, dtype, centering=centering, scaling=scaling, restrict=restrict)
        check(layer, *image_of((3, 19, 5, 7), dtype, 0.5), training, channels_last=channels_last)


@LAYOUTS
@PHASES
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [
        (2, 1),
        (9, 33),
        (3, 1, 1),
        (1, 5, 2),
        (4, 16, 16),
        (5, 17, 7, 7),
        (2, 31, 3, 5, 3),
        (1, 3, 65, 67),
        (2, 1100, 9, 9),
    ],
    ids=str,
)
def test_every_shape_and_dtype(shape, dtype, training, channels_last):
    check(layer_of(shape[1], dtype), *image_of(shape, dtype), training, channels_last=channels_last)


@LAYOUTS
@PHASES
@pytest.mark.parametrize("shape", [(1, 2, 1100, 1100), (4, 17, 7, 7), (3, 32, 14, 14), (9, 2, 4, 4)], ids=str)
@pytest.mark.parametrize("centering", CENTERINGS)
def test_planes_far_from_zero(shape, centering, training, channels_last):
    layer = layer_of(shape[1], centering=centering)
    layer.statistics["running_mean"] += 1000
    check(layer, *image_of(shape, offset=1000), training, channels_last=channels_last)


@LAYOUTS
@PHASES
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 32, 4, 8), (2, 96, 8, 4), (5, 2048, 32), (2, 17, 9)], ids=str)
def test_what_is_written_past_the_caches_is_the_same(shape, dtype, training, channels_last):
    layer, (x, dy) = layer_of(shape[1], dtype), image_of(shape, dtype)
    near = call(layer, x, dy, training, channels_last)
    try:
        assert kernels.limit_cache(0) == 0
        assert_same(call(layer, x, dy, training, channels_last, line=64), near)
        assert_same(call(layer, x, dy, training, channels_last, line=1), near)  # not whole lines
    finally:
        assert kernels.limit_cache(2**40) > 2**20


@LAYOUTS
@pytest.mark.parametrize(
    ("shape", "first"),
    [
        *(((2, 3, 100, 100), first) for first in (1, 15, 16, 17, 40, 64, 100, 9999)),
        *(((2, 20, 7, 7), first) for first in (1, 15, 16, 17, 48)),
    ],
    ids=str,
)
def test_the_first_values_of_a_plane_tell_nothing_of_the_others(shape, first, channels_last):
    x, dy = image_of(shape)
    x.reshape(*shape[:2], -1)[..., :first] -= 1000
    check(layer_of(shape[1], centering="channel_std"), x, dy, channels_last=channels_last)


@LAYOUTS
def test_no_images(channels_last):
    found = call(layer_of(5), *image_of((0, 5, 4)), training=False, channels_last=channels_last)
    for name in VECTOR_PARAMETERS:
        np.testing.assert_array_equal(found[f"d {name}"], np.zeros(5))


@LAYOUTS
@PHASES
def test_no_gamma_and_no_beta(training, channels_last):
    for gamma, beta in ((False, False), (True, False), (False, True)):
        layer = layer_of(18, gamma=gamma, beta=beta)
        check(layer, *image_of((2, 18, 6)), training, channels_last=channels_last)


@LAYOUTS
@PHASES
def test_only_the_gradients_that_are_wanted(training, channels_last):
    layer, (x, dy) = layer_of(18), image_of((3, 18, 6))
    everything = call(layer, x, dy, training, channels_last)
    for wanted in ((), *((name,) for name in VECTOR_PARAMETERS)):
        for wants_dx in (True, False):
            some = call(layer, x, dy, training, channels_last, wanted=wanted, wants_dx=wants_dx)
            assert {name for name in some if name.startswith("d ")} == {f"d {name}" for name in wanted}
            assert_same(some, everything)


@LAYOUTS
@PHASES
@pytest.mark.parametrize("shape", [(1, 1100, 9, 9), (3, 50, 8, 8), (7, 5, 70, 70), (64, 40)], ids=str)
def test_results_do_not_depend_on_the_threads(shape, training, channels_last):
    layer, (x, dy) = layer_of(shape[1]), image_of(shape)
    one = call(layer, x, dy, training, channels_last, threads=1)
    for threads in (1, 2, 3, 8):
        assert_same(call(layer, x, dy, training, channels_last, threads=threads), one)


@LAYOUTS
def test_calls_from_several_threads(channels_last):
    layers = [layer_of(40, seed=seed) for seed in range(4)]
    inputs = [image_of((3, 40, 11, 13), seed=10 + seed) for seed in range(4)]

    def one(seed):
        return call(layers[seed], *inputs[seed], channels_last=channels_last)

    alone, order = [one(seed) for seed in range(4)], [*range(4)] * 8
    with ThreadPoolExecutor(4) as pool:
        for seed, found in zip(order, pool.map(one, order), strict=True):
            assert_same(found, alone[seed])


@LAYOUTS
@PHASES
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("centering", CENTERINGS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_spoils_what_it_reaches(value, centering, dtype, training, channels_last):
    x, dy = image_of((3, 21, 5, 7), dtype)
    x[1, 17, 2, 3] = value
    found = check(layer_of(21, dtype, centering=centering), x, dy, training, channels_last=channels_last)
    spoilt = ~np.isfinite(found["y"].astype(np.float64)).all(axis=(2, 3))
    assert {tuple(place) for place in np.argwhere(spoilt)} == (
        {(0, 17), (1, 17), (2, 17)} if training else {(1, 17)}
    )


@LAYOUTS
def test_a_transformation_that_measures_nothing_keeps_what_is_not_finite_in_its_place(channels_last):
    x, dy = image_of((2, 20, 5, 5))
    x[1, 3, 2, 2] = dy[0, 19, 1, 1] = np.nan
    layer = layer_of(20, centering=None, scaling=None)
    found = call(layer, x, dy, training=False, channels_last=channels_last)
    np.testing.assert_array_equal(np.isnan(found["y"]), np.isnan(x))
    np.testing.assert_array_equal(np.isnan(found["dx"]), np.isnan(dy))


@LAYOUTS
@pytest.mark.parametrize("dtype", [np.float16, BFLOAT16], ids=["float16", "bfloat16"])
def test_every_half_number_is_read_and_rounded_to_the_nearest_even(dtype, channels_last):
    x = np.arange(2**16, dtype=np.uint16).view(dtype).reshape(1, 2, 2**15)
    layer = layer_of(2, centering=None, scaling=None, beta=False, eps=1e-30)
    layer.statistics |= {"running_mean": np.zeros(2), "running_var": np.ones(2)}
    layer.parameters["gamma"] = np.array([1 + 2.0**-9, 1 + 2.0**-11 + 2.0**-8])  # exact products in float32
    with np.errstate(invalid="ignore", over="ignore"):
        y = (x.astype(np.float32) * per_channel(layer.parameters["gamma"], x).astype(np.float32)).astype(
            dtype
        )
    found = call(layer, x, np.zeros_like(x), training=False, channels_last=channels_last)["y"]
    np.testing.assert_array_equal(found.astype(np.float32), y.astype(np.float32))


@LAYOUTS
def test_the_variance_is_not_a_difference_of_squares(channels_last):
    x, dy = image_of((4, 3, 40, 40), offset=1000)
    found = call(layer_of(3, centering=None), x, dy, channels_last=channels_last)
    _, var = batch_mean_and_variance(x.astype(np.float64))
    np.testing.assert_allclose(found["running_var"], var, rtol=1e-4)


@LAYOUTS
@pytest.mark.parametrize("size", [5, 7, 16, 40])
def test_moments_are_exact_where_the_mean_is_far_larger_than_the_deviation(size, channels_last):
    x, dy = image_of((1, 32, size, size), offset=1e5)
    found = call(layer_of(32, centering=None), x, dy, channels_last=channels_last)
    mean, var = batch_mean_and_variance(x.astype(np.float64))
    np.testing.assert_allclose(found["running_mean"], mean, rtol=1.01 * 2**-24, atol=0)  # the last rounding
    np.testing.assert_allclose(found["running_var"], var, rtol=16 * 2**-23, atol=0)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("batch_dtype", ["float32", "float64"])
@pytest.mark.parametrize("new_weight", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_running_statistics(dtype, batch_dtype, new_weight):
    rng = np.random.default_rng(0)
    running, batch = (
        Guarded(rng.normal(size=37, scale=scale).astype(name), read=False)
        for name, scale in ((dtype, 1e8), (batch_dtype, 1.0))
    )
    old, new = rng.normal(size=37, scale=1e8).astype(dtype), rng.normal(size=37).astype(batch_dtype)
    running.array[...], batch.array[...] = old, new
    other = Guarded(old, read=False)
    other.array[...] = old
    statistics = (running, other, batch, batch)
    kernels.accumulate([each.described for each in statistics], new_weight, correction=1.25)
    for changed, factor in ((running, 1), (other, 1.25)):
        expected = (1 - new_weight) * old.astype(np.longdouble) + new_weight * factor * new.astype(
            np.longdouble
        )
        # The last rounding, and two in double precision of numbers as large as the old one.
        unit, exact = (np.finfo(name).eps for name in (dtype, "float64"))
        bound = unit * np.abs(expected) + (0 if new_weight == 1 else 2 * exact * np.abs(old))
        assert (np.abs(changed.array - expected) <= bound).all()
        changed.check()


def test_threads_are_woken_where_there_is_work_for_them():
    assert kernels.worthwhile_threads(1, 1, 1, 8) == kernels.worthwhile_threads(8, 64, 7, 8) == 1
    assert kernels.worthwhile_threads(32, 64, 3136, 8) == 8  # as many as there are
    assert kernels.worthwhile_threads(256, 128, 1, 8) == 3  # the planes' own numbers are work, too
    for images, channels, positions in ((0, 5, 4), (5, 0, 4), (5, 4, 0), (2**20, 2**20, 2**20)):
        assert 1 <= kernels.worthwhile_threads(images, channels, positions, 4) <= 4
