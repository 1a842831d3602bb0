"""The PyTorch layers as a subject of the suite."""

from __future__ import annotations

from typing import Any

import torch

from rbn.backends.torch import BNET, IEBN, RBN, from_numpy, to_numpy
from rbn.conformance.subject import Array, Outcome, Subject
from rbn_core.config import Config
from rbn_core.names import NAMES
from rbn_core.weights import State


class Torch(Subject):
    """The PyTorch layers."""

    name = "torch"

    def build(self, config: Config, state: State, dtype: str, layout: str = "channels_first") -> None:
        """Make the module, with parameters in at least float32."""
        self.dtype = getattr(torch, dtype)
        self.layout = layout
        common: dict[str, Any] = {
            "eps": config.eps,
            "momentum": None if config.momentum is None else 1.0 - config.momentum,
            "track_running_stats": config.track_running_stats,
            "running_var": config.running_var,
            "dtype": torch.promote_types(self.dtype, torch.float32),
        }
        if config.kernel_size is not None:
            common["spatial_dims"] = config.spatial_dims
            self.layer = BNET(config.num_features, config.kernel_size, **common)
        else:
            common |= {"affine": config.gamma, "bias": config.beta}
            if config.layer == "IEBN":
                self.layer = IEBN(config.num_features, **common)
            else:
                for name in ("centering", "scaling", "restrict"):
                    common[name] = getattr(config, name)
                self.layer = RBN(config.num_features, **common)
        from_numpy(self.layer, state)

    def run(self, x: Array, training: bool, cotangent: Array) -> Outcome:
        """Forward and backward through autograd."""
        self.layer.train(training)
        self.layer.zero_grad()
        leaf = self.tensor(x).requires_grad_(x.dtype.kind in "fV")
        y = self.layer(leaf)
        y.backward(self.tensor(cotangent))
        stored = dict(self.layer.named_parameters())
        gradients = {
            canonical: array(stored[name].grad)
            for canonical, name in NAMES["torch"].items()
            if name in stored
        }
        return Outcome(array(y), array(leaf.grad), gradients, self.state(), array(leaf))

    def tensor(self, x: Array) -> torch.Tensor:
        """The array as a tensor in the case's memory format; NumPy's bfloat16 goes through float32."""
        bfloat16 = x.dtype.name == "bfloat16"
        tensor = torch.from_numpy(x.astype("float32")).bfloat16() if bfloat16 else torch.from_numpy(x)
        if self.layout == "channels_last":
            tensor = tensor.movedim(1, -1).contiguous().movedim(-1, 1)
        return tensor

    def state(self) -> State:
        """The module's state."""
        return to_numpy(self.layer)


def array(tensor: torch.Tensor) -> Array:
    """The tensor as an array of its own dtype."""
    tensor = tensor.detach()
    return tensor.float().numpy().astype("bfloat16") if tensor.dtype == torch.bfloat16 else tensor.numpy()
