"""Mixed precision in Jittor, with inputs made, and gradients asked for, inside and outside of a level."""

import functools

import numpy as np
import pytest

from rbn.backends.jittor import BNET, IEBN, RBN, from_numpy, to_numpy

# After the backend, which prepares what Jittor reads at its import.
# isort: split
import jittor as jt

LEVELS = [(level, True) for level in (0, 3, 4, 5, 6)] + [(5, False), (6, False)]
"""With the fused form or without; 1 and 2 are 0 in Jittor, and the suite has them all."""
SHAPE = (4, 3, 5, 6)
DIGITS = {"float16": 0.5**9, "bfloat16": 0.5**6, "float32": 1e-5}
"""Of results that have been rounded to a dtype, and of a gradient that has been so twice."""


def exact(seed, offset=0.0):
    """Numbers that every dtype but bfloat16 has."""
    return (np.random.default_rng(seed).normal(size=SHAPE) + offset).astype("float16").astype("float64")


def state_of(layer):
    """A state without special values, exact in half precision."""
    rng = np.random.default_rng(0)
    return {
        name: value if value.dtype.kind == "i" else np.float16(rng.uniform(0.2, 1.8, value.shape))
        for name, value in to_numpy(layer).items()
    }


def learned(layer):
    return [value for name, value in layer.named_parameters() if not name.startswith(("running", "num"))]


@functools.cache
def due(make, training, factor=1.0):
    """Y, the gradients and the statistics in float64."""
    layer = make(3, fused=False)
    state = state_of(layer)
    layer.float64()
    from_numpy(layer, state)
    layer.is_train = training
    x, cotangent = (jt.array(exact(*seed), dtype="float64") for seed in ((1, 1.0), (2,)))
    y = layer(x)
    gradients = jt.grad((y * cotangent * factor).sum(), [x, *learned(layer)])
    return numbers([y, *gradients, layer.running_mean, layer.running_var])


def numbers(values):
    return [value.float64().numpy() for value in values]


def assert_near(found, expected, digits):
    """The statistics are taken in float32 whatever the level is; the rest may have been rounded."""
    assert len(found) == len(expected)
    for place, (one, two) in enumerate(zip(numbers(found), expected, strict=True)):
        allowed = digits if place < len(found) - 2 else 2e-6
        np.testing.assert_allclose(one, two, rtol=allowed, atol=allowed * abs(two).max())


def step(
    make,
    level,
    *,
    fused,
    where="inside",
    asked="inside",
    dtype="float32",
    cotangent_dtype="float32",
    stored="float32",
    training=True,
):
    """A step of which the input is made, and the gradients are asked for, inside or outside of the level."""
    layer = make(3, fused=fused)
    from_numpy(layer, state_of(layer))
    if stored != "float32":
        getattr(layer, stored)()
    layer.is_train = training

    def inputs():
        x = jt.array(exact(1, 1.0), dtype="float32" if dtype == "bfloat16" else dtype).cast(dtype)
        return x, jt.array(exact(2), dtype=cotangent_dtype)

    given = inputs() if where == "outside" else None
    with jt.flag_scope(auto_mixed_precision_level=level):
        x, cotangent = given or inputs()
        y = layer(x)
        loss = (y * cotangent).sum()
        targets = [x, *learned(layer)]
        gradients = jt.grad(loss, targets) if asked == "inside" else None
    gradients = gradients or jt.grad(loss, targets)
    assert y.dtype == x.dtype
    return [y, *gradients, layer.running_mean, layer.running_var]


@pytest.mark.parametrize("where", ["inside", "outside"])
@pytest.mark.parametrize(("level", "fused"), LEVELS)
def test_every_level_gives_the_numbers_of_full_precision(level, where, fused):
    for asked in ("inside", "outside"):
        for dtype in ("float32", "float16"):
            found = step(RBN, level, fused=fused, where=where, asked=asked, dtype=dtype)
            assert_near(found, due(RBN, True), DIGITS["float16"])


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("make", "training"), [(RBN, False), (IEBN, True), (BNET, True)])
def test_every_layer_does(make, training, fused):
    found = step(make, 5, fused=fused, where="outside", training=training)
    assert_near(found, due(make, training), DIGITS["float16"])


@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
def test_half_precision_parameters_give_in_both_forms_the_same(stored):
    found, expected = (step(RBN, 5, fused=fused, stored=stored, where="outside") for fused in (True, False))
    assert_near(found, numbers(expected), DIGITS[stored])


# The gradient of a product has the dtype of the other factor: Jittor does not cast it back.
@pytest.mark.parametrize(
    ("dtype", "cotangent_dtype"),
    [("float32", "float16"), ("float32", "float64"), ("float16", "float32"), ("bfloat16", "float32")],
)
def test_a_gradient_of_another_dtype_than_the_image(dtype, cotangent_dtype):
    arguments = {"dtype": dtype, "cotangent_dtype": cotangent_dtype}
    found, expected = (step(RBN, 0, fused=fused, **arguments) for fused in (True, False))
    assert found[1].dtype == dtype
    digits = DIGITS[dtype if dtype == "bfloat16" else "float16"]
    assert_near(found, numbers(expected), digits)
    if dtype != "bfloat16":
        assert_near(found, due(RBN, True), digits)


def test_a_float32_gradient_of_a_half_precision_image_is_not_rounded():
    factor = 2.0**20  # beyond what float16 has
    layer = RBN(3)
    from_numpy(layer, state_of(layer))
    x, cotangent = jt.array(exact(1, 1.0), dtype="float16"), jt.array(exact(2) * factor, dtype="float32")
    found = jt.grad((layer(x) * cotangent).sum(), learned(layer))
    for one, two in zip(found, due(RBN, True, factor)[2:-2], strict=True):
        np.testing.assert_allclose(one.numpy(), two, rtol=1e-4, atol=1e-4 * abs(two).max())


@pytest.mark.parametrize("fused", [True, False])
def test_level_3_leaves_float64_alone(fused):
    x = jt.array(exact(1, 1.0) / 3, dtype="float64")

    def given(level):
        layer = RBN(3, fused=fused)
        layer.float64()
        with jt.flag_scope(auto_mixed_precision_level=level):
            y = layer(x)
            gradients = jt.grad(y.sqr().sum(), [x, *learned(layer)])
        return [y, *gradients, layer.running_mean, layer.running_var]

    for one, two in zip(numbers(given(3)), numbers(given(0)), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-12, atol=1e-12)


def test_float64_statistics_are_accumulated_in_float64_at_any_level():
    x = jt.array(exact(1, 1.0) / 3, dtype="float64")
    layer, expected = RBN(3), RBN(3)
    for each, level in ((layer, 5), (expected, 0)):
        each.float64()
        with jt.flag_scope(auto_mixed_precision_level=level):
            each(x)
    np.testing.assert_allclose(layer.running_var.numpy(), expected.running_var.numpy(), rtol=1e-12)
