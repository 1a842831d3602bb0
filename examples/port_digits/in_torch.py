"""The network in PyTorch, where it is trained."""

import numpy as np
import torch
from state import State, part
from torch import nn
from torch.nn import functional as F

from rbn.backends.torch import RBN, from_numpy, to_numpy


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


def train(images: np.ndarray, classes: np.ndarray, epochs: int = 30) -> State:
    """Train the network and return all it has learned, under canonical names."""
    torch.manual_seed(0)
    network = Network()
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-3)
    data = torch.utils.data.TensorDataset(torch.tensor(images), torch.tensor(classes))
    for _ in range(epochs):
        for x, target in torch.utils.data.DataLoader(data, batch_size=64, shuffle=True):
            optimizer.zero_grad()
            F.cross_entropy(network(x), target).backward()
            optimizer.step()
    state = {
        "conv1.weight": network.conv1.weight,
        "conv2.weight": network.conv2.weight,
        "head.weight": network.head.weight,
        "head.bias": network.head.bias,
    }
    state = {name: value.detach().numpy() for name, value in state.items()}
    for name in ("norm1", "norm2"):
        state |= {f"{name}.{key}": value for key, value in to_numpy(getattr(network, name)).items()}
    return state


def logits(state: State, images: np.ndarray) -> np.ndarray:
    """The logits of a network with this state, in evaluation."""
    network = Network().eval()
    for name in ("norm1", "norm2"):
        from_numpy(getattr(network, name), part(state, name))
    with torch.no_grad():
        for name in ("conv1", "conv2", "head"):
            for key, value in part(state, name).items():
                getattr(getattr(network, name), key).copy_(torch.tensor(value))
        return network(torch.tensor(images)).numpy()
