"""Where images and their classes come from: one kind of data, one class."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from rbn_core import pickles
from rbn_core.errors import RBNValueError

KINDS = ("digits", "cifar10:DIR", "cifar100:DIR", "imagefolder:DIR")
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm")
"""The files of an image folder that are images."""


class Source(Protocol):
    """Images and their classes, by number."""

    classes: Sequence[str]

    def __len__(self) -> int:
        """How many there are."""

    def image(self, index: int) -> Image.Image:
        """One of them, in three colours; what is damaged raises what Pillow raises."""

    def label(self, index: int) -> int:
        """The number of its class."""

    def name(self, index: int) -> str:
        """What a person finds it by."""


class Arrays:
    """Images that are in memory.

    Args:
        title: What they are called together.
        images: (N, H, W, 3), uint8.
        labels: (N,).
        classes: The names of the classes.
    """

    def __init__(self, title: str, images: Any, labels: Any, classes: Sequence[str]) -> None:
        self.title, self.images, self.labels, self.classes = title, images, labels, classes

    def __len__(self) -> int:
        return len(self.images)

    def image(self, index: int) -> Image.Image:
        """One of them."""
        return Image.fromarray(self.images[index])

    def label(self, index: int) -> int:
        """The number of its class."""
        return int(self.labels[index])

    def name(self, index: int) -> str:
        """Its number."""
        return f"{self.title} {index}"


class Files:
    """Images in a folder for each class, as ImageNet has them.

    Args:
        folder: The folder of these folders.
        classes: Their names, in order.

    Raises:
        RBNValueError: There is no image.
    """

    def __init__(self, folder: Path, classes: Sequence[str]) -> None:
        self.classes = classes
        found = [
            (os.path.join(parent, file), number)
            for number, name in enumerate(classes)
            for parent, _, files in sorted(os.walk(folder / name, followlinks=True))
            for file in sorted(files)
            if file.lower().endswith(SUFFIXES)
        ]
        if not found:
            raise RBNValueError(
                f"train: expected images ({', '.join(SUFFIXES)}) in the folders of {folder}, got none. "
                "Put those of every class into its folder."
            )
        # Arrays, and not lists of objects, so that worker processes get them fast.
        self.paths = np.array([path for path, _ in found])
        self.labels = np.array([number for _, number in found])

    def __len__(self) -> int:
        return len(self.paths)

    def image(self, index: int) -> Image.Image:
        """One of them, decoded."""
        with Image.open(str(self.paths[index])) as opened:
            return opened.convert("RGB")

    def label(self, index: int) -> int:
        """The number of its class."""
        return int(self.labels[index])

    def name(self, index: int) -> str:
        """Its path."""
        return str(self.paths[index])


def open_data(data: str) -> tuple[Source, Source]:
    """The images to train with, and those to evaluate with.

        training, evaluation = open_data("digits")

    Args:
        data: "digits", the 1797 images inside scikit-learn, of which every fourth is for evaluation;
            "cifar10:DIR" or "cifar100:DIR", the python batches that their authors publish, unpacked;
            "imagefolder:DIR", with the folders DIR/train and DIR/val, and in each a folder for every class.

    Raises:
        RBNValueError: The kind is unknown, or the folder is missing, empty, or has one class alone.
    """
    kind, _, place = data.partition(":")
    if kind not in READERS or (kind == "digits") != (not place):
        raise RBNValueError(
            f"train: expected data to be one of {', '.join(KINDS)}, got {data!r}. Give for example "
            "--data imagefolder:/path/to/imagenet."
        )
    if place and not Path(place).is_dir():
        raise RBNValueError(
            f"train: expected a folder with the data, got {place!r}, which is none. Give its path: --data "
            f"{kind}:/path/to/folder."
        )
    return READERS[kind](Path(place))


def _digits(_: Path) -> tuple[Source, Source]:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.repeat(np.rint(bunch.images * (255 / 16)).astype(np.uint8)[..., None], 3, axis=-1)
    chosen = np.arange(len(images)) % 4 == 3
    classes = [str(name) for name in bunch.target_names]
    training, evaluation = (
        Arrays("digit", images[part], bunch.target[part], classes) for part in (~chosen, chosen)
    )
    return training, evaluation


def _cifar10(folder: Path) -> tuple[Source, Source]:
    names = [f"data_batch_{number}" for number in range(1, 6)]
    return _cifar(folder, "cifar-10-batches-py", names, "test_batch", "labels", 10)


def _cifar100(folder: Path) -> tuple[Source, Source]:
    return _cifar(folder, "cifar-100-python", ["train"], "test", "fine_labels", 100)


def _cifar(
    folder: Path, usual: str, training: list[str], evaluation: str, key: str, count: int
) -> tuple[Source, Source]:
    """The images of CIFAR.

    Args:
        folder: Where the files are, or the folder that holds theirs.
        usual: What that is called in the published archive.
        training: The files to train with.
        evaluation: The one to evaluate with.
        key: What the classes are called in them.
        count: How many classes there are.
    """
    folder = folder / usual if (folder / usual).is_dir() else folder
    if absent := [name for name in (*training, evaluation) if not (folder / name).is_file()]:
        raise RBNValueError(
            f"train: expected CIFAR's python version in {folder}, got no {', '.join(absent)}. Unpack the "
            f"published archive, and give the folder that holds {usual}."
        )
    classes = [str(number) for number in range(count)]

    def read(names: list[str]) -> Source:
        parts = [_batch(folder / name, key, count) for name in names]
        images, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return Arrays(f"image of {folder}", images, labels, classes)

    return read(training), read([evaluation])


def _batch(path: Path, key: str, count: int) -> tuple[Any, Any]:
    """The images and classes of a file of CIFAR."""
    try:
        content = _Machine(memoryview(path.read_bytes())).run()
        data = content["data"].array
        labels = np.asarray(content[key])
        images = data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        if images.dtype != np.uint8 or labels.shape != images.shape[:1] or labels.dtype.kind != "i":
            raise ValueError(f"{labels.shape} classes for {images.shape} images of {images.dtype}")
        if len(labels) and not 0 <= labels.min() <= labels.max() < count:
            raise ValueError(f"classes up to {labels.max()}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RBNValueError(
            f"train: expected a file of CIFAR's python version, got {path} ({error}). Unpack the published "
            "archive again."
        ) from error
    return np.ascontiguousarray(images), labels


class _Machine(pickles.Machine):
    """The machine for files that Python 2 wrote: bytes are texts there, and notes are counted from 1."""

    def text(self, size: int) -> None:
        """A text, or the bytes of an array, which are longer than any text in these files."""
        taken = self.take(self.number(size))
        if len(taken) > 1000:
            self.push(taken)
        else:
            self.push(str(taken, "utf-8", "replace"))

    def put(self, index: int) -> None:
        """Note the uppermost value."""
        if index == 1 and not self.memo:
            self.memo.append(None)
        super().put(index)

    def made(self, means: str, arguments: tuple[Any, ...]) -> Any:
        """What a known function makes of its arguments; truth values are numbers here."""
        if means == "dtype" and arguments[1:] == (0, 1):
            arguments = (arguments[0], False, True)
        return super().made(means, arguments)


def _imagefolder(folder: Path) -> tuple[Source, Source]:
    found = {part: folder / part for part in ("train", "val")}
    if absent := [name for name, path in found.items() if not path.is_dir()]:
        raise RBNValueError(
            f"train: expected the folders train and val in {folder}, got no {' and no '.join(absent)}. Put "
            "a folder for every class into each of them."
        )
    classes = sorted(path.name for path in found["train"].iterdir() if path.is_dir())
    if len(classes) < 2:
        raise RBNValueError(
            f"train: expected a folder for each of several classes in {found['train']}, got "
            f"{', '.join(classes) or 'none'}. Put the images of every class into a folder of its own."
        )
    if strange := sorted({path.name for path in found["val"].iterdir() if path.is_dir()} - set(classes)):
        raise RBNValueError(
            f"train: expected the classes of {found['train']} in {found['val']}, got {strange[0]}, too. "
            "Both need the same folders."
        )
    return Files(found["train"], classes), Files(found["val"], classes)


READERS = {"digits": _digits, "cifar10": _cifar10, "cifar100": _cifar100, "imagefolder": _imagefolder}
"""What opens each kind of data."""
