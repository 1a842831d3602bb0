"""`rbn.backends.torch.RBN` as a subject of the suite."""

from __future__ import annotations

import torch

from rbn.backends.torch import RBN, from_numpy, to_numpy
from rbn.conformance.subject import Array, Outcome, Subject
from rbn_core.config import Config
from rbn_core.names import NAMES
from rbn_core.weights import State


class Torch(Subject):
    """The PyTorch layer."""

    name = "torch"

    def build(self, config: Config, state: State, dtype: str) -> None:
        """Make the module, with parameters in at least float32."""
        self.layer = RBN(
            config.num_features,
            config.eps,
            None if config.momentum is None else 1.0 - config.momentum,
            config.gamma,
            config.track_running_stats,
            dtype=torch.promote_types(getattr(torch, dtype), torch.float32),
            bias=config.beta,
            centering=config.centering,
            scaling=config.scaling,
            restrict=config.restrict,
            running_var=config.running_var,
        )
        from_numpy(self.layer, state)

    def run(self, x: Array, training: bool, cotangent: Array) -> Outcome:
        """Forward and backward through autograd."""
        self.layer.train(training)
        self.layer.zero_grad()
        leaf = torch.from_numpy(x).requires_grad_(x.dtype.kind == "f")
        y = self.layer(leaf)
        y.backward(torch.from_numpy(cotangent))
        stored = dict(self.layer.named_parameters())
        gradients = {
            canonical: stored[name].grad.numpy()
            for canonical, name in NAMES["torch"].items()
            if name in stored
        }
        return Outcome(y.detach().numpy(), leaf.grad.numpy(), gradients, self.state(), leaf.detach().numpy())

    def state(self) -> State:
        """The module's state."""
        return to_numpy(self.layer)
