"""A run in Flax."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax  # type: ignore[import-untyped]
from flax import traverse_util
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
from rbn_core.execution import initial_state
from rbn_core.matching import State
from rbn_core.names import to_own
from rbn_core.networks import Network
from rbn_core.training import Training


class Loop:
    """See `rbn.training.loop.Loop`; devices are JAX's platforms, such as "cpu" and "gpu"."""

    def __init__(self, network: Network, preset: Preset, device: str) -> None:
        known = [device.platform for device in jax.devices()]
        check_device(device or known[0], [*dict.fromkeys([*known, "cpu"])])
        self.device = jax.devices(device or known[0])[0]
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
        x, target = self._arrays(images, labels)
        rate = jnp.asarray(learning_rate, self.dtype)
        self.variables, self.optimizer_state, loss, correct = self._step(
            self.variables, self.optimizer_state, x, target, rate
        )
        return float(loss), int(correct)

    def evaluate(self, images: NDArray[Any], labels: NDArray[Any]) -> Scores:
        """The scores of a batch."""
        count, loss, top1, top5 = self._evaluate(self.variables, *self._arrays(images, labels))
        return Scores(int(count), float(loss), int(top1), int(top5))

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
            self.optimizer_state = jax.device_put(filled, self.device)

    def _stepped(self, variables: Any, optimizer_state: Any, x: Any, target: Any, rate: Any) -> Any:
        def loss_of(params: Any) -> Any:
            logits, changed = self.model.apply(
                variables | {"params": params}, x, train=True, mutable=["batch_stats"]
            )
            q = optax.smooth_labels(
                jax.nn.one_hot(target, logits.shape[1], dtype=logits.dtype), self.preset.label_smoothing
            )
            loss = optax.softmax_cross_entropy(logits, q).mean()
            return loss, (changed, (logits.argmax(1) == target).sum())

        differentiate = jax.value_and_grad(loss_of, has_aux=True)
        (loss, (changed, correct)), gradients = differentiate(variables["params"])
        hyperparams = optimizer_state.hyperparams | {"learning_rate": rate}
        updates, optimizer_state = self.optimizer.update(
            gradients, optimizer_state._replace(hyperparams=hyperparams), variables["params"]
        )
        params = optax.apply_updates(variables["params"], updates)
        return variables | changed | {"params": params}, optimizer_state, loss, correct

    def _scores(self, variables: Any, x: Any, target: Any) -> Any:
        logits = self.model.apply(variables, x, train=False)
        real = target >= 0
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(real, target, 0))
        found = jax.lax.top_k(logits, min(5, logits.shape[1]))[1] == target[:, None]
        return real.sum(), jnp.where(real, losses, 0).sum(), found[:, 0].sum(), found.sum()

    def _arrays(self, images: NDArray[Any], labels: NDArray[Any]) -> Any:
        x = np.ascontiguousarray(images.transpose(0, 2, 3, 1)).astype(self.dtype, copy=False)
        return jax.device_put((x, labels.astype(np.int32)), self.device)

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
        return jax.device_put(variables, self.device)

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
