"""Networks of the papers in MindSpore, held to NumPy's run of the same description."""

import os

os.environ.setdefault("GLOG_v", "4")

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

from rbn.backends.mindspore import RBN, Network, describe, from_numpy, network, to_numpy
from rbn_core import RBNValueError, networks
from rbn_core.architectures import ARCHITECTURES
from rbn_core.execution import initial_state, run
from rbn_core.networks import INPUT, Activation, Add, Concatenate, Convolution, Norm, Pooling, Split

NORMS = ["bn", "rbn", "iebn", "bnet"]


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # MindSpore writes refused graphs into the working folder


def lively_state(description, seed):
    """A state whose calibrations, statistics and depthwise convolutions all show in the result."""
    rng = np.random.default_rng(seed)
    state = initial_state(description, seed)
    for name, array in state.items():
        if array.ndim == 1:
            array += (0.2 * rng.random(array.shape)).astype(array.dtype)
        elif name.endswith("conv_weight"):  # which starts at 0 in networks
            array += rng.normal(0, 1 / 3, array.shape).astype(array.dtype)
        elif array.ndim == 4 and array.shape[1] == 1:
            array *= np.sqrt(len(array))  # the fan-out of a depthwise convolution is that of one channel
    return state


def images(size, batch=2, seed=0):
    return np.random.default_rng(seed).normal(size=(batch, 3, size, size)).astype(np.float32)


def difference(a, b):
    return np.max(np.abs(a - b)) / np.max(np.abs(b))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_network_gives_what_numpy_gives(name):
    model = network(name)
    assert {key: value.shape for key, value in to_numpy(model).items()} == {
        key: shape
        for key, shape in model.description.state_shapes().items()
        if not key.endswith("num_batches_tracked")  # MindSpore's BatchNorm does not count
    }
    state = lively_state(model.description, 1)
    from_numpy(model, state)
    x = images(8 if name.startswith("cifar_") else 32)  # whose strides multiply to 4 or 8, and to 32
    expected, _ = run(model.description, state, x)
    assert np.std(expected) > 1e-3  # more than the classifier's bias
    assert difference(model(Tensor(x)).asnumpy(), expected) < 1e-4


@pytest.mark.parametrize("norm", [*NORMS, {"layer": "rbn", "momentum": 0.3, "eps": 1e-3, "stages": [0, 4]}])
def test_training_gives_what_numpy_gives_with_every_layer(norm):
    model = network("resnet18", norm, 7).set_train()
    state = lively_state(model.description, 2)
    from_numpy(model, state)
    x = images(32, 4)
    expected, after = run(model.description, state, x, training=True)
    assert difference(model(Tensor(x)).asnumpy(), expected) < 1e-4
    for name, array in to_numpy(model).items():
        if "running" in name or "tracked" in name:
            assert difference(array, after[name]) < 1e-4, name
    assert describe(model) == model.description.layers()


def every_operation():
    """A small network of all operations."""
    nodes = (
        Convolution("stem.conv", (INPUT,), 3, 8, 3, 2, 1, bias=True),
        Norm("stem.norm", ("stem.conv",), 8, "rbn"),
        Activation("relu6", ("stem.norm",), 6.0),
        Split("first", ("relu6",), 0, 4),
        Split("second", ("relu6",), 4, 8),
        Convolution("0", ("first",), 4, 4, 3, 1, 1, 4),
        Pooling("max", ("second",), "max", 3, 1, 1),
        Pooling("mean", ("second",), "average", 3, 1, 1),
        Add("sum", ("max", "mean", "second")),
        Concatenate("join", ("0", "sum", "first")),
        Pooling("out", ("join",), "max"),
    )
    return networks.Network("every", nodes)


@pytest.mark.parametrize("mode", [ms.PYNATIVE_MODE, ms.GRAPH_MODE], ids=["pynative", "graph"])
def test_every_operation_gives_what_numpy_gives(mode):
    model = Network(every_operation())
    state = {name: value + 0.1 for name, value in lively_state(model.description, 4).items()}
    state["stem.norm.num_batches_tracked"] = np.array(3)
    from_numpy(model, state)
    x = images(9)
    ms.set_context(mode=mode)
    try:
        result = model(Tensor(10 * x)).asnumpy()
    finally:
        ms.set_context(mode=ms.PYNATIVE_MODE)
    assert difference(result, run(model.description, state, 10 * x)[0]) < 1e-5


def test_a_compiled_network_gives_the_same():
    model = network("resnet18", {"layer": "rbn", "stages": [1]}, 5)
    state = lively_state(model.description, 3)
    from_numpy(model, state)
    compiled, x = ms.jit(model), images(32)
    assert difference(compiled(Tensor(x)).asnumpy(), run(model.description, state, x)[0]) < 1e-4
    other = lively_state(model.description, 4)
    from_numpy(model, other)  # after it was compiled
    assert difference(compiled(Tensor(x)).asnumpy(), run(model.description, other, x)[0]) < 1e-4


def test_a_compiled_step_has_the_same_gradients_and_statistics():
    results = []
    for compiled in (False, True):
        model = Network(every_operation()).set_train()
        from_numpy(model, lively_state(model.description, 3))
        weights = model.trainable_params()

        def loss(x):
            return (model(x) ** 2).mean()  # noqa: B023 - called in this turn

        step = ms.value_and_grad(loss, None, weights)
        value, gradients = (ms.jit(step) if compiled else step)(Tensor(images(9)))
        results.append([value, *gradients, *model.get_parameters()])
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a.asnumpy(), b.asnumpy(), rtol=1e-4, atol=1e-5)


def test_a_result_is_let_go_after_its_last_use():
    assert network("resnet18").room == 2  # what a block computes, and its shortcut


def test_parameters_are_called_as_torchvision_calls_them():
    names = [parameter.name for parameter in network("resnet18").get_parameters()]
    assert {"conv1.weight", "bn1.gamma", "layer1.0.bn1.moving_mean", "layer2.0.downsample.0.weight"} < set(
        names
    )
    assert len(names) == len(set(names)) == 102
    names = [parameter.name for parameter in network("mobilenet_v2").get_parameters()]
    assert {"features.0.0.weight", "features.1.conv.0.1.beta", "classifier.1.bias"} < set(names)


def test_weights_start_as_he_et_al_start_them():
    ms.set_seed(0)
    model = network("resnet18", "rbn")
    state = to_numpy(model)
    kernel = state["layer2.0.conv2.weight"]
    assert kernel.std() == pytest.approx((2 / (128 * 9)) ** 0.5, rel=0.02)
    assert kernel.mean() == pytest.approx(0, abs=1e-3)
    for name in ("fc.weight", "fc.bias"):
        assert np.abs(state[name]).max() == pytest.approx(512**-0.5, rel=0.02)
    for name in model.description.layers():
        if "bn" in name:
            for own, start in {
                "gamma": 1,
                "beta": 0,
                "running_var": 1,
                "scale_weight": 0,
                "scale_bias": 1,
            }.items():
                assert np.all(state[f"{name}.{own}"] == start)
    other = to_numpy(network("resnet18", "rbn"))
    assert not np.array_equal(kernel, other["layer2.0.conv2.weight"])


def test_options_reach_the_layers():
    model = network("cifar_resnet50", {"layer": "rbn", "scaling": "channel_std", "restrict": "hard_sigmoid"})
    layer = model.get_sub_cell("layer4.2.bn3")
    assert isinstance(layer, RBN)
    assert (layer.scaling, layer.restrict) == ("channel_std", "hard_sigmoid")
    norm = network("resnet18", {"layer": "bn", "momentum": 0.7, "eps": 0.1}).get_sub_cell("bn1")
    assert isinstance(norm, nn.BatchNorm2d)
    assert (norm.eps, norm.momentum) == (0.1, pytest.approx(0.3))  # MindSpore keeps the new value's weight


@pytest.mark.parametrize(
    ("norm", "message"),
    [
        ({"layer": "rbn", "gamma": False}, "RBN: expected gamma=True, as the layers of MindSpore have it"),
        ({"layer": "bnet", "track_running_stats": False}, "BNET: expected track_running_stats=True, as the"),
        (
            {"layer": "iebn", "restrict": "hard_sigmoid"},
            "IEBN: expected restrict to be one of 'sigmoid', got",
        ),
        ({"layer": "bn", "running_var": "biased"}, "of MindSpore's own BatchNorm, got .*biased"),
        ({"layer": "bn", "momentum": None}, "expected a momentum"),
    ],
)
def test_options_that_mindspore_lacks_are_refused(norm, message):
    with pytest.raises(RBNValueError, match=message):
        network("resnet18", norm)
