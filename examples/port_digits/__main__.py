"""Train a small RBN network on handwritten digits in PyTorch and run it in all four frameworks.

python examples/port_digits

Every framework runs in a process of its own and gets nothing but a safetensors file. The table says how many
test images each classifies correctly and how far its logits are from PyTorch's; the exit status is 1 if any
class differs or a logit is off by more than 1e-5 of the largest.
"""

import importlib
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from data import digits
from rich.console import Console
from rich.table import Table

FRAMEWORKS = ("torch", "flax", "mindspore", "jittor")
ALLOWED = 1e-5


def main(folder: Path) -> int:
    """Train, move, compare; the exit status."""
    console = Console()
    weights = folder / "network.safetensors"
    with console.status("training in PyTorch"):
        run("train", "torch", weights)
    images, classes = digits(test=True)
    table = Table("framework", "correct", "as PyTorch", "largest logit", "difference", "relative")
    failed = False
    for framework in FRAMEWORKS:
        with console.status(f"running in {framework} (Jittor compiles for some minutes on first use)"):
            run("logits", framework, weights)
        logits = np.load(logits_of(framework, weights))
        torch = np.load(logits_of("torch", weights))
        same = np.sum(logits.argmax(axis=1) == torch.argmax(axis=1))
        correct = np.sum(logits.argmax(axis=1) == classes)
        largest, difference = np.max(np.abs(torch)), np.max(np.abs(logits - torch))
        table.add_row(
            framework,
            f"{correct} of {len(images)}",
            f"{same} of {len(images)}",
            f"{largest:.1f}",
            f"{difference:.1e}",
            f"{difference / largest:.1e}",
        )
        failed |= bool(same < len(images) or difference > ALLOWED * largest)
    console.print(table)
    return int(failed)


def run(task: str, framework: str, weights: Path) -> None:
    """Do a task in a framework, in a process of its own."""
    subprocess.run([sys.executable, Path(__file__).parent, task, framework, weights], check=True)


def work(task: str, framework: str, weights: Path) -> None:
    """The body of such a process."""
    module = importlib.import_module(f"in_{framework}")
    if task == "train":
        module.train(weights, *digits(test=False))
    else:
        np.save(logits_of(framework, weights), module.logits(weights, digits(test=True)[0]))


def logits_of(framework: str, weights: Path) -> Path:
    """Where a framework's logits go."""
    return weights.with_name(f"{framework}.npy")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        work(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            sys.exit(main(Path(temporary)))
