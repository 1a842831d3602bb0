"""A run in Flax."""

from __future__ import annotations

import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax  # type: ignore[import-untyped]
from flax import traverse_util
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from numpy.typing import NDArray

from rbn.backends.flax import (
    from_numpy,
    networks,
    optimizer_from_numpy,
    optimizer_to_numpy,
    parameter_groups,
    to_numpy,
)
from rbn.training.loop import BETAS, EPSILON, Scores, check_device
from rbn.training.preset import Preset
from rbn.training.share import ALONE, Share, check_parts
from rbn_core.execution import initial_state
from rbn_core.matching import State
from rbn_core.names import to_own
from rbn_core.networks import Network
from rbn_core.training import Training


def join(device: str) -> Share:
    """Join the other hosts of `JAX_COORDINATOR_ADDRESS`.

    `JAX_NUM_PROCESSES` says how many there are and `JAX_PROCESS_ID` which this one is, but on a cluster that
    JAX knows.
    """
    if "JAX_COORDINATOR_ADDRESS" not in os.environ:
        return ALONE
    if not jax.distributed.is_initialized():
        numbers = (os.environ.get(name) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
        count, index = (None if number is None else int(number) for number in numbers)
        jax.distributed.initialize(num_processes=count, process_id=index)
    return Share(jax.process_index(), jax.process_count())


class Loop:
    """See `rbn.training.loop.Loop`; devices are JAX's platforms, such as "cpu" and "gpu".

    A batch is sharded over all devices, where a compiled function has the statistics of all of it.
    """

    sync = True

    def __init__(self, network: Network, preset: Preset, device: str, share: Share) -> None:
        known = [device.platform for device in jax.devices()]
        check_device(device or known[0], [*dict.fromkeys([*known, "cpu"])])
        devices = jax.devices(device or known[0])
        self.share, self.parts = share, len(devices)
        check_parts(preset, self.parts)
        mesh = Mesh(np.array(devices), ("batch",))
        self.everywhere = NamedSharding(mesh, PartitionSpec())
        self.spread = NamedSharding(mesh, PartitionSpec(None, "batch"))
        if preset.dtype == "float64":
            jax.config.update("jax_enable_x64", True)
        self.preset = preset
        self.dtype = jnp.dtype(preset.dtype)
        self.model = networks.Network(network)
        self.variables = self._filled(initial_state(network))
        self.decays = self._decays()
        self.optimizer = self._optimizer()
        self.optimizer_state = self.optimizer.init(self.variables["params"])
        self._step = jax.jit(self._stepped, donate_argnums=(0, 1))
        self._evaluate = jax.jit(self._scores)

    def step(self, images: NDArray[Any], labels: NDArray[Any], learning_rate: float) -> tuple[float, int]:
        """One update."""
        x, target = self._arrays(images, labels, self.preset.accumulate)
        rate = jax.device_put(np.asarray(learning_rate, self.dtype), self.everywhere)
        self.variables, self.optimizer_state, loss, correct = self._step(
            self.variables, self.optimizer_state, x, target, rate
        )
        return float(loss), int(correct)

    def evaluate(self, images: NDArray[Any], labels: NDArray[Any]) -> Scores:
        """The scores of a batch."""
        count, loss, top1, top5 = self._evaluate(self.variables, *self._arrays(images, labels, 1))
        return Scores(int(count), float(loss), int(top1), int(top5))

    def align(self) -> None:
        """Nothing: all devices have the same statistics."""

    def any(self, flag: bool) -> bool:
        """Whether any process says so."""
        return bool(np.any(multihost_utils.process_allgather(np.array(flag))))

    def state(self) -> State:
        """The weights."""
        return to_numpy(self.variables, self.model)

    def training(self) -> Training:
        """Where the optimizer stands."""
        return optimizer_to_numpy(
            self.optimizer_state,
            self.model,
            weight_decay=self.decays,
            decoupled=self.preset.optimizer == "adamw",
        )

    def load(self, state: State, training: Training | None) -> None:
        """Take a state."""
        self.variables = self._filled(state)
        if training is not None:
            filled = optimizer_from_numpy(self.optimizer_state, self.model, training)
            self.optimizer_state = jax.device_put(filled, self.everywhere)

    def _stepped(self, variables: Any, optimizer_state: Any, x: Any, target: Any, rate: Any) -> Any:
        parts, params = self.preset.accumulate, variables["params"]
        if parts == 1:
            found, stats = self._gradients(params, variables["batch_stats"], x[0], target[0])
        else:

            def added(carry: Any, part: Any) -> Any:
                sums, stats = carry
                found, stats = self._gradients(params, stats, *part)
                return (jax.tree.map(jnp.add, sums, found), stats), None

            shapes = jax.eval_shape(self._gradients, params, variables["batch_stats"], x[0], target[0])[0]
            zeros = jax.tree.map(lambda each: jnp.zeros(each.shape, each.dtype), shapes)
            (found, stats), _ = jax.lax.scan(added, (zeros, variables["batch_stats"]), (x, target))
        loss, correct, gradients = found
        hyperparams = optimizer_state.hyperparams | {"learning_rate": rate}
        updates, optimizer_state = self.optimizer.update(
            jax.tree.map(lambda each: each / parts, gradients),
            optimizer_state._replace(hyperparams=hyperparams),
            params,
        )
        params = optax.apply_updates(params, updates)
        return {"params": params, "batch_stats": stats}, optimizer_state, loss / parts, correct

    def _gradients(self, params: Any, stats: Any, x: Any, target: Any) -> Any:
        """Loss, images classified right and gradients of a part of a batch; and the statistics behind it."""

        def loss_of(params: Any) -> Any:
            logits, changed = self.model.apply(
                {"params": params, "batch_stats": stats}, x, train=True, mutable=["batch_stats"]
            )
            q = optax.smooth_labels(
                jax.nn.one_hot(target, logits.shape[1], dtype=logits.dtype), self.preset.label_smoothing
            )
            loss = optax.softmax_cross_entropy(logits, q).mean()
            return loss, (changed.get("batch_stats", {}), (logits.argmax(1) == target).sum())

        (loss, (stats, correct)), gradients = jax.value_and_grad(loss_of, has_aux=True)(params)
        return (loss, correct, gradients), stats

    def _scores(self, variables: Any, x: Any, target: Any) -> Any:
        x, target = x[0], target[0]
        logits = self.model.apply(variables, x, train=False)
        real = target >= 0
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(real, target, 0))
        found = jax.lax.top_k(logits, min(5, logits.shape[1]))[1] == target[:, None]
        return real.sum(), jnp.where(real, losses, 0).sum(), found[:, 0].sum(), found.sum()

    def _arrays(self, images: NDArray[Any], labels: NDArray[Any], parts: int) -> Any:
        """This process's share of (parts, N / parts, H, W, C) images, and of their classes."""
        x = np.ascontiguousarray(images.transpose(0, 2, 3, 1)).astype(self.dtype, copy=False)
        return [
            jax.make_array_from_process_local_data(self.spread, each.reshape(parts, -1, *each.shape[1:]))
            for each in (x, labels.astype(np.int32))
        ]

    def _filled(self, state: State) -> Any:
        """The variables of a state, in the run's dtype, on its device."""
        variables, _ = from_numpy(self.model, state)
        if self.dtype == jnp.float64:  # the layers' own is float32, to which `from_numpy` has rounded
            kinds = {path: layer["kind"] for path, layer in self.model.description.layers().items()}
            own = to_own("flax", state, kinds)
            flat = traverse_util.flatten_dict(variables, sep="/")
            flat = {
                name: jnp.asarray(own[name], self.dtype)
                if jnp.issubdtype(array.dtype, jnp.floating)
                else array
                for name, array in flat.items()
            }
            variables = traverse_util.unflatten_dict(flat, sep="/")
        return jax.device_put({"batch_stats": {}} | variables, self.everywhere)

    def _decays(self) -> dict[str, float]:
        """The weight decay of every parameter, by canonical name: optax does not store it."""
        params = traverse_util.flatten_dict(self.variables["params"])
        masks = traverse_util.flatten_dict(parameter_groups(self.variables))
        decays = {
            path: np.full(array.shape, self.preset.weight_decay * (self.preset.decay_norms or masks[path]))
            for path, array in params.items()
        }
        state = to_numpy({"params": traverse_util.unflatten_dict(decays)}, self.model)
        return {name: float(array.flat[0]) for name, array in state.items()}

    def _optimizer(self) -> Any:
        preset = self.preset
        mask = None if preset.decay_norms else parameter_groups(self.variables)

        def chain(learning_rate: Any) -> Any:
            if preset.optimizer == "adamw":
                return optax.adamw(
                    learning_rate, *BETAS, EPSILON, weight_decay=preset.weight_decay, mask=mask
                )
            return optax.chain(
                optax.add_decayed_weights(preset.weight_decay, mask),
                optax.sgd(learning_rate, preset.momentum),
            )

        dtype = jnp.dtype(preset.dtype)
        return optax.inject_hyperparams(chain, hyperparam_dtype=dtype)(learning_rate=preset.learning_rate)
