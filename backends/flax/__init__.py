"""RBN, IEBN and BNET in Flax: here for linen, in `rbn.backends.flax.nnx` for NNX."""

from rbn.backends.flax import nnx
from rbn.backends.flax.activations import activations
from rbn.backends.flax.layers import BNET, IEBN, RBN
from rbn.backends.flax.networks import Network, network
from rbn.backends.flax.optimizers import optimizer_from_numpy, optimizer_to_numpy
from rbn.backends.flax.recipes import fold, freeze, parameter_groups, update_rbn
from rbn.backends.flax.surgery import convert
from rbn.backends.flax.weights import describe, from_numpy, to_numpy

__all__ = [
    "BNET",
    "IEBN",
    "RBN",
    "Network",
    "activations",
    "convert",
    "describe",
    "fold",
    "freeze",
    "from_numpy",
    "network",
    "nnx",
    "optimizer_from_numpy",
    "optimizer_to_numpy",
    "parameter_groups",
    "to_numpy",
    "update_rbn",
]
