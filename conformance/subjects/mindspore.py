"""The MindSpore layers as a subject of the suite."""

from __future__ import annotations

import os
from typing import Any, ClassVar

os.environ.setdefault("GLOG_v", "4")  # MindSpore's warnings would break the printed matrix

import mindspore as ms
import ml_dtypes
import numpy as np
from mindspore import Tensor, ops

from rbn.backends.mindspore import BNET, IEBN, RBN, from_numpy, to_numpy
from rbn.backends.mindspore.weights import stored
from rbn.conformance.subject import Array, Outcome, Subject
from rbn_core.config import Config
from rbn_core.names import PARAMETERS
from rbn_core.weights import State

# MindSpore gives NumPy a "bfloat16" of its own, which knows no arithmetic: the name is the suite's again.
np.sctypeDict["bfloat16"] = ml_dtypes.bfloat16


class MindSpore(Subject):
    """The MindSpore layers, in PyNative mode."""

    name = "mindspore"
    absent: ClassVar[dict[str, str]] = {
        "*/0x*": "MindSpore has no gradient of an empty batch; a test of its own evaluates one"
    }

    def build(self, config: Config, state: State, dtype: str, layout: str = "channels_first") -> None:
        """Make the cell, with parameters in at least float32."""
        common: dict[str, Any] = {
            "eps": config.eps,
            "momentum": config.momentum,
            "use_batch_statistics": None if config.track_running_stats else True,
            "data_format": "NHWC" if layout == "channels_last" else "NCHW",
            "dtype": ms.float64 if dtype == "float64" else ms.float32,
            "running_var": config.running_var,
        }
        affine = config.gamma or config.beta
        if config.layer == "BNET":
            common |= {"kernel_size": config.kernel_size, "spatial_dims": config.spatial_dims}
            self.layer = BNET(config.num_features, **common)
        elif config.layer == "IEBN":
            self.layer = IEBN(config.num_features, affine=affine, **common)
        else:
            common |= {"centering": config.centering, "scaling": config.scaling, "restrict": config.restrict}
            self.layer = RBN(config.num_features, affine=affine, **common)
        from_numpy(self.layer, to_numpy(self.layer) | state)
        self.stored = state.keys()
        self.layout = layout

    def run(self, x: Array, training: bool, cotangent: Array) -> Outcome:
        """Forward and backward through MindSpore's functional gradient."""
        self.layer.set_train(training)
        leaf = self.tensor(x)
        weights = {
            name: weight
            for name, weight in stored(self.layer).items()
            if name in PARAMETERS and name in self.stored
        }
        y, vjp = ops.vjp(self.layer, leaf, weights=list(weights.values()))
        (dx,), gradients = vjp(self.tensor(cotangent))
        shapes = to_numpy(self.layer)
        named = {
            name: value.asnumpy().reshape(shapes[name].shape)
            for name, value in zip(weights, gradients, strict=True)
        }
        return Outcome(self.array(y), self.array(dx), named, self.state(), self.array(leaf))

    def tensor(self, x: Array) -> Tensor:
        """The array as a tensor in the case's layout; NumPy's bfloat16 goes through float32."""
        x = np.moveaxis(x, 1, -1) if self.layout == "channels_last" else x
        bfloat16 = x.dtype.name == "bfloat16"
        return Tensor(x.astype("float32"), ms.bfloat16) if bfloat16 else Tensor(np.ascontiguousarray(x))

    def array(self, tensor: Tensor) -> Array:
        """The tensor as an array of its own dtype, channels first."""
        if tensor.dtype == ms.bfloat16:
            array = tensor.astype(ms.float32).asnumpy().astype("bfloat16")
        else:
            array = tensor.asnumpy()
        return np.moveaxis(array, -1, 1) if self.layout == "channels_last" else array

    def state(self) -> State:
        """The cell's state, as far as the case has it: gamma, beta and the statistics are always there."""
        return {name: value for name, value in to_numpy(self.layer).items() if name in self.stored}
