"""What is Jittor's own about the layer; the mathematics is the conformance suite's business."""

import copy
import doctest
import os
import sys

import numpy as np
import pytest

from rbn.backends import frameworks
from rbn.backends.jittor import BNET, IEBN, RBN, convert, environment, from_numpy, functional, to_numpy

# After the backend, which prepares what Jittor reads at its import.
# isort: split
import jittor as jt
from jittor import nn

from rbn_core import RBNValueError
from rbn_core.config import Config
from rbn_core.names import NAMES, PARAMETERS


def image(shape=(4, 3, 5, 5), seed=0, offset=0.0, dtype="float32"):
    return jt.array(np.random.default_rng(seed).normal(size=shape) + offset, dtype=dtype).sync()


def assert_same(actual, expected, **tolerance):
    np.testing.assert_allclose(actual.numpy(), expected.numpy(), **{"rtol": 1e-5, "atol": 1e-5} | tolerance)


def assert_unchanged(layer, before):
    for name, value in to_numpy(layer).items():
        np.testing.assert_array_equal(value, before[name])


def test_a_batch_norm_checkpoint_loads_into_rbn():
    norm = nn.BatchNorm(3)
    norm(image())
    layer = RBN(3)
    layer.load_state_dict(norm.state_dict())
    assert_same(layer.running_var, norm.running_var, rtol=0, atol=0)
    np.testing.assert_array_equal(layer.scale_bias.numpy(), np.ones(3))


def test_a_fresh_layer_is_batch_norm_times_one_constant():
    x = image()
    assert_same(RBN(3)(x), nn.BatchNorm(3)(x) * jt.sigmoid(jt.array(1.0)))


def test_a_batch_norm_checkpoint_loads_into_iebn_which_starts_as_batch_norm_times_sigmoid_of_minus_one():
    norm, layer, x = nn.BatchNorm(3), IEBN(3), image()
    norm.weight.update(jt.array([0.5, -2.0, 3.0]))
    layer.load_state_dict(norm.state_dict())
    assert_same(layer(x), norm(x) * jt.sigmoid(jt.array(-1.0)))


CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
SIZES = {1: (4, 3, 6), 2: (4, 3, 5, 6), 3: (4, 3, 3, 4, 5)}


@pytest.mark.parametrize("rank", CONVOLUTIONS)
def test_bnet_starts_as_jittors_depthwise_convolution(rank):
    def start(make):
        jt.set_global_seed(5)
        conv = make()
        return conv.weight.numpy(), conv.bias.numpy()  # which draws the numbers

    ours = start(lambda: BNET(3, 5, spatial_dims=rank).conv)
    theirs = start(lambda: CONVOLUTIONS[rank](3, 3, 5, padding=2, groups=3))
    for mine, own in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(mine, own)


@pytest.mark.parametrize("rank", [1, 2])  # Jittor's Conv3d mixes up its axes on the processor
def test_bnet_is_batch_norm_and_jittors_own_convolution(rank):
    layer, x = BNET(3, spatial_dims=rank), image(SIZES[rank])
    assert_same(layer(x), layer.conv(nn.BatchNorm(3)(x)))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("rank", SIZES)
def test_bnet_in_the_place_of_a_batch_norm_equals_it(rank, affine):
    norm = nn.BatchNorm(3, eps=0.1, momentum=0.3, affine=affine)
    if affine:
        norm.weight.update(jt.array([0.5, -2.0, 3.0]))
        norm.bias.update(jt.array([1.0, 0.0, -1.0]))
    norm(image(SIZES[rank], seed=1))
    x = image(SIZES[rank])

    def converted(kernel_size):
        model = nn.Sequential(copy.deepcopy(norm))
        convert(model, "bnet", preserve=True, kernel_size=kernel_size, spatial_dims=rank)
        return model[0]

    layer = converted(5)
    assert layer.momentum == 0.3
    assert_same(layer.eval()(x), norm.eval()(x))
    layer = converted(3)
    assert not layer.is_training()
    assert_same(layer.train()(x), norm.train()(x))
    assert not layer.conv.weight.is_stop_grad()


def test_bnet_convolves_half_precision_in_float32():
    layer, x = BNET(3, 7), image((2, 3, 16, 16)).float16()
    y = layer(x)
    assert y.dtype == "float16"
    assert_same(y.float32(), layer.conv(nn.BatchNorm(3)(x.float32())), rtol=0.5**11)


def test_bnet_sums_the_gradient_of_a_large_image_with_all_its_digits():
    layer = BNET(1)
    x = image((4, 1, 256, 256))
    gradient = jt.grad(layer(x).sum(), layer.conv.bias)
    np.testing.assert_allclose(gradient.numpy(), 4 * 256 * 256, rtol=1e-7)
    kernel = jt.grad((layer(x) * x.abs()).sum(), layer.conv.weight).numpy()
    layer.float64()
    exact = x.float64()
    expected = jt.grad((layer(exact) * exact.abs()).sum(), layer.conv.weight).numpy()
    np.testing.assert_allclose(kernel, expected, rtol=1e-6, atol=1e-6 * abs(expected).max())


def test_bnet_refuses_another_rank():
    layer = BNET(3)
    before = to_numpy(layer)
    with pytest.raises(RBNValueError, match="BNET: expected an input with 2 spatial axes"):
        layer(image((4, 3, 5)))
    assert_unchanged(layer, before)


def test_optimizers_train_bnets_convolution():
    layer = BNET(3)
    weight, bias = layer.conv.weight.numpy().copy(), layer.conv.bias.numpy().copy()
    nn.SGD(layer.parameters(), 0.1).step(layer(image()).sqr().sum())
    assert (layer.conv.weight.numpy() != weight).all()
    assert (layer.conv.bias.numpy() != bias).all()


def test_biased_statistics_follow_batch_norm_step_by_step():
    layer, norm = RBN(3, running_var="biased"), nn.BatchNorm(3)
    for step in range(3):
        layer(image(seed=step)), norm(image(seed=step))
    assert_same(layer.running_mean, norm.running_mean)
    assert_same(layer.running_var, norm.running_var)
    assert layer.num_batches_tracked.item() == 3


def test_evaluation_leaves_every_statistic_alone():
    layer = RBN(3).eval()
    before = to_numpy(layer)
    layer(image()).sync()
    assert_unchanged(layer, before)


def test_a_layer_can_start_in_evaluation():
    layer = RBN(3, 1e-5, 0.1, True, False)
    layer(image()).sync()
    assert not layer.is_training()
    assert layer.num_batches_tracked.item() == 0
    assert_same(layer(image()), RBN(3).eval()(image()))


def test_cumulative_momentum_averages_all_batches():
    layer = RBN(3, momentum=None)
    batches = [image(seed=step) for step in range(3)]
    for x in batches:
        layer(x)
    variances = [x.numpy().var(axis=(0, 2, 3), ddof=1) for x in batches]
    np.testing.assert_allclose(layer.running_var.numpy(), np.mean(variances, axis=0), rtol=1e-5)


def test_a_float64_cumulative_average_weighs_in_float64():
    layer = RBN(1, momentum=None)
    layer.float64()
    batches = [image((4, 1, 5), seed=step, dtype="float64") for step in range(3)]
    for x in batches:
        layer(x)
    np.testing.assert_allclose(layer.running_mean.numpy(), np.mean([x.numpy() for x in batches]), rtol=1e-12)


def test_accumulate_is_equation_3_alone():
    running = mean, var = jt.zeros((2,), "float16"), jt.ones((2,))
    batch = jt.array([1.0, -2.0]), jt.array([3.0, 3.0])
    functional.accumulate(running, *batch, 0.25)
    np.testing.assert_allclose(mean.numpy(), [0.25, -0.5])
    np.testing.assert_allclose(var.numpy(), [1.5, 1.5])
    functional.accumulate(running, *batch, None, count=jt.array([2]), values=4)
    np.testing.assert_allclose(mean.numpy(), [0.625, -1.25])
    np.testing.assert_allclose(var.numpy(), [2.75, 2.75])
    assert mean.dtype == "float32"
    assert mean.is_stop_grad()
    with pytest.raises(RBNValueError, match="accumulate: expected count with new_weight=None"):
        functional.accumulate(running, *batch, None)


def test_the_example_of_accumulate_runs():
    (example,) = doctest.DocTestFinder().find(functional.accumulate, "accumulate", globs={})
    assert doctest.DocTestRunner().run(example) == (0, 5)


def test_momentum_and_eps_can_change_after_construction():
    layer = RBN(3)
    layer.momentum, layer.eps = 1.0, 3.0
    x = image()
    y = layer(x)
    np.testing.assert_allclose(layer.running_mean.numpy(), x.numpy().mean(axis=(0, 2, 3)), atol=1e-6)
    centered = x.numpy() - x.numpy().mean(axis=(0, 2, 3), keepdims=True)
    expected = centered / np.sqrt(x.numpy().var(axis=(0, 2, 3), keepdims=True) + 3) / (1 + np.exp(-1))
    np.testing.assert_allclose(y.numpy(), expected, atol=1e-6)


# One binary digit less than bfloat16 has: Jittor converts to it by cutting off.
@pytest.mark.parametrize(("dtype", "digits"), [("float16", 11), ("bfloat16", 7)])
def test_half_precision_input_is_computed_in_float32(dtype, digits):
    layer = RBN(3)
    x = image((8, 3, 16, 16), offset=10).cast(dtype)
    y = layer(x)
    assert y.dtype == dtype
    assert_same(y.float32(), RBN(3)(x.float32()), rtol=0.5**digits)
    assert layer.running_mean.dtype == "float32"
    expected = 0.1 * x.float32().numpy().mean(axis=(0, 2, 3), dtype="float64")
    np.testing.assert_allclose(layer.running_mean.numpy(), expected, rtol=1e-6)


def test_statistics_stay_exact_under_automatic_mixed_precision():
    x = image(offset=100)
    expected = RBN(3)
    y = expected(x)
    layer = RBN(3)
    with jt.flag_scope(auto_mixed_precision_level=5):
        assert (x * x).dtype == "float16"
        assert_same(layer(x), y)
    assert_same(layer.running_mean, expected.running_mean, rtol=1e-6)
    assert_same(layer.running_var, expected.running_var, rtol=1e-6)


def test_a_layer_made_half_precision_goes_on_with_float32_statistics():
    layer = RBN(3)
    layer.float16()
    layer(image())
    assert layer.running_var.dtype == "float32"
    assert layer.num_batches_tracked.dtype == "int32"


def test_float64_layers_keep_float64_statistics():
    layer = RBN(3)
    layer.float64()
    assert layer(image(dtype="float64")).dtype == "float64"
    assert layer.running_var.dtype == "float64"


def test_large_float32_planes_keep_their_digits():
    x = image((1, 2, 500, 500), offset=1000)
    layer = RBN(2, momentum=1.0, running_var="biased")
    layer(x)
    exact = x.numpy().astype("float64")
    np.testing.assert_allclose(layer.running_mean.numpy(), exact.mean(axis=(0, 2, 3)), rtol=2e-7)
    np.testing.assert_allclose(layer.running_var.numpy(), exact.var(axis=(0, 2, 3)), rtol=1e-5)


@pytest.mark.parametrize("make", [RBN, IEBN, BNET])
def test_gradients_of_gradients(make):
    layer = make(2, fused=False)
    layer.float64()
    rng = np.random.default_rng(0)
    state = to_numpy(layer)
    parameters = state.keys() & set(PARAMETERS)
    moved = {name: state[name] + 0.3 * rng.normal(size=state[name].shape) for name in sorted(parameters)}
    from_numpy(layer, state | moved)
    at, along, cotangent = (rng.normal(size=(3, 2, 2, 2)) for _ in range(3))

    def slope(values):
        x = jt.array(values, dtype="float64").sync()
        return x, (jt.grad((layer(x) * jt.array(cotangent, dtype="float64")).sum(), x))

    x, dx = slope(at)
    second = jt.grad((dx * jt.array(along, dtype="float64")).sum(), x).numpy()
    h = 1e-5
    ahead, behind = (slope(at + side * along)[1].numpy() for side in (h, -h))
    # The Hessian is symmetric: its product with a direction is the slope of the gradient along it.
    np.testing.assert_allclose(second, (ahead - behind) / (2 * h), rtol=1e-6, atol=1e-8)


def test_optimizers_train_the_parameters_and_leave_the_statistics():
    layer = RBN(3)
    trained = {name for name, var in layer.named_parameters() if not var.is_stop_grad()}
    assert trained == {NAMES["jittor"][name] for name in Config(3).parameters}
    optimizer = nn.SGD(layer.parameters(), 0.1, weight_decay=0.5)
    optimizer.step(layer(image()).sqr().sum())
    assert layer.weight.numpy().max() < 1
    np.testing.assert_allclose(
        layer.running_mean.numpy(), 0.1 * image().numpy().mean(axis=(0, 2, 3)), atol=1e-6
    )


def test_statistics_are_not_trained_even_if_everything_is_unfrozen():
    layer = RBN(3)
    layer.running_mean.start_grad()
    layer(image())
    assert layer.running_mean.is_stop_grad()


def test_a_training_loop_that_reads_nothing_grows_no_graph():
    layer = RBN(3)
    optimizer = nn.SGD(layer.parameters(), 0.1)
    lived = []
    for step in range(6):
        optimizer.step(layer(image(seed=step)).sqr().sum())
        lived.append(jt.liveness_info()["lived_ops"])
    assert lived[-1] == lived[2]


def test_state_dict_and_file_survive(tmp_path):
    layer = RBN(3)
    layer(image())
    layer.save(str(tmp_path / "layer.pkl"))
    other = RBN(3)
    other.load(str(tmp_path / "layer.pkl"))
    assert_unchanged(other, to_numpy(layer))
    assert to_numpy(other)["num_batches_tracked"] == 1


def test_printing_shows_every_option():
    shown = str(nn.Sequential(RBN(3, centering="channel_std", running_var="biased")))
    assert "centering='channel_std'" in shown
    assert "running_var='biased'" in shown


def test_frozen_parameters_stay_frozen_through_evaluation_and_training():
    layer = RBN(3)
    layer.center_weight.stop_grad()
    layer.eval()
    layer.train()
    assert layer.center_weight.is_stop_grad()
    assert layer.running_mean.is_stop_grad()
    assert not layer.scale_weight.is_stop_grad()


def test_an_evaluated_layer_inside_training_passes_the_gradient_on():
    layer = RBN(3).eval()
    before = to_numpy(layer)
    x = image()
    gradient = jt.grad(layer(x).sum(), x)
    # Running statistics 0 and 1: y = x R(1) / sqrt(1 + eps).
    np.testing.assert_allclose(gradient.numpy(), 1 / (1 + np.exp(-1)) / np.sqrt(1 + 1e-5), rtol=1e-6)
    assert_unchanged(layer, before)


def test_the_layer_can_be_used_twice_in_one_step():
    layer = RBN(3)
    jt.grad(layer(layer(image())).sqr().sum(), layer.weight).sync()
    assert layer.num_batches_tracked.item() == 2


def test_the_layer_without_parameters_is_batch_norm():
    layer = RBN(3, affine=False, centering=None, scaling=None)
    assert set(to_numpy(layer)) == {"running_mean", "running_var", "num_batches_tracked"}
    x = image()
    assert_same(layer(x), nn.BatchNorm(3, affine=False)(x))


def test_one_channel_loaded_and_trained_at_once():
    layer = RBN(1)
    layer.float64()
    from_numpy(layer, to_numpy(layer))
    x = image((4, 1, 5), dtype="float64")
    assert np.isfinite(jt.grad(layer(x).sqr().sum(), layer.center_weight).numpy()).all()


def test_one_channel_is_not_broadcast_over_the_layer():
    layer = RBN(3)
    before = to_numpy(layer)
    with pytest.raises(RBNValueError, match="expected 3 channels on axis 1"):
        layer(image((4, 1, 5, 5)))
    assert_unchanged(layer, before)


def test_a_state_that_does_not_fit_lists_every_fault_and_changes_nothing():
    layer = RBN(3)
    before = to_numpy(layer)
    state = {name: value + 1 for name, value in before.items() if name != "beta"}
    state |= {"gamma": np.ones(4), "surprise": np.ones(3)}
    with pytest.raises(RBNValueError, match="missing beta; unexpected surprise; gamma of shape"):
        from_numpy(layer, state)
    assert_unchanged(layer, before)


def test_a_state_keeps_the_dtypes_and_the_frozen_statistics_of_the_layer():
    layer = RBN(3)
    from_numpy(layer, {name: value + 1 for name, value in to_numpy(layer).items()})
    assert layer.weight.dtype == "float32"
    assert layer.num_batches_tracked.dtype == "int32"
    assert layer.running_mean.is_stop_grad()
    assert not layer.weight.is_stop_grad()


def test_to_numpy_gives_copies():
    layer = RBN(3)
    to_numpy(layer)["gamma"][:] = 7
    np.testing.assert_array_equal(layer.weight.numpy(), np.ones(3))


def test_numpy_2_is_refused(monkeypatch):
    monkeypatch.setattr(frameworks, "_version", lambda distribution: "2.1.0")
    with pytest.raises(ImportError, match="numpy<2"):
        environment.prepare()


@pytest.fixture
def environ(monkeypatch):
    """The environment of a process that has not imported Jittor yet."""
    environ = {name: value for name, value in os.environ.items() if name not in ("nvcc_path", "use_mkl")}
    monkeypatch.setattr(os, "environ", environ)
    monkeypatch.delitem(sys.modules, "jittor")
    return environ


@pytest.mark.parametrize("runtime", [True, False])
def test_an_nvcc_is_hidden_only_where_its_runtime_is_missing(runtime, environ, monkeypatch, tmp_path):
    nvcc = tmp_path / "bin" / "nvcc"
    library = tmp_path / "lib64" / "libcudart.so"
    for file in (nvcc, library) if runtime else (nvcc,):
        file.parent.mkdir()
        file.touch()
    monkeypatch.setattr(environment.shutil, "which", lambda name: str(nvcc))
    environment.prepare()
    assert environ.get("nvcc_path") == (None if runtime else "")


def test_the_users_own_settings_stay(environ):
    environ |= {"use_mkl": "1", "nvcc_path": "/opt/mine/nvcc"}
    before = dict(environ)
    environment.prepare()
    assert environ == before


def test_nothing_changes_once_jittor_is_imported(environ, monkeypatch):
    monkeypatch.setitem(sys.modules, "jittor", jt)
    before = dict(environ)
    environment.prepare()
    assert environ == before
