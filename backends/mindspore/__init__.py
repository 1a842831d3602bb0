"""RBN in MindSpore: `rbn.backends.mindspore.RBN` in place of `mindspore.nn.BatchNorm1d`, `2d` and `3d`."""

from rbn.backends.mindspore.layers import BNET, IEBN, RBN
from rbn.backends.mindspore.weights import from_numpy, to_numpy

__all__ = ["BNET", "IEBN", "RBN", "from_numpy", "to_numpy"]
