"""Every way to spread a batch over 4 devices, against the whole batch on one; prints deviations as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import rbn.backends.flax as rbn_flax
from rbn.backends.flax import from_numpy, to_numpy

DEVICES = 4
LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "RBN": ("RBN", {}),
    "RBN of deviations": ("RBN", {"centering": "channel_std", "scaling": "channel_std"}),
    "RBN of positions": ("RBN", {"centering": "spatial_mean", "scaling": "spatial_std"}),
    "IEBN": ("IEBN", {}),
    "BNET": ("BNET", {}),
}

Step = Callable[[Any, jax.Array, jax.Array], Any]


def linen_step(name: str, options: dict[str, Any], state: Any) -> tuple[Step, Any]:
    """A function of (variables, x, cotangent), and the variables."""
    layer = getattr(rbn_flax, name)(use_running_average=False, **options)

    def step(variables: Any, x: jax.Array, cotangent: jax.Array) -> Any:
        def loss(params: Any, x: jax.Array) -> Any:
            y, stats = layer.apply(variables | {"params": params}, x, mutable=["batch_stats"])
            return (y * cotangent).sum(), (y, stats["batch_stats"])

        (_, (y, stats)), (dparams, dx) = jax.value_and_grad(loss, (0, 1), has_aux=True)(
            variables["params"], x
        )
        return (y, dx), dparams, stats

    return step, from_numpy(layer, state)[0]


def nnx_step(name: str, options: dict[str, Any], state: Any) -> tuple[Step, Any]:
    """A function of (parameters and statistics, x, cotangent), and these."""
    layer = getattr(rbn_flax.nnx, name)(5, rngs=nnx.Rngs(0), **options)
    from_numpy(layer, state)
    graphdef, params, stats = nnx.split(layer, nnx.Param, nnx.BatchStat)

    def step(stored: Any, x: jax.Array, cotangent: jax.Array) -> Any:
        def loss(params: Any, x: jax.Array) -> Any:
            layer = nnx.merge(graphdef, params, stored[1], copy=True)
            y = layer(x)
            return (y * cotangent).sum(), (y, nnx.state(layer, nnx.BatchStat))

        (_, (y, stats)), (dparams, dx) = jax.value_and_grad(loss, (0, 1), has_aux=True)(stored[0], x)
        return (y, dx), dparams, stats

    return step, (params, stats)


def summed(step: Step) -> Step:
    """The step with the parameters' gradients of all devices, where JAX does not sum them itself."""

    def total(stored: Any, x: jax.Array, cotangent: jax.Array) -> Any:
        images, dparams, stats = step(stored, x, cotangent)
        return images, jax.lax.psum(dparams, "batch"), stats

    return total


def joined(result: Any) -> Any:
    """What a mapped step returns, as the whole batch's: images joined, the rest that of the first device."""
    images, dparams, stats = result
    images = jax.tree.map(lambda image: image.reshape(-1, *image.shape[2:]), images)
    return images, *jax.tree.map(lambda leaf: leaf[0], (dparams, stats))


def ways(synchronised: Step, plain: Step) -> Iterator[tuple[str, Step]]:
    """Every way, as a function of the whole batch."""
    mesh = Mesh(np.array(jax.devices()), ("batch",))

    def split(x: jax.Array) -> jax.Array:
        return x.reshape(DEVICES, -1, *x.shape[1:])

    for name, mapped in (("vmap", jax.vmap), ("pmap", jax.pmap)):
        step = mapped(summed(synchronised), axis_name="batch", in_axes=(None, 0, 0))
        yield name, lambda stored, x, g, step=step: joined(step(stored, split(x), split(g)))
    for check_vma in (True, False):
        # With the check JAX knows that the parameters are everyone's and sums their gradients itself.
        step = jax.shard_map(
            synchronised if check_vma else summed(synchronised),
            mesh=mesh,
            in_specs=(P(), P("batch"), P("batch")),
            out_specs=(P("batch"), P(), P()),
            check_vma=check_vma,
        )
        yield f"shard_map(check_vma={check_vma})", jax.jit(step)
    sharding = NamedSharding(mesh, P("batch"))
    compiled = jax.jit(plain)
    yield "jit", lambda stored, x, g: compiled(stored, *(jax.device_put(leaf, sharding) for leaf in (x, g)))


def deviation(actual: Any, expected: Any) -> float:
    """The largest difference, in units of the array's largest value, or of 1."""

    def one(actual: Any, expected: Any) -> float:
        assert actual.shape == expected.shape
        actual, expected = np.asarray(actual), np.asarray(expected)
        return float(np.max(np.abs(actual - expected)) / max(1.0, np.max(np.abs(expected))))

    return max(jax.tree.leaves(jax.tree.map(one, actual, expected)))


def measure() -> Iterator[tuple[str, dict[str, float]]]:
    """Every layer in every way: how far outputs, gradients and statistics are from the whole batch's."""
    rng = np.random.default_rng(0)
    for label, (name, options) in LAYERS.items():
        start = to_numpy(getattr(rbn_flax.nnx, name)(5, rngs=nnx.Rngs(0), **options))
        state = {key: rng.uniform(0.5, 1.0, value.shape) for key, value in start.items()}
        state["num_batches_tracked"] = np.array(0)
        # One value per channel on a device is none too few where there are four.
        for shape in ((8, 3, 3, 5), *(((4, 5),) if label == "RBN" else ())):
            x, g = (jnp.asarray(rng.normal(mean, size=shape), jnp.float32) for mean in (1.0, 0.0))
            for idiom, make in (("linen", linen_step), ("nnx", nnx_step)):
                plain, stored = make(name, options, state)
                synchronised, _ = make(name, options | {"axis_name": "batch"}, state)
                expected = jax.jit(plain)(stored, x, g)
                for way, step in ways(synchronised, plain):
                    result = dict(zip(("images", "gradients", "statistics"), step(stored, x, g), strict=True))
                    yield (
                        f"{way} {idiom} {label} {len(shape)}",
                        {key: deviation(value, expected[i]) for i, (key, value) in enumerate(result.items())},
                    )


def groups() -> float:
    """Two groups of two devices, against each half of the batch on its own."""
    layer = rbn_flax.RBN(use_running_average=False, axis_name="batch", axis_index_groups=[[0, 1], [2, 3]])
    whole = rbn_flax.RBN(use_running_average=False)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(4, 2, 3, 3, 5)), jnp.float32)
    variables = whole.init(jax.random.key(0), x[0])
    y, stats = jax.pmap(lambda x: layer.apply(variables, x, mutable=["batch_stats"]), axis_name="batch")(x)
    worst = 0.0
    for half in (slice(0, 2), slice(2, 4)):
        expected = whole.apply(variables, x[half].reshape(4, 3, 3, 5), mutable=["batch_stats"])
        found = (y[half].reshape(4, 3, 3, 5), jax.tree.map(lambda leaf, at=half.start: leaf[at], stats))
        worst = max(worst, deviation(found, expected))
    return worst


def images() -> float:
    """Every image on two devices and the batch on two, in training and in evaluation, against one device."""
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("batch", "rows"))
    rng, worst = np.random.default_rng(2), 0.0
    x, g = (jnp.asarray(rng.normal(mean, size=(4, 6, 3, 5)), jnp.float32) for mean in (1.0, 0.0))
    mask = jnp.asarray(rng.random((4, 6, 3, 1)) < 0.7)
    everywhere, parts = P(), P("batch", "rows")
    for name, options in LAYERS.values():
        if name == "BNET":  # whose convolution needs its neighbours' rows
            continue
        named = {"axis_name": "batch", "spatial_axis_name": "rows"}
        start = to_numpy(getattr(rbn_flax.nnx, name)(5, rngs=nnx.Rngs(0), **options))
        state = {key: rng.uniform(0.5, 1.0, value.shape) for key, value in start.items()}
        state["num_batches_tracked"] = np.array(0)
        for make in (nnx_step, linen_step):
            plain, stored = make(name, options, state)
            step, own = make(name, options | named, state)
            shared = jax.shard_map(
                step,
                mesh=mesh,
                in_specs=(everywhere, parts, parts),
                out_specs=(parts, everywhere, everywhere),
            )
            worst = max(worst, *map(deviation, jax.jit(shared)(own, x, g), jax.jit(plain)(stored, x, g)))
        whole, layer = (getattr(rbn_flax, name)(**options, **own) for own in ({}, named))
        for training in (False, True):
            call = {"use_running_average": not training, "mutable": ["batch_stats"]}
            masked = jax.shard_map(
                lambda x, mask, layer=layer, call=call, own=stored: layer.apply(own, x, mask=mask, **call),
                mesh=mesh,
                in_specs=(parts, parts),
                out_specs=(parts, everywhere),
            )
            due = jax.jit(partial(whole.apply, **call))(stored, x, mask=mask)
            worst = max(worst, deviation(jax.jit(masked)(x, mask), due))
    return worst


if __name__ == "__main__":
    assert len(jax.devices()) == DEVICES
    print(json.dumps(dict(measure()) | {"groups": {"all": groups()}, "images": {"all": images()}}))
