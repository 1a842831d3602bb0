"""One table: what every stored array is called, canonically and in each framework.

gamma, beta and the running statistics keep the name that the framework's own BatchNorm gives them, so that
a plain BatchNorm's weights load; BNET's convolution is the framework's own, in a submodule `conv`. All are
of shape (C,) everywhere, but for the counter of batches, which is a scalar, and the depthwise kernels:
(C, 1, *kernel) canonically and (*kernel, 1, C) in Flax. Flax names carry their collection.
"""

from __future__ import annotations

PARAMETERS = (
    "gamma",
    "beta",
    "center_weight",
    "scale_weight",
    "scale_bias",
    "conv_weight",
    "conv_bias",
)
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")

NAMES: dict[str, dict[str, str]] = {
    "torch": {
        "gamma": "weight",
        "beta": "bias",
        "center_weight": "center_weight",
        "scale_weight": "scale_weight",
        "scale_bias": "scale_bias",
        "conv_weight": "conv.weight",
        "conv_bias": "conv.bias",
        "running_mean": "running_mean",
        "running_var": "running_var",
        "num_batches_tracked": "num_batches_tracked",
    },
    "flax": {
        "gamma": "params/scale",
        "beta": "params/bias",
        "center_weight": "params/center_weight",
        "scale_weight": "params/scale_weight",
        "scale_bias": "params/scale_bias",
        "conv_weight": "params/conv/kernel",
        "conv_bias": "params/conv/bias",
        "running_mean": "batch_stats/mean",
        "running_var": "batch_stats/var",
        "num_batches_tracked": "batch_stats/num_batches_tracked",
    },
    "mindspore": {
        "gamma": "gamma",
        "beta": "beta",
        "center_weight": "center_weight",
        "scale_weight": "scale_weight",
        "scale_bias": "scale_bias",
        "conv_weight": "conv.weight",
        "conv_bias": "conv.bias",
        "running_mean": "moving_mean",
        "running_var": "moving_variance",
        "num_batches_tracked": "num_batches_tracked",
    },
    "jittor": {
        "gamma": "weight",
        "beta": "bias",
        "center_weight": "center_weight",
        "scale_weight": "scale_weight",
        "scale_bias": "scale_bias",
        "conv_weight": "conv.weight",
        "conv_bias": "conv.bias",
        "running_mean": "running_mean",
        "running_var": "running_var",
        "num_batches_tracked": "num_batches_tracked",
    },
}
