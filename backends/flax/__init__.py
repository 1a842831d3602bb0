"""RBN in Flax: `rbn.backends.flax.RBN` for linen, `rbn.backends.flax.nnx.RBN` for NNX."""

from rbn.backends.flax import nnx
from rbn.backends.flax.layers import RBN
from rbn.backends.flax.weights import from_numpy, to_numpy

__all__ = ["RBN", "from_numpy", "nnx", "to_numpy"]
