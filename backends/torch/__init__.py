"""RBN, IEBN and BNET in PyTorch, in place of `torch.nn.BatchNorm1d`, `2d` and `3d`, and whole networks."""

from rbn.backends.torch.activated import BNETAct2d, IEBNAct2d, RBNAct2d
from rbn.backends.torch.activations import activations
from rbn.backends.torch.layers import BNET, IEBN, RBN
from rbn.backends.torch.lazy import LazyBNET, LazyIEBN, LazyRBN
from rbn.backends.torch.networks import Network, network
from rbn.backends.torch.optimizers import optimizer_from_numpy, optimizer_to_numpy
from rbn.backends.torch.recipes import fold, freeze, parameter_groups, update_rbn
from rbn.backends.torch.surgery import convert, convert_sync_rbn
from rbn.backends.torch.weights import describe, from_numpy, to_numpy

__all__ = [
    "BNET",
    "IEBN",
    "RBN",
    "BNETAct2d",
    "IEBNAct2d",
    "LazyBNET",
    "LazyIEBN",
    "LazyRBN",
    "Network",
    "RBNAct2d",
    "activations",
    "convert",
    "convert_sync_rbn",
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
