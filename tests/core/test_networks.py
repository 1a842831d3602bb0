"""The networks of the papers, as data and in NumPy."""

import numpy as np
import pytest

from rbn_core import RBNError, RBNTypeError, RBNValueError
from rbn_core.architectures import ARCHITECTURES, network, told_norm
from rbn_core.execution import initial_state, run
from rbn_core.networks import INPUT, Add, Convolution, Network, Norm, Pooling, Split

PUBLISHED = {
    "resnet18": (11_689_512, 1.81),
    "resnet34": (21_797_672, 3.66),
    "resnet50": (25_557_032, 4.09),
    "resnet101": (44_549_160, 7.80),
    "resnext50_32x4d": (25_028_904, 4.23),
    "res2net50_26w_4s": (25_699_120, 4.26),
    "mobilenet_v2": (3_504_872, 0.30),
    "cifar_resnet50": (23_520_842, 1.30),
    "cifar_resnext29_8x64d": (34_426_698, 5.39),
    "cifar_resnet20": (272_474, 0.04),
    "cifar_resnet164": (1_704_154, 0.25),
    "cifar_resnet164_basic": (2_605_658, 0.38),
}
"""Parameters, and 1e9 multiply-adds for one image of 224 (CIFAR: 32) pixels: as torchvision documents the
first five and MobileNet; 25.70 M in Res2Net's, 34.4 M in ResNeXt's, 0.27 M and 1.7 M in ResNet's paper."""


def test_every_network_has_its_published_size():
    assert PUBLISHED.keys() == ARCHITECTURES.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_multiply_adds_are_as_published(name):
    described = network(name)
    size = 32 if name.startswith("cifar_") else 224
    assert (described.parameter_count(), round(described.multiply_adds(size) / 1e9, 2)) == PUBLISHED[name]


def test_each_layer_adds_its_own_parameters():
    plain = network("resnet50").parameter_count()
    channels = sum(node.channels for node in network("resnet50").nodes if isinstance(node, Norm))
    last = sum(node.channels for node in network("resnet50").nodes if node.name.endswith("bn3"))
    assert network("resnet50", "rbn").parameter_count() == plain + 3 * channels
    shortcuts = sum(n.channels for n in network("resnet50").nodes if n.name.endswith("downsample.1"))
    assert network("resnet50", "iebn").parameter_count() == plain + 2 * (channels - shortcuts)
    # The kernel and the bias of a depthwise convolution in place of gamma and beta.
    assert network("resnet50", "bnet").parameter_count() == plain + 8 * last
    assert network("resnet50", {"layer": "bnet", "kernel_size": 5}).parameter_count() == plain + 24 * last


def test_stages_choose_where_the_layer_goes():
    described = network("cifar_resnet50", {"layer": "rbn", "stages": (1, 4), "scaling": "channel_std"}, 100)
    for node in described.nodes:
        if isinstance(node, Norm):
            chosen = node.name.startswith(("layer1.", "layer4."))
            assert node.layer == ("rbn" if chosen else "bn"), node.name
            assert node.options == ({"scaling": "channel_std"} if chosen else {})
    assert described.nodes[-1].shape((2, 2048)) == (2, 100)


def test_iebn_leaves_shortcuts_plain_as_its_code_does():
    plain = {
        n.name for n in network("cifar_resnet164", "iebn").nodes if isinstance(n, Norm) and n.layer == "bn"
    }
    assert plain == {f"layer{stage}.0.downsample.1" for stage in (1, 2, 3)}


def names_of(described, layer):
    return {node.name for node in described.nodes if isinstance(node, Norm) and node.layer == layer}


def test_places_choose_where_the_layer_goes():
    everywhere = names_of(network("resnet50"), "bn")
    assert names_of(network("resnet50", "rbn"), "rbn") == everywhere
    for name, chosen in {
        "stem": ("bn1",),
        "inner": ("0.bn1", "0.bn2"),
        "last": ("0.bn3",),
        "shortcut": ("0.downsample.1",),
    }.items():
        found = names_of(network("resnet50", {"layer": "bnet", "places": (name,), "stages": (0, 2)}), "bnet")
        first = {path for path in found if not path.startswith("layer2.") or path.startswith("layer2.0.")}
        assert first == {path if name == "stem" else f"layer2.{path}" for path in chosen}
    places = ["stem", "inner", "last", "shortcut"]
    assert names_of(network("resnet50", {"layer": "iebn", "places": places}), "iebn") == everywhere
    assert names_of(network("mobilenet_v2", {"layer": "rbn", "places": ("stem",)}), "rbn") == {
        "features.0.1",
        "features.18.1",
    }


@pytest.mark.parametrize(
    "norm",
    [
        {"layer": "iebn"},
        {"layer": "iebn", "places": ("stem", "inner", "last", "shortcut")},
        {"layer": "bnet", "kernel_size": 5},
        {"layer": "bnet", "places": ("inner", "last"), "stages": (1, 3)},
        {"layer": "rbn", "places": ("shortcut",)},
        {"layer": "rbn", "stages": (0,)},
    ],
    ids=str,
)
def test_the_choice_is_told_by_the_arrays(norm):
    state = initial_state(network("resnet50", norm))
    assert told_norm(network("resnet50"), state) == norm


def test_bnet_starts_at_zero_in_networks_and_not_in_backbones():
    """Each block starts as its shortcut."""
    described = network("resnet18", "bnet", 4)
    state = initial_state(described)
    assert not state["layer1.0.bn2.conv_weight"].any()
    assert not state["layer1.0.bn2.conv_bias"].any()
    assert initial_state(network("resnet18", "bnet", 0))["layer1.0.bn2.conv_weight"].any()
    images = np.random.default_rng(0).normal(size=(2, 3, 32, 32)).astype(np.float32)
    body = Network("x", tuple(n for n in described.nodes if n.name in ("conv1", "bn1", "relu", "maxpool")))
    stem = {name: value for name, value in state.items() if name in body.state_shapes()}
    first = Network("x", described.nodes[: 1 + [n.name for n in described.nodes].index("layer1.1.relu")])
    within = {name: value for name, value in state.items() if name in first.state_shapes()}
    np.testing.assert_array_equal(run(first, within, images)[0], run(body, stem, images)[0])


@pytest.mark.parametrize("name", ["resnet50", "cifar_resnet164", "mobilenet_v2"])
def test_a_backbone_has_no_classifier(name):
    backbone, whole = network(name, "rbn", 0), network(name, "rbn")
    classifier = {f"{whole.nodes[-1].name}.{array}" for array in ("weight", "bias")}
    assert backbone.state_shapes().keys() == whole.state_shapes().keys() - classifier
    shapes = backbone.shapes((2, 3, 64, 64))
    assert shapes[backbone.nodes[-1].name] == whole.shapes((2, 3, 64, 64))[whole.nodes[-2].inputs[0]]


def test_bnet_follows_the_last_convolution_of_each_block():
    for name, last in (("resnet101", "bn3"), ("resnet18", "bn2"), ("res2net50_26w_4s", "bn3")):
        for node in network(name, "bnet").nodes:
            if isinstance(node, Norm):
                assert (node.layer == "bnet") == node.name.endswith(last), node.name


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_names_are_torchvisions(name):
    names = network(name).state_shapes()
    if name == "mobilenet_v2":
        expected = ("features.0.0.weight", "features.1.conv.0.1.gamma", "features.1.conv.1.weight")
        expected += ("features.17.conv.3.running_var", "features.18.1.beta", "classifier.1.bias")
    else:
        expected = (
            "conv1.weight",
            "bn1.gamma",
            "layer1.0.conv1.weight",
            "layer2.0.downsample.1.beta",
            "fc.bias",
        )
    assert set(expected) <= names.keys()


@pytest.mark.parametrize("norm", ["bn", {"layer": "bnet", "kernel_size": 5}, {"layer": "rbn", "stages": [0]}])
def test_a_description_survives_as_text(norm):
    described = network("resnet18", norm, 7)
    assert Network.from_json(described.to_json()) == described
    assert hash(described)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"name": "x", "in_channels": 3, "nodes": [{"op": "exec"}]}', "[" * 100_000, "null"],
)
def test_a_damaged_description_is_one_clear_error(text):
    with pytest.raises(RBNValueError, match="expected a network's description"):
        Network.from_json(text)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("resnet51",), RBNValueError, "expected name to be one of 'resnet18'"),
        (("resnet50", "ln"), RBNValueError, "expected norm to be one of 'bn', 'rbn'"),
        (("resnet50", 3), RBNTypeError, "expected norm to be one of bn, rbn"),
        (("resnet50", {"scaling": None}), RBNTypeError, "a mapping with a 'layer'"),
        (("resnet50", {"layer": "rbn", "scale": None}), RBNTypeError, "expected options of rbn, got scale"),
        (("resnet50", {"layer": "rbn", "scaling": "mean"}), RBNValueError, "expected scaling to be one of"),
        (("resnet50", {"layer": "bnet", "kernel_size": 4}), RBNValueError, "expected an odd kernel_size"),
        (
            ("resnet50", {"layer": "rbn", "stages": [5]}),
            RBNValueError,
            "stages of resnet50, 0, 1, 2, 3, 4, got 5",
        ),
        (("resnet50", "rbn", -1), RBNValueError, "expected num_classes to be a positive integer, got -1"),
        (
            ("resnet50", "rbn", False),
            RBNTypeError,
            "expected num_classes to be a positive integer, got False",
        ),
        (
            ("resnet50", {"layer": "iebn", "places": ("first",)}),
            RBNValueError,
            "expected each of places to be one of 'stem', 'inner', 'last', 'shortcut', got 'first'",
        ),
    ],
)
def test_what_is_unknown_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        network(*arguments)
    assert issubclass(error, RBNError)


def test_nodes_come_in_the_order_in_which_they_run():
    with pytest.raises(RBNValueError, match=r"expected 'a' to take what comes before it, got b"):
        Network("x", (Add("a", (INPUT, "b")), Add("b", (INPUT,))))
    with pytest.raises(RBNValueError, match="expected names that differ, got 'a' twice"):
        Network("x", (Add("a", (INPUT,)), Add("a", (INPUT,))))


def test_a_result_is_let_go_after_its_last_use():
    steps = {node.name: unneeded for node, unneeded in network("resnet18").steps()}
    assert steps["layer1.0.conv1"] == ()
    assert steps["layer1.0.add"] == ("layer1.0.bn2", "maxpool")


def literal_convolution(node, x, weight):
    """The sum of the docstring, number by number."""
    x = np.pad(x, ((0, 0), (0, 0), (node.padding,) * 2, (node.padding,) * 2))
    _, outputs, height, width = node.shape((*x.shape[:2], *(np.array(x.shape[2:]) - 2 * node.padding)))
    y = np.zeros((len(x), outputs, height, width))
    share_in, share_out = node.in_channels // node.groups, outputs // node.groups
    for n, o, i, j in np.ndindex(y.shape):
        first = o // share_out * share_in
        i, j = i * node.stride, j * node.stride
        patch = x[n, first : first + share_in, i : i + node.kernel_size, j : j + node.kernel_size]
        y[n, o, i // node.stride, j // node.stride] = np.sum(patch * weight[o])
    return y


@pytest.mark.parametrize(
    "node",
    [
        Convolution("c", (INPUT,), 4, 6, 3, stride=2, padding=1),
        Convolution("c", (INPUT,), 4, 6, 1),
        Convolution("c", (INPUT,), 4, 6, 3, padding=1, groups=2),
        Convolution("c", (INPUT,), 4, 4, 3, groups=4),
    ],
)
def test_the_convolution_is_the_sum(node):
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(2, 4, 5, 6)), rng.normal(size=node.state_shapes()["weight"])
    y, _ = run(Network("x", (node,), 4), {"c.weight": weight}, x)
    np.testing.assert_allclose(y, literal_convolution(node, x, weight), rtol=0, atol=1e-13)
    assert y.shape == node.shape(x.shape)


def test_pooling_takes_the_maximum_without_the_padding_and_averages_with_it():
    x = -np.ones((1, 1, 3, 3))
    maximum, _ = run(Network("x", (Pooling("p", (INPUT,), "max", 3, 2, 1),), 1), {}, x)
    np.testing.assert_array_equal(maximum, -np.ones((1, 1, 2, 2)))
    average, _ = run(Network("x", (Pooling("p", (INPUT,), "average", 3, 2, 1),), 1), {}, x)
    np.testing.assert_allclose(average, np.full((1, 1, 2, 2), -4 / 9))


def test_split_takes_channels():
    x = np.arange(4.0).reshape(1, 4, 1, 1)
    y, _ = run(Network("x", (Split("s", (INPUT,), 1, 3),), 4), {}, x)
    np.testing.assert_array_equal(y.ravel(), [1, 2])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_network_runs_in_training_and_evaluation(name):
    described = network(name, "rbn")
    state = initial_state(described)
    rng = np.random.default_rng(0)
    images = rng.normal(size=(2, 3, 32, 32)).astype(np.float32)
    trained, after = run(described, state, images, training=True)
    evaluated, same = run(described, state, images)
    assert trained.shape == evaluated.shape == described.shapes(images.shape)[described.nodes[-1].name]
    assert trained.dtype == np.float32
    assert all(np.array_equal(same[key], state[key]) for key in state)
    assert (
        after["bn1.num_batches_tracked" if "bn1.gamma" in after else "features.0.1.num_batches_tracked"] == 1
    )


def test_weights_start_as_he_et_al_start_them():
    state = initial_state(network("resnet18", "rbn"), seed=3)
    kernel = state["layer2.0.conv2.weight"]
    assert np.std(kernel) == pytest.approx(np.sqrt(2 / (128 * 9)), rel=0.02)
    assert np.mean(kernel) == pytest.approx(0, abs=1e-3)
    assert np.max(np.abs(state["fc.weight"])) == pytest.approx(512**-0.5, rel=1e-3)
    assert {state[f"bn1.{name}"].mean() for name in ("gamma", "scale_bias", "running_var")} == {1.0}
    assert {state[f"bn1.{name}"].mean() for name in ("beta", "center_weight", "scale_weight")} == {0.0}
    assert state["fc.weight"].dtype == np.float32
    assert state["bn1.num_batches_tracked"].dtype == np.int64
    again = initial_state(network("resnet18", "rbn"), seed=3)
    assert all(np.array_equal(again[name], state[name]) for name in state)
