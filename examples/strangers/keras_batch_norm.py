"""Keras's BatchNormalization, held to the reference on the backend that KERAS_BACKEND names."""

from typing import Any

import keras
import numpy as np
from findings import Finding, declared
from stranger import Stranger

from rbn_core.config import Config

BACKEND = keras.backend.backend()
if BACKEND == "jax":
    import jax

    jax.config.update("jax_enable_x64", True)
elif BACKEND == "tensorflow":
    import tensorflow as tf
else:
    import torch

ONE_PASS = Finding(
    "on PyTorch the variance is E[X²] - E[X]², which loses its digits where the mean is large compared with "
    "the deviation, and can become negative: for 4096 and 4097 it is 0, and Y is 15.8 where 1 is right; "
    "three values of 1000.4 give NaN",
    "keras_one_pass_variance.py",
    ("bn/train/offset1000/*/float32",),
    "https://github.com/keras-team/keras/pull/18795, which fixed it for TensorFlow and JAX",
)
IN_FLOAT32 = Finding(
    'on PyTorch and JAX a layer of dtype="float64" returns a float64 result that was computed in float32, '
    "with 8 right digits",
    "keras_float64.py",
    ("bn/*/float64",),
)
ACCEPTED = Finding(
    "trains on one value per channel, which has no variance: Y is beta whatever X is, and the running "
    "variance shrinks",
    "keras_one_value.py",
    ("bn/train/offset0/1x3*",),
)
FINDINGS = {
    "subject": {
        "torch": (ONE_PASS, IN_FLOAT32, ACCEPTED),
        "jax": (IN_FLOAT32, ACCEPTED),
        "tensorflow": (ACCEPTED,),
    }[BACKEND]
}
POLICIES = {"float16": "mixed_float16", "bfloat16": "mixed_bfloat16"}
NAMES = {"gamma": "gamma", "beta": "beta", "running_mean": "moving_mean", "running_var": "moving_variance"}


def pulled_back(layer: Any, x: Any, training: bool, cotangent: Any) -> tuple[Any, list[Any]]:
    """Y, and the gradients of sum(Y * cotangent) for X and for the layer's parameters."""
    weights = [weight.value for weight in layer.trainable_weights]
    if BACKEND == "tensorflow":
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=training)
        return y, tape.gradient(y, [x, *weights], cotangent)
    if BACKEND == "torch":
        y = layer(x.requires_grad_(), training=training)
        return y, list(torch.autograd.grad(y, [x, *weights], cotangent))
    kept = layer.non_trainable_variables

    def forward(x: Any, weights: Any) -> Any:
        return layer.stateless_call(weights, [each.value for each in kept], x, training=training)

    y, pull, after = jax.vjp(forward, x, weights, has_aux=True)
    for variable, value in zip(kept, after, strict=True):
        variable.assign(value)
    dx, gradients = pull(cotangent)
    return y, [dx, *gradients]


def tensor(x: Any) -> Any:
    """The array as a tensor of the backend; NumPy's bfloat16 goes through float32."""
    name = x.dtype.name
    return keras.ops.cast(keras.ops.convert_to_tensor(x.astype("float32") if name == "bfloat16" else x), name)


def array(x: Any) -> Any:
    """The tensor as an array of its own dtype."""
    name = keras.backend.standardize_dtype(x.dtype)
    x = keras.ops.cast(x, "float32") if name == "bfloat16" else x
    return np.array(keras.ops.convert_to_numpy(x)).astype(name)


def step(x: Any, state: Any, config: Config, training: bool, cotangent: Any) -> Any:
    """One step of keras.layers.BatchNormalization."""
    layer = keras.layers.BatchNormalization(
        axis=1,
        momentum=config.momentum,
        epsilon=config.eps,
        center=config.beta,
        scale=config.gamma,
        dtype=POLICIES.get(x.dtype.name, x.dtype.name),
    )
    layer.build(x.shape)
    for name, value in state.items():
        getattr(layer, NAMES[name]).assign(tensor(value))
    y, (dx, *gradients) = pulled_back(layer, tensor(x), training, tensor(cotangent))
    learned = [weight.name for weight in layer.trainable_weights]
    after = {name: array(getattr(layer, NAMES[name]).value) for name in state}
    return array(y), array(dx), dict(zip(learned, map(array, gradients), strict=True)), after


subject = Stranger(
    f"keras BatchNormalization on {BACKEND}",
    step,
    {"running_var": "biased", "track_running_stats": True},
    expected_failures=declared(FINDINGS["subject"]),
)
