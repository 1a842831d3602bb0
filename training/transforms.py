"""Images to what the network gets: cropped, mirrored and normalized, as the papers do."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rbn.training.preset import Preset

AREAS = (0.08, 1.0)
RATIOS = (3 / 4, 4 / 3)
"""The part of an image that a random resized crop takes, and its width by its height."""

TRIES = 10


def training_image(image: Image.Image, preset: Preset, rng: np.random.Generator) -> NDArray[Any]:
    """An image to train with, (3, image_size, image_size).

    Args:
        image: In three colours.
        preset: Which crop there is, and whether images are mirrored.
        rng: Decides what is random.
    """
    size = preset.image_size
    if preset.crop == "resized":
        box = _random_box(image.width, image.height, rng)
        image = image.resize((size, size), Image.Resampling.BILINEAR, box)
    else:
        image = _centre(image, preset)
    pixels = np.asarray(image)
    if preset.crop == "pad":
        pad = preset.padding
        top, left = rng.integers(0, 2 * pad + 1, 2)
        pixels = np.pad(pixels, ((pad, pad), (pad, pad), (0, 0)))[top : top + size, left : left + size]
    if preset.flip and rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    return _normalized(pixels, preset)


def evaluation_image(image: Image.Image, preset: Preset) -> NDArray[Any]:
    """An image to evaluate with, (3, image_size, image_size): its centre."""
    return _normalized(np.asarray(_centre(image, preset)), preset)


def _normalized(pixels: NDArray[Any], preset: Preset) -> NDArray[Any]:
    """(H, W, 3) of 0 to 255 to (3, H, W) in float32: (x / 255 - mean) / deviation, for every colour."""
    mean, deviation = (np.array(each, np.float32) for each in (preset.mean, preset.deviation))
    scaled = (pixels.astype(np.float32) / 255 - mean) / deviation
    return np.ascontiguousarray(scaled.transpose(2, 0, 1))


def _centre(image: Image.Image, preset: Preset) -> Image.Image:
    """The centre, once the shorter side is `resize`, or `image_size` where that is 0."""
    size = preset.image_size
    shorter = max(preset.resize, size)
    width, height = image.size
    scale = shorter / min(width, height)
    if scale != 1:
        width, height = (max(shorter, round(extent * scale)) for extent in (width, height))
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _random_box(width: int, height: int, rng: np.random.Generator) -> tuple[float, float, float, float]:
    """A random part of an image, as (left, top, right, bottom), of a random area and ratio of its sides."""
    for _ in range(TRIES):
        area = width * height * rng.uniform(*AREAS)
        ratio = math.exp(rng.uniform(math.log(RATIOS[0]), math.log(RATIOS[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.integers(0, width - w + 1), rng.integers(0, height - h + 1)
            return float(left), float(top), float(left + w), float(top + h)
    # The whole image, or of a long one the middle.
    w, h = min(width, round(height * RATIOS[1])), min(height, round(width / RATIOS[0]))
    left, top = (width - w) // 2, (height - h) // 2
    return float(left), float(top), float(left + w), float(top + h)
