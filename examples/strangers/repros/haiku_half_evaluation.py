import haiku as hk
import jax.numpy as jnp

layer = hk.transform_with_state(lambda x, training: hk.BatchNorm(True, True, 0.9)(x, training))
x = jnp.array([[-300.0], [300.0]])
params, state = layer.init(None, x, True)
for dtype in (jnp.float32, jnp.float16):
    y, _ = layer.apply(params, state, None, x.astype(dtype), False)
    print(f"{jnp.dtype(dtype)}: Y is {y[0, 0]:.2f} and {y[1, 0]:.2f}")
