"""The network in Jittor."""

from pathlib import Path

from rbn.backends.jittor import RBN, from_numpy

# isort: split
# Behind the layer, which sets up what Jittor reads when it is imported.
import jittor as jt
import numpy as np
from jittor import nn

from rbn_core import weights


class Network(nn.Module):
    """Two convolutions with RBN and a classifier."""

    def __init__(self) -> None:
        """Build it as anyone would with nn.BatchNorm."""
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.norm1 = RBN(16)
        self.conv2 = nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False)
        self.norm2 = RBN(32)
        self.head = nn.Linear(32, 10)

    def execute(self, x: jt.Var) -> jt.Var:
        """(N, 1, 8, 8) images to (N, 10) logits."""
        x = nn.relu(self.norm1(self.conv1(x)))
        x = nn.relu(self.norm2(self.conv2(x)))
        return self.head(x.mean(dims=(2, 3)))


def logits(path: Path, images: np.ndarray) -> np.ndarray:
    """The logits of a network with the weights of this file, in evaluation."""
    network = Network()
    network.eval()
    from_numpy(network, weights.load(path))
    return network(jt.array(images)).numpy()
