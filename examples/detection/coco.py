"""Images and annotations as COCO lays them out; torchvision reads them and pycocotools knows the format."""

from collections.abc import Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from options import Options
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchvision.datasets import CocoDetection, wrap_dataset_for_transforms_v2
from torchvision.transforms import v2

SHORTEST = 1.0
"""A box with a shorter side, in pixels, is left out of training."""


def training_set(options: Options) -> CocoDetection:
    """The images that have objects, with all boxes but those of crowds, flipped at random."""
    dataset = _open(Path(options.data), "train")
    dataset.transforms = v2.Compose(
        [v2.ToImage(), v2.RandomHorizontalFlip(), v2.ToDtype(torch.float32, scale=True)]
    )
    coco = dataset.coco
    kept = [each for each in coco.dataset["annotations"] if _is_object(each)]
    if not kept:
        raise SystemExit(
            f"detection: expected annotations with boxes, got none in {options.data} for training. "
            "Check annotations/instances_train2017.json."
        )
    if options.detector == "mask_rcnn" and not all(each.get("segmentation") for each in kept):
        raise SystemExit(
            "detection: expected a segmentation in every annotation for mask_rcnn, got some without. "
            "Take --detector faster_rcnn, or annotate masks."
        )
    coco.dataset["annotations"] = kept
    with redirect_stdout(StringIO()):
        coco.createIndex()
    dataset.ids = sorted({each["image_id"] for each in kept})
    keys = ["boxes", "labels", *(["masks"] if options.detector == "mask_rcnn" else [])]
    return wrap_dataset_for_transforms_v2(dataset, keys)


def validation_set(options: Options) -> CocoDetection:
    """All images of the validation, with nothing but their numbers; the evaluator has the annotations."""
    dataset = _open(Path(options.data), "val")
    dataset.transforms = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    return wrap_dataset_for_transforms_v2(dataset, ["image_id"])


def num_classes(dataset: CocoDetection) -> int:
    """The classes, the background among them: a class is called by the number of its category."""
    return max(dataset.coco.cats) + 1


class Epoch(Dataset):
    """The images that are left of an epoch. How an image is flipped follows from the seed alone."""

    def __init__(self, dataset: CocoDetection, order: Sequence[int], seed: int) -> None:
        self.dataset, self.order, self.seed = dataset, order, seed

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, number: int) -> tuple[Any, Any]:
        index = self.order[number]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed + index)
            return self.dataset[index]


def epoch_batches(
    dataset: CocoDetection, options: Options, epoch: int, done: int, rank: int, world: int, workers: int
) -> DataLoader:
    """The batches of this process from an epoch, in the order that the seed decides.

    Args:
        dataset: The images.
        options: The seed and the size of a batch.
        epoch: Which epoch.
        done: How many batches of it are done.
        rank: The number of this process.
        world: How many processes there are.
        workers: How many processes read images for this one.
    """
    each = options.batch_size // world
    sampler = DistributedSampler(dataset, world, rank, seed=options.seed, drop_last=True)
    sampler.set_epoch(epoch)
    seed = (options.seed * 1000 + epoch) * len(dataset)
    left = Epoch(dataset, list(sampler)[done * each :], seed)
    return DataLoader(left, each, num_workers=workers, collate_fn=as_lists, drop_last=True)


def steps_per_epoch(dataset: CocoDetection, options: Options, world: int) -> int:
    """How many whole batches there are."""
    if options.batch_size % world:
        raise SystemExit(
            f"detection: expected a --batch-size that {world} processes can share, got {options.batch_size}."
        )
    if len(dataset) < options.batch_size:
        raise SystemExit(
            f"detection: expected at least {options.batch_size} images with objects for a batch, got "
            f"{len(dataset)} in {options.data}. Give a smaller --batch-size."
        )
    return len(dataset) // world // (options.batch_size // world)


def as_lists(samples: Sequence[tuple[Any, Any]]) -> tuple[list[Any], list[Any]]:
    """Images differ in size, so that a batch is two lists."""
    images, targets = zip(*samples, strict=True)
    return list(images), list(targets)


def _open(folder: Path, split: str) -> CocoDetection:
    images = folder / f"{split}2017"
    annotations = folder / "annotations" / f"instances_{split}2017.json"
    for path in (folder, images, annotations):
        if not path.exists():
            raise SystemExit(
                f"detection: expected COCO's folders and files, got no {path}. There must be "
                "annotations/instances_{train,val}2017.json, train2017/ and val2017/."
            )
    try:
        with redirect_stdout(StringIO()):  # pycocotools says how long it takes
            dataset = CocoDetection(images, str(annotations))
        coco = dataset.coco
        names = [each["file_name"] for each in coco.imgs.values()]
        absent = [name for name in names if not (images / name).is_file()]
        empty = not coco.anns or not coco.cats
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        raise SystemExit(
            f"detection: expected COCO's JSON, got {annotations}, which is not ({error!r}). Write it anew."
        ) from None
    if empty:
        raise SystemExit(
            f"detection: expected annotations and categories, got none in {annotations}. Add them."
        )
    if absent:
        raise SystemExit(
            f"detection: expected the images of {annotations} in {images}, but {len(absent)} of {len(names)} "
            f"are not there, such as {absent[0]}. Unpack the images of this split there."
        )
    if min(coco.cats) < 1:
        raise SystemExit(
            f"detection: expected categories from 1 on, as 0 is the background, got {min(coco.cats)} in "
            f"{annotations}. Number them anew."
        )
    return dataset


def _is_object(annotation: dict[str, Any]) -> bool:
    """Whether training can use it."""
    return not annotation.get("iscrowd") and min(annotation["bbox"][2:]) >= SHORTEST
