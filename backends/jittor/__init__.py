"""RBN in Jittor: `rbn.backends.jittor.RBN` in place of `jittor.nn.BatchNorm`."""

from rbn.backends.jittor import environment

environment.prepare()

# Behind prepare(): Jittor reads its environment when it is imported.
from rbn.backends.jittor.layers import BNET, IEBN, RBN  # noqa: E402
from rbn.backends.jittor.weights import from_numpy, to_numpy  # noqa: E402

__all__ = ["BNET", "IEBN", "RBN", "from_numpy", "to_numpy"]
