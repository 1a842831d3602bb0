"""The network in MindSpore."""

from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import nn

from rbn.backends.mindspore import RBN, from_numpy
from rbn_core import weights


class Network(nn.Cell):
    """Two convolutions with RBN and a classifier."""

    def __init__(self) -> None:
        """Build it as anyone would with nn.BatchNorm2d."""
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, pad_mode="pad", padding=1)
        self.norm1 = RBN(16)
        self.conv2 = nn.Conv2d(16, 32, 3, stride=2, pad_mode="pad", padding=1)
        self.norm2 = RBN(32)
        self.relu = nn.ReLU()
        self.head = nn.Dense(32, 10)

    def construct(self, x: ms.Tensor) -> ms.Tensor:
        """(N, 1, 8, 8) images to (N, 10) logits."""
        x = self.relu(self.norm1(self.conv1(x)))
        x = self.relu(self.norm2(self.conv2(x)))
        return self.head(x.mean(axis=(2, 3)))


def logits(path: Path, images: np.ndarray) -> np.ndarray:
    """The logits of a network with the weights of this file, in evaluation."""
    network = Network().set_train(False)
    from_numpy(network, weights.load(path))
    return network(ms.Tensor(images)).asnumpy()
