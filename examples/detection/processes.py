"""The processes of a run: one, or as many as torchrun starts, each on a device of its own."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class Processes:
    """This process among all.

    Args:
        rank: Its number; process 0 prints, saves and scores.
        world: How many there are.
        device: Where it computes.
    """

    rank: int
    world: int
    device: torch.device

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model, with gradients that are means over all processes."""
        if self.world == 1:
            return model
        return DistributedDataParallel(model, [self.device] if self.device.type == "cuda" else None)

    def any(self, flag: bool) -> bool:
        """Whether the flag is true in any process."""
        if self.world == 1:
            return flag
        raised = torch.tensor(int(flag), device=self.device)
        distributed.all_reduce(raised, distributed.ReduceOp.MAX)
        return bool(raised)

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, in process 0; nothing in the others."""
        if self.world == 1:
            return [value]
        values = [None] * self.world if self.rank == 0 else None
        distributed.gather_object(value, values)
        return values or []


@contextmanager
def processes(device: str) -> Iterator[Processes]:
    """Join the others.

    Args:
        device: "cuda" or "cpu"; empty for a GPU where there is one.
    """
    rank, world, local = (int(os.environ.get(name, at)) for name, at in ENVIRONMENT.items())
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind not in ("cuda", "cpu"):
        raise SystemExit(f"detection: expected --device cuda or cpu, got {device!r}.")
    if kind == "cuda" and local >= torch.cuda.device_count():
        raise SystemExit(
            f"detection: expected a GPU for process {local} of this machine, got {torch.cuda.device_count()} "
            "GPUs. Start fewer processes, or give --device cpu."
        )
    chosen = torch.device(kind, local) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(chosen)
    if world > 1:
        distributed.init_process_group("nccl" if kind == "cuda" else "gloo")
    try:
        yield Processes(rank, world, chosen)
    finally:
        if world > 1:
            distributed.destroy_process_group()


ENVIRONMENT = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
"""What torchrun says, and what counts without it."""
