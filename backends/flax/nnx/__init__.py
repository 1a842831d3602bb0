"""RBN, IEBN and BNET as NNX modules, networks of them, and what is done to whole models."""

from rbn.backends.flax.nnx.activations import activations
from rbn.backends.flax.nnx.layers import BNET, IEBN, RBN, CalibratedNorm
from rbn.backends.flax.nnx.networks import Network, network
from rbn.backends.flax.nnx.surgery import convert
from rbn.backends.flax.nnx.weights import describe, from_numpy, layouts, to_numpy

__all__ = [
    "BNET",
    "IEBN",
    "RBN",
    "CalibratedNorm",
    "Network",
    "activations",
    "convert",
    "describe",
    "from_numpy",
    "layouts",
    "network",
    "to_numpy",
]
