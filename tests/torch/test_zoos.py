"""torchvision's models and timm's have our names, or a map; transformers' have one: files, and results."""

import pytest
import torch

from rbn.backends.torch import network
from rbn.porting import port


def test_their_weights_give_our_network_their_results(zoo_model, tmp_path):
    zoo_model.port(tmp_path / "ours.pth")
    ours = network(zoo_model.network)
    ours.load_state_dict(torch.load(tmp_path / "ours.pth", weights_only=True))
    with torch.no_grad():
        zoo_model.check(ours.eval()(torch.from_numpy(zoo_model.images)))


@pytest.mark.parametrize("zoo_model", ["torchvision.resnet18", "timm.mobilenet_v2"], indirect=True)
def test_their_files_come_back_through_every_framework(zoo_model, zoo, tmp_path):
    """The packages' models load them strictly, and give what they gave."""
    for name in ("ours.msgpack", "ours.ckpt", "ours.pkl", "ours.safetensors"):
        zoo_model.port(tmp_path / name)
        zoo_model.port_back(tmp_path / name, zoo_model.path.with_suffix(f".{name}.pth"))
    zoo_model.port(tmp_path / "nnx.msgpack", layout="nnx")
    zoo_model.port_back(tmp_path / "nnx.msgpack", zoo_model.path.with_suffix(".nnx.pth"))
    zoo[1]("load", zoo_model.path.stem)


@pytest.mark.parametrize("zoo_model", ["torchvision.resnet18"], indirect=True)
def test_a_file_that_has_our_names_needs_no_option(zoo_model, tmp_path):
    assert not port(zoo_model.path, tmp_path / "ours.msgpack").faults
    zoo_model.check_back(tmp_path / "ours.msgpack")
