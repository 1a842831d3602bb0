"""Batch statistics over all devices of a named axis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jax import Array

from rbn.backends.flax.functional import batch_average

AxisName = Any
"""The name of a mapped axis, or a tuple of names, as in `jax.lax.pmean`."""

IndexGroups = Sequence[Sequence[int]] | None


class Share:
    """One device's share of a batch that is spread over an axis; all shares are of one shape.

    Args:
        axis_name: The axis of `pmap`, `vmap` or `shard_map`; `None` where the share is the whole batch.
        axis_index_groups: The groups of devices that have a batch in common; all by default.

    Attributes:
        devices: How many shares make up the batch.
    """

    def __init__(self, axis_name: AxisName, axis_index_groups: IndexGroups) -> None:
        self.axis_name = axis_name
        self.axis_index_groups = axis_index_groups
        self.devices: int = 1
        if axis_name is not None:
            self.devices = jax.lax.psum(1, axis_name, axis_index_groups=axis_index_groups)

    def average(self, plane_values: Array) -> Array:
        """(N, C) values of this device's planes to their mean over the whole batch, (C,)."""
        mean = batch_average(plane_values)
        if self.axis_name is None:
            return mean
        return jax.lax.pmean(mean, self.axis_name, axis_index_groups=self.axis_index_groups)
