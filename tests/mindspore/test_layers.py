"""What is MindSpore's own about the layer; the mathematics is the conformance suite's business."""

import os

os.environ.setdefault("GLOG_v", "4")

import copy

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops
from mindspore.common.api import _pynative_executor

from rbn.backends.mindspore import BNET, IEBN, RBN, convert, from_numpy, to_numpy
from rbn_core import RBNError, RBNTypeError, RBNValueError

rng = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    """MindSpore writes into the working folder: refused graphs, the code it rewrites for mixed precision."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(params=[ms.PYNATIVE_MODE, ms.GRAPH_MODE], ids=["pynative", "graph"])
def mode(request):
    ms.set_context(mode=request.param)
    yield request.param
    ms.set_context(mode=ms.PYNATIVE_MODE)


def images(*shape, mean=0.0, dtype=ms.float32):
    return Tensor(rng.normal(mean, 1, shape or (4, 3, 5, 5))).astype(dtype)


def training(cell):
    return cell.set_train()


def assert_close(actual, expected, tolerance=1e-5):
    np.testing.assert_allclose(actual.asnumpy(), expected.asnumpy(), rtol=tolerance, atol=tolerance)


def assert_same_state(layer, state):
    for name, value in to_numpy(layer).items():
        np.testing.assert_array_equal(value, state[name])


class Network(nn.Cell):
    """The layer where it usually is: inside."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def construct(self, x):
        return self.norm(x)


class Twice(nn.Cell):
    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def construct(self, x):
        return self.norm(self.norm(x))


@pytest.mark.parametrize("wrap", [lambda norm: norm, nn.SequentialCell], ids=["alone", "in a network"])
def test_a_batch_norm_checkpoint_loads_into_rbn(wrap, tmp_path) -> None:
    norm, layer = nn.BatchNorm2d(3), RBN(3)
    source, target = training(wrap(norm)), wrap(layer)
    source(images())
    ms.save_checkpoint(source, str(tmp_path / "norm.ckpt"))
    missing, unexpected = ms.load_param_into_net(target, ms.load_checkpoint(str(tmp_path / "norm.ckpt")))
    own = ["center_weight", "num_batches_tracked", "scale_bias", "scale_weight"]
    assert sorted(name.rpartition(".")[2] for name in missing) == own
    assert unexpected == []
    assert_close(layer.moving_variance, norm.moving_variance, 0)
    assert_close(layer.moving_mean, norm.moving_mean, 0)


def test_a_fresh_layer_is_batch_norm_times_one_constant(mode) -> None:
    x = images()
    expected = training(nn.BatchNorm2d(3))(x) * ops.sigmoid(Tensor(1.0))
    assert_close(training(RBN(3))(x), expected)


def test_statistics_follow_batch_norm_step_by_step(mode) -> None:
    layer, norm = training(RBN(3)), training(nn.BatchNorm2d(3))
    for _ in range(3):
        x = images()
        layer(x), norm(x)
    assert_close(layer.moving_mean, norm.moving_mean)
    assert_close(layer.moving_variance, norm.moving_variance)
    assert layer.num_batches_tracked == 3


@pytest.mark.parametrize("use_batch_statistics", [None, True, False])
@pytest.mark.parametrize("train", [True, False])
def test_batch_statistics_are_used_when_batch_norm_uses_them(use_batch_statistics, train) -> None:
    x = images(mean=2.0)
    layer = RBN(3, use_batch_statistics=use_batch_statistics, scaling=None).set_train(train)
    norm = nn.BatchNorm2d(3, use_batch_statistics=use_batch_statistics).set_train(train)
    assert_close(layer(x), norm(x))
    assert_close(layer.moving_mean, norm.moving_mean)


def test_a_cell_starts_in_evaluation_and_leaves_every_statistic_alone(mode) -> None:
    layer = RBN(3)
    before = to_numpy(layer)
    layer(images())
    assert_same_state(layer, before)


def test_cumulative_momentum_averages_all_batches(mode) -> None:
    layer, seen = training(RBN(3, momentum=None, centering=None)), []
    for _ in range(3):
        x = images()
        layer(x)
        seen.append(x.asnumpy().transpose(1, 0, 2, 3).reshape(3, -1))
    expected = np.mean([batch.var(axis=1, ddof=1) for batch in seen], axis=0)
    np.testing.assert_allclose(layer.moving_variance.asnumpy(), expected, rtol=1e-5)


def test_eps_and_momentum_can_be_changed_between_calls() -> None:
    layer, x = training(RBN(3, centering=None)), images(mean=3.0)
    layer(x)
    layer.momentum, layer.eps = 0.0, 100.0
    assert layer(x).asnumpy().std() < 0.1
    np.testing.assert_allclose(layer.moving_mean.asnumpy(), x.asnumpy().mean((0, 2, 3)), rtol=1e-5)


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 5), (4, 3, 5, 5), (2, 3, 2, 4, 3)])
@pytest.mark.parametrize("statistic", ["channel_std", "spatial_std"])
def test_channels_last_data_gives_the_same_numbers(shape, statistic) -> None:
    options = {"centering": statistic, "scaling": statistic}
    first, last = training(RBN(3, **options)), training(RBN(3, data_format="NHWC", **options))
    from_numpy(first, {name: value + 1 for name, value in to_numpy(first).items()})
    from_numpy(last, to_numpy(first))
    x = images(*shape)
    assert_close(last(ops.movedim(x, 1, -1)), ops.movedim(first(x), 1, -1))
    for name, value in to_numpy(last).items():  # what lies otherwise is summed in another order
        np.testing.assert_allclose(value, to_numpy(first)[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [ms.float16, ms.bfloat16])
def test_half_precision_input_keeps_float32_statistics(mode, dtype) -> None:
    layer = training(RBN(3, momentum=0.0, dtype=dtype))
    x = images(8, 3, 16, 16, mean=10.0, dtype=dtype)
    assert layer(x).dtype == dtype
    assert layer.gamma.dtype == dtype
    assert layer.moving_mean.dtype == ms.float32
    exact = x.astype(ms.float32).asnumpy().astype(np.float64).mean((0, 2, 3))
    np.testing.assert_allclose(layer.moving_mean.asnumpy(), exact, rtol=1e-6)


def test_float64_is_exact_although_python_numbers_beside_tensors_are_float32(mode) -> None:
    layer = training(RBN(3, eps=0.1, momentum=0.7, dtype=ms.float64, centering=None, scaling=None))
    x = images(dtype=ms.float64)
    y, x = layer(x).asnumpy(), x.asnumpy()
    mean, var = (moment((0, 2, 3)) for moment in (x.mean, x.var))
    expected = (x - mean[:, None, None]) / np.sqrt(var + 0.1)[:, None, None]
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-14)
    np.testing.assert_allclose(layer.moving_mean.asnumpy(), 0.3 * mean, rtol=0, atol=1e-15)
    np.testing.assert_allclose(layer.moving_variance.asnumpy(), 0.7 + 0.3 * var * 100 / 99, rtol=1e-14)


@pytest.mark.parametrize("level", ["O1", "O2", "O3", "auto"])
def test_mixed_precision_leaves_the_statistics_in_float32(mode, level) -> None:
    layer = RBN(3, momentum=0.0)
    network = training(ms.amp.auto_mixed_precision(Network(layer), level))
    x = images(8, 3, 8, 8, mean=100.0).astype(ms.float16).astype(ms.float32)  # graph mode casts the input
    network(x)
    np.testing.assert_allclose(layer.moving_mean.asnumpy(), x.asnumpy().mean((0, 2, 3)), rtol=1e-6)
    assert layer.num_batches_tracked == 1


def test_one_step_is_the_same_in_both_modes_and_under_jit() -> None:
    x, results = images(), []
    for variant in ("pynative", "jit", "graph"):
        layer = training(RBN(3))
        weights = layer.trainable_params()

        def loss(x):
            return (layer(x) ** 3).sum()  # noqa: B023 - called in this turn

        step = ms.value_and_grad(loss, 0, weights)
        ms.set_context(mode=ms.GRAPH_MODE if variant == "graph" else ms.PYNATIVE_MODE)
        try:
            _, (dx, gradients) = (ms.jit(step) if variant == "jit" else step)(x)
            results.append([dx, *gradients, layer.moving_mean, layer.moving_variance])
        finally:
            ms.set_context(mode=ms.PYNATIVE_MODE)
        assert layer.num_batches_tracked == 1
    for other in results[1:]:
        for actual, expected in zip(other, results[0], strict=True):
            assert_close(actual, expected)


def test_a_compiled_layer_follows_set_train() -> None:
    layer = training(RBN(3))
    compiled = ms.jit(layer)
    compiled(images()), compiled(images())
    layer.set_train(False)
    compiled(images())
    assert layer.num_batches_tracked == 2


def test_gradients_of_gradients_of_a_compiled_function() -> None:
    layer = training(RBN(2, dtype=ms.float64, fused=False))
    from_numpy(layer, {name: value + 1 for name, value in to_numpy(layer).items()})
    x, weight, direction = (rng.normal(size=(3, 2, 2, 2)) for _ in range(3))
    weight, along = Tensor(weight), Tensor(direction)

    def loss(x):
        return (ops.square(layer(x)) * weight).sum()

    gradient = ms.grad(ms.jit(loss))

    def slope(x):
        return (gradient(x) * along).sum()

    step = 1e-6 * direction
    expected = (gradient(Tensor(x + step)) - gradient(Tensor(x - step))) / 2e-6
    np.testing.assert_allclose(ms.grad(slope)(Tensor(x)).asnumpy(), expected.asnumpy(), atol=1e-7)


@pytest.mark.parametrize("kind", [RBN, IEBN, BNET])
@pytest.mark.parametrize("of", ["input", "parameters"])
def test_gradients_of_gradients_are_refused_in_pynative(kind, of) -> None:
    layer = training(kind(2))
    x = images(3, 2, 2, 2)
    weights = list(layer.trainable_params()) if of == "parameters" else None

    def loss(x):
        return ops.square(layer(x)).sum()

    def slope(x):
        gradient = ms.grad(loss, None, weights)(x) if weights else (ms.grad(loss)(x),)
        return sum(ops.square(part).sum() for part in gradient)

    with pytest.raises(RBNError, match=r"the gradient of a gradient(.|\n)*ms\.jit"):
        ms.grad(slope)(x)
    assert np.isfinite(ms.grad(loss)(x).asnumpy()).all()


def test_an_exception_inside_a_gradient_leaves_the_next_first_gradient_alone() -> None:
    layer, x = training(RBN(3)), images()

    def raises(x):
        raise RuntimeError("out of order")

    def loss(x):
        return ops.square(layer(x)).sum()

    expected = ms.grad(loss)(x)
    try:
        with pytest.raises(RuntimeError, match="out of order"):
            ms.grad(raises)(x)
        assert _pynative_executor.grad_flag()  # MindSpore goes on recording
        assert_close(ms.grad(loss)(x), expected)
    finally:
        _pynative_executor.clear_res()


def test_the_input_is_not_changed(mode) -> None:
    x = images()
    before = x.asnumpy().copy()
    training(RBN(3))(x)
    np.testing.assert_array_equal(x.asnumpy(), before)


def test_an_optimizer_gets_the_parameters_and_none_of_the_statistics() -> None:
    names = [parameter.name for parameter in RBN(3).trainable_params()]
    assert names == ["gamma", "beta", "center_weight", "scale_weight", "scale_bias"]


def test_affine_false_freezes_gamma_and_beta_as_in_batch_norm() -> None:
    frozen = [p.name for p in RBN(3, affine=False).get_parameters() if not p.requires_grad]
    assert {"gamma", "beta"} < set(frozen)
    assert_close(RBN(3, affine=False, gamma_init=2.0).gamma, Tensor([2.0] * 3))


@pytest.mark.parametrize(
    ("x", "error"),
    [
        (ops.ones((2, 3, 4, 4), ms.int32), RBNTypeError),
        (ops.ones((2, 4, 4, 4)), RBNValueError),
        (ops.ones((1, 3, 1, 1)), RBNValueError),
        (Tensor(np.zeros((0, 3, 4, 4), np.float32)), RBNValueError),
    ],
    ids=["integers", "channels", "one value", "empty"],
)
def test_a_refused_input_is_the_same_error_in_both_modes(mode, x, error) -> None:
    layer = training(RBN(3))
    before = to_numpy(layer)
    with pytest.raises(error, match="RBN: expected"):
        layer(x)
    assert_same_state(layer, before)


def test_an_empty_batch_is_evaluated(mode) -> None:
    x = Tensor(np.zeros((0, 3, 4, 4), np.float32))
    assert RBN(3)(x).asnumpy().shape == (0, 3, 4, 4)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"use_batch_statistics": 1}, RBNTypeError),
        ({"data_format": "NCL"}, RBNValueError),
        ({"data_format": 4}, RBNTypeError),
    ],
)
def test_options_of_mindspore_are_checked_like_the_others(options, error) -> None:
    with pytest.raises(error, match=f"RBN: expected {next(iter(options))} to be one of"):
        RBN(3, **options)


def test_checkpoint_and_deepcopy_survive(tmp_path) -> None:
    layer, other = training(RBN(3)), RBN(3)
    layer(images())
    ms.save_checkpoint(layer, str(tmp_path / "layer.ckpt"))
    ms.load_param_into_net(other, ms.load_checkpoint(str(tmp_path / "layer.ckpt")), strict_load=True)
    assert_same_state(other, to_numpy(layer))
    twin = copy.deepcopy(layer)
    twin(images())
    assert twin.num_batches_tracked == 2
    assert layer.num_batches_tracked == 1


def test_printing_shows_every_option() -> None:
    shown = repr(nn.SequentialCell(RBN(3, centering="channel_std")))
    for option in (
        "num_features=3",
        "eps=1e-05",
        "centering='channel_std'",
        "data_format='NCHW'",
        "affine=True",
    ):
        assert option in shown
    assert "kernel_size=5, spatial_dims=1" in repr(BNET(3, 5, spatial_dims=1))
    assert "centering" not in repr(IEBN(3))


def test_frozen_parameters_get_no_gradient() -> None:
    layer = RBN(3)
    layer.center_weight.requires_grad = False
    assert "center_weight" not in [p.name for p in layer.trainable_params()]


def test_a_training_step_moves_every_parameter_and_lowers_the_loss() -> None:
    layer, x = training(RBN(3)), images(mean=1.0)
    target = Tensor(rng.normal(size=x.shape).astype(np.float32))
    optimizer = nn.SGD(layer.trainable_params(), learning_rate=0.1)
    before = to_numpy(layer)
    step = ms.value_and_grad(lambda x: ((layer(x) - target) ** 2).mean(), None, optimizer.parameters)
    losses = []
    for _ in range(3):
        loss, gradients = step(x)
        optimizer(gradients)
        losses.append(float(loss.asnumpy()))
    assert losses[2] < losses[1] < losses[0]
    for name, value in to_numpy(layer).items():
        assert not np.array_equal(value, before[name]), name


def test_the_layer_can_be_used_twice_in_one_step(mode) -> None:
    layer = RBN(3)
    training(Twice(layer))(images())
    assert layer.num_batches_tracked == 2


def test_the_layer_without_calibrations_is_batch_norm() -> None:
    layer, norm = RBN(3, centering=None, scaling=None), nn.BatchNorm2d(3)
    kept = {"gamma", "beta", "running_mean", "running_var", "num_batches_tracked"}
    assert to_numpy(layer).keys() == kept
    x = images()
    assert_close(training(layer)(x), training(norm)(x))
    assert_close(layer.set_train(False)(x), norm.set_train(False)(x))


def test_a_state_that_does_not_fit_lists_every_fault_and_changes_nothing() -> None:
    layer = RBN(3)
    before = to_numpy(layer)
    state = {name: value + 1 for name, value in before.items() if name != "beta"}
    state |= {"gamma": np.ones(4), "surprise": np.ones(3)}
    with pytest.raises(RBNValueError, match="missing beta; unexpected surprise; gamma of shape"):
        from_numpy(layer, state)
    assert_same_state(layer, before)


def test_to_numpy_gives_copies() -> None:
    layer = RBN(3)
    to_numpy(layer)["gamma"][:] = 7
    assert_close(layer.gamma, Tensor([1.0] * 3), 0)


def test_from_numpy_keeps_the_dtype_and_a_copy() -> None:
    layer = RBN(3, dtype=ms.float16)
    state = {name: value + 1 for name, value in to_numpy(layer).items()}
    from_numpy(layer, state)
    state["gamma"][:] = 7
    assert layer.gamma.dtype == ms.float16
    assert layer.num_batches_tracked.dtype == ms.int32
    assert_close(layer.gamma.astype(ms.float32), Tensor([2.0] * 3), 0)


@pytest.mark.parametrize("layer", [IEBN(3), BNET(3)], ids=["IEBN", "BNET"])
def test_a_batch_norm_checkpoint_loads_into_the_relatives(layer, tmp_path) -> None:
    norm = training(nn.BatchNorm2d(3))
    norm(images(mean=2.0))
    ms.save_checkpoint(nn.SequentialCell(norm), str(tmp_path / "norm.ckpt"))
    ms.load_param_into_net(nn.SequentialCell(layer), ms.load_checkpoint(str(tmp_path / "norm.ckpt")))
    assert_close(layer.moving_mean, norm.moving_mean, 0)
    assert_close(layer.moving_variance, norm.moving_variance, 0)


def test_a_fresh_iebn_is_batch_norm_times_one_constant(mode) -> None:
    layer, x = training(IEBN(3)), images()
    np.testing.assert_array_equal(layer.scale_weight.asnumpy(), np.zeros(3))
    np.testing.assert_array_equal(layer.scale_bias.asnumpy(), -np.ones(3))
    assert_close(layer(x), training(nn.BatchNorm2d(3))(x) * ops.sigmoid(Tensor(-1.0)))


def test_bnet_starts_as_the_convolution_of_mindspore() -> None:
    channels = 512
    layer = BNET(channels)
    own = nn.Conv2d(channels, channels, 3, pad_mode="pad", padding=1, group=channels, has_bias=True)
    for ours, theirs in ((layer.conv.weight, own.weight), (layer.conv.bias, own.bias)):
        np.testing.assert_allclose(np.abs(ours.asnumpy()).max(), np.abs(theirs.asnumpy()).max(), rtol=0.02)
        np.testing.assert_allclose(ours.asnumpy().std(), theirs.asnumpy().std(), rtol=0.1)
    assert [p.name for p in layer.trainable_params()] == ["conv.weight", "conv.bias"]


@pytest.mark.parametrize("kernel_size", [3, 5])
@pytest.mark.parametrize("shape", [(4, 3, 5), (4, 3, 5, 5), (2, 3, 2, 4, 3)])
def test_bnet_in_the_place_of_a_batch_norm_equals_it(shape, kernel_size) -> None:
    kinds = {3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
    kind = nn.BatchNorm3d if len(shape) == 5 else nn.BatchNorm2d  # nn.BatchNorm1d trains on no spatial axis
    norm = training(kind(3, eps=0.1, momentum=0.7, gamma_init="normal", beta_init="normal"))
    x = images(*shape, mean=2.0)
    alike = x.reshape((4, 3, 5, 1)) if len(shape) == 3 else x
    norm(alike)
    model = training(nn.SequentialCell(kinds[len(shape)](3, eps=0.1, momentum=0.7)))
    from_numpy(model[0], to_numpy(norm))
    convert(model, "bnet", preserve=True, kernel_size=kernel_size)
    layer = model[0]
    assert layer.training
    assert_close(layer(x), norm(alike).reshape(shape))
    assert_close(layer.moving_variance, getattr(norm, "bn2d", norm).moving_variance)
    assert_close(layer.set_train(False)(x), norm.set_train(False)(alike).reshape(shape))


def test_bnet_in_the_place_of_a_batch_norm_learns_apart_from_it() -> None:
    norm, x = nn.BatchNorm2d(3), images()
    model = training(nn.SequentialCell(norm))
    convert(model, "bnet", preserve=True)
    layer = model[0]
    before = norm.beta.asnumpy().copy()
    optimizer = nn.SGD(layer.trainable_params(), learning_rate=0.1)
    _, gradients = ms.value_and_grad(lambda x: (layer(x) ** 3).sum(), None, optimizer.parameters)(x)
    optimizer(gradients)
    assert np.abs(layer.conv.weight.asnumpy()[:, 0, 0, 0]).min() > 0
    assert np.abs(layer.conv.bias.asnumpy() - before).min() > 0
    np.testing.assert_array_equal(norm.beta.asnumpy(), before)


@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 3, 5, 4), (2, 3, 4, 3, 2)])
@pytest.mark.parametrize("kernel_size", [3, 5])
def test_the_convolution_of_the_refused_dtypes_is_that_of_the_others(mode, shape, kernel_size) -> None:
    layer = training(BNET(3, kernel_size, spatial_dims=len(shape) - 2))
    state, x = to_numpy(layer), images(*shape)
    expected = layer(x)
    for dtype, tolerance in ((ms.float64, 1e-5), (ms.bfloat16, 2e-2)):
        other = training(BNET(3, kernel_size, dtype=dtype, spatial_dims=len(shape) - 2))
        from_numpy(other, state)
        y = other(x.astype(dtype))
        assert y.dtype == dtype
        assert_close(y.astype(ms.float32), expected, tolerance)


@pytest.mark.parametrize("level", ["O2", "auto"])
@pytest.mark.parametrize("kind", [IEBN, BNET])
def test_mixed_precision_leaves_the_statistics_of_the_relatives_in_float32(mode, kind, level) -> None:
    layer = kind(3, momentum=0.0)
    network = training(ms.amp.auto_mixed_precision(Network(layer), level))
    x = images(8, 3, 8, 8, mean=100.0).astype(ms.float16).astype(ms.float32)
    network(x)
    np.testing.assert_allclose(layer.moving_mean.asnumpy(), x.asnumpy().mean((0, 2, 3)), rtol=1e-6)


def test_bnet_refuses_another_rank() -> None:
    with pytest.raises(RBNValueError, match="BNET: expected an input with 1 spatial axes"):
        BNET(3, spatial_dims=1)(images())


@pytest.mark.parametrize("kind", [IEBN, BNET])
def test_errors_name_the_layer(kind) -> None:
    with pytest.raises(RBNValueError, match=f"{kind.__name__}: expected data_format"):
        kind(3, data_format="NCL")
    with pytest.raises(RBNValueError, match=f"{kind.__name__}: expected 3 channels"):
        kind(3)(images(2, 4, 5, 5))
