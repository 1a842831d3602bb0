"""torchvision's detectors, with BatchNorm in the backbone and, if wanted, in the FPN and in the heads."""

import torchvision
from options import Options
from retina_head import PerLevelHead
from torch import nn
from torchvision.models.detection import FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

LEVELS = 5
"""Of the FPN, in all three detectors."""
HIDDEN = 1024
"""The outputs of the box head; torchvision's box predictor expects so many."""
RATIOS = (0.5, 1.0, 2.0)


def build(options: Options, num_classes: int) -> nn.Module:
    """A detector with random weights; `norms.place` puts another layer in the place of BatchNorm.

    Args:
        options: The run.
        num_classes: The classes, the background, 0, among them.
    """
    norm_layer = nn.BatchNorm2d if options.where == "all" else None
    backbone = _backbone(options, norm_layer)
    scales = (1.0, 2 ** (1 / 3), 2 ** (2 / 3)) if options.detector == "retinanet" else (1.0,)
    anchors = AnchorGenerator(
        tuple(tuple(int(options.anchors * 2**level * scale) for scale in scales) for level in range(LEVELS)),
        (RATIOS,) * LEVELS,
    )
    known = {"min_size": options.size, "max_size": options.size * 5 // 3}
    if options.detector == "retinanet":
        per_place, head = len(scales) * len(RATIOS), None
        if norm_layer is not None:
            head = PerLevelHead(LEVELS, options.channels, per_place, num_classes, norm_layer)
        return RetinaNet(backbone, num_classes, anchor_generator=anchors, head=head, **known)
    known |= {"rpn_anchor_generator": anchors, "box_head": _box_head(options.channels, norm_layer)}
    if options.detector == "faster_rcnn":
        return FasterRCNN(backbone, num_classes, **known)
    mask_head = MaskRCNNHeads(options.channels, (256,) * 4, 1, norm_layer)
    return MaskRCNN(backbone, num_classes, mask_head=mask_head, **known)


def _backbone(options: Options, norm_layer: type[nn.Module] | None) -> BackboneWithFPN:
    """A ResNet with an FPN on top."""
    make = getattr(torchvision.models, options.network, None)
    body = make(weights=None) if make in RESNETS else None
    if body is None:
        names = ", ".join(each.__name__ for each in RESNETS)
        raise SystemExit(f"detection: expected --network {names}, got {options.network!r}.")
    retina = options.detector == "retinanet"
    stages = (2, 3, 4) if retina else (1, 2, 3, 4)
    return BackboneWithFPN(
        body,
        {f"layer{stage}": str(number) for number, stage in enumerate(stages)},
        [body.inplanes // 2 ** (4 - stage) for stage in stages],
        options.channels,
        LastLevelP6P7(body.inplanes, options.channels) if retina else LastLevelMaxPool(),
        norm_layer,
    )


RESNETS = tuple(
    getattr(torchvision.models, name)
    for name in ("resnet18", "resnet34", "resnet50", "resnet101", "resnext50_32x4d", "resnext101_32x8d")
)


def _box_head(channels: int, norm_layer: type[nn.Module] | None) -> nn.Module:
    """Four convolutions and a linear layer with a norm; without one the two linear layers of the paper."""
    if norm_layer is None:
        return TwoMLPHead(channels * 7 * 7, HIDDEN)
    return FastRCNNConvFCHead((channels, 7, 7), [channels] * 4, [HIDDEN], norm_layer)
