"""Batch statistics over all processes of a run under MPI.

A process that raises alone does not end: Jittor's exit waits in MPI for the others, which wait for it.
`os._exit` or `mpirun --timeout` ends them all.

A step of minutes is no such wait: all processes of Jittor on a machine take turns at one lock, to compile and
to load what is compiled. For a Python of another name (python, python3) they compile everything again.
"""

from __future__ import annotations

import math

import jittor as jt
from jittor import Var

from rbn.backends.jittor.functional import constant


class AllReduce(jt.Function):
    """The sum over all processes; its gradient is the sum of theirs.

    Executed at once, as is its gradient: processes have to add in one order, that of the program, and each
    would choose its own when it comes to its lazy operations.
    """

    def execute(self, values: Var) -> Var:
        """Sum a copy over all processes."""
        return values.mpi_all_reduce("add").sync()

    def grad(self, gradient: Var | None) -> Var | None:
        """Sum the gradients, differentiably; Jittor has none behind a step function."""
        return None if gradient is None else AllReduce.apply(gradient)


class Share:
    """One process's share of a batch that is spread over all; shares may differ in size and be empty.

    Args:
        x: This process's images, (N, C, *spatial).

    Attributes:
        values: n of eq. 2, the number of values behind each channel's statistic, over all processes.
    """

    def __init__(self, x: Var) -> None:
        self.positions = math.prod(x.shape[2:])
        # A whole number in float64: Jittor hands int64 to MPI as a type that has no sum.
        self.values = int(AllReduce.apply(constant(x.shape[0] * self.positions)).item())

    def average(self, plane_values: Var) -> Var:
        """(N, C) values of this process's planes to their mean over the whole batch, (C,)."""
        total = AllReduce.apply(plane_values.sum(0) * constant(self.positions))
        return total / constant(self.values)
