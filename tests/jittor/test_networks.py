"""Networks in Jittor give what they give in NumPy."""

import dataclasses

import numpy as np
import pytest

from rbn.backends.jittor import RBN, Network, describe, from_numpy, network, to_numpy
from rbn.backends.jittor.weights import variables

# After the backend, which prepares what Jittor reads at its import.
# isort: split
import jittor as jt
from jittor import nn

from rbn_core import RBNError, architectures, networks
from rbn_core.architectures import ARCHITECTURES
from rbn_core.execution import initial_state, run
from rbn_core.networks import INPUT, Activation, Add, Concatenate, Convolution, Linear, Norm, Pooling, Split

NORMS = ("bn", "rbn", "iebn", "bnet")


def images(size, batch=2, dtype="float32"):
    return np.random.default_rng(7).normal(size=(batch, 3, size, size)).astype(dtype)


def trained_state(description, x, seed=0):
    """Weights with which no calibration is inert, and no signal vanishes or turns to chaos in evaluation."""
    rng = np.random.default_rng(seed)
    state = initial_state(description, seed)
    for name, value in state.items():
        if name.rpartition(".")[2] in ("center_weight", "scale_weight", "scale_bias", "gamma", "beta"):
            value += rng.normal(0, 0.1, value.shape).astype(np.float32)
        if name.endswith("conv_weight"):  # which starts at 0 in networks
            value += rng.normal(0, 1 / 3, value.shape).astype(np.float32)
        if name.endswith("bn3.gamma"):
            value *= 0.3  # a deep network of bottlenecks adds less in each than it hands on
    after = run(description, state, x, training=True)[1]
    for name in state:
        if name.endswith("running_mean"):
            state[name] = (after[name] / 0.1).astype(np.float32)  # the batch's own
        elif name.endswith("running_var"):
            var = (after[name] - 0.9) / 0.1
            state[name] = np.maximum(var, var.mean() / 2).astype(np.float32)
    return state


def assert_close(actual, expected, tolerance=1e-4):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max())


# ResNet-164 has the blocks of the others, over and over.
@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if "164" not in name])
def test_every_network_gives_numpys_logits(name):
    x = images(8 if name.startswith("cifar_") else 32, batch=8)
    built = network(name, num_classes=10)
    state = trained_state(built.description, x)
    from_numpy(built, state)
    expected, _ = run(built.description, state, x[:2])
    assert np.ptp(expected) > 0.1
    assert_close(built.eval()(jt.array(x[:2])).numpy(), expected)
    assert describe(built) == built.description.layers()


@pytest.mark.parametrize("norm", NORMS)
def test_every_normalization_gives_numpys_logits_and_statistics(norm):
    x = images(32, batch=8)
    described = architectures.network("resnet18", norm, 10)
    # Jittor's BatchNorm accumulates the biased variance, and counts no batches.
    nodes = (
        dataclasses.replace(node, options={"running_var": "biased"})
        if getattr(node, "layer", "") == "bn"
        else node
        for node in described.nodes
    )
    described = dataclasses.replace(described, nodes=tuple(nodes))
    built = Network(described)
    state = trained_state(described, x)
    from_numpy(built, state)
    assert_close(built.eval()(jt.array(x)).numpy(), run(described, state, x)[0])
    expected, after = run(described, state, x, training=True)
    assert_close(built.train()(jt.array(x)).numpy(), expected)
    moved = to_numpy(built)
    assert {name for name in after if not name.endswith("tracked")} <= moved.keys() <= after.keys()
    for name, value in moved.items():
        assert_close(value, after[name])


def every_node():
    """A network of all nodes and their options."""
    return networks.Network(
        "all",
        (
            Convolution("stem.conv", (INPUT,), 3, 8, 3, 2, 1, bias=True),
            Norm("stem.bn", ("stem.conv",), 8),
            Activation("relu", ("stem.bn",)),
            Pooling("max", ("relu",), "max", 3, 2, 1),
            Split("left", ("max",), 0, 4),
            Split("right", ("max",), 4, 8),
            Convolution("depthwise.0", ("left",), 4, 4, 3, 1, 1, groups=4),
            Activation("relu6", ("depthwise.0",), 0.5),
            Convolution("grouped.0", ("right",), 4, 4, 1, groups=2),
            Add("sum", ("relu6", "grouped.0", "left")),
            Concatenate("both", ("sum", "right")),
            Pooling("average", ("both",), "average", 5, 2, 2),
            Pooling("plane", ("average",), "average"),
            Linear("fc", ("plane",), 8, 5),
        ),
    )


def test_gradients_are_the_slopes_of_numpys_results():
    description = every_node()
    x = images(12, batch=4, dtype="float64")
    rng = np.random.default_rng(1)
    state = trained_state(description, x)
    state |= {name: value.astype("float64") for name, value in state.items() if value.dtype.kind == "f"}
    built = Network(description)
    built.float64()
    from_numpy(built, state)
    y = built(jt.array(x, dtype="float64"))
    assert y.dtype == "float64"
    cotangent = rng.normal(size=y.shape)
    trained = {name: var for name, var in variables(built).items() if not var.is_stop_grad()}
    found = jt.grad((y * jt.array(cotangent, dtype="float64")).sum(), list(trained.values()))
    gradients = {name: var.numpy() for name, var in zip(trained, found, strict=True)}
    along = {name: rng.normal(size=value.shape) for name, value in gradients.items()}

    def value(step):
        moved = {name: state[name] + step * along[name] for name in along}
        return np.sum(run(description, state | moved, x, training=True)[0] * cotangent)

    slope = sum(np.sum(gradients[name] * along[name]) for name in along)
    np.testing.assert_allclose(slope, (value(1e-6) - value(-1e-6)) / 2e-6, rtol=1e-5)
    # What a normalization follows has no gradient with respect to its bias.
    idle = {name for name, value in gradients.items() if np.abs(value).max() < 1e-6}
    assert idle <= {"stem.conv.bias"}


def test_an_average_counts_the_padding_and_a_maximum_does_not():
    below = -1 - np.abs(images(6, dtype="float32"))
    for kind, size in (("max", 3), ("average", 3), ("average", 7)):
        node = Pooling("pool", (INPUT,), kind, size, 2, size // 2)
        description = networks.Network("pool", (node,))
        expected, _ = run(description, {}, below)
        assert_close(Network(description)(jt.array(below)).numpy(), expected, 1e-6)


def test_names_are_torchvisions():
    names = set(network("mobilenet_v2").state_dict())
    assert {"features.1.conv.0.1.weight", "features.18.1.running_mean", "classifier.1.bias"} <= names
    names = set(network("resnet18", "bnet").state_dict())
    assert {
        "conv1.weight",
        "layer1.0.bn2.conv.bias",
        "layer2.0.downsample.1.running_var",
        "fc.weight",
    } <= names


def test_weights_start_as_described():
    jt.set_global_seed(3)
    state = to_numpy(network("resnet18", "rbn"))
    for name, value in initial_state(architectures.network("resnet18", "rbn"), 0).items():
        assert state[name].shape == value.shape
        assert state[name].dtype == value.dtype or name.endswith("tracked")
        if value.ndim > 1 or name == "fc.bias":
            np.testing.assert_allclose(state[name].std(), value.std(), rtol=0.1)
            np.testing.assert_allclose(np.abs(state[name]).max(), np.abs(value).max(), rtol=0.4)
            assert abs(state[name].mean()) < 0.2 * value.std()
        else:
            np.testing.assert_array_equal(state[name], value)
    described = networks.Network("biased", (Convolution("conv", (INPUT,), 3, 4, 3, bias=True),))
    np.testing.assert_array_equal(to_numpy(Network(described))["conv.bias"], np.zeros(4))


def test_weights_differ_with_the_seed_alone():
    def draw(seed):
        jt.set_global_seed(seed)
        return to_numpy(network("cifar_resnet164_basic"))["layer2.3.conv1.weight"]

    np.testing.assert_array_equal(draw(5), draw(5))
    assert (draw(5) != draw(6)).all()


def test_options_reach_the_layers():
    options = {
        "layer": "rbn",
        "stages": (1,),
        "scaling": None,
        "momentum": 0.7,
        "eps": 0.1,
        "restrict": "hard_sigmoid",
    }
    built = network("resnet18", options)
    layer = built.layer1._modules["0"].bn1
    assert isinstance(layer, RBN)
    assert (layer.scaling, layer.epsilon, layer.restrict) == (None, 0.1, "hard_sigmoid")
    assert layer.momentum == pytest.approx(0.3)
    assert type(built.bn1) is nn.BatchNorm
    assert describe(built)["layer1.0.bn1"]["restrict"] == "hard_sigmoid"
    plain = network(
        "resnet18", {"layer": "bn", "momentum": 0.5, "eps": 0.2, "gamma": False, "beta": False}
    ).bn1
    assert (plain.momentum, plain.eps, plain.affine) == (0.5, 0.2, False)
    cumulative = network("cifar_resnet164_basic", {"layer": "bnet", "kernel_size": 5, "momentum": None})
    layer = cumulative.layer1._modules["0"].bn2
    assert (layer.conv.kernel_size, layer.momentum) == ((5, 5), None)


@pytest.mark.parametrize(
    ("norm", "message"),
    [
        ({"layer": "bn", "momentum": None}, "expected a momentum, and running_var 'biased', of Jittor's own"),
        ({"layer": "bn", "running_var": "unbiased"}, "expected a momentum, and running_var 'biased'"),
        ({"layer": "rbn", "beta": False}, "RBN: expected beta=True beside gamma=True, as the layers of"),
        ({"layer": "iebn", "track_running_stats": False}, "IEBN: expected track_running_stats=True"),
        ("ln", "expected norm to be one of"),
    ],
)
def test_what_jittor_lacks_is_refused(norm, message):
    with pytest.raises(RBNError, match=message):
        network("resnet18", norm)


def test_a_layer_put_in_place_of_another_is_run():
    built = Network(every_node()).eval()
    x = jt.array(images(12))
    before = built(x).numpy()
    setattr(built.grouped, "0", nn.Identity())
    assert np.abs(built(x).numpy() - before).max() > 1e-3


def test_a_node_of_another_kind_is_refused():
    class Mystery(networks.Node):
        op = "mystery"

    with pytest.raises(NotImplementedError, match="mystery"):
        Network(networks.Network("x", (Mystery("m", (INPUT,)),)))(jt.zeros((1, 3, 4, 4)))
