"""What the model zoos call the layers of the same networks, as data, and the rename tables that follow.

torchvision, jittor.models and timm's ResNets have the names of `rbn_core.architectures`: they need none.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from rbn_core import architectures
from rbn_core.config import check_choice
from rbn_core.errors import RBNValueError
from rbn_core.networks import Activation, Convolution, Linear, Network, Node, Norm

RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101")
BLOCK = re.compile(r"layer(\d+)\.(\d+)\.(\w+?)(\d*)(?:\.(\d))?")
"""A layer inside of a block: stage, block, and `conv2`, `bn2` or `downsample.0`."""


@dataclass(frozen=True)
class Zoo:
    """A collection of models.

    Args:
        title: What it is called.
        networks: Which of our networks it has.
        names: What it calls the layers of one, by our dotted paths.
        differs: What else is different there, so that the same weights may not give the same results.
    """

    title: str
    networks: tuple[str, ...]
    names: Callable[[Network], dict[str, str]]
    differs: str = ""


def stateful(network: Network) -> Iterator[Node]:
    """The nodes that store something."""
    return (node for node in network.nodes if isinstance(node, Convolution | Norm | Linear))


def flax_example(network: Network) -> dict[str, str]:
    """Blocks are counted through, and layers by their class; the stem and the shortcuts have names."""
    paths = [node.name for node in stateful(network)]
    kind = "BottleneckResNetBlock" if any(path.endswith(".conv3") for path in paths) else "ResNetBlock"
    blocks = list(dict.fromkeys(path[: found.start(3)] for path in paths if (found := BLOCK.fullmatch(path))))
    names = {"conv1": "conv_init", "bn1": "bn_init", "fc": "Dense_0"}
    classes = {"conv": "Conv", "bn": "BatchNorm"}
    for path in paths:
        if found := BLOCK.fullmatch(path):
            block = f"{kind}_{blocks.index(path[: found.start(3)])}"
            what, number, part = found[3], found[4], found[5]
            own = f"{('conv', 'norm')[int(part)]}_proj" if part else f"{classes[what]}_{int(number) - 1}"
            names[path] = f"{block}.{own}"
    return names


def transformers(network: Network) -> dict[str, str]:
    """Every convolution and its normalization are together, and all is counted from 0."""
    own = {"conv": "convolution", "bn": "normalization"}
    stem = "resnet.embedder.embedder"
    names = {"conv1": f"{stem}.convolution", "bn1": f"{stem}.normalization", "fc": "classifier.1"}
    for node in stateful(network):
        if found := BLOCK.fullmatch(node.name):
            stage, block, what, number, part = found.groups()
            inside = f"resnet.encoder.stages.{int(stage) - 1}.layers.{block}"
            if part:
                names[node.name] = f"{inside}.shortcut.{('convolution', 'normalization')[int(part)]}"
            else:
                names[node.name] = f"{inside}.layer.{int(number) - 1}.{own[what]}"
    return names


def transformers_flax(network: Network) -> dict[str, str]:
    """As in PyTorch, but in blocks of two convolutions the layers are called `layer_0` and `layer_1`."""
    names = transformers(network)
    if any(path.endswith(".conv3") for path in names):
        return names
    return {ours: theirs.replace(".layer.", ".layer.layer_") for ours, theirs in names.items()}


def mindcv_resnet(network: Network) -> dict[str, str]:
    """Only shortcuts and the classifier are called otherwise."""
    return {
        node.name: "classifier" if node.name == "fc" else node.name.replace("downsample", "down_sample")
        for node in stateful(network)
    }


def mindcv_mobilenet(network: Network) -> dict[str, str]:
    """Features are numbered flatly, rectifiers too, but for the blocks, inside of which `layers` are."""
    names: dict[str, str] = {}
    counts: dict[str, int] = {}
    for node in network.nodes:
        if isinstance(node, Convolution | Norm | Activation):
            _, index, *inside = node.name.split(".")
            if inside[0] == "conv":
                place = f"features.{int(index) + 2}.layers"
            else:
                place = "features"
                counts.setdefault(place, 0)
                if index != "0" and counts[place] == 3:  # the blocks come between
                    counts[place] += 17
            names[node.name] = f"{place}.{counts.get(place, 0)}"
            counts[place] = counts.get(place, 0) + 1
        elif isinstance(node, Linear):
            names[node.name] = "classifier.1"
    return {node.name: names[node.name] for node in stateful(network)}


def timm_mobilenet(network: Network) -> dict[str, str]:
    """Blocks are in stages, and convolutions called by what they are: `pw`, `dw`, and `pwl` at the end."""
    stages = [
        f"blocks.{stage}.{block}"
        for stage, (*_, depth, _) in enumerate(architectures.INVERTED_RESIDUALS)
        for block in range(depth)
    ]
    inside: dict[int, list[str]] = {}  # the layers of each block, convolutions and normalizations in turn
    names = {}
    for node in stateful(network):
        if isinstance(node, Linear):
            names[node.name] = "classifier"
        elif ".conv." in node.name:
            inside.setdefault(int(node.name.split(".")[1]), []).append(node.name)
        else:
            _, index, part = node.name.split(".")
            end = index != "0"
            names[node.name] = f"bn{end + 1}" if part == "1" else "conv_head" if end else "conv_stem"
    for block, layers in zip(stages, inside.values(), strict=True):
        kinds = ("dw", "pw") if len(layers) == 4 else ("pw", "dw", "pwl")
        theirs = [own for i, kind in enumerate(kinds, 1) for own in (f"conv_{kind}", f"bn{i}")]
        names |= {layer: f"{block}.{own}" for layer, own in zip(layers, theirs, strict=True)}
    return names


ZOOS = {
    "flax-example": Zoo(
        "the ResNets of Flax's ImageNet example",
        RESNETS,
        flax_example,
        'its convolutions of stride 2 and its pooling pad "SAME", which for even images is not ours',
    ),
    "transformers": Zoo("transformers' ResNetFor...", RESNETS, transformers),
    "transformers-flax": Zoo("transformers' FlaxResNetFor...", RESNETS, transformers_flax),
    "mindcv-resnet": Zoo(
        "mindcv's ResNets",
        RESNETS,
        mindcv_resnet,
        'its pooling pads "same", which for even images is not ours',
    ),
    "timm-mobilenet": Zoo("timm's MobileNet v2", ("mobilenet_v2",), timm_mobilenet),
    "mindcv-mobilenet": Zoo("mindcv's MobileNet v2", ("mobilenet_v2",), mindcv_mobilenet),
}

MAPS = tuple(f"{direction}-{name}" for name in ZOOS for direction in ("from", "to"))
"""The named maps: from a zoo's names to ours, and from ours to a zoo's."""


def table(name: str, arrays: Collection[str]) -> dict[str, str]:
    r"""The rename table of a named map, as `rbn_core.matching.match` takes it.

    Args:
        name: One of `MAPS`.
        arrays: The canonical names of the arrays, of which the network is told.

    Raises:
        RBNError: There is no such map, or the arrays are of none of its networks.
    """
    check_choice("the map", name, MAPS, "port")
    direction, _, zoo = name.partition("-")
    paths = {array.rpartition(".")[0] for array in arrays}
    found: dict[str, str] = {}
    for network in ZOOS[zoo].networks:
        names = ZOOS[zoo].names(architectures.network(network))
        if direction == "from":
            names = {theirs: ours for ours, theirs in names.items()}
        if names.keys() <= paths and len(names) > len(found):
            found = names
    if not found:
        raise RBNValueError(
            f"port: expected one of {', '.join(ZOOS[zoo].networks)}, with the names of "
            f"{'torchvision' if direction == 'to' else ZOOS[zoo].title}, for the map {name}, got "
            f"{', '.join(sorted(paths)[:4])}, ... Take another map: rbn port --maps lists them."
        )
    return {rf"{re.escape(old)}\.(\w+)": rf"{new}.\1" for old, new in found.items()}
