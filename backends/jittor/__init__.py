"""RBN in Jittor: `rbn.backends.jittor.RBN` in place of `jittor.nn.BatchNorm`."""

import atexit

from rbn.backends.jittor import environment

environment.prepare()

# Behind prepare(): Jittor reads its environment when it is imported.
from rbn.backends.jittor.activations import activations  # noqa: E402
from rbn.backends.jittor.layers import BNET, IEBN, RBN  # noqa: E402
from rbn.backends.jittor.networks import Network, network  # noqa: E402
from rbn.backends.jittor.optimizers import optimizer_from_numpy, optimizer_to_numpy  # noqa: E402
from rbn.backends.jittor.recipes import fold, freeze, parameter_groups, update_rbn  # noqa: E402
from rbn.backends.jittor.surgery import convert  # noqa: E402
from rbn.backends.jittor.weights import describe, from_numpy, to_numpy  # noqa: E402

# Behind Jittor's import, whose exit comes after what is registered later.
atexit.register(environment.end_compilers)

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
