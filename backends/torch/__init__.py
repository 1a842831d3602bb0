"""RBN in PyTorch: `rbn.backends.torch.RBN` in place of `torch.nn.BatchNorm1d`, `2d` and `3d`."""

from rbn.backends.torch.layers import RBN
from rbn.backends.torch.weights import from_numpy, to_numpy

__all__ = ["RBN", "from_numpy", "to_numpy"]
