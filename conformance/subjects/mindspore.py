"""`rbn.backends.mindspore.RBN` as a subject of the suite."""

from __future__ import annotations

import os
from typing import ClassVar

os.environ.setdefault("GLOG_v", "4")  # MindSpore's warnings would break the printed matrix

import mindspore as ms
from mindspore import Tensor, ops

from rbn.backends.mindspore import RBN, from_numpy, to_numpy
from rbn.conformance.subject import Array, Outcome, Subject
from rbn_core.config import Config
from rbn_core.names import NAMES
from rbn_core.weights import State


class MindSpore(Subject):
    """The MindSpore layer, in PyNative mode."""

    name = "mindspore"
    absent: ClassVar[dict[str, str]] = {
        "*/0x*": "MindSpore has no gradient of an empty batch; a test of its own evaluates one"
    }

    def build(self, config: Config, state: State, dtype: str) -> None:
        """Make the cell, with parameters in at least float32."""
        self.names = tuple(config.parameters)
        self.layer = RBN(
            config.num_features,
            config.eps,
            config.momentum,
            config.gamma or config.beta,
            use_batch_statistics=None if config.track_running_stats else True,
            dtype=ms.float64 if dtype == "float64" else ms.float32,
            centering=config.centering,
            scaling=config.scaling,
            restrict=config.restrict,
            running_var=config.running_var,
        )
        from_numpy(self.layer, to_numpy(self.layer) | state)
        self.stored = state.keys()

    def run(self, x: Array, training: bool, cotangent: Array) -> Outcome:
        """Forward and backward through MindSpore's functional gradient."""
        self.layer.set_train(training)
        leaf = Tensor(x)
        weights = [getattr(self.layer, NAMES["mindspore"][name]) for name in self.names]
        y, vjp = ops.vjp(self.layer, leaf, weights=weights)
        (dx,), gradients = vjp(Tensor(cotangent))
        named = {name: value.asnumpy() for name, value in zip(self.names, gradients, strict=True)}
        return Outcome(y.asnumpy(), dx.asnumpy(), named, self.state(), leaf.asnumpy())

    def state(self) -> State:
        """The cell's state, as far as the case has it: gamma, beta and the statistics are always there."""
        return {name: value for name, value in to_numpy(self.layer).items() if name in self.stored}
