"""Networks of `rbn_core.networks` in Jittor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jittor as jt
from jittor import Module, Var, init, nn

from rbn.backends.jittor.layers import BNET, IEBN, RBN
from rbn_core import architectures, networks
from rbn_core.config import arguments
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


class Network(Module):
    """A described network: its modules are nested along the names of the nodes, as torchvision's are.

    Convolutions start normal of variance 2 / (out_channels kernel_size^2) (He et al. 2015, fan-out), linear
    layers uniform within 1 / sqrt(in_features), and the normalizations as their classes do.

    Args:
        description: What to build.

    Raises:
        RBNValueError: A normalization has options that its class lacks.
    """

    def __init__(self, description: networks.Network) -> None:
        super().__init__()
        self.description = description
        for node in description.nodes:
            if isinstance(node, Convolution | Linear | Norm):
                *path, last = node.name.split(".")
                parent = self
                for part in path:
                    if part not in vars(parent):
                        setattr(parent, part, Module())
                    parent = getattr(parent, part)
                setattr(parent, last, _module(node))
        jt.sync(self.parameters())  # left lazy, every draw would be compiled anew into what uses it first

    def execute(self, images: Var) -> Var:
        """The result of the last node for images of shape (N, C, H, W)."""
        results = {INPUT: images}
        for node, unneeded in self.description.steps():
            results[node.name] = self._run(node, [results[name] for name in node.inputs])
            for name in unneeded:
                del results[name]
        return results[self.description.nodes[-1].name]

    def _run(self, node: Node, inputs: list[Var]) -> Var:
        x = inputs[0]
        match node:
            case Convolution() | Norm() | Linear():
                module: Any = self
                for part in node.name.split("."):
                    module = getattr(module, part)
                return module(x)
            case Activation():
                x = x.maximum(0)
                return x if node.limit is None else x.minimum(node.limit)
            case Pooling():
                return _pooling(node, x)
            case Add():
                return sum(inputs[1:], start=x)
            case Concatenate():
                return jt.concat(inputs, dim=1)
            case Split():
                return x[:, node.start : node.stop]
        raise NotImplementedError(node.op)


def network(name: str, norm: str | Mapping[str, Any] = "bn", num_classes: int | None = None) -> Network:
    """A network of the papers, with fresh weights.

    Args:
        name: One of `rbn_core.architectures.ARCHITECTURES`, such as "resnet50".
        norm: "bn" for Jittor's BatchNorm, "rbn", "iebn" or "bnet", or a mapping of the layer's options, as
            `rbn_core.architectures.network` explains them.
        num_classes: By default 1000 in the ImageNet and 10 in the CIFAR forms.

    Raises:
        RBNError: The name, the layer, a stage or an option is unknown, or Jittor's BatchNorm lacks it.
    """
    return Network(architectures.network(name, norm, num_classes))


LAYERS: dict[str, Any] = {"rbn": RBN, "iebn": IEBN, "bnet": BNET}
"""What a norm node's `layer` is here, but for Jittor's own BatchNorm, "bn"."""


def _module(node: Convolution | Linear | Norm) -> Module:
    """The module that holds a node's arrays."""
    match node:
        case Convolution():
            convolution = nn.Conv(
                node.in_channels,
                node.out_channels,
                node.kernel_size,
                node.stride,
                node.padding,
                groups=node.groups,
                bias=node.bias,
            )
            convolution.weight = init.relu_invariant_gauss(tuple(convolution.weight.shape), mode="fan_out")
            if node.bias:
                convolution.bias = init.constant((node.out_channels,), "float32", 0.0)
            return convolution
        case Linear():
            bound = node.in_features**-0.5
            linear = nn.Linear(node.in_features, node.out_features)
            for name, shape in node.state_shapes().items():
                setattr(linear, name, init.uniform(shape, "float32", -bound, bound))
            return linear
        case Norm():
            options = arguments("jittor", node.config)
            if node.layer != "bn":
                layer = LAYERS[node.layer](node.channels, **options)
                if node.starts_at_zero:
                    for name in ("weight", "bias"):
                        start = init.constant(tuple(getattr(layer.conv, name).shape), "float32", 0.0)
                        setattr(layer.conv, name, start)
                return layer
            if options["momentum"] is None or node.options.get("running_var") == "unbiased":
                raise RBNValueError(
                    "network: expected a momentum, and running_var 'biased', of Jittor's own BatchNorm, got "
                    f"{dict(node.options)}. Take {{'layer': 'rbn', 'centering': None, 'scaling': None, ...}}."
                )
            return nn.BatchNorm(node.channels, options["eps"], options["momentum"], options["affine"])


def _pooling(node: Pooling, x: Var) -> Var:
    """The maximum or the average of windows, or of whole planes."""
    size, stride, padding = node.kernel_size, node.stride, node.padding
    if size is None:
        return x.max((2, 3)) if node.kind == "max" else x.mean((2, 3))
    if node.kind == "max":
        return nn.max_pool2d(x, size, stride, padding)
    # Jittor's own average refuses planes that are no larger than the windows.
    taps = [f"i2*{stride}-{padding}+i4", f"i3*{stride}-{padding}+i5"]
    return x.reindex([*node.shape(x.shape), size, size], ["i0", "i1", *taps]).mean((4, 5))
