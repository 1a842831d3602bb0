"""A small data set in COCO's format: digits of scikit-learn pasted on scikit-learn's photographs.

Training and validation have different digits, and different halves of the photographs.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.progress import track
from sklearn.datasets import load_digits, load_sample_images

SIDE = 128
"""The side of an image, in pixels."""
DIGITS = (2, 6)
"""The fewest and the most digits that are tried in an image."""
SIDES = (18, 48)
"""The smallest and the largest side of a digit, in pixels."""
BRIGHTNESS = (160, 255)
"""The smallest and the largest value of a digit in red, green and blue."""
INK = 0.3
"""How much of a pixel a digit covers for the pixel to be the digit's."""


def make(folder: Path, images: int, validation: int, seed: int = 0) -> None:
    """Write `annotations/instances_{train,val}2017.json` and the images in `train2017/` and `val2017/`.

    Args:
        folder: Where to.
        images: How many for training.
        validation: How many for validation.
        seed: Of everything random.
    """
    bunch, photographs = load_digits(), load_sample_images().images
    held_out = np.arange(len(bunch.target)) % 4 == 3
    for split, count, chosen in (("train", images, ~held_out), ("val", validation, held_out)):
        rng = np.random.default_rng([seed, split == "val"])
        place = folder / f"{split}2017"
        place.mkdir(parents=True, exist_ok=True)
        content: dict[str, Any] = {
            "images": [],
            "annotations": [],
            "categories": [{"id": digit + 1, "name": str(digit)} for digit in range(10)],
        }
        for number in track(range(1, count + 1), f"making the images of {split}"):
            image = _background(photographs, split, rng)
            name = f"{number:012}.png"
            for digit, mask in _paste(image, bunch.images[chosen], bunch.target[chosen], rng):
                content["annotations"].append(
                    {"id": len(content["annotations"]) + 1, "image_id": number, "category_id": int(digit) + 1}
                    | _annotation(mask)
                )
            Image.fromarray(image).save(place / name)
            content["images"].append({"id": number, "file_name": name, "height": SIDE, "width": SIDE})
        annotations = folder / "annotations" / f"instances_{split}2017.json"
        annotations.parent.mkdir(exist_ok=True)
        annotations.write_text(json.dumps(content))


def _background(photographs: list[np.ndarray], split: str, rng: np.random.Generator) -> np.ndarray:
    """A part of the left or of the right half of a photograph."""
    photograph = photographs[rng.integers(len(photographs))]
    height, width, _ = photograph.shape
    half = photograph[:, : width // 2] if split == "train" else photograph[:, width // 2 :]
    side = rng.integers(SIDE, width // 2)
    top, left = rng.integers(height - side), rng.integers(width // 2 - side)
    part = Image.fromarray(half[top : top + side, left : left + side])
    return np.array(part.resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def _paste(
    image: np.ndarray, digits: np.ndarray, classes: np.ndarray, rng: np.random.Generator
) -> list[tuple[int, np.ndarray]]:
    """Paste digits that do not touch each other; the class and the mask of each."""
    taken = np.zeros((SIDE, SIDE), bool)
    pasted = []
    for _ in range(rng.integers(DIGITS[0], DIGITS[1] + 1)):
        chosen = rng.integers(len(digits))
        side = rng.integers(SIDES[0], SIDES[1] + 1)
        top, left = rng.integers(0, SIDE - side + 1, 2)
        area = (slice(top, top + side), slice(left, left + side))
        if taken[area].any():
            continue
        taken[area] = True
        small = Image.fromarray((digits[chosen] / 16 * 255).astype(np.uint8))
        cover = np.asarray(small.resize((side, side), Image.Resampling.BICUBIC)) / 255
        ink = rng.integers(BRIGHTNESS[0], BRIGHTNESS[1] + 1, 3)
        image[area] = (image[area] * (1 - cover[..., None]) + ink * cover[..., None]).astype(np.uint8)
        mask = np.zeros((SIDE, SIDE), bool)
        mask[area] = cover > INK
        pasted.append((classes[chosen], mask))
    return pasted


def _annotation(mask: np.ndarray) -> dict[str, Any]:
    """COCO's box (left, top, width, height), area and run-length encoded mask, column by column."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    box = [columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1]
    flat = mask.T.ravel()
    edges = np.flatnonzero(np.diff(np.concatenate(([False], flat)).astype(int)))
    counts = np.diff(np.concatenate(([0], edges, [flat.size])))
    return {
        "bbox": [int(number) for number in box],
        "area": int(mask.sum()),
        "iscrowd": 0,
        "segmentation": {"size": list(mask.shape), "counts": [int(number) for number in counts]},
    }
