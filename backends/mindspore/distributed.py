"""Batch statistics over all processes of a group."""

from __future__ import annotations

import functools
import hashlib
from collections import Counter
from typing import Any

import mindspore as ms
from mindspore import Tensor, nn, ops
from mindspore.communication import GlobalComm, create_group, get_group_size, get_rank

from rbn.backends.mindspore.functional import scalar
from rbn_core.errors import RBNError, RBNTypeError, RBNValueError

Groups = tuple[tuple[int, ...], ...]

DIGIT = 4096
"""The base in which counts are summed: a CPU reduces nothing wider than float32, exact up to 2^24."""


@ms.jit_class
class Share:
    """One process's share of a batch that is spread over a group; shares may differ in size.

    A graph makes objects of constants only, so the number of values over all processes, which is known when
    the graph runs, is handed from `values` to `average`.

    Args:
        own_values: How many values of each channel this process has.
        group: The name of the processes' group.
    """

    def __init__(self, own_values: int, group: str) -> None:
        self.own_values = own_values
        self.group = group

    def values(self, dtype: Any) -> Tensor:
        """n of eq. 2, the number of values behind each channel's statistic, over all processes."""
        digits = Tensor([self.own_values // DIGIT, self.own_values % DIGIT], ms.float32)
        digits = self.total(digits).astype(dtype)
        return digits[0] * DIGIT + digits[1]

    def average(self, plane_values: Tensor, values: Tensor) -> Tensor:
        """(N, C) values of this process's planes to their mean over the whole batch, (C,)."""
        fraction = scalar(self.own_values, plane_values) / values
        return self.total(ops.mean(plane_values, 0) * fraction)

    def total(self, x: Tensor) -> Tensor:
        """The sum over all processes; its gradient is the sum of theirs."""
        if x.dtype != ms.float64:
            return ops.AllReduce(ops.ReduceOp.SUM, self.group)(x)
        sum_gradients = ops.InsertGradientOf(self.total_of_doubles)
        return sum_gradients(x + ops.stop_gradient(self.total_of_doubles(x) - x))

    def total_of_doubles(self, x: Tensor) -> Tensor:
        """The sum where MindSpore's AllReduce refuses the dtype: three float32 hold what a float64 does."""
        high = x.astype(ms.float32)
        rest = x - high.astype(ms.float64)
        middle = rest.astype(ms.float32)
        low = (rest - middle.astype(ms.float64)).astype(ms.float32)
        parts = ops.AllGather(self.group)(ops.stack((high, middle, low)))
        return ops.sum(parts.astype(ms.float64), 0)


class StandIn(nn.Cell):
    """One image of zeros for an empty share, of which MindSpore computes neither means nor gradients.

    Its gradient runs to the empty images, so that this process takes part in the reductions of the backward
    pass wherever the others do.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def construct(self, x: Tensor) -> Tensor:
        """(1, C, 1, ...) of the rank and dtype of `x`."""
        return ops.zeros((1, self.channels, *(1,) * (x.ndim - 2)), x.dtype)

    def bprop(self, x: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor]:
        """Nothing, in the shape of `x`."""
        return (ops.zeros(x.shape, x.dtype),)


class Emptied(nn.Cell):
    """An empty result that depends on the stand-in's, with a gradient of zeros."""

    def construct(self, y: Tensor, x: Tensor) -> Tensor:
        """Nothing, of the shape and dtype of `x`."""
        return ops.zeros(x.shape, x.dtype)

    def bprop(self, y: Tensor, x: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
        """Zeros for the stand-in's result."""
        return ops.zeros_like(y), ops.zeros(x.shape, x.dtype)


def check_groups(process_groups: Any, layer: str) -> Groups | None:
    """The groups as constants of a graph.

    Raises:
        RBNError: They are not lists of different ranks.
    """
    if process_groups is None:
        return None
    way_out = "Pass for example [[0, 1], [2, 3]], or None for all processes together."
    lists = (list, tuple)
    if not isinstance(process_groups, lists) or not all(
        isinstance(ranks, lists) and all(type(rank) is int for rank in ranks) for ranks in process_groups
    ):
        raise RBNTypeError(
            f"{layer}: expected process_groups to be a list of lists of ranks, "
            f"got {process_groups!r}. {way_out}"
        )
    times = Counter(rank for ranks in process_groups for rank in ranks)
    if any(rank < 0 or count > 1 for rank, count in times.items()):
        raise RBNValueError(
            f"{layer}: expected process_groups of different ranks from 0 on, "
            f"got {process_groups!r}. {way_out}"
        )
    return tuple(tuple(ranks) for ranks in process_groups)


@ops.constexpr
def own_group(process_groups: Groups | None, layer: str) -> str:
    """The name of the group that this process shares its batch with; empty where it is alone.

    Raises:
        RBNError: There is no communication, or a rank that it does not have.
    """
    if not GlobalComm.INITED:
        raise RBNError(
            f"{layer}: expected initialized communication to train with sync=True, got none. "
            "Call mindspore.communication.init() in a process that msrun started, or leave sync out."
        )
    size = get_group_size()
    if process_groups is None:
        return GlobalComm.WORLD_COMM_GROUP if size > 1 else ""
    if any(rank >= size for ranks in process_groups for rank in ranks):
        raise RBNValueError(
            f"{layer}: expected process_groups of ranks below {size}, the number of processes, got "
            f"{[list(ranks) for ranks in process_groups]}. Start more processes, or name only these."
        )
    mine = next((ranks for ranks in process_groups if get_rank() in ranks), ())
    return _created(mine) if len(mine) > 1 else ""


@ops.constexpr
def check_shape(shape: tuple[int | None, ...] | None, layer: str) -> None:
    """Refuse a graph for batches of several shapes: each process must know how large its share is.

    Raises:
        RBNValueError: An extent is not known.
    """
    if shape is None or None in shape:
        raise RBNValueError(
            f"{layer}: expected a known shape to train with sync=True in a graph, got {shape}. "
            "Leave set_inputs out, or train in PyNative mode."
        )


@functools.cache
def _created(ranks: tuple[int, ...]) -> str:
    name = "rbn_" + hashlib.sha256(repr(ranks).encode()).hexdigest()  # MindSpore takes 127 characters at most
    create_group(name, list(ranks))
    return name
