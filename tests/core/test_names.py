"""Names and layouts of the four frameworks, without any of them."""

import numpy as np
import pytest

from rbn_core.architectures import network
from rbn_core.execution import initial_state
from rbn_core.names import (
    KINDS,
    NAMES,
    PARAMETERS,
    RUNNING_STATISTICS,
    from_layout,
    from_own,
    to_layout,
    to_own,
)


def test_the_table_of_names_is_complete_in_every_framework():
    for framework, names in NAMES.items():
        assert tuple(names) == PARAMETERS + RUNNING_STATISTICS, framework
        assert len(set(names.values())) == len(names), framework


@pytest.mark.parametrize("framework", NAMES)
@pytest.mark.parametrize("norm", ["bn", "rbn", "iebn", {"layer": "bnet", "kernel_size": 5}])
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_a_networks_state_returns_from_every_frameworks_names(framework, norm, name):
    described = network(name, norm)
    state = initial_state(described)
    kinds = {path: layer["kind"] for path, layer in described.layers().items()}
    own = to_own(framework, state, kinds)
    for told in (kinds, None):  # what is said, and what the names and ranks tell
        back, found = from_own(framework, own, told)
        assert found == kinds
        assert back.keys() == state.keys()
        assert all(np.array_equal(back[key], state[key]) for key in state)


def test_own_names():
    described = network("resnet18", "bnet")
    kinds = {path: layer["kind"] for path, layer in described.layers().items()}
    own = {framework: to_own(framework, initial_state(described), kinds) for framework in NAMES}
    assert own["torch"].keys() == own["jittor"].keys()
    assert {"layer1.0.bn2.conv.weight", "bn1.running_var", "fc.bias"} <= own["torch"].keys()
    assert {"layer1.0.bn2.conv.weight", "bn1.moving_variance", "bn1.gamma"} <= own["mindspore"].keys()
    flax = {name: value.shape for name, value in own["flax"].items()}
    assert flax["params/layer1/0/bn2/conv/kernel"] == (3, 3, 1, 64)
    assert flax["params/layer2/0/conv1/kernel"] == (3, 3, 64, 128)
    assert flax["params/fc/kernel"] == (512, 1000)
    assert flax["batch_stats/bn1/mean"] == (64,)


@pytest.mark.parametrize("rank", [2, 3, 4, 5])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("framework", NAMES)
def test_a_layout_is_undone(framework, kind, rank):
    array = np.random.default_rng(0).normal(size=(2, 3, 4, 5, 6)[:rank])
    if kind == "linear" and rank > 2:
        return
    for name in ("weight", "conv_weight", "bias"):
        own = to_layout(framework, name, kind, array)
        np.testing.assert_array_equal(from_layout(framework, name, kind, own), array)
        if framework != "flax" or name == "bias":
            np.testing.assert_array_equal(own, array)


def test_what_cannot_be_told_is_said():
    stored = {"up.weight": np.ones((4, 2, 3, 3)), "words.weight": np.ones((10, 4)), "act.alpha": np.ones(2)}
    kinds = {"up": "transposed_convolution", "words": "embedding"}
    state, found = from_own("torch", stored, kinds)
    assert found == kinds | {"act": "other"}
    shapes = {name: value.shape for name, value in to_own("flax", state, found).items()}
    assert shapes == {
        "params/up/kernel": (3, 3, 4, 2),
        "params/words/embedding": (10, 4),
        "params/act/alpha": (2,),
    }
    assert to_own("mindspore", state, found).keys() == {"up.weight", "words.embedding_table", "act.alpha"}


def test_a_layer_alone_has_no_path():
    for framework, names in NAMES.items():
        state = {
            "gamma": np.ones(2),
            "beta": np.ones(2),
            "running_mean": np.ones(2),
            "num_batches_tracked": np.array(1),
        }
        own = to_own(framework, state, {"": "norm"})
        assert own.keys() == {names[name] for name in state}
        assert from_own(framework, own)[0].keys() == state.keys()


@pytest.mark.parametrize("framework", NAMES)
def test_the_parameters_of_bnet_alone_are_known_by_what_is_said(framework):
    state = {"n.conv_weight": np.ones((2, 1, 3, 3)), "n.conv_bias": np.ones(2)}
    own = to_own(framework, state, {"n": "norm"})
    back, found = from_own(framework, own, {"n": "norm"})
    assert {name: value.shape for name, value in back.items()} == {
        "n.conv_weight": (2, 1, 3, 3),
        "n.conv_bias": (2,),
    }
    assert found == {"n": "norm"}
