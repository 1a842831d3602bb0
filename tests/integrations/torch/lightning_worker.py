"""Two processes of Lightning on the CPU, which train in several ways: python lightning_worker.py FOLDER.

A way has a name and a layer. "ours" shares the statistics by `convert_sync_rbn`, "flag" by
`sync_batchnorm=True`, and "alone" shares none. Each process writes its model's state, or what was raised, to
FOLDER/WAY-LAYER-RANK.pt.
"""

import os
import runpy
import sys
import warnings
from pathlib import Path

warnings.simplefilter("ignore")
runpy.run_path(str(Path(__file__).with_name("conftest.py")))

import lightning  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils.data import DataLoader, TensorDataset  # noqa: E402

from rbn.backends import torch as backend  # noqa: E402

IMAGES = torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(3))
LABELS = torch.arange(12) % 2
RATE = 0.5


class Model(lightning.LightningModule):
    """A small classifier."""

    def __init__(self, layer):
        super().__init__()
        torch.manual_seed(0)
        norm = nn.BatchNorm2d(4) if layer == "BatchNorm" else getattr(backend, layer)(4)
        self.net = nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))

    def training_step(self, batch, _):
        images, labels = batch
        return nn.functional.cross_entropy(self.net(images), labels)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), RATE)


def loader(batch_size):
    return DataLoader(TensorDataset(IMAGES, LABELS), batch_size=batch_size)


def trainer(**options):
    """A quiet trainer on the CPU."""
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    return lightning.Trainer(accelerator="cpu", **dict.fromkeys(quiet, False), **options)


WAYS = (("ours", "RBN"), ("ours", "BNET"), ("alone", "RBN"), ("flag", "RBN"), ("flag", "BatchNorm"))


def main(folder):
    for way, layer in WAYS:
        model = Model(layer)
        if way == "ours":
            backend.convert_sync_rbn(model)
        training = trainer(devices=2, strategy="ddp", max_epochs=2, sync_batchnorm=way == "flag")
        try:
            training.fit(model, loader(batch_size=6))
        except Exception as error:
            result = f"{type(error).__name__}: {error}"
        else:
            result = model.net.state_dict()
        torch.save(result, Path(folder) / f"{way}-{layer}-{training.global_rank}.pt")
    os._exit(0)  # gloo's threads outlive the group


if __name__ == "__main__":
    main(*sys.argv[1:])
