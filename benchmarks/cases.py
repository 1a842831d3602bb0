"""What is measured: forms of the layer, shapes, phases, and what is to be reached."""

from __future__ import annotations

from dataclasses import dataclass

Shape = tuple[int, ...]

BATCH_NORM = "BatchNorm"
RBN = "RBN"
PLAIN = "RBN, fused=False"
EQUATIONS = "equations"

FORMS = {
    BATCH_NORM: "the framework's own",
    RBN: "as it is used by default",
    PLAIN: "the two-pass form in the framework's operations",
    EQUATIONS: "eq. 12 written out in the framework's operations",
}
"""The forms in the order they are shown."""

SHAPES: tuple[Shape, ...] = (
    (32, 64, 56, 56),
    (32, 256, 28, 28),
    (32, 512, 14, 14),
    (32, 2048, 7, 7),
    (8, 64, 112, 112),
    (256, 128),
)
"""(N, C, *spatial), of ResNet-50's layers and of a dense one; Flax gets them with the channels last."""

TRAINING = "training"
EVALUATION = "evaluation"

PASSES = {TRAINING: 8, EVALUATION: 2}
"""How often a whole tensor must cross the memory bus.

Training: the forward pass reads X for the statistics, which are known only at its end, reads it again and
writes Y (3); the backward pass reads X and dY for its sums, reads both again and writes dX (5). Evaluation: a
plane is measured and transformed while it is in cache, so X is read once and Y written (2).
"""

COPY_PASSES = 2
"""A copy reads a tensor and writes one."""

TARGETS: dict[str, dict[str, float]] = {
    "torch": {TRAINING: 0.70, EVALUATION: 1.10},
    "flax": {TRAINING: 0.70, EVALUATION: 1.20},
    "mindspore": {TRAINING: 0.50, EVALUATION: 1.00},
    "jittor": {TRAINING: 0.35, EVALUATION: 1.10},
}
"""What RBN may cost at most, in units of the framework's own BatchNorm."""

NETWORK_TARGET = 1.02
"""What a training step of a network with RBN may cost, in units of the step with BatchNorm."""


SECONDS = 0.5
"""How long a form and BatchNorm take turns."""

NETWORK_SECONDS = 60.0
"""How long the training steps of two networks do."""


@dataclass(frozen=True)
class Options:
    """What of a framework is measured, and for how long.

    Args:
        shapes: Of the inputs of the layer.
        network: A network whose training steps are measured in place of the layer, one of
            `rbn_core.architectures.ARCHITECTURES`.
        images: Of the inputs of the network, (N, C, H, W).
        dtype: Of the inputs of the layer.
        device: Where the framework computes.
        seconds: How long a form and BatchNorm take turns in a phase, after the warming up.
    """

    shapes: tuple[Shape, ...] = SHAPES
    network: str | None = None
    images: Shape = (8, 3, 224, 224)
    dtype: str = "float32"
    device: str = "cpu"
    seconds: float = SECONDS
