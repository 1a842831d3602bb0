"""RBN's published code for Jittor: read from memory and files, written back, and the same logits."""

import pickle

import numpy as np
import pytest

from rbn.backends.jittor import from_numpy, network, to_numpy

# After the backend, which prepares what Jittor reads at its import.
# isort: split
import jittor as jt
from jittor import models, nn

from rbn.formats import jittor as checkpoints
from rbn.porting import port
from rbn_core import weights


class RepresentativeBatchNorm2d(nn.BatchNorm):
    """Eq. 12 of the RBN paper on Jittor's BatchNorm; everything that is learned is (1, C, 1, 1)."""

    def __init__(self, channels):
        super().__init__(channels)
        starts = {"weight": 1, "bias": 0, "center_weight": 0, "scale_weight": 0, "scale_bias": 1}
        for name, start in starts.items():
            setattr(self, name, jt.full((1, channels, 1, 1), float(start)))

    def execute(self, x):
        """In evaluation."""
        x = x + self.center_weight * x.mean((2, 3), keepdims=True)
        mean, var = (value.reshape((1, -1, 1, 1)) for value in (self.running_mean, self.running_var))
        x = (x - mean) / jt.sqrt(var + self.eps)
        gate = jt.sigmoid(self.scale_weight * x.mean((2, 3), keepdims=True) + self.scale_bias)
        return x * gate * self.weight + self.bias


@pytest.fixture
def theirs():
    """jittor.models' ResNet-18 with their class in place of every BatchNorm, and lively weights."""
    net = models.resnet18(num_classes=5)
    for path, module in list(net.named_modules()):
        if isinstance(module, nn.BatchNorm):
            *outer, last = path.split(".")
            parent = net
            for part in outer:
                parent = getattr(parent, part) if not part.isdigit() else parent[int(part)]
            norm = RepresentativeBatchNorm2d(module.num_features)
            if last.isdigit():
                parent.layers[last] = norm
            else:
                setattr(parent, last, norm)
    rng = np.random.default_rng(0)
    for var in net.state_dict().values():
        if var.numel() == max(var.shape):
            var.update(jt.array(np.abs(var.numpy() + rng.uniform(0, 0.2, var.shape)).astype(np.float32)))
    net.eval()
    return net


def check_logits(theirs, ours):
    x = jt.array(np.random.default_rng(1).normal(size=(2, 3, 64, 64)).astype(np.float32))
    expected, found = theirs(x).numpy(), ours.eval()(x).numpy()
    assert np.max(np.abs(found - expected)) < 1e-5 * np.max(np.abs(expected))


def test_in_memory(theirs):
    ours = network("resnet18", {"layer": "rbn", "running_var": "biased"}, 5)
    state = to_numpy(theirs)
    assert state["bn1.gamma"].shape == (64,)
    assert not from_numpy(ours, state).faults
    check_logits(theirs, ours)
    before = {name: var.numpy() for name, var in theirs.state_dict().items()}
    assert not from_numpy(theirs, to_numpy(ours), strict=False).faults
    for name, var in theirs.state_dict().items():
        np.testing.assert_array_equal(var.numpy(), before[name], err_msg=name)


def test_from_file_and_back(theirs, tmp_path):
    theirs.save(str(tmp_path / "theirs.pkl"))
    assert checkpoints.read(tmp_path / "theirs.pkl")["bn1.weight"].shape == (64,)
    port(tmp_path / "theirs.pkl", tmp_path / "ours.pkl", network="resnet18")
    ours = network("resnet18", "rbn", 5)
    ours.load(str(tmp_path / "ours.pkl"))
    check_logits(theirs, ours)
    port(tmp_path / "ours.pkl", tmp_path / "back.pkl", network="resnet18", layout="published")
    written = pickle.loads((tmp_path / "back.pkl").read_bytes())  # what jittor.load makes of it
    expected = {name: var.numpy() for name, var in theirs.state_dict().items()}
    assert written.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(written[name], value, err_msg=name)
        assert written[name].shape == value.shape, name


def test_without_a_network_nothing_is_left_in_their_form(theirs, tmp_path):
    theirs.save(str(tmp_path / "theirs.pkl"))
    port(tmp_path / "theirs.pkl", tmp_path / "x.safetensors")
    shapes = {name: value.shape for name, value in weights.load(tmp_path / "x.safetensors").items()}
    expected = network("resnet18", "rbn", 5).description.state_shapes()
    assert shapes == {name: shape for name, shape in expected.items() if not name.endswith("tracked")}
