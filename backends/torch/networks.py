"""The networks of `rbn_core.networks` as PyTorch modules."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rbn.backends.torch.layers import BNET, IEBN, RBN, CalibratedNorm
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

WITH_STATE = (Convolution, Linear, Norm)
"""The nodes that are layers of PyTorch's or ours, with parameters."""


class Network(nn.Module):
    """A network that runs node by node; its `state_dict` has torchvision's names.

    Images are (N, C, H, W), of any memory format. Convolutions start normal with variance
    2 / (out_channels kernel_size^2) (He et al. 2015, fan-out), linear layers uniform within
    1 / sqrt(in_features), and normalizations as their classes start.

    Args:
        description: What to build.

    Attributes:
        description: The same. Surgery on the modules does not change it.

    Raises:
        RBNValueError: A normalization has options that PyTorch's has not.
    """

    def __init__(self, description: networks.Network) -> None:
        super().__init__()
        self.description = description
        self._steps = tuple(description.steps())
        for node in description.nodes:
            if isinstance(node, WITH_STATE):
                _place(self, node.name, _layer(node))

    def forward(self, images: Tensor) -> Tensor:
        """The last node's result for images of shape (N, C, H, W)."""
        results = {INPUT: images}
        for node, unneeded in self._steps:
            results[node.name] = self._run(node, [results[name] for name in node.inputs])
            for name in unneeded:
                del results[name]
        return results[self._steps[-1][0].name]

    def _run(self, node: Node, inputs: list[Tensor]) -> Tensor:
        if isinstance(node, WITH_STATE):  # PyTorch 2.7 compiles neither `match` nor `A | B`
            return self.get_submodule(node.name)(inputs[0])
        if isinstance(node, Activation):
            return F.relu(inputs[0]) if node.limit is None else F.hardtanh(inputs[0], 0.0, node.limit)
        if isinstance(node, Pooling) and node.kernel_size is None:
            return inputs[0].amax((2, 3)) if node.kind == "max" else inputs[0].mean((2, 3))
        if isinstance(node, Pooling):
            pool = F.max_pool2d if node.kind == "max" else F.avg_pool2d
            return pool(inputs[0], node.kernel_size, node.stride, node.padding)
        if isinstance(node, Add):
            return functools.reduce(operator.add, inputs)
        if isinstance(node, Concatenate):
            return torch.cat(inputs, dim=1)
        if isinstance(node, Split):
            return inputs[0][:, node.start : node.stop]
        raise NotImplementedError(node.op)


def network(name: str, norm: str | Mapping[str, Any] = "bn", num_classes: int | None = None) -> Network:
    """Build a network of the papers: see `rbn_core.architectures.network`.

    Args:
        name: One of `rbn_core.architectures.ARCHITECTURES`.
        norm: "bn", "rbn", "iebn" or "bnet", or a mapping of the layer's options, in the conventions of
            `rbn_core.Config`, with the `stages` that take it.
        num_classes: How many classes there are; by default 1000, and 10 in the CIFAR forms.

    Raises:
        RBNError: The name, the layer, a stage or an option is unknown.
    """
    return Network(architectures.network(name, norm, num_classes))


LAYERS: dict[str, Callable[..., CalibratedNorm]] = {"rbn": RBN, "iebn": IEBN, "bnet": BNET}
"""What a norm node's `layer` is here, but for PyTorch's own BatchNorm, "bn"."""


def _layer(node: Convolution | Linear | Norm) -> nn.Module:
    """The module of a node that stores something."""
    match node:
        case Linear():  # starts uniform within 1 / sqrt(in_features), as He et al. with a = sqrt(5) comes to
            return nn.Linear(node.in_features, node.out_features)
        case Convolution():
            layer = nn.Conv2d(
                node.in_channels,
                node.out_channels,
                node.kernel_size,
                node.stride,
                node.padding,
                groups=node.groups,
                bias=node.bias,
            )
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
            return layer
        case Norm():
            options = arguments("torch", node.config)
            if node.layer != "bn":
                calibrated = LAYERS[node.layer](node.channels, **options)
                if node.starts_at_zero:
                    nn.init.zeros_(calibrated.conv.weight)
                    nn.init.zeros_(calibrated.conv.bias)
                return calibrated
            if options["running_var"] != "unbiased":
                raise RBNValueError(
                    "network: expected running_var 'unbiased' of PyTorch's own BatchNorm, got 'biased'. "
                    "Take {'layer': 'rbn', 'centering': None, 'scaling': None, 'running_var': 'biased'}."
                )
            own = ("eps", "momentum", "affine", "track_running_stats")
            norm = nn.BatchNorm2d(node.channels, **{name: options[name] for name in own})
            if not options["bias"]:
                norm.register_parameter("bias", None)
            return norm


def _place(root: nn.Module, path: str, layer: nn.Module) -> None:
    """Put a layer at a dotted path, with a plain module for every part of it."""
    *parents, last = path.split(".")
    for name in parents:
        if name not in root._modules:
            root.add_module(name, nn.Module())
        root = root.get_submodule(name)
    root.add_module(last, layer)
