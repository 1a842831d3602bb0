"""RBN, IEBN and BNET in PyTorch, in place of `torch.nn.BatchNorm1d`, `2d` and `3d`."""

from rbn.backends.torch.layers import BNET, IEBN, RBN
from rbn.backends.torch.surgery import convert_sync_rbn
from rbn.backends.torch.weights import from_numpy, to_numpy

__all__ = ["BNET", "IEBN", "RBN", "convert_sync_rbn", "from_numpy", "to_numpy"]
