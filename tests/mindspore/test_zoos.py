"""The named maps of mindcv, and files of PyTorch's zoos, held to the packages: names, shapes and results."""

import warnings

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn

from rbn.backends.mindspore import from_numpy, network, to_numpy
from rbn_core.zoos import table

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from mindcv import models


@pytest.mark.parametrize(
    ("name", "theirs", "zoo"),
    [
        ("resnet18", "resnet18", "mindcv-resnet"),
        ("resnet50", "resnet50", "mindcv-resnet"),
        ("mobilenet_v2", "mobilenet_v2_100", "mindcv-mobilenet"),
    ],
)
def test_mindcvs_networks_have_these_names_and_our_results(name, theirs, zoo):
    net, ours = getattr(models, theirs)(), network(name)
    rng = np.random.default_rng(0)
    state = to_numpy(net)
    for key, value in state.items():
        if value.ndim == 1:
            state[key] = (np.abs(value) + rng.uniform(0.05, 0.2, value.shape)).astype(np.float32)
    assert not from_numpy(net, state).faults
    assert not from_numpy(ours, state, rename=table(f"from-{zoo}", state)).faults
    if zoo == "mindcv-resnet":  # which pads "same": one pixel elsewhere
        net.max_pool = nn.MaxPool2d(3, 2, pad_mode="pad", padding=1)
    x = ms.Tensor(rng.normal(size=(2, 3, 64, 64)).astype(np.float32))
    expected, found = net.set_train(False)(x).asnumpy(), ours.set_train(False)(x).asnumpy()
    assert np.max(np.abs(found - expected)) < 1e-5 * np.max(np.abs(expected))
    back = to_numpy(ours)
    assert not from_numpy(net, back, rename=table(f"to-{zoo}", back)).faults


def test_files_of_pytorchs_zoos(zoo_model, tmp_path):
    path = tmp_path / "ours.ckpt"
    zoo_model.port(path)
    ours = network(zoo_model.network)
    absent, unused = ms.load_param_into_net(ours, ms.load_checkpoint(str(path)), strict_load=True)
    assert (absent, unused) == ([], [])
    zoo_model.check(ours.set_train(False)(ms.Tensor(zoo_model.images)).asnumpy())
    ms.save_checkpoint(ours, str(path))
    zoo_model.check_back(path)
