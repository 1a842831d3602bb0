"""RBN in MindSpore: `rbn.backends.mindspore.RBN` in place of `mindspore.nn.BatchNorm1d`, `2d` and `3d`."""

from rbn.backends.mindspore.activations import activations
from rbn.backends.mindspore.layers import BNET, IEBN, RBN
from rbn.backends.mindspore.networks import Network, network
from rbn.backends.mindspore.optimizers import optimizer_from_numpy, optimizer_to_numpy
from rbn.backends.mindspore.recipes import fold, freeze, parameter_groups, update_rbn
from rbn.backends.mindspore.surgery import convert
from rbn.backends.mindspore.weights import describe, from_numpy, to_numpy

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
    "optimizer_from_numpy",
    "optimizer_to_numpy",
    "parameter_groups",
    "to_numpy",
    "update_rbn",
]
