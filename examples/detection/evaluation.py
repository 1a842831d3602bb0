"""AP by pycocotools."""

from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

import coco
import numpy as np
import torch
from processes import Processes
from pycocotools import mask as masks
from pycocotools.cocoeval import COCOeval
from torch import nn
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import CocoDetection
from torchvision.models.detection import MaskRCNN
from torchvision.ops import box_convert

STATISTICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
"""The first of pycocotools' numbers, in its order."""
BATCH = 8


@torch.no_grad()
def evaluate(
    model: nn.Module,
    dataset: CocoDetection,
    among: Processes,
    workers: int,
    show: Callable[[int, int], None],
) -> dict[str, float]:
    """The AP of boxes, and of masks if the detector gives some, in percent.

    Args:
        model: The detector, not wrapped.
        dataset: Images and annotations.
        among: The processes, which share the images.
        workers: How many processes read images for this one.
        show: Called with how many images are done and how many there are.

    Returns:
        "box AP", "box AP50" and so on; nothing in processes other than 0.
    """
    model.eval()
    mine = Subset(dataset, range(among.rank, len(dataset), among.world))
    found: list[dict[str, Any]] = []
    done = 0
    for images, targets in DataLoader(mine, BATCH, num_workers=workers, collate_fn=coco.as_lists):
        outputs = model([image.to(among.device) for image in images])
        for target, output in zip(targets, outputs, strict=True):
            found += results(target["image_id"], output)
        done += len(images)
        show(done, len(mine))
    everyone = [each for part in among.gather(found) for each in part]
    if among.rank > 0:
        return {}
    kinds = [("box", "bbox"), ("mask", "segm")] if isinstance(model, MaskRCNN) else [("box", "bbox")]
    return {
        f"{kind} {name}": value
        for kind, iou_type in kinds
        for name, value in score(dataset.coco, everyone, iou_type).items()
    }


def results(image_id: int, output: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
    """What a detector found in an image, in COCO's format."""
    output = {name: value.cpu() for name, value in output.items()}
    boxes = box_convert(output["boxes"], "xyxy", "xywh").tolist()
    found = [
        {"image_id": image_id, "category_id": label, "bbox": box, "score": confidence}
        for box, label, confidence in zip(
            boxes, output["labels"].tolist(), output["scores"].tolist(), strict=True
        )
    ]
    for each, mask in zip(found, output.get("masks", ()), strict=False):  # only Mask R-CNN has some
        each["segmentation"] = masks.encode(np.asfortranarray((mask[0] > 0.5).numpy().astype(np.uint8)))
    return found


def score(annotations: Any, found: list[dict[str, Any]], iou_type: str) -> dict[str, float]:
    """pycocotools' statistics, in percent; NaN for a size that no object has.

    All are 0 where nothing was found, which pycocotools refuses.
    """
    if not found:
        return dict.fromkeys(STATISTICS, 0.0)
    if iou_type == "segm":  # without a box, so that the size of an object is its mask's
        found = [{name: value for name, value in each.items() if name != "bbox"} for each in found]
    with redirect_stdout(StringIO()):
        evaluator = COCOeval(annotations, annotations.loadRes(found), iou_type)
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    stats = np.where(evaluator.stats < 0, np.nan, 100 * evaluator.stats)  # it says -1
    return dict(zip(STATISTICS, stats.tolist(), strict=False))
