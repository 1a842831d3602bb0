"""Batch statistics over all processes of a group."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


class AllReduce(torch.autograd.Function):
    """The sum over all processes; its gradient is the sum of theirs."""

    @staticmethod
    def forward(tensor: Tensor, group: ProcessGroup | None) -> Tensor:
        """Sum a copy over the group."""
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ProcessGroup | None], output: Tensor) -> None:
        """Remember the group."""
        _, ctx.group = inputs

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Sum the gradients, differentiably."""
        return AllReduce.apply(gradient, ctx.group), None


class Share:
    """One process's share of a batch that is spread over a group; shares may differ in size and be empty.

    Args:
        x: This process's images, (N, C, *spatial).
        group: The processes; all by default.

    Attributes:
        values: n of eq. 2, the number of values behind each channel's statistic, over all processes.
    """

    def __init__(self, x: Tensor, group: ProcessGroup | None) -> None:
        self.group = group
        self.positions = x.shape[2:].numel()
        values = torch.tensor([x.shape[0] * self.positions], device=x.device)
        dist.all_reduce(values, group=group)
        self.values = int(values)

    def average(self, plane_values: Tensor) -> Tensor:
        """(N, C) values of this process's planes to their mean over the whole batch, (C,)."""
        total: Tensor = AllReduce.apply(plane_values.sum(dim=0) * self.positions, self.group)
        return total / self.values
