"""Batch statistics over all devices of a named axis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from rbn.backends.flax.functional import batch_average, ratio

AxisName = Any
"""The name of a mapped axis, or a tuple of names, as in `jax.lax.pmean`."""

IndexGroups = Sequence[Sequence[int]] | None


class Share:
    """One device's share of a batch that is spread over axes; all shares are of one shape.

    Args:
        axis_name: The axis of `pmap`, `vmap` or `shard_map`; `None` where the share is the whole batch.
        axis_index_groups: The groups of devices that have a batch in common; all by default.
        spatial_axis_name: The axes along which devices share every image; `None` where they have whole ones.

    Attributes:
        devices: How many shares make up the batch.
        alone: Whether this is all of it.
    """

    def __init__(
        self, axis_name: AxisName, axis_index_groups: IndexGroups, spatial_axis_name: AxisName = None
    ) -> None:
        self.spatial = names(spatial_axis_name)
        # BatchNorm has one option for both kinds of axes.
        self.batch = tuple(name for name in names(axis_name) if name not in self.spatial)
        self.axis_index_groups = axis_index_groups
        self.alone = not self.batch and not self.spatial
        self.devices: int = 1
        if self.batch:
            self.devices = jax.lax.psum(1, self.batch, axis_index_groups=axis_index_groups)
        if self.spatial:
            self.devices *= jax.lax.psum(1, self.spatial)

    def average(self, plane_values: Array, counts: Array | None = None) -> Array:
        """(N, C) values of this device's planes to their mean over the whole batch, (C,).

        Args:
            plane_values: (N, C).
            counts: How many numbers each is of, where that differs.
        """
        if counts is None:
            return self._mean(batch_average(plane_values))
        return ratio(self._mean((plane_values * counts).sum(axis=0)), self._mean(counts.sum(axis=0)))

    def whole(self, values: Array) -> Array:
        """Means over this device's part of every plane to those over the planes."""
        return jax.lax.pmean(values, self.spatial) if self.spatial else values

    def count(self, mask: Any, x: Any, axis: int) -> Any:
        """How many values every channel has in the whole batch; with a mask an array, (C,)."""
        if mask is None:
            return x.size // x.shape[axis] * self.devices
        others = tuple(place for place in range(x.ndim) if place != axis % x.ndim)
        counts = jnp.broadcast_to(jnp.asarray(mask, bool), x.shape).sum(others, dtype=jnp.float32)
        return self.devices * self._mean(self.whole(counts))

    def _mean(self, values: Array) -> Array:
        """Over the devices that share the batch."""
        if not self.batch:
            return values
        return jax.lax.pmean(values, self.batch, axis_index_groups=self.axis_index_groups)


def names(axis_name: AxisName) -> tuple[Any, ...]:
    """The name, or the names, of a mapped axis as a tuple."""
    if axis_name is None:
        return ()
    return tuple(axis_name) if isinstance(axis_name, tuple | list) else (axis_name,)
