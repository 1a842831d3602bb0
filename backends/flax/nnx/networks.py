"""The networks of the papers as NNX modules."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from typing import Any

from flax import nnx
from flax.nnx import rnglib
from jax import Array

from rbn.backends.flax.networks import (
    Tree,
    add_layers,
    batch_norm_options,
    convolution_options,
    kernel_start,
    linear_options,
    run,
    tree,
)
from rbn.backends.flax.nnx import layers
from rbn_core import architectures, networks
from rbn_core.config import arguments
from rbn_core.networks import Convolution, Linear, Node, Norm


class Network(nnx.Module):
    """A network built from its description; images are (N, H, W, C).

    The layers are nested along the dotted names, `layer1.0.conv1.kernel`. "bn" is `flax.nnx.BatchNorm` with
    a variance in two passes, which accumulates the biased batch variance; the other normalizations are this
    package's. `train()` and `eval()` switch the mode; a new network is in training.

    Args:
        description: The network as data.
        rngs: The random keys that the weights are drawn from.

    Raises:
        RBNValueError: The description asks for what Flax's BatchNorm has not.
    """

    def __init__(self, description: networks.Network, *, rngs: rnglib.Rngs) -> None:
        self.description = description
        _fill(self, tree(description), rngs)

    def __call__(self, x: Array) -> Array:
        """The last node's result, (N, num_classes) for the networks of the papers.

        Args:
            x: Images, (N, H, W, C); not changed.
        """

        def run_layer(node: Node, x: Array) -> Array:
            return reduce(getattr, node.name.split("."), self)(x)

        return run(self.description, run_layer, x)


class Part(nnx.Module):
    """What has a name in common, such as `layer1`."""

    def __init__(self, children: Tree, rngs: rnglib.Rngs) -> None:
        _fill(self, children, rngs)


def network(
    name: str, norm: str | Mapping[str, Any] = "bn", num_classes: int | None = None, *, rngs: rnglib.Rngs
) -> Network:
    """A network of the papers.

    Args:
        name: One of `rbn_core.architectures.ARCHITECTURES`.
        norm: "bn", "rbn", "iebn" or "bnet", or a mapping with options and stages.
        num_classes: How many classes there are; by default 1000, and 10 in the CIFAR forms.
        rngs: The random keys that the weights are drawn from.

    Raises:
        RBNError: As in `rbn_core.architectures.network`, which says more.
    """
    return Network(architectures.network(name, norm, num_classes), rngs=rngs)


def layer(node: Node, rngs: rnglib.Rngs) -> nnx.Module:
    """The NNX module of a node that stores arrays."""
    match node:
        case Convolution():
            return nnx.Conv(node.in_channels, node.out_channels, **convolution_options(node), rngs=rngs)
        case Linear():
            return nnx.Linear(node.in_features, node.out_features, **linear_options(node), rngs=rngs)
        case Norm(layer="bn"):
            return nnx.BatchNorm(node.channels, **batch_norm_options("flax.nnx", node), rngs=rngs)
        case Norm():
            options = arguments("flax.nnx", node.config) | kernel_start(node)
            return getattr(layers, node.config.layer)(node.channels, **options, rngs=rngs)
    raise NotImplementedError(node.op)


def _fill(module: nnx.Module, children: Tree, rngs: rnglib.Rngs) -> None:
    add_layers(module, children, lambda inner: Part(inner, rngs), lambda node: layer(node, rngs))
