"""An RBN of one's own in plain NumPy, with its gradients by hand, held to the suite.

In this folder:

    rbn conform --subject numpy_rbn:subject
"""

import math
from typing import Any

import numpy as np

from rbn.conformance.subjects.numpy import NumpyFunction
from rbn_core.config import Config

Arrays = dict[str, Any]


def rbn(
    x: Any, state: Arrays, config: Config, training: bool, cotangent: Any
) -> tuple[Any, Any, Arrays, Arrays]:
    """One step of RBN with channel means: Y, dX, the parameters' gradients, and the state after it."""
    for name, shape in config.state_shapes().items():
        if name != "num_batches_tracked" and (name not in state or state[name].shape != shape):
            raise ValueError(f"expected {name} of shape {shape}, got {state.get(name)}")
    values = x.size // x.shape[1]
    if training and values <= 1:
        raise ValueError(f"expected more than one value per channel, got an input of shape {x.shape}")

    flat = (*x.shape[:2], math.prod(x.shape[2:]))  # (N, C, positions)
    X, dY = x.reshape(flat).astype(float), cotangent.reshape(flat).astype(float)
    now = {name: value.astype(float) for name, value in state.items()}
    gamma, beta, w_m, w_v, w_b, running_mean, running_var = (
        now[name][:, None]
        for name in (
            "gamma",
            "beta",
            "center_weight",
            "scale_weight",
            "scale_bias",
            "running_mean",
            "running_var",
        )
    )
    batch = (0, 2)

    # X_cm = X + w_m K_m, less its mean: the batch's is (1 + w_m) E(X), and is taken off first.
    E = X.mean(batch, keepdims=True)[0] if training else np.zeros_like(running_mean)
    K_m = (X - E).mean(2, keepdims=True)
    X_m = X - E + w_m * K_m - (0.0 if training else running_mean)
    Var = (X_m**2).mean(batch, keepdims=True)[0] if training else running_var
    inverse = 1.0 / np.sqrt(Var + config.eps)
    X_s = X_m * inverse
    K_s = X_s.mean(2, keepdims=True)
    R = 1.0 / (1.0 + np.exp(-(w_v * K_s + w_b)))
    Y = X_s * R * gamma + beta

    dR = (dY * gamma * X_s).sum(2, keepdims=True) * R * (1.0 - R)
    dX_s = dY * gamma * R + w_v * dR / flat[2]
    if training:
        dX_s = dX_s - dX_s.mean(batch, keepdims=True) - X_s * (dX_s * X_s).mean(batch, keepdims=True)
    dX_cm = dX_s * inverse
    dX = dX_cm + w_m * dX_cm.mean(2, keepdims=True)
    gradients = {
        "gamma": (dY * X_s * R).sum(batch),
        "beta": dY.sum(batch),
        "center_weight": (dX_cm * K_m).sum(batch),
        "scale_weight": (dR * K_s).sum(batch),
        "scale_bias": dR.sum(batch),
    }
    if training:
        m = config.momentum
        now["running_mean"] = m * now["running_mean"] + (1 - m) * ((1 + w_m) * E)[:, 0]
        now["running_var"] = m * now["running_var"] + (1 - m) * Var[:, 0] * values / (values - 1)
    return Y.reshape(x.shape).astype(x.dtype), dX.reshape(x.shape).astype(x.dtype), gradients, now


subject = NumpyFunction(
    "RBN in NumPy",
    rbn,
    momentum="old",  # m weighs the old running value, as in the paper
    layers=("rbn",),
    counts_batches=False,
    fixed={  # what it has no option for, and always does
        "centering": "channel_mean",
        "scaling": "channel_mean",
        "restrict": "sigmoid",
        "running_var": "unbiased",
        "gamma": True,
        "beta": True,
        "track_running_stats": True,
    },
)
