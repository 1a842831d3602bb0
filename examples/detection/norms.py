"""Where the layer goes, and the ImageNet weights that a backbone starts from."""

import re
from pathlib import Path

from options import Options
from torch import nn

from rbn.backends.torch import convert, describe, from_numpy
from rbn_core import weights
from rbn_core.errors import RBNError

PLACES = {
    "all": r".*",
    "backbone": r"backbone\.body\..*",
    "bn3": r"backbone\.body\..*\.bn3",
}
"""Where the layer takes BatchNorm's place. Only with "all" do the FPN and the heads have norm layers."""
ADDED = ("center_weight", "scale_weight", "scale_bias", "conv_weight", "conv_bias")
"""What the layers add to BatchNorm, of which a layer has at least one."""


def place(model: nn.Module, options: Options, backbone: Path | None) -> None:
    """Put the layer in its places, in a detector with BatchNorm.

    Args:
        model: The detector.
        options: The layer and its places.
        backbone: A canonical file of `rbn train` or `rbn port` with the weights of the backbone; BatchNorm in
            the file becomes a layer that gives the same outputs.
    """
    body = model.backbone.body
    if backbone is not None:
        try:
            _load(body, backbone, options.norm)
        except (OSError, RBNError) as error:
            raise SystemExit(
                f"detection: expected a canonical file with the weights of a {options.network}, got "
                f"{backbone} ({error}) Write one with: rbn port FILE {backbone} --network {options.network}"
            ) from None
    if options.norm == "batch":
        return
    chosen = [name for name in _batch_norms(model) if re.fullmatch(PLACES[options.where], name)]
    if not chosen and options.where == "bn3" and not hasattr(body.layer1[0], "bn3"):
        raise SystemExit(
            f"detection: expected a backbone with bottlenecks for --where bn3, got {options.network}. "
            "Take resnet50, or --where backbone."
        )
    inside = [name for name in chosen if name.startswith("backbone.body.")]
    outside = [name for name in chosen if name not in inside]
    _convert(model, inside, options.norm, preserve=backbone is not None)
    _convert(model, outside, options.norm, preserve=False)


def _load(body: nn.Module, path: Path, norm: str) -> None:
    """Fill a ResNet from a file; where the file has the layer, the ResNet gets it first."""
    read = weights.read(path)
    state = {name: array for name, array in read.state.items() if not name.startswith("fc.")}
    layers = (read.network.layers() if read.network else {}) | read.layers
    calibrated = sorted({name.rpartition(".")[0] for name in state if name.endswith(ADDED)})
    found = {layers[name].get("layer", "a layer without a name").lower() for name in calibrated}
    if found - {norm}:
        raise SystemExit(
            f"detection: expected weights with BatchNorm or with --norm {norm}, got {path} with "
            f"{', '.join(found)}. Give --norm {min(found)}, or other weights."
        )
    _convert(body, calibrated, norm, preserve=False)
    from_numpy(body, state)
    for name, own in describe(body).items():
        if name in calibrated and own != layers[name]:
            raise SystemExit(
                f"detection: expected layers with default options, got {path}, where {name} has "
                f"{dict(layers[name].items() - own.items())}. Train the backbone with the default options."
            )


def _convert(model: nn.Module, names: list[str], norm: str, *, preserve: bool) -> None:
    if names:
        convert(model, norm, where="|".join(map(re.escape, names)), preserve=preserve)


def _batch_norms(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if type(module) is nn.BatchNorm2d]
