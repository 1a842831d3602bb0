"""A small network with every kind of layer, and weights that all differ from where they start."""

import numpy as np
import pytest

from rbn_core.execution import initial_state
from rbn_core.networks import INPUT, Activation, Convolution, Linear, Network, Norm, Pooling

SMALL = Network(
    "small",
    (
        Convolution("stem.0", (INPUT,), 3, 4, 3, padding=1),
        Norm("stem.1", ("stem.0",), 4, "rbn"),
        Activation("relu", ("stem.1",)),
        Convolution("body", ("relu",), 4, 6, 3, stride=2, groups=2, bias=True),
        Norm("bn", ("body",), 6),
        Norm("attention", ("bn",), 6, "iebn"),
        Norm("last", ("attention",), 6, "bnet", {"kernel_size": 5}),
        Pooling("means", ("last",), "average"),
        Linear("fc", ("means",), 6, 5),
    ),
)


def trained(description, seed=0):
    """A state in which everything differs from where it starts, counters too."""
    rng = np.random.default_rng(seed)
    state = initial_state(description, seed)
    for name, value in state.items():
        if name.endswith("num_batches_tracked"):
            state[name] = np.array(7, np.int64)
        elif name.endswith("running_var"):
            state[name] = rng.uniform(0.5, 1.5, value.shape).astype(np.float32)
        else:
            state[name] = (value + rng.normal(0, 0.1, value.shape)).astype(np.float32)
    return state


@pytest.fixture
def small():
    """The small network's description."""
    return SMALL


@pytest.fixture
def state():
    """Its trained state."""
    return trained(SMALL)
