"""What every layer does, and where two PyTorch models part."""

import torch
from torch import nn

from rbn.backends.torch import RBN, activations
from rbn_core.activations import compare


class Net(nn.Module):
    """A convolution, a layer of ours, pooling as a function, and a convolution."""

    def __init__(self, padding=1, pool=0):
        super().__init__()
        torch.manual_seed(0)
        self.conv1 = nn.Conv2d(3, 4, 3, stride=2, padding=padding)
        self.bn1 = RBN(4)
        self.pool = pool
        self.blocks = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())

    def forward(self, x):
        x = self.bn1(self.conv1(x))
        x = nn.functional.max_pool2d(x - x.amin(), 2, padding=self.pool)[..., :3, :3]
        return self.blocks(x).mean((2, 3))


X = torch.randn(2, 3, 15, 15, generator=torch.Generator().manual_seed(1))


def run(net):
    return lambda x: activations(net.eval(), x)


def test_every_layer_is_noted_in_order():
    net = Net().eval()
    found = activations(net, X)
    assert list(found) == ["conv1", "bn1", "blocks.0", "blocks.1", "blocks", ""]
    assert [layer.kind for layer in found.values()][:3] == ["Conv2d", "RBN", "Conv2d"]
    torch.testing.assert_close(torch.from_numpy(found[""].output), net(X).detach())
    assert found["bn1"].input.shape == found["conv1"].output.shape
    assert not net.conv1._forward_hooks


def test_a_wrapper_and_half_precision_are_looked_through():
    found = activations(nn.DataParallel(Net()).bfloat16().eval(), X.bfloat16())
    assert found["conv1"].output.dtype == "float32"


def test_another_padding_is_found_where_it_is():
    other = Net()
    other.conv1 = nn.Sequential(nn.ZeroPad2d((0, 2, 0, 2)), other.conv1)
    other.conv1[1].padding = (0, 0)
    found = compare(run(Net()), run(other), X)
    assert (found.layer, found.before) == ("conv1", False)
    assert "padding" in found.causes


def test_another_pooling_is_found_before_the_next_layer():
    found = compare(run(Net()), run(Net(pool=1)), X)
    assert (found.layer, found.before) == ("blocks.0", True)
    assert "pooling" in found.causes
    assert compare(run(Net()), run(Net()), X).layer is None
