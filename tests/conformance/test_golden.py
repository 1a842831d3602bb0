"""The golden files are what the reference gives, and their gradients what central differences give."""

import itertools
import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from rbn.conformance import golden
from rbn_core.options import INSTANCE_STATISTICS
from rbn_core.reference import Layer

CASES = golden.load()


@pytest.fixture(scope="module")
def exact_cases():
    """The cases with all the digits that the files have."""
    return golden.load(golden.arithmetic().mpf)


def test_the_files_regenerate_byte_for_byte(tmp_path):
    golden.write(tmp_path)
    written = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert written.keys() == {file.name for file in golden.FOLDER.iterdir()}
    for name, content in written.items():
        assert content == (golden.FOLDER / name).read_bytes(), name


def wrong_gradients(case):
    """The gradients that central differences of the forward pass, to 60 digits, do not confirm.

    Each is taken along one direction, to which every element contributes its own share: none can be wrong
    unseen. The step is 2^-66, about 1e-20, so the difference is right to 1e-40 but for a factor.
    """
    rng = np.random.default_rng(0)
    step_size = golden.arithmetic().mpf(2) ** -66
    wrong = []
    for place, step in enumerate(case.steps):
        for name, gradient in {"x": step.dx, **step.gradients}.items():
            direction = rng.uniform(0.5, 1.5, gradient.shape) * rng.choice([-1, 1], gradient.shape)
            direction = golden.exact(direction)
            above, below = (objective(case, step, name, way * step_size * direction) for way in (1, -1))
            slope = np.sum(gradient * direction)
            if abs((above - below) / (2 * step_size) - slope) > 1e-35 * (1 + abs(slope)):
                wrong.append((place, f"d{name}"))
    return wrong


def objective(case, step, name, change):
    """sum(Y dY) where what `name` says has changed."""
    layer = loaded(golden.Exact(case.config), case)
    x = step.x
    if name == "x":
        x = x + change
    else:
        layer.parameters[name] = layer.parameters[name] + change
    return np.sum(layer.forward(x, case.training) * step.cotangent)


def loaded(layer, case):
    state = {name: value.astype(float) for name, value in case.state.items()}
    if "num_batches_tracked" in state:
        state["num_batches_tracked"] = state["num_batches_tracked"].astype(int)
    layer.load(state)
    return layer


def test_central_differences_confirm_every_gradient(exact_cases):
    assert {case.id: wrong for case in exact_cases if (wrong := wrong_gradients(case))} == {}


def ratios(case, dtype, layer=Layer):
    """How far a layer in an ordinary dtype is from what the file says, in units of the tolerance."""
    layer = loaded(type("Ordinary", (layer,), {"dtype": dtype})(case.config), case)
    for place, step in enumerate(case.steps):
        actual = {"y": layer.forward(step.x, case.training)}
        actual["dx"], gradients = layer.backward(step.cotangent)
        actual |= {f"d {name}": gradient for name, gradient in gradients.items()} | layer.statistics
        expected = {"y": step.y, "dx": step.dx}
        expected |= {f"d {name}": gradient for name, gradient in step.gradients.items()} | step.statistics
        assert actual.keys() == expected.keys() == step.tolerances.keys()
        for name, value in expected.items():
            assert np.shape(actual[name]) == value.shape
            error = np.max(np.abs(actual[name] - value))
            allowed = step.tolerances[name] * np.finfo(dtype).eps
            yield place, name, error / allowed if error else 0.0


def wrong_quantities(case, dtype=np.float64):
    return [(place, name) for place, name, ratio in ratios(case, dtype) if not ratio <= 1.0]


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_the_reference_agrees_in_ordinary_precision(dtype):
    assert {case.id: wrong for case in CASES if (wrong := wrong_quantities(case, dtype))} == {}


class OnePass(Layer):
    """The variance from E[X^2] - E[X]^2."""

    def statistics_of(self, x_cm, training):
        mean, _ = super().statistics_of(x_cm, training)
        axes = (0, *range(2, x_cm.ndim))
        return mean, np.square(x_cm).mean(axis=axes) - np.square(x_cm.mean(axis=axes))


def test_a_one_pass_variance_is_found():
    cases = [case for case in CASES if "offset" in case.id]
    assert cases
    for case in cases:
        assert any(ratio > 1.0 for *_, ratio in ratios(case, np.float64, OnePass)), case.id


def test_one_wrong_digit_is_found(exact_cases):
    """The 12th digit by the reference in float64, the 30th by central differences."""
    case = CASES[0]
    y = case.steps[1].y.copy()
    y[1, 2, 0, 1] *= 1.0 + 1e-12
    planted = replace(case, steps=(case.steps[0], replace(case.steps[1], y=y)))
    assert wrong_quantities(planted) == [(1, "y")]

    exact = exact_cases[0]
    gradients = exact.steps[0].gradients
    one_wrong = gradients["scale_weight"].copy()
    one_wrong[2] *= 1 + golden.arithmetic().mpf(10) ** -30
    first = replace(exact.steps[0], gradients=gradients | {"scale_weight": one_wrong})
    assert wrong_gradients(replace(exact, steps=(first, exact.steps[1]))) == [(0, "dscale_weight")]


def test_what_an_implementation_reads_is_the_same_in_float32():
    for case in CASES:
        for array in (*case.state.values(), *(a for step in case.steps for a in (step.x, step.cotangent))):
            np.testing.assert_array_equal(array.astype(np.float32).astype(array.dtype), array)
        for option in (case.config.eps, case.config.momentum):
            assert option is None or np.float32(option) == option


def test_no_value_of_a_state_can_hide_a_mistake():
    for case in CASES:
        for name, array in case.state.items():
            assert not np.isin(array, (0, 1)).any()
            if array.shape == (case.config.num_features,):
                assert len(np.unique(array)) == array.size, f"{case.id} {name}"


def test_every_option_has_its_case():
    rbn = [case for case in CASES if case.config.layer == "RBN"]
    for training in (True, False):
        pairs = {(case.config.centering, case.config.scaling) for case in rbn if case.training == training}
        assert pairs >= set(itertools.product(INSTANCE_STATISTICS, INSTANCE_STATISTICS))
    kernels = {(case.config.kernel_size, case.config.spatial_dims) for case in CASES}
    assert kernels >= set(itertools.product((3, 5, 7), (1, 2, 3)))
    for layer in golden.EQUATIONS:
        configs = [case.config for case in CASES if case.config.layer == layer]
        for option, values in {
            "momentum": {None, 0.0, 1.0, 0.875},
            "running_var": {"biased", "unbiased"},
            "track_running_stats": {True, False},
        }.items():
            assert {getattr(config, option) for config in configs} == values, (layer, option)
    assert len({case.id for case in CASES}) == len(CASES)


@pytest.mark.parametrize("training", [True, False])
def test_the_hard_sigmoid_reaches_both_corners_and_the_slope(training):
    restrictions = []
    for case in CASES:
        if case.config.restrict == "hard_sigmoid" and case.training == training:
            layer = loaded(Layer(case.config), case)
            for step in case.steps:
                layer.forward(step.x, case.training)
                restrictions.extend(np.ravel(layer.steps.restriction))
    assert set(restrictions) > {0.0, 1.0}


def test_reading_needs_no_mpmath():
    code = "import sys; from rbn.conformance import golden; golden.load(); print('mpmath' in sys.modules)"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout == "False\n"


def test_all_digits_can_be_read():
    (first, *_) = golden.load(np.longdouble)
    text = json.loads((golden.FOLDER / "rbn.json").read_text())["cases"][0]["steps"][0]["y"]["values"][0]
    assert first.steps[0].y[0, 0, 0, 0] == np.longdouble(text)
    assert len(text) > 50
