import equinox as eqx
import jax
import jax.numpy as jnp

x = jnp.array([[-1.0], [1.0]])
layer, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(1, "batch", mode="batch")
batch = {"axis_name": "batch", "in_axes": (0, None), "out_axes": (0, None)}
for steps in range(1, 101):
    y, state = jax.vmap(layer, **batch)(x, state)
    if steps in (1, 10, 100):
        evaluated, _ = jax.vmap(eqx.nn.inference_mode(layer), **batch)(x, state)
        print(f"after {steps} batches: Y is {y[1, 0]:.2f} in training and {evaluated[1, 0]:.2f} in inference")
