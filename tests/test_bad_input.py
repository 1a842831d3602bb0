"""What no layer accepts: one error, with one text, in the reference and in every framework."""

import importlib

import numpy as np
import pytest

from rbn.conformance import loading
from rbn.conformance.subjects.numpy import NumpyLayer
from rbn_core import RBN, Config, RBNError, RBNTypeError, RBNValueError
from rbn_core.reference import Layer

OPTIONS = [
    ({"eps": 0.0}, RBNValueError, "RBN: expected eps to be positive and finite, got 0.0. Pass a small"),
    ({"eps": -1e-5}, RBNValueError, "RBN: expected eps to be positive and finite, got -1e-05. Pass a small"),
    (
        {"eps": float("nan")},
        RBNValueError,
        "RBN: expected eps to be positive and finite, got nan. Pass a small",
    ),
    ({"eps": "small"}, RBNTypeError, "RBN: expected eps to be a positive number, got 'small'. Pass a float"),
    ({"momentum": 1.5}, RBNValueError, "RBN: expected momentum in [0, 1], got 1.5. Pass a weight"),
    ({"momentum": -0.1}, RBNValueError, "RBN: expected momentum in [0, 1], got -0.1. Pass a weight"),
    (
        {"momentum": "0.9"},
        RBNTypeError,
        "RBN: expected momentum to be a number in [0, 1] or None, got '0.9'.",
    ),
    ({"centering": "median"}, RBNValueError, "RBN: expected centering to be one of 'channel_mean', "),
    ({"scaling": 3}, RBNTypeError, "RBN: expected scaling to be one of 'channel_mean', "),
    (
        {"restrict": "relu"},
        RBNValueError,
        "RBN: expected restrict to be one of 'sigmoid', 'hard_sigmoid', got",
    ),
    (
        {"running_var": "exact"},
        RBNValueError,
        "RBN: expected running_var to be one of 'unbiased', 'biased', got",
    ),
    (
        {"scalling": None},
        RBNTypeError,
        "RBN: expected an option of this layer, got 'scalling'. Did you mean 'sc",
    ),
]

INPUTS = [
    (
        np.zeros(3),
        RBNValueError,
        "RBN: expected an input with a batch and a channel axis, got shape (3,). Add",
    ),
    (
        np.zeros((2, 4)),
        RBNValueError,
        "RBN: expected 3 channels on axis 1, got an input of shape (2, 4). Build",
    ),
    (
        np.zeros((2, 3), np.int32),
        RBNTypeError,
        "RBN: expected a floating-point input, got dtype int32. Convert",
    ),
    (
        np.zeros((2, 3), np.complex64),
        RBNTypeError,
        "RBN: expected a floating-point input, got dtype complex64. ",
    ),
    (
        np.zeros((2, 3, 0)),
        RBNValueError,
        "RBN: expected values to train on, got an empty input of shape (2, ",  # (2, 0, 3) in Flax
    ),
    (
        np.zeros((0, 3)),
        RBNValueError,
        "RBN: expected values to train on, got an empty input of shape (0, 3). ",
    ),
    (
        np.zeros((1, 3)),
        RBNValueError,
        "RBN: expected more than one value per channel in training, got an input",
    ),
]


def layers(framework):
    """Every class of a framework's layer, with what it calls the options that have another name there."""
    if framework == "reference":
        return [(RBN, {})]
    module = importlib.import_module(f"rbn.backends.{framework}")
    if framework == "flax":
        nnx = importlib.import_module("rbn.backends.flax.nnx")
        random = importlib.import_module("flax.nnx").Rngs(0)

        def nnx_layer(**options):
            return nnx.RBN(3, **options, rngs=random)

        return [(module.RBN, {"eps": "epsilon"}), (nnx_layer, {"eps": "epsilon"})]
    return [(module.RBN, {})]


def subjects(framework):
    if framework == "reference":
        return [NumpyLayer("reference", Layer)]
    return [
        loading.load(reference)
        for name, references in loading.SUBJECTS.items()
        for reference in references
        if name.partition(".")[0] == framework
    ]


@pytest.mark.parametrize(("option", "kind", "text"), OPTIONS, ids=lambda value: str(value)[:24])
def test_a_bad_option_is_the_same_error_everywhere(framework, option, kind, text):
    for layer, names in layers(framework):
        spelled = {names.get(name, name): value for name, value in option.items()}
        if "nnx_layer" not in layer.__name__ and framework != "flax":
            spelled["num_features"] = 3
        with pytest.raises(RBNError) as caught:
            layer(**spelled)
        assert type(caught.value) is kind
        assert isinstance(caught.value, ValueError if kind is RBNValueError else TypeError)
        assert str(caught.value).startswith(text)


@pytest.mark.parametrize("count", [0, -1, 2.0, True])
def test_a_bad_number_of_channels_is_the_same_error_everywhere(framework, count):
    for layer, _ in layers(framework):
        if framework == "flax":  # linen takes the number of channels from the first input
            layer = importlib.import_module("rbn.backends.flax.nnx").RBN
        with pytest.raises(RBNError, match="RBN: expected num_features to be a positive integer, got"):
            layer(count, **({"rngs": None} if framework == "flax" else {}))


@pytest.mark.parametrize(("x", "kind", "text"), INPUTS, ids=lambda value: str(value)[:24])
def test_a_bad_input_is_the_same_error_everywhere_and_changes_no_statistic(framework, x, kind, text):
    state = {
        "gamma": np.full(3, 1.5),
        "beta": np.full(3, 0.5),
        "center_weight": np.full(3, 0.25),
        "scale_weight": np.full(3, 0.75),
        "scale_bias": np.full(3, -0.5),
        "running_mean": np.full(3, 2.0),
        "running_var": np.full(3, 3.0),
        "num_batches_tracked": np.array(7),
    }
    if x.dtype == np.float64:
        x = x.astype(np.float32)
    if framework == "torch" and len(x) == 0:
        pytest.skip("an empty batch passes through PyTorch's BatchNorm, and through ours: test_recipes.py")
    for subject in subjects(framework):
        subject.build(Config(3), state, "float32")
        with pytest.raises(RBNError) as caught:
            subject.run(x, True, np.ones_like(x))
        assert type(caught.value) is kind
        assert str(caught.value).startswith(text)
        for name, value in subject.state().items():
            np.testing.assert_array_equal(value, state[name])
