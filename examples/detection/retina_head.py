"""RetinaNet's head with a norm layer of its own for every level of the FPN.

RetinaNet runs one head over all levels. Running statistics that all levels share fit none of them, so that
evaluation differs from training: section 5 of Wu and Johnson, "Rethinking Batch in BatchNorm", 2021.
"""

import torch
from torch import Tensor, nn
from torchvision.models.detection.retinanet import RetinaNetHead


class PerLevelHead(nn.Module):
    """One of torchvision's heads for each level; their convolutions are the same, and their norms are not.

    Args:
        levels: How many levels the FPN has.
        channels: Its channels.
        num_anchors: The anchors at a place.
        num_classes: The classes.
        norm_layer: What builds a norm layer from its number of channels.
    """

    def __init__(
        self, levels: int, channels: int, num_anchors: int, num_classes: int, norm_layer: type[nn.Module]
    ) -> None:
        super().__init__()
        self.levels = nn.ModuleList(
            RetinaNetHead(channels, num_anchors, num_classes, norm_layer) for _ in range(levels)
        )
        first, *others = self.levels
        for head in others:
            for own, shared in zip(head.modules(), first.modules(), strict=True):
                if isinstance(own, nn.Conv2d):
                    own.weight, own.bias = shared.weight, shared.bias

    def forward(self, features: list[Tensor]) -> dict[str, Tensor]:
        """The logits and the boxes of all anchors, level after level."""
        found = [head([level]) for head, level in zip(self.levels, features, strict=True)]
        return {name: torch.cat([each[name] for each in found], dim=1) for name in found[0]}

    def compute_loss(self, *arguments: object) -> dict[str, Tensor]:
        """torchvision's own losses, which have no parameters."""
        return self.levels[0].compute_loss(*arguments)
