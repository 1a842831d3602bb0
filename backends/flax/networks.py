"""The networks of the papers as linen modules."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jax import Array

from rbn.backends.flax import layers
from rbn_core import architectures, networks
from rbn_core.config import Config, arguments
from rbn_core.errors import RBNValueError
from rbn_core.networks import (
    INPUT,
    Activation,
    Add,
    Concatenate,
    Convolution,
    Linear,
    Node,
    Norm,
    Pooling,
    Split,
)

Tree = dict[str, Any]
"""The nodes that store arrays, nested along their dotted names."""


class Network(nn.Module):
    """A network built from its description; images are (N, H, W, C).

    The variables are nested along the dotted names: `params/layer1/0/conv1/kernel`,
    `batch_stats/layer1/0/bn1/mean`. "bn" is `flax.linen.BatchNorm` with a variance in two passes, which
    accumulates the biased batch variance; the other normalizations are this package's.

    Attributes:
        description: The network as data.

    Raises:
        RBNValueError: The description asks for what Flax's BatchNorm has not.
    """

    description: networks.Network

    def setup(self) -> None:
        """Build every layer under its name."""
        add_layers(self, tree(self.description), lambda children: Part(flat(children)), layer)

    def __call__(self, x: Array, train: bool) -> Array:
        """The last node's result, (N, num_classes) for the networks of the papers.

        Args:
            x: Images, (N, H, W, C); not changed.
            train: Whether the normalizations take the batch's statistics, and accumulate them: then
                `batch_stats` has to be mutable.
        """

        def run_layer(node: Node, x: Array) -> Array:
            own: Any = reduce(getattr, node.name.split("."), self)
            return own(x, use_running_average=not train) if isinstance(node, Norm) else own(x)

        return run(self.description, run_layer, x)


class Part(nn.Module):
    """What has a name in common, such as `layer1`.

    Attributes:
        children: Names with nodes, or with the children of a part.
    """

    children: Any

    def setup(self) -> None:
        """Build every layer under its name."""
        add_layers(self, dict(self.children), lambda children: Part(flat(children)), layer)


def network(name: str, norm: str | Mapping[str, Any] = "bn", num_classes: int | None = None) -> Network:
    """A network of the papers, to `init` and `apply` with `train`.

    Args:
        name: One of `rbn_core.architectures.ARCHITECTURES`.
        norm: "bn", "rbn", "iebn" or "bnet", or a mapping with options and stages.
        num_classes: How many classes there are; by default 1000, and 10 in the CIFAR forms.

    Raises:
        RBNError: As in `rbn_core.architectures.network`, which says more.
    """
    return Network(architectures.network(name, norm, num_classes))


def layer(node: Node) -> nn.Module:
    """The linen module of a node that stores arrays."""
    match node:
        case Convolution():
            return nn.Conv(node.out_channels, **convolution_options(node))
        case Linear():
            return nn.Dense(node.out_features, **linear_options(node))
        case Norm(layer="bn"):
            return nn.BatchNorm(**batch_norm_options("flax", node))
        case Norm():
            options = arguments("flax", node.config) | kernel_start(node)
            return getattr(layers, node.config.layer)(**options)
    raise NotImplementedError(node.op)


# What linen and NNX have in common


def tree(description: networks.Network) -> Tree:
    """The nodes that store arrays, nested along their dotted names.

    Raises:
        RBNValueError: A node's name continues the name of another that stores arrays, too.
    """
    nested: Tree = {}
    for node in description.nodes:
        if not isinstance(node, Convolution | Linear | Norm):
            continue
        *parts, last = node.name.split(".")
        try:
            inner = reduce(lambda inner, part: inner.setdefault(part, {}), parts, nested)
            if inner.setdefault(last, node) is not node:
                raise AttributeError
        except AttributeError:
            raise RBNValueError(
                f"Network: expected no layer inside of another one, got {node.name!r}. Rename one of them."
            ) from None
    return nested


def flat(children: Tree) -> Any:
    """The tree in a form that can be hashed."""
    return tuple(
        (name, flat(child) if isinstance(child, dict) else child) for name, child in children.items()
    )


def add_layers(
    module: Any, children: Mapping[str, Any], part: Callable[[Any], Any], make: Callable[[Node], Any]
) -> None:
    """Give a module its layers and parts, each under its name.

    Args:
        module: What gets them.
        children: Names with nodes, or with the children of a part.
        part: Makes a part.
        make: Makes a layer.
    """
    for name, child in children.items():
        setattr(module, name, make(child) if isinstance(child, Node) else part(dict(child)))


def run(description: networks.Network, run_layer: Callable[[Node, Array], Array], x: Array) -> Array:
    """A network's result.

    Args:
        description: The network.
        run_layer: The result of a node that stores arrays.
        x: Images, (N, H, W, C).
    """
    results = {INPUT: x}
    for node, unneeded in description.steps():
        inputs = [results[name] for name in node.inputs]
        if isinstance(node, Convolution | Linear | Norm):
            results[node.name] = run_layer(node, inputs[0])
        else:
            results[node.name] = combine(node, inputs)
        for name in unneeded:
            del results[name]
    return results[description.nodes[-1].name]


def combine(node: Node, inputs: Sequence[Array]) -> Array:
    """The result of a node that stores nothing; channels are last."""
    x = inputs[0]
    match node:
        case Activation():
            return nn.relu(x) if node.limit is None else jnp.minimum(nn.relu(x), node.limit)
        case Pooling(kernel_size=None):
            return x.max((1, 2)) if node.kind == "max" else x.mean((1, 2))
        case Pooling():
            pool = nn.max_pool if node.kind == "max" else nn.avg_pool
            return pool(x, (node.kernel_size,) * 2, (node.stride,) * 2, ((node.padding, node.padding),) * 2)
        case Add():
            return sum(inputs[1:], start=x)
        case Concatenate():
            return jnp.concatenate(inputs, axis=-1)
        case Split():
            return x[..., node.start : node.stop]
    raise NotImplementedError(node.op)


def convolution_options(node: Convolution) -> dict[str, Any]:
    """How Flax calls a convolution's options; it starts as He et al. (2015) have it, by its fan-out."""
    deviation = (2 / (node.out_channels * node.kernel_size**2)) ** 0.5
    return {
        "kernel_size": (node.kernel_size,) * 2,
        "strides": node.stride,
        "padding": node.padding,
        "feature_group_count": node.groups,
        "use_bias": node.bias,
        "kernel_init": nn.initializers.normal(deviation),
    }


def linear_options(node: Linear) -> dict[str, Any]:
    """How Flax calls a linear layer's options; it starts uniformly within 1 / sqrt(in_features)."""
    bound = node.in_features**-0.5

    def within(key: Array, shape: tuple[int, ...], dtype: Dtype = jnp.float32) -> Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return {"kernel_init": within, "bias_init": within}


def batch_norm_options(framework: str, node: Norm) -> dict[str, Any]:
    """How Flax's own BatchNorm calls the options, in linen or NNX.

    Raises:
        RBNValueError: It has no such option.
    """
    config = node.config
    if config.momentum is None:
        raise RBNValueError(
            f"Network: expected a momentum for {node.name!r}, got None: Flax's BatchNorm has no average of "
            "all batches. Give a number, or take rbn with centering=None and scaling=None."
        )
    options = arguments(framework, config)
    own = {name: options[name] for name in ("momentum", "epsilon", "use_bias", "use_scale")}
    return own | {"use_fast_variance": False}


def kernel_start(node: Norm) -> dict[str, Any]:
    """How the kernel of BNET starts, where a description says that."""
    return {"kernel_init": nn.initializers.zeros} if node.starts_at_zero else {}


def redescribed(
    description: networks.Network, converted: Mapping[str, tuple[str, Config]]
) -> networks.Network:
    """A description in which some normalizations are others.

    Args:
        description: The network as data.
        converted: By a node's name, what it is now, such as "rbn", and its options.
    """

    def renewed(node: Node) -> Node:
        if not isinstance(node, Norm) or node.name not in converted:
            return node
        layer, config = converted[node.name]
        plain = dataclasses.replace(node, layer=layer, options={}, starts_at_zero=False)
        options = {
            name: value
            for name, value in dataclasses.asdict(config).items()
            if value != getattr(plain.config, name)
        }
        return dataclasses.replace(plain, options=options)

    return dataclasses.replace(description, nodes=tuple(map(renewed, description.nodes)))
