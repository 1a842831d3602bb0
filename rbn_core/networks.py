"""Networks as data: what every framework's executor builds and runs, under the same names."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from rbn_core.config import Config
from rbn_core.errors import RBNValueError

Shape = tuple[int, ...]

INPUT = "input"
"""What nodes call the images that come in."""


@dataclass(frozen=True)
class Node:
    """One operation.

    Args:
        name: Its dotted name, unique in the network; its arrays are stored below that name.
        inputs: The nodes it takes, in order; `INPUT` is the network's own input.
    """

    op: ClassVar[str]

    name: str
    inputs: tuple[str, ...]

    def shape(self, *inputs: Shape) -> Shape:
        """The shape of its result, (N, C, H, W) or (N, C), for inputs of these shapes."""
        return inputs[0]

    def state_shapes(self) -> dict[str, Shape]:
        """The shape of every array it stores, under its canonical name below the node's own."""
        return {}


@dataclass(frozen=True)
class Convolution(Node):
    """A 2-d convolution (cross-correlation) with square kernels and zero padding.

    It stores `weight` of shape (out_channels, in_channels / groups, kernel_size, kernel_size), and `bias`.
    """

    op = "convolution"

    in_channels: int
    out_channels: int
    kernel_size: int
    stride: int = 1
    padding: int = 0
    groups: int = 1
    bias: bool = False

    def shape(self, *inputs: Shape) -> Shape:
        """(N, out_channels, H', W')."""
        return (inputs[0][0], self.out_channels, *_windows(inputs[0][2:], self))

    def state_shapes(self) -> dict[str, Shape]:
        """`weight`, and `bias` where there is one."""
        kernel = (self.out_channels, self.in_channels // self.groups, self.kernel_size, self.kernel_size)
        return {"weight": kernel} | ({"bias": (self.out_channels,)} if self.bias else {})


@dataclass(frozen=True)
class Norm(Node):
    """A normalization of every channel over the batch.

    Args:
        channels: C.
        layer: "bn", "rbn", "iebn" or "bnet".
        options: Options of `rbn_core.Config` that are not at their defaults, in its conventions.
        starts_at_zero: Whether BNET's kernel and bias start at 0, and not as the framework starts them.
    """

    op = "norm"

    channels: int
    layer: str = "bn"
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    starts_at_zero: bool = False

    @property
    def config(self) -> Config:
        """The options as a layer's; plain BatchNorm is an RBN without calibrations."""
        if self.layer == "bn":
            return Config.of("RBN", self.channels, centering=None, scaling=None, **self.options)
        return Config.of(self.layer.upper(), self.channels, **self.options)

    def state_shapes(self) -> dict[str, Shape]:
        """Parameters and running statistics."""
        return self.config.state_shapes()


@dataclass(frozen=True)
class Activation(Node):
    """max(x, 0), or with `limit` min(max(x, 0), limit)."""

    op = "activation"

    limit: float | None = None


@dataclass(frozen=True)
class Pooling(Node):
    """The maximum or the average of square windows; of the whole plane, giving (N, C), without `kernel_size`.

    A maximum takes no notice of the padding; an average counts it as zeros.
    """

    op = "pooling"

    kind: str
    kernel_size: int | None = None
    stride: int = 1
    padding: int = 0

    def shape(self, *inputs: Shape) -> Shape:
        """(N, C, H', W'), or (N, C) of whole planes."""
        return (*inputs[0][:2], *(_windows(inputs[0][2:], self) if self.kernel_size else ()))


@dataclass(frozen=True)
class Add(Node):
    """The sum of its inputs."""

    op = "add"


@dataclass(frozen=True)
class Concatenate(Node):
    """Its inputs' channels one after another."""

    op = "concatenate"

    def shape(self, *inputs: Shape) -> Shape:
        """(N, the sum of all C, H, W)."""
        return (inputs[0][0], sum(shape[1] for shape in inputs), *inputs[0][2:])


@dataclass(frozen=True)
class Split(Node):
    """The channels from `start` to before `stop`."""

    op = "split"

    start: int
    stop: int

    def shape(self, *inputs: Shape) -> Shape:
        """(N, stop - start, H, W)."""
        return (inputs[0][0], self.stop - self.start, *inputs[0][2:])


@dataclass(frozen=True)
class Linear(Node):
    """y = W x + b of vectors; it stores `weight` of shape (out_features, in_features) and `bias`."""

    op = "linear"

    in_features: int
    out_features: int

    def shape(self, *inputs: Shape) -> Shape:
        """(N, out_features)."""
        return (inputs[0][0], self.out_features)

    def state_shapes(self) -> dict[str, Shape]:
        """`weight` and `bias`."""
        return {"weight": (self.out_features, self.in_features), "bias": (self.out_features,)}


NODES: dict[str, type[Node]] = {
    kind.op: kind for kind in (Convolution, Norm, Activation, Pooling, Add, Concatenate, Split, Linear)
}


@dataclass(frozen=True)
class Network:
    """A network: its nodes in an order in which they can run; the last one's result is the network's.

    Args:
        name: What it is called, such as "resnet50".
        nodes: The operations.
        in_channels: The channels of the images.

    Raises:
        RBNValueError: A name comes twice, or a node takes what does not come before it.
    """

    name: str
    nodes: tuple[Node, ...]
    in_channels: int = 3

    def __post_init__(self) -> None:
        known = {INPUT}
        for node in self.nodes:
            if node.name in known:
                raise RBNValueError(
                    f"Network: expected names that differ, got {node.name!r} twice. Rename one."
                )
            if unknown := set(node.inputs) - known:
                raise RBNValueError(
                    f"Network: expected {node.name!r} to take what comes before it, got "
                    f"{', '.join(sorted(unknown))}. List the nodes in the order in which they run."
                )
            known.add(node.name)

    def steps(self) -> Iterator[tuple[Node, tuple[str, ...]]]:
        """Every node in order, with the results that nothing takes after it, so that they can be let go."""
        last = {name: node.name for node in self.nodes for name in node.inputs}
        for node in self.nodes:
            yield node, tuple(name for name in dict.fromkeys(node.inputs) if last[name] == node.name)

    def state_shapes(self) -> dict[str, Shape]:
        """The shape of every array that the network stores, under its canonical name."""
        return {
            f"{node.name}.{name}": shape for node in self.nodes for name, shape in node.state_shapes().items()
        }

    def layers(self) -> dict[str, dict[str, Any]]:
        """What owns the arrays: every node's kind, as in `rbn_core.names`, and the options of our layers."""
        return {
            node.name: {"kind": node.op}
            | (dataclasses.asdict(node.config) if isinstance(node, Norm) and node.layer != "bn" else {})
            for node in self.nodes
            if node.state_shapes()
        }

    def shapes(self, images: Shape) -> dict[str, Shape]:
        """The shape of every node's result for images of shape (N, C, H, W)."""
        found = {INPUT: images}
        for node in self.nodes:
            found[node.name] = node.shape(*(found[name] for name in node.inputs))
        return found

    def parameter_count(self) -> int:
        """How many numbers are learned: all stored ones but the running statistics."""
        return sum(
            math.prod(shape)
            for name, shape in self.state_shapes().items()
            if not name.endswith((".running_mean", ".running_var", ".num_batches_tracked"))
        )

    def multiply_adds(self, size: int) -> int:
        """How many multiplications, each with an addition, one image of size x size pixels takes.

        Those of the convolutions and the linear layers: what papers give as "FLOPs".
        """
        shapes = self.shapes((1, self.in_channels, size, size))
        return sum(
            math.prod(shapes[node.name]) * math.prod(node.state_shapes()["weight"][1:])
            for node in self.nodes
            if isinstance(node, Convolution | Linear)
        )

    def to_json(self) -> str:
        """The network as text, which `from_json` reads."""
        nodes = [{"op": node.op} | dataclasses.asdict(node) for node in self.nodes]
        return json.dumps({"name": self.name, "in_channels": self.in_channels, "nodes": nodes})

    @classmethod
    def from_json(cls, text: str) -> Network:
        """The network of a text that `to_json` has written.

        Raises:
            RBNValueError: The text is no such text.
        """
        try:
            read = json.loads(text)
            nodes = [
                NODES[node.pop("op")](**node | {"inputs": tuple(node["inputs"])}) for node in read["nodes"]
            ]
            network = cls(read["name"], tuple(nodes), read["in_channels"])
            for name, shape in network.state_shapes().items():
                if not all(type(extent) is int and extent > 0 for extent in shape):
                    raise ValueError(f"{name} of shape {shape}")
            return network
        except (KeyError, TypeError, AttributeError, ValueError, ArithmeticError, RecursionError) as error:
            raise RBNValueError(
                f"Network: expected a network's description, got {text[:60]!r} ({error!r}). "
                "Write it with Network.to_json."
            ) from error


def _windows(plane: Shape, node: Convolution | Pooling) -> Shape:
    """How many windows fit on each axis of a plane."""
    assert node.kernel_size is not None
    return tuple((extent + 2 * node.padding - node.kernel_size) // node.stride + 1 for extent in plane)
