"""The named maps between our names and those of the model zoos."""

import numpy as np
import pytest
from typer.testing import CliRunner

from rbn import cli
from rbn.porting import port
from rbn_core import RBNValueError, weights
from rbn_core.architectures import network
from rbn_core.execution import initial_state
from rbn_core.matching import match
from rbn_core.zoos import MAPS, ZOOS, table

PAIRS = [(zoo, name) for zoo in ZOOS for name in ZOOS[zoo].networks]


@pytest.mark.parametrize(("zoo", "name"), PAIRS)
def test_there_and_back_every_array_has_its_name_again(zoo, name):
    shapes = network(name).state_shapes()
    state = {path: np.zeros(shape, np.float32 if shape else np.int64) for path, shape in shapes.items()}
    _, there = match(state, {}, rename=table(f"to-{zoo}", state), strict=False)
    renamed = {row.name: state[row.source or row.name] for row in there.rows}
    assert len(renamed) == len(state)
    back, found = match(renamed, shapes, rename=table(f"from-{zoo}", renamed))
    assert not found.faults
    assert back.keys() == shapes.keys()


def test_the_names_are_the_zoos():
    """Some of each, as they are there: the tests of the frameworks hold all to the packages."""
    expected = {
        ("flax-example", "resnet50"): {
            "layer2.0.downsample.1": "BottleneckResNetBlock_3.norm_proj",
            "layer4.2.bn3": "BottleneckResNetBlock_15.BatchNorm_2",
        },
        ("flax-example", "resnet18"): {"layer1.1.conv2": "ResNetBlock_1.Conv_1", "fc": "Dense_0"},
        ("transformers", "resnet50"): {
            "layer2.0.downsample.1": "resnet.encoder.stages.1.layers.0.shortcut.normalization",
            "layer4.2.conv3": "resnet.encoder.stages.3.layers.2.layer.2.convolution",
        },
        ("transformers-flax", "resnet18"): {
            "layer1.0.bn2": "resnet.encoder.stages.0.layers.0.layer.layer_1.normalization",
            "layer2.0.downsample.0": "resnet.encoder.stages.1.layers.0.shortcut.convolution",
        },
        ("timm-mobilenet", "mobilenet_v2"): {
            "features.0.1": "bn1",
            "features.1.conv.1": "blocks.0.0.conv_pw",
            "features.17.conv.3": "blocks.6.0.bn3",
            "features.18.0": "conv_head",
        },
        ("mindcv-resnet", "resnet34"): {"layer2.0.downsample.0": "layer2.0.down_sample.0"},
        ("mindcv-mobilenet", "mobilenet_v2"): {
            "features.1.conv.2": "features.3.layers.4",
            "features.18.1": "features.21",
        },
    }
    for (zoo, name), some in expected.items():
        assert some.items() <= ZOOS[zoo].names(network(name)).items()


def test_a_file_goes_to_a_zoo_and_comes_back(tmp_path):
    described = network("resnet18", "bn", 5)
    state = initial_state(described)
    weights.save(tmp_path / "ours.safetensors", state, network=described)
    arguments = [str(tmp_path / "ours.safetensors"), str(tmp_path / "x.msgpack"), "--map", "to-flax-example"]
    done = CliRunner().invoke(cli.app, ["port", *arguments, "--all"])
    assert done.exit_code == 0, done.stderr
    assert "ResNetBlock_0.Conv_0.weight" in done.stdout
    assert "layer1.0.conv1.weight" in done.stdout
    port(
        tmp_path / "x.msgpack",
        tmp_path / "back.safetensors",
        zoo_map="from-flax-example",
        network="resnet18",
    )
    found = weights.read(tmp_path / "back.safetensors")
    assert found.network == described
    for name, value in state.items():
        np.testing.assert_array_equal(found.state[name], value, err_msg=name)


def test_other_networks_and_maps_are_refused(tmp_path):
    with pytest.raises(RBNValueError, match="with the names of torchvision, for the map to-transformers"):
        table("to-transformers", {"conv1.weight"})
    with pytest.raises(RBNValueError, match="with the names of mindcv's MobileNet v2"):
        table("from-mindcv-mobilenet", network("mobilenet_v2").state_shapes())
    with pytest.raises(RBNValueError, match="expected the map to be one of 'from-flax-example'"):
        table("from-keras", {})


def test_the_maps_are_listed():
    done = CliRunner().invoke(cli.app, ["port", "--maps"])
    assert done.exit_code == 0
    assert all(name in done.stdout for name in MAPS)
