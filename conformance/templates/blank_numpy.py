"""A layer of your own in NumPy, held to the reference: rbn conform --subject MODULE:subject.

As it stands it is a BatchNorm that conforms. TO DO, to make it RBN:

1. write the two calibrations and their gradients, where it says so below;
2. take out the line that raises NotImplementedError, and `absent`, which says that this is still to be done;
3. take out of `fixed` what your layer has an option for.
"""

import math
from typing import Any

import numpy as np

from rbn.conformance.subjects.numpy import NumpyFunction
from rbn_core.config import Config

Arrays = dict[str, Any]


def step(
    x: Any, state: Arrays, config: Config, training: bool, cotangent: Any
) -> tuple[Any, Any, Arrays, Arrays]:
    """One step, forward and backward: Y, dX, the gradients of the parameters, and the state after it.

    x and cotangent are (N, C, *spatial); the state has arrays of shape (C,) under the names gamma, beta,
    center_weight, scale_weight, scale_bias, running_mean and running_var.
    """
    if config.centering or config.scaling:
        raise NotImplementedError("the calibrations are still to be written")  # TO DO
    for name, shape in config.state_shapes().items():
        if name != "num_batches_tracked" and (name not in state or state[name].shape != shape):
            raise ValueError(f"expected {name} of shape {shape}, got {state.get(name)}")
    values = x.size // x.shape[1]
    if training and values <= 1:
        raise ValueError(f"expected more than one value per channel, got an input of shape {x.shape}")

    flat = (*x.shape[:2], math.prod(x.shape[2:]))  # (N, C, positions)
    X, dY = x.reshape(flat).astype(float), cotangent.reshape(flat).astype(float)
    now = {name: value.astype(float) for name, value in state.items()}
    gamma, beta = now["gamma"][:, None], now["beta"][:, None]

    # TO DO: the centering calibration X_cm = X + w_m K_m, K_m the plane means of X.
    mean = X.mean((0, 2)) if training else now["running_mean"]
    X_m = X - mean[:, None]
    var = (X_m**2).mean((0, 2)) if training else now["running_var"]
    inverse = 1.0 / np.sqrt(var + config.eps)[:, None]
    X_s = X_m * inverse
    # TO DO: the scaling calibration X_cs = X_s sigmoid(w_v K_s + w_b), K_s the plane means of X_s.
    Y = X_s * gamma + beta

    # TO DO: the gradients of the calibrations, and of center_weight, scale_weight and scale_bias.
    dX_s = dY * gamma
    if training:
        dX_s = dX_s - dX_s.mean((0, 2), keepdims=True) - X_s * (dX_s * X_s).mean((0, 2), keepdims=True)
    dX = dX_s * inverse
    gradients = {"gamma": (dY * X_s).sum((0, 2)), "beta": dY.sum((0, 2))}

    if training:
        m = config.momentum
        assert m is not None  # None is for layers that count batches
        now["running_mean"] = m * now["running_mean"] + (1.0 - m) * mean
        now["running_var"] = m * now["running_var"] + (1.0 - m) * var * values / (values - 1)
    return Y.reshape(x.shape).astype(x.dtype), dX.reshape(x.shape).astype(x.dtype), gradients, now


subject = NumpyFunction(
    "my layer",
    step,
    momentum="old",  # the momentum above weighs the old running value; "new" is the batch's, as in PyTorch
    layers=("bn", "rbn"),  # what it is held to; there are "iebn" and "bnet", too
    counts_batches=False,  # it stores no num_batches_tracked
    fixed={  # what it has no option for, and always does
        "centering": "channel_mean",
        "scaling": "channel_mean",
        "restrict": "sigmoid",
        "running_var": "unbiased",
        "gamma": True,
        "beta": True,
        "track_running_stats": True,
    },
    absent={"rbn/*": "TO DO: the calibrations of RBN"},
)
