"""The networks of `rbn_core.networks` as MindSpore cells."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mindspore import Tensor, nn, ops
from mindspore.common.initializer import Normal

from rbn.backends.mindspore.layers import BNET, IEBN, RBN, CalibratedNorm
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


class Network(nn.Cell):
    """A network that runs node by node, in PyNative and as a graph; its parameters have torchvision's names.

    Images are (N, C, H, W). Convolutions start normal with variance 2 / (out_channels kernel_size^2) (He et
    al. 2015, fan-out), linear layers uniform within 1 / sqrt(in_features), and normalizations as their
    classes start.

    Args:
        description: What to build.

    Attributes:
        description: The same. Surgery on the cells does not change it.

    Raises:
        RBNValueError: A normalization has options that MindSpore's has not.
    """

    def __init__(self, description: networks.Network) -> None:
        super().__init__()
        self.description = description
        # A graph is built from lists of cells and of numbers: every result has a place in a list, and is let
        # go when another takes that place.
        self.operations: list[nn.Cell] = []
        self.plan: list[tuple[tuple[int, ...], int]] = []
        places, free = {INPUT: 0}, list(range(len(description.nodes), 0, -1))
        for node, unneeded in description.steps():
            self.operations.append(_cell(node))
            _place(self, node.name, self.operations[-1])
            inputs = tuple(places[name] for name in node.inputs)
            free.extend(sorted((places.pop(name) for name in unneeded), reverse=True))
            places[node.name] = free.pop()
            self.plan.append((inputs, places[node.name]))
        self.last = self.plan[-1][1]
        self.room = 1 + max(place for _, place in self.plan)
        self.update_parameters_name()

    def construct(self, images: Tensor) -> Tensor:
        """The last node's result for images of shape (N, C, H, W)."""
        results = [images] * self.room
        for cell, (inputs, place) in zip(self.operations, self.plan):  # noqa: B905 - no `strict` in a graph
            results[place] = cell(*[results[i] for i in inputs])
        return results[self.last]


def network(name: str, norm: str | Mapping[str, Any] = "bn", num_classes: int | None = None) -> Network:
    """Build a network of the papers: see `rbn_core.architectures.network`.

    Args:
        name: One of `rbn_core.architectures.ARCHITECTURES`.
        norm: "bn", "rbn", "iebn" or "bnet", or a mapping of the layer's options, in the conventions of
            `rbn_core.Config`, with the `stages` that take it.
        num_classes: How many classes there are; by default 1000, and 10 in the CIFAR forms.

    Raises:
        RBNError: The name, the layer, a stage or an option is unknown, or MindSpore's layer lacks it.
    """
    return Network(architectures.network(name, norm, num_classes))


LAYERS: dict[str, Callable[..., CalibratedNorm]] = {"rbn": RBN, "iebn": IEBN, "bnet": BNET}
"""What a norm node's `layer` is here, but for MindSpore's own BatchNorm, "bn"."""


def _cell(node: Node) -> nn.Cell:
    """A node as a cell of its inputs."""
    match node:
        case Convolution():
            return nn.Conv2d(
                node.in_channels,
                node.out_channels,
                node.kernel_size,
                node.stride,
                pad_mode="pad",
                padding=node.padding,
                group=node.groups,
                has_bias=node.bias,
                weight_init=Normal((2 / (node.out_channels * node.kernel_size**2)) ** 0.5),
                bias_init="zeros",
            )
        case Linear():  # starts uniform within 1 / sqrt(in_features)
            return nn.Dense(node.in_features, node.out_features)
        case Norm():
            return _norm(node)
        case Activation():
            return Rectifier(node.limit)
        case Pooling(kernel_size=None):
            return PlanePooling(node.kind)
        case Pooling():
            pooling = nn.MaxPool2d if node.kind == "max" else nn.AvgPool2d
            return pooling(node.kernel_size, node.stride, pad_mode="pad", padding=node.padding)
        case Add():
            return Sum()
        case Concatenate():
            return Concatenation()
        case Split():
            return Slice(node.start, node.stop)
        case _:
            raise NotImplementedError(node.op)


def _norm(node: Norm) -> nn.Cell:
    options = arguments("mindspore", node.config)
    if node.layer != "bn":
        layer = LAYERS[node.layer](node.channels, **options)
        if node.starts_at_zero:
            for parameter in (layer.conv.weight, layer.conv.bias):
                parameter.set_data(ops.zeros_like(parameter))
        return layer
    if options["momentum"] is None or options["running_var"] != "unbiased":
        raise RBNValueError(
            "network: expected a momentum, and running_var 'unbiased', of MindSpore's own BatchNorm, got "
            f"{dict(node.options)}. Take {{'layer': 'rbn', 'centering': None, 'scaling': None, ...}}."
        )
    return nn.BatchNorm2d(node.channels, options["eps"], options["momentum"])


def _place(root: nn.Cell, path: str, cell: nn.Cell) -> None:
    """Put a cell at a dotted path, with a plain cell for every part of it."""
    *parents, last = path.split(".")
    for name in parents:
        if name not in root.name_cells():
            root.insert_child_to_cell(name, nn.Cell())
        root = root.name_cells()[name]
    root.insert_child_to_cell(last, cell)


class Rectifier(nn.Cell):
    """max(x, 0), or with a limit min(max(x, 0), limit)."""

    def __init__(self, limit: float | None) -> None:
        super().__init__()
        self.limit = limit

    def construct(self, x: Tensor) -> Tensor:
        """The same shape."""
        return ops.relu(x) if self.limit is None else ops.clamp(x, 0, self.limit)


class PlanePooling(nn.Cell):
    """The maximum or the average of every plane."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def construct(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C)."""
        return ops.amax(x, (2, 3)) if self.kind == "max" else ops.mean(x, (2, 3))


class Sum(nn.Cell):
    """The sum of all inputs."""

    def construct(self, *inputs: Tensor) -> Tensor:
        """The same shape."""
        total = inputs[0]
        for x in inputs[1:]:
            total = total + x
        return total


class Concatenation(nn.Cell):
    """The channels of all inputs one after another."""

    def construct(self, *inputs: Tensor) -> Tensor:
        """(N, the sum of all C, H, W)."""
        return ops.cat(inputs, 1)


class Slice(nn.Cell):
    """The channels from `start` to before `stop`."""

    def __init__(self, start: int, stop: int) -> None:
        super().__init__()
        self.start = start
        self.stop = stop

    def construct(self, x: Tensor) -> Tensor:
        """(N, stop - start, H, W)."""
        return x[:, self.start : self.stop]
