"""The network in PyTorch, where it is trained."""

from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from rbn.backends.torch import RBN, describe, from_numpy, to_numpy
from rbn_core import weights


class Network(nn.Module):
    """Two convolutions with RBN and a classifier."""

    def __init__(self) -> None:
        """Build it as anyone would with BatchNorm2d."""
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.norm1 = RBN(16)
        self.conv2 = nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False)
        self.norm2 = RBN(32)
        self.head = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, 1, 8, 8) images to (N, 10) logits."""
        x = F.relu(self.norm1(self.conv1(x)))
        x = F.relu(self.norm2(self.conv2(x)))
        return self.head(x.mean(dim=(2, 3)))


def train(path: Path, images: np.ndarray, classes: np.ndarray, epochs: int = 30) -> None:
    """Train the network and write all it has learned to a canonical file."""
    torch.manual_seed(0)
    network = Network()
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-3)
    data = torch.utils.data.TensorDataset(torch.tensor(images), torch.tensor(classes))
    for _ in range(epochs):
        for x, target in torch.utils.data.DataLoader(data, batch_size=64, shuffle=True):
            optimizer.zero_grad()
            F.cross_entropy(network(x), target).backward()
            optimizer.step()
    weights.save(path, to_numpy(network), layers=describe(network))


def logits(path: Path, images: np.ndarray) -> np.ndarray:
    """The logits of a network with the weights of this file, in evaluation."""
    network = Network().eval()
    from_numpy(network, weights.load(path))
    with torch.no_grad():
        return network(torch.tensor(images)).numpy()
