"""The network in Flax linen: channels last."""

from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from rbn.backends.flax import RBN, from_numpy
from rbn_core import weights


class Network(nn.Module):
    """Two convolutions with RBN and a classifier."""

    def setup(self) -> None:
        """Build it as anyone would with nn.BatchNorm."""
        self.conv1 = nn.Conv(16, (3, 3), padding=1, use_bias=False)
        self.norm1 = RBN(use_running_average=True)
        self.conv2 = nn.Conv(32, (3, 3), strides=2, padding=1, use_bias=False)
        self.norm2 = RBN(use_running_average=True)
        self.head = nn.Dense(10)

    def __call__(self, x: jnp.ndarray) -> jnp.ndarray:
        """(N, 8, 8, 1) images to (N, 10) logits."""
        x = nn.relu(self.norm1(self.conv1(x)))
        x = nn.relu(self.norm2(self.conv2(x)))
        return self.head(x.mean(axis=(1, 2)))


def logits(path: Path, images: np.ndarray) -> np.ndarray:
    """The logits of a network with the weights of this file, in evaluation."""
    x = images.transpose(0, 2, 3, 1)
    variables, _ = from_numpy(lambda: Network().init(jax.random.key(0), x), weights.load(path))
    return np.asarray(Network().apply(variables, x))
