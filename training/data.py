"""Batches of images: the same for a seed in every framework and for every number of workers."""

from __future__ import annotations

import math
import signal
import struct
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rbn.training.preset import Preset
from rbn.training.share import ALONE, Share, check_parts
from rbn.training.sources import Source
from rbn.training.transforms import evaluation_image, training_image
from rbn_core.errors import RBNValueError

DAMAGED = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
"""What Pillow raises for an image that it cannot decode."""

PREFETCH = 4
"""How many batches are made ahead."""

NOTHING = -1
"""The class of what is there only to fill a batch, and the number of no image."""


@dataclass(frozen=True)
class Batch:
    """Images with their classes.

    Args:
        images: (N, 3, H, W), float32.
        labels: (N,), int64; `NOTHING` where there is no image, as in the last batch of an evaluation.
        damaged: The numbers of the images that could not be decoded.
    """

    images: NDArray[np.float32]
    labels: NDArray[np.int64]
    damaged: tuple[int, ...]


class _Sample(grain.transforms.RandomMap):
    """An image to train with, by its number.

    One that cannot be decoded is replaced by the next that can, so that every batch is whole.
    """

    def __init__(self, source: Source, preset: Preset) -> None:
        self.source, self.preset = source, preset

    def random_map(self, element: int, rng: np.random.Generator) -> dict[str, Any]:
        """The image, its class, and the number of what could not be decoded."""
        damaged = NOTHING
        for index in (*range(element, len(self.source)), *range(element)):
            try:
                image = self.source.image(index)
            except DAMAGED:
                damaged = element
                continue
            return {
                "image": training_image(image, self.preset, rng),
                "label": np.int64(self.source.label(index)),
                "damaged": np.int64(damaged),
            }
        raise RBNValueError(
            f"train: expected images, got {len(self.source)} files of which Pillow can decode none, such as "
            f"{self.source.name(element)}. Download the data again."
        )


class _Test(grain.transforms.Map):
    """An image to evaluate with, by its number; one that cannot be decoded is left out.

    Numbers beyond the last image are there to fill the last batch.
    """

    def __init__(self, source: Source, preset: Preset) -> None:
        self.source, self.preset = source, preset

    def map(self, element: int) -> dict[str, Any]:
        """The image, its class, and the number of what could not be decoded."""
        size = self.preset.image_size
        label = damaged = NOTHING
        image = np.zeros((3, size, size), np.float32)
        if element < len(self.source):
            try:
                image = evaluation_image(self.source.image(element), self.preset)
                label = self.source.label(element)
            except DAMAGED:
                damaged = element
        return {"image": image, "label": np.int64(label), "damaged": np.int64(damaged)}


def steps_per_epoch(source: Source, preset: Preset) -> int:
    """The steps of an epoch: what is left of the data at its end is less than a batch, and is not used.

    Raises:
        RBNValueError: A batch has more images than there are.
    """
    if preset.batch_size > len(source):
        raise RBNValueError(
            f"train: expected a batch_size of up to {len(source)}, which is how many images there are, got "
            f"{preset.batch_size}. Give a smaller one: --batch-size {min(64, len(source))}."
        )
    return len(source) // preset.batch_size


def training_batches(
    source: Source, preset: Preset, step: int = 0, *, workers: int = 0, share: Share = ALONE
) -> Generator[Batch, None, None]:
    """The batches of a run from a step on, without an end; each epoch has another order.

    What a batch holds is decided by the seed and its step alone.

    Args:
        source: The images.
        preset: The run.
        step: The first step, from 0.
        workers: How many processes decode images; 0 decodes in threads of this one.
        share: Which part of every batch this process gets.

    Raises:
        RBNValueError: A batch has more images than there are, or cannot be dealt to all processes.
    """
    size, steps = preset.batch_size, steps_per_epoch(source, preset)
    check_parts(preset, share.count)
    samples = (
        grain.MapDataset.source(range(len(source)))
        .seed(preset.seed % 2**32)
        .shuffle()
        .random_map(_Sample(source, preset))
    )
    # Dealt out behind all that is random, which goes by the place of a sample.
    own = samples[: steps * size][share.index :: share.count]
    batches = own.batch(size // share.count, drop_remainder=True).repeat()
    yield from _iterated(batches[step:], workers)


def evaluation_batches(
    source: Source, preset: Preset, *, workers: int = 0, share: Share = ALONE
) -> Generator[Batch, None, None]:
    """All images once, in order; the last batch is filled up.

    Every process gets as many batches, of which the first ones together are the first of a single process.

    Args:
        source: The images.
        preset: The run.
        workers: As in `training_batches`.
        share: Which part of every batch this process gets.
    """
    check_parts(preset.changed(accumulate=1), share.count)
    places = math.ceil(len(source) / preset.batch_size) * preset.batch_size
    samples = grain.MapDataset.source(range(places)).map(_Test(source, preset))
    batches = samples[share.index :: share.count].batch(preset.batch_size // share.count)
    yield from _iterated(batches, workers)


def _iterated(batches: Any, workers: int) -> Generator[Batch, None, None]:
    """The batches one by one; processes and threads end with the iteration."""
    dataset = batches.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=PREFETCH))
    if workers:
        options = grain.MultiprocessingOptions(workers, per_worker_buffer_size=2)
        dataset = dataset.mp_prefetch(options, worker_init_fn=_leave_ctrl_c)
    iterator = iter(dataset)
    try:
        for batch in iterator:
            yield _batch(batch)
    finally:
        iterator.close()


def _leave_ctrl_c(index: int, count: int) -> None:
    """Leave Ctrl-C, which a terminal sends to the workers, too, to the run: it ends them once it is saved."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _batch(batch: Mapping[str, Any]) -> Batch:
    """A batch in memory of this process: that of a worker's is taken back by it."""
    damaged = tuple(int(index) for index in batch["damaged"] if index != NOTHING)
    return Batch(np.array(batch["image"]), np.array(batch["label"]), damaged)
