"""The checkpoints of the papers' own code: read from memory and files, written back, and the same logits.

The classes here are written from the papers' equations, with the names and shapes that the published code
stores, and put into residual networks under torchvision's names.
"""

import argparse
import json

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from rbn.backends.torch import IEBN, RBN, from_numpy, network, to_numpy
from rbn.porting import port, read
from rbn_core import weights
from rbn_core.names import from_own


def vector(channels, value):
    return nn.Parameter(torch.full((1, channels, 1, 1), float(value)))


class RepresentativeBatchNorm2d(nn.BatchNorm2d):
    """Eq. 12 of the RBN paper; everything that is learned is (1, C, 1, 1)."""

    def __init__(self, channels):
        super().__init__(channels)
        starts = {"weight": 1, "bias": 0, "center_weight": 0, "scale_weight": 0, "scale_bias": 1}
        for name, start in starts.items():
            setattr(self, name, vector(channels, start))

    def normalized(self, x):
        statistics = self.running_mean, self.running_var
        return F.batch_norm(x, *statistics, None, None, self.training, self.momentum, self.eps)

    def forward(self, x):
        x = self.normalized(x + self.center_weight * x.mean((2, 3), keepdim=True))
        gate = torch.sigmoid(self.scale_weight * x.mean((2, 3), keepdim=True) + self.scale_bias)
        return x * gate * self.weight + self.bias


class BAN2d(nn.BatchNorm2d):
    """IEBN: a gate from the raw input."""

    normalized = RepresentativeBatchNorm2d.normalized

    def __init__(self, channels):
        super().__init__(channels, affine=False)
        for name, start in {"weight": 1, "bias": 0, "weight_readjust": 0, "bias_readjust": -1}.items():
            setattr(self, name, vector(channels, start))

    def forward(self, x):
        gate = torch.sigmoid(self.weight_readjust * x.mean((2, 3), keepdim=True) + self.bias_readjust)
        return self.normalized(x) * gate * self.weight + self.bias


class BNET2d(nn.BatchNorm2d):
    """BNET: a depthwise convolution in place of gamma and beta."""

    def __init__(self, channels, kernel_size=3):
        super().__init__(channels, affine=False)
        padding = kernel_size // 2
        self.bnconv = nn.Conv2d(channels, channels, kernel_size, padding=padding, groups=channels)

    def forward(self, x):
        return self.bnconv(super().forward(x))


class Block(nn.Module):
    """A bottleneck under torchvision's names, but for its last norm's in BNET's code."""

    def __init__(self, inputs, width, stride, norms, last):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = norms["inner"](width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = norms["inner"](width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        setattr(self, last, norms["last"](4 * width))
        self.last = last
        self.downsample = None
        if stride > 1 or inputs != 4 * width:
            shortcut = nn.Conv2d(inputs, 4 * width, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, norms["shortcut"](4 * width))

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = getattr(self, self.last)(self.conv3(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """A residual network of bottlenecks: torchvision's, or with a small stem the one for CIFAR."""

    def __init__(self, depths, norms, last="bn3", *, small=False, num_classes=7):
        super().__init__()
        width = 16 if small else 64
        self.conv1 = nn.Conv2d(3, width, 3 if small else 7, 1 if small else 2, 1 if small else 3, bias=False)
        self.bn1 = norms["stem"](width)
        self.small, self.stages, inputs = small, len(depths), width
        for stage, depth in enumerate(depths, 1):
            blocks = []
            for i in range(depth):
                blocks.append(Block(inputs, width, 2 if stage > 1 and i == 0 else 1, norms, last))
                inputs = 4 * width
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
            width *= 2
        self.fc = nn.Linear(inputs, num_classes) if num_classes else None

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = x if self.small else F.max_pool2d(x, 3, 2, 1)
        for stage in range(1, self.stages + 1):
            x = getattr(self, f"layer{stage}")(x)
        return x if self.fc is None else self.fc(x.mean((2, 3)))


def everywhere(norm, shortcut=None, others=None):
    """Which class is where."""
    return {
        "stem": others or norm,
        "inner": others or norm,
        "last": norm,
        "shortcut": others or shortcut or norm,
    }


PLAIN = nn.BatchNorm2d
DEPTHS = {"50": (3, 4, 6, 3), "101": (3, 4, 23, 3)}
RBNS = everywhere(RepresentativeBatchNorm2d)
IEBNS = everywhere(BAN2d, PLAIN)
BNETS = everywhere(BNET2d, others=PLAIN)


def wide(channels):
    return BNET2d(channels, 5)


THEIRS = {
    "RBN ResNet-50": ("resnet50", lambda: ResNet(DEPTHS["50"], RBNS)),
    "RBN ResNet-101": ("resnet101", lambda: ResNet(DEPTHS["101"], RBNS)),
    "IEBN ResNet-164": ("cifar_resnet164", lambda: ResNet((18, 18, 18), IEBNS, small=True)),
    "BNET ResNet-50": ("resnet50", lambda: ResNet(DEPTHS["50"], BNETS, "bnet3")),
    "BNET ResNet-101": ("resnet101", lambda: ResNet(DEPTHS["101"], BNETS, "bnet3")),
    "BNET detection": (
        "resnet50",
        lambda: ResNet(DEPTHS["50"], everywhere(wide, others=PLAIN), "bnet3", num_classes=0),
    ),
}
"""Their networks, and what ours are called."""

EACH = [pytest.param(name, marks=pytest.mark.long) if "101" in name else name for name in THEIRS]

SMALL = ["RBN ResNet-50", "IEBN ResNet-164", "BNET ResNet-50", "BNET detection"]

CLOSE = 1e-5
"""How far a logit may be off, relative to the largest."""


def trained(name):
    """One of their networks with weights that differ from where they start, and noise's statistics."""
    torch.manual_seed(0)
    net = THEIRS[name][1]()
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.numel() == max(parameter.shape):
                parameter += 0.1 * torch.randn_like(parameter)
        for module in net.modules():
            if isinstance(module, Block):  # small beside the shortcut, as in trained networks
                last = getattr(module, module.last)
                last.get_parameter("bnconv.weight" if hasattr(last, "bnconv") else "weight").mul_(0.3)
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0
        net(torch.randn(4, 3, 32, 32))
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):  # so that no channel's roundings are enlarged
                module.running_var += module.running_var.mean()
    return net.eval()


@pytest.fixture(scope="module")
def theirs():
    """Every network is made once."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = trained(name)
        return made[name]

    yield get
    made.clear()


def difference(net, other):
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, found = net(x), other.eval()(x)
    assert expected.shape == found.shape
    return float((found - expected).abs().max() / expected.abs().max())


def nested(name, net):
    """What their scripts save."""
    state = net.state_dict()
    parallel = {f"module.{key}": value for key, value in state.items()}
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9).state_dict()
    schedule = {"milestones": [30, 60], "gamma": 0.1, "last_epoch": 90}
    if name.startswith("RBN"):
        args = argparse.Namespace(model="resnet50", lr=0.1)
        return {"model": state, "optimizer": optimizer, "lr_scheduler": schedule, "epoch": 99, "args": args}
    if name.startswith("IEBN"):
        accuracies = {"acc": 76.1, "best_acc": 76.5}
        return {"epoch": 164, "state_dict": parallel, **accuracies, "optimizer": optimizer}
    if name.endswith("detection"):
        others = {
            "neck.lateral_convs.0.conv.weight": torch.ones(256, 256, 1, 1),
            "rpn_head.rpn_conv.weight": torch.ones(256, 256, 3, 3),
            "roi_head.bbox_head.fc_cls.weight": torch.ones(81, 1024),
        }
        body = {f"backbone.{key}": value for key, value in state.items()}
        return {"meta": {"epoch": 12, "iter": 87960}, "state_dict": body | others, "optimizer": optimizer}
    return {
        "epoch": 100,
        "model": "resnet50",
        "state_dict": parallel,
        "best_prec1": torch.tensor(77.0),
        "optimizer": optimizer,
    }


def ours(name, num_classes=None):
    """Our network, as its name and the layer's say it."""
    layer = name.split()[0].lower()
    norm = {"layer": "bnet", "kernel_size": 5} if name.endswith("detection") else layer
    classes = 0 if name.endswith("detection") else 7
    return network(THEIRS[name][0], norm, classes if num_classes is None else num_classes)


@pytest.mark.parametrize("name", EACH)
def test_in_memory(theirs, name):
    net = theirs(name)
    taken = ours(name)
    table = from_numpy(taken, to_numpy(net))
    assert not table.faults
    assert difference(net, taken) < CLOSE
    parallel = to_numpy(nn.DataParallel(net))
    assert all(np.array_equal(parallel[key], value) for key, value in to_numpy(net).items())
    from_names = ours(name)
    state, _ = from_own("torch", {key: value.numpy() for key, value in net.state_dict().items()})
    from_numpy(from_names, state)
    assert difference(net, from_names) < CLOSE
    back = THEIRS[name][1]()
    from_numpy(back, to_numpy(taken))
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in back.state_dict().items())


@pytest.mark.parametrize("name", EACH)
def test_from_file_to_ours_and_back(theirs, name, tmp_path):
    net = theirs(name)
    torch.save(nested(name, net), tmp_path / "theirs.pth.tar")
    options = {"network": THEIRS[name][0], "source_format": "torch"}
    port(tmp_path / "theirs.pth.tar", tmp_path / "ours.pth", **options)
    taken = ours(name)
    taken.load_state_dict(torch.load(tmp_path / "ours.pth"), strict=True)
    assert difference(net, taken) < CLOSE
    port(tmp_path / "ours.pth", tmp_path / "back.pth", network=THEIRS[name][0], layout="published")
    back = THEIRS[name][1]()
    back.load_state_dict(torch.load(tmp_path / "back.pth"), strict=True)
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in back.state_dict().items())
    assert difference(net, back) == 0


@pytest.mark.parametrize("suffix", [".safetensors", ".msgpack", ".ckpt", ".pkl"])
@pytest.mark.parametrize("name", SMALL)
def test_from_file_to_every_destination(theirs, name, suffix, tmp_path):
    net = theirs(name)
    torch.save(nested(name, net), tmp_path / "theirs.pth")
    port(tmp_path / "theirs.pth", tmp_path / f"x{suffix}", network=THEIRS[name][0])
    port(tmp_path / f"x{suffix}", tmp_path / "canonical.safetensors", network=THEIRS[name][0])
    found = weights.read(tmp_path / "canonical.safetensors")
    taken = ours(name)
    from_numpy(taken, to_numpy(net))
    assert found.network.layers() == taken.description.layers()
    assert found.network.to_json() == json.dumps(json.loads(taken.description.to_json()))
    for key, value in to_numpy(taken).items():
        if not key.endswith("tracked"):
            np.testing.assert_array_equal(found.state[key], value, err_msg=key)


@pytest.mark.parametrize("name", ["RBN ResNet-50", "IEBN ResNet-164", "BNET ResNet-50"])
def test_without_a_network_vectors_are_vectors(theirs, name, tmp_path):
    """What is read has our names and shapes, and goes back into their network."""
    net = theirs(name)
    torch.save(nested(name, net), tmp_path / "theirs.pth")
    port(tmp_path / "theirs.pth", tmp_path / "x.safetensors")
    state = weights.load(tmp_path / "x.safetensors")
    assert {np.ndim(value) for key, value in state.items() if key.endswith((".gamma", ".beta"))} == {1}
    assert {key: value.shape for key, value in state.items()} == ours(name).description.state_shapes()
    port(tmp_path / "x.safetensors", tmp_path / "back.pth", layout="published")
    THEIRS[name][1]().load_state_dict(torch.load(tmp_path / "back.pth"), strict=True)


def test_what_is_beside_the_backbone_is_named(theirs, tmp_path):
    torch.save(nested("BNET detection", theirs("BNET detection")), tmp_path / "theirs.pth")
    table = port(tmp_path / "theirs.pth", tmp_path / "x.pth", network="resnet50")
    left = {row.name for row in table.rows if row.status == "left out"}
    assert "neck.lateral_convs.0.conv.weight" in left
    content = read(tmp_path / "x.pth", "torch")
    assert "layer1.0.bn3.conv_weight" in content.state


@pytest.mark.parametrize(("layer", "their_layer"), [(RBN, RepresentativeBatchNorm2d), (IEBN, BAN2d)])
def test_layers_give_what_theirs_give(layer, their_layer):
    torch.manual_seed(0)
    net, taken = nn.Sequential(their_layer(4)), nn.Sequential(layer(4))
    for parameter in net.parameters():
        nn.init.normal_(parameter)
    from_numpy(taken, to_numpy(net))
    x = torch.randn(3, 4, 5, 5)
    torch.testing.assert_close(taken(x), net(x))
    assert to_numpy(net).keys() == to_numpy(taken).keys()


def test_a_kernel_of_one_output_is_no_vector():
    attention = nn.Sequential(nn.Conv2d(4, 1, 1), nn.BatchNorm2d(1))
    state, _ = from_own("torch", {key: value.numpy() for key, value in attention.state_dict().items()})
    assert state["0.weight"].shape == (1, 4, 1, 1)
    assert to_numpy(attention)["0.weight"].shape == (1, 4, 1, 1)
