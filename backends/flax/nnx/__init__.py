"""RBN, IEBN and BNET as NNX modules, networks of them, and what is done to whole models."""

from rbn.backends.flax.nnx.activations import activations
from rbn.backends.flax.nnx.layers import BNET, IEBN, RBN, CalibratedNorm
from rbn.backends.flax.nnx.networks import Network, network
from rbn.backends.flax.nnx.recipes import fold, freeze, parameter_groups, update_rbn
from rbn.backends.flax.nnx.surgery import FrozenParam, convert
from rbn.backends.flax.nnx.weights import describe, from_numpy, layouts, to_numpy

__all__ = [
    "BNET",
    "IEBN",
    "RBN",
    "CalibratedNorm",
    "FrozenParam",
    "Network",
    "activations",
    "convert",
    "describe",
    "fold",
    "freeze",
    "from_numpy",
    "layouts",
    "network",
    "parameter_groups",
    "to_numpy",
    "update_rbn",
]
