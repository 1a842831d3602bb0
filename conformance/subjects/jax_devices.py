"""Every way in which JAX's devices share a batch."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# On a CPU JAX has several devices only if told so before it first runs something; flags of the user stay.
FLAGS = os.environ.get("XLA_FLAGS", "")
if "--xla_force_host_platform_device_count" not in FLAGS:
    os.environ["XLA_FLAGS"] = f"{FLAGS} --xla_force_host_platform_device_count=4"

Step = Callable[..., Any]
"""(layer, stored, x, cotangent, training) to ((y, dx), the parameters' gradients, stored): all it stores."""

FIXED = (0, 4)
"""The arguments of a step that are no arrays."""

AXIS = "batch"
"""What the layers call the axis over which a batch is spread."""


@cache
def compiled(step: Step) -> Step:
    """The step under `jit`."""
    return jax.jit(step, static_argnums=FIXED)


@cache
def shared(step: Step, way: str, world: int) -> Step:
    """The step on so many devices, each with its part of the images.

    Args:
        step: One device's step.
        way: One of `cases.WAYS`. In all but "jit" the layer has to share its statistics over `AXIS`.
        world: How many devices there are.
    """
    devices = jax.devices()[:world]
    if len(devices) < world:
        raise RuntimeError(
            f"expected {world} devices, got {len(devices)}. On a CPU, set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={world} before JAX is imported."
        )
    mesh = Mesh(np.array(devices), (AXIS,))
    if way == "jit":
        return on_sharded_arrays(step, NamedSharding(mesh, PartitionSpec(AXIS)))
    if way.startswith("shard_map"):
        return by_shard_map(step, mesh, checked=way == "shard_map")
    if way == "vmap":
        return by_part(by_vmap(step), world)
    by_pmap = jax.pmap(
        summed(step),
        AXIS,
        in_axes=(None, None, 0, 0, None),
        out_axes=(0, None, None),
        static_broadcasted_argnums=FIXED,
        devices=devices,
    )
    return by_part(by_pmap, world)


def on_sharded_arrays(step: Step, sharding: NamedSharding) -> Step:
    """JAX itself sees to the statistics of an array that lies on several devices."""

    def run(layer: Any, stored: Any, x: jax.Array, cotangent: jax.Array, training: bool) -> Any:
        x, cotangent = jax.device_put((x, cotangent), sharding)
        return compiled(step)(layer, stored, x, cotangent, training)

    return run


def by_shard_map(step: Step, mesh: Mesh, checked: bool) -> Step:
    """With its check, JAX knows that the parameters are everyone's and sums their gradients itself."""
    one = step if checked else summed(step)

    def run(layer: Any, stored: Any, x: jax.Array, cotangent: jax.Array, training: bool) -> Any:
        images, everywhere = PartitionSpec(AXIS), PartitionSpec()
        mapped = jax.shard_map(
            lambda *arrays: one(layer, *arrays, training),
            mesh=mesh,
            in_specs=(everywhere, images, images),
            out_specs=(images, everywhere, everywhere),
            check_vma=checked,
        )
        return mapped(stored, x, cotangent)

    return compiled(run)


def by_vmap(step: Step) -> Step:
    """The parts of the batch along an axis of their own; what is everyone's must come out without it."""

    def run(layer: Any, stored: Any, x: jax.Array, cotangent: jax.Array, training: bool) -> Any:
        mapped = jax.vmap(
            lambda *arrays: summed(step)(layer, *arrays, training), (None, 0, 0), (0, None, None), AXIS
        )
        return mapped(stored, x, cotangent)

    return compiled(run)


def by_part(step: Step, world: int) -> Step:
    """A step that has an axis for the parts of the batch, as a step on the batch."""

    def run(layer: Any, stored: Any, x: jax.Array, cotangent: jax.Array, training: bool) -> Any:
        x, cotangent = (value.reshape(world, -1, *value.shape[1:]) for value in (x, cotangent))
        images, gradients, stored = step(layer, stored, x, cotangent, training)
        return [value.reshape(-1, *value.shape[2:]) for value in images], gradients, stored

    return run


def summed(step: Step) -> Step:
    """The step with the sum of all devices' gradients of the parameters."""

    def run(*arguments: Any) -> Any:
        images, gradients, stored = step(*arguments)
        return images, jax.lax.psum(gradients, AXIS), stored

    return run
