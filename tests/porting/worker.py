"""One framework in a process of its own, as its users use it: python worker.py FRAMEWORK ADDRESS.

It does what the parent asks for over the connection: ("method", arguments) gives ("done", result) or
("failed", text). What is called `native` is saved and loaded by the framework's own functions.
"""

import sys
import traceback
from multiprocessing.connection import Client

import numpy as np

from rbn import porting
from rbn_core import weights
from rbn_core.networks import Network

EPSILON = 1e-12
"""Adam's: PyTorch and optax add it behind the correction of the bias, MindSpore and Jittor before."""

DECAY = 0.005
"""How much kernels decay."""


def in_groups(parameters, rate, decay):
    """Two groups of parameters: kernels, and at half of the rate and without weight decay the rest."""
    parameters = list(parameters)
    return [
        {"params": [p for p in parameters if p.ndim > 1], "lr": rate, "weight_decay": decay},
        {"params": [p for p in parameters if p.ndim == 1], "lr": rate / 2, "weight_decay": 0.0},
    ]


class Torch:
    """PyTorch."""

    def build(self, network):
        import torch

        from rbn.backends import torch as backend

        self.torch, self.backend = torch, backend
        torch.manual_seed(0)
        self.model = backend.Network(network)

    def fill(self, state):
        self.backend.from_numpy(self.model, state)

    def state(self):
        return self.backend.to_numpy(self.model)

    def save_native(self, path):
        self.torch.save(self.model.state_dict(), path)

    def load_native(self, path):
        self.model.load_state_dict(self.torch.load(path, weights_only=True))

    def logits(self, images):
        with self.torch.no_grad():
            return self.model.eval()(self.torch.from_numpy(images)).numpy()

    def loss(self, images, classes):
        logits = self.model.train()(self.torch.from_numpy(images))
        return self.torch.nn.functional.cross_entropy(logits, self.torch.from_numpy(classes))

    def gradients(self, images, classes):
        self.model.zero_grad()
        self.loss(images, classes).backward()
        state = {name: p.grad for name, p in self.model.named_parameters()}
        gradients = self.backend.Network(self.model.description)
        gradients.load_state_dict(
            {name: state.get(name, own) for name, own in self.model.state_dict().items()}
        )
        return self.backend.to_numpy(gradients)

    def start(self, kind, rate, decay):
        optim = self.torch.optim
        parameters = self.model.parameters()
        if kind == "adam":
            self.optimizer = optim.Adam(parameters, rate, eps=EPSILON)
            return
        groups = in_groups(parameters, rate, decay)
        sgd = kind == "sgd"
        self.optimizer = optim.SGD(groups, momentum=0.9) if sgd else optim.AdamW(groups, eps=EPSILON)

    def step(self, images, classes):
        self.optimizer.zero_grad()
        loss = self.loss(images, classes)
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def training(self, step):
        return self.backend.optimizer_to_numpy(self.optimizer, self.model, step=step)

    def go_on(self, training):
        self.backend.optimizer_from_numpy(self.optimizer, self.model, training)


class Flax:
    """Flax linen, optax and XLA."""

    def build(self, network):
        import jax
        import jax.numpy as jnp
        import optax

        from rbn.backends import flax as backend

        self.jax, self.jnp, self.optax, self.backend = jax, jnp, optax, backend
        self.model = backend.Network(network)
        self.apply = jax.jit(lambda variables, x: self.model.apply(variables, x, train=False))

        def loss(params, rest, x, classes):
            logits, updated = self.model.apply(
                {"params": params} | rest, x, train=True, mutable=["batch_stats"]
            )
            return optax.losses.softmax_cross_entropy_with_integer_labels(logits, classes).mean(), updated

        self.loss_and_gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))

    def fill(self, state):
        self.variables, _ = self.backend.from_numpy(self.model, state)

    def state(self):
        return self.backend.to_numpy(self.variables, self.model)

    def save_native(self, path):
        from flax import serialization

        path.write_bytes(serialization.to_bytes(self.variables))

    def load_native(self, path):
        from flax import serialization

        self.variables = serialization.from_bytes(self.variables, path.read_bytes())

    def logits(self, images):
        return np.asarray(self.apply(self.variables, images.transpose(0, 2, 3, 1)))

    def loss(self, images, classes):
        params, rest = self.variables["params"], {"batch_stats": self.variables["batch_stats"]}
        (loss, updated), gradients = self.loss_and_gradients(
            params, rest, images.transpose(0, 2, 3, 1), classes
        )
        self.variables = {"params": params} | updated
        return loss, gradients

    def gradients(self, images, classes):
        _, gradients = self.loss(images, classes)
        return self.backend.to_numpy(
            {"params": gradients, "batch_stats": self.variables["batch_stats"]}, self.model
        )

    def start(self, kind, rate, decay):
        optax = self.optax

        def group(rate, decay):
            if kind == "adamw":
                make = optax.inject_hyperparams(optax.adamw)
                return make(learning_rate=rate, weight_decay=decay, eps=EPSILON)
            decayed = optax.inject_hyperparams(optax.add_decayed_weights)(weight_decay=decay)
            return optax.chain(decayed, optax.inject_hyperparams(optax.sgd)(learning_rate=rate, momentum=0.9))

        def labels(params):
            return self.jax.tree.map(lambda leaf: "kernels" if leaf.ndim > 1 else "rest", params)

        groups = {"kernels": group(rate, decay), "rest": group(rate / 2, 0.0)}
        adam = kind == "adam"
        self.optimizer = optax.adam(rate, eps=EPSILON) if adam else optax.multi_transform(groups, labels)
        self.rate = rate if adam else None
        self.opt_state = self.optimizer.init(self.variables["params"])

    def step(self, images, classes):
        loss, gradients = self.loss(images, classes)
        params = self.variables["params"]
        updates, self.opt_state = self.optimizer.update(gradients, self.opt_state, params)
        self.variables["params"] = self.optax.apply_updates(params, updates)
        return float(loss)

    def training(self, step):
        return self.backend.optimizer_to_numpy(self.opt_state, self.model, learning_rate=self.rate, step=step)

    def go_on(self, training):
        self.opt_state = self.backend.optimizer_from_numpy(self.opt_state, self.model, training)


class MindSpore:
    """MindSpore, operation by operation, and compiled where it trains: ten times as fast."""

    def build(self, network):
        import mindspore as ms

        from rbn.backends import mindspore as backend

        self.ms, self.backend = ms, backend
        self.model = backend.Network(network)
        self.loss_and_gradients = ms.value_and_grad(self.loss, None, self.model.trainable_params())

    def fill(self, state):
        self.backend.from_numpy(self.model, state)

    def state(self):
        return self.backend.to_numpy(self.model)

    def save_native(self, path):
        self.ms.save_checkpoint(self.model, str(path))

    def load_native(self, path):
        loaded = self.ms.load_checkpoint(str(path))
        absent, unused = self.ms.load_param_into_net(self.model, loaded, strict_load=True)
        assert (absent, unused) == ([], [])

    def logits(self, images):
        return self.model.set_train(False)(self.ms.Tensor(images)).asnumpy()

    def loss(self, images, classes):
        return self.ms.ops.cross_entropy(self.model(images), classes)

    def tensors(self, images, classes):
        return self.ms.Tensor(images), self.ms.Tensor(classes.astype(np.int32))

    def gradients(self, images, classes):
        self.model.set_train(True)
        _, gradients = self.loss_and_gradients(*self.tensors(images, classes))
        holder = self.backend.Network(self.model.description)
        for parameter, gradient in zip(holder.trainable_params(), gradients, strict=True):
            parameter.set_data(gradient)
        return self.backend.to_numpy(holder)

    def start(self, kind, rate, decay):
        from mindspore.experimental.optim import AdamW

        nn, parameters = self.ms.nn, self.model.trainable_params()
        groups = in_groups(parameters, rate, decay)
        if kind == "adam":
            self.optimizer = nn.Adam(parameters, rate, eps=EPSILON)
        elif kind == "sgd":
            self.optimizer = nn.Momentum(groups, rate, 0.9)
        else:
            self.optimizer = AdamW(groups, eps=EPSILON)
        # Anew, as a compiled graph does not see what `load_param_into_net` has loaded since.
        self.compiled = self.ms.jit(self.ms.value_and_grad(self.loss, None, list(self.optimizer.parameters)))

    def step(self, images, classes):
        self.model.set_train(True)
        loss, gradients = self.compiled(*self.tensors(images, classes))
        self.optimizer(gradients)
        return float(loss.asnumpy())

    def training(self, step):
        return self.backend.optimizer_to_numpy(self.optimizer, self.model)

    def go_on(self, training):
        self.backend.optimizer_from_numpy(self.optimizer, self.model, training)


class Jittor:
    """Jittor."""

    def build(self, network):
        from rbn.backends import jittor as backend

        # isort: split
        # Behind the backend, which sets up what Jittor reads when it is imported.
        import jittor as jt

        self.jt, self.backend = jt, backend
        self.model = backend.Network(network)

    def fill(self, state):
        self.backend.from_numpy(self.model, state)

    def state(self):
        return self.backend.to_numpy(self.model)

    def save_native(self, path):
        self.model.save(str(path))

    def load_native(self, path):
        self.model.load(str(path))

    def logits(self, images):
        self.model.eval()
        return self.model(self.jt.array(images)).numpy()

    def loss(self, images, classes):
        self.model.train()
        logits = self.model(self.jt.array(images))
        return self.jt.nn.cross_entropy_loss(logits, self.jt.array(classes.astype(np.int32)))

    def gradients(self, images, classes):
        loss = self.loss(images, classes)
        named = {name: var for name, var in self.model.named_parameters() if var.requires_grad}
        gradients = dict(zip(named, self.jt.grad(loss, list(named.values())), strict=True))
        holder = self.backend.Network(self.model.description)
        for name, var in holder.named_parameters():
            if name in gradients:
                var.assign(gradients[name])
        return self.backend.to_numpy(holder)

    def start(self, kind, rate, decay):
        parameters = self.model.parameters()
        optim = self.jt.optim
        if kind == "adam":
            self.optimizer = optim.Adam(parameters, rate, EPSILON)
            return
        groups = in_groups(parameters, rate, decay)
        sgd = kind == "sgd"
        self.optimizer = optim.SGD(groups, rate, 0.9) if sgd else optim.AdamW(groups, rate, EPSILON)

    def step(self, images, classes):
        loss = self.loss(images, classes)
        self.optimizer.step(loss)
        return loss.item()

    def training(self, step):
        return self.backend.optimizer_to_numpy(self.optimizer, self.model)

    def go_on(self, training):
        self.backend.optimizer_from_numpy(self.optimizer, self.model, training)


class Porter:
    """No framework of its own: moves files from one to another."""

    def port(self, source, destination, network=None):
        return str(porting.port(source, destination, network=network)).splitlines()[-1]


class Worker:
    """What the parent asks for, in a framework."""

    def __init__(self, framework):
        self.framework = framework
        self.description = ""

    def build(self, description, state):
        """The network of a description with these weights; the last one is kept: compiling takes longest."""
        if description != self.description:
            self.framework.build(Network.from_json(description))
            self.description = description
        self.framework.fill(state)

    def save(self, description, start, native, images):
        """Build a network with the weights of a canonical file, save it, and run it."""
        self.build(description, weights.load(start))
        self.framework.save_native(native)
        return self.framework.logits(images)

    def load(self, native, start, images):
        """Load a file into the network, emptied first, and run it.

        Returns:
            The names of the arrays that lack or are not as in `start`, and the logits.
        """
        expected = weights.load(start)
        self.framework.fill({name: np.zeros_like(value) for name, value in self.framework.state().items()})
        self.framework.load_native(native)
        found = self.framework.state()
        wrong = [
            name
            for name, value in expected.items()
            if name not in found or not np.array_equal(found[name], value)
        ]
        return wrong, self.framework.logits(images)

    def gradients(self, description, start, images, classes):
        """The gradients of the parameters in training, under canonical names."""
        self.build(description, weights.load(start))
        return self.framework.gradients(images, classes)

    def train(self, description, start, kind, rate, batches, at, half, native):
        """The losses of all batches; before batch `at` everything is saved."""
        self.build(description, weights.load(start))
        self.framework.start(kind, rate, DECAY)
        losses = []
        for number, batch in enumerate(batches):
            if number == at:
                weights.save(half, self.framework.state(), training=self.framework.training(number))
                self.framework.save_native(native)
            losses.append(self.framework.step(*batch))
        return losses

    def go_on(self, description, half, native, kind, rate, batches):
        """The losses when training goes on from the optimizer of a canonical file and ported weights.

        The optimizer is built with other rates and decays than the file's, where the framework can set these.
        """
        self.build(description, {name: np.zeros_like(value) for name, value in weights.load(half).items()})
        self.framework.load_native(native)
        set_in_place = not (kind == "sgd" and isinstance(self.framework, MindSpore))
        other_rate = rate if kind == "adam" else 7 * rate
        self.framework.start(kind, other_rate, DECAY + set_in_place)
        self.framework.go_on(weights.read(half).training)
        return [self.framework.step(*batch) for batch in batches]


FRAMEWORKS = {"torch": Torch, "flax": Flax, "mindspore": MindSpore, "jittor": Jittor}

if __name__ == "__main__":
    framework = sys.argv[1]
    worker = Worker(FRAMEWORKS[framework]()) if framework in FRAMEWORKS else Porter()
    with Client(sys.argv[2]) as connection:
        while request := connection.recv():
            method, arguments = request
            try:
                connection.send(("done", getattr(worker, method)(*arguments)))
            except Exception:
                connection.send(("failed", traceback.format_exc()))
