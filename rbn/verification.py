"""Whether a ported network gives what it gave: both run on the same photographs, each in its framework."""

from __future__ import annotations

import importlib
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_sample_images

from rbn.porting import CANONICAL, FilePath, fitted, read, renamed, told_format
from rbn_core import execution
from rbn_core.errors import RBNError, RBNValueError
from rbn_core.matching import State
from rbn_core.networks import Network

STEPS = 3
"""How many steps `verify` tells of: reading, and two runs."""

ALLOWED = 1e-4
"""How far a logit may be off, relative to the largest: frameworks round differently, layer after layer."""

LARGEST = 2**28
"""How many numbers the result of a layer may have: a description from a file can ask for any number."""


@dataclass(frozen=True)
class Difference:
    """How far the logits of two networks are apart.

    Args:
        source: Where the first ran: a framework, or "canonical" for NumPy.
        destination: Where the second did.
        largest: The largest difference of a logit.
        relative: The same, relative to the largest logit of the source.
    """

    source: str
    destination: str
    largest: float
    relative: float

    @property
    def allowed(self) -> bool:
        """Whether it is no more than rounding."""
        return self.relative <= ALLOWED


def verify(
    source: FilePath,
    destination: FilePath,
    *,
    source_format: str | None = None,
    destination_format: str | None = None,
    key: str | None = None,
    network: str | None = None,
    norm: str | Mapping[str, Any] | None = None,
    num_classes: int | None = None,
    rename: Mapping[str, str] | None = None,
    kinds: Mapping[str, str] | None = None,
    progress: Callable[[str], None] = lambda step: None,
) -> Difference:
    """Run a network from the file it was ported from and from the one it was ported to.

    Each runs in its file's framework, in a process of its own, and in NumPy from a canonical file.

    Args:
        source: The file that was ported, and with the other arguments as `rbn.porting.port` took them.
        destination: The file that was written.
        source_format: As in `port`.
        destination_format: As in `port`.
        key: As in `port`.
        network: As in `port`.
        norm: As in `port`.
        num_classes: As in `port`.
        rename: As in `port`.
        kinds: As in `port`.
        progress: Called with what is done next, in words.

    Raises:
        RBNError: The network is not known, or cannot run.
    """
    source, destination = Path(source), Path(destination)
    reader = told_format(source, source_format, writes=False)
    writer = told_format(destination, destination_format, writes=True)
    progress(f"reading {source} again, for its network")
    content, _ = fitted(read(source, reader, kinds, key), rename, network, norm, num_classes)
    if content.network is None:
        raise RBNValueError(
            "port: expected a network to verify, got arrays that belong to none. Name it with --network."
        )
    images = photographs(32 if content.network.name.startswith("cifar_") else 224)
    check_runs(content.network, images.shape)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "network.json").write_text(content.network.to_json())
        np.save(Path(folder, "images.npy"), images)
        names = {"rename": dict(rename or {}), "kinds": dict(kinds or {}), "key": key}
        for path, framework, changes in ((source, reader, names), (destination, writer, {})):
            where = "NumPy" if framework == CANONICAL else framework
            progress(f"running {path.name} in {where}")
            found.append(_logits_in_a_process(Path(folder), path, framework, changes))
    largest = float(np.max(np.abs(found[0] - found[1])))
    return Difference(reader, writer, largest, largest / float(np.max(np.abs(found[0]))))


def photographs(size: int) -> NDArray[np.float32]:
    """scikit-learn's two photographs, (2, 3, size, size), with values of about mean 0 and deviation 1."""
    images = []
    for image in load_sample_images().images:
        middle = Image.fromarray(image[:, 106:533])  # 427 x 427
        images.append(np.asarray(middle.resize((size, size)), np.float32) / 255)
    return ((np.stack(images).transpose(0, 3, 1, 2) - 0.45) / 0.25).astype(np.float32)


def check_runs(network: Network, images: tuple[int, ...]) -> None:
    """Refuse a network that no machine could run on such images.

    Raises:
        RBNValueError: A layer has no result, or a gigantic one.
    """
    try:
        shapes = network.shapes(images)
        wrong = [
            name
            for name, shape in shapes.items()
            if min(shape) < 1
            or not all(type(extent) is int for extent in shape)
            or math.prod(shape) > LARGEST
        ]
    except (TypeError, ValueError, ArithmeticError, LookupError, AssertionError) as error:
        wrong = [str(error)]
    if wrong:
        raise RBNValueError(
            f"port: expected a network that runs on images of {images[2]} pixels, got {network.name}, which "
            f"does not at {', '.join(wrong)}. Verify with the network that these weights are of."
        )


def logits(network: Network, state: State, images: NDArray[np.float32], framework: str) -> NDArray[Any]:
    """A network's result in evaluation.

    Args:
        network: What to run.
        state: Its arrays under canonical names.
        images: (N, C, H, W).
        framework: Where; "canonical" is NumPy.
    """
    if framework == CANONICAL:
        return execution.run(network, state, images)[0]
    backend = importlib.import_module(f"rbn.backends.{framework}")
    if framework == "flax":
        import jax

        model = backend.Network(network)
        variables, _ = backend.from_numpy(model, state)
        apply = jax.jit(lambda variables, x: model.apply(variables, x, train=False))
        return np.asarray(apply(variables, images.transpose(0, 2, 3, 1)))
    model = backend.Network(network)
    backend.from_numpy(model, state)
    if framework == "torch":
        import torch

        with torch.no_grad():
            return np.asarray(model.eval()(torch.from_numpy(images)))
    if framework == "mindspore":
        import mindspore

        return np.asarray(model.set_train(False)(mindspore.Tensor(images)).asnumpy())
    import jittor

    model.eval()
    return np.asarray(model(jittor.array(images)).numpy())


def _logits_in_a_process(folder: Path, path: Path, framework: str, changes: dict[str, Any]) -> NDArray[Any]:
    """The logits of the network in `folder` with the arrays of a file."""
    task = {"path": str(path.resolve()), "framework": framework, **changes}
    done = subprocess.run(
        [sys.executable, "-m", __name__, str(folder), json.dumps(task)],
        capture_output=True,
        text=True,
        errors="replace",
    )
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise RBNValueError(
            f"port: expected {path} to run in {framework}, got {reason}. Without --verify it is ported alone."
        )
    return np.load(folder / "logits.npy")


def main(folder: Path, task: Mapping[str, Any]) -> None:
    """The body of such a process."""
    content = read(Path(task["path"]), task["framework"], task.get("kinds"), task.get("key"))
    content, _ = renamed(content, task.get("rename", {}))
    network = Network.from_json((folder / "network.json").read_text())
    images = np.load(folder / "images.npy")
    np.save(folder / "logits.npy", logits(network, content.state, images, task["framework"]))


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), json.loads(sys.argv[2]))
    except RBNError as error:
        sys.exit(str(error))
