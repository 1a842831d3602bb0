"""What decides the numbers of a run; the checkpoint keeps it."""

from dataclasses import dataclass
from typing import Literal

Detector = Literal["faster_rcnn", "mask_rcnn", "retinanet"]
Norm = Literal["batch", "rbn", "iebn", "bnet"]
Where = Literal["all", "backbone", "bn3"]
Schedule = Literal["1x", "2x"]


@dataclass(frozen=True)
class Options:
    """A run.

    Args:
        data: The folder of the data, as COCO lays it out.
        detector: Which of torchvision's detectors.
        network: The backbone, a ResNet or ResNeXt of torchvision by its name there.
        norm: The layer.
        where: Where it goes: `norms.PLACES`.
        backbone: A canonical file with ImageNet weights of the network; empty to start from nothing.
        schedule: 12 or 24 epochs.
        batch_size: Images in a step, over all processes.
        learning_rate: After the warm-up; 0 for the detector's usual one.
        size: The shorter side that images are scaled to, in pixels; the longer one is at most 5/3 of it.
        channels: Those of the FPN and of the heads.
        anchors: The side of the smallest anchors, in pixels.
        sync: Whether batch statistics are those of all processes.
        seed: Of everything random.
    """

    data: str
    detector: Detector = "faster_rcnn"
    network: str = "resnet50"
    norm: Norm = "rbn"
    where: Where = "all"
    backbone: str = ""
    schedule: Schedule = "1x"
    batch_size: int = 16
    learning_rate: float = 0.0
    size: int = 800
    channels: int = 256
    anchors: int = 32
    sync: bool = False
    seed: int = 0
