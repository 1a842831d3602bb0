"""PyTorch's SyncBatchNorm, held to the reference: alone, and on two processes of gloo."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from findings import declared
from torch import distributed, nn
from torch_batch_norm import COUNTED, NAMES

from rbn.conformance.shares import Devices, processes, start
from rbn.conformance.subject import Subject
from rbn.conformance.subjects.torch import TorchModule
from rbn_core.config import Config

FINDINGS = {"subject": (COUNTED,)}
NOT_HERE = "two processes with tensors on the CPU are refused: 'expected input tensor to be on GPU or XPU'"


class Synchronized(TorchModule):
    """SyncBatchNorm, which shares its statistics with the other processes of a group."""

    devices = 2

    def spread(self, shares: tuple[int, ...]) -> Subject:
        """The layer on so many processes."""
        return Devices(self.name, processes("torch_sync_batch_norm:device", len(shares), launch), shares)


def make(config: Config, dtype: torch.dtype) -> nn.Module:
    """The SyncBatchNorm with a case's options."""
    options = {"affine": config.gamma, "track_running_stats": config.track_running_stats, "dtype": dtype}
    return nn.SyncBatchNorm(config.num_features, config.eps, config.momentum, **options)


def launch(script: list[str], world: int, folder: Path) -> list[subprocess.Popen[bytes]]:
    """Start a process for each rank, which finds this file."""
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    environments = [{"RANK": str(rank), "PYTHONPATH": path} for rank in range(world)]
    return [start([sys.executable, *script], folder / f"{e['RANK']}.log", **e) for e in environments]


def device(world: int, folder: Path) -> tuple[int, Subject]:
    """The layer on one of several processes."""
    rank = int(os.environ["RANK"])
    store = f"file://{folder / 'rendezvous'}"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    return rank, subject


subject = Synchronized(
    "torch SyncBatchNorm",
    make,
    NAMES,
    momentum="new",
    fixed={"running_var": "unbiased"},
    absent={"bn/train/*/shares=*": NOT_HERE},
    expected_failures=declared(FINDINGS["subject"]),
)
