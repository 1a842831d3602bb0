"""The networks of the RBN, IEBN and BNET papers, under torchvision's parameter names."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rbn_core.config import check_choice, check_count
from rbn_core.errors import RBNError, RBNTypeError, RBNValueError
from rbn_core.networks import (
    INPUT,
    Activation,
    Add,
    Concatenate,
    Convolution,
    Linear,
    Network,
    Node,
    Norm,
    Pooling,
    Split,
)
from rbn_core.options import LAYERS as OURS

NORMS = ("bn", *map(str.lower, OURS))

PLACES = ("stem", "inner", "last", "shortcut")
"""Where a normalization is: in the stem or after the last stage, after a block's last convolution, after its
others, in a shortcut."""

CALIBRATIONS = ("center_weight", "scale_weight", "scale_bias", "conv_weight")
"""What our layers have and plain BatchNorm has not."""

PUBLISHED_PLACES = {"iebn": ("stem", "inner", "last"), "bnet": ("last",)}
"""Where the published networks have a layer; RBN is everywhere."""


def network(name: str, norm: str | Mapping[str, Any] = "bn", num_classes: int | None = None) -> Network:
    """Describe a network of the papers.

    Args:
        name: One of `ARCHITECTURES`: the ImageNet forms as torchvision builds them, Res2Net, and the CIFAR
            forms, whose names begin with "cifar_" and whose stem keeps the resolution.
        norm: "bn", "rbn", "iebn" or "bnet" everywhere, or a mapping of the layer's options, such as
            `{"layer": "rbn", "scaling": "channel_std", "stages": (1, 4)}`: `stages` are those that take the
            layer, counted from 1, with 0 for the stem and what follows the last stage, and the others take
            plain BatchNorm (Table 4 of the RBN paper); `places` are those of `PLACES` that take it, by
            default where the papers' code has it: "rbn" everywhere, "iebn" but in the shortcuts, and "bnet"
            after the last convolution of every block alone; the rest are options of `rbn_core.Config`.
        num_classes: How many classes there are: by default 1000 in the ImageNet and 10 in the CIFAR forms.
            0 leaves the classifier out, for the backbone of a detector: its result is the last stage's.

    Returns:
        The description, which each backend's `network` builds. Dropout is not part of it. BNET's kernels and
        biases start at 0, so that blocks start as their shortcuts, but in a backbone.

    Raises:
        RBNError: The name, the layer, a stage, a place or an option is unknown.
    """
    check_choice("name", name, tuple(ARCHITECTURES), "network")
    if num_classes is None:
        num_classes = 10 if name.startswith("cifar_") else 1000
    if num_classes != 0 or isinstance(num_classes, bool):
        check_count("num_classes", num_classes, "network")
    builder = Builder(_choice(norm), starts_at_zero=num_classes > 0)
    ARCHITECTURES[name](builder, num_classes)
    if unknown := set(builder.norms.stages or ()) - builder.stages:
        raise RBNValueError(
            f"network: expected stages of {name}, {', '.join(map(str, sorted(builder.stages)))}, "
            f"got {', '.join(map(str, sorted(unknown)))}. Choose some of these."
        )
    return Network(name, tuple(builder.nodes))


@dataclass(frozen=True)
class NormChoice:
    """Which normalization goes where."""

    layer: str
    stages: frozenset[int] | None = None
    places: tuple[str, ...] = PLACES
    options: Mapping[str, Any] = field(default_factory=dict)

    def at(self, stage: int, place: str) -> tuple[str, Mapping[str, Any]]:
        """The layer of a place in a stage, and its options."""
        chosen = (self.stages is None or stage in self.stages) and place in self.places
        return (self.layer, self.options) if chosen else ("bn", {})


def layer_of(norm: str | Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """The layer that `norm` names, as `network` takes it, and its options, where there are no stages.

    Raises:
        RBNError: It is unknown, or says where the layer goes.
    """
    chosen = _choice(norm)
    if not isinstance(norm, str) and norm.keys() & {"stages", "places"}:
        raise RBNValueError(
            "network: expected stages and places of a network that is known, got none. Name the network, or "
            "leave them out."
        )
    return chosen.layer, chosen.options


def _choice(norm: str | Mapping[str, Any]) -> NormChoice:
    if isinstance(norm, str):
        norm = {"layer": norm}
    if not isinstance(norm, Mapping) or "layer" not in norm:
        raise RBNTypeError(
            f"network: expected norm to be one of {', '.join(NORMS)}, or a mapping with a 'layer', "
            f"got {norm!r}. Pass for example {{'layer': 'rbn', 'stages': (1, 4)}}."
        )
    options = dict(norm)
    layer, stages = options.pop("layer"), options.pop("stages", None)
    check_choice("norm", layer, NORMS, "network")
    places = options.pop("places", PUBLISHED_PLACES.get(layer, PLACES))
    for place in places:
        check_choice("each of places", place, PLACES, "network")
    try:
        _ = Norm("norm", (INPUT,), 1, layer, options).config
    except TypeError as error:
        if isinstance(error, RBNError):
            raise
        raise RBNTypeError(
            f"network: expected options of {layer}, got {', '.join(options)} ({error}). See rbn_core.Config."
        ) from None
    return NormChoice(layer, None if stages is None else frozenset(stages), tuple(places), options)


def told_norm(plain: Network, state: Mapping[str, Any]) -> str | dict[str, Any]:
    """The normalization of a network's arrays, by their canonical names, as `network` takes it.

    `center_weight` is RBN's and `conv_weight` BNET's; `scale_weight` without `center_weight` is taken for
    IEBN's. Which statistics a layer takes is not told: those are taken to be the defaults.

    Args:
        plain: The network with any normalization.
        state: Its arrays.

    Raises:
        RBNValueError: Several kinds of layers are there.
    """
    found: dict[str, set[str]] = {}
    options: dict[str, Any] = {}
    for node in plain.nodes:
        own = {name for name in CALIBRATIONS if f"{node.name}.{name}" in state}
        if "conv_weight" in own:
            found.setdefault("bnet", set()).add(node.name)
            size = np.shape(state[f"{node.name}.conv_weight"])[-1]
            options |= {} if size == 3 else {"kernel_size": size}
        elif "center_weight" in own:
            found.setdefault("rbn", set()).add(node.name)
            options |= {} if "scale_weight" in own else {"scaling": None}
        elif own:
            found.setdefault("iebn", set()).add(node.name)
    if not found:
        return "bn"
    if len(found) > 1:
        raise RBNValueError(
            f"port: expected one layer beside BatchNorm, got {' and '.join(sorted(found))}. "
            "Say which with --norm."
        )
    ((layer, paths),) = found.items()
    return {"layer": layer, **_chosen(plain.name, paths, PUBLISHED_PLACES.get(layer, PLACES)), **options}


def _chosen(name: str, paths: Collection[str], usual: tuple[str, ...]) -> dict[str, Any]:
    """The `stages` and `places` that choose a network's norms at these paths, where not by default."""
    builder = Builder(NormChoice("bn"), starts_at_zero=False)
    ARCHITECTURES[name](builder, 0)

    def taken(stages: Collection[int], places: Collection[str]) -> set[str]:
        return {path for path, (stage, place) in builder.where.items() if stage in stages and place in places}

    stages = sorted({builder.where[path][0] for path in paths})
    places = tuple(place for place in PLACES if any(builder.where[path][1] == place for path in paths))
    chosen: dict[str, Any] = {}
    if taken(stages, usual) != taken(stages, places):
        chosen["places"] = usual = places
    if taken(builder.stages, usual) != taken(stages, usual):
        chosen["stages"] = tuple(stages)
    return chosen


class Builder:
    """Collects nodes; every method adds one and returns its name."""

    def __init__(self, norms: NormChoice, *, starts_at_zero: bool) -> None:
        self.norms = norms
        self.starts_at_zero = starts_at_zero
        self.nodes: list[Node] = []
        self.where: dict[str, tuple[int, str]] = {}
        self.channels = {INPUT: 3}

    @property
    def stages(self) -> set[int]:
        """All stages that have a normalization."""
        return {stage for stage, _ in self.where.values()}

    def convolution(
        self, name: str, x: str, channels: int, kernel: int, stride: int = 1, groups: int = 1
    ) -> str:
        """A convolution that keeps the resolution but for its stride."""
        return self._add(
            Convolution(name, (x,), self.channels[x], channels, kernel, stride, kernel // 2, groups), channels
        )

    def norm(self, name: str, x: str, stage: int, place: str = "inner") -> str:
        """The normalization that belongs here."""
        self.where[name] = stage, place
        layer, options = self.norms.at(stage, place)
        at_zero = self.starts_at_zero and layer == "bnet"
        return self._add(Norm(name, (x,), self.channels[x], layer, options, at_zero), self.channels[x])

    def activation(self, name: str, x: str, limit: float | None = None) -> str:
        """A rectifier."""
        return self._add(Activation(name, (x,), limit), self.channels[x])

    def pooling(self, name: str, x: str, kind: str, kernel: int | None = None, stride: int = 1) -> str:
        """A pooling of windows about every stride-th pixel, or of whole planes."""
        return self._add(Pooling(name, (x,), kind, kernel, stride, (kernel or 0) // 2), self.channels[x])

    def add(self, name: str, *inputs: str) -> str:
        """A sum."""
        return self._add(Add(name, inputs), self.channels[inputs[0]])

    def concatenate(self, name: str, *inputs: str) -> str:
        """Channels side by side."""
        return self._add(Concatenate(name, inputs), sum(self.channels[x] for x in inputs))

    def split(self, name: str, x: str, start: int, stop: int) -> str:
        """Some of the channels."""
        return self._add(Split(name, (x,), start, stop), stop - start)

    def classifier(self, name: str, x: str, num_classes: int) -> str:
        """The mean of every channel, and a linear layer on these, if there are classes."""
        if not num_classes:
            return x
        means = self.pooling("avgpool", x, "average")
        return self._add(Linear(name, (means,), self.channels[means], num_classes), num_classes)

    def _add(self, node: Node, channels: int) -> str:
        self.nodes.append(node)
        self.channels[node.name] = channels
        return node.name


Block = Callable[[Builder, str, str, int, int, int], str]
"""Adds one block: builder, name, input, width, stride, stage."""


def basic(build: Builder, name: str, x: str, width: int, stride: int, stage: int) -> str:
    """Two 3x3 convolutions beside a shortcut (ResNet, He et al. 2016)."""
    y = build.convolution(f"{name}.conv1", x, width, 3, stride)
    y = build.activation(f"{name}.relu1", build.norm(f"{name}.bn1", y, stage))
    y = build.convolution(f"{name}.conv2", y, width, 3)
    y = build.norm(f"{name}.bn2", y, stage, "last")
    return _join(build, name, x, y, stride, stage)


def bottleneck(groups: int = 1, group_width: int = 64) -> Block:
    """1x1, 3x3 and 1x1 convolutions beside a shortcut: the stride is the 3x3's, and it has groups in ResNeXt.

    Args:
        groups: The groups of the 3x3 convolution.
        group_width: The channels of each group in a stage of width 64.
    """

    def block(build: Builder, name: str, x: str, width: int, stride: int, stage: int) -> str:
        inner = width * group_width // 64 * groups
        y = build.convolution(f"{name}.conv1", x, inner, 1)
        y = build.activation(f"{name}.relu1", build.norm(f"{name}.bn1", y, stage))
        y = build.convolution(f"{name}.conv2", y, inner, 3, stride, groups)
        y = build.activation(f"{name}.relu2", build.norm(f"{name}.bn2", y, stage))
        y = build.convolution(f"{name}.conv3", y, 4 * width, 1)
        y = build.norm(f"{name}.bn3", y, stage, "last")
        return _join(build, name, x, y, stride, stage)

    return block


def res2net(scales: int, scale_width: int) -> Block:
    """A bottleneck with a 3x3 convolution for each group of channels but the last (Res2Net, Gao et al. 2021).

    Each takes its group and the result of the group before, but for the first block of a stage, in which
    every group stands alone and the last one is averaged, as the resolution changes there.

    Args:
        scales: The groups.
        scale_width: The channels of each group in a stage of width 64.
    """

    def block(build: Builder, name: str, x: str, width: int, stride: int, stage: int) -> str:
        inner = width * scale_width // 64
        first = stride != 1 or build.channels[x] != 4 * width
        y = build.convolution(f"{name}.conv1", x, inner * scales, 1)
        y = build.activation(f"{name}.relu1", build.norm(f"{name}.bn1", y, stage))
        parts = [build.split(f"{name}.split{i}", y, i * inner, (i + 1) * inner) for i in range(scales)]
        done: list[str] = []
        for i, part in enumerate(parts[:-1]):
            if done and not first:
                part = build.add(f"{name}.add{i}", done[-1], part)
            part = build.convolution(f"{name}.convs.{i}", part, inner, 3, stride)
            done.append(build.activation(f"{name}.relus.{i}", build.norm(f"{name}.bns.{i}", part, stage)))
        rest = build.pooling(f"{name}.pool", parts[-1], "average", 3, stride) if first else parts[-1]
        y = build.convolution(f"{name}.conv3", build.concatenate(f"{name}.join", *done, rest), 4 * width, 1)
        y = build.norm(f"{name}.bn3", y, stage, "last")
        return _join(build, name, x, y, stride, stage)

    return block


def _join(build: Builder, name: str, x: str, y: str, stride: int, stage: int) -> str:
    """Add the shortcut, which has a convolution of its own where the shape changes."""
    if stride != 1 or build.channels[x] != build.channels[y]:
        x = build.convolution(f"{name}.downsample.0", x, build.channels[y], 1, stride)
        x = build.norm(f"{name}.downsample.1", x, stage, "shortcut")
    return build.activation(f"{name}.relu", build.add(f"{name}.add", y, x))


def residual(
    block: Block, depths: tuple[int, ...], width: int = 64, *, stem: int = 64, cifar: bool = False
) -> Callable[[Builder, int], None]:
    """A residual network: a stem, stages that halve the resolution and double the width, and a classifier.

    Args:
        block: What the stages repeat.
        depths: How often, stage by stage.
        width: The width of the first stage.
        stem: The channels of the stem.
        cifar: Whether the stem is one 3x3 convolution that keeps the resolution.
    """

    def build_all(build: Builder, num_classes: int) -> None:
        x = build.convolution("conv1", INPUT, stem, 3 if cifar else 7, 1 if cifar else 2)
        x = build.activation("relu", build.norm("bn1", x, 0, "stem"))
        if not cifar:
            x = build.pooling("maxpool", x, "max", 3, 2)
        for stage, depth in enumerate(depths, 1):
            for i in range(depth):
                stride = 2 if stage > 1 and i == 0 else 1
                x = block(build, f"layer{stage}.{i}", x, width * 2 ** (stage - 1), stride, stage)
        build.classifier("fc", x, num_classes)

    return build_all


INVERTED_RESIDUALS = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
"""Expansion, channels, blocks and first stride of MobileNet v2's stages (Table 2 of Sandler et al. 2018)."""


def mobilenet_v2(build: Builder, num_classes: int) -> None:
    """MobileNet v2: expand by 1x1, convolve depthwise, project by 1x1, all with a rectifier up to 6."""

    def unit(
        name: str, x: str, channels: int, kernel: int, stride: int = 1, groups: int = 1, stage: int = 0
    ) -> str:
        y = build.convolution(f"{name}.0", x, channels, kernel, stride, groups)
        y = build.norm(f"{name}.1", y, stage, "inner" if stage else "stem")
        return build.activation(f"{name}.2", y, 6.0)

    x = unit("features.0", INPUT, 32, 3, 2)
    index = 0
    for stage, (expansion, channels, depth, first_stride) in enumerate(INVERTED_RESIDUALS, 1):
        for i in range(depth):
            index += 1
            stride, name, y, part = first_stride if i == 0 else 1, f"features.{index}", x, 0
            inner = expansion * build.channels[x]
            if expansion > 1:
                y, part = unit(f"{name}.conv.0", y, inner, 1, stage=stage), 1
            y = unit(f"{name}.conv.{part}", y, inner, 3, stride, inner, stage)
            y = build.convolution(f"{name}.conv.{part + 1}", y, channels, 1)
            y = build.norm(f"{name}.conv.{part + 2}", y, stage, "last")
            keeps = stride == 1 and build.channels[x] == channels
            x = build.add(f"{name}.add", x, y) if keeps else y
    build.classifier("classifier.1", unit(f"features.{index + 1}", x, 1280, 1), num_classes)


ARCHITECTURES: dict[str, Callable[[Builder, int], None]] = {
    "resnet18": residual(basic, (2, 2, 2, 2)),
    "resnet34": residual(basic, (3, 4, 6, 3)),
    "resnet50": residual(bottleneck(), (3, 4, 6, 3)),
    "resnet101": residual(bottleneck(), (3, 4, 23, 3)),
    "resnext50_32x4d": residual(bottleneck(32, 4), (3, 4, 6, 3)),
    "res2net50_26w_4s": residual(res2net(4, 26), (3, 4, 6, 3)),
    "mobilenet_v2": mobilenet_v2,
    "cifar_resnet50": residual(bottleneck(), (3, 4, 6, 3), cifar=True),
    "cifar_resnext29_8x64d": residual(bottleneck(8, 64), (3, 3, 3), cifar=True),
    "cifar_resnet20": residual(basic, (3, 3, 3), 16, stem=16, cifar=True),
    "cifar_resnet164": residual(bottleneck(), (18, 18, 18), 16, stem=16, cifar=True),
    "cifar_resnet164_basic": residual(basic, (27, 27, 27), 16, stem=16, cifar=True),
}
"""How each network is built: 164 is 9n + 2 in bottlenecks (n = 18) and 6n + 2 in basic blocks (n = 27), of
which 20 has n = 3."""
