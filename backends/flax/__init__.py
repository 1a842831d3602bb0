"""RBN, IEBN and BNET in Flax: here for linen, in `rbn.backends.flax.nnx` for NNX."""

from rbn.backends.flax import nnx
from rbn.backends.flax.layers import BNET, IEBN, RBN
from rbn.backends.flax.weights import from_numpy, to_numpy

__all__ = ["BNET", "IEBN", "RBN", "from_numpy", "nnx", "to_numpy"]
