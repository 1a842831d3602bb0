"""The network in Flax linen: channels last, kernels (H, W, I, O)."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from state import State, part

from rbn.backends.flax import RBN, from_numpy


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


def logits(state: State, images: np.ndarray) -> np.ndarray:
    """The logits of a network with this state, in evaluation."""
    variables: dict[str, dict] = {"params": {}, "batch_stats": {}}
    for name in ("conv1", "conv2"):
        variables["params"][name] = {"kernel": state[f"{name}.weight"].transpose(2, 3, 1, 0)}
    variables["params"]["head"] = {"kernel": state["head.weight"].T, "bias": state["head.bias"]}
    for name in ("norm1", "norm2"):
        for collection, values in from_numpy(RBN(), part(state, name))[0].items():
            variables[collection][name] = values
    return np.asarray(Network().apply(variables, images.transpose(0, 2, 3, 1)))
